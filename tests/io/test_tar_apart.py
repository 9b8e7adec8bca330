"""Samples whose members lie apart in a tar (webdataset#407, ray#65044, webdataset#11), against a slow reference."""

from __future__ import annotations

import io
import random
import tarfile
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.common import picture, tar_of
from tests.resharding.common import keys_file, listed, pool
from thresher.check.data import doctor
from thresher.data import open_data
from thresher.data.layouts.webdataset import TarPart
from thresher.data.members import APART
from thresher.errors import PoolError
from thresher.io.tar_apart import _MOST
from thresher.resharding import reshard

FORMATS = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
Group = tuple[str, dict[str, bytes]]

member = st.tuples(st.sampled_from(["a", "b", "c", "d/a", "é"]), st.sampled_from(["jpg", "txt", "json", "b.png"]))


def slowly(members: list[tuple[str, bytes]]) -> list[Group]:
    """Runs of a key; a run joins the sample of its key that has none of its extensions, if there is exactly one."""
    pieces: list[Group] = []
    for name, content in members:
        key, _, ending = name.partition(".")
        if not pieces or pieces[-1][0] != key or ending in pieces[-1][1]:
            pieces.append((key, {}))
        pieces[-1][1][ending] = content
    samples: list[Group] = []
    for key, found in pieces:
        fits = [sample for sample in samples if sample[0] == key and not sample[1].keys() & found.keys()]
        if len(fits) == 1:
            fits[0][1].update(found)
        else:
            samples.append((key, dict(found)))
    return samples


def written(path: Path, members: list[tuple[str, bytes]], fmt: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(members, fmt))
    return path


