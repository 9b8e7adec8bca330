"""Lance: what its library writes is a pool and raw data, at the version that is asked for; others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from tests.objects import put, s3_environment
from thresher import Selection, build, open_store, run_steps
from thresher.cli.main import main
from thresher.data import DataOptions, open_data
from thresher.errors import AccessError, MissingExtraError, PoolError, ThresherError, UnreachedError, UsageError
from thresher.io.lance import reading
from thresher.io.listing import Files
from thresher.testing.data_reader import pairs

D = 6


def table(lo: int, hi: int, dtype: Any = np.float32, **more: Any) -> pa.Table:
    rows = np.arange(lo, hi)
    image = (rows[:, None] + np.arange(1, D + 1)).astype(dtype)
    columns = {
        "id": rows,
        "caption": [f"caption {i}" for i in rows],
        "image_embedding": pa.FixedSizeListArray.from_arrays(pa.array(image.ravel()), D),
        "text_embedding": pa.FixedSizeListArray.from_arrays(pa.array((-image).ravel()), D),
        "width": rows * 2,
    }
    return pa.table({**columns, **more})


def write(path: Path, *edges: int, dtype: Any = np.float32) -> str:
    for lo, hi in zip(edges, edges[1:], strict=False):
        lance.write_dataset(table(lo, hi, dtype), str(path), mode="append" if path.exists() else "create")
    return str(path)


def ids_of(location: str, **options: Any) -> list[int]:
    from thresher.pool.layout import Options

    return [int(key) for _, keys in open_store(location, Options(**options)).keys() for key in keys]


def test_a_dataset_without_rows_is_said_to_have_none(tmp_path: Path) -> None:
    empty, deleted = write(tmp_path / "a.lance", 0, 0), write(tmp_path / "b.lance", 0, 5)
    lance.dataset(deleted).delete("true")
    for location in (empty, deleted):
        with pytest.raises(PoolError, match="the pool has no rows; is it finished"):
            open_store(location)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_vectors_of_every_type_are_read(tmp_path: Path, dtype: Any) -> None:
    store = open_store(write(tmp_path / "a.lance", 0, 10, 25, dtype=dtype))
    assert store.layout.vectors["image"][0].dtype == np.dtype(dtype).name
    assert (store.layout.key, store.layout.caption, set(store.layout.vectors)) == ("id", "caption", {"image", "text"})
    rows = np.array([0, 3, 9, 10, 24])
    np.testing.assert_array_equal(store.layout.raw_at("image", rows), rows[:, None] + np.arange(1, D + 1, dtype=dtype))
    assert [cell for batch in store.layout.lookup(["width"], rows) for cell in batch.column(0).to_pylist()] == [
        0, 6, 18, 20, 48
    ]  # fmt: skip


def test_rows_may_be_asked_for_twice(tmp_path: Path) -> None:
    store = open_store(write(tmp_path / "a.lance", 0, 10, 25))
    for rows in ([5, 5, 7], [5, 5, 6], [2, 2], [9, 10, 10, 12]):
        assert store.layout.raw_at("image", np.array(rows))[:, 0].tolist() == [row + 1 for row in rows]


def test_a_version_is_read_as_it_was(tmp_path: Path) -> None:
    """By PATH@VERSION, and by the option; deleted rows are not there, updated ones in their new form."""
    path = write(tmp_path / "a.lance", 0, 10, 20)
    dataset = lance.dataset(path)
    dataset.delete("id in (3, 12)")
    lance.write_dataset(table(20, 25), path, mode="append")
    whole = list(range(25))
    kept = [i for i in whole if i not in (3, 12)]
    expected = {1: whole[:10], 2: whole[:20], 3: kept[:18], 4: kept}
    for version, ids in expected.items():
        assert ids_of(f"{path}@{version}") == ids
        assert ids_of(path, reader=f"lance:version={version}") == ids
    assert ids_of(path) == kept
    store = open_store(f"{path}@3")
    some = np.array([2, 3, 10, 11])
    assert (store.layout.raw_at("image", some)[:, 0] - 1).tolist() == [2, 4, 11, 13]


def test_a_selection_is_of_the_version_that_was_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lance", 0, 30)
    selection = run_steps(open_store(path), [build("random", {"keep": "50%"})])
    assert selection.pool == f"{path}@1"
    selection.save(str(tmp_path / "subset"))
    lance.write_dataset(table(30, 40), path, mode="append")
    lance.dataset(path).delete("id < 5")
    again = Selection.load(str(tmp_path / "subset"))
    from thresher.pool.store import reopen

    assert [key for _, keys in reopen(again).keys() for key in keys] == [str(i) for i in range(30)]


def test_a_few_long_texts_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [np.random.default_rng(i).bytes(100_000).hex() for i in range(12)]
    lance.write_dataset(table(0, 12, caption=texts), str(tmp_path / "a.lance"))
    store = open_store(str(tmp_path / "a.lance"))
    for some in (np.arange(12), np.array([1, 2, 4, 5, 9, 11])):
        monkeypatch.setattr("thresher.io.lance._BYTES", 1 << 26)
        (whole,) = store.layout.lookup(["caption"], some)
        monkeypatch.setattr("thresher.io.lance._BYTES", 600_000)
        parts = list(store.layout.lookup(["caption"], some))
        assert len(parts) > 1
        assert [one for part in parts for one in part.column(0).to_pylist()] == whole.column(0).to_pylist()
    assert sum(len(part) for _, part in store.scan(["caption"])) == 12


def test_a_selection_by_vectors_is_that_of_parquet(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = write(tmp_path / "a.lance", 0, 20, 60)
    (tmp_path / "pool").mkdir()
    pq.write_table(table(0, 60), tmp_path / "pool" / "a.parquet")
    steps = [build("semdedup", {"eps": 0.001, "clusters": 3}), build("clip-score", {"keep": "50%"})]
    one, other = (run_steps(open_store(place), steps) for place in (path, str(tmp_path / "pool")))
    assert one.store == other.store
    np.testing.assert_array_equal(one.mask(), other.mask())


def test_nulls_and_nan_are_bad_rows(tmp_path: Path) -> None:
    from thresher.errors import BadRowsError
    from thresher.pool.layout import Options

    vectors = [[1.0] * D, None, [float("nan")] * D, [0.0] * D, [2.0] * D]
    columns = {"id": [0, 1, 2, 3, 4], "image_embedding": pa.array(vectors, pa.list_(pa.float32(), D))}
    lance.write_dataset(pa.table(columns), str(tmp_path / "a.lance"))
    steps = [build("semdedup", {"eps": 0.1, "clusters": 1})]
    with pytest.raises(BadRowsError):
        run_steps(open_store(str(tmp_path / "a.lance")), steps)
    good = run_steps(open_store(str(tmp_path / "a.lance"), Options(skip_bad=True)), steps)
    assert good.mask().nonzero()[0].tolist() in ([0], [4], [0, 4])


def test_errors_say_what_to_type(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lance", 0, 10)
    for location, options, message in (
        (path, {"reader": "lance:version=5"}, "has no version 5; its only version is 1"),
        (f"{path}@1", {"reader": "lance:version=5"}, "names version 1, but the option says 5"),
        (path, {"image": "nothing"}, "no column 'nothing'; it has id, caption"),
        (path, {"key": "nothing"}, "no metadata column 'nothing' for --key"),
        (f"{tmp_path}/gone.lance@1", {}, "nothing is there"),
    ):
        with pytest.raises(ThresherError, match=message) as caught:
            ids_of(location, **options)
        assert "\n" not in str(caught.value)
    lance.write_dataset(pa.table({"id": [1], "label": ["x"]}), str(tmp_path / "b.lance"))
    assert ids_of(str(tmp_path / "b.lance")) == [1]  # without vectors, as with other tables


@pytest.mark.parametrize("version", ["0", "7", "-1", "007", "latest"])
def test_a_version_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path, version: str) -> None:
    path = write(tmp_path / "a.lance", 0, 10, 20, 30)
    message = (
        f"{path}@{version}: has no version {version}; it has versions 1 to 3; type {path}@3, or {path} for the newest"
    )
    for opened in (open_store, open_data):
        with pytest.raises(UsageError) as caught:
            opened(f"{path}@{version}")
        assert str(caught.value) == message
    Path(path, "_versions", f"{2**64 - 3}.manifest").unlink()
    with pytest.raises(UsageError, match="it has 2 versions, the first is 1 and the last 3"):
        open_store(f"{path}@{version}")


def test_a_location_to_type_is_in_quotes_if_it_needs_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a b.lance", 0, 10)
    with pytest.raises(UsageError, match=f"its only version is 1; type '{path}@1', or '{path}' for the newest"):
        open_store(f"{path}@2")


def test_doctor_does_not_take_a_missing_version_for_a_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.lance", 0, 10)
    assert main(["doctor", f"{path}@9"]) != 0
    assert "thresher inspect" not in capsys.readouterr().err


def test_an_at_sign_is_part_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "pool@3").mkdir()
    np.save(tmp_path / "pool@3" / "image.npy", np.ones((3, 4), np.float32))
    assert len(open_store(str(tmp_path / "pool@3"))) == 3
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "image.npy", np.ones((3, 4), np.float32))
    with pytest.raises(PoolError, match="nothing is there"):
        Files.at(str(tmp_path / "other@3"))


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lance", 0, 10, 20)
    lance.dataset(path).shallow_clone(str(tmp_path / "clone.lance"), reference=2)
    with pytest.raises(PoolError, match="has files in other folders; copy the dataset with deep_clone"):
        ids_of(str(tmp_path / "clone.lance"))
    first = sorted(lance.dataset(path).get_fragments(), key=lambda one: one.fragment_id)[0].metadata.files[0].path
    Path(path, "data", first).unlink()
    with pytest.raises(PoolError, match=rf"{first}: does not exist, but version 2 needs it"):
        ids_of(path)
    assert ids_of(path, skip_bad=True) == list(range(10, 20))


def test_the_extra_is_named_if_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = write(tmp_path / "a.lance", 0, 10)
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(MissingExtraError, match=r"Lance needs an extra .*\[lance\]"):
        ids_of(path)


# --- raw data -------------------------------------------------------------------------------------


def pictures(path: Path, count: int, *, blob: bool = False, start: int = 0, **more: Any) -> str:
    some = pairs(count)
    kind = {"metadata": {"lance-encoding:blob": "true"}} if blob else {}
    schema = pa.schema([pa.field("image", pa.large_binary(), **kind), ("caption", pa.string()), ("key", pa.string())])
    columns = {"image": [p.picture for p in some], "caption": [p.text for p in some], "key": [p.key for p in some]}
    made = pa.table(columns, schema=schema).slice(start)
    lance.write_dataset(made, str(path), mode="append" if path.exists() else "create", **more)
    return str(path)


@pytest.mark.parametrize("blob", [False, True])
def test_images_captions_and_keys_are_read(tmp_path: Path, blob: bool) -> None:
    """Also images that Lance keeps apart as blobs."""
    path = pictures(tmp_path / "a.lance", 9, blob=blob, max_rows_per_file=4)
    for per_part in (2, 10_000):
        data = open_data(path, DataOptions(per_part=per_part))
        assert [(s.key, s.text, s.stored()) for s in data.samples()] == [tuple(pair) for pair in pairs(9)]
    part = open_data(path).parts[0]
    some = np.array([0, 2, 3])
    assert [sample.stored() for sample in part.chosen(some)] == [pairs(9)[i].picture for i in some]


def test_blobs_in_files_of_their_own_are_never_read(tmp_path: Path) -> None:
    """A dataset that names a file of this machine must not bring it into a result."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(pairs(1)[0].picture)
    image = lance.blob_array([f"file://{secret}", pairs(2)[1].picture])
    made = pa.table(
        {"image": image, "caption": ["a", "b"]}, schema=pa.schema([lance.blob_field("image"), ("caption", pa.string())])
    )
    lance.write_dataset(
        made, str(tmp_path / "a.lance"), data_storage_version="2.2", allow_external_blob_outside_bases=True
    )
    with pytest.raises(PoolError, match=r"the column 'image' names 'file://.*secret.png', a file of its own"):
        list(open_data(str(tmp_path / "a.lance")).samples())


