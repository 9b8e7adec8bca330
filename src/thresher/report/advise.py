"""How much of a pool to keep for a number of samples seen: a law of repetition, fitted on the user's own runs.

"Scaling laws for data filtering" (arXiv 2404.07177): the error of a model falls with the samples it has seen, and a
sample is worth less each time it is repeated. With D rows kept, the exponent of pass k over them is
``b * 0.5 ** ((k - 1) / tau)``. So the logarithm of the error is ``log a + b * G``, where G is log D plus the sum over
passes k = 2, 3, ... of ``0.5 ** ((k - 1) / tau) * log(k / (k - 1))``, the last pass in part. A smaller share of a good
ranking has a steeper b, and is repeated sooner. Here ``b = b0 + b1 * log(share)``, and a and tau are the same for all
shares. For a given tau this is linear, so tau is found on a grid. The uncertainty is that of a bootstrap over the runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError, UsageError
from thresher.runtime.format import counted
from thresher.runtime.parameters import check_size
from thresher.runtime.places import local_path
from thresher.runtime.random import generator
from thresher.runtime.untrusted import Fields, cut, read_json

Floats = npt.NDArray[np.float64]

RESULTS = "results.json"
_TAUS = np.geomspace(0.25, 32, 29)  # passes after which a repeated sample is worth half
_BOOTSTRAPS = 300
_MOST_RUNS = 10_000
_STEPS = 20  # shares compared
_LEAST_SHARE = 1e-6
# What 2404.07177 reports for the best 10% of 128 million pairs from the web, by samples seen: (wins at, loses beyond).
PUBLISHED = {"pool": 128_000_000, "keep": 0.1, "wins_at": 32_000_000, "loses_beyond": 450_000_000}


@dataclass(frozen=True)
class LabRun:
    """A training run of a lab: how much it kept, how long it trained, and a metric.

    Attributes:
        row: Name of its row of the plan.
        seed: Its seed.
        share: Share of the pool kept, above 0 and at most 1.
        samples: Samples seen.
        metric: The metric in percent, 0 to 100.
    """

    row: str
    seed: int
    share: float
    samples: int
    metric: float


def read_runs(lab: str | os.PathLike[str], metric: str | None, rows: Sequence[str] = ()) -> tuple[str, list[LabRun]]:
    """Read the results of a lab.

    Args:
        lab: The folder of the lab, or its results.json.
        metric: Name of the metric; None for the first that all runs have.
        rows: Rows of the plan to use; all by default.

    Returns:
        The name of the metric, and the runs.

    Raises:
        PoolError: The file is missing or damaged.
        UsageError: A row or the metric is not in it.
    """
    path = local_path(lab)
    path = path / RESULTS if path.is_dir() else path
    try:
        head = Fields(read_json(path), str(path))
    except FileNotFoundError:
        raise PoolError(f"{path}: no such file; give the folder of a lab, with {RESULTS}") from None
    except (OSError, ValueError) as error:
        raise PoolError(f"{path}: cannot be read, it may be damaged ({error})") from None
    listed = head.values.get("runs")
    if not isinstance(listed, list) or not 0 < len(listed) <= _MOST_RUNS:
        raise PoolError(f"{path}: has no list of 1 to {_MOST_RUNS:,} runs")
    runs = [Fields(run, f"{path}: run {number}") for number, run in enumerate(listed, 1)]
    named = {run.text("row") for run in runs}
    if odd := [row for row in rows if row not in named]:
        raise UsageError(f"{path}: has no row {odd[0]!r}; it has {cut(', '.join(sorted(named)), 300)}")
    runs = [run for run in runs if not rows or run.text("row") in rows]
    metrics = [run.object("metrics") for run in runs]
    shared = [name for name in metrics[0].values if all(name in each.values for each in metrics)]
    if not shared or (metric is not None and metric not in shared):
        raise UsageError(
            f"{path}: its runs do not all have the metric {metric!r}; they all have {cut(', '.join(shared), 300)}"
        )
    name = metric or shared[0]
    found = []
    for run, values in zip(runs, metrics, strict=True):
        for number, low, high in (("share_pruned", 0, 1), ("samples_seen", 1, 2**53)):
            if run.values.get(number) is None:
                raise run.wrong(number, "a number")
            run.number(number, low, high)
        values.number(name, 0, 100)
        share = 1 - float(run.values["share_pruned"])
        if share < _LEAST_SHARE:
            raise run.wrong("share_pruned", f"a number up to {1 - _LEAST_SHARE:.6f}")
        samples, seed = int(run.values["samples_seen"]), run.values.get("seed")
        found.append(LabRun(run.text("row"), seed if isinstance(seed, int) else 0, share, samples, values.values[name]))
    return name, found


def passes(rows: Floats, samples: Floats, tau: float) -> Floats:
    """Return G, the logarithm of the samples seen, with repeated ones discounted.

    Args:
        rows: D, the rows kept; 1 or more.
        samples: The samples seen.
        tau: Passes after which a repeated sample is worth half.
    """
    rows, samples = np.broadcast_arrays(np.asarray(rows, np.float64), np.asarray(samples, np.float64))
    result = np.log(np.minimum(samples, rows))
    most = int(np.ceil((samples / rows).max()))
    for k in range(2, min(most, int(40 * tau) + 2) + 1):  # later passes are worth less than 2^-40
        part = np.clip(samples / rows, k - 1, k)
        result = result + 0.5 ** ((k - 1) / tau) * np.log(part / (k - 1))
    return np.asarray(result, np.float64)


@dataclass(frozen=True)
class Law:
    """The fitted law: log error = log_a + (b0 + b1 log share) G."""

    log_a: float
    b0: float
    b1: float
    tau: float

    @classmethod
    def fit(cls, runs: Sequence[LabRun], rows: int) -> Law:
        """Fit the law to runs on a pool of ``rows`` rows, by least squares of the logarithm of the error."""
        return cls._fitted(_terms(runs, rows), _errors(runs))

    @classmethod
    def _fitted(cls, terms_T: Iterable[Floats], error_R: Floats) -> Law:
        best, least = cls(0.0, 0.0, 0.0, 1.0), np.inf
        for tau, terms_R3 in zip(_TAUS.tolist(), terms_T, strict=True):
            log_a, b0, b1 = np.linalg.lstsq(terms_R3, error_R, rcond=None)[0].tolist()
            missed = float(((terms_R3 @ [log_a, b0, b1] - error_R) ** 2).sum())
            if missed < least:
                best, least = cls(log_a, b0, b1, tau), missed
        return best

    def metric(self, share: Floats, samples: int, rows: int) -> Floats:
        """Return the expected metric in percent for shares of the pool."""
        return self._metric(share, passes(np.maximum(share * rows, 1), np.asarray(float(samples)), self.tau))

    def _metric(self, share: Floats, seen: Floats) -> Floats:
        error = np.exp(np.clip(self.log_a + (self.b0 + self.b1 * np.log(share)) * seen, -50, 0))
        return np.asarray(100 * (1 - error), np.float64)

    @classmethod
    def bootstrapped(cls, runs: Sequence[LabRun], rows: int, grid: Floats, samples: int, seed: int) -> Floats:
        """Return the metrics of a grid of shares for laws fitted to runs drawn with replacement, (draws, shares)."""
        rng, terms_T, error_R = generator(seed, "advise"), _terms(runs, rows), _errors(runs)
        seen_T = {tau: passes(np.maximum(grid * rows, 1), np.asarray(float(samples)), tau) for tau in _TAUS.tolist()}
        share_R, samples_R = (np.array([getattr(run, name) for run in runs]) for name in ("share", "samples"))
        metrics: list[Floats] = []
        while len(metrics) < _BOOTSTRAPS:
            some = rng.integers(0, len(runs), len(runs))
            if np.ptp(share_R[some]) > 0 and np.ptp(samples_R[some]) > 0:
                law = cls._fitted((terms_R3.take(some, axis=0) for terms_R3 in terms_T), error_R[some])
                metrics.append(law._metric(grid, seen_T[law.tau]))
        return np.stack(metrics)


def _terms(runs: Sequence[LabRun], rows: int) -> list[Floats]:
    """Return the factors of the law's parameters for every tau, (runs, 3) each."""
    share, samples = (np.array([getattr(run, name) for run in runs], float) for name in ("share", "samples"))
    seen_T = [passes(np.maximum(share * rows, 1), samples, tau) for tau in _TAUS.tolist()]
    return [np.stack([np.ones_like(seen), seen, np.log(share) * seen], axis=1) for seen in seen_T]


