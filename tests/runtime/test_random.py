"""Generators and digests never change: saved states and cached arrays go by them."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from thresher.runtime import random
from thresher.runtime.random import digest, generator, permutation


def test_the_numbers_are_those_of_ever() -> None:
    words = np.frombuffer(hashlib.sha256(b'[3, "order", 7]').digest()[:16], "<u8")
    wanted = np.random.Generator(np.random.Philox(key=words)).permutation(50)
    assert generator(3, "order", 7).permutation(50).tolist() == wanted.tolist()
    assert generator(0, "reshard").integers(0, 1000, 4).tolist() == [509, 844, 751, 241]


def test_a_purpose_of_its_own() -> None:
    draws = [generator(*key).random() for key in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", "1")]]
    assert len(set(draws)) == 5
    assert generator(0, "a").random() == draws[0]


class Reversed:
    """A generator whose permutations are the last and the first numbers only."""

    def permutation(self, n):
        return np.array([n - 1, n - 2, 1, 0])


def test_permutations_hold_all_numbers_and_take_no_more_memory_than_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for n in (2**32 + 1, 10**10):
        order = permutation(Reversed(), n)
        assert order.dtype == np.uint64
        assert order.tolist() == [n - 1, n - 2, 1, 0]
    assert random._OF_UINT32 - 1 == np.iinfo(np.uint32).max
    wanted = [generator(3, "order").permutation(n).tolist() for n in (0, 1, 50, 70_000)]
    for most, kind in ((2**32, np.uint32), (-1, np.uint64)):
        monkeypatch.setattr(random, "_OF_UINT32", most)
        found = [permutation(generator(3, "order"), n) for n in (0, 1, 50, 70_000)]
        assert [order.tolist() for order in found] == wanted
        assert {order.dtype for order in found} == {np.dtype(kind)}


def test_digests_are_those_of_bytes_text_arrays_and_json() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)

    def sha(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    assert digest(array) == sha(array.tobytes())
    assert digest(array.T) == sha(np.ascontiguousarray(array.T).tobytes())
    assert digest(np.float64(2)) == sha(np.float64(2).tobytes())
    assert digest(np.zeros((0, 3))) == sha(b"")
    assert digest(np.array([True, False])) == sha(b"\1\0")
    assert digest("é", b"x", ["a", None, 1.5], array[::2]) == sha(
        "é".encode() + b"x" + json.dumps(["a", None, 1.5]).encode() + array[::2].tobytes()
    )
    assert digest("\udc80") == sha(b"\xed\xb2\x80")
    with pytest.raises(TypeError, match="objects"):
        digest(np.array([{}], object))
    with pytest.raises(TypeError):
        digest([array])


def test_a_large_array_is_not_copied() -> None:
    import tracemalloc

    array = np.zeros(10**7, np.uint8)
    tracemalloc.start()
    digest(array)
    assert tracemalloc.get_traced_memory()[1] < 10**5
    tracemalloc.stop()
