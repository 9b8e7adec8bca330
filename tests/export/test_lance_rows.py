"""From a Lance dataset by ``thresher embed`` to a selection of it: the rows that are kept, and no others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.objects import put, s3_environment
from thresher import Selection, build, embed, open_store, run_steps
from thresher.cli.main import main
from thresher.errors import PoolError, UsageError
from thresher.export.formats.lance import Lance
from thresher.export.lance_rows import _BATCH, LanceRows
from thresher.export.write import export
from thresher.testing.data_reader import pairs

N, BROKEN, DELETED = 40, (0, 17, 39), (5, 30)
TOY: Any = {"encoder": "tests.toy:Toy", "workers": 0}
IN_POOL = [i for i in range(N) if i not in BROKEN + DELETED]


def rows(lo: int, hi: int, *, broken: tuple[int, ...] = BROKEN) -> pa.Table:
    some = list(enumerate(pairs(hi)))[lo:hi]
    return pa.table(
        {
            "number": list(range(lo, hi)),
            "image": pa.array([b"x" if i in broken else one.picture for i, one in some], pa.large_binary()),
            "caption": [one.text for _, one in some],
        }
    )


def write(path: Path, lo: int, hi: int, **how: Any) -> str:
    made = rows(lo, hi, **how)
    lance.write_dataset(made, str(path), mode="append" if path.exists() else "create", max_rows_per_file=15)
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Version 2 of a dataset of three fragments: with deleted rows, and images that cannot be read."""
    path = write(tmp_path / "data.lance", 0, N)
    lance.dataset(path).delete(f"number in {DELETED}")
    return path


@pytest.fixture
def pool(tmp_path: Path, data: str) -> str:
    return made(data, tmp_path / "pool")


def made(data: str, pool: Path) -> str:
    embed(data, out=pool, per_part=7, **TOY)
    return str(pool)


def new_rows(data: str, pool: str) -> int:
    counts: list[int] = []
    embed(data, out=Path(pool), per_part=7, report=lambda found: counts.append(found.new), **TOY)
    return counts[0]


def chosen(pool: str, keep: str = "40%", **more: Any) -> Selection:
    return replace(run_steps(open_store(pool), [build("clip-score", {"keep": keep})]), **more)


def kept_of(selection: Selection) -> list[int]:
    """The numbers of the kept rows, from how the data was made."""
    return [IN_POOL[row] for row in np.flatnonzero(selection.mask())]


def read(path: str, *columns: str, **how: Any) -> dict[str, list[Any]]:
    return dict(lance.dataset(path).to_table(columns=["number", *columns], **how).to_pydict())


def test_a_new_dataset_has_the_kept_rows_of_the_data(tmp_path: Path, data: str, pool: str) -> None:
    selection = chosen(pool)
    assert selection.total == len(IN_POOL)
    done = export(selection, "lance", tmp_path / "new.lance")
    assert done.rows == len(selection)
    new, old = lance.dataset(str(tmp_path / "new.lance")), lance.dataset(data)
    wanted = pa.array(np.isin(old.to_table()["number"], kept_of(selection)))
    assert new.schema.equals(old.schema)
    assert new.to_table().equals(old.to_table().filter(wanted))


