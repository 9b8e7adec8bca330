from pathlib import Path

import numpy as np
import pytest

from tests.pool.layouts.common import CUTS, ROWS, check
from tests.pools import make, write_datacomp
from thresher import Options, PoolError, UsageError, open_store

POOL = make(ROWS)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("compressed", [True, False])
def test_values_keys_and_order_however_cut(tmp_path: Path, cuts: list[int], compressed: bool) -> None:
    store = open_store(write_datacomp(tmp_path, POOL, cuts, compressed))
    check(store, POOL, "datacomp")
    assert store.seekable("image") is not compressed
    assert store.layout.scores == ("clip_l14_similarity_score", "clip_b32_similarity_score")
    other = open_store(write_datacomp(tmp_path / "again", POOL, [4, 40], not compressed))
    assert store.fingerprint() == other.fingerprint()


def test_the_metadata_folder_itself_is_a_pool(tmp_path: Path) -> None:
    write_datacomp(tmp_path, POOL, [20])
    check(open_store(str(tmp_path / "metadata")), POOL, "datacomp")


@pytest.mark.parametrize("options", [Options(image="b32_img"), Options(text="b32_txt")])
def test_both_arrays_are_of_the_model_named(tmp_path: Path, options: Options) -> None:
    store = open_store(write_datacomp(tmp_path, POOL, [20]), options)
    for field in ("image", "text"):
        np.testing.assert_array_equal(store.raw_at(field, np.arange(ROWS)), -getattr(POOL, field)[:, :4])


def test_models_are_not_mixed_between_shards(tmp_path: Path) -> None:
    write_datacomp(tmp_path, POOL, [20, 30])
    second = sorted(tmp_path.glob("metadata/*.npz"))[1]
    with np.load(second) as arrays:
        np.savez(second, b32_img=arrays["l14_img"], b32_txt=arrays["l14_txt"])  # the same width, another space
    with pytest.raises(PoolError, match=rf"{second.name}: has image b32_img 8 x float16.*most files have .* l14_img"):
        open_store(str(tmp_path))


def test_an_unknown_array_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no array 'l14_imgs'.*Did you mean 'l14_img'"):
        open_store(write_datacomp(tmp_path, POOL), Options(image="l14_imgs"))
