"""clip-retrieval inference output: ``img_emb/img_emb_i.npy``, ``text_emb/...``, ``metadata/...parquet``.

LAION-5B's metadata are in ``laion2B-en-metadata`` and the like.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from typing import ClassVar

from thresher.errors import PoolError, UsageError, suggest
from thresher.io.listing import Files, natural
from thresher.io.npy import npy_piece
from thresher.io.parquet import TablePiece, table_piece
from thresher.io.paths import visible
from thresher.io.pieces import Piece
from thresher.pool.layout import Layout, Options, from_shards

_VECTORS = {"image": "img_emb", "text": "text_emb"}
_METADATA = r"([^/]+-)?metadata/.+\.parquet"


@dataclass(frozen=True)
class ClipRetrieval:
    """The output of clip-retrieval and ``thresher embed``, and the embeddings of LAION-5B.

    Attributes:
        metadata: The folder with the metadata, if there are several whose names end in "metadata".
    """

    name: ClassVar[str] = "clip-retrieval"
    rank: ClassVar[int] = 20
    looks_like: ClassVar[str] = "img_emb/*.npy, text_emb/*.npy, metadata/*.parquet or NAME-metadata/*.parquet"

    metadata: str | None = field(
        default=None, metadata={"help": "folder with the metadata, if several have names that end in metadata"}
    )

    def recognise(self, files: Files) -> bool:
        """Recognise an img_emb or text_emb folder of .npy files."""
        return bool(files.matching(r"(img_emb|text_emb)/.+\.npy"))

    def read(self, files: Files, options: Options) -> Layout:
        """Combine files by the last number in their names; row r of each file belongs together.

        Raises:
            PoolError: A file of a number is missing.
            UsageError: Several folders may have the metadata, or there is none of the requested name.
        """
        folders = {**_VECTORS, **self._metadata_folder(files)}
        parts: dict[str, dict[str, str]] = {}
        for role, folder in folders.items():
            ending = "parquet" if role == "metadata" else "npy"
            for name in files.matching(rf"{re.escape(folder)}/.+\.{ending}"):
                number = str(int((re.findall(r"\d+", posixpath.basename(name)) or ["0"])[-1]))
                twin = parts.setdefault(role, {}).setdefault(number, name)
                if twin != name:
                    raise PoolError(
                        f"{files.path(name)}: has the same number as {files.path(twin)}; remove one of them"
                    )
        numbers = sorted(set().union(*parts.values()), key=natural)

        def shard(number: str) -> tuple[dict[str, Piece], TablePiece | None]:
            there = {role: files.path(names[number]) for role, names in parts.items() if number in names}
            if len(there) < len(parts):
                lost = ", ".join(folders[role] for role in parts if role not in there)
                raise PoolError(f"{next(iter(there.values()))}: has no file of the same number in {lost}; remove it")
            vectors: dict[str, Piece] = {
                role: npy_piece(files.protocol, path, options.dtype)
                for role, path in there.items()
                if role != "metadata"
            }
            return vectors, table_piece(files.protocol, there["metadata"]) if "metadata" in there else None

        return from_shards(self.name, files, numbers, shard, options)

    def _metadata_folder(self, files: Files) -> dict[str, str]:
        """Return the folder with the metadata by its role, {} if there are no metadata."""
        there = list(dict.fromkeys(posixpath.dirname(name) for name in files.matching(_METADATA)))
        if self.metadata is not None and self.metadata not in there:
            raise UsageError(
                f"{files.location}: has no folder {self.metadata!r} with metadata; there is "
                f"{visible(', '.join(there)) or 'none'}.{suggest(self.metadata, there)}"
            )
        if self.metadata is None and len(there) > 1:
            raise UsageError(
                f"{files.location}: has the metadata folders {visible(', '.join(there))}; choose one with --reader "
                f"{self.name}:metadata={visible(there[0])}"
            )
        return {"metadata": self.metadata or there[0]} if there else {}
