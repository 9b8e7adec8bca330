"""What trainers read: the same rows from every kind of data, bad ones set aside."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.train.conftest import ROWS, Data, add
from thresher import build, open_store, run_steps
from thresher.cli.main import main
from thresher.data import DataOptions, open_data
from thresher.dynamic.cabs import Concepts
from thresher.dynamic.run_folder import Training
from thresher.errors import ChangedError, PoolError, UsageError
from thresher.io.pictures import decode
from thresher.runtime.progress import Silent
from thresher.train import data as reading
from thresher.train.data import PICTURES, SET_ASIDE, Pairs, concepts_of, open_pairs, references_of, times_of


def opened(location: object, folder: Path, *, captions: bool = True, side: int = 16) -> Pairs:
    folder.mkdir(exist_ok=True)
    return open_pairs(str(location), folder, side=side, resize="squash", captions=captions, progress=Silent())


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 10), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["parquet", "tars", "csv"])
def test_every_kind_of_data_gives_the_same_rows(data: Data, tmp_path: Path, kind: str) -> None:
    pairs = opened(getattr(data, kind), tmp_path)
    assert len(pairs) == len(pairs.store) == ROWS
    assert list(pairs.captions) == data.table["text"].to_pylist()
    assert not pairs.skipped
    assert pairs.pixels_NHWC is not None
    for row in (0, 77, ROWS - 1):
        stored = data.table["image"][row].as_py()["bytes"]
        assert pairs.encoded(row) == stored
        assert np.array_equal(pairs.pixels_NHWC[row], decode(stored, 16, "squash"))
    if kind != "csv":
        assert pairs.keys() == data.table["key"].to_pylist()


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_data_that_change_while_they_are_read_are_refused(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    copy = tmp_path / "data"
    copy.mkdir()
    for path in [data.parquet] if kind == "parquet" else Path(data.tars).parent.glob("*.tar"):
        for one in path.rglob("*.parquet") if path.is_dir() else [path]:
            shutil.copy(one, copy)

    def replacing(*args: Any) -> Any:
        for path in copy.iterdir():
            os.utime(path, ns=(1, 1))
        return decode(*args)

    monkeypatch.setattr(reading, "decode", replacing)
    said = rf"{copy}(/\S+tar)?: changed while it was read; run again once writing has finished"
    with pytest.raises(ChangedError, match=said):
        opened(copy, tmp_path / "run")


def test_a_tar_that_is_replaced_during_training_is_noticed(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images would be read at the places of others."""
    monkeypatch.setattr(reading, "IN_MEMORY", 0)
    (tmp_path / "data").mkdir()
    for path in Path(data.tars).parent.glob("*.tar"):
        shutil.copy(path, tmp_path / "data")
    pairs = opened(tmp_path / "data", tmp_path / "run")
    assert pairs.pixels([0, ROWS - 1]).shape == (2, 16, 16, 3)
    tar = sorted((tmp_path / "data").iterdir())[0]
    os.utime(tar, ns=(1, 1))
    with pytest.raises(ChangedError, match=f"{tar}: changed while it was read; run again"):
        pairs.pixels([0])
    assert pairs.pixels([ROWS - 1]).shape == (1, 16, 16, 3), "of another tar"


def test_the_pool_of_parquet_is_itself_and_of_others_an_index(data: Data, tmp_path: Path) -> None:
    assert opened(data.parquet, tmp_path / "a").store.fingerprint() == open_store(str(data.parquet)).fingerprint()
    index = opened(data.tars, tmp_path / "b").store
    assert index.layout.location == str(tmp_path / "b" / "rows.parquet")
    assert index.columns == ("key", "text", "shard", "offset", "size")
    assert opened(data.csv, tmp_path / "c").store.columns == ("key", "text", "filepath")


def saved(table: pa.Table, folder: Path) -> Path:
    """A dataset as Hugging Face saves it to disk, in two shards."""
    from datasets import Dataset

    Dataset(table).save_to_disk(folder, num_shards=2)
    return folder


