"""Embedding: every layout gives the same pool as encoding picture by picture; kills, growth and bad samples."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.embedding.raw import caption, files, open_clip_csv, parquet, picture, table, tars, write_tar
from tests.toy import Toy, preprocess, tokenize
from thresher import open_store
from thresher.cli.main import main
from thresher.data import DataOptions
from thresher.data.samples import Place
from thresher.embedding import pipeline
from thresher.embedding.pipeline import Embedded, EmbedSettings, embed
from thresher.embedding.pool import SET_ASIDE, PoolPlan, Shard, writing_shard, written
from thresher.errors import OutputError, PoolError, UnreachedError, UsageError
from thresher.io.open import trusting
from thresher.io.pictures import open_rgb
from thresher.io.plan import PLAN
from thresher.runtime.progress import Advance, Silent

ROOT = Path(__file__).parents[2]
TOY = EmbedSettings(encoder="tests.toy:Toy", workers=0, batch_size=16)


def vectors(pool: Path) -> dict[str, np.ndarray]:
    """All vectors of a pool, as stored."""
    return {
        folder: np.concatenate([np.load(path) for path in sorted((pool / folder).glob("*.npy"))])
        for folder in ("img_emb", "text_emb")
        if (pool / folder).exists()
    }


def rows_of(pool: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((pool / "metadata").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def one_by_one(numbers: list[int]) -> dict[str, np.ndarray]:
    """The slow reference: a picture and a caption at a time."""
    toy = Toy()
    image = [toy.encode_images(preprocess(open_rgb(picture(i)))[None])[0] for i in numbers]
    text = [toy.encode_texts(tokenize([caption(i)]))[0] for i in numbers]
    return {"img_emb": np.array(image, np.float16), "text_emb": np.array(text, np.float16)}


def digests(pool: Path) -> dict[str, str]:
    return {
        str(path.relative_to(pool)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(pool.rglob("*"))
        if path.is_file()
    }


LAYOUTS = {
    "webdataset": lambda folder: tars(folder / "tars", 43),
    "parquet": lambda folder: parquet(folder / "rows.parquet", 43),
    "csv": lambda folder: open_clip_csv(folder, 43),
    "folder": lambda folder: files(folder / "pictures", 43),
}


@pytest.mark.parametrize(
    ("layout", "workers", "batch", "per_part"),
    [
        pytest.param(layout, *how, marks=pytest.mark.slow if how[0] and layout != "webdataset" else ())
        for how in ((0, 16, 10_000), (0, 1, 10), (2, 64, 10))
        for layout in LAYOUTS
    ],
)
def test_every_layout_gives_the_vectors_of_a_loop(
    tmp_path: Path, layout: str, workers: int, batch: int, per_part: int
) -> None:
    data = LAYOUTS[layout](tmp_path)
    how = dataclasses.replace(TOY, workers=workers, batch_size=batch, data=DataOptions(per_part=per_part))
    found = embed(str(data), tmp_path / "pool", how)
    assert (found.rows, found.new, found.skipped, found.fields) == (43, 43, 0, ("image", "text"))
    expected = one_by_one(list(range(43)))
    for folder, stored in vectors(tmp_path / "pool").items():
        assert stored.dtype == np.float16
        np.testing.assert_array_equal(stored, expected[folder])
    store = open_store(str(tmp_path / "pool"))
    assert store.layout.kind == "clip-retrieval"
    assert (store.layout.key, store.layout.caption) == ("key", "text")
    rows = rows_of(tmp_path / "pool")
    assert [row["text"] for row in rows] == [caption(i) for i in range(43)]
    sizes = [Image.open(io.BytesIO(picture(i))).size for i in range(43)]
    assert [(row["width"], row["height"]) for row in rows] == sizes
    assert not (tmp_path / "pool" / SET_ASIDE).exists()


def test_rows_tell_where_they_come_from(tmp_path: Path) -> None:
    embed(str(tars(tmp_path / "tars", 25)), tmp_path / "pool", TOY)
    for i, row in enumerate(rows_of(tmp_path / "pool")):
        assert row["shard"] == f"tars/{i // 10:05d}.tar"
        with open(tmp_path / row["shard"], "rb") as file:
            file.seek(row["offset"])
            assert file.read(10) == f"{i:06d}.png".encode()


def test_columns_of_tables_and_thumbnails_go_along(tmp_path: Path) -> None:
    how = dataclasses.replace(TOY, thumbnails=8)
    embed(str(parquet(tmp_path / "rows.parquet", 12)), tmp_path / "pool", how)
    rows = rows_of(tmp_path / "pool")
    assert [row["label"] for row in rows] == [i % 3 for i in range(12)]
    for i, row in enumerate(rows):
        small = Image.open(io.BytesIO(row["thumbnail"]["bytes"]))
        assert max(small.size) == 8
        original = open_rgb(picture(i))
        assert abs(small.width / small.height - original.width / original.height) < 0.5
    assert open_store(str(tmp_path / "pool")).layout.image == "thumbnail"


def test_uids_of_datacomp_become_the_keys(tmp_path: Path) -> None:
    uids = [hashlib.md5(str(i).encode()).hexdigest() for i in range(6)]
    told = [json.dumps({"uid": uid}).encode() for uid in uids]
    samples = [(f"{i}", {"png": picture(i), "txt": caption(i).encode(), "json": told[i]}) for i in range(6)]
    write_tar(tmp_path / "0.tar", samples)
    embed(str(tmp_path / "0.tar"), tmp_path / "pool", TOY)
    store = open_store(str(tmp_path / "pool"))
    assert [key for _, keys in store.keys() for key in keys] == uids


def test_bad_samples_are_counted_and_listed_and_harm_no_other(tmp_path: Path) -> None:
    grey = io.BytesIO()
    Image.new("L", (9, 3000), 120).save(grey, "png")
    samples: list[tuple[str, dict[str, bytes]]] = [
        (f"{i:02d}", {"png": picture(i), "txt": caption(i).encode()}) for i in range(20)
    ]
    samples[3][1]["png"] = picture(3)[:60]
    samples[5][1]["png"] = b"<html>not found</html>"
    samples[7][1]["txt"] = b"  \n"
    samples[9] = ("09", {"txt": b"no picture"})
    samples[13] = ("13\x1b[31m", {"png": b"", "txt": b"red"})
    samples[11][1]["png"] = grey.getvalue()
    cut = write_tar(tmp_path / "cut.tar", samples).read_bytes()
    (tmp_path / "cut.tar").write_bytes(cut[: cut.index(b"15.txt") + 100])
    write_tar(tmp_path / "whole.tar", samples[16:])
    (tmp_path / "zip.tar").write_bytes(b"PK\x03\x04 this is no tar at all" * 100)
    found = embed(f"{tmp_path}/{{cut,whole,zip}}.tar", tmp_path / "pool", TOY)
    good = [i for i in range(15) if i not in (3, 5, 7, 9, 11, 13)] + [
        16,
        17,
        18,
        19,
    ]  # 15 has lost its caption to the cut
    assert [row["key"] for row in rows_of(tmp_path / "pool")] == [f"{i:02d}" for i in good]
    np.testing.assert_array_equal(vectors(tmp_path / "pool")["img_emb"], one_by_one(good)["img_emb"])
    assert (found.skipped, found.damaged) == (6, 2)
    lines = (tmp_path / "pool" / SET_ASIDE).read_text().splitlines()
    assert len(lines) == 8
    assert not any("\x1b" in line for line in lines)  # control characters
    for i, why in [
        (3, "is not a readable image"),
        (5, "is not a readable image"),
        (7, "has no caption"),
        (9, "has no image"),
        (11, "too narrow"),
    ]:
        assert sum(f"key {i:02d}: " in line and why in line for line in lines) == 1, (i, lines)
    assert any("cut.tar: is cut off at byte" in line for line in lines)
    assert any("zip.tar: is not a tar" in line for line in lines)


def test_zero_and_infinite_vectors_are_skipped(tmp_path: Path) -> None:
    def plain(value: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (12, 12), (value,) * 3).save(buffer, "png")
        return buffer.getvalue()

    values = [128, 5, 250, 100, 130]
    write_tar(tmp_path / "0.tar", [(str(i), {"png": plain(v), "txt": b"a"}) for i, v in enumerate(values)])
    found = embed(str(tmp_path / "0.tar"), tmp_path / "pool", dataclasses.replace(TOY, encoder="tests.toy:Broken"))
    assert (found.rows, found.skipped) == (3, 2)
    assert [row["key"] for row in rows_of(tmp_path / "pool")] == ["0", "3", "4"]
    assert np.isfinite(vectors(tmp_path / "pool")["img_emb"]).all()
    assert len(vectors(tmp_path / "pool")["text_emb"]) == 3


def test_bombs_are_not_decoded(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (3000, 3000)).save(bomb, "png")
    write_tar(
        tmp_path / "0.tar", [("a", {"png": bomb.getvalue(), "txt": b"x"}), ("b", {"png": picture(1), "txt": b"y"})]
    )
    found = embed(str(tmp_path / "0.tar"), tmp_path / "pool", dataclasses.replace(TOY, pixel_limit=2**20))
    assert (found.rows, found.skipped) == (1, 1)
    assert "3,000 x 3,000 pixels" in (tmp_path / "pool" / SET_ASIDE).read_text()


def test_one_field_alone(tmp_path: Path) -> None:
    data = str(parquet(tmp_path / "rows.parquet", 9))
    expected = one_by_one(list(range(9)))
    for encoder, only, fields in [
        ("tests.toy:Words", None, {"text_emb"}),
        ("tests.toy:Pictures", None, {"img_emb"}),
        ("tests.toy:Toy", "text", {"text_emb"}),
        ("tests.toy:Toy", "image", {"img_emb"}),
    ]:
        pool = tmp_path / f"{encoder[10:]}-{only}"
        embed(data, pool, dataclasses.replace(TOY, encoder=encoder, only=only))
        found = vectors(pool)
        assert set(found) == fields
        for name in fields:
            np.testing.assert_array_equal(found[name], expected[name])
    with pytest.raises(UsageError, match="--only image: tests.toy:Words encodes only text"):
        embed(data, tmp_path / "none", dataclasses.replace(TOY, encoder="tests.toy:Words", only="image"))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "jsonl"])
def test_captions_alone(tmp_path: Path, kind: str) -> None:
    """img2dataset's tables without --output_format of images, and lists of captions."""
    cells = {"caption": [caption(i) for i in range(9)], "width": [i for i in range(9)]}
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(cells), path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.table(cells).schema) as writer:
            writer.write_table(pa.table(cells))
    elif kind == "csv":
        path.write_text("caption,width\n" + "".join(f"{text},1\n" for text in cells["caption"]))
    else:
        path.write_text("".join(json.dumps({"caption": text, "width": 1}) + "\n" for text in cells["caption"]))
    with pytest.raises(PoolError, match=r"no column of image.*; name one with --image COLUMN, or .*--only text"):
        embed(str(path), tmp_path / "pool", TOY)
    found = embed(str(path), tmp_path / "pool", dataclasses.replace(TOY, only="text"))
    assert (found.rows, found.skipped, found.fields) == (9, 0, ("text",))
    np.testing.assert_array_equal(vectors(tmp_path / "pool")["text_emb"], one_by_one(list(range(9)))["text_emb"])
    store = open_store(str(tmp_path / "pool"))
    assert len({key for _, keys in store.keys() for key in keys}) == 9