def _errors(runs: Sequence[LabRun]) -> Floats:
    """Return the logarithms of the errors of runs."""
    errors: Floats = np.log(np.maximum(100 - np.array([run.metric for run in runs], float), 1e-3) / 100)
    return errors


def advise(
    rows: int, samples: int, runs: Sequence[LabRun] | None = None, metric: str = "", seed: int = 0
) -> dict[str, Any]:
    """Say how much of a pool to keep for a number of samples seen.

    Args:
        rows: Rows of the pool.
        samples: Samples that training will see.
        runs: Runs on this pool with several shares and lengths; None for none.
        metric: Name of their metric.
        seed: Seed of the bootstrap.

    Returns:
        "known": whether it is fitted on runs. If so, "keep": the best share, "keep_low" and "keep_high": that of 5% and
        95% of the bootstraps, "metric", "table": a dictionary per share with "keep", "passes", "expected", "low",
        "high" and "best", the share of the bootstraps in which it is the best, and "law". Else "published". In both
        cases "notes".

    Raises:
        UsageError: The runs are too few, or all of one share or length.
    """
    check_size("samples seen", samples)
    if rows < 1 or samples < 1:
        raise UsageError(f"{rows=:,}, {samples=:,}; give 1 or more")
    over = f"{samples / rows:.2g}" if samples < 10 * rows else f"{samples / rows:,.0f}"
    once = f"{samples:,} samples are {over} passes over all {counted(rows, 'row')}"
    if runs is None:
        return {"known": False, "rows": rows, "samples_seen": samples, "published": PUBLISHED, "notes": _unknown(once)}
    shares = np.unique([float(f"{run.share:.3g}") for run in runs])  # methods with one budget differ by a few rows
    lengths = {run.samples for run in runs}
    if len(shares) < 2 or len(lengths) < 2 or len(runs) < 5:
        given = f"{counted(len(shares), 'share')} kept, {counted(len(lengths), 'length')}"
        raise UsageError(
            f"{counted(len(runs), 'run')} with {given}; the law needs 5 runs or more, with two shares and two lengths, "
            "such as 30% and 100% at a quarter of the samples and at half of them, with two seeds"
        )
    grid = np.unique(np.concatenate([np.geomspace(shares[0], shares[-1], _STEPS), shares]).round(6))
    law, metrics_SG = Law.fit(runs, rows), Law.bootstrapped(runs, rows, grid, samples, seed)
    best_S = grid[metrics_SG.argmax(axis=1)]
    expected_G = law.metric(grid, samples, rows)
    low_G, high_G = np.percentile(metrics_SG, [5, 95], axis=0)
    keep, (keep_low, keep_high) = float(grid[expected_G.argmax()]), np.percentile(best_S, [5, 95]).tolist()
    table = [
        {
            "keep": float(share),
            "passes": samples / max(1.0, share * rows),
            "expected": float(expected_G[i]),
            "low": float(low_G[i]),
            "high": float(high_G[i]),
            "best": float((best_S == share).mean()),
        }
        for i, share in enumerate(grid)
    ]
    kept = f"{100 * shares[0]:.3g}% to {100 * shares[-1]:.3g}%"
    notes = [once, f"fitted on {counted(len(runs), 'run')} that kept {kept}; only such shares are compared"]
    longest = max(lengths)
    if samples > 2 * longest:
        notes.append(f"the longest run saw {longest:,} samples: this is extrapolated {samples / longest:.1f} times")
    if keep_low <= shares[0] * 1.01 and keep_high >= shares[-1] * 0.99:
        notes.append("the runs cannot decide: any share from the least to the most is the best in some bootstraps")
    names = {"log_a": law.log_a, "b0": law.b0, "b1": law.b1, "tau": law.tau}
    return {
        "known": True, "rows": rows, "samples_seen": samples, "metric": metric, "keep": keep, "keep_low": keep_low,
        "keep_high": keep_high, "table": table, "law": names, "notes": notes,
    }  # fmt: skip


def _unknown(once: str) -> list[str]:
    """Return what is not known without runs."""
    wins, loses = (f"{PUBLISHED[name] / PUBLISHED['pool']:.2g}" for name in ("wins_at", "loses_beyond"))
    return [
        once,
        "how much to keep depends on how well the pool is ranked and how fast repeated samples lose their worth; "
        "neither is known without runs on this pool",
        "published for another pool (2404.07177, 128 million pairs from the web): the best 10% win at 32 million "
        f"samples seen ({wins} passes over that pool), and lose to larger shares beyond about 450 million ({loses} "
        "passes)",
        "to find out, run thresher lab with several shares kept and two lengths, and give its folder as --runs",
    ]
