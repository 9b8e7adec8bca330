"""Lines and rows of csv files."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import PoolError, UsageError
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
    assert len(data) > 2 << 20
    found = [row[0] for _, _, row in rows(io.BytesIO(data), "x", 0, ",")]
    assert found == [f"{i:06d}" for i in range(200_000)]


def test_rows_may_have_an_image_in_a_cell_and_are_limited() -> None:
    """OFA, Wukong: base64 of an image has more characters than the 131,072 that Python's reader allows."""
    data = b"a,b\nc," + b"x" * (1 << 21) + b"\nd,x\n"
    found = list(rows(io.BytesIO(data), "x.csv", 0, ","))
    assert [len(row[1]) for _, _, row in found] == [1, 1 << 21, 1]
    assert [data[begin:end] for begin, end, _ in found] == data.splitlines(keepends=True)
    line = b"x" * (LINE // 4) + b"\n"
    for row in (line * 5, line * 3 + b'","' + line * 3):  # one cell, or several
        with pytest.raises(PoolError, match=r"x.csv: the row at byte 4 exceeds 16,777,216 bytes, or has a quote"):
            list(rows(io.BytesIO(b"a,b\n" + b'"' + row + b'"\n'), "x.csv", 0, ","))


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", ["filepath\ttitle\na\tb\n", "filepath,title\n"])
def test_other_codes_are_named(code: str, text: str) -> None:
    name = code.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(PoolError, match=f"x.csv: is {name}, not UTF-8; save it as UTF-8: iconv -f {name} -t UTF-8"):
        header(io.BytesIO(text.encode(code)), "x.csv")


def test_names_of_columns_that_are_given() -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        data = mark + b"a.jpg|one, two\n"
        assert header(io.BytesIO(data), "x", (), ["p", "t"]) == (["p", "t"], ",", len(mark))
    assert header(io.BytesIO(b"a.jpg|one\n"), "x", (), ["p", "t"])[1] == "|"
    with pytest.raises(UsageError, match=r"--columns names 3 columns \(p, t, u\), but the first line has 2: a.jpg,one"):
        header(io.BytesIO(b"a.jpg,one\n"), "x", (), ["p", "t", "u"])


@pytest.mark.parametrize("blank", [b"\n", b"\r\n\r\n", b"  \n\t\n", b"\xef\xbb\xbf\n", b"\r"])
def test_blank_lines_before_the_names_are_skipped(blank: bytes) -> None:
    end = b"\r" if blank == b"\r" else b"\n"
    for first in (b"filepath\ttitle", b"filepath,title", b"sep=|" + end + b"filepath|title"):
        data = blank + first + end + b"a,b" + end
        names, delimiter, at = header(io.BytesIO(data), "x")
        assert (names, data[at:]) == (["filepath", "title"], b"a,b" + end)
        assert delimiter == chr(first[-6])
    assert header(io.BytesIO(blank), "x")[0] == header(io.BytesIO(b""), "x")[0] == []
    names, _, at = header(io.BytesIO(blank + b"a.jpg|one\n"), "x", (), ["p", "t"])
    assert [row for _, _, row in rows(io.BytesIO(blank + b"a.jpg|one\n"), "x", at, "|")] == [["a.jpg", "one"]]


def test_two_columns_with_one_name_are_refused() -> None:
    with pytest.raises(PoolError, match="x: has several columns with the name title; rename all but one"):
        header(io.BytesIO(b"filepath,title, title \n"), "x")
    assert header(io.BytesIO(b",filepath,title,\n"), "x")[0] == ["", "filepath", "title", ""]


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


def cells(data: bytes) -> list[list[str]]:
    return [row for _, _, row in rows(io.BytesIO(data), "x.csv", 0, ",")]


@pytest.mark.parametrize(
    "data",
    [
        b'0.jpg,"a red dog\n1.jpg,"a blue dog\n',  # two rows would become one
        b'0.jpg,"a \\"red\\" dog"\n',  # quotes after backslashes
        b'0.jpg,"one"\n1.jpg,"two\nlines" and more\n',
    ],
)
def test_quotes_that_are_not_those_of_a_csv_are_refused(data: bytes) -> None:
    with pytest.raises(PoolError, match=r"the row at byte \d+ has text behind a quote that closes a cell: .*as two"):
        cells(data)


@pytest.mark.parametrize(
    "data",
    [b'0.jpg,"Hello" he said\n1.jpg,x\n', b'0.jpg,a 12" disk\n', b'"0"x,"a\nb"\n1.jpg,"c ""d"""\n', b'"a"b,"c\nd"e\n'],
)
def test_text_behind_a_quote_is_read_as_in_pandas_if_no_row_is_lost(data: bytes) -> None:
    frame = pd.read_csv(io.BytesIO(data), header=None, dtype=str)
    assert cells(data) == frame.to_numpy().tolist()


@pytest.mark.parametrize("sign", [";", "|", "\t", "^"])
def test_the_delimiter_may_be_told_as_for_excel(sign: str) -> None:
    data = f"sep={sign}\r\nfilepath{sign}title, long\r\na.jpg{sign}b\r\n".encode()
    names, delimiter, end = header(io.BytesIO(data), "x")
    assert (names, delimiter) == (["filepath", "title, long"], sign)
    assert [row for _, _, row in rows(io.BytesIO(data), "x", end, delimiter)] == [["a.jpg", "b"]]
    assert header(io.BytesIO(b"sep=,title\n"), "x")[0] == ["sep=", "title"]