def test_data_of_a_version(tmp_path: Path) -> None:
    path = pictures(tmp_path / "a.lance", 9)
    lance.dataset(path).delete("key = 'k0002'")
    assert [s.key for s in open_data(f"{path}@1").samples()] == [pair.key for pair in pairs(9)]
    rest = [pair.key for pair in pairs(9) if pair.key != "k0002"]
    assert [s.key for s in open_data(path).samples()] == rest
    assert [s.key for s in open_data(path, DataOptions(reader="lance:version=1")).samples()][2] == "k0002"
    with pytest.raises(UsageError, match="has no version 9"):
        open_data(f"{path}@9")


def test_stamps_change_with_the_samples(tmp_path: Path) -> None:
    """And not with columns that have nothing to do with them."""
    path = pictures(tmp_path / "a.lance", 9, max_rows_per_file=5)
    stamps = [part.stamp() for part in open_data(path).parts]
    lance.dataset(path).add_columns({"kept": "true"})
    assert [part.stamp() for part in open_data(path).parts] == stamps
    lance.dataset(path).delete("key = 'k0001'")
    changed = [part.stamp() for part in open_data(path).parts]
    assert [one == other for one, other in zip(stamps, changed, strict=True)] == [False, True]
    dataset = lance.dataset(path)
    dataset.drop_columns(["caption"])
    dataset.add_columns({"caption": "'new'"})
    assert not [stamp for stamp in [part.stamp() for part in open_data(path).parts] if stamp in [*stamps, *changed]]


