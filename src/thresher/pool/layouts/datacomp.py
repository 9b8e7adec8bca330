"""DataComp pools: ``metadata/*.parquet`` next to ``*.npz`` with the same stem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thresher.errors import PoolError, UsageError, suggest
from thresher.io.listing import Files
from thresher.io.npy import npz_pieces
from thresher.io.parquet import TablePiece, table_piece
from thresher.io.pieces import Piece
from thresher.pool.layout import Layout, Options, from_shards, skipped_file

_PAIRS = (("l14_img", "l14_txt"), ("b32_img", "b32_txt"), ("img", "txt"), ("image", "text"))


@dataclass(frozen=True)
class DataComp:
    """The metadata of DataComp."""

    name: ClassVar[str] = "datacomp"
    rank: ClassVar[int] = 10
    looks_like: ClassVar[str] = "metadata/*.parquet + metadata/*.npz of the same stem"

    def recognise(self, files: Files) -> bool:
        """Recognise at least one .npz with a .parquet of the same stem."""
        tables = {name[:-8] for name in files.matching(r"(metadata/)?[^/]+\.parquet")}
        return any(name[:-4] in tables for name in files.matching(r"(metadata/)?[^/]+\.npz"))

    def read(self, files: Files, options: Options) -> Layout:
        """Pair every .parquet with its .npz; L/14 arrays are preferred to B/32."""
        tables = {name[:-8]: name for name in files.matching(r"(metadata/)?[^/]+\.parquet")}
        arrays = {name[:-4]: name for name in files.matching(r"(metadata/)?[^/]+\.npz")}
        orphans = [
            PoolError(f"{files.path(arrays[stem])}: has no .parquet of the same stem; remove it or fetch the other")
            for stem in sorted(arrays.keys() - tables.keys())
        ]
        if orphans and not options.skip_bad:
            raise orphans[0]

        def shard(stem: str) -> tuple[dict[str, Piece], TablePiece]:
            path = files.path(arrays.get(stem, f"{stem}.npz"))
            if stem not in arrays:
                raise PoolError(f"{path}: is missing, but its .parquet exists; fetch it or remove the other")
            found_arrays = npz_pieces(files.protocol, path, options.dtype)
            return _choose(found_arrays, path, options), table_piece(files.protocol, files.path(tables[stem]))

        return from_shards(self.name, files, tables, shard, options, [skipped_file(error) for error in orphans])


def _choose(arrays: dict[str, Piece], path: str, options: Options) -> dict[str, Piece]:
    """Pick image and text arrays of one model."""
    for wanted in (options.image, options.text):
        if wanted and wanted not in arrays:
            raise UsageError(f"{path}: no array {wanted!r}; it has {', '.join(arrays)}.{suggest(wanted, arrays)}")
    fitting = [
        pair
        for pair in _PAIRS
        if options.image in (None, pair[0]) and options.text in (None, pair[1]) and not arrays.keys().isdisjoint(pair)
    ]
    names = zip(("image", "text"), fitting[0] if fitting else (options.image, options.text), strict=True)
    chosen = {role: arrays[name] for role, name in names if name in arrays}
    if not chosen:
        raise PoolError(f"{path}: none of its arrays ({', '.join(arrays)}) has a known name; choose one with --image")
    return chosen
