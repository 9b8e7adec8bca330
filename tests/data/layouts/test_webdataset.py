"""Tars, against tarfile and webdataset."""

from __future__ import annotations

import io
import random
import re
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset.tariterators as wds
from hypothesis import given
from hypothesis import strategies as st

from tests.data.common import picture, sample_tar, tar_of, told
from thresher.cli.main import main
from thresher.data import open_data
from thresher.data.layouts.webdataset import TarPart, tars_at
from thresher.errors import PoolError
from thresher.io.pictures import ENDINGS
from thresher.io.tar import Member, Window, json_of, members, tar_samples

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
OTHERS = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)

words = st.sampled_from(
    ["a", "b", "key", "\u00fc\u4e2d", "with space", "x" * 60, "y" * 90, "d.ot", "__c__", "\U0001f600"]
)
endings = st.sampled_from(["jpg", "JPG", "png", "txt", "json", "cls.txt", "seg.png", ""])


@st.composite
def names(draw: st.DrawFn) -> str:
    folders = draw(st.lists(words, max_size=3))
    stem, ending = draw(words), draw(endings)
    return "/".join([*folders, f"{stem}.{ending}" if ending else stem])


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """Members of all kinds in one of the formats; some headers with binary numbers, some without an end."""
    fmt = draw(st.sampled_from(FORMATS))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=fmt) as tar:
        for _ in range(draw(st.integers(0, 8))):
            info = tarfile.TarInfo(draw(names()))
            info.type = draw(st.sampled_from([*[tarfile.REGTYPE] * 8, tarfile.AREGTYPE, tarfile.CONTTYPE, *OTHERS]))
            info.mtime = draw(st.sampled_from([0, 1_700_000_000]) if fmt == tarfile.USTAR_FORMAT else st.floats(0, 2e9))
            if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = draw(names())
            content = draw(st.sampled_from([b"", b"x", b"z" * 511, b"w" * 512, b"v" * 1300])) if info.isreg() else b""
            info.size = len(content)
            if fmt == tarfile.PAX_FORMAT and draw(st.booleans()):
                info.pax_headers = {"comment": "one\ntwo=" + draw(words), "size": str(info.size)}
            try:
                header = info.tobuf(fmt, "utf-8", "surrogateescape")
            except ValueError:  # a name too long for ustar
                continue
            if draw(st.booleans()):
                header = binary_size(header, info.size)
            file.write(header + content + bytes(-len(content) % 512))
        tar.offset = file.tell()
    ended = file.getvalue()
    bare = ended[: tar_end(ended)]
    return (
        draw(st.sampled_from([ended, bare, ended + b"garbage", bare + bytes(1024) + b"more" * 200])) if bare else ended
    )


def binary_size(header: bytes, size: int) -> bytes:
    """The last header with its size in GNU's binary form."""
    rest, last = header[:-512], bytearray(header[-512:])
    last[124:136] = b"\x80" + size.to_bytes(11, "big")
    last[148:156] = b" " * 8
    last[148:156] = b"%06o\0 " % sum(last)
    return rest + bytes(last)


def tar_end(data: bytes) -> int:
    return len(data.rstrip(b"\0")) + -len(data.rstrip(b"\0")) % 512


def found(data: bytes) -> list[Member]:
    return list(members(Window(io.BytesIO(data), "x.tar"), "x.tar"))


def grouped(data: bytes, span: int = 1 << 20) -> list[tuple[str, dict[str, bytes]]]:
    window = Window(io.BytesIO(data), "x.tar", span)
    return [
        (g.key, {e: data[m.offset : m.offset + m.size] for e, m in g.members.items()})
        for g in tar_samples(window, "x.tar")
    ]


@given(tars())
def test_members_are_tarfiles(data: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(i.name, i.isreg(), i.offset, i.offset_data, i.size if i.isreg() else 0) for i in tar]
    assert [(m.name.rstrip("/"), m.regular, m.start, m.offset, m.size) for m in found(data)] == expected


