"""The text of a column of any Arrow type, as keys and as captions; types without views."""

from __future__ import annotations

import datetime
import decimal
import uuid
from typing import Any

import pyarrow as pa
import pytest

from thresher.errors import UsageError
from thresher.io.columns import (
    as_text,
    captions_in,
    cast_batch,
    decoded_schema,
    is_caption,
    not_text,
    plain_batch,
    plain_schema,
    plain_type,
)

UUIDS = [uuid.UUID(int=7 + i * 0x1234567890ABCDEF) for i in range(3)]
DAY = datetime.datetime(2024, 2, 29, 12, 30, 1, 5000)
WORDS = ["a-1", None, "é/2"]

KEYS: dict[str, tuple[pa.Array, list[str | None]]] = {
    "string": (pa.array(WORDS), WORDS),
    "large_string": (pa.array(WORDS, pa.large_string()), WORDS),
    "string_view": (pa.array(WORDS, pa.string_view()), WORDS),
    "dictionary": (pa.array(WORDS).dictionary_encode(), WORDS),
    "dictionary of int8": (pa.array(WORDS).cast(pa.dictionary(pa.int8(), pa.large_string())), WORDS),
    "binary": (pa.array([b"a-1", None, "é/2".encode()]), WORDS),
    "large_binary": (pa.array([b"a-1", None, "é/2".encode()], pa.large_binary()), WORDS),
    "binary_view": (pa.array([b"a-1", None, "é/2".encode()], pa.binary_view()), WORDS),
    "dictionary of views": (
        pa.DictionaryArray.from_arrays(pa.array([0, None, 1]), pa.array(["a-1", "é/2"], pa.string_view())),
        WORDS,
    ),
    "dictionary of binary": (pa.array([b"a-1", None, "é/2".encode()]).dictionary_encode(), WORDS),
    "runs": (pa.RunEndEncodedArray.from_arrays([2, 3], ["a", "b"]), ["a", "a", "b"]),
    "uuid": (pa.array([one.bytes for one in UUIDS], pa.uuid()), list(map(str, UUIDS))),
    "16 bytes": (pa.array([UUIDS[0].bytes, None], pa.binary(16)), [str(UUIDS[0]), None]),
    "json": (pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1", None])), ["1", None]),
    "int8": (pa.array([-1, None, 7], pa.int8()), ["-1", None, "7"]),
    "uint64": (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
    "dictionary of int": (pa.array([5, None]).dictionary_encode(), ["5", None]),
    "bool": (pa.array([True, False, None]), ["true", "false", None]),
    "decimal128": (pa.array([decimal.Decimal("1.50"), None], pa.decimal128(9, 2)), ["1.50", None]),
    "decimal256": (pa.array([decimal.Decimal(10**40)], pa.decimal256(50, 0)), [str(10**40)]),
    "date32": (pa.array([DAY.date(), None]), ["2024-02-29", None]),
    "date64": (pa.array([DAY.date()], pa.date64()), ["2024-02-29"]),
    "timestamp": (pa.array([DAY, None], pa.timestamp("ms")), ["2024-02-29 12:30:01.005", None]),
    "timestamp with zone": (pa.array([DAY], pa.timestamp("s", "UTC")), ["2024-02-29 12:30:01Z"]),
    "time": (pa.array([DAY.time()], pa.time64("us")), ["12:30:01.005000"]),
    "null": (pa.nulls(2), [None, None]),
}
REFUSED: dict[str, tuple[pa.Array, str]] = {
    "float": (pa.array([1.0]), "contains double and cannot be the key: floats are not keys"),
    "half float": (pa.array([1.0], pa.float16()), "floats are not keys"),
    "dictionary of floats": (pa.array([1.0]).dictionary_encode(), "floats are not keys"),
    "3 bytes": (pa.array([b"abc"], pa.binary(3)), r"only 16 bytes \(a UUID\) have a known text"),
    "list": (pa.array([["a"]]), "not a list, a struct or a map"),
    "struct": (pa.array([{"a": 1}]), "not a list, a struct or a map"),
    "map": (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())), "not a list, a struct or a map"),
    "bytes that are not text": (pa.array([b"ab", b"\xff"]), "its bytes are not UTF-8 text"),
    "the same as a dictionary": (pa.array([b"ab", b"\xff"]).dictionary_encode(), "its bytes are not UTF-8 text"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_every_type_are_text(name: str) -> None:
    """pandas#28252, arrow#47177: keys of dictionary, binary, view, decimal, timestamp and UUID types."""
    column, wanted = KEYS[name]
    found = as_text(column, "a.parquet", "key")
    assert (found.type, found.to_pylist()) == (pa.large_string(), wanted)
    assert as_text(column[1:], "a.parquet", "key").to_pylist() == wanted[1:]
    chunked = as_text(pa.chunked_array([column, column]), "a.parquet", "key")
    assert (chunked.type, chunked.to_pylist()) == (pa.large_string(), wanted * 2)


@pytest.mark.parametrize("name", REFUSED)
def test_other_keys_are_refused_by_name(name: str) -> None:
    column, why = REFUSED[name]
    with pytest.raises(UsageError, match=f"^dir/a.parquet: the column 'id' .*{why}.*; name a column .* --key") as error:
        as_text(column, "dir/a.parquet", "id")
    assert len(str(error.value).splitlines()) == 1


def test_intervals_are_refused() -> None:
    assert not_text(pa.month_day_nano_interval())


def test_the_usual_text_is_not_copied() -> None:
    usual = pa.array(["abc", "d"])
    assert as_text(usual, "", "").buffers()[2].address == usual.buffers()[2].address
    large = usual.cast(pa.large_string())
    assert as_text(large, "", "") is large


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
        (pa.array([b"\xef\xbb\xbfa", b"\xff", None]), ["a", "\ufffd", None]),
        (pa.array(["a", None], pa.string_view()), ["a", None]),
        (pa.DictionaryArray.from_arrays(pa.array([0, None]), pa.array(["a"], pa.string_view())), ["a", None]),
        (pa.array([["a", None, "b"], None, []], pa.list_(pa.string_view())), [["a", None, "b"], None, []]),
        (pa.array([[b"a"]], pa.large_list(pa.binary())), [["a"]]),
        (pa.array([["a"]], pa.list_view(pa.string())), [["a"]]),
        (pa.array([["a", "b"]], pa.list_(pa.string(), 2)), [["a", "b"]]),
    ],
)
def test_captions_of_every_type_are_text(column: pa.Array, wanted: list[Any]) -> None:
    assert is_caption(column.type)
    assert captions_in(column) == wanted


