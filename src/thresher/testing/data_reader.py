"""The contract of readers of raw data, as tests to inherit.

from thresher.testing import DataReaderContract

class TestMine(DataReaderContract):
    plugin = Mine

    def write(self, folder, pairs, files):
        ...  # write the pairs as data in your format, in this many files
        return str(folder)
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest

from thresher.data import DATA_READERS, Data, DataOptions, DataReader, Location, open_data
from thresher.errors import PoolError, ThresherError
from thresher.io.readers import recognising
from thresher.testing.readers import bytes_read, check_plugin, damaged


class Pair(NamedTuple):
    """An image and its caption.

    Attributes:
        key: Its key.
        text: The caption.
        picture: The image as a PNG file.
    """

    key: str
    text: str
    picture: bytes


def pairs(count: int, side: int = 6) -> list[Pair]:
    """Return pairs with random images; the same arguments give the same pairs."""
    from PIL import Image

    rng = np.random.Generator(np.random.Philox(count))
    result = []
    for i in range(count):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side + 2, 3), np.uint8)).save(out, "PNG")
        result.append(Pair(f"k{i:04d}", f"caption {i} é", out.getvalue()))
    return result


def _cut(what: Sequence[Pair], files: int) -> list[Sequence[Pair]]:
    edges = [round(len(what) * (i / files) ** 1.5) for i in range(files + 1)]
    return [what[lo:hi] for lo, hi in zip(edges, edges[1:], strict=False)]


def _webdataset(folder: Path, what: Sequence[Pair], files: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for i, some in enumerate(_cut(what, files)):
        with tarfile.open(folder / f"{i:05d}.tar", "w") as tar:
            for pair in some:
                for ending, content in (("png", pair.picture), ("txt", pair.text.encode())):
                    info = tarfile.TarInfo(f"{pair.key}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder)


def _table(some: Sequence[Pair]) -> Any:
    import pyarrow as pa

    cells = [{"bytes": pair.picture, "path": f"{pair.key}.png"} for pair in some]
    return pa.table({"image": cells, "text": [pair.text for pair in some], "key": [pair.key for pair in some]})


def _parquet(folder: Path, what: Sequence[Pair], files: int) -> str:
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for i, some in enumerate(_cut(what, files)):
        pq.write_table(_table(some), folder / f"train-{i:05d}.parquet")
    return str(folder)


def _arrow(folder: Path, what: Sequence[Pair], files: int) -> str:
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    for i, some in enumerate(_cut(what, files)):
        table = _table(some)
        with pa.OSFile(str(folder / f"{i:05d}.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    return str(folder)


def _folder(folder: Path, what: Sequence[Pair], files: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for pair in what:
        (folder / f"{pair.key}.png").write_bytes(pair.picture)
    entries = [json.dumps({"file_name": f"{pair.key}.png", "text": pair.text}) for pair in what]
    (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in entries), encoding="utf-8")
    return str(folder)


def _csv(folder: Path, what: Sequence[Pair], files: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for pair in what:
        (folder / pair.key).write_bytes(pair.picture)
    lines = ["filepath\ttitle", *(f"{pair.key}\t{pair.text}" for pair in what)]
    (folder / "list.csv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(folder / "list.csv")


def _jsonl(folder: Path, what: Sequence[Pair], files: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for pair in what:
        (folder / pair.key).write_bytes(pair.picture)
    lines = [json.dumps({"image": pair.key, "caption": pair.text}) for pair in what]
    (folder / "list.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(folder / "list.jsonl")


def mds_shards(folder: Path, samples: Sequence[Mapping[str, bytes]], columns: Mapping[str, str], files: int = 1) -> str:
    """Write samples as MDS, with nothing but the description of the format.

    Args:
        folder: The folder to write.
        samples: The encoded values of the columns of each sample.
        columns: The encoding of each column.
        files: Number of shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(columns)
    sizes = [{"int": 8, "float32": 4}.get(columns[name]) for name in names]
    kinds = {"column_encodings": [columns[name] for name in names], "column_names": names, "column_sizes": sizes}
    shards = []
    edges = [round(len(samples) * i / files) for i in range(files + 1)]
    for number, (lo, hi) in enumerate(zip(edges, edges[1:], strict=False)):
        bodies = []
        for sample in samples[lo:hi]:
            cells = [sample[name] for name in names]
            lengths = [len(cell) for cell, size in zip(cells, sizes, strict=True) if size is None]
            bodies.append(np.array(lengths, "<u4").tobytes() + b"".join(cells))
        config = json.dumps(kinds).encode()
        offsets = np.cumsum([4 * (len(bodies) + 2) + len(config), *map(len, bodies)])
        content = struct.pack("<I", len(bodies)) + offsets.astype("<u4").tobytes() + config + b"".join(bodies)
        name = f"shard.{number:05d}.mds"
        (folder / name).write_bytes(content)
        entry = {"format": "mds", "version": 2, "samples": len(bodies), "compression": None, "hashes": [], **kinds}
        raw = {"basename": name, "bytes": len(content), "hashes": {}}
        shards.append({**entry, "raw_data": raw, "zip_data": None, "size_limit": None})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return str(folder)


