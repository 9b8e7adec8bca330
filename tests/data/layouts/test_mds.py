"""MDS is read without its library, as its library writes it; lying and hostile shards are refused in one line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.objects import put
from thresher.check.data import doctor
from thresher.data import DataOptions, open_data
from thresher.errors import PoolError, ThresherError, UsageError
from thresher.testing.data_reader import DATA, Pair, mds_shards, pairs

write_pairs, write = DATA["mds"], mds_shards
COLUMNS = {"image": "png", "key": "str", "text": "str"}


def read(location: str, **options: Any) -> list[Pair]:
    data = open_data(location, DataOptions(**options))
    return [Pair(one.key, one.text, one.stored()) for one in data.samples()]


def by_library(folder: Path, columns: Mapping[str, str], samples: Sequence[Mapping[str, Any]], **options: Any) -> str:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=dict(columns), **options) as out:
        for sample in samples:
            out.write(dict(sample))
    return str(folder)


@pytest.mark.parametrize("compression", [None, "gz", "zstd:7", "br:1", "bz2", "snappy"])
@pytest.mark.parametrize("per_part", [3, 10_000])
def test_what_the_library_writes_is_read(tmp_path: Path, compression: str | None, per_part: int) -> None:
    wanted = pairs(20, 12)
    samples = [{"image": one.picture, "text": one.text, "key": one.key} for one in wanted]
    columns = {"image": "bytes", "text": "str", "key": "str"}
    folder = by_library(tmp_path / "data", columns, samples, compression=compression, size_limit=4_000)
    endings = {path.suffix for path in (tmp_path / "data").iterdir()} - {".json"}
    assert endings == ({".mds"} if compression is None else {f".{compression.partition(':')[0]}"})
    assert len(list((tmp_path / "data").iterdir())) > 3
    assert read(folder, per_part=per_part) == wanted
    data = open_data(folder, DataOptions(per_part=per_part))
    keys = [key for part in data.parts for key in part.scan().keys]
    assert keys == [one.key for one in wanted]


def test_what_the_library_writes_of_no_samples_is_said_to_have_none(tmp_path: Path) -> None:
    folder = by_library(tmp_path / "data" / "train", COLUMNS, [])
    for location in (folder, str(tmp_path / "data")):
        with pytest.raises(PoolError, match="index.json: lists no shards, so there are no samples"):
            open_data(location)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 2, "shards": {}}', '{"a.png": "a caption"}'])
def test_another_index_does_not_keep_a_folder_of_images_from_being_read(tmp_path: Path, content: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "index.json").write_text(content)
    assert open_data(str(tmp_path)).kind == "folder"


def test_every_encoding_of_the_library_is_read(tmp_path: Path) -> None:
    """Numbers and texts become columns, images of every kind become images."""
    from decimal import Decimal

    from streaming.base.format.mds.encodings import get_mds_encodings

    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    image = Image.fromarray(pixels)
    values: dict[str, Any] = {
        "bytes": b"raw", "str": "é", "int": -(2**40), "json": ["one", "two"], "pil": image, "jpeg": image, "png": image,
        "str_int": 10**30, "str_float": 0.5, "str_decimal": Decimal("1.50"), "ndarray": pixels,
        "list[pil]": [image] * 2, "list[jpeg]": [image], "list[png]": [image, image],
        "jpeg_array": [_encoded(image, "JPEG")],
        "jpegarray": [_encoded(image, "JPEG")],
    }  # fmt: skip
    values |= {name: np.dtype(name).type(7) for name in get_mds_encodings() - set(values) - {"pkl"}}
    columns = {f"c_{encoding}": encoding for encoding in values}
    columns |= {"c_shape": "ndarray:uint8:4,5,3", "c_type": "ndarray:uint8", "caption": "json", "id": "int"}
    more = {"c_shape": pixels, "c_type": pixels, "caption": ["a fox", "a cat"], "id": 5}
    sample = {**{f"c_{name}": value for name, value in values.items()}, **more}
    folder = by_library(tmp_path / "data", columns, [sample] * 2)

    images = ["c_pil", "c_png", "c_ndarray", "c_shape", "c_type", "c_list[pil]", "c_list[png]"]
    for name in [*images, "c_jpeg", "c_list[jpeg]", "c_jpeg_array", "c_jpegarray"]:
        one = next(iter(open_data(folder, DataOptions(image=name)).samples()))
        shown = np.asarray(Image.open(io.BytesIO(one.stored())).convert("RGB"))
        assert shown.shape == pixels.shape
        if name in images:
            np.testing.assert_array_equal(shown, pixels)
        assert (one.key, one.text) == ("5", "a fox")
        assert bool(one.notes) == (name in ("c_list[pil]", "c_list[png]"))
    light = next(iter(open_data(folder, DataOptions(image="c_png")).samples())).columns
    assert light["c_int"] == -(2**40)
    assert (light["c_str"], light["c_str_int"], light["c_str_decimal"]) == ("é", str(10**30), "1.50")
    assert (light["c_str_float"], light["c_uint64"], light["c_float16"]) == (0.5, 7, 7.0)


def _encoded(image: Any, form: str) -> bytes:
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16"])
def test_images_without_a_format_keep_their_pixels(tmp_path: Path, mode: str) -> None:
    gray = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 11), np.uint8))
    image = gray.convert(mode if mode != "I;16" else "I").convert(mode)
    folder = by_library(tmp_path / "data", {"image": "pil", "text": "str"}, [{"image": image, "text": "t"}])
    shown = Image.open(io.BytesIO(read(folder)[0].picture))
    assert shown.size == image.size
    if mode != "P":  # without its palette
        np.testing.assert_array_equal(np.asarray(shown.convert("RGB")), np.asarray(image.convert("RGB")))


def test_samples_without_a_key_are_named_by_their_shard(tmp_path: Path) -> None:
    """Whether the shard is compressed or not, so that a key is that of the same sample."""
    samples = [{"image": one.picture, "text": one.text} for one in pairs(6)]
    options = {"columns": {"image": "bytes", "text": "str"}, "samples": samples, "size_limit": 700}
    plain, packed = (read(by_library(tmp_path / str(c), compression=c, **options)) for c in (None, "zstd"))
    assert [one.key for one in plain] == [one.key for one in packed]
    assert plain[0].key == "shard.00000-0"
    assert plain[-1].key.startswith("shard.0000")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves files open
def test_a_merged_index_and_one_split_are_read_and_several_splits_are_refused(tmp_path: Path) -> None:
    from streaming.base.util import merge_index

    wanted = pairs(8)
    for name, some in (("0", wanted[:5]), ("1", wanted[5:])):
        write_pairs(tmp_path / "parts" / name, some, 1)
    merge_index(str(tmp_path / "parts"), keep_local=True)
    assert read(str(tmp_path / "parts")) == wanted
    write_pairs(tmp_path / "split" / "train", wanted, 2)
    assert read(str(tmp_path / "split")) == wanted
    write_pairs(tmp_path / "split" / "val", wanted, 2)
    with pytest.raises(UsageError, match=r"splits train, val; give one, such as .*split/train"):
        open_data(str(tmp_path / "split"))


def test_pickled_columns_are_never_read(tmp_path: Path) -> None:
    """Not even if another column is asked for."""
    samples = [{"image": one.picture, "text": one.text, "more": {1: 2}} for one in pairs(2)]
    folder = by_library(tmp_path / "data", {"image": "bytes", "text": "str", "more": "pkl"}, samples)
    with pytest.raises(UsageError, match="'more' has pickled objects, which can run code and are never read"):
        open_data(folder)


def test_remote_shards_are_read(tmp_path: Path) -> None:
    folder = Path(write_pairs(tmp_path / "data", pairs(7), 2))
    location = put(folder, f"memory://mds/{tmp_path.name}")
    assert read(location, per_part=2) == pairs(7)
    Path(folder, "shard.00001.mds").write_bytes(b"x")
    put(folder, location)
    with pytest.raises(PoolError, match=r"shard.00001.mds: has 1 byte, but .*index.json says"):
        read(location)


def test_scanning_reads_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pairs(tmp_path / "data", pairs(30, 200), 1)
    (part,) = open_data(folder).parts
    count = 0
    opened = io.BufferedReader.read

    class Counting(io.FileIO):
        def readinto(self, buffer: Any) -> Any:
            nonlocal count
            found = super().readinto(buffer)
            count += found or 0
            return found

    monkeypatch.setattr("thresher.data.layouts.mds.open_file", lambda _, path: io.BufferedReader(Counting(path), 512))
    assert list(part.scan().keys) == [one.key for one in pairs(30, 200)]
    assert 0 < count < os.path.getsize(part.path) / 20
    assert opened is io.BufferedReader.read


# --- damaged and hostile --------------------------------------------------------------------------


def _index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no shards": (lambda index: index.update(shards=[]), "lists no shards, so there are no samples; write it again"),
    "other version": (lambda index: index.update(version=3), "version 3; version 2"),
    "other format": (lambda index: index["shards"][0].update(format="csv"), "shard 0 is csv of version 2; only mds"),
    "not an object": (lambda index: index["shards"].append(7), "shard 2 is not described by an object"),
    "more samples": (lambda index: index["shards"][1].update(samples=4), "has 3 samples, but the index says 4"),
    "huge count": (lambda index: index["shards"][0].update(samples=2**40), "cannot have 1099511627776 samples"),
    "negative": (lambda index: index["shards"][0].update(samples=-1), "cannot have -1 samples"),
    "a bool": (lambda index: index["shards"][0].update(samples=True), "cannot have True samples"),
    "a parent": (lambda index: index["shards"][0]["raw_data"].update(basename="../shard.mds"), "outside of the folder"),
    "backslashes": (lambda index: index["shards"][0]["raw_data"].update(basename="..\\s.mds"), "outside of the folder"),
    "absolute": (lambda index: index["shards"][0]["raw_data"].update(basename="/etc/passwd"), "outside of the folder"),
    "missing": (lambda index: index["shards"][0]["raw_data"].update(basename="gone.mds"), "gone.mds does not exist"),
    "no file": (lambda index: index["shards"][0].update(raw_data=None), "does not name its file"),
    "huge file": (lambda index: index["shards"][0]["raw_data"].update(bytes=2**61), "in 2305843009213693952 bytes"),
    "other size": (lambda index: index["shards"][0]["raw_data"].update(bytes=900), "bytes, but .*index.json says 900"),
    "no columns": (lambda index: index["shards"][0].update(column_names=[]), "does not describe its columns"),
    "short columns": (lambda index: index["shards"][0].update(column_sizes=[8]), "does not describe its columns"),
    "unknown": (lambda index: index["shards"][0]["column_encodings"].__setitem__(0, "exe"), "'exe', which is unknown"),
    "pickle": (lambda index: index["shards"][0]["column_encodings"].__setitem__(0, "pkl:x"), "never read"),
    "array": (
        lambda index: index["shards"][0]["column_encodings"].__setitem__(0, "ndarray:uint8:0"),
        "which is unknown",
    ),
    "fixed size": (lambda index: index["shards"][0]["column_sizes"].__setitem__(1, 7), "has no size, not 7"),
    "one file twice": (lambda index: index["shards"].append(index["shards"][0]), "names shard.00000.mds twice"),
    "twice": (lambda index: index["shards"][0].update(column_names=["text"] * 3), "several columns with the same name"),
}


@pytest.mark.parametrize("name", LIES)
def test_an_index_that_lies_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    folder = write_pairs(tmp_path / "data", pairs(6), 2)
    change, message = LIES[name]
    _index(Path(folder), change)
    with pytest.raises(ThresherError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, (PoolError, UsageError))


def test_a_deeply_nested_index_is_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", pairs(2), 1)
    Path(folder, "index.json").write_text('{"shards": ' + "[" * 100_000)
    with pytest.raises(PoolError, match=r"index.json: cannot be read.*nested too deeply"):
        open_data(folder)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 9, "has 9 samples, but the index says 3"),
        (4, 0, "offsets of its samples are not in order"),
        (4, 2**32 - 1, "offsets of its samples are not in order"),
        (8, 2**31, "offsets of its samples are not in order"),
        (16, 2**32 - 1, "offsets of its samples are not in order"),
    ],
)
def test_a_shard_with_wrong_offsets_is_refused(tmp_path: Path, at: int, value: int, message: str) -> None:
    folder = write_pairs(tmp_path / "data", pairs(3), 1)
    path = Path(folder, "shard.00000.mds")
    content = bytearray(path.read_bytes())
    content[at : at + 4] = struct.pack("<I", value)
    path.write_bytes(content)
    with pytest.raises(PoolError, match=rf"shard.00000.mds: .*{message}"):
        read(folder)


def test_lengths_that_do_not_fill_a_sample_are_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", pairs(3), 1)
    path = Path(folder, "shard.00000.mds")
    content = bytearray(path.read_bytes())
    (begin,) = struct.unpack_from("<I", content, 8)
    struct.pack_into("<I", content, begin, 2**32 - 1)
    path.write_bytes(content)
    with pytest.raises(PoolError, match=r"the columns of sample 1 have [\d,]+ bytes, not \d+"):
        read(folder)


@pytest.mark.parametrize("codec", ["gz", "bz2", "zstd"])
def test_a_compressed_shard_that_holds_more_or_less_than_it_says(tmp_path: Path, codec: str) -> None:
    """Only what is needed is decompressed, so a bomb is not unpacked."""
    folder = Path(write_pairs(tmp_path / "data", pairs(3), 1))
    pack: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "zstd": lambda content: bytes(pa.compress(content, "zstd", asbytes=True)),
    }
    content = (folder / "shard.00000.mds").read_bytes()
    (folder / "shard.00000.mds").unlink()

    def put(packed: bytes) -> str:
        name = f"shard.00000.mds.{codec}"
        (folder / name).write_bytes(packed)
        zipped = {"basename": name, "bytes": len(packed), "hashes": {}}
        _index(folder, lambda index: index["shards"][0].update(compression=f"{codec}:1", zip_data=zipped))
        return str(folder)

    assert read(put(pack[codec](content))) == pairs(3)
    with pytest.raises(PoolError, match=rf"shard.00000.mds.{codec}: (ends before|cannot be read)"):
        read(put(pack[codec](content)[:-20]))
    with pytest.raises(PoolError, match=rf"shard.00000.mds.{codec}: ends before byte"):
        read(put(pack[codec](content[:-1])))
    assert read(put(pack[codec](content + bytes(10_000_000)))) == pairs(3)


def test_values_that_are_not_their_encoding_are_errors_or_broken_images(tmp_path: Path) -> None:
    good, cells = pairs(2), list[dict[str, bytes]]()
    for one, image in zip(good, (good[0].picture, struct.pack("<III", 2**31, 2**31, 3) + b"RGB" + b"x"), strict=True):
        cells.append({"image": image, "key": one.key.encode(), "text": one.text.encode()})
    folder = write(tmp_path / "pil", cells[1:], {**COLUMNS, "image": "pil"})
    assert broken(folder) == 1
    folder = write(
        tmp_path / "short",
        [{**cells[0], "image": struct.pack("<III", 4, 4, 3) + b"RGBabc"}],
        {**COLUMNS, "image": "pil"},
    )
    assert broken(folder) == 1
    folder = write(tmp_path / "text", [{**cells[0], "text": b"\xff\xfe\xff"}], COLUMNS)
    with pytest.raises(PoolError, match="the column 'text' has a value that is not str"):
        read(folder)
    nested = b"[" * 100_000
    folder = write(tmp_path / "json", [{**cells[0], "text": nested}], {**COLUMNS, "text": "json"})
    with pytest.raises(PoolError, match="the column 'text' has a value that is not json: .*nested too deeply"):
        read(folder)
    folder = write(tmp_path / "object", [{**cells[0], "text": b'{"a": 1}'}], {**COLUMNS, "text": "json"})
    with pytest.raises(PoolError, match="a text or a list of texts is read"):
        read(folder)
    for cell in (b"", b"\x08", b"\x08\xff", struct.pack("<BBQQ", 8, 11, 2**63, 2**63), b"\x22\x05\x01" + bytes(4)):
        folder = write(tmp_path / "array", [{**cells[0], "image": cell}], {**COLUMNS, "image": "ndarray"})
        assert broken(folder) == 1
    for cell in (b"", struct.pack("<II", 0, 2**31), struct.pack("<IIII", 0, 2, 9, 2**31)):
        folder = write(tmp_path / "list", [{**cells[0], "image": cell}], {**COLUMNS, "image": "list[png]"})
        assert broken(folder) == 1


def broken(folder: str) -> int:
    """The samples whose image cannot be read, or is missing, as ``doctor`` counts them."""
    report = doctor(folder, sample=5)
    assert report["damaged"] == []
    return int(report["samples"]) - sum(report["pictures"]["formats"].values())


def test_arrays_of_other_numbers_are_no_images(tmp_path: Path) -> None:
    folder = by_library(
        tmp_path / "data",
        {"image": "ndarray:float32", "text": "str"},
        [{"image": np.ones((3, 4), np.float32), "text": "t"}],
    )
    with pytest.raises(PoolError, match="the column 'image' for --image has list<item: float>"):
        open_data(folder)
