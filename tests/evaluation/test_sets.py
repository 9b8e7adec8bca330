"""Evaluation sets as they come: captions one or several, labels of any column, pictures by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher.errors import PoolError, UsageError
from thresher.evaluation.sets import read_eval

PICTURES = [f"picture {i}".encode() for i in range(7)]
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write(path: Path, **columns: Any) -> str:
    image = pa.array([{"bytes": data, "path": None} for data in PICTURES], STRUCT)
    pq.write_table(pa.table({"id": [f"k{i}" for i in range(7)], "image": image, **columns}), path, row_group_size=3)
    return str(path)


def test_captions_groups_and_labels(tmp_path: Path) -> None:
    path = write(
        tmp_path / "shoes_eval.parquet",
        text=[f"text {i}" for i in range(7)],
        group=[10, 10, 5, 7, 7, 7, 99],
        label=[3, 12, 3, None, 12, 3, 3],
        colour=["red", "blue", None, "red", "red", "green", "blue"],
    )
    found = read_eval(path, labels=["label", "colour"])
    assert (found.name, len(found), found.texts[6]) == ("shoes_eval", 7, "text 6")
    assert found.text_row_M.tolist() == list(range(7))
    assert found.group_N.tolist() == found.text_group_M.tolist() == [2, 2, 0, 1, 1, 1, 3]
    assert found.labels["label"].names == ("3", "12")  # in the order of the numbers
    assert found.labels["label"].index_N.tolist() == [0, 1, 0, -1, 1, 0, 0]
    assert found.labels["colour"].names == ("blue", "green", "red")
    assert found.labels["colour"].index_N.tolist() == [2, 0, -1, 2, 2, 1, 0]
    assert (found.group, found.column("group")) == ("group", [10, 10, 5, 7, 7, 7, 99])
    with pytest.raises(UsageError, match="metadata column .title.;.* has id, image"):
        found.column("title")
    assert list(read_eval(path).labels) == ["label"]
    assert read_eval(path, labels=()).labels == {}


def test_several_captions_of_a_picture(tmp_path: Path) -> None:
    texts = [[f"{i} {j}" for j in range(1 + i % 3)] for i in range(7)]
    found = read_eval(write(tmp_path / "a.parquet", texts=texts, label_name=["x"] * 7, label=[0] * 7))
    assert found.texts == tuple(text for each in texts for text in each)
    assert found.text_row_M.tolist() == [i for i, each in enumerate(texts) for _ in each]
    assert found.group_N.tolist() == list(range(7))
    assert found.group is None
    assert found.text_group_M.tolist() == found.text_row_M.tolist()
    assert list(found.labels) == ["label_name"]


def test_pictures_by_row_and_all(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "b.parquet")
    write(folder / "a.parquet")
    found = read_eval(str(folder))
    assert len(found) == 14
    assert found.texts == ()
    assert found.pictures([9, 0, 9, 13]) == [PICTURES[i % 7] for i in (9, 0, 9, 13)]
    assert found.pictures(np.empty(0, np.int64)) == []
    batches = list(found.batches(4))
    assert np.concatenate([rows for rows, _ in batches]).tolist() == list(range(14))
    assert [data for _, part in batches for data in part] == PICTURES * 2
    assert max(len(part) for _, part in batches) <= 4


def test_plain_binary_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"jpg": PICTURES}), path)
    assert read_eval(str(path), image="jpg").pictures([2]) == [PICTURES[2]]


def test_a_picture_that_is_missing_is_told_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.array([{"bytes": b"x", "path": "a"}, {"bytes": None, "path": "b"}])}), path)
    found = read_eval(str(path))
    assert found.pictures([0]) == [b"x"]
    with pytest.raises(PoolError, match="row 1 has no bytes in column 'image'"):
        found.pictures([1])
    with pytest.raises(PoolError, match="row 1 has no bytes"):
        list(found.batches())


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({}, {"image": "imag"}, r"has no column 'imag'; it has id, image.*Did you mean 'image'"),
        ({}, {"text": "title"}, "has no column 'title'"),
        ({"colour": ["x"] * 7}, {"labels": ["color"]}, "has no column 'color'.*Did you mean 'colour'"),
        ({}, {"group": "group"}, "has no column 'group'"),
        (
            {},
            {"needs": ("texts",)},
            r"no column of texts \(text, texts, caption, captions\); name another column: it has id, image",
        ),
        ({}, {"needs": ("labels",)}, r"no column of labels \(label_name, label\)"),
        ({}, {"image": "id"}, "column 'id' has type string; images are structs"),
        ({"text": ["a"] * 6 + [None]}, {}, "row 6 has no text in column 'text'"),
        ({"text": ["a", " "] + ["b"] * 5}, {}, "row 1 has no text"),
        ({"texts": [["a"]] * 6 + [[]]}, {}, "row 6 has no text in column 'texts'"),
        ({"group": [1] * 6 + [None]}, {}, "row 6 has no 'group'"),
        ({"label": [0.5] * 7}, {}, "neither text nor integers"),
        ({"label": pa.array([None] * 7, pa.int64())}, {}, "no row has a label in column 'label'"),
    ],
)
def test_what_is_missing_is_named(columns: dict, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_eval(write(tmp_path / "a.parquet", **columns), **options)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(PoolError):
        read_eval(str(tmp_path / "nothing.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(PoolError):
        read_eval(str(tmp_path / "bad.parquet"))
