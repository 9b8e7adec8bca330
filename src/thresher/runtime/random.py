"""Random generators keyed by a seed and a purpose, and digests of what results depend on.

Both go into saved states and cache keys: the same arguments give the same bits for ever.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a generator keyed by a seed and a purpose: drawing for one purpose never changes what another draws."""
    words = np.frombuffer(hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()[:16], "<u8")
    return np.random.Generator(np.random.Philox(key=words.astype(np.uint64)))


def digest(*parts: Any) -> str:
    """Return the SHA-256 of parts, one after the other, as 64 hexadecimal digits.

    Args:
        *parts: Bytes as they are, text as UTF-8, arrays by their values in C order (neither shape nor dtype count), and
            anything else as JSON. Nothing is put between parts: give at most one of them a length that can vary.

    Raises:
        TypeError: An array of objects, or what JSON does not know.
    """
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray | np.generic):
            found.update(_values(np.asarray(part)))
        elif isinstance(part, bytes | bytearray | memoryview):
            found.update(part)
        elif isinstance(part, str):
            found.update(part.encode("utf-8", "surrogatepass"))
        else:
            found.update(json.dumps(part).encode())
    return found.hexdigest()


def _values(array: npt.NDArray[Any]) -> memoryview:
    """Return the bytes of an array, without a copy where it is contiguous."""
    if array.dtype.hasobject:
        raise TypeError("an array of objects has no digest")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
