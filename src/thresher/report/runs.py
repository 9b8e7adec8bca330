"""Compare training runs: curves over each other, a table with intervals over seeds, what each left out, agreement.

Runs that differ only in their seed are a group, whose metrics are a mean with a 95% interval.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from thresher import __version__
from thresher.dynamic.run_folder import FILES, LEDGER, Training
from thresher.errors import OutputError, UsageError
from thresher.evaluation.intervals import Mean
from thresher.io.paths import visible
from thresher.report.curves import LINES
from thresher.report.epochs import Epochs, is_constant
from thresher.report.facts import plain
from thresher.report.figures import GRID, svg
from thresher.report.pages import rendered, write_page
from thresher.runtime.format import counted, duration
from thresher.runtime.places import AnyPath
from thresher.runtime.results import Name, Say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 60  # runs of a comparison
_MOST_PAIRS = 200  # of runs whose candidates are compared
# Settings that may differ between the runs of a group, besides the seed.
_SAME = ("seed", "evals", "eval_every", "eval_labels", "eval_group", "templates", "checkpoint_minutes", "workers",
         "device", "data", "selection", "options")  # fmt: skip
_SEED = re.compile(r"(?<![A-Za-z0-9])seed[-_]?\d+|(?<=[-_])\d+(?=$|[/\\])")


class RunComparison(dict[str, Any]):
    """What training runs have in common: the dictionary of :func:`compare_runs`."""

    def __repr__(self) -> str:
        """Return the groups of runs."""
        groups = ", ".join(f"{visible(one['name'], 60)} ({len(one['runs'])})" for one in self["groups"][:6])
        return f"RunComparison({counted(len(self['runs']), 'run')}: {groups})"


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A run with its log."""

    name: str
    training: Training
    log: list[dict[str, Any]]
    epochs: Epochs

    def final(self) -> dict[str, float]:
        """Return the metrics of its last evaluation, by set and metric."""
        last: dict[str, Any] = next((entry["eval"] for entry in reversed(self.log) if entry.get("eval")), {})
        return {
            f"{of} {metric}": float(value)
            for of, scores in last.items()
            for metric, value in scores.items()
            if value is not None and not is_constant(metric)
        }

    def sum_of(self, name: str) -> float:
        """Return the sum of a number over all epochs."""
        return float(np.nansum(self.epochs[name])) if len(self.epochs) else 0.0


def compare_runs(runs: Mapping[str, Training]) -> RunComparison:
    """Compare training runs.

    Args:
        runs: Name -> run, finished or not.

    Returns:
        "runs": by name policy, seed, epochs, samples, seconds, left_out (samples), pruned (share) and unfinished ("" if
        it is finished). "groups": name, runs, repeated (run -> an earlier one with the same seed and settings),
        samples, seconds, pruned (means), and metrics: by set and metric mean, half (of the 95% interval, None for one
        seed), values by run, and minus_first: mean, low, high of the differences to the first group, paired by seed.
        Runs with the same seed and settings count as one, with the mean of their metrics. "agreement": for pairs of
        runs on the same data the share of the candidates of the last search that both have (of the smaller), the
        Jaccard index, and the overlap by chance.

    Raises:
        UsageError: No runs, or more than 60.
        PoolError: A run is damaged.
    """
    if not 0 < len(runs) <= MOST:
        raise UsageError(f"{len(runs)} runs; give 1 to {MOST}")
    loaded = [_load(name, training) for name, training in runs.items()]
    groups = _groups(loaded)
    first = groups[0]
    return RunComparison(
        runs={one.name: _facts(one) for one in loaded},
        groups=[_summary(name, members, first[1]) for name, members in groups],
        agreement=_agreement(loaded),
    )


def _load(name: str, training: Training) -> _Loaded:
    log = training.log()
    return _Loaded(name, training, log, Epochs.of(log))


def _facts(run: _Loaded) -> dict[str, Any]:
    left_out = run.sum_of("total") - run.sum_of("rows")
    return {
        "policy": run.training.policy,
        "seed": run.training.seed,
        "epochs": len(run.log),
        "samples": int(run.sum_of("samples")),
        "seconds": run.sum_of("seconds"),
        "left_out": int(left_out),
        "pruned": float(run.epochs["pruned_so_far"][-1]) if len(run.epochs) else 0.0,
        "unfinished": run.training.unfinished(run.log),
    }


def _groups(runs: Sequence[_Loaded]) -> list[tuple[str, list[_Loaded]]]:
    """Return groups of runs that differ only in their seed, with a name for each, in the order of the runs."""
    found: dict[str, list[_Loaded]] = {}
    for run in runs:
        found.setdefault(_key(run), []).append(run)
    names = [_name(members) for members in found.values()]
    unique = [
        name if names.count(name) == 1 else f"{name}: {_SEED.sub('*', members[0].name)}"
        for name, members in zip(names, found.values(), strict=True)
    ]
    # Two groups may still have one name, for example if the names of their folders differ only in a number.
    final = [name if unique.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(unique, 1)]
    return list(zip(final, found.values(), strict=True))


