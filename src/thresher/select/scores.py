"""Scores: one number a row, computed or stored, and cut by a budget or a threshold."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt

from thresher.errors import BadRowsError, UsageError, suggest
from thresher.io.parquet import parquet_metadata
from thresher.ops.cut import top
from thresher.pool.join import positions
from thresher.pool.layout import Options, Rows
from thresher.pool.store import EmbeddingStore, open_store
from thresher.runtime.parameters import is_required, parameters_of
from thresher.select.registry import METHODS, build
from thresher.select.run import Run
from thresher.selection import Keep, RoundedFloat, Selection

Array = npt.NDArray[Any]

MARK = b"thresher"  # under which a parquet file of scores says how they were made
_FILE = re.compile(r"(.+?\.(?:parquet|pq))(?::(.+))?", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Score:
    """One number for every row of a view; higher is better.

    Attributes:
        values_N: (n,) numbers, none of them NaN.
        notes: Where they come from.
    """

    values_N: Array
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scored(ABC):
    """Parameters of every method that gives each row a number and cuts by it.

    A method has ``meaning``, the name of its number in words, and ``score(run) -> Score``; parameters that
    only cut are ``keep`` and ``threshold``.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]

    keep: Keep | None = field(default=None, metadata={"help": "share or number of rows to keep"})
    threshold: float | None = field(default=None, metadata={"help": "keep rows with a score of at least this"})

    def __post_init__(self) -> None:
        """Exactly one of keep and threshold."""
        if (self.keep is None) == (self.threshold is None):
            both = "; not both" if self.keep is not None else ""
            raise UsageError(f"{self.name} needs either keep (such as 30%) or threshold (such as 0.28){both}")

    @abstractmethod
    def score(self, run: Run) -> Score:
        """Return every row's number."""

    def select(self, run: Run) -> Selection:
        """Cut by the score; equal scores at a budget go to the lower row."""
        found = self.score(run)
        scores = found.values_N
        if self.keep is not None:
            mask = top(scores, self.keep.of(len(scores)))
            least = float(scores[mask].min())
            if not np.isfinite(least):
                raise UsageError(f"keep = {self.keep}: that takes rows whose {self.meaning} is {least}; keep fewer")
            cut: float | None = least
            reason = f"{self.meaning} {{score:.4f}} is below the cut at {{cut:.4f}}"
        else:
            mask, cut = scores >= self.threshold, self.threshold
            if not mask.any() and len(scores):
                raise UsageError(
                    f"threshold = {self.threshold}: no row reaches it; they have {RoundedFloat(scores.min()):.4f} to "
                    f"{RoundedFloat(scores.max()):.4f}"
                )
            reason = f"{self.meaning} {{score:.4f}} is below the threshold {{cut}}"
        return run.selection(
            self,
            mask,
            reasons=(reason,),
            score=self.meaning,
            cut=cut,
            notes=found.notes,
            rows={"score": scores.astype(np.float32)},
        )


def scoring_methods() -> dict[str, type[Scored]]:
    """Return the methods that give each row a number, by name."""
    return {name: cls for name, cls in METHODS.all().items() if issubclass(cls, Scored)}


def scorer(name: str, parameters: Mapping[str, Any] | None = None) -> Scored:
    """Make a scoring method from loosely typed parameters, for its numbers alone: it cuts nothing.

    Raises:
        UsageError: No scoring method of that name, or parameters it does not take.
    """
    known = scoring_methods()
    if name not in known:
        raise UsageError(
            f"{name!r} is no method that gives each row a number; those are {', '.join(known)}.{suggest(name, known)}"
        )
    return cast(Scored, build(name, {**(parameters or {}), "keep": "100%"}))