def test_rows_with_several_images_are_counted(tmp_path: Path) -> None:
    """Hugging Face's Sequence(Image()): the first image of each row is embedded."""
    cells = [[{"bytes": picture(i + j), "path": None} for j in range(i % 3)] for i in range(9)]
    texts = [caption(i) for i in range(9)]
    pq.write_table(pa.table({"images": cells, "image": cells, "text": texts}), tmp_path / "x.parquet")
    found = embed(str(tmp_path / "x.parquet"), tmp_path / "pool", TOY)
    assert (found.rows, found.skipped) == (6, 3)
    assert found.notes == ("3 rows have several images; the first is used",)
    assert embed(str(tmp_path / "x.parquet"), tmp_path / "pool", TOY).notes == found.notes
    expected = one_by_one([i for i in range(9) if i % 3])
    np.testing.assert_array_equal(vectors(tmp_path / "pool")["img_emb"], expected["img_emb"])


def test_data_without_captions_give_pictures_alone(tmp_path: Path) -> None:
    bare = table(range(7)).drop_columns(["text"])
    pq.write_table(bare, tmp_path / "bare.parquet")
    found = embed(str(tmp_path / "bare.parquet"), tmp_path / "pool", TOY)
    assert found.fields == ("image",)
    assert "no captions" in found.notes[0]
    with pytest.raises(PoolError, match="has no captions"):
        embed(str(tmp_path / "bare.parquet"), tmp_path / "w", dataclasses.replace(TOY, encoder="tests.toy:Words"))


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a", {"png": b"broken", "txt": b"x"})])
    with pytest.raises(PoolError, match="none of its samples can be used; .*/0.tar, 0, key a: is not a readable image"):
        embed(str(tmp_path / "0.tar"), tmp_path / "pool", TOY)


