"""Selections of Lance datasets: complete or not there, old versions untouched, and never of another version."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from tests.pool.layouts.test_lance import D, pictures, write
from thresher import Selection, build, open_store, run_steps
from thresher.cli.main import main
from thresher.errors import OutputError, UsageError
from thresher.export.formats.lance import Lance
from thresher.export.write import export
from thresher.testing.data_reader import pairs

N = 60


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A dataset of three fragments, one with deleted rows; its id is the row before these were deleted."""
    path = write(tmp_path / "pool.lance", 0, 25, 40, N + 3)
    lance.dataset(path).delete("id in (3, 7, 30)")
    return path


def chosen(path: str, keep: str = "40%", **more: Any) -> Selection:
    return replace(run_steps(open_store(path), [build("clip-score", {"keep": keep})]), **more)


def ids(path: str, version: int | None = None, columns: tuple[str, ...] = ("id",), **how: Any) -> list[Any]:
    rows = lance.dataset(path, version=version).to_table(columns=list(columns), **how).to_pydict()
    return rows[columns[0]] if len(columns) == 1 else list(zip(*rows.values(), strict=True))


def kept_ids(path: str, selection: Selection, version: int | None = None) -> list[int]:
    return [int(i) for i in np.array(ids(path, version))[selection.mask()]]


def test_a_new_dataset_has_the_kept_rows_with_all_columns(tmp_path: Path, path: str) -> None:
    selection = chosen(path)
    done = export(selection, "lance", tmp_path / "new.lance")
    assert (done.rows, done.missing, done.manifest) == (len(selection), 0, "")
    new, old = lance.dataset(str(tmp_path / "new.lance")), lance.dataset(path)
    assert new.schema.equals(old.schema)
    assert new.to_table().equals(old.to_table().filter(pa.array(selection.mask())))
    store = open_store(str(tmp_path / "new.lance"))
    assert len(store) == len(selection)
    assert lance.dataset(path).version == old.version


def test_blobs_and_other_types_are_copied(tmp_path: Path) -> None:
    path = pictures(tmp_path / "pool.lance", 20, blob=True, max_rows_per_file=7)
    selection = run_steps(open_store(path), [build("random", {"keep": "50%"})])
    export(selection, "lance", tmp_path / "new.lance")
    scanned = lance.dataset(str(tmp_path / "new.lance")).scanner(columns=["image", "key"], blob_handling="all_binary")
    wanted = [pair for pair, kept in zip(pairs(20), selection.mask(), strict=True) if kept]
    rows = scanned.to_table().to_pydict()
    assert rows == {"image": [one.picture for one in wanted], "key": [one.key for one in wanted]}
    from thresher.data import open_data

    assert [one.stored() for one in open_data(str(tmp_path / "new.lance")).samples()] == rows["image"]


def test_repeated_rows_are_written_as_often_as_they_are_used(tmp_path: Path, path: str) -> None:
    selection = chosen(path)
    repeats = np.where(selection.mask(), np.arange(N) % 3 + 1, 0).astype(np.int32)
    selection = replace(selection, repeats=repeats)
    assert export(selection, "lance", tmp_path / "new.lance").rows == repeats.sum()
    assert ids(str(tmp_path / "new.lance")) == np.repeat(ids(path), repeats).tolist()
    export(selection, "lance", path)
    assert ids(path, columns=("kept_repeats",)) == repeats.tolist()


def test_a_column_is_a_new_version_and_old_ones_stay(path: str) -> None:
    before = {
        version["version"]: lance.dataset(path, version=version["version"]).to_table()
        for version in lance.dataset(path).versions()
    }
    selection = chosen(path)
    done = export(selection, Lance(with_score=True, with_reason=True), path)
    assert done.rows == N
    dataset = lance.dataset(path)
    assert dataset.version == max(before) + 1
    assert ids(path, filter="kept") == kept_ids(path, selection, max(before))
    rows = dataset.to_table(columns=["kept", "kept_score", "kept_reason"]).to_pydict()
    assert rows["kept"] == selection.mask().tolist()
    np.testing.assert_allclose(rows["kept_score"], selection.steps[0].rows["score"], rtol=1e-6)
    assert all((reason == "kept") == kept for reason, kept in zip(rows["kept_reason"], rows["kept"], strict=True))
    for version, table in before.items():
        assert lance.dataset(path, version=version).to_table().equals(table)


