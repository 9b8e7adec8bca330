import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.pool.layouts.common import CUTS, ROWS, check
from tests.pools import make, write_clip_retrieval
from thresher import PoolError, open_store
from thresher.pool.layout import Options

POOL = make(ROWS)


@pytest.mark.parametrize("cuts", [*CUTS, list(range(3, 36, 3))])
@pytest.mark.parametrize("width", [1, 4])
def test_values_keys_and_order_however_cut(tmp_path: Path, cuts: list[int], width: int) -> None:
    store = open_store(write_clip_retrieval(tmp_path, POOL, cuts, width))
    check(store, POOL, "clip-retrieval")
    assert store.layout.key == "image_path"
    other = open_store(write_clip_retrieval(tmp_path / "again", POOL, [4, 40]))
    assert store.fingerprint() == other.fingerprint()


def test_folders_may_pad_their_numbers_differently(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path, POOL, [20])
    for path in list(tmp_path.glob("metadata/*")):
        path.rename(path.with_name(path.name.replace("metadata_", "metadata_00")))
    check(open_store(str(tmp_path)), POOL, "clip-retrieval")


def test_files_without_a_number_belong_together(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path, POOL)
    for path in list(tmp_path.glob("*/*_0.*")):
        path.rename(path.with_name("all" + path.suffix))
    check(open_store(str(tmp_path)), POOL, "clip-retrieval")


def test_one_folder_is_enough(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path, POOL, [20])
    for name in ("text_emb", "metadata"):
        shutil.rmtree(tmp_path / name)
    store = open_store(str(tmp_path))
    assert (store.fields, store.layout.key) == (("image",), None)
    np.testing.assert_array_equal(store.raw_at("image", np.arange(ROWS)), POOL.image)


def test_two_files_of_one_number_are_refused(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path, POOL, [20])
    shutil.copy(tmp_path / "img_emb/img_emb_1.npy", tmp_path / "img_emb/img_emb_01.npy")
    with pytest.raises(PoolError, match=r"img_emb_0?1\.npy: has the same number as .*img_emb_0?1\.npy"):
        open_store(str(tmp_path))


def test_a_missing_number_is_refused(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path, POOL, [20])
    (tmp_path / "text_emb/text_emb_1.npy").unlink()
    with pytest.raises(PoolError, match=r"img_emb_1\.npy: has no file of the same number in text_emb"):
        open_store(str(tmp_path))


@pytest.mark.parametrize("written", [[], ["img_emb/img_emb_0.npy"], ["set_aside.txt"]])
def test_a_pool_of_which_no_shard_is_written_is_not_finished(tmp_path: Path, written: list[str]) -> None:
    for name in ("pool.json", *written):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "pool.json").write_text('{"shards": [["/data/0.tar", "0.tar", 0, null, [1, 2]]]}')
    said = "is not finished; run the thresher embed command that started it again; no shard is written yet"
    for options in ({}, {"skip_bad": True}):
        with pytest.raises(PoolError, match=said):
            open_store(str(tmp_path), Options(**options))


def test_of_an_unfinished_pool_the_rows_written_so_far_can_be_used(tmp_path: Path) -> None:
    location = write_clip_retrieval(tmp_path, POOL, [20])
    (tmp_path / "pool.json").write_text('{"shards": []}')
    with pytest.raises(PoolError, match="again, or pass --skip-bad to use the rows written so far"):
        open_store(location)
    assert open_store(location, Options(skip_bad=True)).total == ROWS