def test_encoders_that_do_not_keep_their_word_are_refused(tmp_path: Path) -> None:
    data = str(tars(tmp_path / "tars", 10))
    with pytest.raises(UsageError, match=r"returns float32 \(2, 48\) for 2 images; .* float32 \(2, 24\)"):
        embed(data, tmp_path / "wide", dataclasses.replace(TOY, encoder="tests.toy:Wide"))
    for workers in (0, 1):
        with pytest.raises(UsageError, match=r"preprocess returns float32 \(12, 12, 3\); return uint8"):
            embed(data, tmp_path / "pool", dataclasses.replace(TOY, encoder="tests.toy:Scaled", workers=workers))


def test_captions_and_uids_are_looked_for_all_over_the_data(tmp_path: Path) -> None:
    tars(tmp_path / "tars", 20)
    write_tar(tmp_path / "tars" / "00000.tar", [(f"{i}", {"png": picture(i)}) for i in range(70)])
    found = embed(str(tmp_path / "tars"), tmp_path / "pool", TOY)
    assert (found.fields, found.rows, found.skipped) == (("image", "text"), 10, 70)


def test_a_uid_that_is_none_of_datacomp_is_no_key(tmp_path: Path) -> None:
    told = [{"png": picture(i), "txt": b"x", "json": b'{"uid": "the photographer"}'} for i in range(3)]
    write_tar(tmp_path / "0.tar", [(str(i), one) for i, one in enumerate(told)])
    embed(str(tmp_path / "0.tar"), tmp_path / "pool", TOY)
    assert "uid" not in rows_of(tmp_path / "pool")[0]