def webdataset(data: bytes) -> list[tuple[str, dict[str, bytes]]]:
    """Samples as open_clip's loader groups them."""
    from open_clip_train.data import group_by_keys_nothrow

    files = ({**one, "__url__": "x"} for one in wds.tar_file_iterator(io.BytesIO(data)))
    return [(s.pop("__key__"), {k: v for k, v in s.items() if k != "__url__"}) for s in group_by_keys_nothrow(files)]


@given(tars(), st.sampled_from([512, 700, 1 << 20]))
def test_samples_are_webdatasets(data: bytes, span: int) -> None:
    assert grouped(data, span) == webdataset(data)


def test_a_name_that_is_only_an_ending_is_passed_over() -> None:
    data = tar_of([("f/a.jpg", b"1"), ("f/.DS_Store", b"2"), ("f/._a.jpg", b"3"), ("f/a.txt", b"4"), (".txt", b"5")])
    assert grouped(data) == [("f/a", {"jpg": b"1", "txt": b"4"})]


def test_a_key_twice_in_a_row_is_two_samples() -> None:
    data = tar_of([("a.jpg", b"1"), ("a.txt", b"2"), ("a.jpg", b"3"), ("a.txt", b"4")])
    assert grouped(data) == [("a", {"jpg": b"1", "txt": b"2"}), ("a", {"jpg": b"3", "txt": b"4"})]


def test_old_folders_with_a_size_have_no_contents() -> None:
    info = tarfile.TarInfo("folder/")
    info.type, info.size = tarfile.AREGTYPE, 700
    data = info.tobuf(tarfile.USTAR_FORMAT) + tar_of([("a.jpg", b"1")])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["folder", "a.jpg"]
    assert [m.name for m in found(data)] == ["folder/", "a.jpg"]


def test_names_that_are_no_utf8_can_be_written() -> None:
    data = tar_of([("caf\udce9.jpg", b"1")], tarfile.GNU_FORMAT)
    ((key, _),) = grouped(data)
    assert key == "caf\\xe9"


