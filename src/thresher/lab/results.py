"""The results of a plan: ``results.json``, ``table.md``, ``plot.png`` and ``details.json``."""

from __future__ import annotations

import io
import math
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
_KINDS = ("average", "R@1", "zero-shot", "knn", "probe")
_CLAIM, _CHOICE = "held-out", "selection"
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
            "runs": [{"corpus": run.corpus, "row": run.row, "seed": run.seed, **run.result} for run in runs],
        },
    )
    with writing(out / TABLE) as scratch:
        Path(scratch).write_text(table(plan, runs, extra), encoding="utf-8")
    if runs:
        with writing(out / PLOT) as scratch:
            Path(scratch).write_bytes(plot(plan, runs))


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
    return Mean.of([mine[seed] - theirs[seed] for seed in both]) if both else None


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
    seeds = sorted({run.seed for run in runs})
    lines = [
        f"Metrics are percentages on the held-out half of {', '.join(_set_names(runs)) or 'the evaluation sets'}: mean "
        f"over {counted(len(seeds), 'seed')} ± half of the 95% interval (Student's t); differences are paired by seed, "
        f"with their 95% interval. \\* marks a difference to {other} that is significant at 5% after Holm's correction "
        f"for {counted(len(made), 'comparison')}. A difference whose interval holds 0 was not found.",
        "",
        "E1 counts the samples that gradients were computed on, E2 every forward pass of a sample, with those of "
        "proxies, embeddings, reference models and the run that a coreset was made of. E3 is the seconds of all these; "
        f"{counted(int(extra.get('at_once', 1)), 'run')} ran at a time. {SHORT} is full training on as many samples as "
        f"the rows that prune, with the same loss, temperature and schedule.",
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
    """Return a table of how much of each planted kind the rows left out, over all seeds; [] if nothing was planted."""
    found: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for run in runs:
        for kind, counts in (run.result.get("kept") or run.result.get("left_out") or {}).items():
            mine = found.setdefault((run.corpus, run.row), {})
            rows, out = mine.get(kind, (0, 0))
            mine[kind] = (rows + counts["rows"], out + counts["left_out"])
    if not found:
        return []
    kinds = sorted({kind for shares in found.values() for kind in shares})
    lines = [
        "",
        "Share of each kind of row that was left out: dropped by a selection, or a candidate in the last search of a "
        "policy.",
        "",
        "| row | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for (corpus, row), shares in found.items():
        cells = [f"{shares[kind][1] / shares[kind][0]:.1%}" if kind in shares else "-" for kind in kinds]
        lines.append(f"| {row_name(plan, corpus, row)} | " + " | ".join(cells) + " |")
    return lines


# --- the plot -------------------------------------------------------------------------------------


def plot(plan: Plan, runs: Sequence[Run]) -> bytes:
    """Return a chart of accuracy against compute as PNG: a panel per corpus, a point with its interval per row."""
    from matplotlib import style
    from matplotlib.figure import Figure

    corpora = [corpus.name for corpus in plan.corpora if any(run.corpus == corpus.name for run in runs)]
    metric = f"{_CLAIM} average"
    with style.context(["default", {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}]):
        figure = Figure(figsize=(max(6.4, 4.6 * len(corpora)), 4.4), layout="constrained", facecolor="white")
        panels = figure.subplots(1, len(corpora), squeeze=False)[0]
        for axes, corpus in zip(panels, corpora, strict=True):
            _panel(axes, plan, [run for run in runs if run.corpus == corpus], metric)
            axes.set_title(corpus if len(plan.corpora) > 1 else plan.name, fontsize=10)
        panels[0].set_ylabel(f"{metric}, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        return _png(figure)


def _panel(axes: Any, plan: Plan, runs: Sequence[Run], metric: str) -> None:
    markers = "osD^v<>Pp*Xhd"
    shown = []
    for number, row in enumerate(plan.rows):
        mine = [run for run in runs if run.row == row.name and metric in run.metrics]
        if mine:
            forwards = math.fsum(run.result["scored_forwards"] for run in mine) / len(mine)
            shown.append((number, row.name, forwards, Mean.of([run.metrics[metric] for run in mine])))
    every = [forwards for _, _, forwards, _ in shown]
    apart = 0.015 * (max(every, default=0) - min(every, default=0) or max(every, default=0))
    for place, (number, name, forwards, mean) in enumerate(shown):
        # Rows with as many forwards are drawn next to each other.
        at = forwards + apart * (every[:place].count(forwards) - (every.count(forwards) - 1) / 2)
        axes.errorbar(
            at, mean.mean, yerr=0.0 if math.isnan(mean.half) else mean.half, marker=markers[number % len(markers)],
            color=f"C{number % 10}", capsize=2, linestyle="none", label=name,
        )  # fmt: skip
    axes.set_xlabel("forward passes of a sample (E2)")
    axes.grid(axis="y", color="#e6e9ec", linewidth=0.7)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