def test_a_key_that_is_asked_for_is_the_pools_key(tmp_path: Path) -> None:
    rows = table(range(4)).rename_columns(["id", "image", "text"]).append_column("uid", pa.array(["same"] * 4))
    pq.write_table(rows, tmp_path / "rows.parquet")
    how = dataclasses.replace(TOY, data=DataOptions(key="id"))
    embed(str(tmp_path / "rows.parquet"), tmp_path / "pool", how)
    store = open_store(str(tmp_path / "pool"))
    assert [key for _, keys in store.keys() for key in keys] == [f"{i:06d}" for i in range(4)]


def test_very_many_samples_may_be_skipped(tmp_path: Path) -> None:
    """Their list is in a footer, of which readers take 100 MB at the most."""
    skipped = [(f"some/long/folder/name/of/a/sample/{i:012d}", i, "has no image") for i in range(20_000)]
    with writing_shard(tmp_path, 0, {"image": 4}, pa.schema([("key", pa.string())])) as writer:
        writer.add({"image": np.ones((1, 4), np.float16)}, {"key": ["a"]})
        writer.skipped += skipped
    assert (tmp_path / "metadata" / "metadata_00000.parquet").stat().st_size < 300_000
    expected = {"rows": 1, "set_aside": [list(one) for one in skipped], "damage": "", "retry": False, "notes": {}}
    assert written(tmp_path, 0) == expected


# --- growing, resuming ----------------------------------------------------------------------------


def test_a_pool_grows_without_doing_a_shard_twice(tmp_path: Path) -> None:
    whole = tars(tmp_path / "tars", 40)
    embed(f"{whole}/{{00000..00001}}.tar", tmp_path / "pool", TOY)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "pool").rglob("*_0000[01].*")}
    assert len(before) == 6
    found = embed(str(whole), tmp_path / "pool", TOY)
    assert (found.rows, found.new, found.shards) == (40, 20, 4)
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in before}
    np.testing.assert_array_equal(vectors(tmp_path / "pool")["img_emb"], one_by_one(list(range(40)))["img_emb"])
    again = embed(str(whole), tmp_path / "pool", TOY)
    assert (again.rows, again.new) == (40, 0)
    embed(str(whole), tmp_path / "once", TOY)
    assert digests(tmp_path / "pool") == digests(tmp_path / "once")


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    data = tars(tmp_path / "tars", 20)
    embed(f"{data}/00000.tar", tmp_path / "pool", TOY)
    before = digests(tmp_path / "pool")
    with pytest.raises(UsageError, match="cannot grow with encoder"):
        embed(str(data), tmp_path / "pool", dataclasses.replace(TOY, encoder="tests.toy:Other"))
    with pytest.raises(UsageError, match="cannot grow with fields image;"):
        embed(str(data), tmp_path / "pool", dataclasses.replace(TOY, only="image"))
    with pytest.raises(UsageError, match="cannot grow with columns"):
        embed(str(data), tmp_path / "pool", dataclasses.replace(TOY, thumbnails=8))
    write_tar(data / "00000.tar", [("new", {"png": picture(77), "txt": b"new"})])
    with pytest.raises(UsageError, match="has changed since it was embedded"):
        embed(str(data), tmp_path / "pool", TOY)
    assert digests(tmp_path / "pool") == before
    found = embed(str(data), tmp_path / "pool", TOY, overwrite=True)
    assert (found.rows, found.new) == (11, 11)


def test_a_file_is_known_again_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars(tmp_path / "tars", 20)
    monkeypatch.chdir(tmp_path)
    pool = tmp_path / "pool"
    assert embed("tars", pool, TOY).new == 20
    for name in (str(tmp_path / "tars"), "./tars", "tars/../tars", "tars/{00000..00001}.tar", "tars/*.tar"):
        assert embed(name, pool, TOY).new == 0
    (tmp_path / "tars").rename(tmp_path / "moved")
    assert embed("moved", pool, TOY).new == 0
    assert embed("moved/00000.tar", pool, TOY).rows == 20
    tars(tmp_path / "tars", 20)  # others of the old names are others
    with pytest.raises(UsageError, match="named twice"):
        embed("moved/00000.tar::./moved/00000.tar", tmp_path / "new", TOY)


def test_files_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tars(tmp_path / name, 10)
    os.utime(tmp_path / "a" / "00000.tar", ns=(1, 1))
    os.utime(tmp_path / "b" / "00000.tar", ns=(1, 1))
    embed(str(tmp_path / "a"), tmp_path / "pool", TOY)
    assert embed(str(tmp_path / "b"), tmp_path / "pool", TOY).rows == 20


