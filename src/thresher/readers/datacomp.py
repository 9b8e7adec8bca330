"""DataComp pools: ``metadata/*.parquet`` beside ``*.npz`` of the same stem."""

from __future__ import annotations

import posixpath

from thresher.errors import PoolError, UsageError, suggest
from thresher.readers.layout import Aside, Files, Layout, Options, each_shard, same_rows, usual_type, with_roles
from thresher.readers.pieces import Piece, TablePiece, npz_pieces, table_piece

NAME = "datacomp"
LOOKS_LIKE = "metadata/*.parquet + metadata/*.npz of the same stem"
RANK = 10

_IMAGES = ("l14_img", "b32_img", "img", "image")
_TEXTS = ("l14_txt", "b32_txt", "txt", "text")


def recognise(files: Files) -> bool:
    """At least one .npz has a .parquet of the same stem."""
    tables = {name[:-8] for name in files.matching(r"(metadata/)?[^/]+\.parquet")}
    return any(name[:-4] in tables for name in files.matching(r"(metadata/)?[^/]+\.npz"))


def read(files: Files, options: Options) -> Layout:
    """Pair every parquet with its npz; L/14 arrays are preferred to B/32."""
    stems = [name[:-8] for name in files.matching(r"(metadata/)?[^/]+\.parquet")]
    arrays = set(files.matching(r"(metadata/)?[^/]+\.npz"))
    orphans = sorted(arrays - {f"{stem}.npz" for stem in stems})
    aside = [Aside(files.path(name), "has no parquet of the same stem") for name in orphans]
    if orphans and not options.skip_bad:
        raise PoolError(f"{files.path(orphans[0])}: has no parquet of the same stem beside it")

    def shard(stem: str) -> tuple[dict[str, Piece], TablePiece]:
        if f"{stem}.npz" not in arrays:
            raise PoolError(f"{files.path(stem)}.parquet: has no {posixpath.basename(stem)}.npz beside it")
        table = table_piece(files.protocol, files.path(f"{stem}.parquet"))
        found = npz_pieces(files.protocol, files.path(f"{stem}.npz"), options.dtype)
        pieces = _choose(found, files.path(f"{stem}.npz"), options)
        same_rows({**pieces, "metadata": table})
        return pieces, table

    shards, bad = each_shard(stems, shard, files, options.skip_bad)
    usual, odd = usual_type([pieces for pieces, _ in shards], options.skip_bad)
    shards = [found for found, good in zip(shards, usual, strict=True) if good]
    fields = shards[0][0] if shards else {}
    return with_roles(
        Layout(
            kind=NAME,
            location=files.location,
            vectors={name: tuple(pieces[name] for pieces, _ in shards) for name in fields},
            tables=tuple(table for _, table in shards),
            aside=(*aside, *bad, *odd),
        ),
        options,
    )


def _choose(found: dict[str, Piece], path: str, options: Options) -> dict[str, Piece]:
    chosen = {}
    for role, wanted, usual in (("image", options.image, _IMAGES), ("text", options.text, _TEXTS)):
        name = wanted or next((name for name in usual if name in found), None)
        if wanted and wanted not in found:
            raise UsageError(f"{path}: no array {wanted!r}; it has {', '.join(found)}.{suggest(wanted, found)}")
        if name:
            chosen[role] = found[name]
    if not chosen:
        raise PoolError(f"{path}: none of its arrays ({', '.join(found)}) is known; name one with --image")
    return chosen
