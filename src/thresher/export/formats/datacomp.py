"""DataComp subset file: the sorted uids of the rows kept, each as two unsigned integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.export.registry import Written, kept_rows
from thresher.io.key_forms import difference
from thresher.pool.store import EmbeddingStore
from thresher.selection import Selection


@dataclass(frozen=True)
class DataComp:
    """DataComp subset file: uids as sorted pairs of u8, each as often as the selection uses its row."""

    name: ClassVar[str] = "datacomp"

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write a ``.npy`` file of (rows,) u8,u8; rows whose key is not a uid are missing.

        Raises:
            UsageError: None of the keys is a uid.
        """
        parts: list[npt.NDArray[Any]] = []
        missing: list[tuple[int, str]] = []
        for ids, keys, counts in kept_rows(selection, store):
            uids, good = _uids(keys)
            missing += [(int(ids[i]), keys[i]) for i in np.flatnonzero(~good)]
            parts.append(np.repeat(uids[good], counts[good]))
        subset = np.concatenate(parts) if parts else np.empty(0, "u8,u8")
        if missing and not len(subset):
            raise UsageError(
                f"no key of {store.layout.location} is a DataComp uid (32 hexadecimal characters); the first is "
                f"{missing[0][1]!r}{difference(missing[0][1], '0' * 32)}. Name the column with --key, or export "
                "--as keys"
            )
        subset = subset[np.lexsort((subset["f1"], subset["f0"]))]
        with open(path, "wb") as file:
            np.save(file, subset, allow_pickle=False)
        return Written(len(subset), tuple(missing))


def _uids(keys: list[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return decoded uids, and which keys are 32 hexadecimal characters."""
    good = np.array([len(key) == 32 and key.isascii() for key in keys], np.bool_)
    text = "".join(key if ok else "0" * 32 for key, ok in zip(keys, good, strict=True)).encode()
    codes = np.frombuffer(text, np.uint8).reshape(-1, 32)
    values = np.full(256, 255, np.uint8)
    values[np.frombuffer(b"0123456789", np.uint8)] = np.arange(10)
    values[np.frombuffer(b"abcdef", np.uint8)] = values[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)
    digits = values[codes]
    good &= (digits < 16).all(axis=1)
    pairs = ((digits[:, 0::2] & 15) << 4 | (digits[:, 1::2] & 15)).astype(np.uint8)
    halves = np.ascontiguousarray(pairs).view(">u8").astype(np.uint64)
    out = np.empty(len(keys), "u8,u8")
    out["f0"], out["f1"] = halves[:, 0], halves[:, 1]
    return out, good
