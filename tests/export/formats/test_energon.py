"""Splits of Megatron Energon: what they say. What the library reads is in against_energon.py."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from braceexpand import braceexpand

import thresher as th
from thresher.export.formats.energon import Energon
from thresher.export.write import export
from thresher.testing.data_reader import DATA, pairs

KEYS = ["plain", 'say "so"', "a{b,c}d", "back\\slash", "line\u2028break", "\U0001f600", "new\nline", "# no", "x: y"]


def tars(folder: Path) -> list[tuple[str, str]]:
    """Write two tars with unusual keys; return (tar, key) of each sample in order."""
    folder.mkdir()
    names = []
    for number in range(2):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i, key in enumerate(KEYS):
                for ending, body in (("png", pairs(9)[i].picture), ("txt", b"a caption")):
                    info = tarfile.TarInfo(f"{key}{number}.{ending}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
                names.append((f"{number:05d}.tar", f"{key}{number}"))
    return names


def selection(names: list[tuple[str, str]], kept: np.ndarray[Any, Any], **more: Any) -> tuple[th.Selection, Any]:
    table = pa.table({"key": [key for _, key in names], "shard": [f"top/{tar}" for tar, _ in names], **more})
    vectors = np.random.default_rng(0).standard_normal((len(names), 4)).astype(np.float32)
    pool = th.from_arrays(image=vectors, table=table, keys="key")
    return th.run_steps(pool, [th.build("filter", {"where": "keep"})]), pool


def made(tmp_path: Path, names: list[tuple[str, str]], kept: Any, **options: Any) -> dict[str, Any]:
    chosen, pool = selection(names, kept, keep=[bool(one) for one in kept])
    export(chosen, Energon(**options), tmp_path / "subset.yaml", store=pool)
    content: dict[str, Any] = yaml.safe_load((tmp_path / "subset.yaml").read_text(encoding="utf-8"))
    return content


def expanded(entries: list[str]) -> list[str]:
    """Names as Energon reads them."""
    return [name for entry in entries for name in braceexpand(entry)]


def test_dropped_samples_are_excluded_by_key(tmp_path: Path) -> None:
    names = tars(tmp_path / "tars")
    kept = np.arange(len(names)) % 3 == 0
    split = made(tmp_path, names, kept)
    assert split["split_parts"] == {"train": ["00000.tar", "00001.tar"]}
    assert expanded(split["exclude"]) == [
        f"{tar}/{key}" for (tar, key), one in zip(names, kept, strict=True) if not one
    ]


def test_tars_without_a_kept_sample_are_left_out(tmp_path: Path) -> None:
    names = tars(tmp_path / "tars")
    split = made(tmp_path, names, np.arange(len(names)) == 1, folder="shards", split="val")
    assert split["split_parts"] == {"val": ["shards/00000.tar"]}
    assert expanded(split["exclude"]) == [f"shards/{tar}/{key}" for tar, key in names[:9] if key != 'say "so"0']


def test_a_pool_of_tars_has_what_is_needed(tmp_path: Path) -> None:
    data = DATA["webdataset"](tmp_path / "tars", pairs(9), 2)
    pool = th.embed(data, tmp_path / "pool", encoder="tests.toy:Toy", workers=0, progress=False)
    chosen = th.run_steps(pool, [th.build("random", {"keep": "50%"})])
    export(chosen, Energon(), tmp_path / "subset.yaml", store=pool)
    split = yaml.safe_load((tmp_path / "subset.yaml").read_text())
    assert set(split["split_parts"]["train"]) <= {"00000.tar", "00001.tar"}
    assert len(chosen) == 4


def test_what_it_cannot_say_is_refused(tmp_path: Path) -> None:
    names = [("00000.tar", "a"), ("00000.tar", "b"), ("00000.tar", "")]
    table = pa.table({"key": [key for _, key in names], "shard": [tar for tar, _ in names]})
    pool = th.from_arrays(image=np.eye(3, dtype=np.float32), table=table, keys="key", skip_bad=True)
    with pytest.raises(th.UsageError, match="row 2 has no key, so it cannot be excluded from 00000.tar"):
        Energon().write(th.run_steps(pool, [th.build("random", {"keep": 2})]), pool, str(tmp_path / "x"))
    with pytest.raises(th.UsageError, match="a/x.tar and top/b/x.tar would both be x.tar"):
        made(tmp_path, [("a/x.tar", "1"), ("b/x.tar", "2")], [True, True])
    with pytest.raises(th.UsageError, match="would both be x.tar"):  # the dropped sample would exclude the kept one
        made(tmp_path, [("a/x.tar", "1"), ("b/x.tar", "1.png")], [True, False])
    chosen, pool = selection([("x.tar", "1"), ("x.tar", "2")], np.ones(2), keep=[True, True])
    with pytest.raises(th.UsageError, match="needs the tar of each row.*no column 'other', but key, shard, keep"):
        Energon(shard_column="other").write(chosen, pool, str(tmp_path / "x"))
    for other in ("shard.00000.mds", "train-0.parquet"):
        with pytest.raises(
            th.UsageError, match=f"row 0 is in top/{other}, and Energon reads only tars; .*--for-energon"
        ):
            made(tmp_path, [(other, "1"), ("x.tar", "2")], [False, True])
    unsafe, pool = selection([("..", "1"), ("x.tar", "2")], np.ones(2), keep=[True, True])
    done = Energon().write(unsafe, pool, str(tmp_path / "y"))
    assert (done.rows, done.missing) == (1, ((0, "1"),))
    without, pool = selection([("..", "1"), ("x.tar", "2")], np.ones(2), keep=[True, False])
    with pytest.raises(th.UsageError, match="no selected row has the name of a tar"):
        Energon().write(without, pool, str(tmp_path / "z"))
