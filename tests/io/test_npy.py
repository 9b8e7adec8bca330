"""Arrays in .npy and .npz files of anyone: read right, or refused in one line before memory is taken."""

from __future__ import annotations

import io
import re
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thresher import Cache, PoolError, Selection, Serial, open_store
from thresher.check.pool import inspect
from thresher.io.npy import DeflatedPiece
from thresher.pruning.run import Run
from thresher.runtime.progress import Silent

# --- what an array may be, and what not -----------------------------------------------------------

VECTORS = np.random.default_rng(0).standard_normal((40, 8), "f4")


def hand_made(
    text: bytes, version: bytes = b"\x01\x00", length: int | None = None, after: bytes = b""
) -> Callable[[Path], None]:
    """Write a header as text, and the data after it."""

    def write(path: Path) -> None:
        size = (len(text) if length is None else length).to_bytes(2 if version == b"\x01\x00" else 4, "little")
        path.write_bytes(b"\x93NUMPY" + version + size + text + VECTORS.tobytes() + after)

    return write


def fields(**changes: Any) -> Callable[[Path], None]:
    told = {"descr": "<f4", "fortran_order": False, "shape": (40, 8), **changes}
    return hand_made((repr(told) + " " * 9 + "\n").encode())


def saved(array: np.ndarray, version: tuple[int, int] | None = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with open(path, "wb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, of a version that it need not use
            np.lib.format.write_array(file, array, version=version)

    return write


FINE = ""
PLAIN = b"{'descr': '<f4', 'fortran_order': False, 'shape': (40, 8), }"
ONE_ARRAY: dict[str, tuple[Callable[[Path], None], str]] = {
    "version 1": (saved(VECTORS, (1, 0)), FINE),
    "version 2": (saved(VECTORS, (2, 0)), FINE),
    "version 3": (saved(VECTORS, (3, 0)), FINE),
    "version 3 by hand": (hand_made(PLAIN + b" " * 60 + b"\n", b"\x03\x00"), FINE),
    "other order of fields": (hand_made(b"{'shape':(40,8),'fortran_order':False,'descr':\"<f4\"}\n"), FINE),
    "integers of Python 2": (hand_made(b"{'descr': '<f4', 'fortran_order': False, 'shape': (40L, 8L), }\n"), FINE),
    "native order": (fields(descr="=f4"), FINE),
    "no order": (fields(descr="f4"), FINE),
    "junk after the data": (hand_made(PLAIN, after=b"x" * 99), FINE),
    "Fortran order of one row": (fields(fortran_order=True, shape=(1, 320)), FINE),
    "Fortran order of one column": (fields(fortran_order=True, shape=(320, 1)), FINE),
    "Fortran order": (fields(fortran_order=True), "is in Fortran order"),
    "no rows": (saved(VECTORS[:0]), "no rows"),
    "float64 big-endian": (saved(VECTORS.astype(">f8")), r"little-endian: np\.save\(path, array\.astype\('<f8'\)\)"),
    "long double": (saved(VECTORS.astype("g")), "contains (longdouble|float128)"),
    "complex": (saved(VECTORS.astype("c8")), "contains complex64"),
    "bools": (saved(VECTORS > 0), "contains bool"),
    "int8": (saved(VECTORS.astype("i1")), "contains int8"),
    "uint8": (saved(VECTORS.astype("u1")), "contains uint8"),
    "dates": (fields(descr="<M8[s]", shape=(40, 4)), "unknown type"),
    "opaque": (fields(descr="|V4"), "contains void32"),
    "objects": (fields(descr="|O", shape=(40, 4)), "pickled Python objects"),
    "subarrays": (fields(descr=("<f4", (8,)), shape=(40,)), "unknown type"),
    "records": (fields(descr=[("a", "<f4")]), "embeddings are float16"),
    "nested records": (fields(descr=[("a", [("b", "<f4")])]), "unknown type"),
    "type of a million digits": (fields(descr="<f" + "4" * 5_000), "unknown type"),
    "type that is a number": (fields(descr=4), "unknown type"),
    "type that is none": (fields(descr="import os"), "unknown type"),
    "shape of floats": (fields(shape=(40.0, 8)), r"has shape \(40.0, 8\)"),
    "shape of bools": (fields(shape=(True, 320)), r"has shape \(True, 320\)"),
    "shape of a list": (fields(shape=[40, 8]), r"has shape \[40, 8\]"),
    "shape of a number": (fields(shape=40), "has shape 40"),
    "negative shape": (fields(shape=(40, -8)), r"has shape \(40, -8\)"),
    "two negative sides": (fields(shape=(-40, -8)), r"has shape \(-40, -8\)"),
    "huge number of rows": (fields(shape=(2**62, 8)), "which fits no file"),
    "huge number of dimensions": (fields(shape=(1, 2**61)), "which fits no file"),
    "product that wraps around": (fields(shape=(2**32, 2**32)), "which fits no file"),
    "more rows than bytes": (fields(shape=(2**40, 8)), "is truncated"),
    "many dimensions": (fields(shape=(1, 2**21)), "at most 1,048,576"),
    "1-D": (fields(shape=(320,)), r"has shape \(320,\)"),
    "3-D": (fields(shape=(40, 8, 1)), r"has shape \(40, 8, 1\)"),
    "100-D": (fields(shape=(1,) * 100), "has shape"),
    "0-D": (fields(shape=()), r"has shape \(\)"),
    "a field too many": (fields(evil=1), "exactly the fields"),
    "a field too few": (hand_made(b"{'descr': '<f4', 'shape': (40, 8)}\n"), "exactly the fields"),
    "order that is a number": (fields(fortran_order=7), "Fortran order"),
    "a list": (hand_made(b"[1, 2]\n"), "exactly the fields"),
    "code": (hand_made(b"__import__('os').abort()\n"), "not a dictionary of literals"),
    "an unhashable key": (hand_made(b"{[]: 1}\n"), "not a dictionary of literals"),
    "deep": (hand_made(b"(" * 9_000 + b")" * 900), "not a dictionary of literals"),
    "minus signs": (hand_made(b"-" * 9_000 + b"1"), "not a dictionary of literals"),
    "a long integer": (hand_made(b"9" * 9_999), "not a dictionary of literals"),
    "a long header": (hand_made(PLAIN + b" " * 200_000, b"\x02\x00"), "has 200,0.. bytes, more than 10,000"),
    "a header of 4 GB": (hand_made(PLAIN, b"\x02\x00", 2**32 - 1), "4,294,967,295 bytes"),
    "a header beyond the end": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x76\x00{'descr'"), "ends within"),
    "NUL characters": (hand_made(PLAIN.replace(b" ", b"\0")), "not a dictionary of literals"),
    "not UTF-8": (hand_made(PLAIN.replace(b" ", b"\xff"), b"\x03\x00"), "cannot be read"),
    "version 0": (hand_made(PLAIN, b"\x00\x00"), r"unknown .npy version 0\.0"),
    "version 1.1": (hand_made(PLAIN, b"\x01\x01"), r"unknown .npy version 1\.1"),
    "no array": (lambda path: path.write_bytes(b"hello"), "(is not a .npy file|ends within)"),
    "empty": (lambda path: path.write_bytes(b""), "ends within"),
}  # fmt: skip


def as_npy(change: Callable[[Path], None], folder: Path) -> Path:
    change(folder / "image.npy")
    return folder / "image.npy"


def as_npz(change: Callable[[Path], None], folder: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    member = folder / "a"
    change(member)
    with zipfile.ZipFile(folder / "image.npz", "w", method) as archive:
        archive.write(member, "image.npy")
    member.unlink()
    return folder / "image.npz"


def read(path: Path) -> np.ndarray:
    store = open_store(str(path))
    return np.concatenate([store.raw("image", block) for block in store.blocks("image", size=16)])


@pytest.mark.parametrize("put", [as_npy, as_npz])
@pytest.mark.parametrize("name", ONE_ARRAY)
def test_an_array_is_read_or_refused_in_one_line(tmp_path: Path, name: str, put: Callable[..., Path]) -> None:
    change, said = ONE_ARRAY[name]
    (tmp_path / "pool").mkdir()
    path = put(change, tmp_path / "pool")
    if name == "junk after the data" and put is as_npz:
        said = "does not have the length"
    if said:
        with pytest.raises(PoolError) as error:
            open_store(str(path)).fingerprint()
        line = str(error.value)
        both = rf"{said}|does not have the length that its header says" if put is as_npz else said
        assert re.search(both, line), line
        assert str(path) in line
        assert "\n" not in line
        assert len(line) < 500
        return
    rows = read(path)
    assert rows.astype("f4").tobytes() == VECTORS.tobytes()


def patched(marker: bytes, offset: int, content: bytes) -> Callable[[bytes], bytes]:
    """Overwrite bytes after the last marker."""

    def change(data: bytes) -> bytes:
        at = data.rfind(marker) + offset
        return data[:at] + content + data[at + len(content) :]

    return change


CENTRAL, END = b"PK\x01\x02", b"PK\x05\x06"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (patched(CENTRAL, 8, b"\x01"), "is encrypted"),
        (patched(CENTRAL, 10, b"\x0e"), "compressed in a way that NumPy does not write"),  # LZMA
        (patched(CENTRAL, 10, b"\x63"), "compressed in a way that NumPy does not write"),
        (patched(CENTRAL, 16, b"abcd"), "CRC-32|it may be truncated or damaged"),
        (patched(CENTRAL, 24, (2**31).to_bytes(4, "little")), "does not have the length|is truncated"),
        (patched(CENTRAL, 42, (7).to_bytes(4, "little")), "cannot be read"),
        (patched(CENTRAL, 42, (2**31).to_bytes(4, "little")), "cannot be read"),
        (patched(END, 16, (2**31).to_bytes(4, "little")), "cannot be read"),
        (lambda data: data[: len(data) // 2], "cannot be read"),
        (lambda data: b"", "cannot be read"),
    ],
    ids=["encrypted", "lzma", "unknown", "checksum", "size", "offset", "far", "directory", "half", "empty"],
)
def test_an_archive_that_lies_is_refused_in_one_line(tmp_path: Path, change, said: str, method: int) -> None:
    path = as_npz(saved(VECTORS), tmp_path, method)
    path.write_bytes(change(path.read_bytes()))
    if said.startswith("CRC") and method == zipfile.ZIP_STORED:
        return  # read in place, like a .npy file
    with pytest.raises(PoolError, match=said) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compression_is_refused(tmp_path: Path, method: int) -> None:
    with pytest.raises(PoolError, match=r"save it again with np\.savez_compressed"):
        open_store(str(as_npz(saved(VECTORS), tmp_path, method)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    path = as_npz(saved(VECTORS), tmp_path)
    saved(-VECTORS)(tmp_path / "other")
    with zipfile.ZipFile(path, "a") as archive:
        archive.write(tmp_path / "other", "image.npy")
    with pytest.raises(PoolError, match="has two arrays named 'image'"):
        open_store(str(path))


def unfolding(path: Path, rows: int, dim: int) -> int:
    """Write a small compressed array of ones; return its size unfolded."""
    top = io.BytesIO()
    np.lib.format.write_array_header_1_0(top, {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)})
    ones, left = np.ones(2**20, "<f4").tobytes(), rows * dim * 4
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open("image.npy", "w") as file,
    ):
        file.write(top.getvalue())
        for _ in range(left // len(ones)):
            file.write(ones)
        file.write(ones[: left % len(ones)])
    return left


@pytest.mark.slow
def test_long_compressed_rows_are_read_some_bytes_at_a_time(tmp_path: Path) -> None:
    """A file of some hundred kilobytes: neither its length nor a number of rows says how much memory to take."""
    path = tmp_path / "image.npz"
    size = unfolding(path, 256, 2**18)  # 268 MB, rows of 1 MB
    assert path.stat().st_size < size / 500
    piece = open_store(str(path)).layout.vectors["image"][0]
    tracemalloc.start()
    rows = 0
    for part in piece.stream(8192):
        assert part[:, ::4096].all()
        rows += len(part)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 256
    assert peak < 150 * 2**20 < size


def test_blocks_of_long_rows_have_fewer_rows(tmp_path: Path) -> None:
    for dim, block in ((8, 16_384), (8_192, 16_384), (2**16, 2_048), (2**20, 128)):
        np.save(tmp_path / "image.npy", np.ones((1, dim), "f4"))
        assert open_store(str(tmp_path / "image.npy")).block == block


def test_a_quick_check_unfolds_only_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfolding(tmp_path / "image.npz", 300_000, 8)
    read: list[int] = []
    stream = DeflatedPiece.stream

    def counted(self: DeflatedPiece, batch: int) -> Iterator[np.ndarray]:
        for part in stream(self, batch):
            read.append(len(part))
            yield part

    monkeypatch.setattr(DeflatedPiece, "stream", counted)
    store = open_store(str(tmp_path / "image.npz"))
    run = Run(store, Selection.everything("", "", {}, 300_000), Serial(), Cache.at(tmp_path / "cache"), 0, Silent())
    found = inspect(run, quick=True)["fields"]["image"]
    assert found["looked_at"] == sum(read) == 7 * 16_384
    assert found["norms"]["max"] == pytest.approx(8**0.5)
