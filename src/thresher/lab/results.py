"""The results of a plan: ``results.json``, ``table.md``, ``plot.png`` and ``details.json``."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.evaluation.intervals import Mean, holm
from thresher.lab.plan import BASELINE, SHORT, Plan
from thresher.lab.work import write_json
from thresher.runtime.files import writing
from thresher.runtime.format import counted, duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS, TABLE, PLOT, DETAILS = "results.json", "table.md", "plot.png", "details.json"
WHICH = ("corpus", "row", "seed")  # of a run in DETAILS, with its result
_KINDS = ("average", "R@1", "zero-shot", "knn", "probe")
_CLAIM, _CHOICE = "held-out", "selection"
_SAME = 3e-4  # points: differences of metrics with four decimals that are equal but for their rounding
_CONTRACT = ("metrics", "samples_seen", "scored_forwards", "seconds", "share_pruned")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run of a plan: the row and seed, the corpus, and its result."""

    corpus: str
    row: str
    seed: int
    result: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics in percent, by name."""
        metrics: Mapping[str, float] = self.result["metrics"]
        return metrics


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row compared with another, by metric."""

    corpus: str
    row: str
    metric: str
    difference: Mean
    adjusted: float = math.nan

    @property
    def holds(self) -> bool:
        """Whether the difference is significant, with the number of comparisons taken into account."""
        return self.adjusted < 0.05


def row_name(plan: Plan, corpus: str, row: str) -> str:
    """Return the name of a row in the results: with its corpus if the plan has several."""
    return f"{corpus}/{row}" if len(plan.corpora) > 1 else row


def write_results(plan: Plan, runs: Sequence[Run], out: Path, extra: Mapping[str, Any]) -> None:
    """Write all results of the finished runs; ``extra`` is what ``details.json`` has in addition."""
    listed = [
        {
            "row": row_name(plan, run.corpus, run.row),
            "seed": run.seed,
            **{
                name: round(run.result[name], 6) if isinstance(run.result[name], float) else run.result[name]
                for name in _CONTRACT
            },
        }
        for run in runs
    ]
    write_json(out / RESULTS, {"plan": plan.name, "runs": listed})
    write_json(
        out / DETAILS,
        {
            "plan": plan.record(),
            **extra,
            "runs": [{**{name: getattr(run, name) for name in WHICH}, **_published(run.result)} for run in runs],
        },
    )
    with writing(out / TABLE) as scratch:
        Path(scratch).write_text(table(plan, runs, extra), encoding="utf-8")
    if runs:
        with writing(out / PLOT) as scratch:
            Path(scratch).write_bytes(plot(plan, runs))


def _published(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "taken_from"}  # a path of this machine


# --- comparisons ----------------------------------------------------------------------------------


def values(runs: Sequence[Run], corpus: str, row: str, metric: str) -> dict[int, float]:
    """Return a metric of a row by seed."""
    return {
        run.seed: run.metrics[metric]
        for run in runs
        if (run.corpus, run.row) == (corpus, row) and metric in run.metrics
    }


def difference(runs: Sequence[Run], corpus: str, row: str, other: str, metric: str) -> Mean | None:
    """Return the mean difference of two rows over the seeds that both have; None if there are none."""
    mine, theirs = values(runs, corpus, row, metric), values(runs, corpus, other, metric)
    both = sorted(mine.keys() & theirs.keys())
    return Mean.of([mine[seed] - theirs[seed] for seed in both], _SAME) if both else None


def comparisons(plan: Plan, runs: Sequence[Run], other: str, metrics: Sequence[str]) -> list[Comparison]:
    """Compare every row with another one, paired by seed, by all metrics; p-values are adjusted together."""
    found = [
        Comparison(corpus=corpus.name, row=row.name, metric=metric, difference=made)
        for corpus in plan.corpora
        for row in plan.rows
        if row.name != other
        for metric in metrics
        if (made := difference(runs, corpus.name, row.name, other, metric)) is not None
    ]
    adjusted = holm([one.difference.p for one in found])
    return [
        Comparison(corpus=one.corpus, row=one.row, metric=one.metric, difference=one.difference, adjusted=p)
        for one, p in zip(found, adjusted, strict=True)
    ]


def shown_metrics(runs: Sequence[Run], half: str = _CLAIM) -> list[str]:
    """Return the metrics of the main table: those that sum up a half."""
    names = {name for run in runs for name in run.metrics}
    return [f"{half} {kind}" for kind in _KINDS if f"{half} {kind}" in names]


# --- the table ------------------------------------------------------------------------------------


