"""The report on a training run: what was pruned in each epoch, and how the model developed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thresher import __version__
from thresher.dynamic.mismatch import Mismatch, looks_for_mismatch
from thresher.dynamic.run_folder import Training
from thresher.errors import ThresherError, UsageError
from thresher.pool.store import EmbeddingStore
from thresher.report import curves
from thresher.report.epochs import Epochs, RowGroup, is_constant, row_groups
from thresher.report.examples import Example, look_up
from thresher.report.facts import ARROW, in_short, number, plain
from thresher.report.pages import rendered, write_page
from thresher.runtime.format import counted, duration, percent
from thresher.runtime.places import AnyPath
from thresher.runtime.results import Name, Say
from thresher.selection import Selection

_OPEN = 60  # with more epochs, their table is collapsed
COLUMNS = {
    "rows": "rows",
    "pruned_so_far": "pruned so far",
    "loss": "mean loss",
    "redundant": "redundant",
    "ill_matched": "ill-matched",
    "candidates": "candidates",
    "overlap": "repeated",
    "seconds": "seconds",
    "samples_per_second": "samples/s",
    "lr": "learning rate",
}
_CAPTIONS = {
    "kept": "Rows trained on and pruned.",
    "pruned": "Share of the samples pruned so far.",
    "candidates": "Candidates for pruning, by the epoch that selected them. A row can be redundant in one direction "
    "and ill-matched in the other.",
    "overlap": "Share of the candidates that were also candidates in the previous search. The dashed line is "
    "the share expected by chance.",
    "loss": "Mean loss of the rows trained on. Full epochs and pruned epochs are not comparable: pruning removes the "
    "highest or lowest losses, and the rows of a batch are each other's negatives.",
    "histogram": "Losses of the rows trained on: each column is an epoch; darker cells have more of its rows.",
    "seconds": "Training time in seconds, without evaluations.",
    "speed": "Training throughput in samples per second.",
}


def write_run_report(
    training: Training,
    target: Name,
    *,
    store: EmbeddingStore | None = None,
    title: str | None = None,
    examples: int = 6,
    overwrite: bool = True,
    say: Say | None = None,
) -> AnyPath:
    """Write a report on a training run as one HTML file and return its path.

    The page is self-contained, with charts and images inside. The same run gives the same bytes.

    Args:
        training: A run, finished or not.
        target: The file; replaced atomically.
        store: The pool of the run, see :meth:`Training.open_pool`, for captions and images; without it, the report
            has only numbers.
        title: Heading; by default it names the folder of the run.
        examples: Example rows shown side by side; 0 for none.
        overwrite: Replace a different file.
        say: Called with one line if the file has this content already.

    Raises:
        UsageError: The store does not have as many rows as the pool of the run, or a number is negative.
        PoolError: The folder of the run or the pool is damaged.
        OutputError: A different file exists and ``overwrite`` is false, or the file cannot be written.
    """
    if examples < 0:
        raise UsageError(f"examples = {examples}: must be 0 or more")
    if store is not None and store.total != training.rows:
        raise UsageError(f"a pool of {store.total:,} rows for a run on {training.rows:,}; open it with open_pool()")
    log = training.log()
    epochs = Epochs.of(log)
    shown_groups: tuple[RowGroup, ...] = ()
    needed = len(epochs) and (store is not None or looks_for_mismatch(training.policy))
    ledger = training.ledger() if needed else None
    mismatch = None if ledger is None else Mismatch.of(training.policy, ledger)
    if ledger is not None and store is not None:
        shown_groups = row_groups(ledger, examples, mismatch)
    shown = look_up(store, [row.row for group in shown_groups for row in group.rows]) if store is not None else {}
    page = _render(training, log, epochs, mismatch, shown_groups, shown, title)
    if store is not None:
        store.check_unchanged("the report was made")
    return write_page(page, target, overwrite=overwrite, say=say)


@dataclass(frozen=True)
class _Metric:
    """A row of the table of evaluations."""

    of: str
    name: str
    first: str
    last: str
    best: str
    when: str


def _render(
    training: Training,
    log: Sequence[Mapping[str, Any]],
    epochs: Epochs,
    mismatch: Mismatch | None,
    shown_groups: tuple[RowGroup, ...],
    shown: Mapping[int, Example],
    title: str | None,
) -> str:
    from markupsafe import Markup

    drawn = curves.charts(epochs, training.promised) if len(epochs) else {}
    evaluations = [
        (name, curves.evaluation(f"eval-{i}", plain(name, 80), measured))
        for i, (name, measured) in enumerate(epochs.evals.items(), 1)
    ]
    name = plain(os.path.basename(os.path.abspath(training.folder)), 80)
    return rendered(
        "run.html.jinja",
        title=plain(title or f"Training run {name}", 200),
        training=training,
        unfinished=training.unfinished(log),
        facts=[*main_facts(training, epochs), *_mismatched(mismatch)],
        pruned=float(epochs["pruned_so_far"][-1]) if len(epochs) else 0.0,
        epochs=len(epochs),
        policy=_policy(training),
        # Markup is safe: matplotlib escapes all text in a chart.
        charts=[(name, Markup(drawn[name]), _CAPTIONS[name]) for name in _CAPTIONS if name in drawn],
        evaluations=[(name, Markup(drawing)) for name, drawing in evaluations if drawing],
        metrics=_metrics(epochs),
        columns=[title for name, title in COLUMNS.items() if has_values(epochs, name)],
        table=epoch_table(epochs),
        opened=len(epochs) <= _OPEN,
        groups=shown_groups,
        mismatched=mismatch is not None,
        shown=shown,
        pictures=any(example.picture for example in shown.values()),
        settings={key: _value(value) for key, value in training.settings.items() if value not in (None, [], {})},
        header=json.dumps(
            {key: value for key, value in vars(training).items() if key != "folder"}, indent=2, ensure_ascii=False
        ),
        version=__version__,
    )


def main_facts(training: Training, epochs: Epochs) -> list[tuple[str, str]]:
    """Return the main numbers of the run."""
    facts = [("Policy", _policy(training)), ("Epochs", number(len(epochs)))]
    settings = {"Model": "model", "Batch size": "batch_size", "Peak learning rate": "lr", "Seed": "seed"}
    facts += [
        (name, str(training.settings[key])) for name, key in settings.items() if training.settings.get(key) is not None
    ]
    if chosen := training.settings.get("selection"):
        facts.append(("Selection", _selection(str(chosen), training)))
    if not len(epochs):
        return facts
    seen, (left_out, saved) = int(np.nansum(epochs["samples"])), epochs.saved
    facts.append(("Samples seen", number(seen)))
    share = f", {percent(left_out, float(np.nansum(epochs['total'])))}" if left_out > 0 else ""
    target = "" if training.promised is None else f"; target for the run: {training.promised:.1%}"
    facts.append(("Pruned", f"{number(int(left_out))} samples{share}{target}"))
    seconds = float(epochs["seconds"].sum())
    if np.isfinite(seconds):
        about = f"; about {duration(saved)} saved, at the measured speed" if saved > 0 else ""
        facts.append(("Training", f"{duration(seconds)}{about}"))
    return facts


def _selection(location: str, training: Training) -> str:
    """Return what the run was trained on: a selection folder and its steps, if it is still there, or a file of keys."""
    name = plain(location, 160)
    try:
        chosen = Selection.load(location) if os.path.isdir(location) else None
    except ThresherError:
        chosen = None
    if chosen is None:
        return name
    chain = f" {ARROW} ".join(in_short(step) for step in chosen.header()["steps"]) or "all rows"
    other = "" if chosen.store == training.store else ", of another pool with the same keys"
    return plain(f"{name}: {number(len(chosen))} of {counted(chosen.total, 'row')}{other}; {chain}", 600)


def _mismatched(mismatch: Mismatch | None) -> list[tuple[str, str]]:
    if mismatch is None:
        return []
    if mismatch.found is None:
        return [("Mismatched pairs", "none found: the ranks of the losses form one hump")]
    wrong = int(np.count_nonzero(mismatch.wrong_N))
    share = percent(wrong, len(mismatch.ranks_N))
    return [
        ("Mismatched pairs", f"probably {number(wrong)}, {share}: mean rank of the loss above {mismatch.found.cut:.2f}")
    ]


def _policy(training: Training) -> str:
    prune = "" if training.promised is None else f", target {training.promised:.1%}"
    return plain(f"{training.policy}{prune}", 160)


def has_values(epochs: Epochs, name: str) -> bool:
    """Return whether a column has any values."""
    if name in ("redundant", "ill_matched", "candidates"):
        return bool(np.nansum(epochs[name]))
    return bool(np.isfinite(epochs[name]).any())


def epoch_table(epochs: Epochs) -> list[tuple[int, str, list[str]]]:
    """Return a row for each epoch: number, phase, cells."""
    names = [name for name in COLUMNS if has_values(epochs, name)]
    return [
        (int(epochs.number_E[e]), plain(epochs.phases[e], 40), [_cell(name, epochs, e) for name in names])
        for e in range(len(epochs))
    ]


def _cell(name: str, epochs: Epochs, e: int) -> str:
    value = float(epochs[name][e])
    if np.isnan(value) or (name in ("redundant", "ill_matched", "candidates") and not value):
        return "-"
    if name in ("pruned_so_far", "overlap"):
        return f"{value:.1%}"
    if name == "lr":
        return f"{value:.2e}"
    if name == "seconds":
        return f"{value:,.1f}"
    return number(value) if name == "loss" else f"{value:,.0f}"


def _metrics(epochs: Epochs) -> list[_Metric]:
    rows = []
    for name, measured in epochs.evals.items():
        for curve in measured:
            if is_constant(curve.metric):
                ends = (number(curve.values[-1]),) * 2
                rows.append(_Metric(plain(name, 60), plain(curve.metric, 60), "", ends[1], "", ""))
                continue
            best = curve.best
            rows.append(
                _Metric(
                    plain(name, 60),
                    plain(curve.metric, 60),
                    number(curve.values[0]),
                    number(curve.values[-1]),
                    number(curve.values[best]),
                    f"epoch {curve.epochs[best]}",
                )
            )
    return rows


def _value(value: Any) -> str:
    return plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), 300)