def test_a_folder_that_has_changed_anywhere_is_noticed(tmp_path: Path) -> None:
    """Its own time stays the same when a picture comes into a folder below; numbers would then mean other pictures."""
    data = files(tmp_path / "pictures", 20)
    (data / "metadata.jsonl").unlink()
    (data / "00").mkdir()
    how = dataclasses.replace(TOY, data=DataOptions(per_part=10))
    embed(str(data), tmp_path / "pool", how)
    (data / "00" / "first.png").write_bytes(picture(77))
    with pytest.raises(UsageError, match="has changed since it was embedded"):
        embed(str(data), tmp_path / "pool", how)
    (data / "00" / "first.png").rename(data / "999999.png")  # behind the others it is a shard of its own
    assert embed(str(data), tmp_path / "pool", how).rows == 21


def test_a_pool_is_finished_with_the_options_it_was_started_with(tmp_path: Path) -> None:
    data = parquet(tmp_path / "rows.parquet", 30)
    how = dataclasses.replace(TOY, data=DataOptions(per_part=10), thumbnails=8)
    embed(str(data), tmp_path / "pool", how)
    before = digests(tmp_path / "pool")
    for path in (tmp_path / "pool").glob("*/*_00001.*"):
        path.unlink()
    others = [
        (dataclasses.replace(how, thumbnails=9), "started with --thumbnails 8 and is not finished"),
        (dataclasses.replace(how, pixel_limit=1000), "--pixel-limit"),
        (dataclasses.replace(how, data=DataOptions(per_part=10, caption="key")), "--caption None"),
        (dataclasses.replace(how, data=DataOptions(per_part=7)), "give the same --per-shard"),
    ]
    for other, told in others:
        other = dataclasses.replace(other, thumbnails=other.thumbnails or 8)
        with pytest.raises(UsageError, match=told):
            embed(str(data), tmp_path / "pool", other)
    assert embed(str(data), tmp_path / "pool", how).new == 10
    assert digests(tmp_path / "pool") == before
    assert embed(str(data), tmp_path / "pool", others[0][0]).new == 0  # nothing is left to be done otherwise


def test_leftovers_of_a_kill_are_in_nobodys_way(tmp_path: Path) -> None:
    data, pool = tars(tmp_path / "tars", 10), tmp_path / "pool"
    pool.mkdir()
    (pool / f".{PLAN}.abc.tmp.json").write_text("")
    assert embed(str(data), pool, TOY).rows == 10
    assert sorted(path.name for path in pool.iterdir()) == ["img_emb", "metadata", PLAN, "text_emb"]


def test_vectors_of_which_nothing_is_known_are_neither_mixed_nor_taken_for_the_datas(tmp_path: Path) -> None:
    data, pool = tars(tmp_path / "tars", 20), tmp_path / "pool"
    embed(f"{data}/00000.tar", pool, TOY)
    (pool / PLAN).unlink()
    before = digests(pool)
    with pytest.raises(OutputError, match="no pool.json that describes it"):
        embed(f"{data}/00001.tar", pool, TOY)
    assert digests(pool) == before
    (pool / PLAN).write_text("{")
    with pytest.raises(PoolError, match="pass --overwrite"):
        embed(f"{data}/00001.tar", pool, TOY)
    embed(f"{data}/00001.tar", pool, TOY, overwrite=True)
    assert [row["key"] for row in rows_of(pool)] == [f"{i:06d}" for i in range(10, 20)]


def test_a_pool_that_is_being_overwritten_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, pool = tars(tmp_path / "tars", 20), tmp_path / "pool"
    embed(str(data), pool, TOY)
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == "metadata_00001.parquet":
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            embed(str(data), pool, TOY, overwrite=True)
    with pytest.raises(PoolError, match="is not finished"):
        open_store(str(pool))
    assert embed(str(data), pool, TOY, overwrite=True).rows == 20


def test_another_process_may_have_finished_a_pool_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, pool = tars(tmp_path / "tars", 20), tmp_path / "pool"
    usual = pipeline.make_encoder

    def slow(*asked: Any, **more: Any) -> Any:
        monkeypatch.setattr(pipeline, "make_encoder", usual)
        embed(f"{data}/00000.tar", pool, TOY)  # what the other one does while this one loads its encoder
        return usual(*asked, **more)

    monkeypatch.setattr(pipeline, "make_encoder", slow)
    assert embed(f"{data}/00001.tar", pool, TOY).rows == 20
    assert [row["key"] for row in rows_of(pool)] == [f"{i:06d}" for i in range(20)]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9")
    tars(Path(folder), 10)
    os.rename(f"{folder}/00000.tar", os.fsencode(folder) + b"/\xe9.tar")
    assert embed(folder, tmp_path / "pool", TOY).rows == 10
    assert embed(folder, tmp_path / "pool", TOY).new == 0
    assert rows_of(tmp_path / "pool")[0]["shard"] == "caf\\udce9/\\udce9.tar"