def test_a_dataset_may_be_pool_and_data(tmp_path: Path) -> None:
    """Keys are the same in both, so that a selection fits the images."""
    image = pa.array([pair.picture for pair in pairs(10)], pa.binary())
    lance.write_dataset(table(0, 10, image=image), str(tmp_path / "a.lance"))
    samples = list(open_data(str(tmp_path / "a.lance")).samples())
    assert [int(sample.key) for sample in samples] == ids_of(str(tmp_path / "a.lance"))
    assert [sample.stored() for sample in samples] == [pair.picture for pair in pairs(10)]


def test_a_missing_column_lists_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lance", 0, 3)
    with pytest.raises(PoolError, match="has no column of images .* it has id, caption, image_embedding"):
        open_data(path)
    with pytest.raises(UsageError, match="no column 'jpeg' for --image; it has id"):
        open_data(path, DataOptions(image="jpeg"))


def test_a_type_that_lance_does_not_know_is_one_line(tmp_path: Path) -> None:
    path = pictures(tmp_path / "a.lance", 4)
    (manifest,) = Path(path).glob("_versions/*.manifest")
    manifest.write_bytes(manifest.read_bytes().replace(b"large_binary", b"large_cinary").replace(b"string", b"strimg"))
    for what in (open_data, open_store):
        with pytest.raises(PoolError, match="manifest: cannot be read, it may be damaged"):
            what(path)