def test_datasets_saved_to_disk_come_with_their_columns(data: Data, tmp_path: Path) -> None:
    pairs = opened(saved(data.table, tmp_path / "saved"), tmp_path / "run")
    assert pairs.keys() == data.table["key"].to_pylist()
    assert list(pairs.captions) == data.table["text"].to_pylist()
    assert pairs.column("group") == data.table["group"].to_pylist()
    assert [pairs.encoded(row) for row in (0, 149)] == [data.table["image"][row].as_py()["bytes"] for row in (0, 149)]
    assert pairs.files == (("file", str(tmp_path / "run" / PICTURES)),)


def test_folders_of_pictures(data: Data, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row in range(12):
        (folder / f"{row}.webp").write_bytes(data.table["image"][row].as_py()["bytes"])
        (folder / f"{row}.txt").write_text(data.table["text"][row].as_py(), encoding="utf-8")
    pairs = opened(folder, tmp_path / "run")
    assert pairs.keys() == [str(row) for row in range(12)]
    assert list(pairs.captions) == data.table["text"].to_pylist()[:12]
    assert pairs.column("filepath") == [str(folder / f"{row}.webp") for row in range(12)]
    assert not (tmp_path / "run" / PICTURES).exists()  # they are read where they lie


def test_parquet_of_paths_is_its_own_pool_and_nothing_is_copied(data: Data, tmp_path: Path) -> None:
    names = [f"pictures/{key}.webp" for key in data.table["key"].to_pylist()]
    path = data.parquet.with_name("paths.parquet")
    pq.write_table(data.table.set_column(2, "image", pa.array(names)), path)
    pairs = opened(path, tmp_path)
    assert pairs.store.fingerprint() == open_store(str(path)).fingerprint()
    assert pairs.encoded(77) == data.table["image"][77].as_py()["bytes"]
    assert {path.name for path in tmp_path.iterdir()} == set()


def test_options_of_raw_data_are_those_of_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images outside the folder of a csv need --allow-outside, as in embed, doctor and reshard."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for i in range(4):
        (tmp_path / "out" / f"{i}.png").write_bytes(picture())
    path = tmp_path / "in" / "x.csv"
    path.write_text("".join(f"k{i},{tmp_path}/out/{i}.png,caption {i}\n" for i in range(4)))
    monkeypatch.chdir(tmp_path / "in")
    command = ["train", "clip", "x.csv", "-o", str(tmp_path / "run"), "--columns", "id,photo,words", "--image", "photo"]
    command += ["--caption", "words", "--key", "id", "--epochs", "1", "--batch-size", "2", "--quiet"]
    assert main(command) == 2
    assert re.search(
        r"names an image outside .*; if you trust the file, pass --root .*--allow-outside", capsys.readouterr().err
    )
    assert main([*command, "--allow-outside"]) == 0
    assert Training.load(tmp_path / "run").rows == 4
    options = DataOptions(columns="id,photo,words", image="photo", caption="words", key="id", allow_outside=True)
    (tmp_path / "again").mkdir()
    pairs = open_pairs(
        "x.csv", tmp_path / "again", side=8, resize="squash", captions=True, progress=Silent(), options=options
    )
    assert (pairs.keys(), list(pairs.captions)) == ([f"k{i}" for i in range(4)], [f"caption {i}" for i in range(4)])


def test_a_key_that_is_named_is_that_of_the_rows(tmp_path: Path) -> None:
    cells = {"image": [picture()] * 3, "text": ["a", "b", "c"], "key": list("xyz"), "other": list("uvw")}
    pq.write_table(pa.table(cells), tmp_path / "x.parquet")
    (tmp_path / "run").mkdir()
    how = {"side": 8, "resize": "squash", "captions": True, "progress": Silent()}
    pairs = open_pairs(str(tmp_path / "x.parquet"), tmp_path / "run", **how, options=DataOptions(key="other"))
    assert pairs.keys() == list("uvw")


def test_parquet_of_img2dataset_is_read_with_the_failures_set_aside(data: Data, tmp_path: Path) -> None:
    """Its pool has the successes alone, other rows than the table: the run has an index of its own."""
    table = data.table.slice(0, 9)
    status = ["success"] * 8 + ["failed_to_download"]
    pictures = [cell["bytes"] for cell in table["image"].to_pylist()[:8]] + [None]
    folder = tmp_path / "shards"
    folder.mkdir()
    columns = {"key": table["key"], "caption": table["text"], "jpg": pictures, "status": status}
    pq.write_table(pa.table(columns), folder / "00000.parquet")
    pairs = opened(folder, tmp_path / "run")
    assert pairs.keys() == table["key"].to_pylist()[:8]
    assert [pairs.encoded(row) for row in range(8)] == pictures[:8]
    assert pairs.column("status") == ["success"] * 8
    assert [why for _, why in pairs.skipped] == ["has no image"]


def test_uids_are_keys(tmp_path: Path) -> None:
    """A selection of a pool of DataComp has uids."""
    uids = [f"{i:032x}" for i in (7, 3)]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for i, uid in enumerate(uids):
            add(archive, f"{i}.png", picture())
            add(archive, f"{i}.txt", b"one")
            add(archive, f"{i}.json", json.dumps({"uid": uid}).encode())
    pairs = opened(tmp_path, tmp_path / "run")
    assert pairs.keys() == uids
    assert pairs.column("key") == ["0", "1"]
    (tmp_path / "keys.txt").write_text(uids[1])
    assert times_of(str(tmp_path / "keys.txt"), pairs)[0].tolist() == [0, 1]


def test_tars_elsewhere(tmp_path: Path) -> None:
    """Pictures are read from where they are, by any file system that fsspec knows."""
    import fsspec

    pictures = [picture(size=(8, 8 + i)) for i in range(3)]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for i, content in enumerate(pictures):
            add(archive, f"{i}.png", content)
            add(archive, f"{i}.txt", b"one")
    fsspec.filesystem("memory").pipe("/elsewhere/0.tar", file.getvalue())
    pairs = opened("memory://elsewhere/0.tar", tmp_path)
    assert [pairs.encoded(row) for row in (2, 0, 1)] == [pictures[row] for row in (2, 0, 1)]


def test_data_without_captions_or_without_rows_say_so(data: Data, tmp_path: Path) -> None:
    pq.write_table(data.table.drop_columns(["text"]), tmp_path / "a.parquet")
    with pytest.raises(PoolError, match="none of its 150 samples has a caption"):
        opened(tmp_path / "a.parquet", tmp_path / "run")
    assert len(opened(tmp_path / "a.parquet", tmp_path / "run", captions=False)) == ROWS
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "README", b"no sample")
    with pytest.raises(PoolError, match="0.tar: has no samples"):
        opened(tmp_path / "0.tar", tmp_path / "other")


