"""Indexes of DALI next to new tars. By hand, DALI 2.4 read such tars, and its wds2idx wrote the same bytes."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.resharding.common import hashes, keys_file, picture, plain, tar, tars_of_other_data
from tests.tar_indexes import slow_index
from thresher import Serial, api
from thresher.cli.main import main
from thresher.errors import OutputError, UsageError
from thresher.io.tar_index import members_in
from thresher.resharding import dali, indexes

HOW: dict[str, Any] = {"workers": 1, "progress": False}
LONG = "a/folder/" + "x" * 120


def reshard(data: Path | str, keys: list[str], out: Path, **more: Any) -> Any:
    return api.reshard(str(data), keys_file(out.with_suffix(".txt"), keys), out, **{"for_dali": True, **HOW, **more})


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_an_index_is_that_of_wds2idx(tmp_path: Path, form: int) -> None:
    """Also of long names, of names that are not ASCII, and of repeated samples, which get new names."""
    odd = ["a/b"] if form == tarfile.USTAR_FORMAT else [LONG, "é"]
    samples = [*plain(7), *((key, {"PNG": picture(9), "txt": b"long"}) for key in odd)]
    tar(tmp_path / "data" / "0.tar", samples, form)
    done = reshard(
        tmp_path / "data", ["000001", "000004", "000004", "000006", *odd, odd[0]], tmp_path / "out", per_shard=2
    )
    paths = sorted((tmp_path / "out").glob("*.tar"))
    assert len(paths) == done.shards >= 3
    for path in paths:
        index = path.with_suffix(".idx").read_bytes()
        assert index.decode() == slow_index(path)
        with tarfile.open(path) as file:
            wanted = [(one.name, one.offset_data, one.size) for one in file]
        assert [(one.name, one.offset, one.size) for one in members_in(index, path.stat().st_size)] == wanted
    assert done.notes[-1] == f"DALI reads {tmp_path / 'out'} by {len(paths)} indexes next to the tars"


@pytest.mark.parametrize("kind", ["parquet", pytest.param("csv", marks=pytest.mark.slow)])
def test_samples_that_are_written_from_other_data_are_indexed(tmp_path: Path, kind: str) -> None:
    paths = tars_of_other_data(kind, tmp_path, reshard)
    assert [path.with_suffix(".idx").read_text() for path in paths] == list(map(slow_index, paths))


def test_it_is_added_later_and_together_with_that_of_energon(tmp_path: Path) -> None:
    tar(tmp_path / "data" / "0.tar", plain(9))
    wanted = [f"{i:06d}" for i in range(7)]
    reshard(tmp_path / "data", wanted, tmp_path / "whole", per_shard=3, for_energon=True)
    reshard(tmp_path / "data", wanted, tmp_path / "out", per_shard=3, for_dali=False)
    assert not list((tmp_path / "out").glob("*.idx"))
    (tmp_path / "out" / ".00000001.idx.1x.tmp").write_text("left by a killed process")
    for _ in range(2):
        done = reshard(tmp_path / "data", wanted, tmp_path / "out", per_shard=3, for_energon=True)
        assert len(done.notes) == 2
        found, expected = hashes(tmp_path / "out"), hashes(tmp_path / "whole")
        assert {**found, "reshard.json": ""} == {**expected, "reshard.json": ""}  # has the name of the file of keys
    before = (tmp_path / "out" / "00000000.idx").stat().st_mtime_ns
    (tmp_path / "out" / "00000001.idx").write_text("v1.2 1\npng 512 1 of.another.tar\n")
    reshard(tmp_path / "data", wanted, tmp_path / "out", per_shard=3)
    assert (tmp_path / "out" / "00000001.idx").read_bytes() == (tmp_path / "whole" / "00000001.idx").read_bytes()
    assert (tmp_path / "out" / "00000000.idx").stat().st_mtime_ns == before  # the same again changes nothing
    reshard(tmp_path / "data", wanted[1:], tmp_path / "out", for_dali=False, overwrite=True)
    assert not list((tmp_path / "out").glob("*.idx"))  # no index of other tars


def test_tars_are_read_once_for_several_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar(tmp_path / "data" / "0.tar", plain(9))
    read, names = indexes._read, list[str]()
    monkeypatch.setattr(indexes, "_read", lambda path: (names.append(path.name), read(path))[1])
    how = {"per_shard": 3, "for_energon": True}
    done = reshard(tmp_path / "data", [f"{i:06d}" for i in range(7)], tmp_path / "out", **how)
    assert sorted(names) == ["00000000.tar", "00000001.tar", "00000002.tar"]
    assert [note.split(" reads ")[0] for note in done.notes] == ["Energon", "DALI"]
    again = reshard(tmp_path / "data", [f"{i:06d}" for i in range(7)], tmp_path / "out", **{**how, "for_dali": False})
    assert len(names) == 3  # all is there
    assert again.notes == (f"{tmp_path / 'out' / '.nv-meta'}: is there already, and was not changed",)


def test_a_tar_without_samples_has_no_index(tmp_path: Path) -> None:
    """A shard is empty if none of its samples could be converted; DALI and its tool refuse such tars."""
    tar(tmp_path / "00000000.tar", [])
    tar(tmp_path / "00000001.tar", plain(1))
    said = indexes.prepare(tmp_path, ["00000000.tar", "00000001.tar"], [dali], Serial())[0]
    assert said.endswith("by 1 index next to the tars; there is none for 1 tar without samples, which DALI refuses")
    assert [path.name for path in tmp_path.glob("*.idx")] == ["00000001.idx"]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "data" / "0.tar", [*plain(2), ("a b", {"png": picture(1), "txt": b"x"})])
    with pytest.raises(UsageError, match="--for-dali is for tars: add --as webdataset, or remove it to write parq"):
        reshard(tmp_path / "data", ["000000"], tmp_path / "a", form="parquet")
    keys = keys_file(tmp_path / "k", ["000000"])
    with pytest.raises(UsageError, match="write to a folder, and copy it to memory://out"):
        api.reshard(tmp_path / "data", keys, "memory://out", for_dali=True, **HOW)
    with pytest.raises(OutputError, match=r"cannot have a name with white space: 'a b.png'; rename .* --for-dali"):
        reshard(tmp_path / "data", ["a b"], tmp_path / "b")
    assert main(["reshard", str(tmp_path / "data"), keys, "-o", str(tmp_path / "c"), "--for-dali", "--quiet"]) == 0
    assert (tmp_path / "c" / "00000000.idx").exists()