def _mds(folder: Path, what: Sequence[Pair], files: int) -> str:
    cells = [{"image": one.picture, "key": one.key.encode(), "text": one.text.encode()} for one in what]
    return mds_shards(folder, cells, {"image": "png", "key": "str", "text": "str"}, files)


def _lance(folder: Path, what: Sequence[Pair], files: int) -> str:
    import lance

    for some in _cut(what, files):
        lance.write_dataset(_table(some), str(folder), mode="append" if folder.exists() else "create")
    return str(folder)


DATA: Mapping[str, Callable[[Path, Sequence[Pair], int], str]] = {
    "webdataset": _webdataset,
    "parquet": _parquet,
    "arrow": _arrow,
    "folder": _folder,
    "csv": _csv,
    "jsonl": _jsonl,
    "lance": _lance,
    "mds": _mds,
}
"""Kind -> function that writes data of it: (folder, pairs, number of files). These are Thresher's own kinds."""


class DataReaderContract:
    """The contract of readers of raw data.

    Attributes:
        plugin: The reader.
        opening: The share of the bytes that opening may read.
        marks_cuts: Whether a truncated file can be detected; False for lines of text, for example.
    """

    plugin: ClassVar[type[DataReader]]
    opening: ClassVar[float] = 0.2
    marks_cuts: ClassVar[bool] = True

    def write(self, folder: Path, what: Sequence[Pair], files: int) -> str:
        """Write pairs in ``files`` files, or in one if the format has only one; return the location."""
        raise NotImplementedError

    def test_it_is_a_plugin(self) -> None:
        """It is found by its name, and all its options have defaults."""
        check_plugin(DATA_READERS, self.plugin)

    def test_it_recognises_its_own_and_no_others(self, tmp_path: Path) -> None:
        """It reads its own data, and leaves that of Thresher's own kinds to their readers."""
        own = Location(self.write(tmp_path / "own", pairs(5), 2))
        assert type(recognising(DATA_READERS, own)) is self.plugin
        assert self.plugin().recognise(own)
        for name, write in DATA.items():
            reader = recognising(DATA_READERS, Location(write(tmp_path / name, pairs(5), 2)))
            assert reader is not None
            assert reader.name == name, f"takes data of {name}"
        assert not self.plugin().recognise(Location(str(tmp_path / "nothing")))

    @pytest.mark.parametrize("files", [1, 3])
    @pytest.mark.parametrize("per_part", [3, 10_000])
    def test_samples_are_those_written(self, tmp_path: Path, files: int, per_part: int) -> None:
        """Keys, captions and images are read in order, for any number of files; parts can be pickled."""
        wanted = pairs(11)
        data = open_data(self.write(tmp_path / "data", wanted, files), DataOptions(per_part=per_part))
        assert data.kind == self.plugin.name
        assert _read(data) == wanted
        again: Data = pickle.loads(pickle.dumps(data))  # noqa: S301 - pickled above
        assert again == data
        assert _read(again) == wanted
        for part in data.parts:
            assert part.rows in (None, len(list(part.samples())))
            assert part.stamp() == part.stamp()
            assert part.stamp()

    @pytest.mark.parametrize("per_part", [3, 10_000])
    def test_some_samples_are_found_without_the_others(self, tmp_path: Path, per_part: int) -> None:
        """What resharding uses: keys and places, samples at places, rows of a table."""
        data = open_data(self.write(tmp_path / "data", pairs(11), 2), DataOptions(per_part=per_part))
        for part in data.parts:
            samples, found = list(part.samples()), part.scan()
            assert list(found.keys) == [sample.key for sample in samples]
            assert not found.damage
            at_n = found.start_n if found.at_n is None else found.at_n
            assert at_n.tolist() == [sample.at for sample in samples] == sorted(sample.at for sample in samples)
            some = np.arange(len(samples)) % 3 != 1
            placed = part.scan_at(at_n[some])
            assert list(placed.keys) == [key for key, one in zip(found.keys, some, strict=True) if one]
            assert placed.start_n.tolist() == found.start_n[some].tolist()
            chosen = list(part.chosen(found.start_n[some]))
            assert [one.key for one in chosen] == list(placed.keys)
            twice = np.repeat(found.start_n[some], 2)
            batches = list(part.batches(None, twice, 2))
            assert sum(map(len, batches)) == len(twice)
            assert all(len(batch) <= 2 and batch.schema.equals(part.schema()) for batch in batches)
            with pytest.raises(PoolError):
                part.scan_at(at_n[-1:] + 10**9)

    def test_opening_reads_headers_only(self, tmp_path: Path) -> None:
        """Opening reads few bytes, as counted by the operating system."""
        location = self.write(tmp_path / "data", pairs(40, 160), 2)
        whole = sum(path.stat().st_size for path in (tmp_path / "data").rglob("*") if path.is_file())
        _, read = bytes_read(lambda: open_data(location))
        assert read < self.opening * whole + 300_000, f"opening reads {read:,} of {whole:,} bytes"

    def test_damaged_files_are_named(self, tmp_path: Path) -> None:
        """Truncated files and files with a changed byte give an error that names the file, or are read correctly."""
        wanted = pairs(5)
        location = self.write(tmp_path / "data", wanted, 2)
        for path, what in damaged(tmp_path / "data"):
            try:
                read = _read(open_data(location))
            except PoolError as error:
                assert path.name in str(error) or "image" in str(error), f"{path.name}, {what}: {error}"
            except ThresherError:
                pass
            else:
                cut = what.startswith("cut") and self.marks_cuts
                assert not cut or read == wanted, f"{path.name}, {what}: is read without an error"

    @pytest.mark.parametrize("form", ["webdataset", "parquet"])
    def test_it_can_be_resharded(self, tmp_path: Path, form: Any) -> None:
        """Keys, captions and images stay the same."""
        from thresher.resharding import reshard

        wanted = pairs(7)
        location = self.write(tmp_path / "data", wanted, 2)
        (tmp_path / "keys.txt").write_text("".join(f"{pair.key}\n" for pair in wanted[1:6]), encoding="utf-8")
        done = reshard(location, str(tmp_path / "keys.txt"), str(tmp_path / "out"), form=form, per_shard=2, workers=1)
        assert (done.samples, done.missing, done.aside) == (5, 0, 0)
        assert sorted(_read(open_data(str(tmp_path / "out")))) == wanted[1:6]

    def test_doctor_reads_it(self, tmp_path: Path) -> None:
        """``thresher doctor`` reports what is in the data."""
        from thresher.check.data import doctor

        report = doctor(self.write(tmp_path / "data", pairs(9), 2), sample=9)
        assert (report["kind"], report["samples"], report["exact"]) == (self.plugin.name, 9, True)
        assert (report["pictures"]["looked_at"], report["pictures"]["broken"]) == (9, 0)
        assert (report["captions"]["empty"], report["keys"]["repeated"], report["damaged"]) == (0, 0, [])


def _read(data: Data) -> list[Pair]:
    return [Pair(sample.key, sample.text, sample.stored()) for sample in data.samples()]
