"""Corpora have exactly the planted faults, the same every time; evaluation sets are cut without a group in both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.train.conftest import emoji
from thresher.errors import PoolError, UsageError
from thresher.io.pictures import decode
from thresher.lab.corpus import INDEX, changed_slightly, cut_in_halves, make_corpus
from thresher.lab.plan import Corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab-data")
    table = emoji(220).append_column("kind", pa.array([f"kind {row % 4}" for row in range(220)]))
    pq.write_table(table.slice(0, 120), folder / "train.parquet")
    pq.write_table(table.slice(120), folder / "other.parquet")
    return folder


def made(corpus: Corpus, data: Path, folder: Path) -> tuple[dict[str, int], pa.Table]:
    folder.mkdir()
    info = make_corpus(
        corpus, str(data / "train.parquet"), str(data / "other.parquet"), folder / "train.parquet", captions=True
    )
    return info, pq.read_table(folder / info["data"] if info["data"] else data / "train.parquet")


def test_a_corpus_as_it_is_is_not_copied(data: Path, tmp_path: Path) -> None:
    info, table = made(Corpus(), data, tmp_path / "a")
    assert (info["data"], info["rows"], len(table)) == ("", 120, 120)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [INDEX]


def test_swapped_captions_are_all_wrong_and_none_is_lost(data: Path, tmp_path: Path) -> None:
    info, table = made(Corpus(swapped=0.3), data, tmp_path / "a")
    before = emoji(120)
    was, now, planted = (column.to_pylist() for column in (before["text"], table["text"], table["planted"]))
    assert info["swapped"] == planted.count("swapped") == 36
    assert [a == b for a, b in zip(was, now, strict=True)] == [kind == "" for kind in planted]
    assert sorted(was) == sorted(now)
    assert table["image"].to_pylist() == before["image"].to_pylist() or [
        cell["bytes"] for cell in table["image"].to_pylist()
    ] == [cell["bytes"] for cell in before["image"].to_pylist()]


def test_a_single_row_has_no_other_caption_to_get(data: Path, tmp_path: Path) -> None:
    info, table = made(Corpus(swapped=0.01), data, tmp_path / "a")
    assert info["swapped"] == 0
    assert set(table["planted"].to_pylist()) == {""}


def test_columns_of_the_data_are_kept_with_their_types(data: Path, tmp_path: Path) -> None:
    before = pq.read_table(data / "train.parquet")
    before = before.append_column("size", pa.array(range(len(before)), pa.int16()))
    before = before.append_column("score", pa.nulls(len(before), pa.float32()))
    pq.write_table(before, tmp_path / "train.parquet")
    corpus = Corpus(rows=100)
    make_corpus(corpus, str(tmp_path / "train.parquet"), "", tmp_path / "made.parquet", captions=True)
    table = pq.read_table(tmp_path / "made.parquet")
    assert [table.schema.field(name).type for name in ("size", "score")] == [pa.int16(), pa.float32()]
    assert len(set(table["size"].to_pylist())) == 100


def test_captions_can_be_swapped_within_a_class(data: Path, tmp_path: Path) -> None:
    _, table = made(Corpus(swapped=0.5, within="kind"), data, tmp_path / "a")
    kind_of = dict(zip(emoji(120)["text"].to_pylist(), table["kind"].to_pylist(), strict=True))
    assert all(
        kind_of[text] == kind for text, kind in zip(*(table[c].to_pylist() for c in ("text", "kind")), strict=True)
    )
    with pytest.raises(UsageError, match="has no column 'colour' to swap captions within; it has .*kind"):
        made(Corpus(swapped=0.5, within="colour"), data, tmp_path / "b")


def test_shares_of_copies_and_off_topic_rows_are_those_of_the_whole(data: Path, tmp_path: Path) -> None:
    info, table = made(Corpus(duplicated=0.3, off_topic=0.1), data, tmp_path / "a")
    planted = table["planted"].to_pylist()
    assert len(table) == info["rows"] == 200
    assert (planted.count("duplicate"), planted.count("off-topic"), planted.count("")) == (60, 20, 120)
    keys = table["key"].to_pylist()
    assert len(set(keys)) == len(keys)
    assert pq.read_table(tmp_path / "a" / INDEX)["key"].to_pylist() == keys
    outside = set(emoji(220).slice(120)["text"].to_pylist())
    off_topic = [text for text, kind in zip(table["text"].to_pylist(), planted, strict=True) if kind == "off-topic"]
    assert set(off_topic) <= outside


def test_too_little_off_topic_data_is_an_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has 100 rows, but 120 off-topic rows are wanted"):
        made(Corpus(off_topic=0.5), data, tmp_path / "a")


def test_a_corpus_is_the_same_every_time_and_another_with_another_seed(data: Path, tmp_path: Path) -> None:
    how = {"rows": 50, "swapped": 0.2, "duplicated": 0.2}
    first, again, other = (
        made(Corpus(**how, seed=seed), data, tmp_path / name)[1] for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.equals(again)
    assert not first.equals(other)
    assert (tmp_path / "a" / "train.parquet").read_bytes() == (tmp_path / "b" / "train.parquet").read_bytes()


def test_a_near_duplicate_looks_alike_but_is_not_the_same() -> None:
    picture = emoji(1)["image"][0].as_py()["bytes"]
    copy = changed_slightly(picture, 0, 1)
    one, two = (decode(data, 32).astype(float) for data in (picture, copy))
    assert copy != picture
    assert 0 < np.abs(one - two).mean() < 40
    assert changed_slightly(picture, 0, 1) == copy != changed_slightly(picture, 0, 2)


def test_halves_share_no_group_and_have_all_rows(data: Path, tmp_path: Path) -> None:
    paths = cut_in_halves(str(data / "other.parquet"), tmp_path, group=None, labels=("kind",))
    assert [Path(path).name for path in paths] == ["other-selection.parquet", "other-held-out.parquet"]
    first, second = (pq.read_table(path) for path in paths)
    assert not set(first["group"].to_pylist()) & set(second["group"].to_pylist())
    assert sorted([*first["key"].to_pylist(), *second["key"].to_pylist()]) == sorted(
        emoji(220).slice(120)["key"].to_pylist()
    )
    assert first.schema.equals(second.schema)


@pytest.mark.parametrize("where", ["start", "end"])
def test_an_image_that_cannot_be_evaluated_is_named_before_anything_is_trained(
    data: Path, tmp_path: Path, where: str
) -> None:
    table = pq.read_table(data / "other.parquet")
    pictures = table["image"].to_pylist()
    bad = {"start": 3, "end": len(pictures) - 1}[where]
    pictures[bad]["bytes"] = pictures[bad]["bytes"][:40]
    path = tmp_path / "eval.parquet"
    column = pa.array(pictures, table["image"].type)
    pq.write_table(table.set_column(table.schema.get_field_index("image"), "image", column), path)
    with pytest.raises(PoolError, match=rf"eval\.parquet: row {bad} .*; evaluations do not skip rows"):
        cut_in_halves(str(path), tmp_path, group=None, labels=("kind",))
    assert [one.name for one in tmp_path.iterdir()] == ["eval.parquet"]
