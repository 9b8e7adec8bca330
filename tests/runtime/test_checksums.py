"""The checksum at the end of a file shows any damage; an array is what its specification says, or it is refused."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.common import begin, end_of
from thresher import Cache
from thresher.runtime.checksums import (
    ArraySpec,
    CacheWarning,
    Checksum,
    DamagedError,
    append_checksum,
    check,
    read_checked,
    stripes,
    write_checked,
)


@pytest.mark.parametrize("length", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 5])
def test_a_file_ends_with_the_checksum_of_what_comes_before(tmp_path: Path, length: int) -> None:
    data = random.Random(0).randbytes(length)
    write_checked(tmp_path / "a", data)
    whole = (tmp_path / "a").read_bytes()
    assert whole[:length] == data
    assert int.from_bytes(whole[-4:], "little") == zlib.crc32(data)
    assert read_checked(tmp_path / "a") == data
    with open(tmp_path / "a", "rb") as file:
        assert check(file) == length
        assert b"".join(bytes(stripe) for stripe in stripes(file, length + 3)) == whole[: length + 3]


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_checked(path, b"content")
    whole = path.read_bytes()
    damaged = [
        whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in range(8)
    ]
    damaged += [whole[:at] for at in range(len(whole))]
    damaged += [whole + b"\0", whole + whole, bytes(len(whole)), whole[1:]]
    for data in damaged:
        path.write_bytes(data)
        with pytest.warns(CacheWarning, match=r"cache entry .*/a is damaged \(its checksum is wrong\); it is computed"):
            assert read_checked(path) is None


def test_a_checksum_continues(tmp_path: Path) -> None:
    first, second = Checksum(), Checksum()
    first.update(b"one")
    again = Checksum(first.value, first.length)
    again.update(memoryview(np.arange(5)))
    second.update(b"one" + np.arange(5).tobytes())
    assert again.trailer() == second.trailer()


@pytest.mark.parametrize(
    ("spec", "array", "why"),
    [
        (ArraySpec("int32"), np.zeros(3, np.int64), "it contains int64, not int32"),
        (ArraySpec("float32"), np.zeros(3, ">f4"), "it contains >f4, not float32"),
        (ArraySpec("int32", (3,)), np.zeros(4, np.int32), r"its shape is \(4,\), not \(3,\)"),
        (ArraySpec("int32", (3,)), np.zeros((3, 1), np.int32), r"its shape is \(3, 1\), not \(3,\)"),
        (ArraySpec("int32", (None, 2)), np.zeros((9, 3), np.int32), r"its shape is \(9, 3\), not \(None, 2\)"),
        (ArraySpec("int32", most=5), np.array([0, 6], np.int32), "not within None to 5"),
        (ArraySpec("int32", least=0), np.array([-1, 6], np.int32), "not within 0 to None"),
        (ArraySpec("float32", least=-np.inf), np.array([0, np.nan], np.float32), "not within -inf to None"),
        (ArraySpec("float32", most=1), np.array([np.nan], np.float32), "not within None to 1"),
    ],
)
def test_another_array_counts_as_missing(tmp_path: Path, spec: ArraySpec, array: np.ndarray, why: str) -> None:
    cache = Cache(tmp_path)
    path = cache.path("x", {})
    cache.save(path, array)
    np.testing.assert_array_equal(cache.load(path), array)  # type: ignore[arg-type]
    with pytest.warns(CacheWarning, match=why):
        assert cache.load(path, spec) is None


@pytest.mark.parametrize(
    ("spec", "array"),
    [
        (ArraySpec("int32", (None, 2), 0, 5), np.array([[0, 5], [1, 2]], np.int32)),
        (ArraySpec("float32", (0,), 0, 5), np.empty(0, np.float32)),
        (ArraySpec("float32"), np.array([np.nan, np.inf], np.float32)),
        (ArraySpec("float64", ()), np.array(3.5)),
    ],
)
def test_the_right_array_is_loaded(tmp_path: Path, spec: ArraySpec, array: np.ndarray) -> None:
    cache = Cache(tmp_path)
    cache.save(cache.path("x", {}), array)
    np.testing.assert_array_equal(cache.load(cache.path("x", {}), spec), array)  # type: ignore[arg-type]


@pytest.mark.parametrize("header", [b"\x93NUMPY\x09\x00v\x00", b"\x93NUMPY\x01\x00v\x00" + b"(" * 118, b"", b"x" * 200])
def test_a_right_checksum_of_no_array(tmp_path: Path, header: bytes) -> None:
    write_checked(tmp_path / "a.npy", header)
    with pytest.warns(CacheWarning, match="is damaged"):
        assert Cache(tmp_path).load(tmp_path / "a.npy") is None


def test_a_header_of_another_length_than_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(10))
    with open(tmp_path / "a.npy", "r+b") as file:
        file.truncate(128 + 72)
        append_checksum(file)
    with pytest.warns(CacheWarning, match="its length is not that of its header"):
        assert Cache(tmp_path).load(tmp_path / "a.npy") is None


def test_a_pipe_in_the_cache_is_no_entry(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npy")

    def load() -> None:
        assert Cache(tmp_path).load(tmp_path / "a.npy") is None
        assert read_checked(tmp_path / "a.npy") is None
        assert Cache(tmp_path).resumable(tmp_path / "a.npy").load({}) is None
        Cache(tmp_path).save(tmp_path / "a.npy", np.arange(3))
        assert (tmp_path / "a.npy").is_file()

    assert end_of(begin(load)) == 0


def test_old_files_have_no_checksum(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100))
    with open(tmp_path / "a.npy", "rb") as file, pytest.raises(DamagedError):
        check(file)
