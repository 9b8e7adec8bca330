"""What is looked at: a pool, one to five selections of it, or training runs; opened once.

Arrays of selections are memory-mapped. Of the pool, captions, keys and images are read when they are shown; columns of
numbers are held once they are asked for, at most a few of them.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from thresher.dynamic.run_folder import Training, is_run
from thresher.errors import PoolError, ThresherError, UsageError
from thresher.io.paths import relative
from thresher.pool.store import EmbeddingStore, heavy, open_store, reopen
from thresher.pruning.recut import Recut
from thresher.report.compare import clusters_of
from thresher.report.facts import plain
from thresher.runtime.cache import Cache
from thresher.runtime.places import expanded, local_path
from thresher.selection import Selection

Array = npt.NDArray[Any]
T = TypeVar("T")

MOVED = ("keep", "eps", "threshold", "temperature", "reference_eps")  # parameters that only cut
MOST = 5  # selections side by side
_VALUES = 24  # different values of a column of texts that have a colour and a place in lists
_LONGEST = 200  # characters of a value of a column


class Kept:
    """The last results of a function, by what they were made from; safe for several threads."""

    def __init__(self, most: int) -> None:
        """Keep at most this many."""
        self._most, self._lock = most, threading.Lock()
        self._held: OrderedDict[Hashable, Any] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}

    @property
    def is_making(self) -> bool:
        """Whether a result is being made now."""
        return bool(self._making)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result for a key; several threads that ask for the same one wait for the first."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return cast(T, self._held[key])
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._held:
                    return cast(T, self._held[key])
            try:
                made = make()
            except BaseException:
                with self._lock:
                    self._making.pop(key, None)
                raise
            with self._lock:  # at once: a thread that comes in between would make it again
                self._making.pop(key, None)
                self._held[key] = made
                while len(self._held) > self._most:
                    self._held.popitem(last=False)
            return made


@dataclass(frozen=True)
class Cut:
    """Another value of one parameter of a selection's last step.

    Attributes:
        name: One of :data:`MOVED`; others could name files.
        value: The value, as on the command line.

    Raises:
        UsageError: It is another parameter.
    """

    name: str
    value: str

    def __post_init__(self) -> None:
        """Check the name."""
        if self.name not in MOVED:
            raise UsageError(f"cut: {plain(self.name, 40)!r} is not one of {', '.join(MOVED)}")

    @property
    def changes(self) -> dict[str, Any]:
        """The parameter for :meth:`thresher.Selection.recut`.

        Raises:
            UsageError: The value is not a number, although the parameter is.
        """
        if self.name == "keep":
            return {"keep": self.value}
        try:
            return {self.name: float(self.value)}
        except ValueError:
            raise UsageError(f"{self.name} = {plain(self.value, 40)!r}: give a number") from None


@dataclass(frozen=True)
class Column:
    """A metadata column that can be looked at: "number", "text" or "flag"."""

    name: str
    kind: str


@dataclass(frozen=True, eq=False)
class Values:
    """The values of a column of texts, the most frequent first.

    Attributes:
        names: At most 24 values.
        codes_N: (N,) uint8, number of the value of each row; the number of names for any other value.
        more: How many other values there are.
    """

    names: tuple[str, ...]
    codes_N: npt.NDArray[np.uint8]
    more: int


@dataclass(frozen=True, eq=False)
class Named:
    """A selection with a name that no other one has."""

    name: str
    path: str
    selection: Selection


@dataclass(frozen=True, eq=False)
class NamedRun:
    """A training run, and the number of its pool among those of the subject; None with a reason if it is not open."""

    name: str
    training: Training
    source: int | None
    why: str = ""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is looked at.

    Attributes:
        stores: The pools, without vectors in memory. The first one is that of the selections.
        selections: At most five, of the first pool.
        runs: Training runs.
        cache: Where recorded scores and clusters are, and where layouts of maps are kept.
        out: The folder below which selections may be saved; None for nowhere.
    """

    stores: tuple[EmbeddingStore, ...]
    selections: tuple[Named, ...] = ()
    runs: tuple[NamedRun, ...] = ()
    cache: Cache = field(default_factory=Cache.at)
    out: Path | None = None
    kept: Kept = field(default_factory=lambda: Kept(24), repr=False)
    cuts: Kept = field(default_factory=lambda: Kept(3), repr=False)

    @property
    def title(self) -> str:
        """What to write at the top of the page."""
        if self.selections:
            return plain(" \N{MULTIPLICATION SIGN} ".join(one.name for one in self.selections), 80)
        if self.runs:
            return plain(", ".join(one.name for one in self.runs), 80)
        return plain(os.path.basename(self.stores[0].layout.location.rstrip("/")), 80)

    def store(self, source: int = 0) -> EmbeddingStore:
        """Return a pool by its number.

        Raises:
            UsageError: There is no such pool.
        """
        if not 0 <= source < len(self.stores):
            raise UsageError(f"pool {source}: there are {len(self.stores)}")
        return self.stores[source]

    def selection(self, number: int, cut: Cut | None = None) -> Selection:
        """Return a selection, with another cut of its last step if one is given.

        Raises:
            UsageError: There is no such selection, or the cut needs more than what is cached.
        """
        if not 0 <= number < len(self.selections):
            raise UsageError(f"selection {number}: there are {len(self.selections)}")
        selection = self.selections[number].selection
        if cut is None:
            return selection
        if not selection.steps:
            raise UsageError("this selection has no step that could be cut")
        prepared = self.kept.get(("recut", number), lambda: Recut.of(selection, self.cache))
        return self.cuts.get((number, cut), lambda: prepared.cut(cut.changes))

    def labels(self, number: int, step: int | None = None) -> Array | None:
        """Return the cluster of every row, (N,) int32, -1 for none; None if there are no clusters.

        Args:
            number: The selection; other cuts of it have the same clusters.
            step: The step that clustered (default: the one that clustered the most rows).

        Raises:
            UsageError: This step has no clusters.
        """
        selection = self.selection(number)
        if step is None:
            return self.kept.get(("labels", number), lambda: clusters_of([selection]))
        if not 0 <= step < len(selection.steps) or "cluster" not in selection.steps[step].rows:
            raise UsageError(f"step {step + 1} has no clusters")

        def made() -> Array:
            labels = np.full(selection.total, -1, np.int32)
            labels[selection.given(step)] = selection.steps[step].rows["cluster"]
            return labels

        return self.kept.get(("labels", number, step), made)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of the first pool that can be looked at, without keys, captions, images and vectors."""
        return self.kept.get("columns", self._columns) if self.stores else ()

    def _columns(self) -> tuple[Column, ...]:
        import pyarrow as pa

        store, found = self.stores[0], []
        layout = store.layout
        for name in store.columns:
            if name in (layout.key, layout.caption, layout.image) or heavy(store, name):
                continue
            table = next(part for part in layout.table_parts if name in part.columns)
            kind = table.schema([name]).field(0).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if pa.types.is_boolean(kind):
                found.append(Column(name, "flag"))
            elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
                found.append(Column(name, "number"))
            elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
                found.append(Column(name, "text"))
        return tuple(found)

    def column(self, name: str) -> Column:
        """Return a column by name.

        Raises:
            UsageError: There is no such column.
        """
        for one in self.columns:
            if one.name == name:
                return one
        raise UsageError(f"{plain(name, 60)!r}: there is no such column")

    def numbers(self, name: str) -> Array:
        """Return a column of numbers or flags, (N,), exactly: see :meth:`thresher.EmbeddingStore.column`."""
        self.column(name)
        return self.kept.get(("numbers", name), lambda: self.stores[0].column(name))

    def values(self, name: str) -> Values:
        """Return a column of texts by its most frequent values."""
        self.column(name)
        return self.kept.get(("values", name), lambda: _values(self.stores[0], name))

    def scores(self, number: int, cut: Cut | None, step: int) -> npt.NDArray[np.float32]:
        """Return the scores of a step for every row of the pool, (N,) float32, NaN where the step has none.

        Raises:
            UsageError: There is no such step, or it has no scores.
        """
        selection = self.selection(number, cut)
        if not 0 <= step < len(selection.steps) or "score" not in selection.steps[step].rows:
            raise UsageError(f"step {step + 1} has no scores")

        def made() -> npt.NDArray[np.float32]:
            evidence = selection.steps[step].rows
            scores = np.asarray(evidence["score"])
            if len(scores) == selection.total and scores.dtype == np.float32 and "duplicate_of" not in evidence:
                return scores
            full = np.full(selection.total, np.nan, np.float32)
            with np.errstate(over="ignore"):
                full[selection.given(step)] = scores
            if "duplicate_of" in evidence:
                full[full <= -1] = np.nan  # a row that no other one was compared with
            return full

        # Only the last step differs between cuts, and its scores do not.
        return self.kept.get(("scores", number, step), made)


def _values(store: EmbeddingStore, name: str) -> Values:
    import pyarrow as pa
    import pyarrow.compute as pc

    def text(part: Any) -> Any:
        cells = part.column(0)
        cells = cells.dictionary_decode() if pa.types.is_dictionary(cells.type) else cells
        return pc.utf8_slice_codeunits(cells.fill_null(""), 0, _LONGEST)

    counts: dict[str, int] = {}
    for _, part in store.scan([name]):
        for entry in text(part).value_counts().to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
        if len(counts) > 100_000:  # such as URLs: nothing to colour by
            break
    names = sorted(counts, key=lambda value: (-counts[value], value))[:_VALUES]
    codes = np.full(store.total, len(names), np.uint8)
    known = pa.array(names, pa.large_string())
    for ids, part in store.scan([name]):
        at = pc.index_in(text(part).cast(pa.large_string()), known).fill_null(len(names))
        codes[ids] = at.to_numpy(zero_copy_only=False)
    return Values(tuple(names), codes, max(len(counts) - len(names), 0))


# --- opening --------------------------------------------------------------------------------------


def opened(
    what: Sequence[Any],
    *,
    pool: str | None = None,
    metadata: str | None = None,
    cache: Cache | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Subject:
    """Open what is to be looked at.

    Args:
        what: Paths of selection folders, folders of training runs or one pool; or objects of these kinds.
        pool: New location of the pool of the selections or runs, if it was moved.
        metadata: New location of joined metadata, if it was moved.
        cache: The cache.
        out: The folder below which selections may be saved (default: where the first selection is).

    Raises:
        UsageError: More than five selections, selections of different pools, or a pool together with something else.
        PoolError: Something cannot be opened.
    """
    pools: list[Any] = []
    selections: list[tuple[str, Selection]] = []
    trainings: list[Training] = []
    for one in what:
        if isinstance(one, Selection):
            selections.append(("", one))
        elif isinstance(one, Training):
            trainings.append(one)
        elif isinstance(one, EmbeddingStore):
            pools.append(one)
        elif isinstance(one, (str, os.PathLike)):
            path = expanded(one)
            if (Path(path) / "selection.json").exists():
                selections.append((path, Selection.load(path)))
            elif is_run(path):
                trainings.append(Training.load(path))
            else:
                pools.append(path)
        else:
            raise UsageError(f"cannot show {type(one).__name__}; give a selection, a training run or a pool")
    if not (pools or selections or trainings):
        raise UsageError("nothing to show; give a selection folder, the folder of a training run, or a pool")
    if pools and (len(pools) > 1 or selections or trainings):
        raise UsageError(
            f"{_name(pools[0])}: a pool is shown alone; give selections or runs without it, and --pool if it was moved"
        )
    if len(selections) > MOST:
        raise UsageError(f"{len(selections)} selections: at most {MOST} can be compared")
    paths = [os.path.realpath(path) for path, _ in selections if path]
    if len(set(paths)) != len(paths):
        raise UsageError("a selection is given twice")
    cache = cache or Cache.at()
    scratch = str(cache.folder)
    stores: list[EmbeddingStore] = []
    named: list[Named] = []
    if pools:
        store = pools[0] if isinstance(pools[0], EmbeddingStore) else open_store(pools[0], scratch=scratch)
        stores.append(store)
    if selections:
        first = selections[0][1]
        for _, other in selections[1:]:
            first.same_store(other)
        stores.append(reopen(first, pool, metadata))
        names = _names([path for path, _ in selections])
        for (path, selection), name in zip(selections, names, strict=True):
            named.append(Named(name, path, selection.with_pool(stores[0])))
    runs = _with_pools(trainings, pool, stores)
    if out is None:
        out = next((Path(path).absolute().parent for path, _ in selections if path), None)
    return Subject(tuple(stores), tuple(named), runs, cache, None if out is None else local_path(out))


def _with_pools(trainings: Sequence[Training], pool: str | None, stores: list[EmbeddingStore]) -> tuple[NamedRun, ...]:
    """Open the pool of each run, each pool once; a run is also shown if its pool is gone."""
    runs = []
    for training, name in zip(trainings, _names([str(one.folder) for one in trainings]), strict=True):
        source = next((i for i, store in enumerate(stores) if store.fingerprint() == training.store), None)
        why = ""
        if source is None:
            try:
                stores.append(training.open_pool(pool))
                source = len(stores) - 1
            except (ThresherError, OSError) as error:
                if pool is not None:
                    raise
                why = plain(error, 300)
        elif stores[source].total != training.rows:
            raise PoolError(f"{training.folder}: was trained on another number of rows than its pool has")
        runs.append(NamedRun(name, training, source, why))
    return tuple(runs)


def _names(paths: Sequence[str]) -> list[str]:
    """Return short names that differ: the last parts of the paths, with as many folders as it takes."""
    parts = [Path(os.path.abspath(path)).parts if path else () for path in paths]
    for depth in (1, 2, 3):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names) and all(names):
            return [plain(name, 60) for name in names]
    return [f"{i}. {plain(relative(path), 60)}".rstrip(". ") for i, path in enumerate(paths, 1)]


def _name(pool: Any) -> str:
    return pool.layout.location if isinstance(pool, EmbeddingStore) else str(pool)