def test_the_same_export_again_changes_nothing(tmp_path: Path, path: str) -> None:
    selection = chosen(path)
    for target in (str(tmp_path / "new.lance"), path):
        export(selection, "lance", target)
        version, files = lance.dataset(target).version, sorted(Path(target).rglob("*"))
        export(selection, "lance", target)
        assert (lance.dataset(target).version, sorted(Path(target).rglob("*"))) == (version, files)
        other = chosen(f"{path}@4", "20%")
        with pytest.raises(OutputError, match="--overwrite"):
            export(other, "lance", target)
        assert lance.dataset(target).version == version
        export(other, "lance", target, overwrite=True)
        assert ids(target, filter="kept" if target == path else None) == kept_ids(path, other)


def test_a_replaced_column_leaves_none_of_the_other_selection(path: str) -> None:
    one, other = chosen(path), chosen(path, "20%")
    repeats = np.where(one.mask(), 2, 0).astype(np.int32)
    export(replace(one, repeats=repeats), Lance(with_score=True, with_reason=True), path)
    export(other, Lance(column="kept_more", with_score=True), path)
    export(other, Lance(), path, overwrite=True)
    names = set(lance.dataset(path).schema.names)
    assert {name for name in names if name.startswith("kept")} == {"kept", "kept_more", "kept_more_score"}
    assert ids(path, filter="kept") == kept_ids(path, other)


def test_two_selections_are_two_columns(path: str) -> None:
    one, other = chosen(path), chosen(path, "20%")
    export(one, "lance", path)
    export(other, Lance(column="fewer"), path)
    assert ids(path, columns=("kept", "fewer")) == list(zip(one.mask(), other.mask(), strict=True))
    with pytest.raises(OutputError, match="has a column 'width' that is not of a selection"):
        export(other, Lance(column="width"), path, overwrite=True)


@pytest.mark.parametrize("name", ["", "a-b", "a b", "my.kept", "1x", 'x"`', "kept\n"])
def test_a_column_is_a_name_that_a_filter_reads(path: str, name: str) -> None:
    version = lance.dataset(path).version
    with pytest.raises(UsageError, match=r'give letters, digits and _, .* filter="NAME"') as error:
        Lance(column=name)
    assert "\n" not in str(error.value)
    assert lance.dataset(path).version == version
    export(chosen(path), Lance(column="gewählt"), path)
    assert ids(path, filter="gewählt")


@pytest.mark.parametrize("change", ["append", "delete", "update", "compact"])
def test_a_dataset_that_changed_is_refused(tmp_path: Path, path: str, change: str) -> None:
    selection = chosen(path)
    selection.save(str(tmp_path / "subset"))
    selection = Selection.load(str(tmp_path / "subset"))
    dataset = lance.dataset(path)
    {
        "append": lambda: write(Path(path), 90, 95),
        "delete": lambda: dataset.delete("id = 20"),
        "update": lambda: dataset.update({"caption": "'new'"}, where="id = 20"),
        "compact": lambda: dataset.optimize.compact_files(),
    }[change]()
    version = lance.dataset(path).version
    with pytest.raises(UsageError, match=rf"that was version 4, and the newest is {version}; select again") as caught:
        export(selection, "lance", path)
    assert "\n" not in str(caught.value)
    assert lance.dataset(path).version == version
    export(selection, "lance", tmp_path / "new.lance")  # the version of the selection is still there
    assert ids(str(tmp_path / "new.lance")) == kept_ids(path, selection, 4)