def test_the_data_get_a_column_in_which_rows_that_are_not_in_the_pool_are_not_kept(
    tmp_path: Path, data: str, pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    selection = chosen(pool)
    selection.save(str(tmp_path / "subset"))
    command = ["export", str(tmp_path / "subset"), "--as", "lance", "-o", data, "--with-score", "--with-reason"]
    assert main(command) == 0
    assert f"{data}: 3 rows not in the pool, and not kept" in capsys.readouterr().err
    assert lance.dataset(data).version == 3
    found = read(data, "kept", "kept_score", "kept_reason")
    kept = kept_of(selection)
    assert found["number"] == [i for i in range(N) if i not in DELETED]
    assert found["kept"] == [number in kept for number in found["number"]]
    assert read(data, filter="kept")["number"] == kept
    scores = dict(zip(IN_POOL, selection.steps[0].rows["score"], strict=True))
    expected = [scores.get(number, np.nan) for number in found["number"]]
    np.testing.assert_allclose(found["kept_score"], expected, rtol=1e-6)
    reasons = dict(zip(found["number"], found["kept_reason"], strict=True))
    assert {reasons[number] for number in BROKEN} == {"not in the pool"}
    assert all((reasons[number] == "kept") == (number in kept) for number in IN_POOL)
    files = sorted(Path(data).rglob("*"))
    assert main(command) == 0
    assert sorted(Path(data).rglob("*")) == files


def test_another_selection_replaces_the_column(data: str, pool: str) -> None:
    for keep in ("40%", "20%"):
        selection = chosen(pool, keep)
        export(selection, "lance", data, overwrite=True)
        assert read(data, filter="kept")["number"] == kept_of(selection)
    assert lance.dataset(data).schema.names == ["number", "image", "caption", "kept"]


def test_repeats_are_those_of_the_rows(tmp_path: Path, data: str, pool: str) -> None:
    selection = chosen(pool)
    repeats = np.where(selection.mask(), np.arange(len(IN_POOL)) % 3 + 1, 0).astype(np.int32)
    selection = replace(selection, repeats=repeats)
    export(selection, "lance", tmp_path / "new.lance")
    assert read(str(tmp_path / "new.lance"))["number"] == np.repeat(IN_POOL, repeats).tolist()
    export(selection, "lance", data)
    found = read(data, "kept_repeats")
    times = dict(zip(IN_POOL, repeats.tolist(), strict=True))
    assert found["kept_repeats"] == [times.get(number, 0) for number in found["number"]]


@pytest.mark.parametrize("change", ["append", "delete", "update", "compact"])
def test_data_that_changed_get_no_column_but_a_new_dataset_is_of_the_version(
    tmp_path: Path, data: str, pool: str, change: str
) -> None:
    selection, dataset = chosen(pool), lance.dataset(data)
    {
        "append": lambda: write(Path(data), N, N + 4),
        "delete": lambda: dataset.delete("number = 20"),
        "update": lambda: dataset.update({"caption": "'new'"}, where="number = 20"),
        "compact": lambda: dataset.optimize.compact_files(),
    }[change]()
    version = lance.dataset(data).version
    message = rf"that was version 2, and the newest is {version}; embed it into a new pool and select again"
    with pytest.raises(UsageError, match=message) as caught:
        export(selection, "lance", data)
    assert "\n" not in str(caught.value)
    assert lance.dataset(data).version == version
    export(selection, "lance", tmp_path / "new.lance")
    assert read(str(tmp_path / "new.lance"))["number"] == kept_of(selection)


def test_columns_that_were_added_since_do_not_count(tmp_path: Path, data: str, pool: str) -> None:
    selection = chosen(pool)
    lance.dataset(data).add_columns({"twice": "number * 2"})
    export(selection, "lance", tmp_path / "new.lance")
    assert lance.dataset(str(tmp_path / "new.lance")).schema.names == ["number", "image", "caption"]
    export(selection, "lance", data)
    assert read(data, "twice", filter="kept")["twice"] == [number * 2 for number in kept_of(selection)]


def test_a_pool_of_an_older_version_is_of_that_version(tmp_path: Path, data: str) -> None:
    pool = made(f"{data}@1", tmp_path / "pool")
    selection = chosen(pool)
    assert selection.total == N - len(BROKEN)
    export(selection, "lance", tmp_path / "new.lance")
    numbers = [i for i in range(N) if i not in BROKEN]
    assert read(str(tmp_path / "new.lance"))["number"] == [numbers[row] for row in np.flatnonzero(selection.mask())]
    with pytest.raises(UsageError, match="that was version 1, and the newest is 2"):
        export(selection, "lance", data)


def test_a_pool_that_has_grown_is_of_the_newer_version(tmp_path: Path, data: str, pool: str) -> None:
    write(Path(data), N, N + 8)
    assert new_rows(data, pool) == 8
    assert new_rows(f"{data}@2", pool) == 0  # has all of its rows already
    selection = chosen(pool)
    numbers = IN_POOL + list(range(N, N + 8))
    assert selection.total == len(numbers)
    export(selection, "lance", data)
    assert read(data, filter="kept")["number"] == [numbers[row] for row in np.flatnonzero(selection.mask())]


def test_a_column_of_a_selection_is_none_of_the_data(tmp_path: Path, data: str, pool: str) -> None:
    """Else a pool could not grow once its selection is exported."""
    export(chosen(pool), Lance(with_score=True, with_reason=True), data)
    assert new_rows(data, pool) == 0
    lance.dataset(data).insert(rows(N, N + 8))
    assert new_rows(data, pool) == 8
    assert not [name for name in open_store(pool).columns if name.startswith("kept")]
    selection = chosen(pool, "20%")
    export(selection, "lance", data, overwrite=True)
    numbers = IN_POOL + list(range(N, N + 8))
    assert read(data, filter="kept")["number"] == [numbers[row] for row in np.flatnonzero(selection.mask())]


def test_a_version_or_a_dataset_that_is_gone_is_named(tmp_path: Path, data: str, pool: str) -> None:
    selection = chosen(pool)
    lance.dataset(data).add_columns({"twice": "number * 2"})
    lance.dataset(data).cleanup_old_versions(older_than=timedelta(0))
    with pytest.raises(UsageError, match=r"has no version 2; its only version is 3; .*pool was made of version 2"):
        export(selection, "lance", tmp_path / "new.lance")
    shutil.move(data, tmp_path / "moved.lance")
    with pytest.raises(PoolError, match=r"data.lance: nothing is there.*was made of version 2 of .*: restore it, or"):
        export(selection, "lance", tmp_path / "new.lance")
    assert not (tmp_path / "new.lance").exists()


def test_a_dataset_that_was_moved_is_found_after_the_same_embedding(tmp_path: Path, data: str, pool: str) -> None:
    moved = shutil.move(data, tmp_path / "moved.lance")
    assert new_rows(str(moved), pool) == 0
    selection = chosen(pool)
    export(selection, "lance", moved)
    assert read(str(moved), filter="kept")["number"] == kept_of(selection)


def test_another_dataset_at_the_place_is_refused(tmp_path: Path, data: str, pool: str) -> None:
    """It may even have as many versions and rows."""
    selection = chosen(pool)
    shutil.rmtree(data)
    write(Path(data), 0, N)
    lance.dataset(data).delete(f"number in {DELETED}")
    for target in (data, str(tmp_path / "new.lance")):
        with pytest.raises(
            UsageError, match=r"has a row of \S+, which version 2 of \S+data.lance does not have; embed"
        ):
            export(selection, "lance", target)
    assert lance.dataset(data).version == 2


def test_a_pool_of_several_data_is_refused(tmp_path: Path, data: str, pool: str) -> None:
    others = str(tmp_path / "others.parquet")
    pq.write_table(rows(0, 9, broken=()), others)
    made(others, Path(pool))
    with pytest.raises(UsageError, match=rf"was made of {data} and of {others}; embed each Lance dataset into a"):
        export(chosen(pool), "lance", tmp_path / "new.lance")
    of_others = made(others, tmp_path / "of-others")
    with pytest.raises(UsageError, match="thresher embed did not make it of one; --as parquet writes any pool"):
        export(chosen(of_others), "lance", tmp_path / "new.lance")


def test_a_pool_that_does_not_know_its_version_learns_it(tmp_path: Path, data: str, pool: str) -> None:
    plan = Path(pool, "pool.json")
    content = json.loads(plan.read_text())
    assert content.pop("versions") == {data: 2}
    plan.write_text(json.dumps(content))
    selection = chosen(pool)
    with pytest.raises(UsageError, match=rf"does not say which version of {data} it was made of; run the thresher em"):
        export(selection, "lance", tmp_path / "new.lance")
    assert new_rows(data, pool) == 0
    export(chosen(pool), "lance", data)
    assert read(data, filter="kept")["number"] == kept_of(selection)


@pytest.mark.parametrize("versions", [[], {"x": "2"}, {"x": True}, {"x": -1}, {"x": 2**70}])
def test_a_damaged_plan_is_an_error_in_one_line(tmp_path: Path, data: str, pool: str, versions: Any) -> None:
    selection = chosen(pool)
    plan = Path(pool, "pool.json")
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"versions": versions}))
    for again in (lambda: export(selection, "lance", data), lambda: made(data, Path(pool))):
        with pytest.raises(PoolError, match=r"pool.json") as caught:
            again()
        assert "\n" not in str(caught.value)


