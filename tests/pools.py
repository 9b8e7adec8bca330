"""Small pools on disk, written from the descriptions of the formats and not by the package.

``cuts`` are the rows at which a new file begins: ``cuts=[3, 7]`` makes three files of ten rows.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KINDS = ("fixed", "list", "large", "binary", "fixed binary")


@dataclass(frozen=True, eq=False)
class Pool:
    """N pairs: embeddings as stored (bfloat16 as uint16), keys and captions."""

    image: np.ndarray
    text: np.ndarray
    keys: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def at(self, rows: Iterable[int] | slice) -> Pool:
        """The pool of some rows."""
        rows = np.arange(len(self))[rows if isinstance(rows, slice) else list(rows)]
        pick = [[column[row] for row in rows] for column in (self.keys, self.captions)]
        return Pool(self.image[rows], self.text[rows], *pick)

    def stored(self, dtype: Any) -> Pool:
        """The pool in another type, rounded as needed; "bfloat16" gives its bits as uint16."""
        if dtype == "bfloat16":
            image, text = (
                ((a.astype("<f4").view("<u4") + 0x8000) >> 16).astype("<u2") for a in (self.image, self.text)
            )
            return replace(self, image=image, text=text)
        return replace(self, image=self.image.astype(dtype), text=self.text.astype(dtype))

    def with_rows(self, field: str, **rows: Any) -> Pool:
        """The pool with single rows of a field replaced: ``with_rows("image", r3=np.nan)``."""
        array = getattr(self, field).copy()
        for name, value in rows.items():
            array[int(name[1:])] = value
        return replace(self, **{field: array})


def make(rows: int, dim: int = 8, seed: int = 0) -> Pool:
    """Random pairs, not normalised, float16, with keys in no order."""
    rng = np.random.default_rng([seed, rows, dim])
    image = rng.standard_normal((rows, dim))
    text = image + rng.standard_normal((rows, dim))
    keys = [hashlib.md5(f"{seed} {row}".encode()).hexdigest() for row in range(rows)]
    captions = [f"caption {row} é" for row in range(rows)]
    return Pool(image.astype("<f2"), text.astype("<f2"), keys, captions)


def float32(array: np.ndarray) -> np.ndarray:
    """Exact float32 values of a stored array."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def shards(pool: Pool, cuts: Sequence[int]) -> Iterator[tuple[int, Pool]]:
    """Number and rows of every file."""
    edges = [0, *cuts, len(pool)]
    for i, (lo, hi) in enumerate(zip(edges, edges[1:], strict=False)):
        yield i, pool.at(slice(lo, hi))


