from pathlib import Path
from typing import Any

import datasets
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pytest

from tests.pool.layouts.common import CUTS, ROWS, check, metadata
from tests.pools import KINDS, Pool, make, shards, table, vectors
from thresher import Options, PoolError, UsageError, open_store
from thresher.cli.main import main
from thresher.pool.store import Block

POOL = make(ROWS)


def columns(pool: Pool, kind: str = "fixed") -> pa.Table:
    found = table(pool)
    for role, array in (("image", pool.image), ("text", pool.text)):
        found = found.append_column(f"{role}_embedding", vectors(array, kind))
    return found


def write(path: Path, found: pa.Table, form: str = "file", codec: str | None = None, batch: int = 7) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = pa.ipc.IpcWriteOptions(compression=codec)
    new = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
    with new(str(path), found.schema, options=options) as file:
        file.write_table(found, max_chunksize=batch)
    return str(path)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
def test_values_keys_and_order_however_written(tmp_path: Path, cuts: list[int], form: str, codec: str | None) -> None:
    for i, part in shards(POOL, cuts):
        write(tmp_path / f"part-{i}.arrow", columns(part), form, codec)
    store = open_store(str(tmp_path))
    check(store, POOL, "arrow")
    write(tmp_path / "again" / "a.feather", columns(POOL), batch=1_000)
    assert store.fingerprint() == open_store(str(tmp_path / "again")).fingerprint()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_kinds_of_columns_and_types(tmp_path: Path, kind: str, dtype: str) -> None:
    pool = POOL.stored(dtype)
    check(open_store(write(tmp_path / "a.ipc", columns(pool, kind)), Options(dtype=dtype)), pool, "arrow")


@pytest.mark.parametrize("kind", ["fixed", "list", "large"])
@pytest.mark.parametrize("form", ["file", "stream"])
def test_vectors_are_read_in_place_unless_compressed(tmp_path: Path, kind: str, form: str) -> None:
    pool = make(4_000, 64).stored("float32")
    plain = open_store(write(tmp_path / "plain.arrow", columns(pool, kind), form, batch=1_000))
    assert plain.seekable("image")
    assert plain.mapped("image")
    before = pa.total_allocated_bytes()
    rows = plain.raw("image", Block(1_000, 2_000))
    assert pa.total_allocated_bytes() - before < rows.nbytes / 4, "the vectors were copied"
    np.testing.assert_array_equal(rows, pool.image[1_000:2_000])
    packed = open_store(write(tmp_path / "packed.arrow", columns(pool, kind), form, "lz4", batch=1_000))
    assert not packed.seekable("image")
    np.testing.assert_array_equal(
        packed.raw_at("image", np.array([5, 999, 1_000, 3_999])), pool.image[[5, 999, 1000, 3999]]
    )


def test_null_vectors_and_other_widths_are_bad_rows(tmp_path: Path) -> None:
    found = pa.table({"key": ["a", "b", "c", "d"], "embedding": [[1.0, 0.0], None, [1.0, 0.0, 0.0], [0.0, 1.0]]})
    store = open_store(write(tmp_path / "a.arrow", found))
    image = store.raw("image", Block(0, 4))
    assert np.isnan(image).all(axis=1).tolist() == [False, True, True, False]
    np.testing.assert_array_equal(store.raw_at("image", np.array([0, 3])), [[1, 0], [0, 1]])


def test_a_dataset_saved_to_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"key": POOL.keys, "caption": POOL.captions, "embedding": POOL.image.astype("<f4").tolist()}
    saved = datasets.Dataset.from_dict(rows).cast_column(
        "embedding", datasets.features.Sequence(datasets.Value("float32"), length=8)
    )
    saved.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "cache-0123.arrow").write_bytes(b"not of the dataset")
    store = open_store(str(tmp_path / "saved"))
    assert (store.layout.kind, store.fields, len(store)) == ("arrow", ("image",), ROWS)
    np.testing.assert_array_equal(store.raw("image", Block(0, ROWS)), POOL.image.astype("<f4"))
    assert metadata(store, "key") == POOL.keys
    assert metadata(store, store.layout.caption) == POOL.captions
    out = str(tmp_path / "sel")
    assert main(["select", "semdedup", str(tmp_path / "saved"), "-o", out, "--eps", "0.2", "--clusters", "2"]) == 0
    assert main(["explain", out, POOL.keys[3]]) == 0
    assert main(["report", out, "-o", str(tmp_path / "r.html"), "--quiet"]) == 0
    assert main(["inspect", str(tmp_path / "saved")]) == 0
    assert "arrow" in capsys.readouterr().out


