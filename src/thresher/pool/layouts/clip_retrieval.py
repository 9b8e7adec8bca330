"""clip-retrieval inference output: ``img_emb/img_emb_i.npy``, ``text_emb/...``, ``metadata/...parquet``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from thresher.errors import PoolError
from thresher.io.listing import Files, natural
from thresher.io.npy import npy_piece
from thresher.io.parquet import TablePiece, table_piece
from thresher.io.pieces import Piece
from thresher.pool.layout import Layout, Options, from_shards

_FOLDERS = {"image": ("img_emb", "npy"), "text": ("text_emb", "npy"), "metadata": ("metadata", "parquet")}


@dataclass(frozen=True)
class ClipRetrieval:
    """The output of clip-retrieval and ``thresher embed``."""

    name: ClassVar[str] = "clip-retrieval"
    rank: ClassVar[int] = 20
    looks_like: ClassVar[str] = "img_emb/*.npy, text_emb/*.npy, metadata/*.parquet"

    def recognise(self, files: Files) -> bool:
        """Recognise an img_emb or text_emb folder of .npy files."""
        return bool(files.matching(r"(img_emb|text_emb)/.+\.npy"))

    def read(self, files: Files, options: Options) -> Layout:
        """Combine files by the last number in their names; row r of each file belongs together.

        Raises:
            PoolError: A file of a number is missing.
        """
        parts: dict[str, dict[str, str]] = {}
        for role, (folder, ending) in _FOLDERS.items():
            for name in files.matching(rf"{folder}/.+\.{ending}"):
                number = str(int((re.findall(r"\d+", name) or ["0"])[-1]))
                twin = parts.setdefault(role, {}).setdefault(number, name)
                if twin != name:
                    raise PoolError(
                        f"{files.path(name)}: has the same number as {files.path(twin)}; remove one of them"
                    )
        numbers = sorted(set().union(*parts.values()), key=natural)

        def shard(number: str) -> tuple[dict[str, Piece], TablePiece | None]:
            there = {role: files.path(names[number]) for role, names in parts.items() if number in names}
            if len(there) < len(parts):
                folders = ", ".join(_FOLDERS[role][0] for role in parts if role not in there)
                raise PoolError(f"{next(iter(there.values()))}: has no file of the same number in {folders}; remove it")
            vectors: dict[str, Piece] = {
                role: npy_piece(files.protocol, path, options.dtype)
                for role, path in there.items()
                if role != "metadata"
            }
            return vectors, table_piece(files.protocol, there["metadata"]) if "metadata" in there else None

        return from_shards(self.name, files, numbers, shard, options)
