"""Duplicates by hash: rows whose hash repeats that of a kept row, exactly or within a few bits. Needs no embeddings.

Rows are ordered by the column ``prefer``, highest first, else by id. A row is dropped if a kept row before it has the
same hash, or for perceptual hashes one that differs in at most ``distance`` bits. Only kept rows count, so that every
dropped row has a kept representative, and a chain of similar images does not join its ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import BadRowsError, UsageError
from thresher.ops.hamming import MOST, first_kept_within
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.pruning.scores import column
from thresher.runtime.format import counted
from thresher.runtime.untrusted import cut
from thresher.selection import Selection

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

COLUMNS = {
    "sha256": ("sha256", "sha512", "md5", "image_sha256", "hash"),
    "phash": ("phash", "p_hash", "image_phash", "perceptual_hash", "dhash", "ahash", "whash"),
}


@method("dedup")
@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Drop rows whose hash repeats that of another row, exactly or within a few bits."""

    name: ClassVar[str]
    example: ClassVar[dict[str, Any]] = {"column": "width"}
    other: ClassVar[dict[str, Any]] = {
        "column": "height",
        "by": {"by": "phash", "distance": 0},
        "distance": {"by": "phash", "distance": 1},
        "prefer": "similarity",
    }

    by: Literal["sha256", "phash"] = field(
        default="sha256", metadata={"help": "equal hashes of any kind, or perceptual hashes of 64 bits"}
    )
    column: str | None = field(
        default=None,
        metadata={
            "metavar": "COLUMN",
            "help": "column of hashes (default: a usual name, such as sha256, md5 or phash)",
        },
    )
    distance: int | None = field(
        default=None, metadata={"help": f"for phash: bits in which duplicates may differ, 0 to {MOST} (default 4)"}
    )
    prefer: str | None = field(
        default=None,
        metadata={
            "metavar": "COLUMN",
            "help": "row that stays: highest by a column, scoring method or scores.parquet:column (default: first)",
        },
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if self.distance is not None and self.by != "phash":
            raise UsageError("distance is for by = 'phash'; other hashes are equal or not")
        if self.distance is not None and not 0 <= self.distance <= MOST:
            raise UsageError(
                f"distance = {self.distance}: must be from 0 (equal hashes) to {MOST}; different images differ in "
                "about 32 of 64 bits"
            )

    @property
    def only_columns(self) -> tuple[str, ...] | None:
        """The column of hashes, if it is named and nothing else is read."""
        return None if self.column is None or self.prefer is not None else (self.column,)

    def select(self, run: Run) -> Selection:
        """Order the rows, and drop each that repeats a kept one."""
        name = self._column(run)
        hashes_n, given_n = _hashes(run, name, self.by)
        at = np.flatnonzero(given_n)
        notes: list[str] = []
        if self.prefer is not None:
            scored = column(run, self.prefer, "prefer")
            notes += scored.notes
            at = at[np.argsort(_descending(np.asarray(scored.values_N))[at], kind="stable")]
        distance = (4 if self.distance is None else self.distance) if self.by == "phash" else 0
        twin_n, bits_n = np.full(len(given_n), -1, np.int64), np.zeros(len(given_n), np.uint8)
        if len(at):
            # Equal hashes have the same representative, so only different ones are compared, in order of first rows.
            first_U, which = _different(hashes_n[at])
            rows_U = at[first_U]
            kept_U = first_kept_within(hashes_n["low"][rows_U], distance) if distance else np.full(len(rows_U), -1)
            kept_U = np.where(kept_U < 0, np.arange(len(rows_U)), kept_U)
            twin_n[at] = rows_U[kept_U[which]]
            bits_n[at] = np.bitwise_count(hashes_n["low"][at] ^ hashes_n["low"][twin_n[at]]) if distance else 0
        mask_n = (twin_n < 0) | (twin_n == np.arange(len(twin_n)))
        groups = len(np.unique(twin_n[~mask_n]))
        missing = len(given_n) - len(at)
        notes.append(
            f"{name}: {counted(int(np.count_nonzero(~mask_n)), 'duplicate')} of {counted(groups, 'kept row')}"
            + (f"; {counted(missing, 'row has', 'rows have')} no hash and stay" if missing else "")
        )
        shown = name.replace("{", "{{").replace("}", "}}")
        how = f"{shown} differs in {{bits}} of 64 bits" if distance else f"the same {shown}"
        return run.selection(
            self,
            mask_n,
            reasons=(f"duplicate of row {{duplicate_of}}: {how}",),
            notes=notes,
            rows={
                "duplicate_of": np.where(mask_n, -1, run.store.ids_at(np.maximum(twin_n, 0))),
                **({"bits": bits_n} if distance else {}),
            },
        )

    def _column(self, run: Run) -> str:
        """Return the column of hashes.

        Raises:
            UsageError: It does not exist.
        """
        if self.column is not None:
            run.store.require([self.column], "dedup")
            return self.column
        found = next((name for name in COLUMNS[self.by] if name in run.store.columns), None)
        if found is None:
            raise UsageError(
                f"dedup by {self.by} needs a column of hashes ({', '.join(COLUMNS[self.by])}); "
                f"{run.store.layout.location} has {', '.join(run.store.columns) or 'no metadata'}. Name it with column"
            )
        return found


_HASH = np.dtype([("low", "<u8"), ("high", "<u8")])


def _hashes(run: Run, name: str, by: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return 128 bits for each row, (n,), equal for equal hashes, and which rows have a hash.

    A perceptual hash is in the lower 64 bits. Others are hashed again: two different ones practically
    never agree in 128 bits, not even among billions.
    """
    hashes_n, given_n = np.zeros(len(run.store), _HASH), np.zeros(len(run.store), np.bool_)
    done = 0
    with run.progress.task("dedup: read hashes", len(run.store)) as advance:
        for ids, part in run.store.scan([name]):
            cells = _cells(part.column(0), name)
            here = slice(done, done + len(cells))
            given_n[here] = [cell is not None for cell in cells]
            if by == "phash":
                hashes_n["low"][here] = np.fromiter(_perceptual(run, name, ids, cells), np.uint64, len(cells))
            else:
                digests = b"".join([_digest(cell) for cell in cells])
                hashes_n[here] = np.frombuffer(digests, _HASH)
            done += len(cells)
            advance(len(cells))
    return hashes_n, given_n


def _different(hashes_n: npt.NDArray[Any]) -> tuple[Ints, Ints]:
    """Return where each different hash is first, (U,) ascending, and the number of each row's hash among them, (n,)."""
    order_n = np.lexsort((hashes_n["high"], hashes_n["low"]))  # stable: the first of equal hashes comes first
    ordered = hashes_n[order_n]
    new_n = np.append(True, (ordered["low"][1:] != ordered["low"][:-1]) | (ordered["high"][1:] != ordered["high"][:-1]))
    first_U = order_n[new_n]
    place_U = np.empty_like(first_U)
    place_U[np.argsort(first_U)] = np.arange(len(first_U))
    which_n = np.empty_like(order_n)
    which_n[order_n] = place_U[np.cumsum(new_n) - 1]
    return np.sort(first_U), which_n


def _cells(values: Any, name: str) -> list[Any]:
    """Return the values of an Arrow column: text, bytes, whole numbers, or None where missing or empty.

    Raises:
        UsageError: The column contains something else.
    """
    import pyarrow as pa

    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.dictionary_decode(), kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    raw = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    if not (text or raw or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise UsageError(f"the metadata column {name!r} contains {kind}; hashes are text, bytes or whole numbers")
    return [None if value in ("", b"") else value for value in values.to_pylist()]


def _digest(cell: str | bytes | int | None) -> bytes:
    """Return 128 bits of a hash; hexadecimal digits are the same in either case, and as bytes."""
    if cell is None:
        return bytes(16)
    if isinstance(cell, int):
        data = b"i%d" % cell
    elif isinstance(cell, bytes):
        data = b"b" + cell
    else:
        raw = _unhex(cell) if len(cell) in (32, 40, 64, 96, 128) else None
        data = b"t" + cell.encode("utf-8", "surrogatepass") if raw is None else b"b" + raw
    return blake2b(data, digest_size=16).digest()


def _perceptual(run: Run, name: str, ids: Ints, cells: list[Any]) -> Iterator[int]:
    """Yield the 64 bits of each perceptual hash, 0 where missing.

    Raises:
        BadRowsError: A value is something else; names the file and row.
    """
    for row, cell in zip(ids.tolist(), cells, strict=True):
        value: int | None = 0
        if isinstance(cell, int):
            value = cell % 2**64 if -(2**63) <= cell < 2**64 else None
        elif isinstance(cell, str):
            bits = len(cell) == 64 and not set(cell) - {"0", "1"}
            raw = _unhex(cell) if len(cell) == 16 else None
            value = int(cell, 2) if bits else None if raw is None else int.from_bytes(raw, "big")
        elif isinstance(cell, bytes):
            value = int.from_bytes(cell, "big") if len(cell) == 8 else None
        if value is None:
            shown = cut(repr(cell))
            raise BadRowsError(
                f"{run.store.location_of('metadata', row)}: {name} is {shown}; a perceptual hash of 64 bits is 16 "
                "hexadecimal digits, 64 binary digits, 8 bytes or a whole number; for hashes that are only equal or "
                "not, pass by = 'sha256'"
            )
        yield value


def _unhex(text: str) -> bytes | None:
    """Return the bytes that hexadecimal digits stand for, None for other text."""
    try:
        return bytes.fromhex(text) if text.isalnum() else None
    except ValueError:
        return None


def _descending(values_n: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return numbers that ascend where the values descend."""
    return ~values_n if values_n.dtype.kind in "iu" else -values_n.astype(np.float64)
