"""The metrics of a run in percent, from the evaluations in its log."""

from __future__ import annotations

from collections.abc import Mapping

from thresher.lab.plan import HALVES

_RETRIEVAL = ("image_to_text_R@1", "text_to_image_R@1")
_KINDS = (("zero-shot", "zero_shot_", "_top1"), ("knn", "knn_", "_top1"), ("probe", "linear_", "_top1"))


def metrics_of(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return metrics by name, in percent.

    Args:
        scores: Shares by evaluation set and metric; the sets are halves named "NAME-selection" and "NAME-held-out".

    Returns:
        For each half: "HALF R@1" (mean of both directions, over sets), "HALF zero-shot", "HALF knn" and "HALF probe"
        (top-1, mean over label columns and sets), "HALF average" (the mean of these), and every single metric as "HALF
        SET METRIC".
    """
    found: dict[str, float] = {}
    for half in HALVES:
        sums: dict[str, list[float]] = {}
        details: dict[str, float] = {}
        for name, metrics in scores.items():
            if not name.endswith(f"-{half}"):
                continue
            for metric, value in metrics.items():
                kind = kind_of(metric)
                if kind is not None:
                    sums.setdefault(kind, []).append(100 * value)
                if is_share(metric):
                    details[f"{half} {name.removesuffix(f'-{half}')} {metric}"] = round(100 * value, 4)
        means = {kind: sum(values) / len(values) for kind, values in sums.items()}
        if means:
            found[f"{half} average"] = round(sum(means.values()) / len(means), 4)
        found |= {f"{half} {kind}": round(value, 4) for kind, value in means.items()}
        found |= details
    return found


def kind_of(metric: str) -> str | None:
    """Return what a metric is summed up as: "R@1", "zero-shot", "knn" or "probe"; None for others."""
    if metric in _RETRIEVAL:
        return "R@1"
    return next((kind for kind, start, end in _KINDS if metric.startswith(start) and metric.endswith(end)), None)


def is_share(metric: str) -> bool:
    """Return whether a metric is a measured share: not a chance level or a count."""
    last = metric.rpartition("_")[2]
    return last in ("class", "R@1", "R@5", "R@10") or (last.startswith("top") and last[3:].isdigit())
