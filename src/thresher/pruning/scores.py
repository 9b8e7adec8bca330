"""Scores: one number per row, computed or stored, that a budget or a threshold cuts."""

from __future__ import annotations

import os
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt

from thresher.errors import BadRowsError, UsageError, suggest
from thresher.io.key_forms import unlike
from thresher.io.parquet import parquet_metadata
from thresher.io.paths import typed
from thresher.io.sql import is_sql
from thresher.io.tables import TABLES
from thresher.ops.cut import top
from thresher.pool.join import first_keys, positions
from thresher.pool.layout import Options, Rows
from thresher.pool.store import EmbeddingStore, missing, open_store, open_table
from thresher.pruning.registry import METHODS, build
from thresher.pruning.run import Run
from thresher.runtime.format import counted
from thresher.runtime.parameters import is_required, parameters_of
from thresher.runtime.places import expanded
from thresher.runtime.template import RoundedFloat
from thresher.runtime.untrusted import parse_json
from thresher.selection import Budget, Keep, Selection

Array = npt.NDArray[Any]

MARK = b"thresher"  # metadata key of a parquet file of scores that holds how they were made
_FILE = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, TABLES))}))(?::(.+))?", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Score:
    """One number for every row of a view; higher is better.

    Attributes:
        values_N: (n,) numbers without NaN.
        notes: Where the numbers come from.
    """

    values_N: Array
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scored(ABC):
    """Parameters of every method that scores rows and cuts by the score.

    A scoring method has ``meaning``, the name of its score in words, and ``score(run) -> Score``. Its parameters
    ``keep`` and ``threshold`` only cut, and do not change the score.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]

    keep: Budget | None = field(default=None, metadata={"help": "share or number of rows to keep"})
    threshold: float | None = field(default=None, metadata={"help": "keep rows with at least this score"})

    def __post_init__(self) -> None:
        """Validate the parameters: exactly one of ``keep`` and ``threshold``."""
        if (self.keep is None) == (self.threshold is None):
            both = ", not both" if self.keep is not None else ""
            raise UsageError(f"{self.name} needs either keep (such as 30%) or threshold (such as 0.28){both}")

    @property
    def by_rows(self) -> bool:
        """Whether the score of a row does not depend on the other rows, so that jobs can share them."""
        return False

    @abstractmethod
    def score(self, run: Run) -> Score:
        """Return the score of every row."""

    def select(self, run: Run) -> Selection:
        """Cut by the score; if scores are equal at the budget, lower row ids are kept."""
        scored = self.score(run)
        scores = scored.values_N
        if self.keep is not None:
            mask = top(scores, Keep.parse(self.keep).of(len(scores)))
            least = float(scores[mask].min())
            if not np.isfinite(least):
                raise UsageError(f"keep = {self.keep}: would keep rows whose {self.meaning} is {least}; keep fewer")
            cut: float | None = least
            reason = f"{self.meaning} {{score:.4f}} is below the cut at {{cut:.4f}}"
        else:
            mask, cut = scores >= self.threshold, self.threshold
            if not mask.any() and len(scores):
                raise UsageError(
                    f"threshold = {self.threshold}: no row reaches it; scores range from "
                    f"{RoundedFloat(scores.min()):.4f} to {RoundedFloat(scores.max()):.4f}"
                )
            reason = f"{self.meaning} {{score:.4f}} is below the threshold {{cut}}"
        return run.selection(
            self,
            mask,
            reasons=(reason,),
            score=self.meaning,
            cut=cut,
            notes=scored.notes,
            rows={"score": np.asarray(scores, np.float32)},
        )


CUTS = tuple(item.name for item in fields(Scored))  # parameters that only cut, and do not change a score


def scoring_methods() -> dict[str, type[Scored]]:
    """Return the scoring methods, by name."""
    return {name: cls for name, cls in METHODS.all().items() if issubclass(cls, Scored)}


def scorer(name: str, parameters: Mapping[str, Any] | None = None) -> Scored:
    """Make a scoring method from plain values, to compute scores without dropping rows.

    Raises:
        UsageError: There is no scoring method with this name, or it does not take these parameters.
    """
    known = scoring_methods()
    if name not in known:
        raise UsageError(
            f"{name!r} is not a scoring method; the scoring methods: {', '.join(known)}.{suggest(name, known)}"
        )
    return cast(Scored, build(name, {**(parameters or {}), "keep": "100%"}))


def by_rows(source: str) -> bool:
    """Return whether the scores of a source, as :func:`column` takes it, are surely those of each row by itself."""
    return source in ("clip-score", "embeddings") or source not in scoring_methods()


def column(run: Run, source: str, parameter: str, *, finite: bool = False) -> Score:
    """Return a column of scores from the pool, a scoring method or a file.

    Args:
        run: The run whose rows are scored.
        source: A metadata column of the pool; else the name of a scoring method, which is then computed with
            its defaults; else a table, ``file.parquet``, ``file.csv`` or such, or ``file.parquet:column``, joined by
            key; see :data:`thresher.io.tables.TABLES`; or SQL, see :mod:`thresher.io.sql`.
        parameter: Name of the parameter that holds ``source``, for messages.
        finite: Refuse infinite numbers.

    Raises:
        UsageError: There is no such column; the message lists what there is.
        BadRowsError: Some rows have no number; the message names the first.
    """
    known = scoring_methods()
    if source in run.store.columns:
        result = _stored(run, source)
    elif source in known:
        if needs := [item.name for item in parameters_of(known[source]) if is_required(item)]:
            raise UsageError(
                f"{parameter}: {source} needs {', '.join(needs)}; compute it with 'thresher score {source} ...' and "
                "use that file"
            )
        made = scorer(source).score(run)
        result = Score(made.values_N, tuple(f"{source}: {note}" for note in made.notes))
    elif is_sql(source):
        result = _from_file(run, source, None, parameter)
    elif file := _FILE.fullmatch(source):
        result = _from_file(run, file[1], file[2], parameter)
    elif os.path.isfile(source):
        raise UsageError(
            f"{parameter} = {source!r}: scores are read from tables ({', '.join(TABLES)}); convert this file"
        )
    else:
        raise UsageError(
            f"{parameter} = {source!r}: there is no such column; use a column of {run.store.layout.location} ("
            f"{', '.join(run.store.columns) or 'none'}), a method ({', '.join(known)}) or a file (scores.parquet or "
            f"scores.parquet:column).{suggest(source, [*run.store.columns, *known])}"
        )
    if finite and result.values_N.dtype.kind == "f" and np.isinf(result.values_N).any():
        row = int(run.store.ids[np.flatnonzero(np.isinf(result.values_N))[0]])
        raise BadRowsError(f"{parameter}: {source} is infinite in row {row:,} of the pool; filter such rows out first")
    return result


def clip_scores(run: Run, source: str, parameter: str) -> Score:
    """Return a column as :func:`column` does, or the CLIP scores of another pool of the same rows.

    Args:
        run: The run whose rows are scored.
        source: As for :func:`column`, or the folder of a pool, such as one embedded by another model. Rows are
            matched by key, or by number if neither pool has keys.
        parameter: Name of the parameter that holds ``source``, for messages.

    Raises:
        UsageError: The other pool does not have the same rows, or as for :func:`column`.
        BadRowsError: As for :func:`column`.
    """
    named = source in run.store.columns or source in scoring_methods() or is_sql(source) or _FILE.fullmatch(source)
    if named or not (os.path.isdir(source) or "://" in source):
        return column(run, source, parameter, finite=True)
    mine, options = run.store, run.store.options
    other = open_store(source, Options(key=options.key, dtype=options.dtype), scratch=str(run.cache.folder))
    if other.total != mine.total:
        raise UsageError(
            f"{parameter}: {source} has {other.total:,} rows and {mine.layout.location} {mine.total:,}; give a pool "
            "with the same rows"
        )
    key = mine.layout.key if mine.layout.key in other.columns else other.layout.key
    if (key is None) != (mine.layout.key is None):
        keyed, bare = (mine.layout.location, source) if key is None else (source, mine.layout.location)
        raise UsageError(
            f"{parameter}: {keyed} has keys and {bare} has none, so their rows cannot be matched; if both have "
            "the same order, pass --key row"
        )
    places = _places(run, other, key)
    if (places < 0).any():
        raise UsageError(f"{parameter}: {_missing(run, source, other, key, places)}; give a pool with the same rows")
    mask = np.zeros(other.total, np.bool_)
    mask[places] = True
    view = other.where(mask)
    start = Selection.everything("", source, {}, other.total)
    made = scorer("clip-score").score(Run(view, start, run.engine, run.cache, run.seed, run.progress))
    return Score(made.values_N[np.searchsorted(view.ids, places)], tuple(f"{source}: {note}" for note in made.notes))


def _stored(run: Run, name: str) -> Score:
    values = run.store.column(name)
    if len(empty := missing(values)):
        row = int(run.store.ids[empty[0]])
        raise BadRowsError(
            f"{run.store.location_of('metadata', row)}: the score column {name!r} is empty or NaN "
            f"({counted(len(empty), 'such row')}); filter them out first with where = {_has_number(name)!r}"
        )
    return Score(values, (f"taken from the column {name}",))


def _has_number(name: str) -> str:
    """Return the condition of a filter that only rows with a number pass."""
    quoted = name.replace('"', '""')
    return f'NOT isnan("{quoted}")'


def _from_file(run: Run, location: str, name: str | None, parameter: str) -> Score:
    import pyarrow as pa

    location = expanded(location)
    if "://" not in location and not is_sql(location) and not os.path.isfile(location):
        raise UsageError(f"{parameter}: {location}: no such file; 'thresher score' writes one")
    mine = run.store.layout.key
    other = open_table(location, mine, str(run.cache.folder))
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
        types = ", ".join(f"{field.name} ({field.type})" for field in kinds)
        raise UsageError(f"{parameter}: {location} has no column of numbers except keys; it has {types}")
    if name is None and len(numbers) > 1:
        one = f"SELECT {key}, {numbers[0]}" if is_sql(location) else f"{location}:{numbers[0]}"
        raise UsageError(f"{parameter}: {location} has {', '.join(numbers)}; choose one, as in {one}")
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
            f"{parameter}: {_missing(run, location, other, key, places)}; "
            + (
                "are these scores of another pool?"
                if (places < 0).all()
                else "score all rows, or use only rows with a score: pass a selection of them as --within"
            )
        )
    values = other.column(name)[places]
    if len(empty := missing(values)):
        raise BadRowsError(
            f"{other.location_of('metadata', int(places[empty[0]]))}: {name!r} is empty or NaN "
            f"({counted(len(empty), 'such row')}); to use only the others, pass --within the result of thresher select "
            f"filter --metadata {typed(str(location))} --where {shlex.quote(_has_number(name))}"
        )
    return Score(values, (f"{name} taken from {location} by {key}",))


def _same_store(run: Run, other: EmbeddingStore) -> None:
    """Refuse row numbers of another pool, if the file says which pool it was made from."""
    protocol, path = other.files()[0]
    if not path.lower().endswith((".parquet", ".pq")):
        return
    try:
        info = parse_json(parquet_metadata(protocol, path).get(MARK, b"{}"))
    except ValueError:
        info = {}
    if isinstance(info, dict) and info.get("store", run.store.fingerprint()) != run.store.fingerprint():
        raise UsageError(
            f"{other.layout.location} uses row numbers of another pool ({info.get('pool')}), or of an earlier "
            "state of this one; compute the scores again"
        )


def _places(run: Run, other: EmbeddingStore, key: str | None) -> Rows:
    """Return the row of another store that matches each row of the view, (n,), -1 if there is none."""
    mine = run.store.layout.key
    if mine is not None:
        scratch = str(run.cache.folder / "joined")
        return positions(run.store.layout, mine, other.layout, str(key), scratch)[run.store.ids]
    if key is None:
        return run.store.ids
    rows = other.column(key)
    location = other.layout.location
    if rows.dtype.kind not in "iu" or (rows < 0).any() or (rows >= run.store.total).any():
        raise BadRowsError(f"{location}: {key!r} must hold row numbers from 0 to {run.store.total - 1:,}")
    if (twice := np.flatnonzero(np.bincount(rows.astype(np.int64)) > 1)).size:
        raise BadRowsError(f"{location}: the {key} {twice[0]:,} appears more than once")
    places = np.full(run.store.total, -1, np.int64)
    places[rows] = np.arange(len(rows))
    return places[run.store.ids]


def _missing(run: Run, location: str, other: EmbeddingStore, key: str | None, places: Rows) -> str:
    lost, mine = np.flatnonzero(places < 0), run.store.layout.key
    row = run.store.ids[lost[:1]]
    first = next(run.store.lookup([mine], row)).column(0)[0].as_py() if mine else row[0]
    text = f"{location} has no row for the {key} {first!s} ({len(lost):,} of {len(places):,} rows are missing)"
    if mine is None or len(lost) < len(places):
        return text
    ours, theirs = first_keys(run.store.layout, mine), first_keys(other.layout, str(key))
    return f"{text}: {unlike('the pool', ours, 'the file', theirs)}"
