"""Indexes of wids: the contract, what reshard writes, and indexes that are wrong."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import wids
from fsspec.implementations.memory import MemoryFileSystem

from tests.objects import put
from thresher import api
from thresher.cli.main import main
from thresher.data import DataOptions, open_data
from thresher.data.layouts.wids import Wids
from thresher.errors import ChangedError, PoolError, ThresherError, UsageError
from thresher.testing import DataReaderContract
from thresher.testing.data_reader import DATA, Pair, pairs


def index_of(folder: Path, name: str = "index.json", **changes: Any) -> str:
    """Write an index of the tars of a folder."""
    shards = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            keys = {member.name.partition(".")[0] for member in tar}
        shards.append({"url": path.name, "nsamples": len(keys), "filesize": path.stat().st_size})
    (folder / name).write_text(json.dumps({"wids_version": 1, "shardlist": shards, **changes}))
    return str(folder / name)


class TestWids(DataReaderContract):
    plugin = Wids
    marks_cuts = True  # the sizes are in the index

    def write(self, folder: Path, what: Sequence[Pair], files: int) -> str:
        DATA["webdataset"](folder, what, files)
        return index_of(folder)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    DATA["webdataset"](folder, pairs(9), 2)
    return folder


def test_wids_reads_what_reshard_writes_and_so_do_we(tmp_path: Path, tars: Path) -> None:
    wanted = [pair.key for pair in pairs(9)][1:8]
    (tmp_path / "keys.txt").write_text("\n".join(wanted))
    done = api.reshard(str(tars), str(tmp_path / "keys.txt"), str(tmp_path / "out"), per_shard=3, workers=1)
    assert done.samples == 7
    index = tmp_path / "out" / "wids.json"
    dataset = wids.ShardListDataset(str(index), cache_dir=str(tmp_path / "cache"), keep=True)
    assert len(dataset) == 7
    assert [dataset[i]["__key__"] for i in range(7)] == wanted
    assert dataset[3][".txt"] == pairs(9)[4].text
    assert [sample.key for sample in open_data(str(index)).samples()] == wanted
    again = api.reshard(str(index), str(tmp_path / "keys.txt"), str(tmp_path / "again"), per_shard=3, workers=1)
    assert again.samples == 7
    for name in ("00000000.tar", "00000001.tar", "00000002.tar", "wids.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_an_index_of_the_tool_of_wids_is_read(tmp_path: Path, tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wids import wids_index

    monkeypatch.chdir(tars)
    names = sorted(path.name for path in tars.glob("*.tar"))
    fields = [{"url": name, "nsamples": wids.wids.compute_num_samples(name), "md5sum": "0" * 32} for name in names]
    (tars / "x.json").write_text(
        json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": fields, "name": "x"})
    )
    assert wids_index.load_remote_dsdesc_raw(str(tars / "x.json"))["name"] == "x"
    assert [sample.key for sample in open_data("x.json").samples()] == [pair.key for pair in pairs(9)]


def test_an_index_on_another_file_system(tars: Path) -> None:
    index_of(tars)
    try:
        put(tars, "memory://top/tars")
        data = open_data("memory://top/tars/index.json")
        assert (data.kind, len(list(data.samples()))) == ("wids", 9)
        fsspec.filesystem("memory").pipe_file("/top/bad.json", json.dumps(
            {"wids_version": 1, "shardlist": [{"url": "https://elsewhere.org/a.tar", "nsamples": 1}]}
        ).encode())  # fmt: skip
        with pytest.raises(UsageError, match="names a tar outside its folder"):
            open_data("memory://top/bad.json")
    finally:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


def test_the_order_and_the_choice_of_tars_are_those_of_the_index(tars: Path) -> None:
    text = json.loads(Path(index_of(tars)).read_text())
    inner = {"wids_version": 1, "shardlist": text["shardlist"][1:], "datasets": [{"shardlist": text["shardlist"][:1]}]}
    (tars / "other.json").write_text(json.dumps(inner))
    parts = open_data(str(tars / "other.json")).parts
    assert [Path(part.path).name for part in parts] == ["00001.tar", "00000.tar"]


def test_a_tar_that_is_named_twice_is_refused(tars: Path) -> None:
    text = json.loads(Path(index_of(tars)).read_text())
    (tars / "index.json").write_text(json.dumps({**text, "shardlist": [*text["shardlist"], text["shardlist"][0]]}))
    with pytest.raises(PoolError, match=r"names .*00000.tar twice"):
        open_data(str(tars / "index.json"))


def test_names_with_braces_and_stars_are_names(tars: Path) -> None:
    (tars / "00000.tar").rename(tars / "a{0..3}*.tar")
    assert len(list(open_data(index_of(tars)).samples())) == 9


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("../other.tar", "names a tar outside its folder"),
        ("/etc/x.tar", "names a tar outside its folder"),
        ("a/../../x.tar", "names a tar outside its folder"),
        ("s3://bucket/x.tar", "names a tar outside its folder"),
        ("x.tar::y.tar", "names a tar outside its folder"),
        ("link.tar", "names a tar outside its folder"),
        ("x\0.tar", "names a tar outside its folder"),
        ("pipe:rm -rf x", "is not a .tar"),
        ("x.parquet", "is not a .tar"),
        ("gone.tar", "no such file"),
    ],
)
def test_addresses_of_an_index_are_not_trusted(tars: Path, url: str, why: str) -> None:
    (tars.parent / "other.tar").write_bytes((tars / "00000.tar").read_bytes())
    (tars / "link.tar").symlink_to(tars.parent / "other.tar")
    (tars / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": [{"url": url, "nsamples": 1}]}))
    with pytest.raises(ThresherError, match=why) as error:
        open_data(str(tars / "index.json"))
    assert "\n" not in str(error.value)


def test_tars_elsewhere_are_read_if_the_user_allows_it(tars: Path) -> None:
    (tars.parent / "index.json").write_text(index_text := Path(index_of(tars)).read_text())
    (tars / "sub").mkdir()
    (tars / "sub" / "index.json").write_text(index_text.replace('"url": "', '"url": "../'))
    assert len(list(open_data(str(tars / "sub" / "index.json"), DataOptions(allow_outside=True)).samples())) == 9
    with pytest.raises(UsageError, match="--allow-outside"):
        open_data(str(tars / "sub" / "index.json"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"wids_version": 1}', "names no tars"),
        ('{"wids_version": 1, "shardlist": []}', "names no tars"),
        ('{"wids_version": 1, "shardlist": 3}', "has no list of tars"),
        ('{"wids_version": 1, "shardlist": [7]}', "entry 0 of shardlist is not valid"),
        ('{"wids_version": 1, "shardlist": [{"url": "a.tar"}]}', "entry 0 of shardlist is not valid"),
        ('{"wids_version": 1, "shardlist": [{"url": "a.tar", "nsamples": -1}]}', "is not valid"),
        ('{"wids_version": 1, "shardlist": [{"url": "a.tar", "nsamples": 1e999}]}', "is not valid"),
        ('{"wids_version": 1, "shardlist": [{"url": "a.tar", "nsamples": true}]}', "is not valid"),
        ('{"wids_version": 1, "shardlist": [{"url": "a.tar", "nsamples": %s}]}' % ("9" * 400), "is not valid"),
        ('{"wids_version": 2, "shardlist": []}', "version 1 is read"),
        ('{"wids_version": [[1]], "shardlist": []}', "version 1 is read"),
        ('{"wids_version": 1, "datasets": [{"source_url": "http://x/a.json"}]}', "names another index"),
        ('{"wids_version": 1, "shardlist": [], "datasets": [3]}', "has no list of tars"),
        (f'{{"wids_version": 1, "shardlist": {"[" * 100_000}1{"]" * 100_000}}}', "is one json"),
        ('{"wids_version": 1, "shardlist": [', "is one json"),
    ],
)  # fmt: skip
def test_indexes_that_are_wrong_are_one_line(
    tmp_path: Path, text: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises((PoolError, UsageError), match=why):
        open_data(str(tmp_path / "index.json"))
    assert main(["doctor", str(tmp_path / "index.json")]) != 0
    assert "Traceback" not in "".join(capsys.readouterr())


def test_an_index_that_is_stale_or_lies_is_found(tars: Path, tmp_path: Path) -> None:
    index = Path(index_of(tars))
    text = json.loads(index.read_text())
    lie = [{**one, "nsamples": one["nsamples"] + 1} for one in text["shardlist"]]
    index.write_text(json.dumps({**text, "shardlist": lie}))
    with pytest.raises(PoolError, match=r"00000.tar: has 3 samples, but .*index.json says 4; write the index again"):
        list(open_data(str(index)).samples())
    assert "says 4" in open_data(str(index)).parts[0].scan().damage
    (tmp_path / "keys.txt").write_text("k0001\n")
    assert api.reshard(str(index), str(tmp_path / "keys.txt"), str(tmp_path / "out"), workers=1).damaged == 2
    index.write_text(json.dumps(text))
    with (tars / "00001.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ChangedError, match=r"00001.tar: has .* bytes, but .*index.json says"):
        open_data(str(index))


class _Evil:
    def __reduce__(self) -> Any:
        return (Path("evil").touch, ())


def test_other_indexes_next_to_tars_are_not_read(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of DALI (text), energon (numbers) and webdataset (pickles): whatever they say, nothing changes."""
    monkeypatch.chdir(tars)
    whole = [sample.key for sample in open_data(str(tars)).samples()]
    for name in ("00000", "00001"):
        (tars / f"{name}.idx").write_text("v1.2 1\ntxt 512 99999999999 ../../x.txt\n")
        (tars / f"{name}.tar.idx").write_bytes(bytes(7))
        (tars / f"{name}.tar.index").write_bytes(pickle.dumps(_Evil()))
        (tars / f"{name}.index").write_bytes(pickle.dumps(_Evil()))
    assert [sample.key for sample in open_data(str(tars)).samples()] == whole
    assert api.doctor(str(tars), sample=2)["samples"] == 9
    assert not (tars / "evil").exists()


def test_a_tar_with_members_apart_is_not_counted_against_its_index(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, body in (
            ("a.png", pairs(1)[0].picture),
            ("b.png", pairs(1)[0].picture),
            ("a.txt", b"x"),
            ("b.txt", b"y"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    index = {"wids_version": 1, "shardlist": [{"url": "a.tar", "nsamples": 4}]}  # as wids counts them
    (tmp_path / "index.json").write_text(json.dumps(index))
    data = open_data(str(tmp_path / "index.json"))
    assert [sample.text for sample in data.samples()] == ["x", "y"]
    assert data.parts[0].scan().damage == ""