@pytest.mark.parametrize("kind", [pa.int64(), pa.list_(pa.int64()), pa.struct([("a", pa.string())]), pa.binary(3)])
def test_other_columns_are_not_taken_for_captions(kind: pa.DataType) -> None:
    assert not is_caption(kind)


VIEWS: dict[str, tuple[pa.DataType, Any]] = {
    "text": (pa.string_view(), "x"),
    "bytes": (pa.binary_view(), b"x"),
    "list": (pa.list_(pa.string_view()), ["x", None]),
    "large list": (pa.large_list(pa.binary_view()), [b"x"]),
    "fixed list": (pa.list_(pa.string_view(), 2), ["x", "y"]),
    "list view": (pa.list_view(pa.string_view()), ["x", "y"]),
    "large list view": (pa.large_list_view(pa.float32()), [1.0, 2.0, 3.0]),
    "map": (pa.map_(pa.string_view(), pa.binary_view()), [("a", b"x"), ("b", None)]),
    "struct": (pa.struct([("a", pa.list_(pa.string_view())), ("b", pa.int8())]), {"a": ["x"], "b": 1}),
}


@pytest.mark.parametrize("name", VIEWS)
def test_plain_types_have_the_same_values_without_views(name: str) -> None:
    """Arrow takes and filters no rows of views, as polars writes them."""
    kind, value = VIEWS[name]
    batch = pa.record_batch({"k": pa.array([value, None, value, value], kind)})[1:]
    plain = plain_batch(batch)
    plain.validate(full=True)
    assert plain.schema.field("k").type == plain_type(kind)
    assert "view" not in str(plain_type(kind))
    assert plain.column(0).to_pylist() == [None, value, value]
    assert plain.take([2, 0]).column(0).to_pylist() == [value, None]


@pytest.mark.parametrize("inside", ["", "list", "struct"])
@pytest.mark.parametrize("start", [0, 1])
def test_dictionaries_of_views_become_text(inside: str, start: int) -> None:
    """polars writes Categorical and Enum to IPC as these; Arrow neither takes nor decodes them."""
    values = pa.DictionaryArray.from_arrays(pa.array([1, None, 0], pa.uint32()), pa.array(["a", "b"], pa.string_view()))
    if inside == "list":
        values = pa.ListArray.from_arrays(pa.array([0, 2, None, 3]), values)
    if inside == "struct":
        values = pa.StructArray.from_arrays([values], names=["a"], mask=pa.array([False, False, True]))
    batch = pa.record_batch({"k": values})[start:]
    rows = {"": ["b", None, "a"], "list": [["b", None], ["a"], None], "struct": [{"a": "b"}, {"a": None}, None]}
    plain = plain_batch(batch)
    plain.validate(full=True)
    assert plain.schema.equals(plain_schema(batch.schema))
    assert "view" not in str(plain.schema)
    assert plain.column(0).to_pylist() == rows[inside][start:]
    decoded = cast_batch(plain, decoded_schema(plain.schema))
    decoded.validate(full=True)
    assert "dictionary" not in str(decoded.schema)
    assert decoded.take([1, 0]).column(0).to_pylist() == rows[inside][start:][1::-1]


def test_slices_of_structs_with_a_field_of_nulls_are_valid() -> None:
    """Arrow's own cast cuts the nulls twice; images whose path is always null have this type."""
    kind = pa.struct([("bytes", pa.binary_view()), ("path", pa.null())])
    rows = [None, *({"bytes": bytes([i]), "path": None} for i in range(7))]
    for start in range(8):
        plain = plain_batch(pa.record_batch({"k": pa.array(rows, kind)})[start:])
        plain.validate(full=True)
        assert plain.column(0).to_pylist() == rows[start:]


def test_runs_become_values() -> None:
    batch = pa.record_batch({"k": pa.RunEndEncodedArray.from_arrays([2, 3], ["a", "b"])})
    assert plain_batch(batch).take([1, 2]).column(0).to_pylist() == ["a", "b"]


def test_a_batch_without_views_is_the_same_object() -> None:
    usual = pa.record_batch({"a": pa.array(["x"]), "b": pa.array([[1]])})
    assert plain_batch(usual) is usual