def test_data_here_and_elsewhere_make_one_pool(tmp_path: Path) -> None:
    import fsspec

    tars(tmp_path / "tars", 20)
    fsspec.filesystem("memory").pipe("/far/00001.tar", (tmp_path / "tars" / "00001.tar").read_bytes())
    data = f"{tmp_path}/tars/00000.tar::memory://far/00001.tar"
    assert embed(data, tmp_path / "pool", TOY).rows == 20
    assert embed(data, tmp_path / "pool", TOY).new == 0


def test_what_cannot_be_reached_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is down for a minute would else cost all that was to be read in it."""
    data, pool = tars(tmp_path / "tars", 30), tmp_path / "pool"
    read = Place.read_from

    def down(place: Place, file: Any) -> bytes:
        if place.path.endswith("00001.tar"):
            return trusting(place.path, lambda: (_ for _ in ()).throw(ConnectionResetError("reset by peer")))
        return read(place, file)

    with monkeypatch.context() as patched:
        patched.setattr(Place, "read_from", down)
        with pytest.raises(UnreachedError, match="00001.tar: network or system error"):
            embed(str(data), pool, TOY)
    found = embed(str(data), pool, TOY)
    assert (found.rows, found.skipped) == (30, 0)


def test_places_that_must_not_be_written_to(tmp_path: Path) -> None:
    data = tars(tmp_path / "tars", 10)
    with pytest.raises(OutputError, match="is inside the data folder"):
        embed(str(data), data / "pool", TOY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="also contains thesis.tex"):
        embed(str(data), tmp_path / "mine", TOY)
    with pytest.raises(OutputError, match="also contains thesis.tex"):
        embed(str(data), tmp_path / "mine", TOY, overwrite=True)


def test_an_unfinished_pool_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tars(tmp_path / "tars", 20)
    embed(str(data), tmp_path / "pool", TOY)
    told = json.loads((tmp_path / "pool" / PLAN).read_text())
    del told["rows"]
    (tmp_path / "pool" / PLAN).write_text(json.dumps(told))
    for path in (tmp_path / "pool").glob("*/*_00001.*"):
        path.unlink()
    with pytest.raises(PoolError, match="is not finished; run the thresher embed command"):
        open_store(str(tmp_path / "pool"))
    assert embed(str(data), tmp_path / "pool", TOY).new == 10
    assert open_store(str(tmp_path / "pool")).total == 20


def command(data: Path, pool: Path, *more: str) -> list[str]:
    asked = ["--encoder", "tests.toy:Toy", "--batch-size", "8", "--quiet", "--per-shard", "15"]
    return [sys.executable, "-m", "thresher", "embed", str(data), "-o", str(pool), *asked, *more]


class Killed(BaseException):
    """Stands for a kill: no file changes after it."""


@pytest.mark.parametrize("layout", [pytest.param("webdataset", marks=pytest.mark.slow), "parquet"])
def test_killed_at_every_file_that_is_put_in_place(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(LAYOUTS[layout](tmp_path))
    how = dataclasses.replace(TOY, thumbnails=8, data=DataOptions(per_part=15))
    embed(data, tmp_path / "undisturbed", how)
    replace, unlink, left = os.replace, os.unlink, 0

    def put(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        replace(source, target)

    def remove(path: Any) -> None:
        if left >= 0:
            unlink(path)

    for kills in itertools.count():  # one file further every time, until it gets to the end
        pool, left = tmp_path / f"pool-{kills}", kills
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(os, "replace", put)
            patch.setattr(os, "unlink", remove)
            embed(data, pool, how)
        if left >= 0:
            break
        embed(data, pool, how)
        assert digests(pool) == digests(tmp_path / "undisturbed")
    assert kills >= 2 + 3 * len(list((tmp_path / "undisturbed" / "metadata").iterdir()))  # pool.json, and the shards


@pytest.mark.parametrize(
    ("layout", "workers", "kills"),
    [
        pytest.param("parquet", "1", 3, marks=pytest.mark.slow),  # at named points: the test above
        pytest.param("parquet", "1", 12, marks=pytest.mark.slow),
        pytest.param("tars", "0", 12, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_the_result_is_the_same_bytes(
    tmp_path: Path, layout: str, workers: str, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tars(tmp_path / "tars", 300, 15) if layout == "tars" else parquet(tmp_path / "rows.parquet", 300)
    typed = [command(data, tmp_path / name, "--workers", workers, "--thumbnails") for name in ("whole", "pool")]
    assert main(typed[0][3:]) == 0
    tables, chance, killed = tmp_path / "pool" / "metadata", random.Random(layout), 0
    for attempt in range(kills):
        process = subprocess.Popen(typed[1], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        before = len(list(tables.glob("*.parquet")))
        # Where it goes on with the work, or for every fourth while it starts.
        while attempt % 4 < 3 and process.poll() is None and len(list(tables.glob("*.parquet"))) <= before:
            time.sleep(0.002)
        try:
            process.wait(0.03 * chance.random() if attempt % 4 < 3 else 1.5 * chance.random())
            for path in list((tmp_path / "pool").glob("*/*_0001*")):  # done too soon: as if killed half-way
                path.unlink()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed
    assert main(typed[1][3:]) == 0, capsys.readouterr().err
    assert digests(tmp_path / "pool") == digests(tmp_path / "whole")


def test_pixels_go_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container has 64 MB of shared memory by default, and writing past that would kill the workers."""
    full: list[str] = []
    reserve = os.posix_fallocate

    def small(handle: int, begin: int, size: int) -> None:
        where = os.readlink(f"/proc/self/fd/{handle}")
        if len(full) < room:
            full.append(where)
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(handle, begin, size)

    monkeypatch.setattr(os, "posix_fallocate", small)
    data = tars(tmp_path / "tars", 10)
    for room in (0, 1, 2):
        full.clear()
        embed(str(data), tmp_path / f"pool-{room}", dataclasses.replace(TOY, workers=1))
        assert len(full) == room
        assert not any(os.path.exists(path) for path in full)
        assert digests(tmp_path / f"pool-{room}") == digests(tmp_path / "pool-0")


