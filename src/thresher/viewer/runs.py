"""A training run as numbers for the page: its epochs, its losses, what it left out, and its evaluations."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from thresher.dynamic.mismatch import Mismatch
from thresher.dynamic.run_folder import LEDGER, LOG, MARK
from thresher.errors import PoolError
from thresher.report.epochs import Epochs, is_constant, row_groups
from thresher.report.facts import plain
from thresher.report.run import COLUMNS, main_facts
from thresher.viewer.subject import NamedRun

_SHOWN = 24  # rows of a group
_FEW = 4  # metrics of an evaluation that are drawn at first
_FIRST = ("top1", "image_to_text_R@1", "text_to_image_R@1", "accuracy", "R@1", "linear", "knn")
_SHARES = 64  # points of a distribution


def stamp(run: NamedRun) -> str:
    """Return a text that changes when the run writes another epoch."""
    parts = []
    for name in (MARK, LOG, LEDGER):
        try:
            found = os.stat(run.training.folder / name)
            parts.append(f"{found.st_mtime_ns}-{found.st_size}")
        except OSError:
            parts.append("none")
    return ".".join(parts)


def described(run: NamedRun) -> dict[str, Any]:
    """Return everything that the page shows of a run; JSON values.

    Raises:
        PoolError: The folder is damaged.
    """
    training = run.training
    log = training.log()
    epochs = Epochs.of(log)
    result: dict[str, Any] = {
        "name": run.name,
        "stamp": stamp(run),
        "source": run.source,
        "why": run.why,
        "policy": plain(training.policy, 80),
        "rows": training.rows,
        "unfinished": training.unfinished(log),
        "target": training.promised,
        "facts": [[name, plain(value, 200)] for name, value in main_facts(training, epochs)],
        "epochs": epochs.number_E.tolist(),
        "phases": [plain(phase, 40) for phase in epochs.phases],
        "columns": {name: _numbers(epochs[name]) for name in (*COLUMNS, "total", "samples")},
        "titles": dict(COLUMNS),
        "chance": _numbers(epochs.chance_E),
        "losses": _losses(epochs),
        "evaluations": _evaluations(epochs),
        "groups": [],
    }
    if not len(epochs):
        return result
    try:
        ledger = training.ledger()
    except PoolError:
        if training.unfinished(log):  # it is being written
            return result
        raise
    mismatch = Mismatch.of(training.policy, ledger)
    result["groups"] = [
        {
            "title": group.title,
            "count": group.count,
            "kept": group.kept,
            "rows": [{"row": row.row, "text": row.text} for row in group.rows],
        }
        for group in row_groups(ledger, _SHOWN, mismatch)
    ]
    if mismatch is not None:
        known = mismatch.ranks_N[~np.isnan(mismatch.ranks_N)]
        counts, edges = np.histogram(known, _SHARES, (0, 1))
        result["ranks"] = {
            "counts": counts.tolist(),
            "edges": edges.tolist(),
            "cut": None if mismatch.found is None else float(mismatch.found.cut),
            "wrong": int(np.count_nonzero(mismatch.wrong_N)),
        }
    return result


def _numbers(values: Any) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in np.asarray(values, np.float64)]


def _losses(epochs: Epochs) -> dict[str, Any] | None:
    """Return the counts of losses by epoch and bin, and quantiles of each epoch."""
    if not epochs.counts_EB.size:
        return None
    totals = epochs.counts_EB.sum(axis=1)
    quantiles: dict[str, list[float | None]] = {}
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        line: list[float | None] = []
        for counts, total in zip(epochs.counts_EB, totals, strict=True):
            if not total:
                line.append(None)
                continue
            at = int(np.searchsorted(np.cumsum(counts), share * total))
            line.append(float((epochs.edges[at] + epochs.edges[min(at + 1, len(epochs.edges) - 1)]) / 2))
        quantiles[f"{share:g}"] = line
    return {"edges": epochs.edges.tolist(), "counts": epochs.counts_EB.tolist(), "quantiles": quantiles}


def _evaluations(epochs: Epochs) -> list[dict[str, Any]]:
    """Return the evaluation sets with their metrics; those that are drawn at first come first."""
    result = []
    for name, curves in epochs.evals.items():
        constants = {curve.metric: curve.values[-1] for curve in curves if is_constant(curve.metric)}
        drawn = [curve for curve in curves if not is_constant(curve.metric)]
        ranked = sorted(drawn, key=lambda curve: (_place(curve.metric), drawn.index(curve)))
        metrics = [
            {
                "name": plain(curve.metric, 60),
                "epochs": list(curve.epochs),
                "values": list(curve.values),
                "first": i < _FEW,
                "chance": constants.get(f"{curve.metric}_chance", constants.get("chance")),
                "share": min(curve.values) >= 0 and max(curve.values) <= 1,
            }
            for i, curve in enumerate(ranked)
        ]
        facts = [[plain(metric, 60), value] for metric, value in constants.items()]
        result.append({"name": plain(name, 80), "metrics": metrics, "facts": facts})
    return result


def _place(metric: str) -> int:
    return next((i for i, name in enumerate(_FIRST) if metric.endswith(name)), len(_FIRST))
