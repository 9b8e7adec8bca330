"""The linear probe: the accuracy of a linear classifier on frozen features.

Multinomial logistic regression with an L2 penalty, fitted by full-batch L-BFGS. The strength of the penalty is chosen
on a held-out part of the training rows: the procedure of CLIP (arXiv 2103.00020, appendix A.3), with a shorter sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thresher.errors import MissingExtraError, UsageError, installed
from thresher.evaluation.accuracy import KS, Ints, Tally, as_classes, labels_for, units
from thresher.evaluation.split import split
from thresher.ops.vectors import F32

if TYPE_CHECKING:
    import torch  # noqa: TID253

STRENGTHS = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
_HELD_OUT = 0.2
_ENOUGH = 1e-5  # converged if no absolute gradient of the penalized mean loss is larger
_MOST, _SOME = 1000, 100  # steps of the final fit; of a fit that only compares strengths


def linear_probe(
    train_ND: npt.ArrayLike,
    train_labels_N: npt.ArrayLike,
    test_MD: npt.ArrayLike,
    test_labels_M: npt.ArrayLike,
    *,
    train_group_N: npt.ArrayLike | None = None,
    strengths: Sequence[float] = STRENGTHS,
    device: str = "cpu",
    seed: int = 0,
    ks: Sequence[int] = KS,
) -> dict[str, float]:
    """Fit a linear classifier on training rows and evaluate it on test rows.

    Rows are scaled to norm 1, then every dimension to mean 0 and standard deviation 1 over the training rows. The loss
    is mean cross-entropy + strength / 2 * sum of squared weights; the intercept has no penalty. The strength with the
    best top-1 on a fifth of the training rows is chosen (of equals the stronger one), and the classifier is fitted
    again on all of them. The problem is convex and starts from zero, so the same rows and device give the same result.
    Rows with a negative label are left out.

    Args:
        train_ND: (N, D) features, any float type and norm.
        train_labels_N: (N,) integers.
        test_MD: (M, D) features, any float type and norm.
        test_labels_M: (M,) integers. A class without training rows is never predicted.
        train_group_N: (N,) groups, such as duplicates; rows of a group are all held out, or none.
        strengths: Strengths of the penalty to choose from, each above 0.
        device: The torch device.
        seed: Seed of the choice of the held-out rows.
        ks: The values of k for top-k accuracy.

    Returns:
        "top1", "top5" (one for each of ``ks``), "mean_per_class", "majority", "chance", "classes" and "rows", as in
        :func:`thresher.evaluation.zero_shot.zero_shot`; "l2", the chosen strength, and "held_out_top1", its top-1 on
        the held-out rows; "slope", the largest absolute gradient of the final fit, and "converged", 1 if it is at most
        1e-5, else 0.

    Raises:
        UsageError: Shapes do not fit, the training rows have fewer than two classes, or a row is zero or not finite.
        MissingExtraError: torch is not installed.
    """
    if not strengths or any(not strength > 0 for strength in strengths):
        raise UsageError(f"strengths = {list(strengths)}; give numbers above 0")
    if not installed("torch"):
        raise MissingExtraError("the linear probe", "torch")
    train, test = units(train_ND, "training rows"), units(test_MD, "test rows")
    if train.shape[1] != test.shape[1]:
        raise UsageError(f"training rows of {train.shape[1]} dimensions, test rows of {test.shape[1]}")
    of_train = labels_for(train_labels_N, len(train), "training rows")
    of_test = labels_for(test_labels_M, len(test), "test rows")
    groups = np.arange(len(train)) if train_group_N is None else np.asarray(train_group_N)
    if groups.shape != (len(train),):
        raise UsageError(f"train_group_N of shape {groups.shape}; give one group per training row, ({len(train)},)")
    train, groups, of_train = train[of_train >= 0], groups[of_train >= 0], of_train[of_train >= 0]
    test, of_test = test[of_test >= 0], of_test[of_test >= 0]
    if len(np.unique(of_train)) < 2:
        raise UsageError("the training rows have fewer than two classes; give rows of two classes or more")
    of_train, of_test, classes = as_classes(of_train, of_test)
    chosen, held_out = max(strengths), float("nan")
    if len(strengths) > 1:
        fit_N = ~split(len(train), groups_N=groups, share=_HELD_OUT, seed=seed)
        best = -1.0
        weights = None
        for strength in sorted(strengths, reverse=True):
            probe = _Probe.fit(train[fit_N], of_train[fit_N], classes, strength, device, weights, _SOME)
            weights = probe.weights
            top1 = probe.judge(train[~fit_N], of_train[~fit_N], (1,))["top1"]
            if top1 > best:
                best, chosen = top1, strength
        held_out = best
    probe = _Probe.fit(train, of_train, classes, chosen, device)
    details = {"l2": float(chosen), "slope": probe.slope, "converged": float(probe.slope <= _ENOUGH)}
    if len(strengths) > 1:
        details["held_out_top1"] = held_out
    return {**probe.judge(test, of_test, ks), **details}


class _Probe:
    """A fitted classifier: the last row of its weights is the intercept."""

    def __init__(self, mean_D: Any, scale_D: Any, weights: torch.Tensor, slope: float) -> None:
        self.mean_D, self.scale_D, self.weights, self.slope = mean_D, scale_D, weights, slope

    @classmethod
    def fit(
        cls,
        rows_ND: F32,
        labels_N: Ints,
        classes: int,
        strength: float,
        device: str,
        start: torch.Tensor | None = None,
        steps: int = _MOST,
    ) -> _Probe:
        import torch

        mean_D = rows_ND.mean(axis=0, dtype=np.float64)
        deviation_D = rows_ND.std(axis=0, dtype=np.float64)
        # A constant dimension has no information; scaling it would amplify rounding errors.
        scale_D = np.where(deviation_D > 1e-7, 1 / np.maximum(deviation_D, 1e-7), 0.0)
        # Trainers evaluate with gradients disabled.
        with torch.inference_mode(False), torch.enable_grad():
            # In float32 the line search fails where the loss is nearly flat, and the fit ends early.
            x = torch.from_numpy(_scaled(rows_ND, mean_D, scale_D)).to(device).double()
            y = torch.from_numpy(labels_N).to(device)
            first = x.new_zeros(rows_ND.shape[1] + 1, classes) if start is None else start.clone()
            weights = first.requires_grad_(True)
            optimizer = torch.optim.LBFGS(
                [weights],
                max_iter=steps,
                max_eval=2 * steps,
                tolerance_grad=_ENOUGH / 2,
                tolerance_change=1e-12,
                history_size=20,
                line_search_fn="strong_wolfe",
            )

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                logits = torch.addmm(weights[-1], x, weights[:-1])
                loss = torch.nn.functional.cross_entropy(logits, y) + strength / 2 * weights[:-1].square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
            closure()
            slope = float(weights.grad.abs().max())
            return cls(mean_D, scale_D, weights.detach(), slope)

    def judge(self, rows_MD: F32, labels_M: Ints, ks: Sequence[int]) -> dict[str, float]:
        tally = Tally(self.weights.shape[1], ks)
        weights = self.weights.cpu().numpy()
        for lo in range(0, len(rows_MD), 4096):
            x = _scaled(rows_MD[lo : lo + 4096], self.mean_D, self.scale_D)
            tally.add(x @ weights[:-1] + weights[-1], labels_M[lo : lo + 4096])
        return tally.shares()


def _scaled(rows_ND: F32, mean_D: Any, scale_D: Any) -> F32:
    return np.asarray((rows_ND - mean_D) * scale_D, np.float32)
