"""Files that nobody should trust: what exactly happens with each kind, alone and among good ones.

Every case makes a location in a folder. Expected is, by key, what each sample comes to ("ok: caption", or a part of the
reason it is set aside for), and parts of the errors of whole files, in their order. Nothing else may be raised, nothing
may hang, and no file may change.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.common import arrow_of, outcome, parquet_of, picture, sample_tar, table, tar_of
from tests.data.layouts.test_webdataset import pax
from thresher.cli.main import main
from thresher.io.paths import is_unsafe

GOOD = {"a": "ok: caption a", "b": "ok: caption b"}
TWO = sample_tar(["a", "b"])
BARE = TWO.rstrip(b"\0") + bytes(-len(TWO.rstrip(b"\0")) % 512)  # without the blocks that end a tar
SECOND = 6 * 512  # where the headers of b begin: a.png, a.txt and a.json are a header and a block each
THREE, THIRD = sample_tar(["a", "b", "d"]), 12 * 512


@dataclass(frozen=True)
class Case:
    make: Callable[[Path], Path]
    found: dict[str, str] = field(default_factory=dict)
    errors: tuple[str, ...] = ()


CASES: dict[str, Case] = {}


def bad(name: str, make: Callable[[Path], Path], found: dict[str, str] | None = None, *errors: str) -> None:
    assert name not in CASES
    CASES[name] = Case(make, found or {}, errors)


def file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def tree(**files: bytes | Callable[[Path], object]) -> Callable[[Path], Path]:
    """A folder with files; a function is called with the path."""

    def make(folder: Path) -> Path:
        for name, content in files.items():
            path = folder / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content) if isinstance(content, bytes) else content(path)
        return folder / "data"

    return make


def link(to: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(to)


# --- tars -----------------------------------------------------------------------------------------


def tar(name: str, content: bytes, found: dict[str, str] | None = None, *errors: str) -> None:
    """A tar alone, and between two good ones."""
    bad(f"tar: {name}", file("x.tar", content), found, *errors)
    good = {"p": "ok: caption p", "q": "ok: caption q"}
    around = tree(**{"1.tar": sample_tar(["p"]), "2.tar": content, "3.tar": sample_tar(["q"])})
    bad(f"tars: {name}", around, {**(found or {}), **good}, *(e.replace("x.tar", "2.tar") for e in errors))


def header(name: str = "c.png", size: int = 0, kind: bytes = tarfile.REGTYPE, **more: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for what, value in more.items():
        setattr(info, what, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def resized(size: bytes, name: str = "c.png") -> bytes:
    """A header with these bytes for a size, and a right sum."""
    block = bytearray(header(name))
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def whole(name: str, content: bytes) -> bytes:
    return header(name, len(content)) + content + bytes(-len(content) % 512)


flipped = bytearray(THREE)
flipped[THIRD + 3] ^= 1
# Damage takes with it the sample before: nobody knows whether it had more members.
NONE = {"c": "has no image (members: txt)"}
LONG = "l" * 300

tar("empty", b"", None, "x.tar: is empty, not a tar")
tar("random bytes", np.random.default_rng(0).bytes(5000), None, "x.tar: is not a tar")
tar("one byte", b"x", None, "x.tar: is cut off at byte 1, in the header")
tar("gzip", gzip.compress(TWO), None, "x.tar: is compressed (gzip)")
tar("short gzip", gzip.compress(b""), None, "x.tar: is cut off at byte")
tar("a page of the web", b"<!DOCTYPE html><html>404</html>" * 40, None, "x.tar: is not a tar")
tar("nothing but zeros", bytes(10_240))
tar("cut in a header", THREE[: THIRD + 100], {"a": GOOD["a"]}, "x.tar: is cut off at byte 6,244, in the header")
tar("cut in contents", THREE[: THIRD + 600], {"a": GOOD["a"]}, "x.tar: is cut off at byte 6,744, in the member 'd.png'")
tar("cut in padding", BARE[:-10], GOOD)
tar("cut after a header", THREE[: THIRD + 512], {"a": GOOD["a"]}, "in the member 'd.png'")
tar("cut in a long name", sample_tar([LONG], tarfile.GNU_FORMAT)[:700], None, "cut off at byte 700, in the metadata")
tar("cut after a long name", sample_tar([LONG], tarfile.GNU_FORMAT)[:1024], None, "byte 1,024, in the header")
tar("no end", BARE, GOOD)
tar(
    "zeros in between",
    TWO[:SECOND] + bytes(1024) + TWO[SECOND:],
    {"a": GOOD["a"]},
    "another archive begins at byte 4,096, after the end of the first",
)
tar(
    "a bit of a header",
    bytes(flipped),
    {"a": GOOD["a"]},
    "x.tar: is damaged at byte 6,144: there is no valid",
)
tar("no number for a size", BARE + resized(b"12x4"), {"a": GOOD["a"]}, "damaged at byte 6,144")
tar("negative size", BARE + resized(b"-0000000012"), {"a": GOOD["a"]}, "damaged at byte 6,144")
tar("negative binary size", BARE + resized(b"\xff" * 12), {"a": GOOD["a"]}, "damaged at byte 6,144")
tar("size beyond the file", BARE + resized(b"77777777777"), {"a": GOOD["a"]}, "in the member 'c.png'")
tar("size of 2^63", BARE + resized(b"\x80\0\0\0\x80" + bytes(7)), {"a": GOOD["a"]}, "in the member 'c.png'")
tar("size of 2^88", BARE + resized(b"\x80" + b"\xff" * 11), {"a": GOOD["a"]}, "in the member 'c.png'")
for told, notes in {
    "too long": b"99 path=c.png\n",
    "too short": b"3 path=c.png\n",
    "zero": b"0 path=c.png\n",
    "no number": b"xx path=c.png\n",
    "enormous": b"9" * 400 + b" path=c.png\n",
    "nothing": b"\n" * 20,
}.items():
    tar(
        f"pax, length {told}",
        BARE + pax(notes) + whole("c.png", b"x"),
        {"a": GOOD["a"]},
        "metadata of a member is not valid pax",
    )
for told, size in {"text": b"many", "negative": b"-1", "digits": b"9" * 5000, "others'": "\u0663".encode()}.items():
    line = b"size=" + size + b"\n"
    length = len(line) + 1 + len(str(len(line) + 4))
    note = b"%d " % length + line
    note = b"%d " % len(b"%d " % len(note) + line) + line
    tar(
        f"pax, size {told}",
        BARE + pax(note) + whole("c.png", b"x"),
        {"a": GOOD["a"]},
        f"invalid size '{size[:9].decode()}",
    )
tar(
    "pax, size beyond",
    BARE + pax(b"17 size=99999999\n") + whole("c.png", b"x"),
    {"a": GOOD["a"]},
    "in the member 'c.png'",
)
tar("pax without an end", BARE + pax(b"14 path=c.png\n") * 50, {"a": GOOD["a"]}, "in the header of a member")
tar("notes of gigabytes", BARE + header("x", 1 << 30, b"x"), {"a": GOOD["a"]}, "1,073,741,824 bytes of metadata")
tar("name of gigabytes", BARE + header("x", 1 << 30, b"L"), {"a": GOOD["a"]}, "1,073,741,824 bytes of metadata")
tar("long name and no member", BARE + header("x", 4, b"L") + b"c.pn".ljust(512, b"\0") + bytes(1024), GOOD)
tar("sparse", BARE + header("c.png", 512, tarfile.GNUTYPE_SPARSE) + bytes(512), GOOD)
tar("symbolic link", BARE + header("c.png", 0, tarfile.SYMTYPE, linkname="/etc/passwd"), GOOD)
tar("hard link", BARE + header("c.png", 0, tarfile.LNKTYPE, linkname="/etc/passwd"), GOOD)
tar("link with a size", BARE + header("c.png", 1 << 40, tarfile.SYMTYPE, linkname="a.png"), GOOD)
for told, kind in {"pipe": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE, "disk": tarfile.BLKTYPE}.items():
    tar(told, BARE + header("c.png", 0, kind, devmajor=1, devminor=5), GOOD)
tar(
    "folder like a picture",
    BARE + header("c.png", 0, tarfile.DIRTYPE) + whole("c.png/d.txt", b"x"),
    GOOD | {"c.png/d": "no image"},
)
tar("name that climbs", BARE + whole("../../canary.png", picture()), GOOD | {"../../canary": "ok: "})
tar("absolute name", BARE + whole("/etc/passwd.png", picture()), GOOD | {"/etc/passwd": "ok: "})
tar("zero in a name", BARE + pax(b"15 path=c\0.png\n") + whole("x", picture()), GOOD | {"c\0": "ok: "})
tar("name that is no UTF-8", BARE + whole("caf\udce9.png", picture()), GOOD | {"caf\\xe9": "ok: "})
tar(
    "caption that is no UTF-8",
    BARE + whole("c.png", picture()) + whole("c.txt", b"caf\xe9"),
    GOOD | {"c": "ok: caf\ufffd"},
)
tar("no name", BARE + whole("", picture()), GOOD)
tar("a key twice", BARE + whole("b.png", picture()) + whole("b.txt", b"caption b"), GOOD)
tar("only captions", tar_of([("c.txt", b"x")]), NONE)
tar("only json", tar_of([("c.json", b'{"caption": "x"}')]), {"c": "has no image (members: json)"})
tar("json of many levels", BARE + whole("c.png", picture()) + whole("c.json", b'{"a":' * 90_000), GOOD | {"c": "ok: "})
tar(
    "json of megabytes",
    BARE + whole("c.png", picture()) + whole("c.json", b" " * (1 << 21) + b"{}"),
    GOOD | {"c": "ok: "},
)
tar("json that is none", BARE + whole("c.png", picture()) + whole("c.json", b"\xff{"), GOOD | {"c": "ok: "})
tar(
    "caption of megabytes",
    BARE + whole("c.png", picture()) + whole("c.txt", b"x" * (1 << 21)),
    GOOD | {"c": "ok: " + "x" * 50},
)
tar("empty picture", BARE + whole("c.png", b""), GOOD | {"c": "is not a readable image"})
tar("text for a picture", BARE + whole("c.png", b"hello"), GOOD | {"c": "is not a readable image"})
tar("half a picture", BARE + whole("c.png", picture()[:-40]), GOOD | {"c": "is not a readable image"})
tar("two ways long", BARE + whole("c." + "e" * 90, b"") * 2000, GOOD | {"c": "has no image (members: eee"})
bad("tars: no tar but a folder", tree(**{"x.tar/readme": b"x"}), None, "x.tar: is a folder")
bad(
    "tar: folder by name", lambda folder: tree(**{"x.tar/readme": b"x"})(folder) / "x.tar", None, "x.tar does not exist"
)
bad("tars: no tar but a pipe", tree(**{"1.tar": TWO, "2.tar": os.mkfifo}), GOOD, "2.tar: is a pipe or a device")
bad("tar: link to nowhere", tree(**{"1.tar": TWO, "2.tar": link("nowhere")}), GOOD, "2.tar: no such file")
bad("tar: link to a device", tree(**{"1.tar": TWO, "2.tar": link("/dev/zero")}), GOOD, "2.tar: is a pipe or a device")

# --- tables ---------------------------------------------------------------------------------------

PAIR = table(["a", "b"])
PLAIN = parquet_of(PAIR, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True)
STREAM, FILE = arrow_of(PAIR), arrow_of(PAIR, stream=False)
SPOT = PLAIN.index(picture(0)) + 20
CANNOT = "cannot be read, it may be truncated or damaged"


def cells(*values: Any, kind: pa.DataType | None = None) -> bytes:
    return parquet_of(pa.table({"image": pa.array(values, kind), "key": ["a", "b", "c", "d"][: len(values)]}))


def not_text(kind: str) -> bytes:
    wrong = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(struct.pack("<iii", 0, 1, 2)), pa.py_buffer(b"\xff\xfe")]
    )
    made = pa.table({"image": [picture(0), picture(1)], "text": wrong})
    return parquet_of(made) if kind == "parquet" else arrow_of(made)


def less_than_none() -> bytes:
    """A stream without columns, whose one batch says that it has -1 rows."""
    none = arrow_of(PAIR.select([]))
    assert none.count(struct.pack("<q", 2)) == 1
    return none.replace(struct.pack("<q", 2), struct.pack("<q", -1))


bad("parquet: empty", file("x.parquet", b""), None, f"x.parquet: {CANNOT}")
bad("parquet: text", file("x.parquet", b"hello" * 100), None, f"x.parquet: {CANNOT}")
bad("parquet: no footer", file("x.parquet", PLAIN[:-30]), None, f"x.parquet: {CANNOT}")
bad("parquet: wrong magic", file("x.parquet", PLAIN[:-4] + b"PAR2"), None, f"x.parquet: {CANNOT}")
bad(
    "parquet: footer of gigabytes",
    file("x.parquet", PLAIN[:-8] + b"\xff\xff\xff\x7fPAR1"),
    None,
    f"x.parquet: {CANNOT}",
)
bad("parquet: page cut out", file("x.parquet", PLAIN[:50] + PLAIN[150:]), None, f"x.parquet: {CANNOT}")
bad(
    "parquet: bit of a page",
    file("x.parquet", PLAIN[:SPOT] + bytes([PLAIN[SPOT] ^ 1]) + PLAIN[SPOT + 1 :]),
    None,
    f"x.parquet: {CANNOT}",
)
bad("parquet: no rows", file("x.parquet", parquet_of(PAIR.slice(0, 0))), None, "its tables have no rows")
bad("parquet: no columns", file("x.parquet", parquet_of(pa.table({}))), None, "its tables have no rows")
bad(
    "parquet: no pictures",
    file("x.parquet", parquet_of(PAIR.drop_columns("image"))),
    None,
    "x.parquet: has no column of images",
)
bad("parquet: nulls", file("x.parquet", cells(None, picture(), kind=pa.binary())), {"a": "has no image", "b": "ok: "})
bad(
    "parquet: only nulls",
    file("x.parquet", cells(None, None, kind=pa.binary())),
    {"a": "has no image", "b": "has no image"},
)
bad("parquet: column of no type", file("x.parquet", cells(None, None)), None, "x.parquet: has no column of images")
bad(
    "parquet: text for pictures",
    file("x.parquet", cells("hello", "x" * 5000)),
    {"a": "names an image that is not a file: hello", "b": "xxx..."},
)
bad(
    "parquet: struct of nothing",
    file("x.parquet", cells({"bytes": None, "path": None}, {"bytes": b"", "path": ""})),
    {"a": "has no image", "b": "has no image"},
)
bad(
    "parquet: struct of others",
    file("x.parquet", cells({"url": "x"})),
    None,
    "'image' for --image has struct<url: string>",
)
bad(
    "parquet: broken pictures",
    file("x.parquet", cells(picture()[:50], picture())),
    {"a": "is not a readable image", "b": "ok: "},
)
bad("parquet: text that is no UTF-8", file("x.parquet", not_text("parquet")), None, f"x.parquet: {CANNOT}")
bad(
    "parquet: paths out of the folder",
    tree(**{"x.parquet": cells("../canary.png", "/etc/passwd", "a\0b.png", "l.png"), "l.png": link("../canary.png")}),
    dict.fromkeys("abd", "names an image outside ") | {"c": "names an image that is not a file"},
)
bad(
    "parquet: paths to no files",
    tree(
        **{"x.parquet": cells("pipe.png", "folder", "x" * 5000, "\n\r\u2028"), "pipe.png": os.mkfifo, "folder/x": b""}
    ),
    dict.fromkeys("abcd", "names an image that is not a file"),
)
bad(
    "parquet: a column twice",
    file("x.parquet", parquet_of(pa.Table.from_arrays([PAIR["image"]] * 2, ["image"] * 2))),
    None,
    "x.parquet: has several columns with the same name",
)
bad(
    "parquet: other columns",
    tree(**{"1.parquet": parquet_of(PAIR), "2.parquet": cells(picture())}),
    None,
    "2.parquet: has other columns than the previous files: image, key, not image, text, key",
)
bad(
    "parquet: one of several is damaged",
    tree(**{"1.parquet": parquet_of(PAIR), "2.parquet": PLAIN[:-9]}),
    None,
    f"2.parquet: {CANNOT}",
)
bad(
    "parquet: a page of one of several is damaged",
    tree(**{"1.parquet": PLAIN[:SPOT] + b"?" + PLAIN[SPOT + 1 :], "2.parquet": parquet_of(PAIR)}),
    GOOD,
    f"1.parquet: {CANNOT}",
)
bad(
    "parquet: an empty one among others",
    tree(**{"1.parquet": cells(kind=pa.binary()), "2.parquet": parquet_of(PAIR)}),
    GOOD,
)
bad("parquet: folder", tree(**{"x.parquet/readme": b""}), None, "x.parquet: is a folder")
bad("parquet: pipe", tree(**{"x.parquet": os.mkfifo}), None, "x.parquet: is a pipe or a device")
bad("arrow: empty", file("x.arrow", b""), None, f"x.arrow: {CANNOT}")
bad("arrow: text", file("x.arrow", b"hello" * 100), None, f"x.arrow: {CANNOT}")
bad("arrow: stream cut off", file("x.arrow", STREAM[:-400]), None, f"x.arrow: {CANNOT}")
bad("arrow: stream without an end", file("x.arrow", STREAM[:-8]), GOOD)
bad("arrow: only a schema", file("x.arrow", arrow_of(PAIR.slice(0, 0))), None, "its tables have no rows")
bad("arrow: file cut off", file("x.arrow", FILE[:-20]), None, f"x.arrow: {CANNOT}")
bad("arrow: file of another magic", file("x.arrow", b"ARROW2" + FILE[6:]), None, f"x.arrow: {CANNOT}")
bad("arrow: text that is no UTF-8", file("x.arrow", not_text("arrow")), None, f"x.arrow: {CANNOT}")
bad("arrow: column that is no UTF-8", file("x.arrow", STREAM.replace(b"text", b"t\xffxt")), None, f"x.arrow: {CANNOT}")
bad(
    "arrow: columns with breaks in their names",
    file("x.arrow", STREAM.replace(b"image", b"\r\n\x01ge").replace(b"text", b"te\nt")),
    None,
    "it has \\r\\n\\x01ge, te\\nt, key; name one with --image",
)
bad(
    "arrow: less than no rows", file("x.arrow", less_than_none()), None, "x.arrow: is damaged: one of its batches has -"
)
bad("arrow: pipe", tree(**{"x.arrow": os.mkfifo}), None, "x.arrow: is a pipe or a device")
for told, saved in {
    "no json": b"{",
    "a list": b"[]",
    "no files": b"{}",
    "files that are none": b'{"_data_files": [1]}',
    "files that are text": b'{"_data_files": "x.arrow"}',
    "many levels": b"[" * 100_000,
}.items():
    says = f"state.json: {CANNOT}" if told in ("no json", "many levels") else "state.json: does not list the files"
    bad(f"dataset: state is {told}", tree(**{"x.arrow": STREAM, "state.json": saved}), None, says)
bad(
    "dataset: no rows",
    tree(**{"dataset_info.json": b"{}", "state.json": b'{"_data_files": []}'}),
    None,
    "data: its tables have no rows",
)
moved = json.dumps({"_data_files": [{"filename": "x.arrow"}], "_indices_files": [{"filename": "i.arrow"}]}).encode()
bad("dataset: rows in another order", tree(**{"x.arrow": STREAM, "state.json": moved}), None, "flatten_indices()")
for told, name in {
    "missing": "y.arrow",
    "climbing": "../x.arrow",
    "absolute": "/etc/passwd",
    "long": "x" * 5000,
}.items():
    saved = json.dumps({"_data_files": [{"filename": name}]}).encode()
    bad(f"dataset: {told} file", tree(**{"x.arrow": STREAM, "state.json": saved}), None, "which does not exist")

# --- csv ------------------------------------------------------------------------------------------

HEAD = b"filepath\ttitle\n"


def lines(*rows: bytes) -> Callable[[Path], Path]:
    return tree(
        **{"x.csv": HEAD + b"\n".join(rows) + b"\n", "good.png": picture(), "pipe.png": os.mkfifo, "folder/x": b""}
    )


def csv_at(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    return lambda folder: make(folder) / "x.csv"


bad("csv: empty", file("x.csv", b""), None, "x.csv: has no rows")
bad("csv: no line of names", file("x.csv", b"a.png\tone\nb.png\ttwo\n"), None, "--columns filepath,title")
bad("csv: blank lines", file("x.csv", b"\n \n\r\n"), None, "x.csv: has no rows")
bad("csv: no rows", file("x.csv", HEAD), None, "x.csv: has no rows")
bad("csv: blank rows", file("x.csv", HEAD + b"\n \n\r\n"), None, "x.csv: has no rows")
bad("csv: binary", file("x.csv", np.random.default_rng(0).bytes(5000)), None, "x.csv: is not valid UTF-8 at byte")
bad(
    "csv: UTF-16",
    file("x.csv", "filepath\ttitle\na\tb\n".encode("utf-16")),
    None,
    "x.csv: is UTF-16, not UTF-8; save it as UTF-8: iconv -f UTF-16",
)
bad(
    "csv: another code",
    file("x.csv", HEAD + "a.png\tcaf\u00e9\n".encode("latin-1")),
    None,
    "is not valid UTF-8 at byte 24; save it as UTF-8 (if it is from Windows: iconv -f WINDOWS-1252 -t UTF-8 ",
)
bad(
    "csv: one line of megabytes",
    file("x.csv", HEAD + b"x" * (17 << 20)),
    None,
    "the line at byte 15 exceeds 16,777,216 bytes",
)
bad(
    "csv: a quote without an end",
    file("x.csv", HEAD + b'a\t"' + (b"x" * 99_999 + b"\n") * 170),
    None,
    "x.csv: the row at byte 15 exceeds 16,777,216 bytes, or has a quote that is never closed",
)
bad(
    "csv: old line ends",
    csv_at(tree(**{"x.csv": b"filepath\ttitle\rgood.png\tx\r", "good.png": picture()})),
    {"good.png": "ok: x"},
)
bad(
    "csv: missing picture",
    csv_at(lines(b"good.png\tx", b"no.png\ty")),
    {"good.png": "ok: x", "no.png": "names an image that is not a file: no.png"},
)
bad("csv: too few fields", csv_at(lines(b"good.png", b"\tx")), {"good.png": "ok: ", "line 1": "has no image"})
bad(
    "csv: no plain files",
    csv_at(lines(b"pipe.png\tx", b"/dev/zero\tx", b"folder\tx", b"/dev/stdin\tx", b"good.png\tx", b"a\0b\tx")),
    {
        **dict.fromkeys(
            ["pipe.png", "/dev/zero", "folder", "/dev/stdin", "a\ufffdb"],
            "names an image that is not a file",
        ),
        "good.png": "ok: x",
    },
)
bad(
    "csv: paths into the current folder",
    csv_at(lines(b"../canary.png\tx")),
    {"%2E%2E/canary.png": "ok: x"},
)
bad("csv: another file", csv_at(lines(b"/etc/passwd\tx")), {"/etc/passwd": "names an image outside"})
bad(
    "csv: long name",
    csv_at(lines(b"x" * 9000 + b"\ty")),
    {"x" * 9000: "names an image that is not a file: xxx"},
)
bad("csv: pipe", lambda folder: tree(**{"x.csv": os.mkfifo})(folder) / "x.csv", None, "x.csv: is a pipe or a device")
bad("csv: folder", lambda folder: tree(**{"x.csv/readme": b""})(folder) / "x.csv", None, "readme: has no rows")

# --- folders --------------------------------------------------------------------------------------

FINE = {"a.png": picture(), "a.txt": b"caption a"}
NO_FILE = "is not a regular file, is a broken symlink, or links outside the folder"
bad("folder: empty file", tree(**FINE, **{"c.png": b""}), {"a": GOOD["a"], "c": "is not a readable image"})
bad("folder: link to nowhere", tree(**FINE, **{"c.png": link("nowhere")}), {"a": GOOD["a"], "c": NO_FILE})
bad("folder: link out of it", tree(**FINE, **{"c.png": link("../canary.png")}), {"a": GOOD["a"], "c": NO_FILE})
bad("folder: link to a device", tree(**FINE, **{"c.png": link("/dev/zero")}), {"a": GOOD["a"], "c": NO_FILE})
bad("folder: link to itself", tree(**FINE, **{"c.png": link("c.png")}), {"a": GOOD["a"], "c": NO_FILE})
bad("folder: link within", tree(**FINE, **{"c.png": link("a.png")}), {"a": GOOD["a"], "c": "ok: "})
bad("folder: link to a folder", tree(**FINE, **{"in": link("..")}), {"a": GOOD["a"]})
bad("folder: pipe", tree(**FINE, **{"c.png": os.mkfifo}), {"a": GOOD["a"], "c": NO_FILE})
bad("folder: folder like a picture", tree(**FINE, **{"c.png/d.jpg": picture()}), {"a": GOOD["a"], "c.png/d": "ok: "})
bad(
    "folder: page of the web",
    tree(**FINE, **{"c.jpg": b"<html>"}),
    {"a": GOOD["a"], "c": "is not a readable image"},
)
bad("folder: caption from elsewhere", tree(**{"a.png": picture(), "a.txt": link("/etc/passwd")}), {"a": "ok: "})
bad("folder: caption from a pipe", tree(**{"a.png": picture(), "a.txt": os.mkfifo}), {"a": "ok: "})
bad("folder: captions from elsewhere", tree(**FINE, **{"metadata.csv": link("/etc/passwd")}), {"a": GOOD["a"]})
for name, content in {
    "captions.json": b"{",
    "metadata.jsonl": b'{"file_name": "a.png", "text": "x"}\n{',
    "metadata.parquet": b"PAR1",
}.items():
    bad(f"folder: broken {name}", tree(**FINE, **{name: content}), None, f"{name}: {CANNOT}")
bad(
    "folder: broken metadata.csv",
    tree(**FINE, **{"metadata.csv": b"file_name,text\na.png,caf\xe9\n"}),
    None,
    "metadata.csv: is not valid UTF-8 at byte 24",
)
for told, content in {
    "a number": b"3",
    "levels": b"[" * 100_000,
    "a text": b'"x"',
    "COCO of nothing": b'{"images": [], "annotations": [{}]}',
}.items():
    says = "captions.json: a row is not an object" if told == "a text" else f"captions.json: {CANNOT}"
    bad(f"folder: captions are {told}", tree(**FINE, **{"captions.json": content}), None, says)
bad(
    "folder: captions of others",
    tree(**FINE, **{"captions.json": b'{"z.png": "x"}'}),
    None,
    "captions.json: names none of the 1 images",
)
bad(
    "folder: captions with breaks in their names",
    tree(**FINE, **{"metadata.jsonl": b'{"file\\name": "a.png"}'}),
    None,
    "it has file\\name",
)
bad(
    "folder: captions without names",
    tree(**FINE, **{"metadata.jsonl": b'{"text": "x"}'}),
    None,
    "image_path, image, path, image_name, images, name); it has text; name one with --image COLUMN",
)
bad(
    "folder: pipe alone",
    lambda folder: (os.mkfifo(folder / "x"), folder / "x")[1],
    None,
    "x: no known kind of data",
)
bad("folder: device", lambda folder: Path("/dev/null"), None, "no known kind of data")


# --- what happens ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that holds something which bad names lead to."""
    (tmp_path / "canary.png").write_bytes(picture(77))
    return tmp_path


