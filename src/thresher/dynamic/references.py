"""The losses of rows under a reference model, by key: for :class:`thresher.dynamic.policies.rho.Rho`.

A reference file is parquet with a column of keys (one of ``uid``, ``key``, ``id``, ``__key__``, ``image_path``) and a
column ``loss`` (or ``reference_loss``) of numbers: the higher, the worse the reference model knows the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError, UsageError
from thresher.io.columns import KEYS, as_text
from thresher.io.key_forms import unlike
from thresher.io.parquet import table_piece
from thresher.io.places import located
from thresher.ops.key_hash import RECORD, batches_of, is_uid, records_of
from thresher.runtime.untrusted import cut

LOSSES = ("loss", "reference_loss")
Losses = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class References:
    """Reference losses of keys; 16 bytes per key.

    Attributes:
        records_M: (M,) ids of the keys, of :data:`thresher.ops.key_hash.RECORD`, ascending.
        losses_M: (M,) float32; NaN if the file has no finite number.
        uids: Whether any key is a uid of 32 hexadecimal digits.
        example: One of the keys, for messages.
    """

    records_M: npt.NDArray[np.void]
    losses_M: Losses
    uids: bool = False
    example: str = ""

    @classmethod
    def of(cls, batches: Iterable[tuple[Sequence[str], npt.ArrayLike]]) -> References:
        """Build them from batches of keys and losses.

        Raises:
            UsageError: There are no keys, two losses for one key, or no finite loss.
        """
        records, losses, uids, example = [np.empty(0, RECORD)], [np.empty(0, np.float32)], False, ""
        for keys, values in batches:
            records.append(records_of(keys))
            losses.append(np.asarray(values, np.float32))
            uids, example = uids or any(map(is_uid, keys)), example or next(iter(keys), "")
        records_M, losses_M = np.concatenate(records), np.concatenate(losses)
        if not len(records_M):
            raise UsageError("no reference losses; give at least one key with a loss")
        order = np.lexsort((records_M["check"], records_M["hash"]))
        records_M = records_M[order]
        if (again := records_M[1:] == records_M[:-1]).any():
            raise UsageError(f"{np.count_nonzero(again):,} keys have two reference losses; give one for each key")
        losses_M = np.where(np.isfinite(losses_M[order]), losses_M[order], np.float32(np.nan))
        if np.isnan(losses_M).all():
            raise UsageError("none of its reference losses is a finite number that float32 holds")
        return cls(records_M, losses_M, uids, example)

    @classmethod
    def read(cls, path: str) -> References:
        """Read a reference file.

        Raises:
            PoolError: The file cannot be read, or it has no column of keys or losses.
            UsageError: It has no rows, two losses for one key, or no finite loss.
        """
        import pyarrow as pa

        piece = table_piece(*located(path))
        names = piece.columns
        key, loss = (next((name for name in known if name in names), None) for known in (KEYS, LOSSES))
        if key is None or loss is None:
            lacks = f"keys ({', '.join(KEYS)})" if key is None else f"losses ({' or '.join(LOSSES)})"
            raise PoolError(f"{path}: has no column of {lacks}; it has {cut(', '.join(names), 300)}")
        kind = piece.schema([loss]).field(loss).type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise PoolError(f"{path}: its column {loss} is {kind}; give numbers")

        def batches() -> Iterable[tuple[Sequence[str], npt.ArrayLike]]:
            for part in piece.stream([key, loss]):
                if part.column(key).null_count:
                    raise PoolError(f"{path}: {part.column(key).null_count:,} rows have no {key}; every row needs one")
                values = part.column(loss).cast(pa.float32(), safe=False).fill_null(np.nan)
                yield as_text(part.column(key), path, key).to_pylist(), values.to_numpy(zero_copy_only=False)

        try:
            return cls.of(batches())
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None

    def __len__(self) -> int:
        """Return M."""
        return len(self.records_M)

    def of_ids(self, hashes_B: npt.ArrayLike, checks_B: npt.ArrayLike) -> Losses:
        """Return the losses of these ids, (B,) float32; NaN for unknown ones."""
        at_B = positions_of(self.records_M, hashes_B, checks_B)
        found_B = np.full(len(at_B), np.nan, np.float32)
        found_B[at_B >= 0] = self.losses_M[at_B[at_B >= 0]]
        return found_B

    def of_keys(self, keys: Iterable[str]) -> Losses:
        """Return the losses of these keys, (B,) float32; NaN for unknown ones."""
        parts = [np.empty(0, np.float32)]
        for batch in batches_of(keys):
            records = records_of(batch)
            parts.append(self.of_ids(records["hash"], records["check"]))
        return np.concatenate(parts)


def positions_of(records_M: npt.NDArray[np.void], hashes_B: npt.ArrayLike, checks_B: npt.ArrayLike) -> Ints:
    """Return the positions of ids among ascending records, (B,) int64; -1 for unknown ones."""
    hashes, checks = np.asarray(hashes_B, np.int64), np.asarray(checks_B, np.uint32)
    wanted = np.empty(len(hashes), RECORD)
    wanted["hash"], wanted["check"] = hashes, checks
    known_M: Ints = records_M["hash"]
    at_B = np.searchsorted(known_M, hashes)
    found_B = np.full(len(hashes), -1, np.int64)
    while len(at_B) and (within := at_B < len(records_M)).any():  # keys with one hash are neighbours
        rows = np.minimum(at_B, len(records_M) - 1)
        hit = within & (records_M[rows] == wanted)
        found_B[hit] = rows[hit]
        same = within & (known_M[rows] == hashes) & ~hit
        if not same.any():
            break
        at_B = np.where(same, at_B + 1, len(records_M))
    return found_B


def check_found(references_N: Losses, path: str, of: str, keys: Sequence[str], example: str) -> None:
    """Raise if no row has a reference loss.

    Args:
        references_N: (N,) float32, NaN where unknown.
        path: The file of the references.
        of: What the rows are from, for the message.
        keys: Some keys of the rows.
        example: A key of the file.

    Raises:
        UsageError: With an example of both sides.
    """
    if np.isnan(references_N).all():
        raise UsageError(
            f"{path}: none of its keys is in {of}: {unlike('the file', [example], of, keys)}; give the reference "
            "losses of these data"
        )