def shuffled(count: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """Pictures and captions of some samples, in any order."""
    members = [(f"{i:04d}.{ending}", content) for i in range(count)
               for ending, content in (("png", picture(i)), ("txt", f"caption {i}".encode()))]  # fmt: skip
    random.Random(seed).shuffle(members)
    return members


def by_ending(count: int) -> list[tuple[str, bytes]]:
    """All pictures, then all captions."""
    return sorted(shuffled(count), key=lambda one: one[0].partition(".")[::-1])


@settings(max_examples=60, deadline=None)
@given(found=st.lists(member, max_size=16), fmt=st.sampled_from(FORMATS), often=st.sampled_from([1, 1, 1, 20]))
def test_samples_are_those_of_the_slow_reference(found: list[tuple[str, str]], fmt: int, often: int) -> None:
    members = [(f"{key}{i}.{ending}", f"{key}{i} {number} {ending}".encode()) for i in range(often)
               for number, (key, ending) in enumerate(found)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "x.tar", members, fmt)
        part, expected = TarPart(str(path)), slowly(members)
        content = path.read_bytes()
        with open(path, "rb") as file:
            assert [
                (sample.key, {e: content[m.offset : m.offset + m.size] for e, m in sample.members.items()})
                for _, sample, _ in part._whole(file)
            ] == expected
        # Every way to read the tar finds the same samples at the same places.
        samples, scanned = list(part.samples()), part.scan(uids=True)
        assert [sample.key for sample in samples] == scanned.keys == [key for key, _ in expected]
        assert [sample.at for sample in samples] == scanned.start_n.tolist()
        assert [list(endings) for endings in part.members()] == [list(one) for _, one in expected]
        assert list(part.chosen(scanned.start_n)) == samples
        placed = part.scan_at(scanned.start_n)
        assert placed.keys == scanned.keys
        assert placed.length_n.tolist() == scanned.length_n.tolist()
        if samples:
            assert scanned.headers is not None
            assert placed.headers is not None
            every = range(len(samples))
            rows = [scanned.headers(scanned.start_n * 0 + i).rows(0) for i in every]
            assert rows == [placed.headers(scanned.start_n * 0 + i).rows(0) for i in every]


@pytest.mark.parametrize("by", ["key", "place"])
def test_reshard_writes_the_members_of_a_sample_together(tmp_path: Path, by: str) -> None:
    members = shuffled(20)
    path = written(tmp_path / "in" / "0.tar", members)
    places = [(sample.key, path.name, sample.at) for sample in TarPart(str(path)).samples()]
    rows = range(0, 20, 3)
    keys = [places[row][0] for row in rows]
    sel = pool(tmp_path, places, rows) if by == "place" else keys_file(tmp_path / "k", keys)
    done = reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"))
    assert (done.by, done.samples) == (by, 7)
    contents = dict(members)
    found = listed(tmp_path / "out")
    assert [name.partition(".")[0] for name, _ in found[::2]] == keys
    assert [name.partition(".")[0] for name, _ in found[1::2]] == keys
    assert Counter(name for name, _ in found) == Counter(f"{key}.{e}" for key in keys for e in ("png", "txt"))
    assert all(contents[name] == content for name, content in found)
    with tarfile.open(tmp_path / "out" / "00000000.tar") as archive:
        assert len(archive.getnames()) == 14


def test_uids_and_captions_at_the_end_of_a_tar_are_not_lost(tmp_path: Path) -> None:
    """``tar -r`` with json that was made later."""
    members = [(f"{i}.{e}", c) for i in range(5) for e, c in (("png", picture(i)), ("txt", b"x"))]
    members += [(f"{i}.json", b'{"uid": "%032x"}' % i) for i in range(4)]
    written(tmp_path / "in" / "0.tar", members)
    samples = list(open_data(str(tmp_path / "in")).samples())
    assert [(one.key, one.text, one.uid) for one in samples] == [
        *((str(i), "x", f"{i:032x}") for i in range(4)), ("4", "x", "")
    ]  # fmt: skip
    done = reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", [f"{2:032x}"]), str(tmp_path / "out"))
    assert (done.by, [name for name, _ in listed(tmp_path / "out")]) == ("uid", ["2.png", "2.txt", "2.json"])


def test_doctor_counts_them(tmp_path: Path) -> None:
    written(tmp_path / "in" / "0.tar", [*shuffled(9), ("ok.png", picture(50)), ("ok.txt", b"a caption")])
    found = doctor(str(tmp_path / "in"))
    assert (found["samples"], found["missing"]["count"], found["captions"]["empty"]) == (10, 0, 0)
    assert found["keys"]["repeated"] == 0
    assert found["notes"] == {APART: 7}
    told = [warning for warning in found["warnings"] if "apart" in warning]
    assert len(told) == 1, "one warning about one thing"
    assert told[0].startswith("open_clip trains on 3 of 10 samples: 7 have their members apart, such as ")


def test_doctor_counts_jsons_that_lie_apart(tmp_path: Path) -> None:
    """open_clip trains on these, but without what the json has, such as a uid."""
    pairs = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", picture(i)), ("txt", b"a"))]
    written(tmp_path / "in" / "0.tar", [*pairs, *((f"{i}.json", b"{}") for i in range(3))])
    told = [warning for warning in doctor(str(tmp_path / "in"))["warnings"] if "apart" in warning]
    assert told == [f"3 of 3 (100.0%) samples {APART}"]


def test_a_key_that_repeats_is_still_two_samples(tmp_path: Path) -> None:
    members = [("a.png", picture(0)), ("a.txt", b"1"), ("b.txt", b"b"), ("a.txt", b"2"), ("a.png", picture(1))]
    part = TarPart(str(written(tmp_path / "0.tar", members)))
    assert [(s.key, s.text) for s in part.samples()] == [("a", "1"), ("b", "b"), ("a", "2")]
    assert doctor(str(tmp_path))["keys"]["repeated"] == 1


def test_what_may_belong_to_two_samples_belongs_to_none(tmp_path: Path) -> None:
    members = [("a.png", picture(0)), ("b.txt", b"b"), ("a.png", picture(1)), ("c.txt", b"c"), ("a.txt", b"whose?")]
    part = TarPart(str(written(tmp_path / "0.tar", members)))
    assert [(s.key, s.text, s.picture is not None) for s in part.samples()] == [
        ("a", "", True), ("b", "b", False), ("a", "", True), ("c", "c", False), ("a", "whose?", False)
    ]  # fmt: skip


def test_a_key_of_very_many_runs_repeats(tmp_path: Path) -> None:
    """It is not searched for what belongs together, which would take the square of their number."""
    members = [(name, b"") for i in range(_MOST + 1) for name in (f"a.{i}", "b.txt")]
    part = TarPart(str(written(tmp_path / "0.tar", members)))
    assert Counter(sample.key for sample in part.samples()) == {"a": _MOST + 1, "b": _MOST + 1}


def test_tars_elsewhere_are_refused_with_a_count() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/apart/0.tar", tar_of([("ok.png", picture(0)), ("ok.txt", b"x"), *by_ending(3)]))
    (part,) = open_data("memory://apart").parts
    keys: list[str] = []
    says = r"/apart/0.tar: members of 3 samples lie apart, as those of 0000; .*tar --sort=name -cf NEW.tar FOLDER"
    with pytest.raises(PoolError, match=says):
        keys.extend(sample.key for sample in part.samples())
    assert keys == ["ok", *(f"{i:04d}" for i in range(3)), *(f"{i:04d}" for i in range(3))]
    scanned = part.scan()
    assert scanned.keys == ["ok"]
    assert scanned.skipped == tuple((f"{i:04d}", "has members that lie apart") for i in range(3))
    assert "members of 3 samples lie apart" in scanned.damage


@pytest.mark.slow
def test_memory_grows_by_some_dozen_bytes_a_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the pictures, and not with the length of names."""
    monkeypatch.setattr("thresher.io.tar_apart._HEADERS", 512)

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.tar"
        with open(path, "wb") as file:
            for ending in ("jpg", "txt"):
                for i in range(count):
                    info = tarfile.TarInfo(f"{'folder' * 10}/{i:06d}.{ending}")
                    info.size = 512
                    file.write(info.tobuf(tarfile.GNU_FORMAT))
                    file.write(bytes(512))
            file.write(bytes(1024))
        tracemalloc.start()
        assert sum(1 for _ in TarPart(str(path)).samples()) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(1_000), peak(3_000)
    assert (many - few) / (2 * 2_000) < 100, (few, many)


def test_damage_ends_the_search_and_is_told(tmp_path: Path) -> None:
    content = tar_of(by_ending(4))
    where = content.rindex(b"0003.txt\0")
    path = tmp_path / "0.tar"
    path.write_bytes(content[:where] + b"damage" + content[where + 6 :])
    texts: list[str] = []
    with pytest.raises(PoolError, match="damaged at byte"):
        texts.extend(sample.text for sample in TarPart(str(path)).samples())
    assert texts == ["caption 0", "caption 1", "", ""], "the run before the damage may be cut off, as always"


def test_a_stream_written_by_tar_in_any_order(tmp_path: Path) -> None:
    """``find | tar`` with folders and ``./`` before the names, as GNU tar writes them."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for folder in (".", "./x"):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        for name, content in shuffled(6):
            info = tarfile.TarInfo(f"./x/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "0.tar").write_bytes(out.getvalue())
    found = {sample.key: sample.text for sample in open_data(str(tmp_path)).samples()}
    assert found == {f"./x/{i:04d}": f"caption {i}" for i in range(6)}
