# ruff: noqa: E501 - a table
"""Folders that someone else made, on purpose: what is changed in a good one, and what must be said of it.

A case is a name, a change to a folder, and either "fine" or a part of the one line that refuses the folder.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Change = Callable[[Path], Any]
Case = tuple[str, Change, str]
FINE = "fine"
N, K = 60, 3  # rows and clusters of the selection
STEP = "steps/00-semdedup/"


def array(name: str, values: Any, **how: Any) -> Change:
    """Save other values under a name."""
    return lambda folder: np.save(folder / name, np.asarray(values), **how)


def changed(name: str, change: Callable[[np.ndarray], Any]) -> Change:
    """Save what becomes of the values under a name."""
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def header(name: str, descr: str, shape: Any, size: int = 0, fortran: Any = False) -> Change:
    """Write a .npy header that may lie, and ``size`` bytes after it that take no room on the disk."""

    def write(folder: Path) -> None:
        text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
        with open(folder / name, "wb") as file:
            file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n")
            file.truncate(file.tell() + size)

    return write


def raw(name: str, content: bytes) -> Change:
    """Write bytes under a name."""
    return lambda folder: (folder / name).write_bytes(content)


def edit(file: str, change: Callable[[Any], Any]) -> Change:
    """Change the JSON in a file: in place, or by the text that ``change`` returns."""

    def write(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text())
        text = change(content)
        path.write_text(text if isinstance(text, str) else json.dumps(content))

    return write


def put(file: str, *keys: Any, to: Any) -> Change:
    """Set one value in the JSON in a file."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return edit(file, change)