def test_pixels_of_the_killed_are_removed_and_of_the_living_are_not(tmp_path: Path) -> None:
    import fcntl

    old, held = (tmp_path / f"thresher-{name}.pixels" for name in ("old", "held"))
    for path in (old, held):
        path.write_bytes(b"x")
        os.utime(path, (1, 1))
    with open(held, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pipeline._reserved(tmp_path, 10) as path:
            assert os.path.getsize(path) == 10
            with pipeline._reserved(tmp_path, 10):
                assert os.path.exists(path)
        assert (old.exists(), held.exists()) == (False, True)
    assert not os.path.exists(path)


@pytest.mark.parametrize("devices", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.slow)])
# Ctrl-C, and what a scheduler does
@pytest.mark.parametrize("which", ["to all", pytest.param("to one", marks=pytest.mark.slow)])
def test_an_interruption_is_reported_in_one_line_and_leaves_nothing(tmp_path: Path, which: str, devices: str) -> None:
    data, pool = tars(tmp_path / "tars", 900, 10), tmp_path / "pool"
    asked = ["--encoder", "tests.toy:Sleepy", "--batch-size", "4", "--workers", "2", "--quiet", "--device", devices]
    typed = [sys.executable, "-m", "thresher", "embed", str(data), "-o", str(pool), *asked]
    process = subprocess.Popen(typed, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(pool.glob("metadata/*.parquet")):
        time.sleep(0.1)
    if which == "to all":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    assert len(told.strip().splitlines()) == 1
    assert "interrupted" in told
    with pipeline.holding(pool):  # which the next command does; a file just made may have been left
        assert [path.name for path in pool.rglob(".*")] == [".embed.lock"]
    assert not list(pool.rglob(".*"))
    assert len(list(pool.glob("metadata/*.parquet"))) < 90


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    from thresher.embedding.pool import holding

    data = tars(tmp_path / "tars", 10)
    (tmp_path / "pool").mkdir()
    at_work = rf"the pool .*: process {os.getpid()} on \S+ is using it"
    with holding(tmp_path / "pool"), pytest.raises(OutputError, match=at_work):
        embed(str(data), tmp_path / "pool", TOY)
    assert embed(str(data), tmp_path / "pool", TOY).rows == 10


def test_a_process_a_device(tmp_path: Path) -> None:
    data = tars(tmp_path / "tars", 45)
    embed(str(data), tmp_path / "one", TOY)
    told: list[tuple[str, int, str] | int] = []

    class Noted(Silent):
        @contextmanager
        def task(self, label: str, total: int, unit: str = "rows") -> Iterator[Advance]:
            told.append((label, total, unit))
            yield told.append

    found = embed(str(data), tmp_path / "two", dataclasses.replace(TOY, device="cpu,cpu"), progress=Noted())
    assert found.rows == 45
    assert told[0] == ("embed", 5, "shards")
    assert sum(told[1:]) == 5
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        content = {"png": picture(0), "txt": b"the same"}
        write_tar(tmp_path / f"{rows}.tar", [(f"{i:08d}", content) for i in range(rows)])
        tracemalloc.start()
        embed(str(tmp_path / f"{rows}.tar"), tmp_path / f"pool-{rows}", TOY)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    assert peak(7_000) < 1.4 * peak(2_500)


# --- command line ---------------------------------------------------------------------------------


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tars(tmp_path / "tars", 20)
    asked = ["--encoder", "tests.toy:Toy", "--workers", "0"]
    assert main(["embed", str(data), "-o", str(tmp_path / "pool"), *asked]) == 0
    out = capsys.readouterr().out
    assert "20 rows embedded in" in out
    assert f"{tmp_path}/pool: 20 rows (image and text) in 2 shards\n" in out
    assert main(["embed", str(data), "-o", str(tmp_path / "pool"), *asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    told = {name: value for name, value in told.items() if name not in ("seconds", "peak_memory_bytes")}
    assert told == {**dataclasses.asdict(Embedded(str(tmp_path / "pool"), 20, 0, 0, 0, 2, ("image", "text"))), "fields": ["image", "text"], "notes": []}  # fmt: skip  # noqa: E501
    assert main(["embed", str(tmp_path / "nothing"), "-o", str(tmp_path / "p"), *asked]) == 2
    assert "nothing is there" in capsys.readouterr().err
    assert main(["embed", str(data), "-o", str(tmp_path / "p"), "--encoder", "tests.toi:Toy"]) == 2
    assert "no encoder 'tests.toi:Toy'" in capsys.readouterr().err
    assert main(["select", "random", str(tmp_path / "pool"), "-o", str(tmp_path / "sel"), "--keep", "50%"]) == 0


def test_keys_of_several_rows_are_reported(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [(f"{i}", {"png": picture(i), "txt": b"x"}) for i in range(4)])
    found = embed(str(tmp_path / "{a,b}.tar"), tmp_path / "pool", TOY)
    assert found.notes == ("4 rows have the key of an earlier row; select with --key row to keep them separate",)
    assert embed(str(tmp_path / "a.tar"), tmp_path / "one", TOY).notes == ()


def test_what_was_mended_is_embedded_by_the_same_command(tmp_path: Path) -> None:
    data = tmp_path / "0.tar"
    write_tar(data, [("a", {"png": b"broken", "txt": b"x"})])
    with pytest.raises(PoolError, match="none of its samples can be used"):
        embed(str(data), tmp_path / "pool", TOY)
    assert [path.name for path in (tmp_path / "pool").rglob("*") if path.is_file()] == []
    write_tar(data, [("a", {"png": picture(1), "txt": b"x"})])
    assert embed(str(data), tmp_path / "pool", TOY).rows == 1


@pytest.mark.parametrize("layout", ["csv", "folder"])
def test_pools_of_files_are_exported_to_open_clip(tmp_path: Path, layout: str) -> None:
    embed(str(LAYOUTS[layout](tmp_path)), tmp_path / "pool", TOY)
    assert main(["select", "random", str(tmp_path / "pool"), "-o", str(tmp_path / "sel"), "--keep", "10"]) == 0
    assert main(["export", str(tmp_path / "sel"), "--as", "open_clip", "-o", str(tmp_path / "kept.csv")]) == 0
    lines = (tmp_path / "kept.csv").read_text().splitlines()[1:]
    assert len(lines) == 10
    for line in lines:
        path, title = line.split("\t")
        number = int(Path(path).stem)
        assert Path(path).read_bytes() == picture(number)
        assert title == caption(number)


def test_rows_of_a_grown_pool_tell_files_of_one_name_apart(tmp_path: Path) -> None:
    for folder in ("x/data", "y/data", "z/other"):
        write_tar(tmp_path / folder / "0.tar", [(folder[0], {"png": picture(ord(folder[0])), "txt": b"a"})])
        embed(str(tmp_path / folder), tmp_path / "pool", TOY)
    assert [row["shard"] for row in rows_of(tmp_path / "pool")] == [
        "data/0.tar", str(tmp_path / "y" / "data" / "0.tar"), "other/0.tar"
    ]  # fmt: skip
    embed(f"{tmp_path}/{{x,y,z}}/*/0.tar", tmp_path / "once", TOY)
    named = [row["shard"] for row in rows_of(tmp_path / "once")]
    assert named == ["x/data/0.tar", "y/data/0.tar", "z/other/0.tar"]


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_images_alone_need_no_column_of_captions(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        (data / f"{i}.jpg").write_bytes(picture(i))
    (data / "metadata.csv").write_text("file_name,width,prompt\n" + "".join(f"{i}.jpg,512,a dog\n" for i in range(3)))
    where = str(data if kind == "folder" else data / "metadata.csv")
    with pytest.raises(PoolError, match="has no column of captions .*; it has file_name, width, prompt; name one with"):
        pipeline.embed(where, str(tmp_path / "pool"), TOY)
    assert not (tmp_path / "pool").exists()
    done = pipeline.embed(where, str(tmp_path / "pool"), dataclasses.replace(TOY, only="image"))
    assert (done.rows, done.fields) == (3, ("image",))
    assert done.notes[0].startswith("without captions: ")
    assert "it has file_name, width, prompt; name one with --caption COLUMN" in done.notes[0]


@pytest.mark.slow
def test_a_plan_of_very_many_shards_is_read(tmp_path: Path) -> None:
    """JSON made by others is bounded by 64 MiB and 4 million values; a plan may be larger."""
    shards = tuple(Shard(f"/data/{i:08d}.tar", f"{i}.tar", 0, None, (1, 2, 3, 4, 5)) for i in range(400_000))
    plan = PoolPlan({"name": "toy"}, ("image",), {"key": "string"}, {}, shards)
    plan.saved(tmp_path)
    assert PoolPlan.read(tmp_path) == plan