@pytest.mark.parametrize("ending", ENDINGS)
def test_samples_have_place_caption_and_uid(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(
        tar_of(
            [
                (f"a.{ending.upper()}", b"A"),
                ("a.txt", b"\xef\xbb\xbf one\n"),
                ("b.json", b'{"uid": "u", "caption": ["", "two\\ud800"]}'),
                (f"b.{ending}", b"BB"),
                ("c.json", b'{"uid": 3, "text": " three "}'),
            ]
        )
    )
    a, b, c = TarPart(str(path)).samples()
    assert (a.key, a.text, a.stored(), a.at, a.why) == ("a", "one", b"A", 0, "")
    assert (b.key, b.text, b.uid, b.stored(), b.at) == ("b", "two\\ud800", "u", b"BB", 2048)
    assert (c.text, c.uid, c.picture, c.why) == ("three", "", None, "has no image (members: json)")
    with pytest.raises(PoolError, match="has no image"):
        c.stored()


def test_json_is_read_or_nothing(tmp_path: Path) -> None:
    texts = [b'{"a": 1}', b"[1]", b"{", b"[" * 100_000, b"\xff", b"1" * 10_000, b'{"a": ' + b"1" * 5000 + b"}", b""]
    data = tar_of([(f"{i}.json", text) for i, text in enumerate(texts)])
    window = Window(io.BytesIO(data), "x.tar")
    assert [json_of(window, g.members["json"]) for g in tar_samples(window, "x.tar")] == [{"a": 1}, *[{}] * 7]
    assert json_of(window, None) == {}


@given(st.integers(0, 2**32), st.sampled_from([1, 100, 512, 5000]))
def test_a_window_reads_what_the_file_has(seed: int, span: int) -> None:
    draw = random.Random(seed)
    data = draw.randbytes(3000)
    window = Window(io.BytesIO(data), "x", span)
    for _ in range(30):
        offset, size = draw.randrange(4000), draw.randrange(1500)
        assert window.read(offset, size) == data[offset : offset + size]


def test_a_sparse_tar_of_20_gb_is_scanned_with_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    size = 1 << 31
    with open(path, "wb") as file:
        for i in range(10):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(size, io.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    assert path.stat().st_size > 20e9
    tracemalloc.start()
    samples = list(TarPart(str(path)).samples())
    with pytest.raises(PoolError, match=r"2,147,483,648 bytes; the limit is 1,073,741,824"):
        samples[0].stored()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [s.key for s in samples] == [str(i) for i in range(10)]
    assert peak < 8 << 20


def test_notes_of_very_many_lines_are_read_in_one_go() -> None:
    """A megabyte of the shortest lines there are; copying what is left after each would be 87 GB."""
    record = b"6 a=b\n"
    data = pax(record * 170_000) + tar_of([("a.jpg", b"1")])
    assert [m.name for m in found(data)] == ["a.jpg"]


def pax(notes: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A header of pax with such notes."""
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = kind, len(notes)
    return info.tobuf(tarfile.USTAR_FORMAT) + notes + bytes(-len(notes) % 512)


# --- where tars are -------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for i in (0, 1, 2, 10):
        (tmp_path / f"s{i}.tar").write_bytes(sample_tar([f"k{i}"]))
    return tmp_path


def at(location: str) -> list[str]:
    return [Path(path).name for _, path in tars_at(location)]


def test_tars_are_named_in_many_ways(shards: Path) -> None:
    every = ["s0.tar", "s1.tar", "s2.tar", "s10.tar"]
    assert at(str(shards)) == every
    assert at(f"{shards}/*.tar") == every
    assert at(f"{shards}/s{{0..2}}.tar") == every[:3]
    assert at(f"{shards}/s{{10,1}}.tar") == ["s10.tar", "s1.tar"]
    assert at(f"{shards}/s2.tar::{shards}/s{{0..1}}.tar") == ["s2.tar", "s0.tar", "s1.tar"]
    assert at(f"file://{shards}/*.tar") == every
    assert at(f"file://{shards}") == every
    assert [s.key for s in open_data(str(shards)).samples()] == ["k0", "k1", "k2", "k10"]


def test_a_name_with_braces_or_stars_may_be_a_files_own(shards: Path) -> None:
    for name in ("s[0].tar", "s{0..1}.tar", "s{.tar", "s*.tar"):
        (shards / name).write_bytes(b"")
        assert at(str(shards / name)) == [name]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("s{0..4}.tar", "s3.tar does not exist"),
        ("t*.tar", "t*.tar does not exist"),
        ("s{0.tar", "a brace is not closed"),
        ("s0.tar::s0.tar", "twice"),
        ("s0.tar::", "an empty name is not a .tar"),
        ("s0.tar::x.zip::s1.tar", "x.zip is not a .tar"),
        ("s0.tar.gz", "decompress them: gzip -dk ./*.tar.gz"),
        ("s0.tar::a/s1.TAR.XZ", "decompress them: xz -dk a/*.TAR.XZ"),
    ],
)
def test_tars_that_are_not_there(shards: Path, monkeypatch: pytest.MonkeyPatch, given: str, says: str) -> None:
    monkeypatch.chdir(shards)
    with pytest.raises(PoolError, match=re.escape(says)):
        tars_at(given)


def test_tars_elsewhere() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for i in (2, 10):
        memory.pipe(f"/tars/s{i}.tar", sample_tar([f"k{i}"]))
    for location in ("memory://tars", "memory://tars/*.tar", "memory://tars/s{2,10}.tar"):
        assert [(s.key, s.stored()) for s in open_data(location).samples()] == [("k2", picture()), ("k10", picture())]


# --- mutations ------------------------------------------------------------------------------------


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid tar with bits turned, blocks left out, doubled or swapped, pieces put in or cut off."""
    data = sample_tar(["a", "f/b", "l" * 120], draw(st.sampled_from(FORMATS[1:])))
    for _ in range(draw(st.integers(1, 4))):
        blocks = [data[i : i + 512] for i in range(0, len(data), 512)]
        i, j = (draw(st.integers(0, max(0, len(blocks) - 1))) for _ in range(2))
        what = draw(st.sampled_from(["bit", "cut", "splice", "drop", "double", "swap", "field"]))
        if what == "bit":
            spot = draw(st.integers(0, max(0, len(data) - 1)))
            data = data[:spot] + bytes([data[spot] ^ 1 << draw(st.integers(0, 7))]) + data[spot + 1 :] if data else data
        elif what == "cut":
            data = data[: draw(st.integers(0, len(data)))]
        elif what == "splice":
            spot = draw(st.integers(0, len(data)))
            data = data[:spot] + draw(st.binary(max_size=600)) + data[spot:]
        elif what == "field" and blocks and len(blocks[i]) == 512:
            lo, hi = draw(st.sampled_from([(0, 100), (124, 136), (156, 157), (257, 263), (345, 500)]))
            value = draw(st.binary(min_size=hi - lo, max_size=hi - lo))
            block = bytearray(blocks[i][:lo] + value + blocks[i][hi:])
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            blocks[i] = bytes(block)
            data = b"".join(blocks)
        elif what == "drop":
            data = b"".join(blocks[:i] + blocks[i + 1 :])
        elif what == "double":
            data = b"".join(blocks[: i + 1] + blocks[i:])
        elif blocks:
            blocks[i], blocks[j] = blocks[j], blocks[i]
            data = b"".join(blocks)
    return data


def quietly(items: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from items
    except PoolError as error:
        message = told(error)
        assert message.startswith("x.tar: ")


@given(mutated())
def test_mutated_tars_are_read_or_refused(data: bytes) -> None:
    window = Window(io.BytesIO(data), "x.tar")
    last = 0
    for member in quietly(members(window, "x.tar")):
        assert last <= member.start < member.offset <= member.offset + member.size <= len(data)
        last = member.end
    for group in quietly(tar_samples(window, "x.tar")):
        json_of(window, group.members.get("json"))
        assert group.key
        group.key.encode()


def test_picture_of_a_sample_is_the_members_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(sample_tar(["a", "b"]))
    assert [s.stored() for s in TarPart(str(path)).samples()] == [picture(0), picture(1)]


def test_folders_of_tars_are_joined_and_those_a_level_down_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "0.tar", "w") as archive:
            member = tarfile.TarInfo(f"{name}.txt")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
    assert [sample.key for sample in open_data(f"{tmp_path}/a::{tmp_path}/b").samples()] == ["a", "b"]
    with pytest.raises(PoolError, match=f"has its tars in {tmp_path}/a::{tmp_path}/b; give that instead"):
        open_data(str(tmp_path))


def test_a_second_archive_in_a_file_is_not_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``cat a.tar b.tar``: tar and webdataset read only the first."""
    one, two = (
        tar_of([(f"{i}.{ending}", data) for i in numbers for ending, data in (("png", picture(i)), ("txt", b"x"))])
        for numbers in (range(3), range(3, 6))
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ab.tar").write_bytes(one + two)
    assert main(["doctor", str(tmp_path / "in")]) == 0
    found = capsys.readouterr().out
    assert f"another archive begins at byte {len(one):,}, after the end of the first" in found
    assert "(3 samples before it)" in found
    (tmp_path / "in" / "ab.tar").write_bytes(one + bytes(100_000))  # only padding
    assert main(["doctor", str(tmp_path / "in")]) == 0
    assert "another archive" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_sample_whose_image_is_a_link_says_so(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as file:
        for key in ("a", "b", "c"):
            link = tarfile.TarInfo(f"{key}.png")
            link.type, link.linkname = kind, "other.png"
            text = tarfile.TarInfo(f"{key}.txt")
            text.size = 2
            for member in (text, link) if key == "c" else (link, text):
                file.addfile(member, io.BytesIO(b"hi") if member is text else None)
    said = "has no image (members: txt): its png is a link or another special file, which is not read; pack the images "
    said += "themselves: tar --dereference --hard-dereference"
    assert [sample.why for sample in open_data(str(tmp_path)).samples()] == [said] * 3