def _key(run: _Loaded) -> str:
    settings = {name: value for name, value in sorted(run.training.settings.items()) if name not in _SAME}
    paths = [_SEED.sub("*", str(run.training.settings.get(name))) for name in ("selection", "options")]
    return repr((run.training.task, run.training.policy, settings, paths))


def _name(members: Sequence[_Loaded]) -> str:
    training = members[0].training
    return training.policy if training.promised is None else f"{training.policy}, {training.promised:.0%}"


def _summary(name: str, members: Sequence[_Loaded], first: Sequence[_Loaded]) -> dict[str, Any]:
    facts = [_facts(run) for run in members]
    means = {key: math.fsum(fact[key] for fact in facts) / len(facts) for key in ("samples", "seconds", "pruned")}
    metrics: dict[str, Any] = {}
    for metric in dict.fromkeys(metric for run in members for metric in run.final()):
        values = {run.name: final[metric] for run in members if metric in (final := run.final())}
        mean = Mean.of(list(_means(members, metric, _drawn_from).values()))
        metrics[metric] = {"mean": mean.mean, "half": _finite(mean.half), "values": values, "minus_first": None}
        own, others = (_means(runs, metric, lambda run: run.training.seed) for runs in (members, first))
        apart = [own[seed] - others[seed] for seed in own if seed in others]
        if members is not first and apart:
            between = Mean.of(apart)
            low, high = _finite(between.low), _finite(between.high)
            metrics[metric]["minus_first"] = {"mean": between.mean, "low": low, "high": high, "seeds": len(apart)}
    found, repeated = dict[Hashable, str](), dict[str, str]()
    for run in members:
        earlier = found.setdefault(_drawn_from(run), run.name)
        repeated |= {run.name: earlier} if earlier != run.name else {}
    return {"name": name, "runs": [run.name for run in members], "repeated": repeated, **means, "metrics": metrics}


def _drawn_from(run: _Loaded) -> Hashable:
    """Return what may differ at random within a group: runs in which it is the same are not independent."""
    settings = run.training.settings
    return run.training.seed, str(settings.get("selection")), str(settings.get("options"))