def without(file: str, *keys: Any) -> Change:
    """Remove one value from the JSON in a file."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edit(file, change)


def instead(name: str, make: Callable[[Path], Any]) -> Change:
    """Put something else where a file is."""

    def write(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return write


def both(*changes: Change) -> Change:
    """Make several changes."""
    return lambda folder: [change(folder) for change in changes]


def sparse(size: int) -> Callable[[Path], None]:
    """Make a file of zeros that takes no room on the disk."""

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(size)

    return write


def no_file(name: str) -> list[Case]:
    """Everything that is not a regular file, in the place of one."""
    return [
        (f"{name} is a pipe", instead(name, os.mkfifo), "is a pipe or a device"),
        (f"{name} is a link to a device", instead(name, lambda p: p.symlink_to("/dev/zero")), "is a pipe or a device"),
        (f"{name} is a link to itself", instead(name, lambda p: p.symlink_to(p)), Path(name).name),
        (f"{name} is a folder", instead(name, Path.mkdir), "is a folder"),
        (f"{name} is 10 GB of zeros", instead(name, sparse(10 * 10**9)), Path(name).name),
    ]


def no_array(name: str, shape: str = f"({N},)") -> list[Case]:
    """What is not an array of numbers, or lies about itself."""
    said = Path(name).name
    return [
        *no_file(name),
        (f"{name} is empty", raw(name, b""), said),
        (f"{name} is cut", lambda f: (f / name).write_bytes((f / name).read_bytes()[:-3]), said),
        (f"{name} is text", raw(name, b"no array at all"), said),
        (f"{name} has a header of half a line", raw(name, b"\x93NUMPY\x01\x00\x76\x00{'descr': ("), said),
        (f"{name} has a version of the future", raw(name, b"\x93NUMPY\x09\x00\x76\x00" + b" " * 200), said),
        (f"{name} has a header of 4 GB", raw(name, b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 200), said),
        (f"{name} has a deep header", raw(name, b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000), said),
        (f"{name} has a header of minus signs", raw(name, b"\x93NUMPY\x01\x00\x10\x27" + b"-" * 9_999 + b"1"), said),
        (f"{name} has code as its header", raw(name, b"\x93NUMPY\x01\x00\x1a\x00__import__('os').abort()  "), said),
        (f"{name} is of objects", array(name, np.array([None] * N), allow_pickle=True), said),
        (f"{name} is of records", array(name, np.zeros(N, "i4,i4")), said),
        (f"{name} is of times", array(name, np.zeros(N, "m8[s]")), said),
        (f"{name} is of dates", array(name, np.zeros(N, "M8[s]")), said),
        (f"{name} is of bytes", array(name, np.zeros(N, "S3")), said),
        (f"{name} is of void", array(name, np.zeros(N, "V4")), said),
        (f"{name} is complex", array(name, np.zeros(N, "c16")), said),
        (f"{name} is 0-d", array(name, np.array(1)), said),
        (f"{name} is 2-d", array(name, np.zeros((N, 2), "i4")), said),
        (f"{name} says that it has 2**62 rows", header(name, "'<i2'", "(4611686018427387904,)"), said),
        (f"{name} says that it has 2**80 rows", header(name, "'<i2'", f"({2**80},)"), said),
        (f"{name} has a negative shape", header(name, "'<i2'", "(-1,)"), said),
        (f"{name} has a shape of floats", header(name, "'<i2'", "(60.0,)"), said),
        (f"{name} has a shape of bools", header(name, "'<i2'", "(True,)"), said),
        (f"{name} has no shape", header(name, "'<i2'", "None"), said),
        (f"{name} has an unknown type", header(name, "'<q9'", shape, 600), said),
        (f"{name} has a type of subarrays", header(name, "('<i2', (4,))", shape, 600), said),
        (f"{name} has a nested type", header(name, "[('a', [('b', '<i2')])]", shape, 600), said),
        (f"{name} has an order that is none", header(name, "'<i2'", shape, 600, fortran=5), said),
    ]


def _first(head: dict[str, Any]) -> dict[str, Any]:
    step: dict[str, Any] = head["steps"][0]
    return step


def _many_digits(head: dict[str, Any]) -> str:
    return json.dumps(head).replace('"rows": 60', '"rows": ' + "9" * 5_000)


def _deep(head: dict[str, Any]) -> str:
    return json.dumps(head).replace('"eps": 0.5', '"eps": ' + "[" * 900 + "]" * 900)


def _combined(chains: Any) -> Change:
    """Make the step one that combines selections."""

    def change(head: dict[str, Any]) -> None:
        _first(head).update(method="union", parameters={"of": chains})

    def write(folder: Path) -> None:
        edit("selection.json", change)(folder)
        (folder / STEP).rename(folder / "steps/00-union")

    return write


def _repeated(values: Callable[[np.ndarray], np.ndarray], uses: Any = None) -> Change:
    def write(folder: Path) -> None:
        repeats = values(np.load(folder / "mask.npy"))
        np.save(folder / "repeats.npy", repeats)
        with np.errstate(invalid="ignore"):
            told = int(np.nan_to_num(repeats).astype("i8").sum()) if uses is None else uses
        put("selection.json", "repeats", to=True)(folder)
        put("selection.json", "uses", to=told)(folder)

    return write


def reason(text: Any) -> Change:
    """Give both reasons of the step another template."""
    return put("selection.json", "steps", 0, "reasons", to=[text] * 2)


def told(field: str, value: Any) -> Change:
    """Set a field of the step."""
    return put("selection.json", "steps", 0, field, to=value)


_OLD = {
    "method": "random", "parameters": {}, "seed": 1, "rows_in": 60, "rows_out": 3, "score": "", "cut": None,
    "version": "1", "reasons": ["not drawn"], "notes": [], "rows": [], "groups": [], "reference": [],
}  # fmt: skip

TEMPLATES: list[tuple[Any, str]] = [
    ("{score:>2000000000}", "with more than a name"), ("{score:2000000000.3f}", "with more than a name"),
    ("{score:.2000000000f}", "with more than a name"), ("{score.__class__.__mro__}", "with more than a name"),
    ("{score.__format__.__globals__}", "with more than a name"), ("{score[0]}", "with more than a name"),
    ("{score:{cut}}", "with more than a name"), ("{score:{cut.__class__}}", "with more than a name"),
    ("{score:{score.__format__.__globals__[os].environ}}", "with more than a name"),
    ("{score!r}", "with more than a name"), ("{score!z}", "reason"), ("{score", "reason"), ("}", "reason"),
    ("{} {0}", "with more than a name"), ("{0}", "with more than a name"), ("{score:Q}", "with more than a name"),
    ("{score:d}", "not an integer"), ("{score:c}", "with more than a name"), ("{score:n}", "with more than a name"),
    ("{duplicate_of:c}", "with more than a name"), ("{duplicate_of:b}", "with more than a name"),
    ("{size:_}", "with more than a name"), ("{score:%Y}", "with more than a name"),
    ("{score:\n}", "with more than a name"), ("{SCORE}", "with more than a name"),
    ("{nothing}", "'nothing', which is not evidence"), ("{reference_key}", "which is not evidence"),
    ("{rows}", "which is not evidence"), ("{__class__}", "with more than a name"), (5, "a list of texts"),
    ("{score:.4f} {cut:.2f} {duplicate_of:,} {cluster} {size:,d} {d_intra:.3g} {score:.1%} {score:e}", FINE),
    ("{{score}} 100% $x %(y)s", FINE), ("\x1b]0;x\x07\u202e<script>alert(1)</script>", FINE), ("\ud800 \udcff", FINE),
    ("", FINE), ("x" * 100_000, FINE),
]  # fmt: skip

S = "selection.json"
SELECTIONS: list[Case] = [
    *[case for name in ("mask.npy", "dropped_by.npy", STEP + "rows.score.npy") for case in no_array(name)],
    *no_array(STEP + "groups.size.npy", f"({K},)"),
    *no_file(S),
    ("mask of integers", changed("mask.npy", lambda a: a.astype(int)), "mask.npy: is int64"),
    ("mask of floats", changed("mask.npy", lambda a: a.astype(float)), "mask.npy: is float64"),
    ("mask of bytes beyond 1", changed("mask.npy", lambda a: (a * 2).astype("u1").view("?")), "mask.npy does not"),
    ("mask of other rows", changed("mask.npy", lambda a: ~a), "mask.npy does not match"),
    ("mask too short", changed("mask.npy", lambda a: a[:-1]), "mask.npy: is bool of shape (59,), but must be bool of "),
    ("dropped_by of floats", changed("dropped_by.npy", lambda a: a.astype(float)), "dropped_by.npy: is float64"),
    ("dropped_by with NaN", changed("dropped_by.npy", lambda a: np.where(a < 0, -1, np.nan)), "is float64"),
    ("dropped_by of text", changed("dropped_by.npy", lambda a: a.astype("U3")), "dropped_by.npy: is <U3"),
    ("dropped_by step 99", changed("dropped_by.npy", lambda a: np.where(a < 0, -1, 99).astype("i2")), "values from"),
    ("dropped_by step -5", changed("dropped_by.npy", lambda a: np.where(a < 0, -1, -5).astype("i2")), "values from -5"),
    ("dropped_by big-endian", changed("dropped_by.npy", lambda a: a.astype(">i2")), FINE),
    ("mask in Fortran order", changed("mask.npy", np.asfortranarray), FINE),
    ("mask with more bytes after it", lambda f: (f / "mask.npy").write_bytes((f / "mask.npy").read_bytes() + b"junk" * 9), FINE),
    # evidence of rows
    ("clusters 999", array(STEP + "rows.cluster.npy", np.full(N, 999, "i4")), "rows.cluster.npy: has values from 999"),
    ("cluster K", changed(STEP + "rows.cluster.npy", lambda a: a + K), "rows.cluster.npy: has values"),
    ("clusters -3", array(STEP + "rows.cluster.npy", np.full(N, -3, "i4")), "rows.cluster.npy: has values from -3"),
    ("clusters of floats", changed(STEP + "rows.cluster.npy", lambda a: a + 0.5), "rows.cluster.npy: is float64"),
    ("clusters of text", changed(STEP + "rows.cluster.npy", lambda a: a.astype("U4")), "rows.cluster.npy: is <U4"),
    ("clusters 2-d", changed(STEP + "rows.cluster.npy", lambda a: np.stack([a, a], 1)), "rows.cluster.npy: is int32"),
    ("clusters 2**31", array(STEP + "rows.cluster.npy", np.full(N, 2**31 - 1, "i4")), "rows.cluster.npy: has values"),
    ("clusters 2**40", array(STEP + "rows.cluster.npy", np.full(N, 2**40, "i8")), "rows.cluster.npy: has values"),
    ("clusters uint64", array(STEP + "rows.cluster.npy", np.zeros(N, "u8")), "rows.cluster.npy: is uint64"),
    ("clusters 2**31 without groups", both(
        told("groups", []), array(STEP + "rows.cluster.npy", np.full(N, 2**31 - 1, "i4"))), "rows.cluster.npy: has"),
    ("clusters without groups", told("groups", []), FINE),
    ("codes 77", array(STEP + "rows.code.npy", np.full(N, 77, "u1")), "rows.code.npy: has values from 77"),
    ("codes -9", array(STEP + "rows.code.npy", np.full(N, -9, "i1")), "rows.code.npy: has values from -9"),
    ("duplicates of 999999", array(STEP + "rows.duplicate_of.npy", np.full(N, 999_999)), "rows.duplicate_of.npy: has"),
    ("duplicates of N", array(STEP + "rows.duplicate_of.npy", np.full(N, N)), "rows.duplicate_of.npy: has values"),
    ("duplicates of -7", array(STEP + "rows.duplicate_of.npy", np.full(N, -7)), "rows.duplicate_of.npy: has values"),
    ("duplicates of 1e30", array(STEP + "rows.duplicate_of.npy", np.full(N, 1e30)), "duplicate_of.npy: is float64"),
    ("duplicates of themselves", array(STEP + "rows.duplicate_of.npy", np.arange(N)), FINE),
    ("scores NaN", array(STEP + "rows.score.npy", np.full(N, np.nan, "f4")), FINE),
    ("scores infinite", array(STEP + "rows.score.npy", np.full(N, np.inf, "f4")), FINE),
    ("scores of both infinities", array(STEP + "rows.score.npy", np.resize([np.inf, -np.inf, np.nan, 1], N)), FINE),
    ("scores of text", array(STEP + "rows.score.npy", np.full(N, "<b>x")), "rows.score.npy: is <U4"),
    ("scores 1e308", array(STEP + "rows.score.npy", np.full(N, 1e308)), FINE),
    ("scores from -1e308 to 1e308", array(STEP + "rows.score.npy", np.linspace(-1, 1, N) * 1e308), FINE),
    ("scores subnormal", array(STEP + "rows.score.npy", np.linspace(0, 5e-324, N)), FINE),
    ("scores from -3e38 to 3e38", array(STEP + "rows.score.npy", np.linspace(-3e38, 3e38, N).astype("f4")), FINE),
    ("scores float16", array(STEP + "rows.score.npy", np.linspace(-6e4, 6e4, N).astype("f2")), FINE),
    ("scores long double", array(STEP + "rows.score.npy", np.zeros(N, "g")), "rows.score.npy: is float"),
    ("scores of integers", array(STEP + "rows.score.npy", np.arange(N, dtype="u1")), FINE),
    ("scores of bools", array(STEP + "rows.score.npy", np.arange(N) > 5), "rows.score.npy: is bool"),
    ("scores too few", array(STEP + "rows.score.npy", np.zeros(N - 1)), "rows.score.npy: is float64 of shape (59,)"),
    ("an array too many", both(told("rows", ["score", "other"]), array(STEP + "rows.other.npy", np.full(N, "<b>"))),
     "a reason uses"),
    ("text with wrong code points", both(
        told("rows", ["cluster", "code", "duplicate_of", "score", "other"]),
        array(STEP + "rows.other.npy", np.full(N, 2**31 - 1, "u4").view("<U1"))), "rows.other.npy: has values"),
    ("text of 2 GB", both(
        told("rows", ["cluster", "code", "duplicate_of", "score", "other"]),
        header(STEP + "rows.other.npy", "'<U33554432'", f"({N},)", N * 33_554_432 * 4)), "rows.other.npy: is <U335"),
    ("two names alike", told("rows", ["score", "score", "code", "cluster", "duplicate_of"]), FINE),
    # evidence of clusters
    ("sizes empty", array(STEP + "groups.size.npy", np.zeros(0, "i8")), "the arrays of its clusters have"),
    ("sizes 2-d", array(STEP + "groups.size.npy", np.zeros((3, 3), "i8")), "groups.size.npy: is int64 of shape (3, 3)"),
    ("sizes negative", array(STEP + "groups.size.npy", np.full(3, -5)), "groups.size.npy: has values"),
    ("sizes beyond the rows", array(STEP + "groups.size.npy", np.full(3, 61)), "groups.size.npy: has values"),
    ("sizes 2**62", array(STEP + "groups.size.npy", np.full(3, 2**62)), "groups.size.npy: has values"),
    ("sizes of floats", array(STEP + "groups.size.npy", np.full(3, 5.0)), "groups.size.npy: is float64"),
    ("keeps more than it has", both(
        array(STEP + "groups.size.npy", [1, 1, 1]), array(STEP + "groups.kept.npy", [2, 0, 0])), "keeps more rows than"),
    ("spread NaN", array(STEP + "groups.d_intra.npy", np.full(3, np.nan)), FINE),
    ("spread infinite", array(STEP + "groups.d_intra.npy", np.array([np.inf, -np.inf, 0])), FINE),
    ("spread of text", array(STEP + "groups.d_intra.npy", np.full(3, "x")), "groups.d_intra.npy: is <U1"),
    ("10**9 clusters", both(*(
        header(STEP + f"groups.{name}.npy", f"'<{kind}'", "(1000000000,)", 8 * 10**9)
        for name, kind in (("size", "i8"), ("kept", "i8"), ("d_intra", "f8")))), "at most 1,048,576"),
    ("2**40 sizes", header(STEP + "groups.size.npy", "'<i8'", f"({2**40},)", 800), "groups.size.npy: cannot be read"),
    # JSON
    *[(f"reason {str(text)[:60]!r}", reason(text), said) for text, said in TEMPLATES],
    ("no reasons", told("reasons", []), FINE), ("reasons are text", told("reasons", "{cut}"), "reasons is '{cut}'"),
    ("reasons are numbers", told("reasons", [1, 2]), "reasons is a list of 2, but must be a list of texts"),
    ("notes are text", told("notes", "abc"), "notes is 'abc', but must be a list of texts"),
    ("notes are objects", told("notes", [{"a": 1}]), "notes is a list of 1"),
    ("notes with codes", told("notes", ["\x1b[31m\n\r\u202e<img src=x>"]), FINE),
    ("parameters are a list", told("parameters", [1]), "parameters: is a list of 1"),
    ("parameters are null", told("parameters", None), "parameters: is null"),
    ("parameters of any kind", told("parameters", {"of": 5, "eps": {"a": [None, 10**400]}, "<b>": "\x1b"}), FINE),
    ("parameters of a reference", told("parameters", {"reference": 5, "eps": 10**400}), FINE),
    ("a union of nothing", _combined("zz"), "of is 'zz', but must be a list of at most 2 lists"),
    ("a union of numbers", _combined([[1], [2]]), "must be an object"),
    ("a union of fragments", _combined([[{"x": 1}], []]), "unknown field 'x'"),
    ("a union of three", _combined([[], [], []]), "of is a list of 3"),
    ("a union with a text for a seed", _combined([[{**_OLD, "seed": "x"}], []]), "seed is 'x'"),
    ("a union with a bad template", _combined([[{**_OLD, "reasons": ["{score!r}"]}], []]), "with more than a name"),
    ("a union with a bad union", _combined([[{**_OLD, "method": "union", "parameters": {"of": 5}}], []]), "of is 5"),
    ("a union as it should be", _combined([[_OLD], []]), FINE),
    ("deep parameters", edit(S, _deep), "nested too deeply"),
    ("deep JSON", edit(S, lambda j: "[" * 200_000), "nested too deeply"),
    ("many values", edit(S, lambda j: "[" + "[]," * 5_000_000 + "[]]"), "more than 4,000,000 values"),
    ("an integer of 5,000 digits", edit(S, _many_digits), "an integer of too many digits"),
    ("NaN", edit(S, lambda j: json.dumps(j).replace('"kept":', '"x":NaN,"kept":')), "not finite"),
    ("1e999", edit(S, lambda j: json.dumps(j).replace('"cut": 0.5', '"cut": 1e999')), "not finite"),
    ("cut infinite", edit(S, lambda j: json.dumps(j).replace('"cut": 0.5', '"cut": Infinity')), "not finite"),
    ("Latin-1", raw(S, b'{"format":"\xff"}'), "selection.json: cannot be read"),
    ("UTF-16", lambda f: (f / S).write_bytes((f / S).read_text().encode("utf-16")), "selection.json: cannot be read"),
    ("a byte order mark", lambda f: (f / S).write_bytes(b"\xef\xbb\xbf" + (f / S).read_bytes()), FINE),
    ("a list", raw(S, b"[]"), "selection.json: is a list of 0, but must be an object"),
    ("null", raw(S, b"null"), "selection.json: is null"), ("a text", raw(S, b'"x"'), "selection.json: is '"),
    ("nothing", raw(S, b""), "selection.json: cannot be read"), ("half", raw(S, b'{"format": 1'), "cannot be read"),
    *[(f"format {value!r}", put(S, "format", to=value), "format") for value in ("1", True, 1.0, None, 2, -1, [1])],
    *[(f"rows {value!r}", put(S, "rows", to=value), "rows is") for value in (60.7, "60", True, -1, 10**30, None, [60])],
    *[(f"kept {value!r}", put(S, "kept", to=value), "kept") for value in ("7", -1, 10**30, 7.0, None, 61, False)],
    *[(f"uses {value!r}", put(S, "uses", to=value), "use") for value in ("7", -1, 10**30, 61)],
    *[(f"store {value!r}", put(S, "store", to=value), "store is") for value in (5, None, ["a"])],
    *[(f"pool {value!r}", put(S, "pool", to=value), "pool is") for value in (5, None, "", "/x\0y", {"a": 1})],
    *[(f"steps {value!r}", put(S, "steps", to=value), "steps") for value in ({}, None, 5, [5], [None], "x")],
    *[(f"repeats {value!r}", put(S, "repeats", to=value), "repeats") for value in (1, "yes", None, True)],
    *[(f"options {value!r}", put(S, "options", to=value), "options") for value in ([], None, 5)],
    *[(f"key {value!r}", put(S, "options", "key", to=value), "key is") for value in (5, ["a"], {}, "\0", 1e100)],
    ("key infinite", put(S, "options", "key", to=1e400), "not finite"), ("no steps", put(S, "steps", to=[]), "dropped_by"),
    ("300 steps of one folder", edit(S, lambda j: j.__setitem__("steps", j["steps"] * 300)), "is missing"),
    ("5,000 steps", edit(S, lambda j: j.__setitem__("steps", j["steps"] * 5_000)), "at most 1,000 objects"),
    *[(f"rows_in {value!r}", told("rows_in", value), "rows_in is") for value in (-1, "x", 1e3, None, 10**30)],
    *[(f"rows_out {value!r}", told("rows_out", value), "rows_out is") for value in (-1, "x", 61, None, True)],
    ("rows_in 61", both(told("rows_in", 61)), "rows_in is 61"), ("rows_out of others", told("rows_out", 1), "step 1"),
    *[(f"cut {value!r}", told("cut", value), "cut is") for value in ("<script>", [1], True, 10**400)],
    ("no cut", told("cut", None), FINE), ("cut 1e300", told("cut", 1e300), FINE),
    *[(f"seed {value!r}", told("seed", value), "seed is") for value in ("x", 1.5, None, True, 10**100)],
    ("a long seed", told("seed", -(2**130)), FINE),
    *[(f"score {value!r}", told("score", value), "score is") for value in (5, None, ["x"])],
    ("a score of codes", told("score", "\x1b[31m<b>" + "x" * 10_000), FINE),
    *[(f"version {value!r}", told("version", value), "version is") for value in (["<b>"], None, 1)],
    *[(f"package {value!r}", told("package", value), "package") for value in ([], None, {"name": 5, "version": ""}, {})],
    *[(f"method {str(value)[:20]!r}", told("method", value), "method") for value in
      ("../../etc", 5, None, "", "a/b", "x" * 5_000, "Random", "a b", "a\n", "semdedup\0")],
    ("another method", told("method", "other"), "is missing"),
    ("a field too many", told("why", "x"), "unknown field 'why'"), ("a field too few", without(S, "steps", 0, "seed"), "seed"),
    *[(f"evidence {str(value)[:40]!r}", told(kind, value), kind) for kind in ("rows", "groups", "reference") for value in
      (["../../../x"], ["/etc/x"], [5], "score", None, ["a" * 500], {"a": 1}, ["score\0"], ["A"])],
    ("evidence that is not there", told("rows", ["missing"]), "rows.missing.npy is missing"),
    ("a reference without rows", told("reference", ["row", "key", "key_ends"]), "is missing"),
    # repeats
    ("repeats 2**31", _repeated(lambda m: np.where(m, 2**31 - 1, 0).astype("i4")), "more than 100,000 times each"),
    ("repeats of floats", _repeated(lambda m: np.where(m, 0.5, 0)), "repeats.npy: is float64"),
    ("repeats of NaN", _repeated(lambda m: np.where(m, np.nan, 0), 5), "repeats.npy: is float64"),
    ("repeats negative", _repeated(lambda m: np.where(m, 2, -1)), "repeats.npy: has values from -1"),
    ("repeats 10**12", _repeated(lambda m: np.where(m, 10**12, 0)), "repeats.npy: has values from 0 to 1,000,000,000,000"),
    ("repeats of a dropped row", _repeated(lambda m: np.ones(N, "i4")), "repeats.npy does not match"),
    ("repeats of no row", _repeated(lambda m: np.zeros(N, "i4")), "repeats.npy does not match"),
    ("repeats as they should be", _repeated(lambda m: np.where(m, 3, 0).astype("i4")), FINE),
    ("repeats too few", _repeated(lambda m: m[:-1].astype("i4")), "repeats.npy: is int32 of shape (59,)"),
]  # fmt: skip


# --- clusters -------------------------------------------------------------------------------------

C = "cluster.json"
CLUSTERS: list[Case] = [
    *no_array("labels.npy"), *no_array("distances.npy"), *no_array("centroids.npy", "(4, 8)"), *no_file(C),
    ("a label K", changed("labels.npy", lambda a: a + 1), "labels.npy: has values from 1 to 4"),
    ("labels -5", array("labels.npy", np.full(N, -5, "i4")), "labels.npy: has values from -5"),
    ("labels 2**31", array("labels.npy", np.full(N, 2**31 - 1, "i4")), "labels.npy: has values"),
    ("labels of floats", changed("labels.npy", lambda a: a + 0.0), "labels.npy: is float64"),
    ("labels of bools", changed("labels.npy", lambda a: a > 0), "labels.npy: is bool"),
    ("labels uint64", changed("labels.npy", lambda a: a.astype("u8")), "labels.npy: is uint64"),
    ("labels too few", changed("labels.npy", lambda a: a[:-1]), "59"),
    ("labels of 2.5e9 rows", header("labels.npy", "'<i4'", "(2500000000,)", 10**10), "2500000000"),
    ("distances too few", changed("distances.npy", lambda a: a[:-1]), "of shape (59,)"),
    ("distances NaN", changed("distances.npy", lambda a: a * np.float32(np.nan)), "labels and distances do not match"),
    ("distances float64", changed("distances.npy", lambda a: a.astype("f8")), "distances.npy: is float64"),
    ("centroids NaN", changed("centroids.npy", lambda a: a * np.float32(np.nan)), "values that are not finite"),
    ("centroids 1-d", changed("centroids.npy", lambda a: a[:, 0].copy()), "centroids.npy: is float32 of shape (4,)"),
    ("centroids of no dimension", changed("centroids.npy", lambda a: a[:, :0]), "is empty"),
    ("no centroids", changed("centroids.npy", lambda a: a[:0]), "labels.npy: has values"),
    ("centroids of integers", changed("centroids.npy", lambda a: a.astype("i4")), "centroids.npy: is int32"),
    ("a list", raw(C, b"[]"), "cluster.json: is a list"), ("null", raw(C, b"null"), "cluster.json: is null"),
    ("deep JSON", raw(C, b"[" * 200_000), "nested too deeply"), ("Latin-1", raw(C, b"\xff"), "cluster.json"),
    ("an integer of 5,000 digits", raw(C, b'{"rows": ' + b"9" * 5_000 + b"}"), "an integer of too many digits"),
    *[(f"embedding {value!r}", put(C, "embedding", to=value), "embedding is") for value in ("../x", 5, None, "", ["a"])],
]  # fmt: skip


# --- training runs --------------------------------------------------------------------------------

R, L = "training.json", "log.jsonl"


def entry(field: str, value: Any, at: int = 3) -> Change:
    """Set a field of an entry of the log."""

    def write(folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / L).read_text().splitlines()]
        lines[at][field] = value
        (folder / L).write_text("".join(json.dumps(line) + "\n" for line in lines))

    return write


def ledger(**arrays: Any) -> Change:
    """Save a ledger with other arrays; None leaves one out."""

    def write(folder: Path) -> None:
        with np.load(folder / "ledger.npz") as file:
            state = {**file, **arrays}
        np.savez(folder / "ledger.npz", **{name: value for name, value in state.items() if value is not None})

    return write


def archive(change: Callable[[dict[str, bytes]], dict[str, bytes]] = dict, method: int = 0) -> Change:
    """Write the ledger's members again, otherwise compressed, named or marked."""

    def write(folder: Path) -> None:
        with zipfile.ZipFile(folder / "ledger.npz") as file:
            members = change({name: file.read(name) for name in file.namelist()})
        with zipfile.ZipFile(folder / "ledger.npz", "w", method) as file:
            for name, content in members.items():
                file.writestr(name, content)

    return write


