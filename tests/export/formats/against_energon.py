"""Splits of Megatron Energon against the library, which pins other packages than those of the test group.

Type: make energon (as in CI)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from megatron.energon import WorkerConfig, get_loader, get_val_dataset
from megatron.energon.cli.main import main as energon
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

from tests.export.formats.test_energon import made, tars
from tests.resharding.common import picture, plain, tar
from thresher import api

pytestmark = pytest.mark.filterwarnings("ignore")  # of the library

DATASET = """
sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: png
  caption: txt
"""


def keys(folder: Path, split: str) -> list[str]:
    """The keys that Energon reads, in order."""
    (folder / ".nv-meta" / "dataset.yaml").write_text(DATASET)
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_val_dataset(folder, split_part="train", split_config=split, batch_size=1, worker_config=config)
    return [key for batch in get_loader(dataset) for key in batch.__key__]


def test_energon_reads_the_kept_samples(tmp_path: Path) -> None:
    names = tars(tmp_path / "tars")
    WebdatasetPreparator.prepare_dataset(
        tmp_path / "tars",
        ["00000.tar", "00001.tar"],
        split_parts_ratio=[("train", 1.0)],
        shuffle_seed=None,
        workers=1,
    )
    kept = np.arange(len(names)) % 3 == 0
    made(tmp_path, names, kept)
    (tmp_path / "subset.yaml").rename(tmp_path / "tars" / ".nv-meta" / "subset.yaml")
    assert keys(tmp_path / "tars", "subset.yaml") == [key for (_, key), one in zip(names, kept, strict=True) if one]
    assert keys(tmp_path / "tars", "split.yaml") == [key for _, key in names]


def test_energon_reads_what_reshard_writes_for_it(tmp_path: Path) -> None:
    """Without ``energon prepare``; the index is the same as its own."""
    names = tars(tmp_path / "tars")
    chosen = [names[1][1], names[4][1], names[4][1], names[12][1]]
    np.save(tmp_path / "keys.npy", np.array(chosen))
    how: dict[str, Any] = {"per_shard": 2, "workers": 1, "progress": False, "for_energon": True}
    api.reshard(tmp_path / "tars", str(tmp_path / "keys.npy"), tmp_path / "out", **how)
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_val_dataset(tmp_path / "out", split_part="train", batch_size=1, worker_config=config)
    batches = list(get_loader(dataset))
    assert [key for batch in batches for key in batch.__key__] == [chosen[0], chosen[1], f"{chosen[1]}-1", chosen[3]]
    assert {caption for batch in batches for caption in batch.caption} == {"a caption"}
    assert {tuple(batch.image.shape[:2]) for batch in batches} == {(1, 3)}
    own = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.idx")}
    WebdatasetPreparator.prepare_dataset(
        tmp_path / "out", sorted(path.removesuffix(".idx") for path in own), split_parts_ratio=[("train", 1.0)],
        shuffle_seed=None, workers=1,
    )  # fmt: skip
    assert own == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.idx")}


def test_energon_reads_images_in_several_formats(tmp_path: Path) -> None:
    samples = [*plain(2), ("y", {"JPG": picture(8, "JPEG"), "txt": b"of y"})]
    samples += [("z", {"jpg": picture(9, "JPEG"), "txt": b"of z"})]
    tar(tmp_path / "data" / "0.tar", samples)
    (tmp_path / "keys.txt").write_text("000001\ny\nz\n")
    how: dict[str, Any] = {"workers": 1, "progress": False, "for_energon": True}
    api.reshard(str(tmp_path / "data"), str(tmp_path / "keys.txt"), tmp_path / "out", **how)
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_val_dataset(tmp_path / "out", split_part="train", batch_size=1, worker_config=config)
    found = [(batch.__key__[0], batch.caption[0], batch.image.shape[1]) for batch in get_loader(dataset)]
    assert found == [("000001", "picture 1", 3), ("y", "of y", 3), ("z", "of z", 3)]


def test_energon_prepares_and_reads_what_reshard_writes(tmp_path: Path) -> None:
    """With the command of docs/load-time.md; repeated samples have keys of their own, which Energon needs."""
    names = tars(tmp_path / "tars")
    chosen = [names[1][1], names[4][1], names[4][1], names[12][1]]
    np.save(tmp_path / "keys.npy", np.array(chosen))
    how: dict[str, Any] = {"per_shard": 2, "workers": 1, "progress": False}
    api.reshard(tmp_path / "tars", str(tmp_path / "keys.npy"), tmp_path / "out", **how)
    words = ["prepare", str(tmp_path / "out"), "--non-interactive", "--split-parts", "train:.*", "--num-workers", "1"]
    words += ["--sample-type", "CaptioningSample", "--field-map", '{"image": "png", "caption": "txt"}']
    done = CliRunner().invoke(energon, words)
    assert done.exit_code == 0, done.output
    assert keys(tmp_path / "out", "split.yaml") == [chosen[0], chosen[1], f"{chosen[1]}-1", chosen[3]]