def test_pictures_that_do_not_fit_are_read_when_they_are_needed(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = opened(data.parquet, tmp_path / "a")
    monkeypatch.setattr(reading, "IN_MEMORY", 16 * 16 * 3 * ROWS - 1)
    read = opened(data.parquet, tmp_path / "b")
    assert read.pixels_NHWC is None
    rows = [5, 0, 149, 5]
    assert np.array_equal(read.pixels(rows), kept.pixels(rows))


def test_rows_that_cannot_be_used_are_set_aside_and_listed(data: Data, tmp_path: Path) -> None:
    table = data.table.slice(0, 40)
    images, texts = table["image"].to_pylist(), table["text"].to_pylist()
    images[3]["bytes"] = images[3]["bytes"][:100]
    images[4]["bytes"] = None
    images[5]["bytes"] = b"GIF89a no more"
    texts[9] = "  "
    bad = {3, 4, 5, 9}
    table = table.set_column(1, "text", pa.array(texts)).set_column(2, "image", pa.array(images))
    pq.write_table(table, tmp_path / "bad.parquet")
    pairs = opened(tmp_path / "bad.parquet", tmp_path / "run")
    good = [row for row in range(40) if row not in bad]
    assert pairs.keys() == [table["key"][row].as_py() for row in good]
    assert list(pairs.captions) == [texts[row] for row in good]
    assert [pairs.encoded(i) for i in range(len(pairs))] == [images[row]["bytes"] for row in good]
    assert pairs.pixels_NHWC is not None
    assert np.array_equal(pairs.pixels_NHWC[4], decode(images[7]["bytes"], 16, "squash"))
    assert pairs.column("row") == good
    listed = (tmp_path / "run" / SET_ASIDE).read_text().splitlines()
    assert [line.split(",")[0] for line in listed] == [f"row {row}" for row in sorted(bad)]
    assert "has no caption" in listed[3]
    again = opened(tmp_path / "bad.parquet", tmp_path / "again", captions=False)
    assert len(again) == 37  # captions are not asked for


def test_data_of_which_little_can_be_used_are_refused(data: Data, tmp_path: Path) -> None:
    table = data.table.slice(0, 10)
    images = [{"bytes": b"no", "path": None}] * 6 + table["image"].to_pylist()[6:]
    pq.write_table(table.set_column(2, "image", pa.array(images)), tmp_path / "bad.parquet")
    with pytest.raises(PoolError, match="6 of 10 rows cannot be used; row 0 is not a readable image"):
        opened(tmp_path / "bad.parquet", tmp_path / "run")


def test_samples_of_tars(tmp_path: Path) -> None:
    """Captions from .txt or .json; folders in names; what is no sample is passed over or listed."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "x/1.png", picture())
        add(archive, "x/1.json", json.dumps({"caption": "from json", "width": 3}).encode())
        add(archive, "x/2.json", b"{}")
        add(archive, "x/2.txt", b" from text \n")
        add(archive, "x/2.JPG", picture(kind="JPEG"))
        add(archive, "x/3.txt", b"no picture")
        add(archive, "README", b"no sample")
        add(archive, "../../4.png", picture())
        add(archive, "../../4.txt", b"names lead nowhere")
        link = tarfile.TarInfo("x/5.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    pairs = opened(tmp_path, tmp_path / "run")
    assert list(pairs.captions) == ["from json", "from text", "names lead nowhere"]
    assert pairs.keys() == ["x/1", "x/2", "../../4"]
    assert pairs.skipped == (("row 2, key x/3", "has no image (members: txt)"),)
    assert pairs.column("row") == [0, 1, 3]


@pytest.mark.parametrize("kind", ["truncated", "compressed", "empty", "missing"])
def test_bad_tars_are_named(tmp_path: Path, data: Data, kind: str) -> None:
    path = tmp_path / "bad.tar"
    whole = Path(data.tars.replace("{00000..00002}", "00000")).read_bytes()
    content = {"truncated": whole[:3000], "compressed": b"\x1f\x8b" + bytes(600), "empty": b""}
    if kind in content:
        path.write_bytes(content[kind])
    with pytest.raises(PoolError, match="bad.tar"):
        opened(path, tmp_path / "run")


def test_pictures_that_are_gone_are_set_aside(tmp_path: Path) -> None:
    lines = ["\ufefffilepath\ttitle"]
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(picture())
        lines.append(f"{tmp_path / name}.png\t{name}")
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.png").unlink()
    pairs = opened(tmp_path / "a.csv", tmp_path / "run")
    assert list(pairs.captions) == ["a", "c"]
    assert pairs.skipped == ((f"row 1, key {tmp_path}/b.png", f"names an image that is not a file: {tmp_path}/b.png"),)


def test_tars_are_told_by_their_ending(data: Data, tmp_path: Path) -> None:
    folder = tmp_path / "my.tar files"
    folder.mkdir()
    pq.write_table(data.table.slice(0, 5), folder / "a.parquet")
    assert len(opened(folder / "a.parquet", tmp_path / "run")) == 5
    with pytest.raises(PoolError, match="is compressed, and compressed tars have no random access"):
        opened(tmp_path / "a.tar.gz", tmp_path / "run")


def test_of_several_captions_the_first_is_taken(data: Data, tmp_path: Path) -> None:
    texts = pa.array([["one", "two"], [None, "two"], [], None, ["five"], ["six"], ["7"]])
    pq.write_table(data.table.slice(0, 7).set_column(1, "text", texts), tmp_path / "a.parquet")
    assert list(opened(tmp_path / "a.parquet", tmp_path / "run").captions) == ["one", "two", "five", "six", "7"]
    named = pq.read_table(tmp_path / "a.parquet").rename_columns(["key", "texts", "image", "group"])
    pq.write_table(named, tmp_path / "b.parquet")
    assert list(opened(tmp_path / "b.parquet", tmp_path / "other").captions) == ["one", "two", "five", "six", "7"]


def test_rows_set_aside_take_no_column_with_them(data: Data, tmp_path: Path) -> None:
    """Labels are still there for what is learnt from them."""
    texts = ["", *data.table["text"].to_pylist()[1:9]]
    table = data.table.slice(0, 9).set_column(1, "text", pa.array(texts)).append_column("label", pa.array(range(9)))
    pq.write_table(table, tmp_path / "a.parquet")
    pairs = opened(tmp_path / "a.parquet", tmp_path / "run")
    assert pairs.column("label") == list(range(1, 9))
    assert pairs.column("group") == table["group"].to_pylist()[1:]


def test_a_csv_that_moved_with_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(picture())
    (tmp_path / "a.csv").write_text('filepath\ttitle\nimg/a.png\t"quoted ""title"""\n')
    pairs = opened(tmp_path / "a.csv", tmp_path / "run")
    assert list(pairs.captions) == ['quoted "title"']
    (tmp_path / "b.csv").write_text("filepath,title\nimg/a.png,x\n")
    assert list(opened(tmp_path / "b.csv", tmp_path / "run").captions) == ["x"]
    (tmp_path / "c.csv").write_text("where,title\nimg/a.png,x\n")
    with pytest.raises(
        PoolError, match=r"no column of image paths .*; it has where, title; name one with --image COLUMN"
    ):
        opened(tmp_path / "c.csv", tmp_path / "run")


def test_pictures_may_be_files_below_the_data_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "data" / "img").mkdir(parents=True)
    (tmp_path / "data" / "img" / "a.png").write_bytes(picture())
    (tmp_path / "secret.png").write_bytes(picture())
    (tmp_path / "data" / "img" / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["img/a.png", "img/a.png", "../secret.png", str(tmp_path / "secret.png"), "img/link.png", "img/none.png"]
    cells = [{"bytes": None, "path": name} for name in [*names, *["img/a.png"] * 6]]
    pq.write_table(pa.table({"image": cells, "text": ["a"] * 12}), tmp_path / "data" / "a.parquet")
    pairs = opened(tmp_path / "data" / "a.parquet", tmp_path / "run")
    assert pairs.column("row") == [0, 1, *range(6, 12)]
    assert pairs.encoded(0) == picture()


def test_parquet_without_pictures_or_captions_says_what_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a"], "size": [1]}), tmp_path / "a.parquet")
    with pytest.raises(PoolError, match="has no column of images .* has caption, size"):
        opened(tmp_path / "a.parquet", tmp_path / "run")


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "I;16", "CMYK"])
def test_pictures_of_any_mode_are_decoded(mode: str) -> None:
    data = picture(mode, kind="TIFF" if mode == "CMYK" else "PNG")
    found = decode(data, 8)
    assert found.shape == (8, 8, 3)
    assert found.dtype == np.uint8
    transparent = mode in ("LA", "RGBA")
    assert (found == 255).all() if transparent or mode == "CMYK" else (found == 0).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(kind: str) -> None:
    ramp = np.linspace(0, 65_535, 64 * 64).astype(np.uint16).reshape(64, 64)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, kind)
    found = decode(file.getvalue(), 64, "squash")
    assert np.abs(found[..., 0].astype(int) - (ramp // 257)).max() <= 1
    floating = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(floating, "TIFF")
    with pytest.raises(PoolError, match="floating-point pixels"):
        decode(floating.getvalue(), 8)


def test_squares_are_cut_out_or_squashed() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert (decode(file.getvalue(), 10, "shortest") == 255).all()
    squashed = decode(file.getvalue(), 30, "squash")
    assert (squashed[:, 12:18] == 255).all()
    assert (squashed[:, :8] == 0).all()


def test_pictures_lie_as_their_camera_was_held() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    assert (decode(file.getvalue(), 8)[:3] == 0).all()


def test_selections_of_the_pool_and_of_its_keys(data: Data, tmp_path: Path) -> None:
    store = open_store(str(data.parquet))
    chosen = run_steps(store, [build("random", {"keep": 40})], seed=3)
    chosen.save(tmp_path / "sel")
    parquet = opened(data.parquet, tmp_path / "a")
    times_N, missing = times_of(str(tmp_path / "sel"), parquet)
    assert missing == 0
    assert np.array_equal(times_N, chosen.mask())
    other, missing = times_of(str(tmp_path / "sel"), opened(data.tars, tmp_path / "b"))  # same keys, another pool
    assert missing == 0
    assert np.array_equal(other, chosen.mask())
    keys = data.table["key"].to_pylist()
    (tmp_path / "keys.txt").write_text("\n".join([keys[2], keys[9], keys[2], "unknown"]))
    times_N, missing = times_of(str(tmp_path / "keys.txt"), parquet)
    assert missing == 1
    assert np.flatnonzero(times_N).tolist() == [2, 9]
    assert times_N[[2, 9]].tolist() == [2, 1]
    twice = data.table.set_column(0, "key", pa.array([keys[row // 2] for row in range(ROWS)]))
    pq.write_table(twice, tmp_path / "twice.parquet")
    doubled, _ = times_of(str(tmp_path / "keys.txt"), opened(tmp_path / "twice.parquet", tmp_path / "c"))
    assert np.flatnonzero(doubled).tolist() == [4, 5, 18, 19]  # a key that stands for two rows keeps both
    (tmp_path / "none.txt").write_text("unknown\n")
    with pytest.raises(UsageError, match="none of its keys is in"):
        times_of(str(tmp_path / "none.txt"), parquet)
    with pytest.raises(PoolError, match="neither a selection folder nor a file of keys"):
        times_of(str(tmp_path / "nothing"), parquet)


def test_rows_without_a_key_column_have_the_keys_of_every_command(data: Data, tmp_path: Path) -> None:
    """Keys as `embed`, `reshard` and the lab name the rows, also after rows that are skipped."""
    images = data.table["image"].to_pylist()
    images[3] = {"bytes": b"no image", "path": None}
    table = pa.table({"image": images, "text": data.table["text"], "kind": [f"k{row % 5}" for row in range(ROWS)]})
    pq.write_table(table, tmp_path / "plain.parquet")
    pairs = opened(tmp_path / "plain.parquet", tmp_path / "run")
    usable = [row for row in range(ROWS) if row != 3]
    known = [sample.key for sample in open_data(str(tmp_path / "plain.parquet")).samples()]
    assert pairs.keys() == [known[row] for row in usable]
    assert pairs.column("kind") == [f"k{row % 5}" for row in usable]
    assert pairs.skipped[0][0] == f"row 3, key {known[3]}"
    kept = [2, 3, 4, ROWS - 1]
    expected = [int(row in kept) for row in usable]
    (tmp_path / "keys.txt").write_text("".join(f"{known[row]}\n" for row in kept))
    assert times_of(str(tmp_path / "keys.txt"), pairs)[0].tolist() == expected
    # The file is a pool, too, whose selections name rows by their numbers.
    (tmp_path / "numbers.txt").write_text("".join(f"{row}\n" for row in kept))
    assert times_of(str(tmp_path / "numbers.txt"), pairs) == (pytest.approx(expected), 1)
    losses = pa.table({"key": [str(row) for row in kept], "loss": [0.5, 9.0, 1.5, 2.5]})
    pq.write_table(losses, tmp_path / "losses.parquet")
    found = references_of(str(tmp_path / "losses.parquet"), pairs)
    assert found[[2, 3, ROWS - 2]].tolist() == [0.5, 1.5, 2.5]
    assert np.isnan(found).sum() == len(usable) - 3
    # Numbers are no keys of data that have keys.
    with pytest.raises(UsageError, match="none of its keys is in"):
        times_of(str(tmp_path / "numbers.txt"), opened(data.parquet, tmp_path / "keyed"))


def test_what_has_no_concepts_is_said(data: Data, tmp_path: Path) -> None:
    pairs = opened(data.parquet, tmp_path / "run")
    with pytest.raises(UsageError, match="column 'image' of .* has no values or lists of values; give concepts"):
        concepts_of("column:image", pairs)
    with pytest.raises(PoolError, match=r"nowhere: not a folder of clusters \(cluster.json is missing\)"):
        concepts_of(str(tmp_path / "nowhere"), pairs)


@pytest.mark.parametrize(
    ("cells", "counts"),
    [
        ([["a", None], [None], [], None, ["b", "a"]], [1, 0, 0, 0, 2]),
        ([1.0, float("nan"), None, 1.0, 2.0], [1, 0, 0, 1, 1]),
        ([[1.0, float("nan")], [], None, [float("nan")], [2.0]], [1, 0, 0, 0, 1]),
        ([3, None, None, 3, 4], [1, 0, 0, 1, 1]),
        (["x", None, "y", "x", None], [1, 0, 1, 1, 0]),
    ],
)
def test_nulls_of_a_column_are_no_concepts(data: Data, tmp_path: Path, cells: list[Any], counts: list[int]) -> None:
    pq.write_table(data.table.slice(0, 5).append_column("tag", pa.array(cells)), tmp_path / "pairs.parquet")
    found = concepts_of("column:tag", opened(tmp_path / "pairs.parquet", tmp_path / "run"))
    assert found.counts().tolist() == counts
    assert len(np.unique(found.ids_M)) == 2
    only_null = pa.array([[None]] * 5, pa.list_(pa.string()))
    pq.write_table(data.table.slice(0, 5).append_column("tag", only_null), tmp_path / "none.parquet")
    with pytest.raises(UsageError, match="none of 5 rows of .* has a concept"):
        concepts_of("column:tag", opened(tmp_path / "none.parquet", tmp_path / "run2"))


@pytest.mark.parametrize("form", ["k{}", "{:032X}"])
def test_every_row_of_a_key_has_the_cluster_of_the_key(data: Data, tmp_path: Path, form: str) -> None:
    """Data may repeat keys, such as a training set with repeats; the clusters are of a pool with each key once."""
    few = data.table.slice(0, 20)
    keys = [form.format(i % 7 + 10) for i in range(20)]
    pq.write_table(few.set_column(few.column_names.index("key"), "key", pa.array(keys)), tmp_path / "pairs.parquet")
    vectors = np.random.default_rng(0).standard_normal((7, 4), np.float32)
    theirs = [form.format(i + 10) for i in range(7)]  # a uid is the same in lower case, as in a selection
    pool = {"key": [key.lower() for key in theirs], "image_embedding": list(vectors)}
    pq.write_table(pa.table(pool), tmp_path / "pool.parquet")
    assert main(["cluster", str(tmp_path / "pool.parquet"), "-o", str(tmp_path / "c"), "--clusters", "3"]) == 0
    found = concepts_of(str(tmp_path / "c"), opened(tmp_path / "pairs.parquet", tmp_path / "run"))
    labels = np.load(tmp_path / "c" / "labels.npy")
    expected = Concepts.of_labels(labels[np.arange(20) % 7])
    np.testing.assert_array_equal(found.ids_M, expected.ids_M)
    np.testing.assert_array_equal(found.ends_N, expected.ends_N)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "checkpoint_minutes", "warmup"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e308, -1e-320])
def test_numbers_with_which_nothing_can_be_trained(name: str, value: float) -> None:
    from thresher.train.loop import Schedule

    with pytest.raises(UsageError, match=name.replace("_", " ")):
        Schedule(epochs=1, **{name: value})
    with pytest.raises(UsageError, match="at most 4,096 workers"):
        Schedule(epochs=1, workers=10**9)


@pytest.mark.parametrize(
    ("name", "value"),
    [("side", 10**9), ("queue", 0), ("queue", 10**18), ("temperature", float("inf")), ("momentum", 1.0)],
)
def test_numbers_with_which_no_moco_can_be_trained(name: str, value: float) -> None:
    from thresher.train.loop import Schedule
    from thresher.train.moco import MocoSettings

    with pytest.raises(UsageError, match=rf"{name} = {value}"):
        MocoSettings(schedule=Schedule(epochs=1), **{name: value})