def bomb(folder: Path) -> None:
    """Write a ledger of 1.5 MB that unfolds to 1.6 GB."""
    with zipfile.ZipFile(folder / "ledger.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        with file.open("losses.npy", "w", force_zip64=True) as member:
            top = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                top, {"descr": "<f4", "fortran_order": False, "shape": (200_000_000, 2)}
            )
            member.write(top.getvalue())
            zeros = bytes(1 << 22)
            for _ in range(200_000_000 * 8 // len(zeros)):
                member.write(zeros)


def patched(marker: bytes, offset: int, content: bytes) -> Change:
    """Overwrite bytes after the last marker of the ledger's archive."""

    def write(folder: Path) -> None:
        data = bytearray((folder / "ledger.npz").read_bytes())
        at = data.rfind(marker) + offset
        data[at : at + len(content)] = content
        (folder / "ledger.npz").write_bytes(data)

    return write


G = 120  # rows of the run
RUNS: list[Case] = [
    *(case for case in no_file(R) if "itself" not in case[0]), *no_file(L), *no_file("ledger.npz"),
    *[(f"{R} {text[:20]!r}", raw(R, text), R) for text in
      (b"", b"[]", b"null", b"{", b"\xff", b"[" * 200_000, b'{"rows": ' + b"9" * 5_000 + b"}", b'{"format": 1}')],
    *[(f"format {value!r}", put(R, "format", to=value), "format") for value in ("1", True, None, 9)],
    *[(f"rows {value!r}", put(R, "rows", to=value), "rows") for value in ("120", True, 0, -1, 10**30, 1.5, None, 121)],
    *[(f"{field} {value!r}", put(R, field, to=value), f"{field} is") for value in (5, None, "a\0b")
      for field in ("task", "data", "pool", "store", "policy", "version")],
    ("a field too many", put(R, "more", to=1), "unknown field 'more'"), ("a field too few", without(R, "data"), "data"),
    *[(f"settings {value!r}", put(R, "settings", to=value), "settings") for value in ([], None, "x")],
    *[(f"{field} {value!r}", put(R, "settings", field, to=value), f"{field} is") for field, value in
      [("prune", "much"), ("prune", 1e308), ("prune", -1), ("prune", True), ("epochs", "x"), ("epochs", 0),
       ("epochs", 1.5), ("samples", -1), ("batch_size", 0), ("batch_size", 10**30), ("seed", "x"), ("seed", 10**100)]],
    ("settings NaN", edit(R, lambda j: json.dumps(j).replace('"seed": 3', '"seed": NaN')), "not finite"),
    ("settings of any kind", put(R, "settings", "more", to={"<b>": ["\x1b[31m", None, 10**40, {}]}), FINE),
    *[(f"{L} {text[:20]!r}", raw(L, text), L) for text in
      (b"{", b"5\n", b"[1]\n", b"null\n", b'{"epoch": 0}\n', b"\xff\n", b"[" * 200_000, b'{"epoch": ' + b"9" * 5_000)],
    ("a log of 100,000 lines", raw(L, b'{"epoch": 0, "rows": 1, "total": 1}\n' * 100_000), "entries"),
    *[(f"{field} {value!r}", entry(field, value), f"line 4: {field} is") for field, value in
      [("epoch", "x"), ("epoch", -1), ("epoch", 0), ("epoch", 10**30), ("epoch", 1.5), ("epoch", None), ("rows", "many"),
       ("rows", -1), ("rows", 10**30), ("total", 0), ("total", 10**9), ("total", None), ("samples", "x"), ("samples", -5),
       ("loss", "x"), ("loss", 1e308), ("loss", [1]), ("candidates", "x"), ("candidates", -1), ("redundant", 1.5),
       ("ill_matched", {}), ("overlap", 7), ("overlap", "x"), ("pruned_so_far", 2), ("pruned_so_far", "x"),
       ("seconds", -1), ("seconds", 1e300), ("seconds", []), ("samples_per_second", "x"), ("lr", "x"), ("phase", 5)]],
    ("loss NaN", entry("loss", float("nan")), "line 4: loss is NaN"),
    ("loss infinite", entry("loss", float("inf")), "line 4: loss is Infinity"),
    ("a phase of codes", entry("phase", "\x1b[31m<b>\u202e"), FINE), ("no loss", entry("loss", None), FINE),
    ("overlap without candidates", both(entry("candidates", None), entry("overlap", 0.5)), "candidates is null"),
    *[(f"histogram {value!r}", entry("histogram", value), "histogram") for value in
      (5, [], "x", {}, {"edges": [], "counts": []}, {"edges": [0, 1], "counts": [1]}, {"edges": "x", "counts": [1]},
       {"edges": [1, 2, 3], "counts": [1, -1]}, {"edges": [float("nan")] * 2, "counts": [1]},
       {"edges": [1.0] * 10**5, "counts": [1] * 10**5}, {"edges": [64, 65], "counts": [1]}, {"counts": [1]})],
    *[(f"eval {str(value)[:40]!r}", entry("eval", value), "eval") for value in
      (5, [], "x", {"a": 5}, {"a": {"R@1": "x"}}, {"a": {"R@1": [1]}}, {"a": {"R@1": 10**400}}, {"a": None},
       {str(i): {"R@1": 0.5} for i in range(1_000)})],
    ("an evaluation of codes", entry("eval", {"\x1b[31m<script>": {"<b>\x1b": 0.5, "none": None}}), FINE),
    ("an evaluation of 1e308", entry("eval", {"a": {"R@1": 1e308}}), FINE),
    # the ledger
    ("a ledger that is empty", raw("ledger.npz", b""), "ledger.npz"), ("a ledger of text", raw("ledger.npz", b"text"), "ledger.npz"),
    ("half a ledger", lambda f: (f / "ledger.npz").write_bytes((f / "ledger.npz").read_bytes()[:500]), "ledger.npz"),
    ("a ledger that is an array", both(array("ledger.npy", np.zeros(G)), lambda f: (f / "ledger.npy").rename(f / "ledger.npz")), "ledger.npz"),
    *[(f"a ledger without {name}", ledger(**{name: None}), name) for name in
      ("losses", "seen", "marks", "marked", "times", "epoch_sums", "epoch_counts")],
    *[(f"a ledger with {name} as {np.asarray(value).dtype} {np.shape(value)}", ledger(**{name: value}), "ledger") for
      name, value in [
        ("losses", np.zeros(G, "f4")), ("losses", np.zeros((G, 3), "f4")), ("losses", np.zeros((G, 1), "f8")),
        ("losses", np.zeros((0, 1), "f4")), ("losses", np.zeros((G - 1, 1), "f4")), ("losses", np.full((G, 1), "x")),
        ("seen", np.zeros(G, "i8")), ("seen", np.zeros((G, 2), "i2")), ("seen", np.full(G, -7, "i2")),
        ("seen", np.array(5, "i2")), ("marks", np.full(G, 255, "u1")), ("marks", np.zeros(G, "i1")),
        ("marked", np.full(G, -99, "i2")), ("times", np.zeros(G, "i2")), ("times", np.zeros(G - 1, "u2")),
        ("decay", np.array(5.0)), ("decay", np.array([0.5, 0.5])), ("decay", np.array("x")), ("decay", np.array(np.nan)),
        ("memory", np.zeros(G)), ("memory", np.zeros(G - 1, "f4")), ("memory", np.full(G, np.inf, "f4")),
        ("references", np.zeros((G, 1), "f4")), ("references", np.array(5, "f4")), ("references", np.full(G, "x")),
        ("epoch_sums", np.zeros((7, 2))), ("epoch_sums", np.zeros(7, "c16")), ("epoch_sums", np.array(5.0)),
        ("epoch_counts", np.zeros(3, "i8")), ("epoch_counts", np.full(7, -1)), ("epoch_counts", np.zeros(7))]],
    ("a ledger of other rows", both(put(R, "rows", to=119)), "119"),
    ("a ledger of records", ledger(seen=np.zeros(G, "i2,i2")), "ledger.npz"),
    ("a ledger that unfolds", bomb, "ledger.npz"),
    ("a compressed ledger", archive(method=zipfile.ZIP_DEFLATED), "ledger.npz: cannot be read, it may be damaged (its member"),
    ("a ledger in lzma", archive(method=zipfile.ZIP_LZMA), "ledger.npz"), ("a ledger in bzip2", archive(method=zipfile.ZIP_BZIP2), "ledger.npz"),
    ("an encrypted ledger", patched(b"PK\x01\x02", 8, b"\x01"), "ledger.npz"),
    ("a ledger of an unknown method", patched(b"PK\x01\x02", 10, b"\x63\x00"), "ledger.npz"),
    ("a ledger with a lying size", patched(b"PK\x01\x02", 24, b"\xff\xff\xff\x7f"), "ledger.npz"),
    ("a ledger with a wrong offset", patched(b"PK\x01\x02", 42, b"\x07\x00\x00\x00"), "ledger.npz"),
    ("a ledger with a wrong checksum", patched(b"PK\x01\x02", 16, b"abcd"), "ledger.npz"),
    ("a ledger with objects", archive(lambda m: {**m, "seen.npy": m["seen.npy"].replace(b"'<i2'", b"'|O' ")}), "ledger.npz"),
    ("a ledger with a shorter member", archive(lambda m: {**m, "seen.npy": m["seen.npy"][:-9]}), "ledger.npz"),
    ("a ledger with text as a member", archive(lambda m: {**m, "seen.npy": b"text"}), "ledger.npz"),
    ("a ledger with a deep header", archive(lambda m: {**m, "seen.npy": b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000}), "ledger.npz"),
]  # fmt: skip
