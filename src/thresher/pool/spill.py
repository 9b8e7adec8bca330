"""Vectors in another order, such as cluster by cluster, so that rows that are needed together are read in one piece.

Where single rows are slow to read, the vectors are written once more, by an external sort: every task reads a part of
the view once and writes its rows by their place in the order, a run; then every task merges what all runs have for a
part of the order. Memory is bounded by the size of a part, and every file is there as a whole or not at all, so a
killed spill continues with its first missing file.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from thresher.errors import OutputError, UnreachedError
from thresher.io.npy import NpyPiece
from thresher.io.pieces import Piece, stored_dtype
from thresher.io.places import located
from thresher.io.remote import in_parallel
from thresher.pool.layout import Layout, Options, Rows
from thresher.pool.store import Array, Block, EmbeddingStore
from thresher.runtime.checksums import Checksum, DamagedError, check, report_damage
from thresher.runtime.engine import Engine, check_files, nodes_of
from thresher.runtime.files import mapped_space, sync, writing
from thresher.runtime.format import size
from thresher.runtime.locks import LOCK, holding, remove_folder, remove_unused
from thresher.runtime.places import AnyPath, RemotePath, remove_tree, sizes_in
from thresher.runtime.progress import Progress, Silent

LARGE = 2**32  # bytes of vectors in local files from which on each row of a task is a page fault, of 64 KiB each
PART = 64 * 2**20  # bytes of a run, at least
SPAN = 256 * 2**10  # bytes that a part of the order has in each run, at least, so that they are read in few requests
_CHUNK = 8 * 2**20  # bytes that are copied at a time
_ROWS = 2**20  # rows of which places are computed at a time
_HINT = "choose another place with --scratch"


@dataclass(frozen=True, eq=False)
class Ordered:
    """Rows of a view in an order; in workers, a store and the positions in it are all that is needed.

    Attributes:
        store: Where the vectors are read.
        order_M: (M,) positions in the store, by place in the order; None if the store itself is in the order.
    """

    store: EmbeddingStore
    order_M: Rows | None = None

    def rows(self, lo: int, hi: int) -> Rows:
        """Return the positions in the store of the places lo to hi, (hi - lo,)."""
        return np.arange(lo, hi) if self.order_M is None else np.asarray(self.order_M[lo:hi])

    def at(self, places: Rows) -> Rows:
        """Return the positions in the store of some places, in the order given."""
        return places if self.order_M is None else np.asarray(self.order_M[places])


@dataclass(frozen=True)
class Spill:
    """Vectors of some rows of a view, to be written in another order.

    Attributes:
        store: The view.
        name: The field.
        order_M: (M,) positions in the view, each at most once, in the order to be written.
        folder: Where they are written.
        engine: Where the work runs.
        progress: Where progress is reported.
        part: Rows of a file; by default as many as make few and large reads.
    """

    store: EmbeddingStore
    name: str
    order_M: Rows
    folder: AnyPath
    engine: Engine
    progress: Progress = field(default_factory=Silent)
    part: int = 0

    @contextmanager
    def written(self) -> Iterator[EmbeddingStore]:
        """Yield a store whose row i is the row ``order_M[i]`` of the view.

        The files are removed at the end, also after an error. They stay if the process is killed or interrupted; the
        same spill then continues with them.

        Raises:
            OutputError: They cannot be written, or there is not enough space.
            UnreachedError: A node of a cluster does not see the folder.
        """
        with holding(self.folder / LOCK, f"the vectors in {self.folder}", say=self.progress.say) as held:
            try:
                yield self._written()
            except Exception:
                self._remove(held)
                raise
            self._remove(held)

    def fits(self) -> bool:
        """Return whether there is space for all files; say so if there is not."""
        free, there = self._free(), dict[str, int]()
        with suppress(OSError):  # another process may be removing it
            there = sizes_in(self.folder)
        missing = sum(self._part_of(name).missing(there) for name in self.store.parts(self.name))
        if free is None or missing <= free:
            return True
        self.progress.say(
            f"{self.name} vectors: read row by row, which is slower, because {size(missing)} in cluster order do not "
            f"fit in the {size(free)} that are free in {self.folder}; {_HINT}"
        )
        return False

    def discard(self) -> None:
        """Remove what a killed process left, unless it is in use."""
        if self.folder.is_dir():
            with suppress(OutputError), holding(self.folder / LOCK, str(self.folder), wait=False) as held:
                self._remove(held)

    def _remove(self, held: Callable[[], None]) -> None:
        try:
            held()
        except OutputError:  # another process took it over, and reads these files now
            return
        if isinstance(self.folder, RemotePath):
            remove_tree(self.folder)
        else:
            with suppress(OSError):
                remove_folder(self.folder)

    def _written(self) -> EmbeddingStore:
        if not isinstance(self.folder, RemotePath):
            try:
                check_files(self.engine, lambda: [("file", str(self.folder / LOCK))])
            except UnreachedError as error:
                raise UnreachedError(f"{error}; choose a folder that all nodes share with --scratch") from None
        parts = [self._part_of(name) for name in self.store.parts(self.name)]
        there = self._whole_files()
        missing = sum(part.missing(there) for part in parts)
        if missing:
            self._check_space(missing)
            if (total := sum(part.size for part in parts)) >= PART:  # of less, the lines of progress say enough
                self.progress.say(
                    f"{self.name} vectors: written once more in cluster order, to {self.folder} ({size(total)}); "
                    "removed at the end of the step"
                )
            places_n = self._places()
            for part in parts:
                if part.missing(there):
                    self._write(part, places_n, there)
        vectors = {part.name: part.pieces() for part in parts}
        return EmbeddingStore(Layout("npy", str(self.folder), vectors), Options(), block=self.store.block)

    def _whole_files(self) -> dict[str, int]:
        """Return the files that an interrupted spill left and their sizes, without those that are damaged."""
        there = sizes_in(self.folder)
        if isinstance(self.folder, RemotePath):  # object storage has checksums of its own
            return there
        for name in [name for name in there if name != LOCK]:
            if name.startswith("."):  # a killed process was writing it
                remove_unused(self.folder / name)
                continue
            try:
                with open(self.folder / name, "rb") as file:
                    check(file)
            except (OSError, DamagedError) as error:
                report_damage(self.folder / name, error)
                del there[name]
        return there

    def _places(self) -> Rows:
        """Return the place of each row of the view in the order, -1 if it has none, (n,)."""
        folder = None if isinstance(self.folder, RemotePath) else self.folder
        places_n = mapped_space(folder, len(self.store), np.int64)
        places_n[:] = -1
        for lo in range(0, len(self.order_M), _ROWS):
            some = np.asarray(self.order_M[lo : lo + _ROWS])
            places_n[some] = np.arange(lo, lo + len(some))
        return places_n

    def _part_of(self, name: str) -> _Field:
        first = self.store.layout.vectors[name][0]
        width = first.dim * stored_dtype(first.dtype).itemsize
        rows = self.part or rows_of_part(len(self.order_M), width, self.store.block)
        return _Field(name, first.dim, first.dtype, len(self.order_M), -(-len(self.store) // rows), rows, self.folder)

    def _free(self) -> int | None:
        """Return the bytes that are free where it is written, None in object storage."""
        if isinstance(self.folder, RemotePath):
            return None
        there = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
        return shutil.disk_usage(there).free

    def _check_space(self, missing: int) -> None:
        free = self._free()
        if free is not None and missing > free:
            raise OutputError(
                f"{self.folder}: cannot be written (vectors in cluster order take {size(missing)}, {size(free)} are "
                f"free); free some space, or {_HINT}"
            )

    def _write(self, part: _Field, places_n: Rows, there: Mapping[str, int]) -> None:
        starts_RB = _starts(places_n, part)
        totals = starts_RB[:, -1].tolist()
        left = {i for i, rows in enumerate(totals) if there.get(part.run(i)) != part.length(rows)}
        with self.progress.task(f"{part.name} vectors in cluster order", len(self.store)) as advance:
            advance(sum(min(part.rows, len(self.store) - i * part.rows) for i in range(part.runs) if i not in left))
            first, ahead = min(left, default=part.runs), nodes_of(self.engine) == 1
            blocks = self.store.blocks(part.name, first * part.rows, part.rows, ahead=ahead) if left else ()
            tasks = (
                (i, block, np.array(places_n[block.lo : block.hi]))
                for i, block in enumerate(blocks, first)
                if i in left
            )
            for read in self.engine.map(partial(_sort, self.store, part), tasks):
                advance(read)
        if part.runs == 1:
            return
        missing = [i for i in range(part.files) if there.get(part.file(i)) != part.length(part.rows_of(i))]
        with self.progress.task(f"{part.name} vectors: merge", part.total) as advance:
            advance(part.total - sum(part.rows_of(i) for i in missing))
            merges = (
                (
                    i,
                    (np.asarray(self.order_M[i * part.rows : (i + 1) * part.rows]) // part.rows).astype(np.int32),
                    starts_RB[:, i : i + 2],
                )
                for i in missing
            )
            for merged in self.engine.map(partial(_merge, part, totals), merges):
                advance(merged)
        for i in range(part.runs):
            (self.folder / part.run(i)).unlink(missing_ok=True)


def is_consecutive(order_M: Rows) -> bool:
    """Return whether an order is that of the rows, without gaps."""
    for lo in range(0, len(order_M), _ROWS):
        some = order_M[lo : lo + _ROWS]
        if not np.array_equal(some, np.arange(int(order_M[0]) + lo, int(order_M[0]) + lo + len(some))):
            return False
    return True


def is_large(store: EmbeddingStore, name: str, rows: int) -> bool:
    """Return whether so many rows of a field are faster to read if they are written in order first."""
    return rows * (store.stored_bytes(name) // max(len(store), 1)) >= LARGE


def rows_of_part(rows: int, width: int, block: int) -> int:
    """Return the rows of a file: few and large reads of all runs, in little memory.

    Args:
        rows: Number of rows to write.
        width: Bytes of a row.
        block: Rows of a block, of which a part has a whole number.
    """
    most = max(PART, math.isqrt(rows * width * SPAN))
    return max(most // width // block, 1) * block


@dataclass(frozen=True)
class _Field:
    """The files of one stored field.

    Attributes:
        name: The field.
        dim: D.
        dtype: Type of the stored values.
        total: M, number of rows in the order.
        runs: Number of runs; with one run it is the only file.
        rows: Rows of a file, and of the part of the view that a run is made of.
        folder: Where the files are.
    """

    name: str
    dim: int
    dtype: str
    total: int
    runs: int
    rows: int
    folder: AnyPath

    @property
    def files(self) -> int:
        """Number of files in the order."""
        return 1 if self.runs == 1 else -(-self.total // self.rows)

    @property
    def size(self) -> int:
        """Size of all vectors."""
        return self.total * self.dim * stored_dtype(self.dtype).itemsize

    def rows_of(self, i: int) -> int:
        """Return the rows of a file."""
        return self.total if self.runs == 1 else min(self.rows, self.total - i * self.rows)

    def run(self, i: int) -> str:
        """Return the name of a run."""
        return self.file(i) if self.runs == 1 else f"{self.name}-run-{i:05}.npy"

    def file(self, i: int) -> str:
        """Return the name of a file."""
        return f"{self.name}-{i:05}.npy"

    def header(self, rows: int) -> bytes:
        """Return the header of a file."""
        header = io.BytesIO()
        about = {"descr": stored_dtype(self.dtype).str, "fortran_order": False, "shape": (rows, self.dim)}
        np.lib.format.write_array_header_1_0(header, about)
        return header.getvalue()

    def length(self, rows: int) -> int:
        """Return the length of a file in bytes."""
        vectors = rows * self.dim * stored_dtype(self.dtype).itemsize
        return len(self.header(rows)) + vectors + len(Checksum().trailer())

    def missing(self, there: Mapping[str, int]) -> int:
        """Return the bytes to write, 0 if all files are there."""
        if all(there.get(self.file(i)) == self.length(self.rows_of(i)) for i in range(self.files)):
            return 0
        done = sum(length for name, length in there.items() if name.startswith(f"{self.name}-"))
        return max(self.size * (1 if self.runs == 1 else 2) - done, 1)

    def piece(self, name: str, rows: int) -> NpyPiece:
        """Return the rows of a file, without reading its header."""
        protocol, path = located(str(self.folder / name))
        return NpyPiece(path, rows, self.dim, self.dtype, len(self.header(rows)), protocol)

    def pieces(self) -> tuple[Piece, ...]:
        """Return all rows, in the order."""
        return tuple(self.piece(self.file(i), self.rows_of(i)) for i in range(self.files))


def _starts(places_n: Rows, part: _Field) -> Rows:
    """Return where the rows of each file begin and end in each run, (R, B + 1)."""
    starts_RB = np.zeros((part.runs, part.files + 1), np.int64)
    for i in range(part.runs):
        places = np.asarray(places_n[i * part.rows : (i + 1) * part.rows])
        of_file = np.minimum(places[places >= 0] // part.rows, part.files - 1)  # of a single run, all are in one
        starts_RB[i, 1:] = np.cumsum(np.bincount(of_file, minlength=part.files))
    return starts_RB


def _sort(store: EmbeddingStore, part: _Field, task: tuple[int, Block, Rows]) -> int:
    """Write the rows of a part of the view by their places: a run; return how many were read."""
    number, block, places_B = task
    raw = store.raw(part.name, block)
    needed = np.flatnonzero(places_B >= 0)
    _save(part, part.run(number), raw, needed[np.argsort(places_B[needed])])
    return len(block)


def _merge(part: _Field, totals: list[int], task: tuple[int, Array, Rows]) -> int:
    """Write one file, from what all runs have for it; return its rows."""
    number, run_M, spans_R2 = task
    vectors = np.empty((len(run_M), part.dim), stored_dtype(part.dtype))
    by_run = np.argsort(run_M, kind="stable")  # a run has its rows by place, too
    counts_R = spans_R2[:, 1] - spans_R2[:, 0]
    ends_R = np.cumsum(counts_R)
    some = [i for i, count in enumerate(counts_R.tolist()) if count]

    def span(i: int) -> Array:
        return part.piece(part.run(i), totals[i]).read(*spans_R2[i].tolist())

    protocol, _ = located(str(part.folder))
    for i, rows in zip(some, in_parallel(protocol, span, some), strict=True):
        vectors[by_run[ends_R[i] - counts_R[i] : ends_R[i]]] = rows
    _save(part, part.file(number), vectors, None)
    return len(vectors)


def _save(part: _Field, name: str, vectors: Array, order: Rows | None) -> None:
    """Write some rows of an array, in an order, without a copy of all of them."""
    count = len(vectors) if order is None else len(order)
    step = max(_CHUNK // (part.dim * vectors.itemsize), 1)
    with writing(part.folder / name, _HINT) as scratch, open(scratch, "wb") as file:
        sums = Checksum()

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            sums.update(data)

        put(part.header(count))
        for lo in range(0, count, step):
            some = slice(lo, lo + step)
            rows = np.ascontiguousarray(vectors[some] if order is None else vectors[order[some]])
            put(rows.reshape(-1).view(np.uint8).data)
        file.write(sums.trailer())
        sync(file)
