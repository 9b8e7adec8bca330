"""The check before any method: keys that repeat or are unsafe as paths, vectors that are zero or not finite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from thresher.errors import BadRowsError
from thresher.io.columns import as_text
from thresher.io.open import trusting
from thresher.io.paths import PARENT
from thresher.ops.vectors import without_direction
from thresher.pool.layout import shown
from thresher.pool.store import Block, EmbeddingStore
from thresher.pruning.database import cursor
from thresher.pruning.run import Run
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.format import counted
from thresher.selection import Selection

_CODES = (
    "",
    "its image embedding is zero, NaN or infinite",
    "its text embedding is zero, NaN or infinite",
    "its key also belongs to an earlier row",
    "its key contains '..' as a part of a path",
    "its key is empty",
)
REPEATED, UNSAFE, EMPTY = 3, 4, 5
_STEP = 2**20  # rows whose hashes are compared at a time
BAD = ArraySpec("uint8", least=0, most=1)  # of a column that marks bad rows


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Refuse a pool with bad rows, or with ``skip_bad`` skip these rows.

    Keys are always checked. Vectors are checked when they are read; with ``skip_bad`` all of them are
    read here first, so that no step reads a bad one.
    """

    name: ClassVar[str] = "skip-bad"

    skip_bad: bool = False
    files_set_aside: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, store: EmbeddingStore) -> Audit:
        """Return the audit for a store, according to its options."""
        return cls(
            skip_bad=store.options.skip_bad,
            files_set_aside=[f"{aside.path}: {aside.why}" for aside in store.layout.skipped],
        )

    def select(self, run: Run) -> Selection:
        """Return the selection unchanged if no row is bad, else with one more step.

        Raises:
            BadRowsError: A key is bad and ``skip_bad`` is off; the message names the file, row and key.
        """
        codes = key_codes(run)
        if not self.skip_bad:
            bad = np.flatnonzero(codes)
            if len(bad):
                self._refuse(run, bad, codes)
            return run.so_far
        for part in run.store.layout.vectors:
            bad_n = run.column(f"check {part}", part, partial(_no_direction, part), {"bad": BAD})["bad"]
            wrong = (np.asarray(bad_n) > 0) & (codes == 0)
            codes[wrong] = _CODES.index(f"its {part} embedding is zero, NaN or infinite")
        if not codes.any() and not self.files_set_aside:
            return run.so_far
        notes = [f"skipped {file}" for file in self.files_set_aside]
        for code, reason in enumerate(_CODES):
            count = int(np.count_nonzero(codes == code))
            if code and count:
                rows = run.store.ids_at(np.flatnonzero(codes == code)[:5]).tolist()
                why = reason if count == 1 else reason.replace("its", "their", 1)
                listed = f"row {rows[0]}" if count == 1 else f"rows {', '.join(map(str, rows))}"
                notes.append(
                    f"skipped {counted(count, 'row')} because {why}: {listed}" + (", ..." if count > 5 else "")
                )
        return run.selection(self, codes == 0, reasons=_CODES, notes=notes, rows={"code": codes})

    def _refuse(self, run: Run, bad: npt.NDArray[np.int64], codes: npt.NDArray[np.uint8]) -> None:
        row_at = int(bad[0])
        row = int(run.store.ids_at(bad[:1])[0])
        key = shown(next(run.store.lookup([str(run.store.layout.key)], np.array([row]))).column(0), 400)[0]
        count = int(np.count_nonzero(codes == codes[row_at]))
        raise BadRowsError(
            f"{run.store.location_of('metadata', row)}: {_CODES[codes[row_at]].replace('its', 'the', 1)}: {key!r} "
            f"({counted(count, 'such row')} in the pool); "
            + (
                "fix the values, give skip_bad=True to skip such rows, or give other keys= ('row': row numbers)"
                if run.store.in_memory
                else "fix the file, pass --skip-bad to skip such rows, or give another --key (--key row: row numbers)"
            )
        )


def audited(selection: Selection) -> npt.NDArray[np.bool_]:
    """Return the rows that the audit at the start of a chain kept, (N,) bool: those that the steps can see."""
    bad = 0 if selection.steps and selection.steps[0].method == Audit.name else -2
    return np.asarray(selection.dropped_by != bad, np.bool_)


def key_codes(run: Run) -> npt.NDArray[np.uint8]:
    """Return a code per row of the view, (n,) uint8: 0 for a good key, else REPEATED, UNSAFE or EMPTY.

    64-bit hashes are compared first; keys are compared as text only where hashes are equal.
    """
    store = run.store
    if store.layout.key is None:
        return np.zeros(len(store), np.uint8)
    key, spec = run.key(_key_codes, column=store.layout.key), ArraySpec("uint8", (len(store),), most=EMPTY)
    made = run.cache.array("keys", key, lambda: _key_codes(run), spec)
    return np.array(made)


def _key_codes(run: Run) -> npt.NDArray[np.uint8]:
    import pyarrow.compute as pc

    store, name = run.store, str(run.store.layout.key)
    codes = np.zeros(len(store), np.uint8)
    hashes, ordered = run.cache.space(len(store), np.uint64), run.cache.space(len(store), np.uint64)
    done = 0
    with run.progress.task("check keys", len(store)) as advance:
        for text, hashed in _hashed(store, name):
            here = slice(done, done + len(text))
            hashes[here] = hashed
            unsafe = pc.match_substring_regex(text, PARENT)
            codes[here][np.asarray(unsafe.fill_null(False))] = UNSAFE
            codes[here][np.asarray(pc.equal(text, "").fill_null(True))] = EMPTY
            advance(len(text))
            done += len(text)
    ordered[:] = hashes
    ordered.sort()
    starts = range(0, len(store), _STEP)
    twice = [pair[1:][pair[1:] == pair[:-1]] for pair in (ordered[lo : lo + _STEP + 1] for lo in starts)]
    repeated = np.unique(np.concatenate([np.empty(0, np.uint64), *twice]))
    places = [lo + np.flatnonzero(np.isin(hashes[lo : lo + _STEP], repeated, kind="sort")) for lo in starts]
    suspects = np.concatenate([np.empty(0, np.int64), *places])
    suspects = suspects[codes[suspects] == 0]
    parts = store.lookup([name], store.ids_at(suspects))
    keys = [key for part in parts for key in store.layout.keys_in(part.column(0))]
    seen: set[str] = set()
    for position, key in zip(suspects, keys, strict=True):
        if key in seen:
            codes[position] = REPEATED
        seen.add(key)
    return codes


def _hashed(store: EmbeddingStore, name: str) -> Iterator[tuple[Any, npt.NDArray[np.uint64]]]:
    """Yield batches of keys as text, with a 64-bit hash of each key."""
    import pyarrow as pa

    with cursor() as db:
        for _, part in store.scan([name]):
            text = trusting(
                f"{store.layout.location} [{name}]", partial(as_text, part.column(0), store.layout.location, name)
            )
            db.register("part", pa.table({"k": text}))
            yield text, np.asarray(db.execute("SELECT hash(k) AS h FROM part").fetchnumpy()["h"], np.uint64)
            db.unregister("part")


def _no_direction(part: str, store: EmbeddingStore, block: Block) -> tuple[npt.NDArray[np.uint8]]:
    """Return 1 for rows of a block whose vector is zero or not finite, else 0."""
    return (without_direction(store.raw(part, block)).astype(np.uint8),)
