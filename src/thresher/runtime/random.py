"""Random generators keyed by a seed and a purpose, and digests of what results depend on.

Both are used in saved states and cache keys: the same arguments always give the same bits.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

_OF_UINT32 = 2**32  # numbers


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a generator keyed by a seed and a purpose; generators with different purposes are independent."""
    words = np.frombuffer(hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()[:16], "<u8")
    return np.random.Generator(np.random.Philox(key=words.astype(np.uint64)))


def permutation(random: np.random.Generator, n: int) -> npt.NDArray[np.uint32] | npt.NDArray[np.uint64]:
    """Return a random permutation of 0 .. n - 1, (n,): uint32 if that holds all numbers, else uint64."""
    if n > _OF_UINT32:
        return random.permutation(n).view(np.uint64)
    order = np.arange(n, dtype=np.uint32)
    random.shuffle(order)  # the same order as of random.permutation, in half the memory
    return order


def digest(*parts: Any) -> str:
    """Return the SHA-256 of the concatenated parts as 64 hexadecimal digits.

    Args:
        *parts: Bytes unchanged, text as UTF-8, arrays by their values in C order (without shape and dtype), and
            everything else as JSON. There is no separator between parts: at most one of them may vary in length.

    Raises:
        TypeError: A part is an array of objects or cannot be converted to JSON.
    """
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray | np.generic):
            sha.update(_values(np.asarray(part)))
        elif isinstance(part, bytes | bytearray | memoryview):
            sha.update(part)
        elif isinstance(part, str):
            sha.update(part.encode("utf-8", "surrogatepass"))
        else:
            sha.update(json.dumps(part).encode())
    return sha.hexdigest()


def _values(array: npt.NDArray[Any]) -> memoryview:
    """Return the bytes of an array, without a copy if it is contiguous."""
    if array.dtype.hasobject:
        raise TypeError("an array of objects has no digest")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