def test_rows_that_are_none_of_the_dataset_are_refused(tmp_path: Path, data: str, pool: str) -> None:
    table = Path(pool, "metadata", "metadata_00000.parquet")
    whole = pq.read_table(table)

    def exported(offset: Any) -> None:
        at = whole.schema.get_field_index("offset")
        pq.write_table(whole.set_column(at, "offset", pa.array(offset)), table)
        export(chosen(pool), "lance", data)

    count = len(whole)
    for offset, why in [
        ([*range(count - 1), 99], "has a row 99 of a file with fewer rows in version 2"),
        ([-1, *range(1, count)], "has a row"),
        (list(range(count))[::-1], "in another order, or twice"),
        ([0] * count, "in another order, or twice"),
        ([None, *range(1, count)], "which version 2"),
        ([str(i) for i in range(count)], "which version 2"),
    ]:
        with pytest.raises(UsageError, match=why):
            exported(offset)
    assert lance.dataset(data).version == 2


def test_an_embedded_pool_given_as_data_is_refused_with_the_name_of_the_dataset(data: str, pool: str) -> None:
    from thresher.data import open_data

    with pytest.raises(UsageError, match=rf"is a pool, not raw data; give {data}, which it was made from"):
        open_data(pool)


@pytest.mark.parametrize("gaps", [(), (0,), (1, 2), (9,)])
def test_gaps_of_any_length_are_filled(gaps: tuple[int, ...]) -> None:
    """Row ``i`` of the pool is followed by more rows than one batch has, if ``i`` is one of ``gaps``."""
    steps = np.array([1 + (i in gaps) * (2 * _BATCH + 3) for i in range(10)])
    row_N = np.cumsum(steps) - steps + (5 if 0 in gaps else 0)
    total = int(row_N[-1] + steps[-1])

    class Some:
        rows = total

    found = LanceRows([Some()], "", row_N)  # type: ignore[list-item]
    kept = np.arange(10) % 2 == 0
    names = ["kept", "reason"]
    whole = pa.RecordBatch.from_arrays([pa.array(kept), pa.array([f"{i}" for i in range(10)])], names=names)
    parts = list(found.filled(iter([whole.slice(0, 4), whole.slice(4, 6)]), names))
    assert max(map(len, parts)) <= _BATCH
    joined = pa.Table.from_batches(parts).to_pydict()
    expected = ["not in the pool"] * total
    for i, row in enumerate(row_N.tolist()):
        expected[row] = f"{i}"
    assert joined["reason"] == expected
    assert np.flatnonzero(joined["kept"]).tolist() == row_N[kept].tolist()
    assert found.spread(kept.astype(np.int64)).tolist() == [int(one) for one in joined["kept"]]


@pytest.mark.slow
def test_data_in_object_storage_become_a_dataset_on_this_machine(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    with s3_environment(monkeypatch):
        selection = chosen(made(put(Path(data), "s3://bucket/data.lance"), tmp_path / "pool"))
        export(selection, "lance", tmp_path / "new.lance")
    assert read(str(tmp_path / "new.lance"))["number"] == kept_of(selection)