def _means(runs: Sequence[_Loaded], metric: str, of: Callable[[_Loaded], Hashable]) -> dict[Hashable, float]:
    """Return the mean of a metric over the runs that are the same by ``of``, without runs that lack it."""
    values: dict[Hashable, list[float]] = {}
    for run in runs:
        if metric in (final := run.final()):
            values.setdefault(of(run), []).append(final[metric])
    return {key: math.fsum(some) / len(some) for key, some in values.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _agreement(runs: Sequence[_Loaded]) -> list[dict[str, Any]]:
    """Return how far the candidates of the last search agree, for pairs of runs on the same data."""
    marked: dict[str, Any] = {}
    for run in runs:
        # A folder may have no ledger, as after an export of the log alone; a damaged one is not left out.
        if not len(run.epochs) or not os.path.exists(run.training.folder / LEDGER):
            continue
        ledger = run.training.ledger()
        if ledger.times_N.any():
            marked[run.name] = ledger.marked_N == ledger.marked_N.max()
    data = {run.name: (run.training.store, run.training.rows) for run in runs}
    pairs = []
    for a, b in itertools.combinations(marked, 2):
        if data[a] != data[b] or not data[a][0]:  # rows of streams are in another order in every run
            continue
        both = int(np.count_nonzero(marked[a] & marked[b]))
        sizes = int(np.count_nonzero(marked[a])), int(np.count_nonzero(marked[b]))
        either = sum(sizes) - both
        pairs.append(
            {
                "a": a, "b": b, "candidates_a": sizes[0], "candidates_b": sizes[1], "both": both,
                "overlap": both / min(sizes), "jaccard": both / either, "chance": max(sizes) / data[a][1],
            }
        )  # fmt: skip
    return pairs[:_MOST_PAIRS]


# --- the page -------------------------------------------------------------------------------------


def write_runs_report(
    runs: Mapping[str, Training],
    target: Name,
    *,
    title: str | None = None,
    overwrite: bool = True,
    say: Say | None = None,
) -> AnyPath:
    """Write a page that compares training runs, and return its path; the same runs give the same bytes.

    Args:
        runs: Name -> run.
        target: The HTML file; replaced atomically.
        title: Heading.
        overwrite: Replace a different file.
        say: Called with one line if the file has this content already.

    Raises:
        UsageError, PoolError: As for :func:`compare_runs`.
        OutputError: The file is one of a run, or cannot be written.
    """
    for training in runs.values():
        if os.path.realpath(str(target)) in {os.path.realpath(training.folder / name) for name in FILES}:
            raise OutputError(f"{target}: is a file of the run; choose another name")
    from markupsafe import Markup

    result = compare_runs(runs)
    groups = _groups([_load(name, training) for name, training in runs.items()])
    page = rendered(
        "runs.html.jinja",
        title=plain(title or f"{counted(len(runs), 'training run')} compared", 200),
        runs=[(plain(name, 120), fact) for name, fact in result["runs"].items()],
        groups=[{**group, "name": plain(group["name"], 120)} for group in result["groups"]],
        repeated=[
            (plain(name, 120), plain(earlier, 120))
            for group in result["groups"]
            for name, earlier in group["repeated"].items()
        ],
        metrics=_metric_rows(result),
        unfinished=sum(bool(fact["unfinished"]) for fact in result["runs"].values()),
        agreement=result["agreement"],
        # Markup is safe: matplotlib escapes all text in a chart.
        charts=[(plain(name, 80), Markup(drawing)) for name, drawing in _charts(groups)],
        duration=duration,
        pictures=False,
        version=__version__,
    )
    return write_page(page, target, overwrite=overwrite, say=say)


def _metric_rows(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return for each metric its name, and a mean and a difference for each group."""
    names = dict.fromkeys(name for group in result["groups"] for name in group["metrics"])
    return [
        (plain(name, 120), [value_texts(group["metrics"].get(name)) for group in result["groups"]]) for name in names
    ]


def value_texts(found: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return the mean of a metric with its interval, and its difference to the first group, as text; "-" for none."""
    if found is None:
        return "-", ""
    share = -0.001 <= found["mean"] <= 1.001
    scale, form = (100.0, ".1f") if share else (1.0, ".4g")
    half = "" if found["half"] is None else f" ± {scale * found['half']:{form}}"
    apart = found["minus_first"]
    if apart is None:
        return f"{scale * found['mean']:{form}}{half}", ""
    ends = "" if apart["low"] is None else f" [{scale * apart['low']:+{form}}, {scale * apart['high']:+{form}}]"
    return f"{scale * found['mean']:{form}}{half}", f"{scale * apart['mean']:+{form}}{ends}"


def _charts(groups: Sequence[tuple[str, list[_Loaded]]]) -> list[tuple[str, str]]:
    """Return charts over samples seen: the loss, the share pruned, and every metric that is a share."""
    every = [run for _, members in groups for run in members if len(run.epochs)]
    if not every:
        return []
    charts = [("Mean loss", _drawn("runs-loss", groups, lambda run: _column(run, "loss"), percent=False))]
    if any(run.sum_of("total") > run.sum_of("rows") for run in every):
        drawn = _drawn("runs-pruned", groups, lambda run: _column(run, "pruned_so_far"), percent=True)
        charts.append(("Samples pruned so far", drawn))
    metrics = dict.fromkeys(
        (of, curve.metric)
        for run in every
        for of, curves in run.epochs.evals.items()
        for curve in curves
        if not is_constant(curve.metric) and 0 <= min(curve.values) and max(curve.values) <= 1
    )
    for at, (of, metric) in enumerate(metrics):
        drawn = _drawn(f"runs-{at}", groups, lambda run, of=of, metric=metric: _metric(run, of, metric), percent=True)
        charts.append((f"{of}: {metric}", drawn))
    return charts


def _column(run: _Loaded, name: str) -> tuple[list[float], list[float]]:
    return np.cumsum(np.nan_to_num(run.epochs["samples"])).tolist(), run.epochs[name].tolist()


def _metric(run: _Loaded, of: str, metric: str) -> tuple[list[float], list[float]]:
    curve = next((one for one in run.epochs.evals.get(of, ()) if one.metric == metric), None)
    if curve is None:
        return [], []
    seen = dict(zip(run.epochs.number_E.tolist(), _column(run, "loss")[0], strict=True))
    return [seen[epoch] for epoch in curve.epochs], list(curve.values)


def _drawn(name: str, groups: Sequence[tuple[str, list[_Loaded]]], points: Any, *, percent: bool) -> str:
    """Draw a line per run, in the colour of its group."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for at, (label, members) in enumerate(groups):
            for number_, run in enumerate(members):
                seen, values = points(run)
                axes.plot(
                    seen, values, color=LINES[at % len(LINES)], linewidth=1.3, marker="o" if len(seen) < 60 else "",
                    markersize=2.5, linestyle="-" if at < len(LINES) else "--",
                    label=plain(label, 40) if not number_ else None,
                )  # fmt: skip
        axes.set_xlabel("samples seen")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", nbins=4)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        figure.legend(loc="outside upper left", ncols=2, handlelength=1.2)

    return svg(name, "Runs over each other, by samples seen", draw, height=2.7 + 0.2 * ((len(groups) + 1) // 2))
