"""Parquet with embedding columns, as lists or binary: Hugging Face datasets and similar files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thresher.errors import UsageError, suggest
from thresher.io.listing import Files
from thresher.io.parquet import TablePiece, parquet_piece, parquet_types, table_piece
from thresher.io.pieces import Piece
from thresher.pool.layout import Layout, Options, from_shards

IMAGES = (
    "image_embedding", "image_embeddings", "img_embedding", "img_emb", "image_emb", "image_features",
    "clip_image", "l14_img", "b32_img", "embedding", "embeddings", "emb", "vector",
)  # fmt: skip
TEXTS = (
    "text_embedding", "text_embeddings", "txt_embedding", "text_emb", "txt_emb", "text_features",
    "caption_embedding", "clip_text", "l14_txt", "b32_txt",
)  # fmt: skip


@dataclass(frozen=True)
class Parquet:
    """Parquet files with embedding columns."""

    name: ClassVar[str] = "parquet"
    rank: ClassVar[int] = 50
    looks_like: ClassVar[str] = "*.parquet or data/*.parquet with a column of embeddings"

    def recognise(self, files: Files) -> bool:
        """Recognise Parquet files without .npy or .npz files, which the ``npy`` reader reads."""
        return bool(_tables(files)) and not files.matching(r".*\.np[yz]")

    def read(self, files: Files, options: Options) -> Layout:
        """Find the embedding columns of every file."""

        def shard(name: str) -> tuple[dict[str, Piece], TablePiece]:
            path = files.path(name)
            types = parquet_types(files.protocol, path)
            pieces: dict[str, Piece] = {}
            for role, wanted, usual in (("image", options.image, IMAGES), ("text", options.text, TEXTS)):
                if wanted and wanted not in types:
                    raise UsageError(
                        f"{path}: no column {wanted!r}; it has {', '.join(types)}.{suggest(wanted, types)}"
                    )
                vectors = [name for name in usual if name in types and _vector(types[name])]
                column = wanted or next(iter(vectors), None)
                if column:
                    pieces[role] = parquet_piece(files.protocol, path, column, options.dtype)
            return pieces, table_piece(files.protocol, path)

        return from_shards(self.name, files, _tables(files), shard, options)


def _tables(files: Files) -> list[str]:
    return files.matching(r"([^/]+/)?[^/]+\.(parquet|pq)")


def _vector(kind: str) -> bool:
    return any(word in kind for word in ("list<", "fixed_size_list", "binary"))
