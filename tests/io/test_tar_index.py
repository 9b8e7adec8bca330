"""Indexes of tars: what they say of a tar, and files that are none. tests/tar_indexes.py has the slow writer."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.resharding.common import plain, tar
from tests.tar_indexes import slow_index
from thresher.io.tar import Row, TarSample, Window, tar_samples
from thresher.io.tar_index import IndexProblem, index_of, index_path, members_in

GOOD = "v1.2 2\njpg 512 100 a.jpg txt 1536 3 a.txt\njpg 2560 0 b.jpg\n"
SIZE = 10_240


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_it_lists_the_members_of_the_tar(tmp_path: Path, form: int) -> None:
    """Of long names, folders and links too: those are not listed, and lie between members."""
    path = tar(
        tmp_path / "a.tar", [*plain(3), ("d/" + "x" * 200, {"jpg": b"1", "txt": b""}), ("e", {"cls": b"7"})], form
    )
    with tarfile.open(path, "a", format=form) as file:
        folder = tarfile.TarInfo("f")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        file.addfile(tarfile.TarInfo("g.tar.gz"), io.BytesIO())
    with open(path, "rb") as opened:
        samples = list(tar_samples(Window(opened, str(path)), str(path)))
    wanted = [(one.name, one.offset, one.size) for sample in samples for one in sample.members.values()]
    found = members_in(slow_index(path).encode(), path.stat().st_size)
    assert [(one.name, one.offset, one.size) for one in found] == wanted
    assert all(one.start <= one.offset - 512 for one in found)
    assert index_of(map(rows_of, samples)).decode() == slow_index(path)


def rows_of(sample: TarSample) -> list[Row]:
    return [Row(one.offset, one.size, one.name) for one in sample.members.values()]


def test_names_have_the_escapes_of_gnu_tar() -> None:
    r"""wds2idx calls ``tar --list``, which writes bytes that are not ASCII as \303 in the locale C."""
    found = members_in(rb"v1.2 1" b"\n" rb"jpg 512 1 \303\251\\b.jpg txt 1536 1 \377.txt" b"\n", SIZE)
    assert [one.name for one in found] == ["é\\b.jpg", r"\xff.txt"]
    assert members_in(GOOD.replace("\n", "\r\n").encode(), SIZE) == members_in(GOOD.encode(), SIZE)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "does not begin with v1.2 and a number"),
        ("\n", "does not begin with v1.2"),
        ("v1.2\n", "does not begin with v1.2"),
        ("v1.2 -1\n", "does not begin with v1.2"),
        (f"v1.2 {10**30}\n", "does not begin with v1.2"),
        ("v1.2 ٣\n", "does not begin with v1.2"),
        ("v1.1 1\njpg 512 1\n", "has the version v1.1; v1.2 is read"),
        ("v1.2 999999999999999\njpg 512 1 a.jpg\n", "says 999,999,999,999,999 samples, and has 1 lines"),
        (GOOD.replace("v1.2 2", "v1.2 1"), "says 1 samples, and has 2 lines"),
        (GOOD[:-1], "is cut off"),
        (GOOD[:-3], "is cut off"),
        (GOOD[:40], "is cut off"),
        (GOOD.replace(" b.jpg", ""), "line 3 is not an extension, an offset, a size and a name"),
        ("v1.2 1\n\n", "line 2 is not an extension"),
        (GOOD.replace("a.jpg", "a b.jpg"), "line 2 is not an extension"),
        (GOOD.replace(" 512 ", " -512 "), "line 2 has an offset or a size that is not a number"),
        (GOOD.replace(" 512 ", " 1e3 "), "is not a number"),
        (GOOD.replace(" 512 ", " 0x200 "), "is not a number"),
        (GOOD.replace(" 100 ", " -1 "), "is not a number"),
        (GOOD.replace(" 100 ", f" {'9' * 400} "), "is not a number"),
        (GOOD.replace(" 512 ", " 513 "), "line 2: no member begins at byte 513, after one that ends at 0"),
        (GOOD.replace(" 512 ", " 0 "), "no member begins at byte 0"),
        (GOOD.replace("2560", "1536"), "line 3: no member begins at byte 1,536, after one that ends at 2,048"),
        (GOOD.replace("2560", "2048"), "no member begins at byte 2,048"),
        (GOOD.replace(" 100 ", " 4000 "), "line 2: no member begins at byte 1,536, after one that ends at 4,608"),
        (GOOD.replace("2560", "10752"), "line 3 ends at byte 10,752, and the tar has 10,240"),
        (GOOD.replace("2560", "999999999999996416"), "and the tar has 10,240"),
        (GOOD.replace(" 0 b", " 999999999999999999 b"), "and the tar has 10,240"),
        (GOOD.replace("jpg 2560", "png 2560"), "line 3: png is not the extension of b.jpg"),
    ],
)  # fmt: skip
def test_files_that_are_no_index_of_the_tar(content: str, why: str) -> None:
    with pytest.raises(IndexProblem, match=why):
        members_in(content.encode(), SIZE)


def test_files_of_bytes_are_no_index() -> None:
    for content in (pickle.dumps(Path), bytes(range(256)), b"\xff" * 9, bytes(512), b"v1.2 1\n\x80"):
        with pytest.raises(IndexProblem):
            members_in(content, SIZE)


@given(st.binary(max_size=40), st.integers(0, len(GOOD)), st.integers(0, 9))
def test_any_bytes_are_members_or_a_problem(piece: bytes, at: int, cut: int) -> None:
    content = GOOD.encode()[:at] + piece + GOOD.encode()[at + cut :]
    try:
        found = members_in(content, SIZE)
    except IndexProblem:
        return
    end = 0
    for member in found:
        assert member.offset >= end + 512
        assert member.offset % 512 == 0
        end = member.offset + member.size
        assert end <= SIZE


def test_the_index_is_next_to_the_tar() -> None:
    assert index_path("s3://b/a.b/00.tar") == "s3://b/a.b/00.idx"
    assert index_path("x.TAR") == "x.idx"
    assert index_path("https://h/00.tar?key=1") == ""


def test_only_white_space_of_ascii_separates() -> None:
    """As in DALI: the ideographic space is part of a name."""
    row = Row(512, 1, "絵\u3000一\xa0\u2028.jpg")
    content = index_of([[row]])
    assert content.decode() == f"v1.2 1\njpg 512 1 {row.name}\n"
    assert [one.name for one in members_in(content, SIZE)] == [row.name]
    with pytest.raises(IndexProblem, match=r"white space: 'a\\x0bb.jpg'"):
        index_of([[Row(512, 1, "a\vb.jpg")]])