def state(folder: Path) -> dict[str, str]:
    found = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root, name)
            plain = path.is_file() and not path.is_symlink()
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else str(path.lstat().st_mode)
    return found


@pytest.mark.parametrize("name", CASES)
def test_bad_files_are_refused_or_set_aside(place: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = CASES[name]
    location = case.make(place)
    before = state(place)
    monkeypatch.chdir(location if location.is_dir() else place)
    found, errors = outcome(location)
    assert state(place) == before
    assert len(errors) == len(case.errors), errors
    for error, expected in zip(errors, case.errors, strict=True):
        assert expected in error
        assert str(location.parent) in error, "the file is not named"
    wanted = {key: says for key, says in case.found.items() if says}
    assert sorted(found) == sorted(wanted)
    for key, says in wanted.items():
        assert says in found[key]
        assert says.startswith("ok: ") == found[key].startswith("ok: ")


# Of a tar alone and among others the commands are given the second.
RUN = [name for name in CASES if not name.startswith("tar: ")]


@pytest.mark.parametrize("name", RUN)
def test_embed_and_reshard_say_what_is_wrong(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Either one clear line and code 2, or code 0, all good samples, and a list of the others with their reasons."""
    case = CASES[name]
    location = case.make(place)
    before = state(place)
    monkeypatch.chdir(location if location.is_dir() else place)
    read = [key for key, says in case.found.items() if says.startswith("ok: ")]
    # Where some have captions, those without are set aside.
    good = sorted([key for key in read if case.found[key] != "ok: "] or read)
    asked = [key for key, says in case.found.items() if says and key.isprintable()]

    pool = place / "pool"
    code = main(["embed", str(location), "-o", str(pool), "--encoder", "tests.toy:Toy", "--workers", "0", "--quiet"])
    after = {path: told for path, told in state(place).items() if not Path(path).is_relative_to(pool)}
    assert after == before
    err = capsys.readouterr().err.splitlines()
    if not good:
        assert code == 2
    if code == 0:
        found = pq.ParquetDataset(pool / "metadata").read(["key"])["key"].to_pylist()
        assert sorted(set(found)) == good
        aside = (pool / "set_aside.txt").read_text() if len(good) < len(asked) or case.errors else ""
        assert aside.count("\n") >= len(asked) - len(good)
    else:
        assert code == 2
        assert [line.startswith("Error: ") for line in err if "TIFF" not in line] == [True]

    keys, out = place / "keys.txt", place / "out"
    keys.write_text("".join(f"{key}\n" for key in asked) or "a\n")
    before = {path: told for path, told in state(place).items() if not Path(path).is_relative_to(pool)}
    code = main(["reshard", str(location), str(keys), "-o", str(out), "--workers", "1", "--quiet"])
    after = state(place)
    assert {path: after[path] for path in before} == before
    assert all(path.startswith((f"{out}", f"{pool}")) for path in after.keys() - before.keys())
    err = capsys.readouterr().err.splitlines()
    assert code in (0, 2)
    assert code == 0 or [line.startswith("Error: ") for line in err] == [True]
    for path in out.glob("*.tar"):
        with tarfile.open(path) as archive:
            for member in archive:
                assert member.isreg()
                assert not is_unsafe(member.name)