@pytest.mark.parametrize("storage", ["legacy", "2.0", "2.1", "stable"])
def test_a_number_of_buffers_that_cannot_be_is_refused(tmp_path: Path, storage: str) -> None:
    """The package would end the process: it cannot allocate them."""
    path = str(tmp_path / "a.lance")
    lance.write_dataset(table(0, 10), path, data_storage_version=storage)
    assert ids_of(path) == list(range(10))
    (file,) = Path(path).glob("data/*.lance")
    if storage == "legacy":
        return
    content = file.read_bytes()
    file.write_bytes(content[:-16] + (3 << 30).to_bytes(4, "little") + content[-12:])
    with pytest.raises(PoolError, match="is damaged: it says that it has 3,221,225,472 buffers"):
        ids_of(path)


def test_a_manifest_that_is_garbage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.lance", 0, 10)
    (manifest,) = Path(path, "_versions").glob("*.manifest")
    for content in (b"", b"x" * 5, b"\xff" * 2_000, json.dumps({"a": 1}).encode()):
        manifest.write_bytes(content)
        with pytest.raises(PoolError, match=manifest.name) as caught:
            ids_of(path)
        assert "\n" not in str(caught.value)


def test_object_storage_is_read_with_the_credentials_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.lance", 0, 10, 20)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    with s3_environment(monkeypatch):
        remote = put(Path(path), "s3://bucket/a.lance")
        assert ids_of(remote) == list(range(20))
        assert ids_of(f"{remote}@1") == list(range(10))
        store = open_store(remote)
        assert store.layout.location == f"{remote}@2"
        assert store.fingerprint() == open_store(path).fingerprint()
        assert not store.changed()


@pytest.mark.parametrize(
    ("protocol", "error", "kind"),
    [
        ("s3", OSError("LanceError(IO): Generic S3 error: timed out\nmore"), UnreachedError),
        ("s3", ValueError("LanceError(IO): Generic S3 error"), UnreachedError),
        ("s3", OSError("LanceError(Corrupt): bad magic"), PoolError),
        ("file", OSError("LanceError(IO): failed to fill whole buffer"), PoolError),
        ("file", RuntimeError("LanceError(Internal)"), PoolError),
        ("file", PermissionError(13, "denied"), AccessError),
    ],
)
def test_errors_of_the_package_are_those_of_other_readers(protocol: str, error: Exception, kind: type) -> None:
    def failing() -> None:
        raise error

    with pytest.raises(kind, match="^a.lance: ") as caught:
        reading("a.lance", protocol, failing)
    assert "\n" not in str(caught.value)
