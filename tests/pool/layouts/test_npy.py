import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.pool.layouts.common import CUTS, ROWS, check
from tests.pools import Pool, make, write_npy
from thresher import Options, PoolError, UsageError, open_store

POOL = make(ROWS)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("table_cuts", [[], [5, 17], None])
def test_values_keys_and_order_however_cut(tmp_path: Path, cuts: list[int], table_cuts: list[int] | None) -> None:
    store = open_store(write_npy(tmp_path, POOL, cuts, table_cuts))
    check(store, POOL, "npy")
    other = open_store(write_npy(tmp_path / "again", POOL, [4, 40], None if table_cuts is None else [30]))
    assert store.fingerprint() == other.fingerprint()
    assert store.version() != other.version()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_types(tmp_path: Path, dtype: str) -> None:
    pool = POOL.stored(dtype)
    check(open_store(write_npy(tmp_path, pool, [20])), pool, "npy")


@pytest.mark.parametrize(("mark", "options"), [("", Options(dtype="bfloat16")), ("_bf16", None), ("", "V2")])
def test_bfloat16_bits(tmp_path: Path, mark: str, options: Options | str | None) -> None:
    pool = POOL.stored("bfloat16")
    written = pool
    if options == "V2":  # what ml_dtypes' bfloat16 becomes in a file
        written, options = Pool(pool.image.view("V2"), pool.text.view("V2"), pool.keys, pool.captions), None
    check(open_store(write_npy(tmp_path, written, [20], mark=mark), options), pool, "npy")


def test_files_are_in_natural_order(tmp_path: Path) -> None:
    check(open_store(write_npy(tmp_path, POOL, list(range(3, 36, 3)), [])), POOL, "npy")
    assert (tmp_path / "image_10.npy").exists()


def test_a_single_file_is_images_without_keys(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", POOL.image)
    for place in (tmp_path, tmp_path / "vectors.npy"):
        store = open_store(str(place))
        assert store.fields == ("image",)
        assert [k for _, keys in store.keys() for k in keys][:3] == ["0", "1", "2"]
        np.testing.assert_array_equal(store.raw_at("image", np.arange(ROWS)), POOL.image)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_one_array(tmp_path: Path, save: object) -> None:
    for role in ("image", "text"):
        save(tmp_path / f"{role}.npz", getattr(POOL, role))  # type: ignore[operator]
    check(open_store(str(tmp_path)), POOL, "npy")


def test_same_fingerprint_compressed_or_not(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "image.npz", POOL.image)
    np.save(tmp_path / "one.npy", POOL.image)
    assert open_store(str(tmp_path / "image.npz")).fingerprint() == open_store(str(tmp_path / "one.npy")).fingerprint()


@pytest.mark.parametrize(
    "names",
    [
        ("0_img.npy", "0_txt.npy"),
        ("l14_img.npy", "l14_txt.npy"),
        ("images/0.npy", "captions/0.npy"),
        ("a.npy", "text.npy"),
    ],
)
def test_roles_by_name(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, array in zip(names, (POOL.image, POOL.text), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, array)
    check(open_store(str(tmp_path)), POOL, "npy")


def test_arrays_named_in_the_options_stand_alone(tmp_path: Path) -> None:
    for name, array in {"img_b": -POOL.image, "img_a": POOL.image, "txt": -POOL.text, "words": POOL.text}.items():
        np.save(tmp_path / f"{name}.npy", array)
    check(open_store(str(tmp_path), Options(image="img_a", text="words.npy")), POOL, "npy")
    with pytest.raises(UsageError, match=r"'img_c'.*Did you mean 'img_"):
        open_store(str(tmp_path), Options(image="img_c"))


def test_a_missing_file_is_not_bridged_by_pairing_others(tmp_path: Path) -> None:
    write_npy(tmp_path, make(40), [10, 20, 30], None)
    (tmp_path / "image_3.npy").unlink()
    (tmp_path / "text_1.npy").unlink()
    with pytest.raises(PoolError, match=r"text_2\.npy: would belong to .*image_1\.npy"):
        open_store(str(tmp_path))


def test_an_ambiguous_name_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "image_text.npy", POOL.image)
    with pytest.raises(PoolError, match=r"image_text\.npy: image or text\?"):
        open_store(str(tmp_path))


def test_opening_a_billion_rows_reads_the_header_only(tmp_path: Path) -> None:
    path = tmp_path / "image.npy"
    np.save(path, np.ones((1, 8), "<f2"))
    header = path.read_bytes()[:128].replace(b"(1, 8), }" + b" " * 9, b"(1000000000, 8), }")
    path.write_bytes(header)
    os.truncate(path, 128 + 10**9 * 16)
    begin = time.perf_counter()
    store = open_store(str(tmp_path))
    assert time.perf_counter() - begin < 1
    assert len(store) == 10**9
    assert store.raw_at("image", np.array([0, 10**9 - 1])).tolist() == [[0.0] * 8] * 2