def column(run: Run, source: str, parameter: str, *, finite: bool = False) -> Score:
    """Return a column to judge by, wherever it is.

    Args:
        run: Whose rows.
        source: A metadata column of the pool; else the name of a scoring method, which is then computed with
            its defaults; else ``file.parquet`` or ``file.parquet:column``, joined by key.
        parameter: Which names it, for messages.
        finite: Refuse infinite numbers.

    Raises:
        UsageError: No such column; says what there is.
        BadRowsError: A row has no number; names the first.
    """
    known = scoring_methods()
    if source in run.store.columns:
        found = _stored(run, source)
    elif source in known:
        if needs := [item.name for item in parameters_of(known[source]) if is_required(item)]:
            raise UsageError(
                f"{parameter}: {source} needs {', '.join(needs)}; write it with 'thresher score {source} ...' and name "
                "that file"
            )
        made = scorer(source).score(run)
        found = Score(made.values_N, tuple(f"{source}: {note}" for note in made.notes))
    elif file := _FILE.fullmatch(source):
        found = _from_file(run, file[1], file[2], parameter)
    elif os.path.isfile(source):
        raise UsageError(f"{parameter} = {source!r}: scores are read from parquet files; write them as one")
    else:
        raise UsageError(
            f"{parameter} = {source!r}: there is no such column; give one of {run.store.layout.location} ("
            f"{', '.join(run.store.columns) or 'none'}), a method ({', '.join(known)}) or a file (scores.parquet or "
            f"scores.parquet:column).{suggest(source, [*run.store.columns, *known])}"
        )
    if finite and found.values_N.dtype.kind == "f" and np.isinf(found.values_N).any():
        row = int(run.store.ids[np.flatnonzero(np.isinf(found.values_N))[0]])
        raise BadRowsError(f"{parameter}: {source} is infinite in row {row:,} of the pool; filter such rows out first")
    return found


def clip_scores(run: Run, source: str, parameter: str) -> Score:
    """Return a column as :func:`column` does, or the CLIP scores of another pool of the same rows.

    Args:
        run: Whose rows.
        source: As for :func:`column`, or the folder of a pool, such as one embedded by another model. Its rows
            are found by key, or by number where neither pool has keys.
        parameter: Which names it, for messages.

    Raises:
        UsageError: The pool has other rows.
    """
    named = source in run.store.columns or source in scoring_methods() or _FILE.fullmatch(source)
    if named or not (os.path.isdir(source) or "://" in source):
        return column(run, source, parameter, finite=True)
    mine, options = run.store, run.store.options
    other = open_store(source, Options(key=options.key, dtype=options.dtype), scratch=str(run.cache.folder))
    if other.total != mine.total:
        raise UsageError(
            f"{parameter}: {source} has {other.total:,} rows and {mine.layout.location} {mine.total:,}; give a pool of "
            "the same rows"
        )
    key = mine.layout.key if mine.layout.key in other.columns else other.layout.key
    if (key is None) != (mine.layout.key is None):
        keyed, bare = (mine.layout.location, source) if key is None else (source, mine.layout.location)
        raise UsageError(
            f"{parameter}: {keyed} has keys and {bare} has none, so their rows cannot be matched; if both have "
            "the same order, say so with --key row"
        )
    places = _places(run, other, key)
    if (places < 0).any():
        raise UsageError(f"{parameter}: {_missing(run, source, key, places)}; give a pool of the same rows")
    mask = np.zeros(other.total, np.bool_)
    mask[places] = True
    view = other.where(mask)
    start = Selection.everything("", source, {}, other.total)
    made = scorer("clip-score").score(Run(view, start, run.engine, run.cache, run.seed, run.progress))
    return Score(made.values_N[np.searchsorted(view.ids, places)], tuple(f"{source}: {note}" for note in made.notes))


def _stored(run: Run, name: str) -> Score:
    values = run.store.column(name)
    missing = np.flatnonzero(np.isnan(values)) if values.dtype.kind == "f" else np.empty(0, np.int64)
    if len(missing):
        row = int(run.store.ids[missing[0]])
        raise BadRowsError(
            f"{run.store.whereabouts('metadata', row)}: the score column {name!r} is empty or NaN "
            f"({len(missing):,} such rows); filter them out first, with where = 'NOT isnan({name})'"
        )
    return Score(values, (f"taken from the column {name}",))