def test_a_change_while_the_column_is_written_is_not_lost(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from thresher.export import table

    selection, whole = chosen(path), table.batches

    def batches(*args: Any) -> Any:
        yield from whole(*args)
        write(Path(path), 90, 95)

    monkeypatch.setattr("thresher.export.formats.lance.batches", batches)
    with pytest.raises(OutputError, match="cannot be written"):
        export(selection, "lance", path)
    assert "kept" not in lance.dataset(path).schema.names
    assert ids(path)[-1] == 94


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = chosen(path)

    def broken(*_: Any) -> Any:
        yield from ()
        raise OutputError("the disk is full")

    monkeypatch.setattr("thresher.export.formats.lance.batches", broken)
    monkeypatch.setattr("thresher.export.formats.lance._kept", broken)
    for target in (path, str(tmp_path / "new.lance")):
        with pytest.raises(OutputError, match="^the disk is full$"):
            export(selection, "lance", target)
    assert lance.dataset(path).version == 4
    assert not [name for name in os.listdir(tmp_path) if "new.lance" in name and not name.endswith(".lock")]


KILLED = """
import os, signal, sys
from thresher.cli.main import main
from thresher.export.formats import lance as module

name, count = sys.argv[1], int(sys.argv[2])
whole = getattr(module, name)

def killing(*args):
    for number, part in enumerate(whole(*args)):
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        yield part
    os.kill(os.getpid(), signal.SIGKILL)

setattr(module, name, killing)
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("_kept", 1),
        pytest.param("batches", 9, marks=pytest.mark.slow),
        *(pytest.param(name, n, marks=pytest.mark.slow) for name in ("_kept", "batches") for n in (0, 2)),
    ],
)
def test_a_killed_export_is_as_if_it_had_not_begun(tmp_path: Path, path: str, name: str, number: int) -> None:
    """And the same command again completes it."""
    selection = chosen(path)
    selection.save(str(tmp_path / "subset"))
    target = path if name == "batches" else str(tmp_path / "new.lance")
    command = ["export", str(tmp_path / "subset"), "--as", "lance", "-o", target]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, name, str(number), *command], capture_output=True, check=False
    )
    assert process.returncode == -9
    assert lance.dataset(path).version == 4
    assert not os.path.exists(tmp_path / "new.lance")
    assert main(command) == 0
    assert ids(target, filter="kept" if target == path else None) == kept_ids(path, selection, 4)
    assert not list(tmp_path.glob(".new.lance.*.tmp"))


@pytest.mark.parametrize("call", ["add_columns", "alter_columns", "drop_columns"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_column_is_readable_whenever_its_replacement_is_killed(
    path: str, monkeypatch: pytest.MonkeyPatch, call: str, when: str
) -> None:
    """The old one, or the new one as a whole; the same command completes it, and leaves nothing else."""

    class Killed(BaseException):
        pass

    one, other = chosen(path), chosen(path, "20%")
    export(replace(one, repeats=np.where(one.mask(), 2, 0).astype(np.int32)), Lance(with_score=True), path)
    expected = {False: kept_ids(path, one), True: kept_ids(path, other)}
    whole = getattr(lance.LanceDataset, call)

    def killed(*args: Any, **options: Any) -> None:
        if when == "after":
            whole(*args, **options)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(lance.LanceDataset, call, killed)
        with pytest.raises(Killed):
            export(other, "lance", path, overwrite=True)
    replaced = call == "drop_columns" or (call, when) == ("alter_columns", "after")
    assert ids(path, filter="kept") == expected[replaced]
    if not replaced:
        with pytest.raises(OutputError, match="of another selection"):
            export(other, "lance", path)
    export(other, "lance", path, overwrite=not replaced)
    assert ids(path, filter="kept") == expected[True]
    assert [name for name in lance.dataset(path).schema.names if name.startswith("kept")] == ["kept"]
    version = lance.dataset(path).version
    export(other, "lance", path)
    assert lance.dataset(path).version == version


def test_a_selection_of_a_version_whose_column_was_replaced_is_still_of_the_dataset(path: str) -> None:
    export(chosen(path), "lance", path)
    other = chosen(path, "20%")  # of the version with the column
    export(other, "lance", path, overwrite=True)
    version = lance.dataset(path).version
    export(other, "lance", path)
    assert lance.dataset(path).version == version
    assert ids(path, filter="kept") == kept_ids(path, other, 4)


def test_columns_named_as_those_of_a_replacement_are_not_touched(path: str) -> None:
    export(chosen(path), "lance", path)
    lance.dataset(path).add_columns({"kept__next": "width"})
    with pytest.raises(OutputError, match="has a column 'kept__next' that is not of a selection; name another one"):
        export(chosen(path, "20%"), "lance", path, overwrite=True)
    assert ids(path, columns=("kept__next",)) == ids(path, columns=("width",))


def test_other_pools_and_targets_are_refused(tmp_path: Path, path: str, select: Any) -> None:
    np.save(tmp_path / "image.npy", np.ones((9, D), np.float32))
    other = run_steps(open_store(str(tmp_path / "image.npy")), [build("random", {"keep": "50%"})])
    with pytest.raises(
        UsageError, match="is npy, not a Lance dataset, and .* not make it of one; --as parquet writes any pool"
    ):
        export(other, "lance", tmp_path / "new.lance")
    selection = chosen(path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is something else already|is not a dataset that export wrote"):
            export(selection, "lance", tmp_path / "there", overwrite=overwrite)
    assert (tmp_path / "there" / "notes.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="is a file; give the name of a new folder"):
        export(selection, "lance", tmp_path / "image.npy")
    with pytest.raises(OutputError, match="image.npy/new.lance: cannot be written"):
        export(selection, "lance", tmp_path / "image.npy" / "new.lance")
    with pytest.raises(OutputError, match="is inside the dataset of the pool; choose another folder"):
        export(selection, "lance", f"{path}/data/new.lance")
    assert not Path(path, "data", "new.lance").exists()
    with pytest.raises(UsageError, match="writes no manifest"):
        export(selection, "lance", tmp_path / "new.lance", hash_inputs=True)
    with pytest.raises(UsageError, match="writes on this machine"):
        export(selection, "lance", "memory://new.lance")
