"""clip-retrieval inference output: ``img_emb/img_emb_i.npy``, ``text_emb/...``, ``metadata/...parquet``."""

from __future__ import annotations

import re

from thresher.errors import PoolError
from thresher.readers.layout import Files, Layout, Options, each_shard, same_rows, usual_type, with_roles
from thresher.readers.pieces import Piece, TablePiece, npy_piece, table_piece

NAME = "clip-retrieval"
LOOKS_LIKE = "img_emb/*.npy, text_emb/*.npy, metadata/*.parquet"
RANK = 20

_FOLDERS = {"image": ("img_emb", "npy"), "text": ("text_emb", "npy"), "metadata": ("metadata", "parquet")}


def recognise(files: Files) -> bool:
    """An img_emb or text_emb folder of .npy files."""
    return bool(files.matching(r"(img_emb|text_emb)/.+\.npy"))


def read(files: Files, options: Options) -> Layout:
    """Join the files of one number; row r of each belongs together."""
    parts: dict[str, dict[str, str]] = {}
    for role, (folder, ending) in _FOLDERS.items():
        for name in files.matching(rf"{folder}/.*\d+\.{ending}"):
            digits = re.findall(r"\d+", name)[-1]
            parts.setdefault(role, {})[digits.lstrip("0") or "0"] = name
    numbers = sorted(set().union(*parts.values()), key=int)

    def shard(number: str) -> tuple[dict[str, Piece], TablePiece | None]:
        missing = [role for role in parts if number not in parts[role]]
        if missing:
            there = next(files.path(names[number]) for names in parts.values() if number in names)
            folders = ", ".join(_FOLDERS[role][0] for role in missing)
            raise PoolError(f"{there}: there is no file of the same number in {folders}")
        vectors: dict[str, Piece] = {
            role: npy_piece(files.protocol, files.path(parts[role][number]), options.dtype)
            for role in ("image", "text")
            if role in parts
        }
        table = None
        if "metadata" in parts:
            table = table_piece(files.protocol, files.path(parts["metadata"][number]))
        same_rows({**vectors, **({"metadata": table} if table else {})})
        return vectors, table

    shards, aside = each_shard(numbers, shard, files, options.skip_bad)
    usual, odd = usual_type([vectors for vectors, _ in shards], options.skip_bad)
    shards = [found for found, good in zip(shards, usual, strict=True) if good]
    fields = shards[0][0] if shards else {}
    return with_roles(
        Layout(
            kind=NAME,
            location=files.location,
            vectors={name: tuple(vectors[name] for vectors, _ in shards) for name in fields},
            tables=tuple(table for _, table in shards if table),
            aside=(*aside, *odd),
        ),
        options,
    )
