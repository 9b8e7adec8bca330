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
from collections.abc import Mapping
from pathlib import Path

from thresher.data.trainable import CAPTION, TAKEN, why_left_out
from thresher.resharding.indexes import WrittenTar
from thresher.runtime import locks
from thresher.runtime.files import writing

META = ".nv-meta"
INDEX = ".idx"  # after the name of a tar
_INFO, _SPLIT, _DATASET = ".info.json", "split.yaml", "dataset.yaml"
_OWN = {_INFO, _SPLIT, _DATASET}
_SCRATCH = ".*.tmp*"


def is_own(out: Path) -> bool:
    """Return whether the folder ``.nv-meta`` of a folder has only what :func:`finish` writes."""
    folder = out / META
    if folder.is_symlink() or not folder.is_dir():
        return False
    left = {one.name for one in folder.glob(_SCRATCH)}  # by a killed run
    return {one.name for one in folder.iterdir()} <= _OWN | left


def is_ready(out: Path) -> str:
    """Return that all is there already, as a sentence; "" if it is not."""
    return f"{out / META}: is there already, and was not changed" if (out / META / _INFO).exists() else ""


def index(tar: WrittenTar) -> tuple[int, int, Counter[str]]:
    """Write the index of a tar; return its samples, those with image and caption, and the endings of images.

    Energon takes endings as they are written: ``JPG`` is another one than ``jpg``, and a ``TXT`` is not decoded.
    """
    images: Counter[str] = Counter()
    captioned = 0
    for rows in tar.samples:
        endings = [row.name.rpartition("/")[2].partition(".")[2] for row in rows if row.name]
        images.update(ending for ending in endings if ending.lower() in TAKEN)
        captioned += CAPTION in endings and not why_left_out(tuple(ending.lower() for ending in endings))
    with writing(tar.path.with_name(tar.path.name + INDEX)) as scratch:
        Path(scratch).write_bytes(tar.edges_n.astype("<u8").tobytes())
    return len(tar.samples), captioned, images


def finish(out: Path, found: Mapping[str, tuple[int, int, Counter[str]]]) -> str:
    """Write the folder ``.nv-meta``, given what :func:`index` found in each tar; return what was written."""
    folder = out / META
    folder.mkdir(exist_ok=True)
    locks.sweep(folder.glob(_SCRATCH))
    counts = {name: samples for name, (samples, _, _) in found.items()}
    endings = sum((images for _, _, images in found.values()), Counter[str]())
    captioning = 0 < sum(captioned for _, captioned, _ in found.values()) == sum(counts.values())
    if captioning:
        images = ",".join(sorted(endings, key=lambda ending: (-endings[ending], ending)))
        kind = "sample_type:\n  __module__: megatron.energon\n  __class__: CaptioningSample\n"
        kind += f"field_map:\n  image: {images}\n  caption: {CAPTION}\n"
    else:
        kind = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    _write(folder / _DATASET, kind)
    _write(folder / _SPLIT, "split_parts:\n  train:\n" + "".join(f"  - {name}\n" for name in found) + "exclude: []\n")
    _write(folder / _INFO, json.dumps({"shard_counts": counts}, indent=2) + "\n")  # the last: it says that all is there
    return f"Energon reads {out} as " + (
        "image and caption" if captioning else "crude samples, because not every sample has an image and a .txt"
    )


def _write(path: Path, content: str) -> None:
    with writing(path) as scratch:
        Path(scratch).write_text(content, encoding="utf-8")
