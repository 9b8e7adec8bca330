"""What is skimmed of a tar is what reading it thoroughly gives, whatever stands there."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.resharding.common import hashes, keys_file, plain, pool, tar
from tests.resharding.test_tars import places
from thresher.data.layouts.webdataset import Samples
from thresher.errors import PoolError
from thresher.io import tar_fast
from thresher.io.tar import Window
from thresher.io.tar_fast import FastWindow, stretch
from thresher.resharding import job, reshard

NAMES = (
    "a.jpg", "a.json", "a.txt", "a.JPG", "b.jpg", "b.seg.png", "b.json", "b.b/c.jpg", "d/e.f.jpg", "d/e.json",
    "d/e.txt", "d/.jpg", ".jpg", "none", "__meta__/x.jpg", "../up.jpg", "x/../y.jpg", "/root.jpg", "c:x.jpg",
    "back\\slash.jpg",
    "é.jpg", "é.json", "line\nbreak.jpg", "n" * 99 + ".j", "n" * 120 + ".jpg", "p/" * 60 + "q.jpg", "z.", "..jpg",
)  # fmt: skip
UID = json.dumps({"uid": "0123456789abcdef" * 2}).encode()
members = st.tuples(
    st.sampled_from(NAMES) | st.sampled_from(NAMES[:8]),
    st.sampled_from(
        [b"", b"x", b"y" * 600, b"z" * 5_000, UID, UID + b" " * 4_000, b'{"a": {"uid": "%s"}}' % (b"0" * 32)]
    ),
    st.sampled_from([0, 0, 1_000, 1_500.25]),
    st.sampled_from([b"0", b"0", b"0", b"0", b"0", b"\0", b"2", b"5", b"7"]),
)


def made(found: list[tuple[str, bytes, float, bytes]], form: int) -> bytes:
    """A tar of members; times with a fraction become notes, as webdataset's writer makes them."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as file:
        for name, content, time, kind in found:
            info = tarfile.TarInfo(name)
            info.mtime, info.type = time if form == tarfile.PAX_FORMAT else int(time), kind
            info.size = len(content) if kind not in b"25" else 0
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def read(window: Window, *, uids: bool) -> tuple[object, ...]:
    found, damage = Samples(uids=uids), ""
    try:
        found.read(window, "x.tar")
    except PoolError as error:
        damage = str(error)
    told = found.scanned(damage)
    return told.keys, told.start_n.tolist(), told.length_n.tolist(), told.uids, told.skipped, told.damage


@settings(max_examples=400, deadline=None)
@given(
    found=st.lists(members, max_size=14),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.PAX_FORMAT]),
    uids=st.booleans(),
    harm=st.none() | st.tuples(st.floats(0, 1), st.none() | st.binary(min_size=1, max_size=2)),
    few=st.sampled_from([1, 3, 7, 512]),
    apart=st.sampled_from([1, 2, 64]),
)
def test_skimming_is_reading(found, form, uids, harm, few, apart) -> None:
    content = made(found, form)
    if harm is not None:  # cut off, or some bytes of a header or anything else are others
        at = int(harm[0] * len(content))
        content = content[:at] + (b"" if harm[1] is None else harm[1] + content[at + len(harm[1]) :])
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with (
            open(file.name, "rb") as slow,
            open(file.name, "rb") as quick,
            patch.multiple(tar_fast, _FEW=few, _APART=apart),
        ):
            assert read(FastWindow(quick, "x.tar"), uids=uids) == read(Window(slow, "x.tar"), uids=uids)


@pytest.mark.parametrize("time", [7, 7.5])
@pytest.mark.parametrize("most", [5, 6, 7, 12, 100])
def test_a_stretch_has_the_whole_samples_among_some_headers(tmp_path: Path, most: int, time: float) -> None:
    endings = ("jpg", "json", "txt")
    samples = [
        (f"{i}.{ending}", UID if ending == "json" else b"x" * 3_000, time, b"0") for i in range(9) for ending in endings
    ]
    (tmp_path / "x.tar").write_bytes(made(samples, tarfile.PAX_FORMAT))
    with open(tmp_path / "x.tar", "rb") as file:
        found = stretch(FastWindow(file, "x.tar"), 0, most, jsons=True)
        seen = most if time == 7 else most // 2
        whole = min((seen - 1) // 3, 8)  # the last of a stretch may go on
        if not whole:
            assert found is None
            return
        assert found is not None
        assert found.keys == [str(i) for i in range(whole)]
        assert found.jsons == [UID] * whole
        size = 3 * 512 + 3_072 + 512 + 3_072 + (0 if time == 7 else 3 * 1_024)
        assert found.start_n.tolist() == [size * i for i in range(whole)]
        assert found.end == size * whole


def test_almost_all_tars_are_skimmed_to_the_end(tmp_path: Path) -> None:
    """Of webdataset's own writer, too, and after a member that is odd."""
    samples = [(f"{i}.{ending}", b"x", 1.5, b"0") for i in range(2_000) for ending in ("jpg", "txt")]
    (tmp_path / "x.tar").write_bytes(made([("folder", b"", 0, b"5"), *samples], tarfile.PAX_FORMAT))
    with open(tmp_path / "x.tar", "rb") as file:
        window, slowly = FastWindow(file, "x.tar"), []
        found = Samples(uids=False)
        found.add_one = lambda window, group: slowly.append(group.key) or Samples.add_one(found, window, group)  # type: ignore[method-assign]
        found.read(window, "x.tar")
    assert found.scanned("").keys == [str(i) for i in range(2_000)]
    assert len(slowly) <= 64 + 1


@pytest.mark.slow
def test_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tar(tmp_path / "in" / f"{i}.tar", plain(5, 5 * i)) for i in range(4)]
    by_key = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(0, 20, 3)])
    by_place = pool(tmp_path, places(paths), range(0, 20, 3))
    for sel, by in ((by_key, "key"), (by_place, "place")):
        assert reshard(str(tmp_path / "in"), sel, str(tmp_path / f"{by}1"), workers=2).by == by
        with monkeypatch.context() as soon:
            soon.setattr(job, "_LONG", 1e-12)
            assert reshard(str(tmp_path / "in"), sel, str(tmp_path / f"{by}2"), workers=2, processes=True).by == by
        a, b = hashes(tmp_path / f"{by}1"), hashes(tmp_path / f"{by}2")
        assert {**a, "reshard.json": ""} == {**b, "reshard.json": ""}
    # Where a place holds no more, processes say so, too, and keys are looked for.
    paths[3].write_bytes(tar(tmp_path / "3.tar", plain(5, 14)).read_bytes())
    monkeypatch.setattr(job, "_LONG", 1e-12)
    assert reshard(str(tmp_path / "in"), by_place, str(tmp_path / "moved"), workers=2, processes=True).by == "key"
