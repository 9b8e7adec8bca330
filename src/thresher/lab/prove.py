"""``thresher prove``: is pruning worth it on these data? A small plan, and one sentence computed from its intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from thresher.data.location import refuse_inside
from thresher.errors import OutputError, UsageError
from thresher.evaluation.intervals import Mean
from thresher.evaluation.split import split
from thresher.lab.corpus import index_of, write_subset
from thresher.lab.plan import (
    BASELINE,
    SHORT,
    Corpus,
    Evaluation,
    Plan,
    Proxy,
    Row,
    Sources,
    Trainer,
    check_selection,
)
from thresher.lab.results import Run, difference
from thresher.lab.work import read_own, write_json
from thresher.pool.store import absolute
from thresher.runtime.files import writing
from thresher.runtime.format import counted
from thresher.runtime.random import generator

CHOSEN, RANDOM = "chosen", "random"
TRAIN, HELD_OUT = "train.parquet", "held-out.parquet"
SENTENCE = "sentence.txt"
REQUEST = "data.json"  # what the parts were cut from
_SHARE, _MOST, _FEWEST = 0.1, 2_000, 50  # rows held out: a tenth, but at most and at least these many
_WIDE = 3.0  # points: an interval that holds 0 and reaches further says nothing
_METRICS = {"held-out R@1": "R@1", "held-out probe": "linear probe", "held-out average": "points"}

Outcome = Literal["better", "worse", "equal", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be proved: a method or policy, on some data.

    Attributes:
        method: A method that selects rows before training, with its parameters; or
        policy: a policy that prunes while training; or
        selection: a selection folder or file of keys.
        options: Parameters of the method, or options of the policy.
        keep: The share of the rows to keep, or of the samples to train on.
        evals: Evaluation sets, parquet; () to hold out a tenth of the data.
        labels: Class columns of the evaluation sets.
        seeds: Number of seeds.
        epochs: Epochs of full training.
        model: The model.
        batch_size: Rows of a batch.
        device: Where to train.
        rows: Use at most this many rows of the data, drawn at random.
    """

    method: str | None = None
    policy: str | None = None
    selection: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: float = 0.7
    evals: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    seeds: int = 3
    epochs: int = 8
    model: str = "tiny"
    batch_size: int = 256
    device: str = "auto"
    rows: int = 40_000

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if sum(one is not None for one in (self.method, self.policy, self.selection)) != 1:
            raise UsageError("give one of a method, a policy and a selection")
        if not 0 < self.keep < 1:
            raise UsageError(f"keep = {self.keep}; give a share strictly between 0 and 1, like 70%")
        if self.seeds < 1 or self.epochs < 1 or self.rows < 4 * _FEWEST:
            raise UsageError(
                f"seeds = {self.seeds}, epochs = {self.epochs}, rows = {self.rows}; give 1 seed and epoch or more, and "
                f"{4 * _FEWEST} rows or more"
            )

    @property
    def name(self) -> str:
        """What is proved, as the sentence names it."""
        share = f"{self.keep * 100:g}%"
        if self.selection is not None:
            return f"the selection ({share})"
        return f"{share} by {self.method}" if self.method else f"{share} of the samples by {self.policy}"

    @property
    def random_name(self) -> str:
        """The random counterpart, as the sentence names it."""
        return f"random {self.keep * 100:g}%"

    def plan(self, folder: Path, train: str, evals: Sequence[str]) -> Plan:
        """Return the plan for data that are cut into training data and evaluation sets."""
        row: dict[str, Any] = {"name": CHOSEN}
        random = Row(name=RANDOM, steps=({"method": "random", "keep": self.keep},))
        if self.method is not None:
            row["steps"] = ({"method": self.method, "keep": self.keep, **self.options},)
        elif self.selection is not None:
            row["selection"] = self.selection
        else:
            row |= {"policy": self.policy, "prune": round(1 - self.keep, 12), "options": dict(self.options)}
            random = Row(name=RANDOM, policy="dynamic-random", prune=round(1 - self.keep, 12))
        trainer = Trainer(
            model=self.model, epochs=self.epochs, share=self.keep, batch_size=self.batch_size, device=self.device
        )
        return Plan(
            name="prove", about=f"Is {self.name} as good as everything?", seeds=tuple(range(self.seeds)),
            data=Sources(train=train, evals=tuple(evals)), trainer=trainer, proxy=Proxy(epochs=min(4, self.epochs)),
            evaluation=Evaluation(labels=self.labels, templates=("{}", "a photo of a {}.")), corpora=(Corpus(),),
            rows=(Row(name=BASELINE), Row(name=SHORT), Row(**row), random),
        )  # fmt: skip