def test_several_splits_are_refused(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"key": ["a"], "embedding": [[1.0, 0.0]]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "all")
    with pytest.raises(UsageError, match=r"contains the splits test, train; give one, such as .*/all/test"):
        open_store(str(tmp_path / "all"))
    assert len(open_store(str(tmp_path / "all" / "train"))) == 1


def test_a_shuffled_dataset_is_refused(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"key": ["a", "b"], "embedding": [[1.0, 0.0]] * 2})
    saved.save_to_disk(tmp_path / "d")
    state = (tmp_path / "d" / "state.json").read_text()
    (tmp_path / "d" / "state.json").write_text(state.replace("{", '{"_indices_files": [{"filename": "i.arrow"}],', 1))
    with pytest.raises(PoolError, match="flatten_indices"):
        open_store(str(tmp_path / "d"))


@pytest.mark.parametrize("how", [{}, {"compression": "zstd"}, {"compat_level": pl.CompatLevel.newest()}])
@pytest.mark.parametrize("ending", ["arrow", "ipc", "feather"])
def test_files_of_polars(tmp_path: Path, how: dict[str, Any], ending: str) -> None:
    arrays = {
        role: pl.Series(getattr(POOL, role).astype("<f4"), dtype=pl.Array(pl.Float32, 8)) for role in ("image", "text")
    }
    frame = pl.DataFrame({"key": POOL.keys, "caption": POOL.captions}).with_columns(
        pl.Series(["en", "de"] * 20 + ["en"], dtype=pl.Categorical).alias("lang"),
        image_embedding=arrays["image"],
        text_embedding=arrays["text"],
    )
    frame.write_ipc(tmp_path / f"a.{ending}", **how)
    store = open_store(str(tmp_path))
    check(store, POOL.stored("float32"), "arrow")
    assert metadata(store, "lang") == frame["lang"].to_list()


@pytest.mark.parametrize("form", ["file", "stream"])
def test_what_is_refused(tmp_path: Path, form: str) -> None:
    one = pa.table({"uid": ["a"], "embedding": [["x"]]})
    with pytest.raises(PoolError, match=r"a\.arrow \[embedding\]: contains lists of string"):
        open_store(write(tmp_path / "a.arrow", one, form))
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["key", "key"])
    with pytest.raises(PoolError, match=r"b\.arrow: has two columns named 'key'"):
        open_store(write(tmp_path / "b.arrow", twice, form))
    with pytest.raises(UsageError, match="no column 'emb'.*Did you mean 'embedding'"):
        open_store(str(tmp_path / "a.arrow"), Options(image="emb"))
    with pytest.warns(DeprecationWarning, match="Feather V1"):
        pyarrow.feather.write_feather(pa.table({"key": ["a"]}), tmp_path / "c.feather", version=1)
    with pytest.raises(PoolError, match=r"c\.feather: is Feather version 1; save it again"):
        open_store(str(tmp_path / "c.feather"))


@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.parametrize("codec", [None, "zstd"])
def test_files_cut_off_anywhere_are_named(tmp_path: Path, form: str, codec: str | None) -> None:
    whole = Path(write(tmp_path / "whole.arrow", columns(POOL), form, codec)).read_bytes()
    for cut in range(0, len(whole) - 8, 997):
        (tmp_path / "cut.arrow").write_bytes(whole[:cut])
        with pytest.raises(PoolError, match=r"cut\.arrow"):
            check(open_store(str(tmp_path / "cut.arrow")), POOL, "arrow")


def test_two_streams_in_one_file_are_refused(tmp_path: Path) -> None:
    place = write(tmp_path / "pool.arrow", columns(make(20)), "stream")
    path = tmp_path / "pool.arrow"
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(
        PoolError, match=r"pool\.arrow: another stream begins at byte [\d,]+, .*save one stream per file"
    ):
        open_store(place)
