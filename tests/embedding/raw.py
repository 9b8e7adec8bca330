"""Raw data for tests: pictures of plain colours with a caption, in every layout."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WORDS = ("red", "green", "blue", "round", "flat", "old", "new", "dog", "cat", "car")


def picture(i: int, kind: str = "png") -> bytes:
    """A picture that is another one for every i."""
    rng = np.random.default_rng(i)
    pixels = rng.integers(0, 256, (int(rng.integers(9, 40)), int(rng.integers(9, 40)), 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def caption(i: int) -> str:
    rng = np.random.default_rng(1000 + i)
    return f"{' '.join(rng.choice(WORDS, 1 + i % 6))} number {i}"


def write_tar(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> Path:
    """A tar of samples: key, and contents by ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def tars(folder: Path, rows: int, per_tar: int = 10) -> Path:
    for number, lo in enumerate(range(0, rows, per_tar)):
        here = range(lo, min(lo + per_tar, rows))
        samples = [(f"{i:06d}", {"png": picture(i), "txt": caption(i).encode()}) for i in here]
        write_tar(folder / f"{number:05d}.tar", samples)
    return folder


def table(rows: Sequence[int], **more: Sequence[Any]) -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = [{"bytes": picture(i), "path": f"{i}.png"} for i in rows]
    return pa.table(
        {
            "key": [f"{i:06d}" for i in rows],
            "image": pa.array(pictures, kind),
            "text": [caption(i) for i in rows],
            **{name: list(column) for name, column in more.items()},
        }
    )


def parquet(path: Path, rows: int, row_group: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(range(rows), label=[i % 3 for i in range(rows)]), path, row_group_size=row_group)
    return path


def files(folder: Path, rows: int) -> Path:
    """A folder of pictures, captions in a metadata.jsonl as Hugging Face has it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(rows):
        (folder / f"{i:06d}.png").write_bytes(picture(i))
    lines = [json.dumps({"file_name": f"{i:06d}.png", "text": caption(i)}) for i in range(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def open_clip_csv(folder: Path, rows: int) -> Path:
    """open_clip's csv beside its pictures."""
    files(folder / "pictures", rows)
    (folder / "pictures" / "metadata.jsonl").unlink()
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, delimiter="\t")
        lines.writerow(["filepath", "title"])
        lines.writerows([f"pictures/{i:06d}.png", caption(i)] for i in range(rows))
    return folder / "train.csv"
