"""What Megatron Energon reads of new tars. That it does is checked in tests/export/formats/against_energon.py."""

from __future__ import annotations

import json
import re
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.resharding.common import hashes, keys_file, picture, plain, tar, tars_of_other_data
from thresher import Serial, api
from thresher.cli.main import main
from thresher.errors import OutputError, UsageError
from thresher.resharding import energon, indexes

HOW: dict[str, Any] = {"workers": 1, "progress": False}
LONG = "a/folder/" + "x" * 120


def reshard(data: Path | str, keys: list[str], out: Path, **more: Any) -> Any:
    return api.reshard(str(data), keys_file(out.with_suffix(".txt"), keys), out, **{"for_energon": True, **HOW, **more})


def read_by_energon(path: Path) -> tuple[list[int], list[str]]:
    """The index of a tar and its keys, in the way of ``energon prepare``."""
    starts, keys = [], list[str]()
    with tarfile.open(path, "r:*") as file:
        for member in file:
            match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
            if member.isreg() and match and not re.match(r"__[^/]*__($|/)", member.name):
                if keys[-1:] != [match[1]]:
                    starts.append(member.offset)
                    keys.append(match[1])
        return [*starts, file.offset], keys


def index_of(path: Path) -> list[int]:
    content = path.with_suffix(".tar.idx").read_bytes()
    return list(struct.unpack(f"<{len(content) // 8}Q", content))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_an_index_is_that_of_energon(tmp_path: Path, form: int) -> None:
    """Also of long names, of repeated samples, which get new names, and of members that lie apart in the data."""
    samples = [*plain(7), (LONG if form != tarfile.USTAR_FORMAT else "a/b", {"png": picture(9), "txt": b"long"})]
    tar(tmp_path / "data" / "0.tar", samples, form)
    wanted = ["000001", "000004", "000004", samples[-1][0], samples[-1][0], "000006"]
    reshard(tmp_path / "data", wanted, tmp_path / "out", per_shard=2)
    counts, seen = {}, []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        starts, keys = read_by_energon(path)
        assert index_of(path) == starts
        counts[path.name] = len(keys)
        seen += keys
    assert seen == ["000001", "000004", "000004-1", "000006", samples[-1][0], f"{samples[-1][0]}-1"]
    meta = tmp_path / "out" / ".nv-meta"
    assert json.loads((meta / ".info.json").read_text()) == {"shard_counts": counts}
    assert yaml.safe_load((meta / "split.yaml").read_text()) == {"split_parts": {"train": [*counts]}, "exclude": []}
    assert yaml.safe_load((meta / "dataset.yaml").read_text()) == {
        "sample_type": {"__module__": "megatron.energon", "__class__": "CaptioningSample"},
        "field_map": {"image": "png", "caption": "txt"},
    }


def test_a_tar_without_samples_has_an_index(tmp_path: Path) -> None:
    """A shard is empty if none of its samples could be converted."""
    tar(tmp_path / "00000000.tar", [])
    indexes.prepare(tmp_path, ["00000000.tar"], [energon], Serial())
    assert index_of(tmp_path / "00000000.tar") == read_by_energon(tmp_path / "00000000.tar")[0] == [0]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_samples_that_are_written_from_other_data_are_indexed(tmp_path: Path, kind: str) -> None:
    for path in tars_of_other_data(kind, tmp_path, reshard):
        assert index_of(path) == read_by_energon(path)[0]


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        ({"jpg": picture(9, "JPEG"), "txt": b"x"}, {"image": "png,jpg", "caption": "txt"}),
        ({"JPG": picture(9, "JPEG"), "txt": b"x"}, {"image": "png,JPG", "caption": "txt"}),
        ({"png": picture(9), "TXT": b"x"}, None),
        ({"png": picture(9)}, None),
        ({"txt": b"x"}, None),
        ({"gif": picture(9, "GIF"), "txt": b"x"}, None),
    ],
)
def test_the_kind_of_samples_is_that_of_all(tmp_path: Path, last: dict[str, bytes], kind: Any) -> None:
    tar(tmp_path / "data" / "0.tar", [*plain(2), ("z", last)])
    done = reshard(tmp_path / "data", ["000000", "000001", "z"], tmp_path / "out", per_shard=2)
    found = yaml.safe_load((tmp_path / "out" / ".nv-meta" / "dataset.yaml").read_text())
    crude = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    assert found.get("field_map", found) == (kind or crude)
    assert done.notes[-1].endswith("image and caption" if kind else "not every sample has an image and a .txt")


def test_it_is_resumed_and_added_later_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar(tmp_path / "data" / "0.tar", plain(9))
    wanted = [f"{i:06d}" for i in range(7)]
    reshard(tmp_path / "data", wanted, tmp_path / "whole", per_shard=3)
    reshard(tmp_path / "data", wanted, tmp_path / "out", per_shard=3, for_energon=False)
    assert not list((tmp_path / "out").glob("*.idx"))
    expected, write = hashes(tmp_path / "whole"), energon._write
    for name in ("dataset.yaml", "split.yaml", ".info.json"):

        def killed(path: Path, content: str, name: str = name) -> None:
            if path.name == name:
                raise KeyboardInterrupt
            write(path, content)

        with monkeypatch.context() as patched:
            patched.setattr(energon, "_write", killed)
            with pytest.raises(KeyboardInterrupt):
                reshard(tmp_path / "data", wanted, tmp_path / "out", per_shard=3)
        assert not (tmp_path / "out" / ".nv-meta" / ".info.json").exists()
    (tmp_path / "out" / ".nv-meta" / ".split.yaml.1x.tmp").write_text("left by a killed process")
    for _ in range(2):
        reshard(tmp_path / "data", wanted, tmp_path / "out", per_shard=3)
        found = hashes(tmp_path / "out")
        assert {name: one for name, one in found.items() if name != "reshard.json"} == {
            name: one for name, one in expected.items() if name != "reshard.json"
        }


def test_no_index_of_other_tars_is_left(tmp_path: Path) -> None:
    tar(tmp_path / "data" / "0.tar", plain(9))
    reshard(tmp_path / "data", ["000001", "000002"], tmp_path / "out", per_shard=1)
    with pytest.raises(OutputError, match="--overwrite"):
        reshard(tmp_path / "data", ["000003"], tmp_path / "out", for_energon=False)
    reshard(tmp_path / "data", ["000003"], tmp_path / "out", for_energon=False, overwrite=True)
    assert not [name for name in hashes(tmp_path / "out") if "nv-meta" in name or name.endswith(".idx")]
    reshard(tmp_path / "data", ["000003"], tmp_path / "out")
    (tmp_path / "out" / ".nv-meta" / "mine.yaml").write_text("x: 1\n")
    with pytest.raises(OutputError, match="nv-meta"):
        reshard(tmp_path / "data", ["000004"], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / ".nv-meta" / "mine.yaml").exists()


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "data" / "0.tar", plain(2))
    with pytest.raises(UsageError, match="--for-energon is for tars: add --as webdataset, or remove it to write parq"):
        reshard(tmp_path / "data", ["000000"], tmp_path / "a", form="parquet")
    with pytest.raises(UsageError, match="write to a folder, and copy it to memory://out"):
        api.reshard(tmp_path / "data", keys_file(tmp_path / "k", ["000000"]), "memory://out", for_energon=True, **HOW)
    keys = keys_file(tmp_path / "k", ["000000"])
    words = ["reshard", str(tmp_path / "data"), keys, "-o", str(tmp_path / "c"), "--for-energon", "--quiet"]
    assert main(words) == 0
    assert (tmp_path / "c" / ".nv-meta" / ".info.json").exists()
