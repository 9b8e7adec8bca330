"""What is unusual about samples is counted and told in the same words by every command, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.common import picture, tar_of
from tests.embedding.test_pipeline import TOY
from tests.resharding.common import keys_file, listed
from thresher.check.data import doctor
from thresher.data import members, samples
from thresher.data.options import DataOptions
from thresher.embedding.pipeline import embed
from thresher.resharding import reshard
from thresher.resharding.job import Form
from thresher.runtime.progress import Silent
from thresher.train.data import open_pairs

KEYS = ["a", "b", "c", "d"]


class Said(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def tars(top: Path) -> str:
    """Two samples with two images each, and two of which the caption is at the end of the tar."""
    several = [(f"{key}.{kind}", data) for key in "ab" for kind, data in
               (("jpeg", picture(1, "JPEG")), ("png", picture(2)), ("txt", b"a caption"))]  # fmt: skip
    apart = [(f"{key}.png", picture(3)) for key in "cd"] + [(f"{key}.txt", b"another") for key in "cd"]
    (top / "data").mkdir()
    (top / "data" / "0.tar").write_bytes(tar_of([*several, *apart]))
    return str(top / "data")


def rows(top: Path) -> str:
    """Rows with 1, 2, 1 and 2 images."""
    cells = [[{"bytes": picture(i), "path": None}] * (1 + i % 2) for i in range(4)]
    pq.write_table(pa.table({"key": KEYS, "image": cells, "text": ["a caption"] * 4}), top / "data.parquet")
    return str(top / "data.parquet")


def lines(top: Path) -> str:
    """The same as a list."""
    for i in range(4):
        (top / f"{i}.png").write_bytes(picture(i))
    text = "".join(
        json.dumps({"key": key, "image": [f"{i}.png"] * (1 + i % 2), "text": "a caption"}) + "\n"
        for i, key in enumerate(KEYS)
    )
    (top / "data.jsonl").write_text(text)
    return str(top / "data.jsonl")


CASES: list[tuple[Any, dict[str, int], Form | None]] = [
    (tars, {members.SEVERAL: 2, members.APART: 2}, None),
    (tars, {members.SEVERAL: 2, members.APART: 2}, "parquet"),
    (rows, {samples.SEVERAL: 2}, "webdataset"),
    (rows, {}, "parquet"),  # rows are copied with all their images
    (lines, {samples.SEVERAL: 2}, None),
    (lines, {samples.SEVERAL: 2}, "parquet"),
]


@pytest.mark.parametrize(("make", "notes", "form"), CASES)
@pytest.mark.parametrize("shuffle", [None, 1])
def test_reshard_counts_notes(
    tmp_path: Path, make: Any, notes: dict[str, int], form: Form | None, shuffle: int | None
) -> None:
    data, sel, out = make(tmp_path), keys_file(tmp_path / "k", KEYS), str(tmp_path / "out")
    options = DataOptions(key="key") if make is lines else DataOptions()
    done = reshard(data, sel, out, form=form, shuffle=shuffle, options=options)
    assert dict(done.noted) == notes
    assert sorted(done.notes) == sorted(f"2 samples {note}" for note in notes)
    assert reshard(data, sel, out, form=form, shuffle=shuffle, options=options) == done, "it is resumed"


@pytest.mark.parametrize(("make", "notes", "form"), [CASES[0], CASES[2], CASES[4]])
def test_the_other_commands_count_them_too(tmp_path: Path, make: Any, notes: dict[str, int], form: Form | None) -> None:
    data = make(tmp_path)
    assert doctor(data)["notes"] == notes
    expected = tuple(f"2 rows {note}" for note in sorted(notes))
    assert embed(data, tmp_path / "pool", TOY).notes == expected
    assert embed(data, tmp_path / "pool", TOY).notes == expected, "it is resumed"
    said = Said()
    (tmp_path / "run").mkdir()
    open_pairs(data, tmp_path / "run", side=8, resize="shortest", captions=True, progress=said)
    assert said.lines == [f"{data}: {line}" for line in expected]


def test_one_is_singular() -> None:
    assert samples.noted("row", {samples.SEVERAL: 1, members.APART: 0}) == [
        "1 row has several images; the first is used"
    ]


@pytest.mark.parametrize("trainable", [False, True])
def test_the_image_is_that_of_open_clip(tmp_path: Path, trainable: bool) -> None:
    """open_clip takes jpg, png, jpeg, webp in this order; so a .png before a .jpeg, whichever is first in the tar."""
    data = tars(tmp_path)
    done = reshard(data, keys_file(tmp_path / "k", ["a"]), str(tmp_path / "out"), trainable=trainable)
    assert done.converted == done.renamed == 0
    assert [name for name, _ in listed(tmp_path / "out")] == ["a.jpeg", "a.png", "a.txt"], "nothing is lost"
    assert members.NO_NAMES.image_in(["jpeg", "png", "txt"]) == "png"
    assert members.NO_NAMES.image_in(["tiff", "webp", "bmp"]) == "webp"
    assert reshard(data, keys_file(tmp_path / "k", ["a"]), str(tmp_path / "rows"), form="parquet").samples == 1
    table = pq.read_table(next((tmp_path / "rows").glob("*.parquet")))
    assert table.column("image").to_pylist()[0]["bytes"] == picture(2)
