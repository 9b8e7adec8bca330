import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.pool.layouts.common import CUTS, ROWS, check
from tests.pools import make, write_clip_retrieval
from thresher import PoolError, UsageError, open_store
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


LAION = ("laion2B-en", "laion2B-multi", "laion1B-nolang")


def write_laion(folder: Path, name: str) -> str:
    """As the embeddings of LAION-5B are laid out."""
    place = write_clip_retrieval(folder / name, POOL, [20], width=4)
    (folder / name / "metadata").rename(folder / name / f"{name}-metadata")
    return place


@pytest.mark.parametrize("name", [*LAION, "my"])
def test_folders_of_laion_5b(tmp_path: Path, name: str) -> None:
    place = write_laion(tmp_path, name)
    check(open_store(place), POOL, "clip-retrieval")
    table = Path(place) / f"{name}-metadata" / "metadata_0001.parquet"
    table.unlink()
    with pytest.raises(PoolError, match=f"no file of the same number in {name}-metadata; remove it"):
        open_store(place)


def test_numbers_are_those_of_files_not_of_folders(tmp_path: Path) -> None:
    place = Path(write_clip_retrieval(tmp_path / "laion2B-en", POOL))
    (place / "metadata").rename(place / "laion2B-en-metadata")
    for path in list(place.glob("*/*_0.*")):
        path.rename(path.with_name("all" + path.suffix))
    check(open_store(str(place)), POOL, "clip-retrieval")


def test_one_of_several_folders_of_metadata_is_chosen(tmp_path: Path) -> None:
    place = write_laion(tmp_path, LAION[0])
    shutil.copytree(Path(place) / f"{LAION[0]}-metadata", Path(place) / "old-metadata")
    said = f"the metadata folders {LAION[0]}-metadata, old-metadata; choose one with --reader clip-retrieval:metadata="
    with pytest.raises(UsageError, match=said):
        open_store(place)
    for name in (f"{LAION[0]}-metadata", "old-metadata"):
        store = open_store(place, Options(reader=f"clip-retrieval:metadata={name}"))
        check(store, POOL, "clip-retrieval")
        assert {Path(path).parent.name for _, path in store.files()} == {"img_emb", "text_emb", name}
    with pytest.raises(UsageError, match="no folder 'odl-metadata' with metadata; .* Did you mean 'old-metadata'"):
        open_store(place, Options(reader="clip-retrieval:metadata=odl-metadata"))


@pytest.mark.parametrize("beside", [False, True])
def test_a_folder_of_pools_names_them(tmp_path: Path, beside: bool) -> None:
    for name in LAION:
        write_laion(tmp_path, name)
    if beside:
        (tmp_path / "README.md").write_text("embeddings")
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "a.txt").write_text("x")
    names = ", ".join(sorted(LAION))
    said = f"is not a pool, but has pools in its folders \\({names}\\); give one, such as .*/laion1B-nolang"
    with pytest.raises(PoolError, match=said):
        open_store(str(tmp_path))