def table(pool: Pool, key: str = "uid", caption: str = "text") -> pa.Table:
    """The metadata, all but the captions following from the key."""
    number = np.array([zlib.crc32(key.encode()) for key in pool.keys])
    return pa.table(
        {
            key: pool.keys,
            "url": [f"https://example.org/{key}.jpg" for key in pool.keys],
            caption: pool.captions,
            "original_width": pa.array(100 + number % 900, pa.int32()),
            "original_height": pa.array(100 + number // 900 % 900, pa.int32()),
            "clip_b32_similarity_score": pa.array(number / 2**32, pa.float32()),
            "clip_l14_similarity_score": pa.array(number / 2**33, pa.float32()),
            "sha256": [hashlib.sha256(key.encode()).hexdigest() for key in pool.keys],
        }
    )


def write_npy(
    folder: Path, pool: Pool, cuts: Sequence[int] = (), table_cuts: Sequence[int] | None = (), mark: str = ""
) -> str:
    """image_0.npy, text_0.npy, metadata_0.parquet ...; without metadata where ``table_cuts`` is None."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in shards(pool, cuts):
        np.save(folder / f"image{mark}_{i}.npy", part.image)
        np.save(folder / f"text{mark}_{i}.npy", part.text)
    for i, part in shards(pool, table_cuts) if table_cuts is not None else ():
        pq.write_table(table(part), folder / f"metadata_{i}.parquet", row_group_size=7)
    return str(folder)


def write_datacomp(folder: Path, pool: Pool, cuts: Sequence[int] = (), compressed: bool = True) -> str:
    """metadata/<hex>.parquet and .npz; the B/32 arrays hold other vectors."""
    (folder / "metadata").mkdir(parents=True, exist_ok=True)
    for i, part in shards(pool, cuts):
        stem = folder / "metadata" / f"{'abcdef'[i]}{hashlib.md5(str(i).encode()).hexdigest()[1:]}"
        pq.write_table(table(part), f"{stem}.parquet", row_group_size=5)
        arrays = {
            "b32_img": -part.image[:, :4],
            "b32_txt": -part.text[:, :4],
            "l14_img": part.image,
            "l14_txt": part.text,
        }
        (np.savez_compressed if compressed else np.savez)(f"{stem}.npz", **arrays)
    return str(folder)


def write_clip_retrieval(folder: Path, pool: Pool, cuts: Sequence[int] = (), width: int = 1) -> str:
    """img_emb/img_emb_0.npy, text_emb/..., metadata/...; ``width`` digits, zero-padded."""
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, part in shards(pool, cuts):
        np.save(folder / "img_emb" / f"img_emb_{i:0{width}}.npy", part.image)
        np.save(folder / "text_emb" / f"text_emb_{i:0{width}}.npy", part.text)
        pq.write_table(table(part, "image_path", "caption"), folder / "metadata" / f"metadata_{i:0{width}}.parquet")
    return str(folder)


def vectors(array: np.ndarray, kind: str = "fixed") -> pa.Array:
    """A column of vectors: one of KINDS."""
    flat, dim = pa.array(array.ravel()), array.shape[1]
    if "binary" in kind:
        rows = [row.tobytes() for row in array]
        return pa.array(rows, pa.binary(dim * array.itemsize) if kind == "fixed binary" else pa.binary())
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(flat, dim)
    cls, offset = {"list": (pa.ListArray, pa.int32()), "large": (pa.LargeListArray, pa.int64())}[kind]
    return cls.from_arrays(pa.array(np.arange(len(array) + 1) * dim, offset), flat)


def write_parquet(
    folder: Path,
    pool: Pool,
    cuts: Sequence[int] = (),
    kind: str = "fixed",
    row_group: int = 7,
    mark: str = "",
    images: bool = False,
) -> str:
    """data/train-00000-of-00002.parquet with embedding columns, as Hugging Face lays them out.

    ``mark`` becomes the field metadata ``dtype``; ``images`` adds a struct of bytes and path.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for i, part in shards(pool, cuts):
        found = table(part)
        if images:
            cells = [{"bytes": key.encode(), "path": f"{key}.jpg"} for key in part.keys]
            found = found.append_column(
                "image", pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
            )
        for role, array in (("image", part.image), ("text", part.text)):
            column = vectors(array, kind)
            marked = pa.field(f"{role}_embedding", column.type, metadata={"dtype": mark} if mark else None)
            found = found.append_column(marked, column)
        name = f"train-{i:05d}-of-{len(cuts) + 1:05d}.parquet"
        pq.write_table(found, folder / "data" / name, row_group_size=row_group)
    return str(folder)


def write_img2dataset(folder: Path, pool: Pool, cuts: Sequence[int] = (), failed: int = 3) -> str:
    """00000.parquet and 00000_stats.json; before every ``failed``-th row stands one that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in shards(pool, cuts):
        rows: list[dict[str, Any]] = []
        for row, (key, caption) in enumerate(zip(part.keys, part.captions, strict=True)):
            good = {"key": key, "caption": caption, "url": f"https://example.org/{key}.jpg", "width": 256 + row}
            if row % failed == 0:
                rows.append({**good, "key": f"failed {key}", "status": "failed_to_download", "error_message": "404"})
            rows.append({**good, "status": "success", "error_message": None})
        columns = ("url", "caption", "key", "status", "error_message", "width")
        found = pa.table({name: [row[name] for row in rows] for name in columns})
        pq.write_table(found, folder / f"{i:05d}.parquet", row_group_size=4)
        stats = {"count": len(rows), "successes": len(part), "failed_to_download": len(rows) - len(part)}
        (folder / f"{i:05d}_stats.json").write_text(json.dumps(stats))
    return str(folder)


WRITERS = {
    "npy": write_npy,
    "datacomp": write_datacomp,
    "clip-retrieval": write_clip_retrieval,
    "parquet": write_parquet,
}
