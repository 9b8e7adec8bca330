"""A plain folder of .npy files (and parquet metadata), or one .npy file.

``image*.npy`` / ``img*.npy`` hold the image embeddings, ``text*.npy`` / ``txt*.npy`` / ``caption*.npy``
those of the captions; a single other name counts as image. Parquet files, in natural order, hold the
metadata. Files need not be cut alike; their totals must agree.
"""

from __future__ import annotations

import posixpath

from thresher.errors import PoolError
from thresher.readers.layout import Aside, Files, Layout, Options, each_shard, same_rows, usual_type, with_roles
from thresher.readers.pieces import NpyPiece, Piece, TablePiece, npy_piece, npz_pieces, table_piece

NAME = "npy"
LOOKS_LIKE = "image*.npy, text*.npy and *.parquet, or one .npy file"
RANK = 60

_ROLES = {"image": ("image", "img", "vision", "visual"), "text": ("text", "txt", "caption")}


def recognise(files: Files) -> bool:
    """Any .npy or .npz file."""
    return bool(_arrays(files))


def read(files: Files, options: Options) -> Layout:
    """Sort the arrays into image and text by name."""
    names: dict[str, list[str]] = {}
    for name in _arrays(files):
        names.setdefault(_role(name, options), []).append(name)
    if "other" in names and "image" not in names:
        names["image"] = names.pop("other")
    names.pop("other", None)
    tables = files.matching(r"([^/]+/)?[^/]+\.(parquet|pq)")
    lists: list[list[str]] = [*names.values(), *([tables] if tables else [])]
    # Files that correspond one to one can be set aside together; otherwise a bad one is the end.
    aligned = len({len(found) for found in lists}) == 1

    def one(role: str, name: str) -> Piece:
        if name.endswith(".npz"):
            found = npz_pieces(files.protocol, files.path(name), options.dtype)
            if len(found) != 1:
                raise PoolError(f"{files.path(name)}: holds {', '.join(found) or 'no arrays'}; expected one array")
            return next(iter(found.values()))
        piece: NpyPiece = npy_piece(files.protocol, files.path(name), options.dtype)
        return piece

    def shard(i: str) -> tuple[dict[str, Piece], TablePiece | None]:
        pieces = {role: one(role, found[int(i)]) for role, found in names.items()}
        table = table_piece(files.protocol, files.path(tables[int(i)])) if tables else None
        if options.skip_bad:
            same_rows({**pieces, **({"metadata": table} if table else {})})
        return pieces, table

    aside: list[Aside] = []
    if aligned:
        shards, aside = each_shard([str(i) for i in range(len(lists[0]))], shard, files, options.skip_bad)
        if aside:
            aside = [Aside(found.why.split(":")[0], found.why) for found in aside]
        usual, odd = usual_type([pieces for pieces, _ in shards], options.skip_bad)
        shards = [found for found, good in zip(shards, usual, strict=True) if good]
        aside += odd
        vectors = {role: tuple(pieces[role] for pieces, _ in shards) for role in names} if shards else {}
        found_tables = tuple(table for _, table in shards if table)
    else:
        vectors = {role: tuple(one(role, name) for name in found) for role, found in names.items()}
        found_tables = tuple(table_piece(files.protocol, files.path(name)) for name in tables)
    return with_roles(
        Layout(
            kind=NAME,
            location=files.location,
            vectors=vectors,
            tables=found_tables,
            aside=tuple(aside),
        ),
        options,
    )


def _arrays(files: Files) -> list[str]:
    return files.matching(r"([^/]+/)?[^/]+\.np[yz]")


def _role(name: str, options: Options) -> str:
    stem = posixpath.basename(name).lower()
    folder = posixpath.dirname(name).lower()
    for role, wanted in (("image", options.image), ("text", options.text)):
        if wanted and wanted.lower() in (stem, stem.rsplit(".", 1)[0], folder):
            return role
    for role, words in _ROLES.items():
        if any(part.startswith(word) for word in words for part in (stem, folder)):
            return role
    return "other"