def table(plan: Plan, runs: Sequence[Run], extra: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    title = f"# {plan.name}" + (f", profile {plan.profile}" if plan.profile else "")
    lines = [title, "", *([" ".join(plan.about.split()), ""] if plan.about else [])]
    if not runs:
        return "\n".join([*lines, "No run is finished yet.", ""])
    metrics = shown_metrics(runs)
    other = SHORT if any(run.row == SHORT for run in runs) else BASELINE
    made = comparisons(plan, runs, other, [name for name in metrics if not name.endswith(" average")] or metrics)
    for corpus in plan.corpora:
        mine = [run for run in runs if run.corpus == corpus.name]
        if mine:
            lines += [
                *_heading(plan, corpus, extra),
                *_compute(plan, mine),
                "",
                *_accuracy(plan, mine, made, other),
                "",
            ]
    lines += [*_notes(plan, runs, made, other, extra), ""]
    choice = shown_metrics(runs, _CHOICE)
    if choice:
        lines += ["## The other half", "", "Hyperparameters may be chosen on this half only.", ""]
        for corpus in plan.corpora:
            mine = [run for run in runs if run.corpus == corpus.name]
            if mine:
                lines += [
                    *([f"Corpus {corpus.name}:", ""] if len(plan.corpora) > 1 else []),
                    *_means(plan, mine, choice),
                    "",
                ]
    if plan.paper:
        lines += ["## The paper", "", plan.paper.strip(), ""]
    return "\n".join(lines)


def _heading(plan: Plan, corpus: Any, extra: Mapping[str, Any]) -> list[str]:
    made = extra.get("corpora", {}).get(corpus.name, {})
    parts = [f"{made['rows']:,} rows"] if "rows" in made else []
    parts += [f"{made[kind]:,} {kind}" for kind in ("swapped", "duplicate", "off-topic") if made.get(kind)]
    return [f"## Corpus {corpus.name}", "", f"{', '.join(parts)}.", ""] if parts else [f"## Corpus {corpus.name}", ""]


def _compute(plan: Plan, runs: Sequence[Run]) -> list[str]:
    head = ["row", "seeds", "samples (E1)", "forwards (E2)", "seconds (E3)", "images decoded", "pruned"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in plan.rows:
        mine = [run.result for run in runs if run.row == row.name]
        if mine:
            means = {
                name: math.fsum(result[name] for result in mine) / len(mine)
                for name in (*_CONTRACT[1:], "images_decoded")
            }
            cells = [row.name, str(len(mine))]
            cells += [
                f"{means[name]:,.0f}" for name in ("samples_seen", "scored_forwards", "seconds", "images_decoded")
            ]
            lines.append("| " + " | ".join([*cells, f"{means['share_pruned']:.1%}"]) + " |")
    return lines


def _accuracy(plan: Plan, runs: Sequence[Run], made: Sequence[Comparison], other: str) -> list[str]:
    metrics = shown_metrics(runs)
    head = ["row"]
    for metric in metrics:
        head += [metric, f"minus {other}", *([f"minus {BASELINE}"] if other != BASELINE else [])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in plan.rows:
        if not any(run.row == row.name for run in runs):
            continue
        cells = [row.name]
        for metric in metrics:
            of_row = list(values(runs, runs[0].corpus, row.name, metric).values())
            cells.append(mean_text(Mean.of(of_row)) if of_row else "-")
            for against in dict.fromkeys((other, BASELINE)):
                apart = None if row.name == against else difference(runs, runs[0].corpus, row.name, against, metric)
                holds = against == other and any(
                    one.holds and (one.corpus, one.row, one.metric) == (runs[0].corpus, row.name, metric)
                    for one in made
                )
                cells.append("-" if apart is None else f"{difference_text(apart)}{' *' if holds else ''}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _means(plan: Plan, runs: Sequence[Run], metrics: Sequence[str]) -> list[str]:
    lines = ["| row | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for row in plan.rows:
        found = [list(values(runs, runs[0].corpus, row.name, metric).values()) for metric in metrics]
        if any(found):
            lines.append(
                f"| {row.name} | " + " | ".join(mean_text(Mean.of(one)) if one else "-" for one in found) + " |"
            )
    return lines


def mean_text(mean: Mean) -> str:
    """Return a mean with its interval: "37.4 ± 0.6"."""
    return f"{mean.mean:.1f}" if math.isnan(mean.half) else f"{mean.mean:.1f} ± {mean.half:.1f}"


def difference_text(mean: Mean) -> str:
    """Return a difference with its interval: "+1.2 [-0.3, +2.7]"."""
    if math.isnan(mean.half):
        return f"{mean.mean:+.1f}"
    return f"{mean.mean:+.1f} [{mean.low:+.1f}, {mean.high:+.1f}]"


def _notes(
    plan: Plan, runs: Sequence[Run], made: Sequence[Comparison], other: str, extra: Mapping[str, Any]
) -> list[str]:
    parts = any(not one.metric.endswith(" average") for one in made)
    untested = "; averages, of the metrics after them, are not tested" if parts else ""
    lines = [
        f"Metrics are percentages on the held-out half of {', '.join(_set_names(runs)) or 'the evaluation sets'}: mean "
        f"over {_seeds(runs)} ± half of the 95% interval (Student's t); differences are paired by seed, "
        f"with their 95% interval. \\* marks a difference to {other} that is significant at 5% after Holm's correction "
        f"for {counted(len(made), 'comparison')}{untested}. Where the interval of a difference includes 0, no "
        "difference was found. Where all seeds gave the same, there is no interval, and nothing is shown.",
        "",
        "E1 counts the samples that gradients were computed on, E2 every forward pass of a sample, with those of "
        "proxies, embeddings, reference models and the run that a coreset was made of. E3 is the seconds of all these"
        f"{_at_once(runs)}. {SHORT} is full training on as many samples as the rows that prune, with the same loss, "
        "temperature and schedule.",
    ]
    for corpus in plan.corpora:
        spread = [
            f"{metric.removeprefix(f'{_CLAIM} ')} {Mean.of(list(found.values())).deviation:.2f}"
            for metric in shown_metrics(runs)
            if len(found := values(runs, corpus.name, BASELINE, metric)) > 1
        ]
        if spread:
            where = f" on {corpus.name}" if len(plan.corpora) > 1 else ""
            lines += ["", f"Standard deviation of {BASELINE} between seeds{where}: {', '.join(spread)}."]
    lines += _planted(plan, runs)
    missing = int(extra.get("missing", 0))
    if missing:
        lines += ["", f"{counted(missing, 'run is', 'runs are')} not finished: the table may still change."]
    lines += [
        "",
        f"Model {plan.trainer.model}, {counted(plan.trainer.epochs, 'epoch')} of full training, batches of "
        f"{plan.trainer.batch_size:,}{_precisions(runs)}; all runs together took {duration(_total(runs))} of training.",
    ]
    remarks = [f"{row.name}: {row.about.strip()}" for row in plan.rows if row.about]
    return [*lines, *(line for remark in remarks for line in ("", remark))]


def _seeds(runs: Sequence[Run]) -> str:
    """Return how many seeds the rows have: "3 seeds", or "2 to 3 seeds" where some have fewer."""
    each = Counter((run.corpus, run.row) for run in runs).values()
    least, most = min(each), max(each)
    return counted(most, "seed") if least == most else f"{least:,} to {counted(most, 'seed')}"


def _at_once(runs: Sequence[Run]) -> str:
    """Return how many runs shared the machine, if it is known of all: other numbers if commands differed."""
    found = sorted({run.result.get("at_once") or 0 for run in runs})
    if not found[0]:
        return ""
    return f"; {' or '.join(f'{one:,}' for one in found)} {'run' if found == [1] else 'runs'} ran at a time"


def _precisions(runs: Sequence[Run]) -> str:
    """Return the precision of training, if it is known: several if runs are of different machines or versions."""
    found = sorted({str(run.result["precision"]) for run in runs if "precision" in run.result})
    return f", in {' and '.join(found)}" if found else ""


def _set_names(runs: Sequence[Run]) -> list[str]:
    start = f"{_CLAIM} "
    details = [name.removeprefix(start) for run in runs for name in run.metrics if name.startswith(start)]
    return sorted({name.rsplit(" ", 1)[0] for name in details if " " in name and name not in _KINDS})


def _total(runs: Sequence[Run]) -> float:
    return math.fsum(run.result["seconds"] for run in runs)


def _planted(plan: Plan, runs: Sequence[Run]) -> list[str]:
    """Return a table of how much of each planted kind the rows left out, over all seeds that have it; [] for none.

    Corpora in which nothing is planted have no rows in it.
    """
    found: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    seeds: dict[tuple[str, str], set[int]] = {}
    for run in runs:
        for kind, counts in (run.result.get("kept") or run.result.get("left_out") or {}).items():
            mine = found.setdefault((run.corpus, run.row), {})
            seeds.setdefault((run.corpus, run.row), set()).add(run.seed)
            rows, out = mine.get(kind, (0, 0))
            mine[kind] = (rows + counts["rows"], out + counts["left_out"])
    found = {which: shares for which, shares in found.items() if len(shares) > 1}
    if not found:
        return []
    kinds = sorted({kind for shares in found.values() for kind in shares})
    lines = [
        "",
        "Share of each kind of row that was left out: dropped by a selection, or a candidate in the last search of a "
        "policy.",
        "",
        "| row | seeds | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 2) + "|",
    ]
    for (corpus, row), shares in found.items():
        cells = [str(len(seeds[corpus, row]))]
        cells += [f"{shares[kind][1] / shares[kind][0]:.1%}" if kind in shares else "-" for kind in kinds]
        lines.append(f"| {row_name(plan, corpus, row)} | " + " | ".join(cells) + " |")
    return lines


# --- the plot -------------------------------------------------------------------------------------


_INK, _SOFT, _POINT = "#2b3138", "#5f6b76", "#2f7391"
_COSTS = {"E1": "samples_seen", "E2": "scored_forwards", "E3": "seconds"}


def plot(plan: Plan, runs: Sequence[Run]) -> bytes:
    """Return a chart as PNG: for each corpus the accuracy of every row, with its interval, and what the row cost."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    corpora = [corpus.name for corpus in plan.corpora if any(run.corpus == corpus.name for run in runs)]
    rows = [row.name for row in plan.rows if any(run.row == row.name for run in runs)]
    with style.context(["default", {"font.size": 9, "text.color": _INK, "axes.labelcolor": _INK}]):
        across = min(len(corpora), 2)  # more would be too small on a page
        down = -(-len(corpora) // 2)
        size = (1.8 + 5.2 * across, down * (1.4 + 0.27 * len(rows)))
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12), facecolor="white")
        panels = figure.subplots(down, 2 * across, sharey=True, width_ratios=[3, 1] * across, squeeze=False).ravel()
        for unused in panels[2 * len(corpora) :]:
            unused.axis("off")
        for axes, costs, corpus in zip(panels[::2], panels[1::2], corpora, strict=False):
            mine = [run for run in runs if run.corpus == corpus]
            _panel(axes, rows, mine)
            _cost_panel(costs, rows, mine)
            axes.set_title(corpus if len(plan.corpora) > 1 else plan.name, fontsize=10, loc="left")
        return _png(figure)


def _panel(axes: Any, rows: Sequence[str], runs: Sequence[Run]) -> None:
    """Draw a line for each row, from the top: the mean of its seeds and its interval."""
    metric = f"{_CLAIM} average"
    found = {row: [run for run in runs if run.row == row] for row in rows}
    reference = next((row for row in (SHORT, BASELINE) if any(metric in run.metrics for run in found.get(row, ()))), "")
    if reference:
        of_reference = Mean.of([run.metrics[metric] for run in found[reference] if metric in run.metrics])
        axes.axvline(of_reference.mean, color=_SOFT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    for place, (row, mine) in enumerate(found.items()):
        values = [run.metrics[metric] for run in mine if metric in run.metrics]
        if values:
            mean = Mean.of(values)
            colour = _INK if row in (SHORT, BASELINE) else _POINT
            axes.errorbar(
                mean.mean, place, xerr=0.0 if math.isnan(mean.half) else mean.half, color=colour, capsize=2.5,
                marker="o", markersize=5, linestyle="none",
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{metric}, %" + (f" (dashed: {reference})" if reference else ""))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="both", color="#e6e9ec", linewidth=0.7)
    axes.set_axisbelow(True)


def _cost_panel(axes: Any, rows: Sequence[str], runs: Sequence[Run]) -> None:
    """Write the costs of each row as shares of those of ``full``, or of the first row if it has no run yet."""
    found = {row: mine for row in rows if (mine := [run for run in runs if run.row == row])}
    costs = {row: [_mean_of(mine, name) for name in _COSTS.values()] for row, mine in found.items()}
    base = BASELINE if BASELINE in costs else next(iter(costs))
    axes.axis("off")
    axes.set_title(f"cost, % of {base}", fontsize=9, color=_SOFT, loc="right", pad=20)
    how = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center", "color": _SOFT}
    for column, name in enumerate(_COSTS):
        at = (column + 1) / len(_COSTS)
        axes.annotate(
            name, (at, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", ha="right", color=_SOFT
        )
        for row, values in costs.items():
            share = f"{values[column] / costs[base][column]:.0%}" if costs[base][column] else "-"
            axes.text(at, rows.index(row), share, **how)


def _mean_of(runs: Sequence[Run], name: str) -> float:
    return math.fsum(run.result[name] for run in runs) / len(runs)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