def _from_file(run: Run, location: str, name: str | None, parameter: str) -> Score:
    import pyarrow as pa

    if "://" not in location and not os.path.isfile(location):
        raise UsageError(f"{parameter}: {location}: no such file; 'thresher score' writes one")
    other = open_store(location, scratch=str(run.cache.folder))
    mine = run.store.layout.key
    wanted = [mine, "key"] if mine else ["row"]
    key = next((name for name in wanted if name in other.columns), None)
    if key is None:
        raise UsageError(
            f"{parameter}: {location} has no column {' or '.join(dict.fromkeys(map(repr, wanted)))} to join by; it has "
            f"{', '.join(other.columns)}"
        )
    kinds = other.layout.tables[0].schema(other.columns)
    numbers = [f.name for f in kinds if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
    numbers = [number for number in numbers if number not in (key, "row")]
    if name is None and not numbers:
        told = ", ".join(f"{field.name} ({field.type})" for field in kinds)
        raise UsageError(f"{parameter}: {location} has no column of numbers but keys; it has {told}")
    if name is None and len(numbers) > 1:
        raise UsageError(
            f"{parameter}: {location} has {', '.join(numbers)}; say which to take, as in {location}:{numbers[0]}"
        )
    name = name or numbers[0]
    if name not in other.columns:
        raise UsageError(
            f"{parameter}: {location} has no column {name!r}; it has {', '.join(other.columns)}."
            f"{suggest(name, numbers)}"
        )
    if mine is None:
        _same_store(run, other)
    places = _places(run, other, key)
    if (places < 0).any():
        raise BadRowsError(
            f"{parameter}: {_missing(run, location, key, places)}; "
            + (
                "are these scores of another pool?"
                if (places < 0).all()
                else "score all rows, or judge only those that have one, by --within a selection of them"
            )
        )
    values = other.column(name)[places]
    missing = np.flatnonzero(np.isnan(values)) if values.dtype.kind == "f" else np.empty(0, np.int64)
    if len(missing):
        raise BadRowsError(
            f"{other.whereabouts('metadata', int(places[missing[0]]))}: {name!r} is empty or NaN "
            f"({len(missing):,} such rows); judge only the others: --within the result of thresher select filter "
            f"--metadata {location} --where 'NOT isnan({name})'"
        )
    return Score(values, (f"{name} taken from {location} by {key}",))


def _same_store(run: Run, other: EmbeddingStore) -> None:
    """Refuse row numbers of another pool, where the file says which it was made from."""
    try:
        told = json.loads(parquet_metadata(*other.files()[0]).get(MARK, b"{}"))
    except ValueError:
        told = {}
    if isinstance(told, dict) and told.get("store", run.store.fingerprint()) != run.store.fingerprint():
        raise UsageError(
            f"{other.layout.location} goes by row numbers of another pool ({told.get('pool')}), or of an earlier "
            "state of this one; score it again"
        )


def _places(run: Run, other: EmbeddingStore, key: str | None) -> Rows:
    """Return which row of another store belongs to each of the view's, (n,), -1 where none does."""
    mine = run.store.layout.key
    if mine is not None:
        scratch = str(run.cache.folder / "joined")
        return positions(run.store.layout, mine, other.layout, str(key), scratch)[run.store.ids]
    if key is None:
        return run.store.ids
    rows = other.column(key)
    location = other.layout.location
    if rows.dtype.kind not in "iu" or (rows < 0).any() or (rows >= run.store.total).any():
        raise BadRowsError(f"{location}: {key!r} holds other numbers than the rows 0 to {run.store.total - 1:,}")
    if (twice := np.flatnonzero(np.bincount(rows.astype(np.int64)) > 1)).size:
        raise BadRowsError(f"{location}: the {key} {twice[0]:,} stands there more than once")
    places = np.full(run.store.total, -1, np.int64)
    places[rows] = np.arange(len(rows))
    return places[run.store.ids]


def _missing(run: Run, location: str, key: str | None, places: Rows) -> str:
    lost = np.flatnonzero(places < 0)
    row = run.store.ids[lost[:1]]
    first = next(run.store.lookup([run.store.layout.key], row)).column(0)[0].as_py() if run.store.layout.key else row[0]
    return f"{location} has no row for the {key} {first!s} ({len(lost):,} of {len(places):,} rows are missing)"
