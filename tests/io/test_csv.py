"""Lines and rows of csv files."""

from __future__ import annotations

import csv
import io

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import PoolError
from thresher.io.csv import LINE, Lines, header, rows


@given(st.text('ab,"\r\n', max_size=30), st.integers(1, 9))
def test_lines_are_those_of_universal_line_ends(text: str, most: int) -> None:
    data = text.encode()
    expected = data.splitlines(keepends=True)
    lines = Lines(io.BytesIO(data), "x", most=most)
    if max(map(len, expected), default=0) > most:
        with pytest.raises(PoolError, match="x: the line at byte .* exceeds"):
            list(lines)
    else:
        assert [line.encode() for line in lines] == expected
        assert (lines.at, lines.ended) == (len(data), True)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_with_all_line_ends_are_those_of_pandas(end: str) -> None:
    text = end.join(["a,b", "1,2", "", f'"3{end}4",5', '"6""",7'])
    found = list(rows(io.BytesIO(text.encode()), "x", 0, ","))
    frame = pd.read_csv(io.BytesIO(text.encode()), header=None, dtype=str)
    assert [row for _, _, row in found] == frame.to_numpy().tolist()
    assert [next(rows(io.BytesIO(text.encode()), "x", begin, ","))[2] for begin, _, _ in found] == [
        row for _, _, row in found
    ]


def test_old_line_ends_in_a_file_larger_than_a_line_may_be() -> None:
    lines = [f"{i:06d},caption\r" for i in range(200_000)]
    data = "".join(lines).encode()
    assert len(data) > 2 * LINE
    found = [row[0] for _, _, row in rows(io.BytesIO(data), "x", 0, ",")]
    assert found == [f"{i:06d}" for i in range(200_000)]


def test_a_cell_above_the_limit_is_told_and_the_limit_stays() -> None:
    limit = csv.field_size_limit()
    data = b"a,b\nc," + b"x" * limit + b"\nd," + b"x" * (limit + 1) + b"\n"
    found = rows(io.BytesIO(data), "x.csv", 0, ",")
    assert [len(row[1]) for _, _, row in (next(found), next(found))] == [1, limit]
    with pytest.raises(
        PoolError, match=rf"x.csv: the row at byte {4 + 3 + limit:,} has a cell of more than {limit:,} char"
    ):
        next(found)
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("first", "delimiter", "columns"),
    [
        ("filepath\ttitle", "\t", ["filepath", "title"]),
        ("filepath,title", ",", ["filepath", "title"]),
        ("image_name| comment_number| comment", "|", ["image_name", "comment_number", "comment"]),
        ("Image;Text, long", ";", ["Image", "Text, long"]),
        ("foto;texto", ",", ["foto;texto"]),
        ("a.jpg|x,b", ",", ["a.jpg|x", "b"]),
    ],
)
def test_the_delimiter_is_found_by_names_of_columns(first: str, delimiter: str, columns: list[str]) -> None:
    assert header(io.BytesIO(f"{first}\r\nx".encode()), "x") == (columns, delimiter, len(first) + 2)


def test_the_delimiter_is_found_by_columns_that_the_user_named() -> None:
    assert header(io.BytesIO(b"foto;texto\n"), "x", ["texto"]) == (["foto", "texto"], ";", 11)
