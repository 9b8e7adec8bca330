"""Whether values in 0 .. 1 form two humps, and where the upper one begins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_BINS = 128
_SMOOTH = 3.0  # standard deviation of the kernel in bins
_RISE = 0.1  # how far a hump must rise above the valley, as a share of the valley
_SURE = 4.5  # and in standard errors of the difference; seen in none of 9,000 samples of one hump
_ROUNDS = 500  # of the fit


@dataclass(frozen=True)
class Humps:
    """Two humps in the distribution of values, as a mixture of two normal distributions.

    Attributes:
        means: Their means, ascending.
        deviations: Their standard deviations.
        share: Share of the values in the upper one, 0 to 1.
        cut: A value from here on is more likely in the upper hump than in the lower one.
        valley: Where the density between the two is lowest.
    """

    means: tuple[float, float]
    deviations: tuple[float, float]
    share: float
    cut: float
    valley: float

    def chance(self, values_N: npt.ArrayLike) -> Floats:
        """Return the probability that each value is in the upper hump, (N,) float64; it rises with the value.

        Beyond the two means the mixture would favour the wider hump again; values there count as the mean.
        """
        x_N = np.clip(np.asarray(values_N, np.float64), *self.means)[..., None]
        logs_N2 = _logs(x_N, np.array(self.means), np.array(self.deviations), np.array([1 - self.share, self.share]))
        with np.errstate(under="ignore", over="ignore"):
            return np.asarray(1 / (1 + np.exp(np.clip(logs_N2[..., 0] - logs_N2[..., 1], -700, 700))), np.float64)


def humps(values_N: npt.ArrayLike) -> Humps | None:
    """Return the two humps that values form; None if there is only one.

    A mixture of two normal distributions can be fitted to anything, so it says nothing about whether there are two
    humps. They count as two if a smoothed histogram has a valley: both sides must rise above it by a tenth, and by 4.5
    standard errors. The order of the values makes no difference.

    Args:
        values_N: (N,) values in 0 .. 1; others, and NaN, are left out.
    """
    values = np.asarray(values_N, np.float64)
    counts_K = np.histogram(values[(values >= 0) & (values <= 1)], _BINS, (0, 1))[0].astype(np.float64)
    valley = _valley(counts_K)
    return None if valley is None else _fitted(counts_K, valley)


def _valley(counts_K: Floats) -> int | None:
    """Return the bin of the deepest valley of a histogram; None if it has no clear one."""
    reach = np.arange(-3 * int(_SMOOTH), 3 * int(_SMOOTH) + 1)
    kernel = np.exp(-0.5 * (reach / _SMOOTH) ** 2)
    kernel /= kernel.sum()
    smooth_K = np.convolve(np.pad(counts_K, len(reach) // 2, mode="symmetric"), kernel, "valid")
    lower_K = np.maximum.accumulate(smooth_K)
    upper_K = np.maximum.accumulate(smooth_K[::-1])[::-1]
    rise_K = np.minimum(lower_K, upper_K) - smooth_K
    at = int(np.argmax(rise_K))
    top, bottom = rise_K[at] + smooth_K[at], smooth_K[at]
    error = np.sqrt((top + bottom) * np.square(kernel).sum())  # counts of bins vary as their square roots
    return at if rise_K[at] > _RISE * bottom and rise_K[at] > _SURE * error else None


def _fitted(counts_K: Floats, valley: int) -> Humps:
    """Fit two normal distributions to a histogram by expectation maximisation, from the two sides of its valley."""
    at_K = (np.arange(_BINS) + 0.5) / _BINS
    upper_K = (np.arange(_BINS) > valley).astype(np.float64)
    parts_2K = np.stack([1 - upper_K, upper_K])
    for _ in range(_ROUNDS):
        weights_2K = parts_2K * counts_K
        sums_2 = weights_2K.sum(axis=1)
        means_2 = (weights_2K @ at_K) / sums_2
        spread_2 = (weights_2K * (at_K - means_2[:, None]) ** 2).sum(axis=1) / sums_2
        deviations_2 = np.sqrt(np.maximum(spread_2, _BINS**-2.0))
        logs_K2 = _logs(at_K[:, None], means_2, deviations_2, sums_2 / sums_2.sum())
        logs_K2 -= logs_K2.max(axis=1, keepdims=True)
        with np.errstate(under="ignore"):
            parts_2K = np.exp(logs_K2).T
            parts_2K /= parts_2K.sum(axis=0)
    likely = (parts_2K[1] > 0.5) & (at_K > means_2[0])
    cut = int(np.argmax(likely)) / _BINS if likely.any() else 1.0
    return Humps(
        means=(float(means_2[0]), float(means_2[1])),
        deviations=(float(deviations_2[0]), float(deviations_2[1])),
        share=float(sums_2[1] / sums_2.sum()),
        cut=cut,
        valley=(valley + 0.5) / _BINS,
    )


def _logs(x: Floats, means_2: Floats, deviations_2: Floats, shares_2: Floats) -> Floats:
    """Return the logarithms of the two weighted normal densities, up to a constant."""
    return np.asarray(np.log(shares_2 / deviations_2) - 0.5 * ((x - means_2) / deviations_2) ** 2, np.float64)
