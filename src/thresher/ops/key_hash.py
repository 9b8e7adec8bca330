"""Hashes of keys: all functions that map the text of a key to a number.

There are two kinds, both blake2b of the key in UTF-8. Both are saved in files, so their values never change:

- :func:`hash_of` and :func:`hash_many`, 64 bits: the keys that a selection keeps
  (``export.keys``), and the plan of a reshard;
- :func:`id_of`, 64 bits and 32 more to distinguish keys with the same hash: the ledger of a stream
  (``dynamic.stream``).

Their values differ: blake2b also hashes the length of the digest, and the 64 bits of a uid are mixed rather than
hashed. Uids are already random bits, and NumPy mixes their halves for many uids at once: 100 million uids take seconds,
while hashing text takes a minute.

Shape letters: M keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

RECORD = np.dtype([("hash", "<i8"), ("check", "<u4")])
BATCH = 65_536  # keys hashed at a time

_MASK = 2**64 - 1
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of SplitMix64


def id_of(key: str) -> npt.NDArray[np.int64]:
    """Return the id of a key, (2,) int64: a 64-bit hash, and 32 bits more to distinguish keys with the same hash."""
    digest = _digest(key, 12)
    return np.array([int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little")], np.int64)


def records_of(keys: Sequence[str]) -> npt.NDArray[Any]:
    """Return the ids of keys in 12 bytes each, (M,) of :data:`RECORD`; the same numbers as :func:`id_of`."""
    return np.frombuffer(b"".join([_digest(key, 12) for key in keys]), RECORD)


def batches_of(keys: Iterable[str]) -> Iterator[list[str]]:
    """Split keys into lists of a size that is fast to hash."""
    rest = iter(keys)
    while batch := list(islice(rest, BATCH)):
        yield batch


def hash_of(key: str) -> int:
    """Return the 64-bit hash of a key, the same as :func:`hash_many`."""
    if len(key) == 32 and (uid := _uid(key)) is not None:
        return _mixed(uid >> 64 ^ _mixed((uid & _MASK) ^ _MIX[0]))
    return int.from_bytes(_digest(key), "little")


def hash_many(keys: Sequence[str]) -> tuple[Hashes, bool]:
    """Return the hashes of keys, (M,) uint64, and whether any of them is a uid: 32 hexadecimal digits."""
    if keys and all(len(key) == 32 for key in keys):
        try:
            raw = bytes.fromhex("".join(keys))
        except ValueError:
            raw = b""
        if len(raw) == 16 * len(keys):  # fromhex ignores white space
            halves = np.frombuffer(raw, ">u8").astype(np.uint64).reshape(-1, 2)
            return of_halves(halves[:, 0], halves[:, 1]), True
    elif not any(len(key) == 32 for key in keys):
        joined = b"".join([_digest(key) for key in keys])
        return np.frombuffer(joined, "<u8").astype(np.uint64), False
    some = any(map(is_uid, keys))
    return np.fromiter(map(hash_of, keys), np.uint64, len(keys)), some


def _digest(key: str, size: int = 8) -> bytes:
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def is_uid(key: str) -> bool:
    """Return whether a key is 32 hexadecimal digits, as the uids of DataComp are."""
    return len(key) == 32 and _uid(key) is not None


def _uid(key: str) -> int | None:
    """Return 32 hexadecimal digits as a number, None for other text."""
    try:
        raw = bytes.fromhex(key)
    except ValueError:
        return None
    return int.from_bytes(raw, "big") if len(raw) == 16 else None


def _mixed(bits: int) -> int:
    """Mix 64 bits so that every output bit depends on every input bit (SplitMix64)."""
    bits = (bits ^ bits >> 30) * _MIX[1] & _MASK
    bits = (bits ^ bits >> 27) * _MIX[2] & _MASK
    return bits ^ bits >> 31


def of_halves(high: Hashes, low: Hashes) -> Hashes:
    """Return the hashes of uids, (M,) uint64, from their halves, (M,) uint64 each."""

    def mixed(bits: Hashes) -> Hashes:
        bits = (bits ^ bits >> np.uint64(30)) * np.uint64(_MIX[1])
        bits = (bits ^ bits >> np.uint64(27)) * np.uint64(_MIX[2])
        return bits ^ bits >> np.uint64(31)

    return mixed(high ^ mixed(low ^ np.uint64(_MIX[0])))
