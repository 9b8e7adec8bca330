"""Tables of text: the types of their columns, the same however they are read, in memory that does not grow."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher import PoolError
from thresher.io.tables import any_table
from thresher.io.text_table import text_table


def rows(path: Path, **how: Any) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Types and rows of a table."""
    table = text_table("file", str(path), **how)
    parts = list(table.stream(table.columns, 2))
    schema = table.schema(table.columns)
    assert all(part.schema.equals(schema) for part in parts)
    found = [row for part in parts for row in part.to_pylist()]
    assert table.rows == len(found)
    return {field.name: str(field.type) for field in schema}, found


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["1", "-2", "0"], "int64", [1, -2, 0]),
        (["1", "2.5", ""], "double", [1.0, 2.5, None]),
        ([".5", "1e-3", "-2.E+1"], "double", [0.5, 0.001, -20.0]),
        (["inf", "-INF", "Infinity"], "double", [math.inf, -math.inf, math.inf]),
        ([" 1", "2 ", "3"], "int64", [1, 2, 3]),
        (["012", "2", "3"], "string", ["012", "2", "3"]),  # zeros that a number would lose
        (["1", "123456789012345678901", "3"], "string", ["1", "123456789012345678901", "3"]),
        (["1", "NA", "3"], "string", ["1", "NA", "3"]),
        (["1_000", "2", "3"], "string", ["1_000", "2", "3"]),
        (["\u0661", "2", "3"], "string", ["\u0661", "2", "3"]),
        (["", "", ""], "null", [None] * 3),
    ],
)
def test_types_of_columns_of_csv(tmp_path: Path, cells: list[str], kind: str, values: list[Any]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("key,x\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells)), encoding="utf-8")
    kinds, found = rows(path)
    assert kinds == {"key": "string", "x": kind}
    assert [row["x"] for row in found] == values
    assert [row["key"] for row in found] == ["0", "1", "2"]
    assert rows(path, text=("x",))[0] == {"key": "int64", "x": "string"}


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        ([1, None, 3], "int64", [1, None, 3]),
        ([1, 2.5, math.nan], "double", [1.0, 2.5, math.nan]),
        (["1", "2", None], "string", ["1", "2", None]),
        ([True, False, None], "bool", [True, False, None]),
        ([True, 1, "a"], "string", ["true", "1", "a"]),
        ([2**63, 1, 2], "string", [str(2**63), "1", "2"]),
        ([[1, 2], {"a": None}, "b"], "string", ["[1, 2]", '{"a": null}', "b"]),
        ([None, None, None], "null", [None] * 3),
    ],
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_types_of_columns_of_json(tmp_path: Path, ending: str, cells: list[Any], kind: str, values: list[Any]) -> None:
    path, objects = tmp_path / f"a.{ending}", [{"id": i, "x": cell} for i, cell in enumerate(cells)]
    path.write_text(json.dumps(objects) if ending == "json" else "\n".join(map(json.dumps, objects)))
    kinds, found = rows(path)
    assert kinds == {"id": "string", "x": kind}
    assert [row["id"] for row in found] == ["0", "1", "2"]
    assert repr([row["x"] for row in found]) == repr(values)


@given(st.lists(st.one_of(st.none(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4)), max_size=12))
def test_every_value_of_json_is_read_back(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    path = tmp_path_factory.mktemp("t") / "a.jsonl"
    path.write_text("".join(json.dumps({"x": value}) + "\n" for value in values) or '{"x": null}\n')
    kind, found = rows(path, text=())
    for value, row in zip(values, found, strict=False):
        if kind["x"] == "double" and value is not None:
            assert repr(row["x"]) == repr(float(value))
        elif kind["x"] == "string" and value is not None and not isinstance(value, str):
            assert repr(json.loads(row["x"])) == repr(value)
        else:
            assert row["x"] == value


def test_scattered_rows_columns_in_the_order_asked_and_pickles(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("key\tx\ty\n" + "".join(f"k{i}\t{i}\t{i / 2}\n" for i in range(100)))
    table = pickle.loads(pickle.dumps(any_table("file", str(path))))
    found = pa.Table.from_batches(table.take(["y", "key"], np.array([3, 50, 99])))
    assert found.to_pydict() == {"y": [1.5, 25.0, 49.5], "key": ["k3", "k50", "k99"]}


def test_a_file_that_changes_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("key,x\na,1\nb,2\n")
    table = any_table("file", str(path))
    for now, says in (("key,x\na,1\n", "had 2 rows when it was opened"), ("key,x\na,1\nb,z\n", "has changed since")):
        path.write_text(now)
        with pytest.raises(PoolError, match=says):
            list(table.stream(["key", "x"]))


def test_names_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"x{i}": 1}}\n' for i in range(5_000)))
    with pytest.raises(PoolError, match="more than 4,096 columns"):
        any_table("file", str(path))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json"])
def test_blank_lines_before_the_first_row_are_skipped(tmp_path: Path, name: str) -> None:
    content = {
        "a.csv": "key,score\nx,1\n",
        "a.tsv": "key\tscore\nx\t1\n",
        "a.jsonl": '{"key": "x", "score": 1}\n',
        "a.json": '[{"key": "x", "score": 1}]',
    }[name]
    (tmp_path / name).write_text("\n \n" + content, encoding="utf-8")
    assert rows(tmp_path / name) == ({"key": "string", "score": "int64"}, [{"key": "x", "score": 1}])
    (tmp_path / name).write_text("\n\n" if name != "a.json" else "\n[]", encoding="utf-8")
    with pytest.raises(PoolError, match=f"{name}: has no rows"):
        text_table("file", str(tmp_path / name))