# --- the data -------------------------------------------------------------------------------------


def cut_data(question: Question, data: str, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Return training data and evaluation sets; without evaluation sets a tenth of the data is held out.

    Rows with the same caption are in the same part. Both parts are written to the folder, unless the data can be used
    as they are. If they are there already, they are not made again: the cut is always the same.

    Raises:
        OutputError: The folder has parts of other data, or cut in another way, or is a file.
        UsageError: There are too few rows to hold some out, or the selection does not exist.
    """
    if question.selection is not None:
        check_selection(question.selection)
    if folder.parent.is_file():
        raise OutputError(f"{folder.parent}: is a file; give a folder")
    request = {"data": data, "evals": list(map(absolute, question.evals)), "rows": question.rows}
    with suppress(FileNotFoundError):
        known = read_own(folder / REQUEST)
        if odd := [name for name, value in request.items() if known.get(name) != value]:
            raise OutputError(f"{folder.parent}: was begun with other {' and '.join(odd)}; choose another folder")
    if not folder.exists():
        refuse_inside(data, folder.parent)
    made = _cut(question, data, folder)
    write_json(folder / REQUEST, request)
    return made


def _cut(question: Question, data: str, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Return training data and evaluation sets, and write those that are not there."""
    if question.evals and not _is_larger(question, data):
        return data, question.evals
    train, held_out = folder / TRAIN, folder / HELD_OUT
    evals = question.evals or (str(held_out),)
    if train.exists() and all(Path(path).exists() for path in evals):
        return str(train), evals
    index = index_of(data, captions=True)
    chosen_N = np.ones(len(index), np.bool_)
    if len(index) > question.rows:
        chosen_N[generator(0, "prove").permutation(len(index))[question.rows :]] = False
    if not question.evals:
        rows = np.flatnonzero(chosen_N)
        share = min(_SHARE, _MOST / len(rows))
        share = max(share, _FEWEST / len(rows))
        if share > 0.5:
            raise UsageError(
                f"{data}: has {len(rows):,} usable rows; give {2 * _FEWEST} or more, or an evaluation set with --eval"
            )
        if len({index.texts[row] for row in rows.tolist()}) < 2:  # rows with the same caption stay together
            raise UsageError(
                f"{data}: all {counted(len(rows), 'usable row')} have the same caption, so that none can be held out; "
                "give an evaluation set with --eval"
            )
        texts = np.unique(np.array([index.texts[row] for row in rows.tolist()]), return_inverse=True)[1]
        apart_M = split(len(rows), groups_N=texts, share=share)
        out_N = np.zeros(len(index), np.bool_)
        out_N[rows[apart_M]] = True
        chosen_N &= ~out_N
        write_subset(index, out_N, data, held_out, group_by_text=True)
    write_subset(index, chosen_N, data, train)
    return str(train), evals


def _is_larger(question: Question, data: str) -> bool:
    return len(index_of(data, captions=True)) > question.rows


# --- the sentence ---------------------------------------------------------------------------------


def outcome(mean: Mean | None) -> Outcome:
    """Return what a difference shows: its interval lies above 0, below 0, close around 0, or says nothing."""
    if mean is None or math.isnan(mean.half):
        return "unknown"
    if mean.low > 0:
        return "better"
    if mean.high < 0:
        return "worse"
    return "equal" if reach(mean) <= _WIDE else "unknown"


def reach(mean: Mean) -> float:
    """Return how far from 0 the interval reaches."""
    return max(abs(mean.low), abs(mean.high))


def sentence(question: Question, runs: Sequence[Run]) -> str:
    """Return what the runs show, in one sentence.

    The difference of the chosen rows to everything at equal samples comes first, then that of random rows; what
    follows from both is last. Where an interval does not decide, the sentence says so.
    """
    corpus = runs[0].corpus if runs else ""
    names = {name for run in runs for name in run.metrics}
    metric = next((name for name in _METRICS if name in names), "held-out average")
    chosen, other, apart = (
        difference(runs, corpus, *pair, metric) for pair in ((CHOSEN, SHORT), (RANDOM, SHORT), (CHOSEN, RANDOM))
    )
    return say(question, _METRICS[metric], chosen, other, apart)


def say(question: Question, unit: str, chosen: Mean | None, random: Mean | None, apart: Mean | None) -> str:
    """Return the sentence for three differences.

    Args:
        question: What was asked.
        unit: What the points are of.
        chosen: The chosen rows minus everything at equal samples.
        random: Random rows minus everything at equal samples.
        apart: The chosen rows minus random rows.
    """
    first, second, third = outcome(chosen), outcome(random), outcome(apart)
    start = f"on your data {question.name} {_compared(first, chosen, unit)}"
    if first == "unknown":
        return f"{start}: run more seeds, such as --seeds {max(5, question.seeds + 2)}"
    return f"{start}; {question.random_name} {_random(first, second, random, unit)}: {_follows(first, second, third)}"


def _compared(what: Outcome, mean: Mean | None, unit: str) -> str:
    if mean is None or mean.seeds == 1:
        return "cannot be compared with everything at equal samples by one seed, which has no interval"
    if math.isnan(mean.half):
        return (
            f"differs from everything at equal samples by {mean.mean:+.1f} {unit} with each of {mean.seeds:,} seeds: "
            "without any spread there is no interval"
        )
    if what == "unknown":
        return (
            f"is neither clearly different from everything at equal samples nor clearly equal: {mean.mean:+.1f} {unit} "
            f"with an interval from {mean.low:+.1f} to {mean.high:+.1f}"
        )
    if what == "equal":
        return f"is within ±{reach(mean):.1f} {unit} of everything at equal samples"
    return f"is {what} than everything at equal samples by {_by(mean, unit)}"


def _random(first: Outcome, second: Outcome, mean: Mean | None, unit: str) -> str:
    if mean is None or second == "unknown":
        return "is not clearly better, worse or equal"
    if first == second:
        return "is too"
    if second == "equal":
        return f"is within ±{reach(mean):.1f} {unit}"
    return f"is {second} by {_by(mean, unit)}"


def _by(mean: Mean, unit: str) -> str:
    low, high = sorted((abs(mean.low), abs(mean.high)))
    return f"{abs(mean.mean):.1f} {unit} ({low:.1f} to {high:.1f})"


_FOLLOWS: dict[Outcome, dict[Outcome, str]] = {
    "better": {
        "better": "pruning pays here, and so does the selection",
        "equal": "pruning pays here, but random rows do as well, so it is not the selection",
        "worse": "pruning pays here, but random rows are better than this selection",
        "unknown": "pruning pays here; whether the selection matters is open",
    },
    "equal": {
        "better": "pruning is free here, and the selection is better than random rows",
        "equal": "pruning is free here, selection adds nothing",
        "worse": "pruning is free here, but random rows are better than this selection",
        "unknown": "pruning is free here; whether the selection adds anything is open",
    },
    "worse": {
        "better": "pruning costs accuracy here, less with this selection than with random rows",
        "equal": "pruning costs accuracy here, and selection does not help",
        "worse": "this selection costs accuracy here, more than random rows do",
        "unknown": "pruning costs accuracy here; whether the selection matters is open",
    },
}


def _follows(first: Outcome, second: Outcome, third: Outcome) -> str:
    """Return what follows from the comparisons with everything (``first``) and with random rows (``third``)."""
    if first == "worse" and second in ("better", "equal") and third != "worse":
        return "this selection costs accuracy here, random rows do not"
    if first == "equal" and second == "worse" and third != "better":
        return "pruning with this selection is free here; whether it is better than random rows is open"
    if first == "equal" and second == "unknown" and third == "equal":
        return _FOLLOWS["equal"]["unknown"]
    return _FOLLOWS[first][third]


def write_sentence(folder: Path, text: str) -> None:
    """Write the sentence to the folder of the results."""
    with writing(folder / SENTENCE) as scratch:
        Path(scratch).write_text(f"{text}\n", encoding="utf-8")
