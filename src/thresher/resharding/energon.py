"""What Megatron Energon reads of tars, as ``energon prepare`` writes it: an index of each, and the folder ``.nv-meta``.

- ``00000000.tar.idx``: where each sample begins in the tar, and where the last one ends, as little-endian uint64;
- ``.nv-meta/.info.json``: the number of samples of each tar;
- ``.nv-meta/split.yaml``: the tars of the split part ``train``, which are all;
- ``.nv-meta/dataset.yaml``: a captioning sample of image and text if every sample has both, else crude samples.

``index.sqlite``, which only joined and auxiliary data need, is not written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from thresher.data.trainable import CAPTION, TAKEN, why_left_out
from thresher.io.tar import TAR_BLOCK
from thresher.resharding.tars import scan
from thresher.runtime import locks
from thresher.runtime.engine import Engine
from thresher.runtime.files import writing

META = ".nv-meta"
INDEX = ".idx"  # after the name of a tar
_INFO, _SPLIT, _DATASET = ".info.json", "split.yaml", "dataset.yaml"
_OWN = {_INFO, _SPLIT, _DATASET}
_SCRATCH = ".*.tmp*"


def is_own(out: Path) -> bool:
    """Return whether the folder ``.nv-meta`` of a folder has only what :func:`prepare` writes."""
    folder = out / META
    if folder.is_symlink() or not folder.is_dir():
        return False
    left = {one.name for one in folder.glob(_SCRATCH)}  # by a killed run
    return {one.name for one in folder.iterdir()} <= _OWN | left


def prepare(out: Path, names: Sequence[str], engine: Engine) -> str:
    """Write what Energon reads, unless it is there: the same again changes nothing.

    Args:
        out: The folder of the tars.
        names: The tars, in order.
        engine: Where they are read.

    Returns:
        What was written, as a sentence.

    Raises:
        PoolError: A tar is damaged.
    """
    folder = out / META
    if (folder / _INFO).exists():
        return f"{folder}: is there already, and was not changed"
    folder.mkdir(exist_ok=True)
    locks.sweep(folder.glob(_SCRATCH))
    counts: dict[str, int] = {}
    endings: Counter[str] = Counter()
    complete = 0
    for name, (samples, captioned, found) in zip(names, engine.map(partial(_indexed, out), names), strict=True):
        counts[name] = samples
        complete += captioned
        endings += found
    captioning = 0 < complete == sum(counts.values())
    if captioning:
        images = ",".join(sorted(endings, key=lambda ending: (-endings[ending], ending)))
        kind = "sample_type:\n  __module__: megatron.energon\n  __class__: CaptioningSample\n"
        kind += f"field_map:\n  image: {images}\n  caption: {CAPTION}\n"
    else:
        kind = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    _write(folder / _DATASET, kind)
    _write(folder / _SPLIT, "split_parts:\n  train:\n" + "".join(f"  - {name}\n" for name in names) + "exclude: []\n")
    _write(folder / _INFO, json.dumps({"shard_counts": counts}, indent=2) + "\n")  # the last: it says that all is there
    return f"Energon reads {out} as " + (
        "image and caption" if captioning else "crude samples, because not every sample has an image and a .txt"
    )


def _indexed(out: Path, name: str) -> tuple[int, int, Counter[str]]:
    """Write the index of a tar; return its samples, those with image and caption, and the endings of images.

    Energon takes endings as they are written: ``JPG`` is another one than ``jpg``, and a ``TXT`` is not decoded.
    """
    path = out / name
    scanned = scan(path)
    assert scanned.headers is not None  # noqa: S101 - it is a tar
    headers = scanned.headers(np.arange(len(scanned.keys)))
    images: Counter[str] = Counter()
    captioned = 0
    for rows in map(headers.rows, range(len(headers))):
        endings = [row.name.rpartition("/")[2].partition(".")[2] for row in rows if row.name]
        images.update(ending for ending in endings if ending.lower() in TAKEN)
        captioned += CAPTION in endings and not why_left_out(tuple(ending.lower() for ending in endings))
    ends_n = scanned.start_n + -(-np.abs(scanned.length_n) // TAR_BLOCK) * TAR_BLOCK
    end = ends_n[-1] if len(ends_n) else 0
    with writing(path.with_name(name + INDEX)) as scratch:
        Path(scratch).write_bytes(np.append(scanned.start_n, end).astype("<u8").tobytes())
    return len(scanned.keys), captioned, images


def _write(path: Path, content: str) -> None:
    with writing(path) as scratch:
        Path(scratch).write_text(content, encoding="utf-8")
