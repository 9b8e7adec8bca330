"""Small data, selections of them, and slow ways to read and copy what the resharder copies."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from thresher.data import open_data
from thresher.pool.store import open_store
from thresher.selection import Selection, Step
from thresher.testing.data_reader import DATA, pairs

Samples = Sequence[tuple[str, Mapping[str, bytes]]]


def picture(number: int, kind: str = "PNG") -> bytes:
    """A small picture, other for every number."""
    out = io.BytesIO()
    Image.new("RGB", (4, 3), (number % 256, number // 256 % 256, 7)).save(out, kind)
    return out.getvalue()


def tar(path: Path, samples: Samples, form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of samples: keys, and contents by ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for i, (key, contents) in enumerate(samples):
            for ending, content in contents.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size, info.mtime, info.mode, info.uname = len(content), 1_000 + i, 0o640, "someone"
                file.addfile(info, io.BytesIO(content))
    return path


def plain(count: int, first: int = 0, **more: bytes) -> list[tuple[str, dict[str, bytes]]]:
    """Samples of a picture and a caption."""
    return [
        (f"{i:06d}", {"png": picture(i), "txt": f"picture {i}".encode(), **more}) for i in range(first, first + count)
    ]


def keys_file(path: Path, keys: Iterable[str]) -> str:
    """A file of keys."""
    path.write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
    return str(path)


def listed(folder: Path) -> list[tuple[str, bytes]]:
    """Names and contents in all tars of a folder, in order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as file:
            found += [(one.name, file.extractfile(one).read()) for one in file]  # type: ignore[union-attr]
    return found


def hashes(folder: Path) -> dict[str, str]:
    """Hash of every file of a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def pool(
    folder: Path, rows: Sequence[tuple[str, str, int]], chosen: Iterable[int], times: Mapping[int, int] | None = None
) -> str:
    """A pool with (key, shard, offset) of every row, and the folder of a selection of some rows."""
    (folder / "pool" / "img_emb").mkdir(parents=True)
    (folder / "pool" / "metadata").mkdir()
    vectors = np.random.default_rng(0).standard_normal((len(rows), 4)).astype(np.float16)
    np.save(folder / "pool" / "img_emb" / "img_emb_0.npy", vectors)
    names = ("key", "shard", "offset")
    table = pa.table({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})
    pq.write_table(table, folder / "pool" / "metadata" / "metadata_0.parquet")
    store = open_store(str(folder / "pool"))
    dropped, repeats = np.zeros(len(rows), np.int16), np.zeros(len(rows), np.int32)
    for row in chosen:
        dropped[row], repeats[row] = -1, (times or {}).get(row, 1)
    start = Selection.everything(store.fingerprint(), str(folder / "pool"), {}, len(rows))
    step = Step(
        method="chosen",
        parameters={},
        seed=0,
        rows_in=len(rows),
        rows_out=int((dropped < 0).sum()),
        reasons=("not chosen",),
    )
    selection = replace(start, dropped_by=dropped, repeats=repeats if times else None, steps=(step,))
    return str(selection.save(folder / "sel"))


def tars_of_other_data(kind: str, folder: Path, reshard: Callable[..., object]) -> list[Path]:
    """Tars that a function writes of data of another kind, without the first two of nine samples."""
    data = DATA[kind](folder / "data", pairs(9), 2)
    keys = [sample.key for sample in open_data(data).samples()][2:]
    reshard(data, keys, folder / "out", form="webdataset", per_shard=3)
    paths = sorted((folder / "out").glob("*.tar"))
    assert len(paths) == 3
    return paths
