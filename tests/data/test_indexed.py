"""Remote tars found by the index next to them: fewer bytes, the same samples, whatever the index says."""

from __future__ import annotations

import io
import pickle
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from tests.ahead_fs import Ahead, memory
from tests.resharding.common import hashes, keys_file, listed, plain, pool, tar
from tests.tar_indexes import slow_index
from thresher import api
from thresher.data import indexed
from thresher.data.layouts.webdataset import TarPart
from thresher.io.tar_index import IndexProblem

LONG = "d/" + "x" * 150

pytestmark = pytest.mark.usefixtures("memory")
__all__ = ["memory"]


def put(path: Path, index: str | bytes | None = None) -> str:
    """Copy a tar and its index to memory."""
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/d/{path.name}", path.read_bytes())
    if index is not None:
        fs.pipe_file(f"/d/{path.stem}.idx", index if isinstance(index, bytes) else index.encode())
    return f"ahead://d/{path.name}"


def big(count: int, size: int = 20_000) -> list[tuple[str, dict[str, bytes]]]:
    made = random.Random(0)
    return [(f"{i:06d}", {"jpg": made.randbytes(size), "txt": b"x", "json": b"{}"}) for i in range(count)]


def reshard(data: str, keys: list[str], out: Path) -> tuple[Any, list[str]]:
    """Reshard to a folder; return the result and what was said."""
    said: list[str] = []
    from thresher.resharding import reshard as whole
    from thresher.runtime.progress import Silent

    class Heard(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    done = whole(data, keys_file(out.with_suffix(".txt"), keys), str(out), workers=1, progress=Heard())
    return done, said


def test_a_few_samples_are_a_small_part_of_the_bytes(tmp_path: Path) -> None:
    """Without an index every byte is read to find them, and with it hardly more than they have."""
    path = tar(tmp_path / "0.tar", big(200))
    wanted = ["000007", "000100", "000101", "000199"]
    location = put(path)
    size = path.stat().st_size
    whole, _ = reshard(location, wanted, tmp_path / "a")
    assert Ahead.counts["bytes"] > size
    fsspec.filesystem("memory").pipe_file("/d/0.idx", slow_index(path).encode())
    Ahead.counts.clear()
    done, said = reshard(location, wanted, tmp_path / "b")
    assert Ahead.counts["bytes"] < 0.25 * size
    assert Ahead.counts["requests"] < 60
    assert (replace(done, out=""), said) == (replace(whole, out=""), [])
    assert done.samples == 4
    found = {name: one for name, one in hashes(tmp_path / "b").items() if name != "reshard.json"}
    assert found == {name: one for name, one in hashes(tmp_path / "a").items() if name != "reshard.json"}


def test_samples_at_known_places_are_a_small_part_of_the_bytes(tmp_path: Path) -> None:
    """As a pool has them that was embedded from the tar: only their headers, and then their bytes, are read."""
    path = tar(tmp_path / "0.tar", big(200, 60_000))
    location, starts = put(path), TarPart(str(path)).scan().start_n.tolist()
    rows = [(f"{i:06d}", "0.tar", start) for i, start in enumerate(starts)]
    done = api.reshard(location, pool(tmp_path, rows, [3, 100, 101, 199]), tmp_path / "out", workers=1, progress=False)
    assert (done.samples, done.by) == (4, "place")
    assert Ahead.counts["bytes"] < 0.1 * path.stat().st_size
    assert Ahead.counts["requests"] < 25
    assert [name for name, _ in listed(tmp_path / "out")][::3] == [f"{i:06d}.jpg" for i in (3, 100, 101, 199)]


def odd_tar(path: Path, form: int) -> list[str]:
    """A tar with long names, folders, links, metadata, members without a dot and empty ones; its keys."""
    samples = [*plain(5), (LONG, {"png": b"1", "txt": b"two"}), ("e", {"cls": b""}), *plain(3, 90)]
    tar(path, samples[:4], form)
    with tarfile.open(path, "a", format=form) as file:
        for name, kind, body in [
            ("f", tarfile.DIRTYPE, b""),
            ("README", tarfile.REGTYPE, b"no dot"),
            ("f/.hidden", tarfile.REGTYPE, b"no key"),
            ("__meta__/a.json", tarfile.REGTYPE, b"of webdataset"),
            ("000003.lnk", tarfile.SYMTYPE, b""),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(body), "x" if kind == tarfile.SYMTYPE else ""
            file.addfile(info, io.BytesIO(body))
        for key, contents in samples[4:]:
            for ending, body in contents.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size, info.mtime = len(body), 1.5  # pax metadata, as webdataset writes it
                file.addfile(info, io.BytesIO(body))
    return [key for key, _ in samples]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_samples_are_those_of_the_headers(tmp_path: Path, form: int) -> None:
    keys = odd_tar(tmp_path / "0.tar", form)
    put(tmp_path / "0.tar", slow_index(tmp_path / "0.tar"))
    whole = TarPart(str(tmp_path / "0.tar")).scan()
    assert list(whole.keys) == keys
    for chosen in ([0, 3, 4, 5, 9], list(range(len(keys))), []):
        found = TarPart("/d/0.tar", "ahead").scan_chosen(lambda _, chosen=chosen: np.array(chosen, np.int64))
        assert found.said == ""
        assert list(found.keys) == [keys[i] for i in chosen]
        assert found.start_n.tolist() == whole.start_n[chosen].tolist()
        assert found.length_n.tolist() == whole.length_n[chosen].tolist()


def changed(index: str, line: int, old: str, new: str) -> str:
    lines = index.split("\n")
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new, 1)
    return "\n".join(lines)


def without(index: str, *lines: int) -> str:
    kept = [line for number, line in enumerate(index.split("\n")) if number not in lines]
    return "\n".join([f"v1.2 {len(kept) - 2}", *kept[1:]])


def wrong_indexes(index: str) -> dict[str, str | bytes]:
    n = index.count("\n") - 1
    return {
        "empty": "",
        "short": without(index, n),
        "without the first": without(index, 1),
        "without one in the middle": without(index, 20),
        "of other names": index.replace("0000", "1000"),
        "with one other name": changed(index, 6, "000005.jpg", "000077.jpg"),
        "of a tar with a longer text": changed(index, 6, " 1 000005.txt", " 2 000005.txt"),
        "huge": index.replace(f"v1.2 {n}", f"v1.2 {10**14}"),
        "negative": changed(index, 3, " 1 ", " -1 "),
        "beyond the end": changed(index, n, " 2 ", f" {10**9} "),
        "numbers": np.arange(99, dtype="<u8").tobytes(),
        "a pickle": pickle.dumps(Path),
        "of no samples": "v1.2 0\n",
        "longer than the tar": index + " " * 10**7,
        "not compared with anything": "v1.1 1\njpg 512 1\n",
    }


@pytest.mark.parametrize("wrong", wrong_indexes("v1.2 0\n" + "a 000005.jpg  1 000005.txt  1   2 \n" * 9))
def test_a_wrong_index_changes_nothing_and_is_said(tmp_path: Path, wrong: str) -> None:
    path = tar(tmp_path / "0.tar", big(40, 700))
    index = slow_index(path)
    location = put(path, wrong_indexes(index)[wrong])
    wanted = ["000005", "000019", "000039"]
    done, said = reshard(location, wanted, tmp_path / "out")
    assert (done.samples, done.missing) == (3, 0)
    assert [name for name, _ in listed(tmp_path / "out")] == [
        f"{k}.{e}" for k in wanted for e in ("jpg", "txt", "json")
    ]
    assert len(said) == 1
    assert said[0].startswith("/d/0.idx: is not used, because it ")
    assert said[0].endswith("; write it again, or remove it")


def test_a_key_that_no_index_has_is_looked_for_in_the_tars(tmp_path: Path) -> None:
    """Of samples that are not used, names are believed; so a key that seems to be missing may be there."""
    path = tar(tmp_path / "0.tar", big(100, 700))
    put(path, slow_index(path).replace("000064.", "000099a."))
    done, said = reshard("ahead://d/0.tar", ["000063", "000064"], tmp_path / "out")
    assert (done.samples, done.missing) == (2, 0)
    assert said == ["ahead://d/0.tar: its indexes do not have 1 key; reading the headers of the tars instead"]
    done, said = reshard("ahead://d/0.tar", ["000063", "no such key"], tmp_path / "more")
    assert (done.samples, done.missing, len(said)) == (1, 1, 1)


def test_an_index_of_some_samples_is_never_all(tmp_path: Path) -> None:
    """A filtered index has the names and places of real samples; tiny ones could hide where metadata usually are."""
    tiny = [(f"{i:04d}", {"txt": b"x"}) for i in range(200)]
    path = tar(tmp_path / "0.tar", tiny)
    index = slow_index(path)
    made = random.Random(0)
    drops = [
        range(1, 200, 2),
        range(2, 201, 2),
        [199],
        [200],
        *(made.sample(range(1, 201), n) for n in (1, 30, 90, 150)),
    ]
    for drop in drops:
        put(path, without(index, *drop))
        with pytest.raises(IndexProblem):
            indexed.listed("ahead", "/d/0.tar")


def test_what_an_index_leaves_out_is_not_read_at_once(tmp_path: Path) -> None:
    """It may be almost the whole tar."""
    path = tar(tmp_path / "0.tar", big(60, 30_000))
    put(path, without(slow_index(path), *range(1, 60)))
    with pytest.raises(IndexProblem, match=r"leaves out 1,933,824 bytes between two members"):
        indexed.listed("ahead", "/d/0.tar")
    assert Ahead.counts["bytes"] < 10_000


def test_members_apart_are_found_as_without_an_index(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "0.tar", [("a", {"jpg": b"1"}), ("b", {"jpg": b"2"}), ("a", {"txt": b"3"}), ("c", {"jpg": b"4"})]
    )
    with pytest.raises(IndexProblem, match="lie apart"):
        indexed.listed("ahead", put(path, slow_index(path)).removeprefix("ahead:/"))
    done, said = reshard(put(path), ["c"], tmp_path / "out")
    assert (done.samples, done.damaged, len(said)) == (1, 1, 1)


def test_a_repeated_ending_is_a_new_sample_as_in_the_tar(tmp_path: Path) -> None:
    """wds2idx writes them in one line."""
    path = tar(tmp_path / "0.tar", [("a", {"jpg": b"1", "txt": b"1"}), ("a", {"jpg": b"2"}), ("b", {"jpg": b"3"})])
    assert slow_index(path).count("\n") == 3
    put(path, slow_index(path))
    found = indexed.listed("ahead", "/d/0.tar")
    assert found is not None
    assert [sample.start for sample in found.samples] == TarPart(str(path)).scan().start_n.tolist()


def test_a_missing_index_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar(tmp_path / "0.tar", plain(2))
    put(path)
    assert indexed.listed("ahead", "/d/0.tar") is None
    info = Ahead.info

    def denied(self: Any, path: str, **how: Any) -> Any:
        if path.endswith(".idx"):
            raise PermissionError("S3 says so if listing is not allowed")
        return info(self, path, **how)

    monkeypatch.setattr(Ahead, "info", denied)
    assert indexed.listed("ahead", "/d/0.tar") is None
    assert api.reshard("ahead://d", keys_file(tmp_path / "k", ["000001"]), tmp_path / "o", progress=False).samples == 1
