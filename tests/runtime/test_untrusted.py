"""Files made by others: JSON, arrays and archives are read right, or refused with the reason."""

from __future__ import annotations

import io
import json
import math
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.embedding.pool import PoolPlan
from thresher.errors import PoolError
from thresher.io.plan import PLAN
from thresher.runtime.untrusted import (
    FLOATS,
    INTEGERS,
    TEXT,
    Fields,
    check_array,
    load_json,
    mapped_array,
    open_regular,
    parse_json,
    read_json,
    read_npy_header,
    read_npz,
)

BAD_JSON = {
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "long integer": b'{"a": ' + b"9" * 5_000 + b"}",
    "Latin-1": b'{"a": "\xe9"}',
    "half": b'{"a": [1, 2',
    "nothing": b"",
    "two values": b"{} {}",
    "words": b"{a: 1}",
    "bytes": bytes(range(256)),
}

# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r".") as error:
        parse_json(content)
    assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match=r"."):
        load_json(io.BytesIO(content))
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (rb'{"a": "\ud800"}', {"a": "\ud800"}),
        (rb'{"a": "\ud83d\ude00\u0000"}', {"a": "\U0001f600\0"}),
        (b"9" * 4_000, int("9" * 4_000)),
        (b"[" * 400 + b"]" * 400, None),
    ],
)
def test_odd_json_is_read(content: bytes, value: object, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    found = read_json(tmp_path / "a.json")
    assert found == parse_json(content)
    assert found == parse_json(content.decode())
    assert value is None or found == value


def test_numbers_that_are_not_finite_are_for_data_of_others_only(tmp_path: Path) -> None:
    """img2dataset writes NaN into the JSON of a sample; thresher never writes it."""
    for text in (b'{"a": NaN}', b'{"a": [1, {"b": -Infinity}]}', b'{"a": 1e999}'):
        assert parse_json(text)
        (tmp_path / "a.json").write_bytes(text)
        with pytest.raises(ValueError, match="not finite"):
            read_json(tmp_path / "a.json")


def test_depth_and_size_are_limited(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" * 600 + b"]" * 600)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)
    path.write_bytes(b'"' + b"x" * 1_000 + b'"')
    assert read_json(path, most=1_002) == "x" * 1_000
    with pytest.raises(ValueError, match="more than 1,001 bytes"):
        read_json(path, most=1_001)
    with open(path, "wb") as file:
        file.truncate(10 * 10**9)
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 67,108,864 bytes"):
        read_json(path)
    path.write_bytes(b"[" + b"[]," * 4_000_000 + b"[]]")
    with pytest.raises(ValueError, match="more than 4,000,000 values"):
        read_json(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_what_was_written_is_read(value: object) -> None:
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        assert parse_json(text) == value
        assert parse_json(text.encode("utf-8", "surrogatepass")) == value


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_bytes(b"{}")
    for name, said in {
        "pipe": "is a pipe or a device",
        "device": "is a pipe or a device",
        "loop": "Too many levels",
        ".": "is a folder",
        "none": "No such file",
    }.items():
        with pytest.raises(OSError, match=said):
            open_regular(tmp_path / name)
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"{}"
        assert read_json(tmp_path / name) == {}


# --- fields ---------------------------------------------------------------------------------------


def test_fields_say_what_is_wrong() -> None:
    fields = Fields({"n": 5, "x": 0.5, "t": "a", "yes": True, "l": ["a"], "o": {"b": 1}, "none": None}, "a.json")
    assert (fields.whole("n", 0, 5), fields.number("n"), fields.number("x", 0, 1), fields.text("t")) == (
        5,
        5.0,
        0.5,
        "a",
    )
    assert (fields.flag("yes"), fields.texts("l"), fields.object("o").whole("b")) == (True, ("a",), 1)
    assert (fields.number("none"), fields.number("missing")) == (None, None)
    for read, said in (
        (lambda: fields.whole("n", 6, 9), "a.json: n is 5, but must be a whole number from 6 to 9; it may be damaged"),
        (lambda: fields.whole("yes"), "a.json: yes is true, but must be a whole number"),
        (lambda: fields.whole("x"), "a.json: x is 0.5, but must be a whole number"),
        (lambda: fields.whole("gone"), "a.json: gone is missing"),
        (lambda: fields.number("t"), "a.json: t is 'a', but must be a number or null"),
        (lambda: fields.number("x", 0.6, 1), "a.json: x is 0.5, but must be a number from 0.6 to 1 or null"),
        (lambda: fields.number("yes"), "a.json: yes is true"),
        (lambda: fields.text("n"), "a.json: n is 5, but must be text"),
        (lambda: fields.flag("n"), "a.json: n is 5, but must be true or false"),
        (lambda: fields.texts("t"), "a.json: t is 'a', but must be a list of texts"),
        (lambda: fields.object("l"), "a.json: l: is a list of 1, but must be an object"),
        (lambda: fields.objects("l", 5), "a.json: l[0]: is 'a', but must be an object"),
        (lambda: fields.objects("l", 0), "a.json: l is a list of 1, but must be a list of at most 0 objects"),
        (lambda: fields.refuse_others(["n"]), "a.json: has an unknown field 'x'"),
        (lambda: Fields([], "a.json"), "a.json: is a list of 0, but must be an object"),
    ):
        with pytest.raises(PoolError) as error:
            read()
        assert str(error.value).startswith(said)
    for value in (10**400, -(10**400), math.inf, math.nan, "9" * 10_000, "\0", [1] * 9, {"a": 1}):
        with pytest.raises(PoolError) as error:
            Fields({"a": value}, "a.json").whole("a")
        assert len(str(error.value)) < 250


# --- arrays ---------------------------------------------------------------------------------------


@given(st.sampled_from([*INTEGERS, *FLOATS, "bool"]), st.sampled_from("<>"), st.integers(0, 5))
def test_a_mapped_array_is_what_numpy_reads(tmp_path_factory, dtype: str, order: str, rows: int) -> None:
    path = tmp_path_factory.mktemp("a") / "a.npy"
    values = np.arange(rows).astype(np.dtype(dtype).newbyteorder(order))
    np.save(path, values)
    found = mapped_array(path, (dtype,), (rows,))
    assert found.dtype == values.dtype
    assert found.tolist() == values.tolist()
    assert not found.flags.writeable or not rows
    with pytest.raises(PoolError, match=f"a.npy: is .* of shape .{rows},., but must be int128 of shape"):
        mapped_array(path, ("int128",), (rows,))


@pytest.mark.parametrize("at", [0, 1, 131_071, 131_072, 300_000, 399_999])
def test_ranges_are_checked_to_the_last_value(at: int) -> None:
    values = np.zeros(400_000, np.int32)
    assert check_array(values, "a", ("int32",), (None,), 0, 0) is values
    for wrong in (-1, 7):
        values[at] = wrong
        with pytest.raises(PoolError, match=r"a: has values from .*they must be from 0 to 6"):
            check_array(values, "a", ("int32",), (None,), 0, 6)


def test_text_is_checked_for_code_points(tmp_path: Path) -> None:
    good = np.array(["a", "é\U0010ffff", ""])
    assert check_array(good, "a", (TEXT,), (3,)) is good
    bad = np.array([0x110000], "u4").view("<U1")
    with pytest.raises(PoolError, match="a: has values from"):
        check_array(bad, "a", (TEXT,), (1,))


def test_a_header_is_read_as_numpy_reads_it() -> None:
    for array in (
        np.zeros((2, 3), "f4"),
        np.zeros(0),
        np.array(5, "i1"),
        np.asfortranarray(np.zeros((3, 4))),
        np.array(["ab"]),
    ):
        for version in ((1, 0), (2, 0)):
            file = io.BytesIO()
            np.lib.format.write_array(file, array, version=version)
            file.seek(0)
            found = read_npy_header(file)
            assert (found.shape, found.dtype) == (array.shape, array.dtype)
            assert found.bytes == len(file.read()) == array.nbytes


def test_an_archive_is_what_numpy_reads(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.asfortranarray(np.eye(3, 2)),
        "c": np.array(5),
        "d": np.zeros(0),
    }
    arrays["e"] = np.array("text")
    np.savez(tmp_path / "a.npz", **arrays)
    found = read_npz(tmp_path / "a.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
        assert found[name].flags.writeable
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    with pytest.raises(ValueError, match="compressed"):
        read_npz(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", a=np.zeros(2**18))
    with pytest.raises(ValueError, match="more than its rows can take"):
        read_npz(tmp_path / "c.npz", 1_000)


# --- pool.json ------------------------------------------------------------------------------------

PART = ["/data/0.tar", "0.tar", 0, None, [5, 6]]


@pytest.mark.parametrize(
    "content",
    [
        *BAD_JSON.values(),
        *(json.dumps(value).encode() for value in (
            [], None, 5, {}, {"shards": []},
            *({"encoder": {}, "fields": ["image"], "columns": {}, "options": {}, "shards": [], **change} for change in (
                {"encoder": 5}, {"fields": "image"}, {"fields": [1]}, {"columns": []}, {"options": None}, {"shards": 5},
                {"shards": [5]}, {"shards": [[]]}, {"shards": [PART[:4]]}, {"shards": [[5, *PART[1:]]]},
                {"shards": [[*PART[:2], -1, *PART[3:]]]}, {"shards": [[*PART[:3], "x", PART[4]]]},
                {"shards": [[*PART[:4], 7]]}, {"shards": {"a": PART}}, {"shards": None},
            )),
        )),
    ],
)  # fmt: skip
def test_the_plan_of_a_pool_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / PLAN).write_bytes(content)
    with pytest.raises(PoolError, match=PLAN) as error:
        PoolPlan.read(tmp_path)
    assert "\n" not in str(error.value)


def test_the_plan_of_a_pool_is_read(tmp_path: Path) -> None:
    content = {"encoder": {"a": 1}, "fields": ["image"], "columns": {"key": "string"}, "options": {}, "shards": [PART]}
    (tmp_path / PLAN).write_text(json.dumps(content))
    plan = PoolPlan.read(tmp_path)
    assert plan is not None
    assert (plan.shards[0].path, plan.shards[0].rows, plan.shards[0].stamp) == ("/data/0.tar", None, (5, 6))
