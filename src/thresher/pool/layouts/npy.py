"""A plain folder of .npy files (and parquet metadata), or one .npy file.

Image embeddings are in files or folders whose names contain a word like image, img or visual; caption embeddings in
those with text, txt or caption. If no name says image, the remaining files are the image embeddings. Parquet files, in
natural order, contain the metadata. Files may be split differently; the total row counts must agree.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from thresher.errors import PoolError, UsageError, suggest
from thresher.io.listing import Files
from thresher.io.npy import npy_piece, npz_pieces
from thresher.io.parquet import TablePiece, table_piece
from thresher.io.pieces import Piece
from thresher.pool.layout import Layout, Options, from_shards, with_roles

_ROLES = {"image": ("image", "img", "vision", "visual"), "text": ("text", "txt", "caption")}


@dataclass(frozen=True)
class Npy:
    """A folder of .npy or .npz files, or one such file."""

    name: ClassVar[str] = "npy"
    rank: ClassVar[int] = 60
    looks_like: ClassVar[str] = "image*.npy, text*.npy and *.parquet, or one .npy file"

    def recognise(self, files: Files) -> bool:
        """Recognise any .npy or .npz file."""
        return bool(_arrays(files))

    def read(self, files: Files, options: Options) -> Layout:
        """Assign the arrays to image and text by name."""
        lists = _by_role(files, options)
        lists |= {"metadata": tables} if (tables := files.matching(r"([^/]+/)?[^/]+\.(parquet|pq)")) else {}
        # Files that correspond one to one can be skipped together, unless they are split differently.
        aligned = len({len(names) for names in lists.values()}) == 1
        if aligned:
            _same_numbers(files, lists)

        def piece(role: str, name: str) -> Piece | TablePiece:
            path = files.path(name)
            if role == "metadata":
                return table_piece(files.protocol, path)
            if name.lower().endswith(".npy"):
                return npy_piece(files.protocol, path, options.dtype)
            arrays = npz_pieces(files.protocol, path, options.dtype)
            if len(arrays) != 1:
                raise PoolError(f"{path}: contains {', '.join(arrays) or 'no arrays'}; save one array per file")
            return next(iter(arrays.values()))

        def shard(i: str) -> tuple[dict[str, Piece], TablePiece | None]:
            pieces = {role: piece(role, names[int(i)]) for role, names in lists.items()}
            table = cast(TablePiece | None, pieces.pop("metadata", None))
            return cast(dict[str, Piece], pieces), table

        try:
            pieces = {role: tuple(piece(role, name) for name in names) for role, names in lists.items()}
            found_tables = cast(tuple[TablePiece, ...], pieces.pop("metadata", ()))
            vectors = cast(dict[str, tuple[Piece, ...]], pieces)
            layout = Layout(kind=self.name, location=files.location, vectors=vectors, tables=found_tables)
            layout.check()
        except PoolError:
            if not (options.skip_bad and aligned):
                raise
            return from_shards(self.name, files, map(str, range(len(next(iter(lists.values()))))), shard, options)
        return with_roles(layout, options)


def _arrays(files: Files) -> list[str]:
    return files.matching(r"([^/]+/)?[^/]+\.np[yz]")


def _by_role(files: Files, options: Options) -> dict[str, list[str]]:
    """Return the names of image and text arrays; if the options name one, only that is used for its role."""
    lists: dict[str, list[str]] = {}
    arrays = _arrays(files)
    for role, wanted in (("image", options.image), ("text", options.text)):
        known = {name: {posixpath.dirname(name), stem := posixpath.basename(name), stem[:-4]} for name in arrays}
        if wanted:
            lists[role] = [name for name in arrays if wanted in known[name]]
            arrays = [name for name in arrays if wanted not in known[name]]
            if not lists[role]:
                allowed = sorted(set().union(*known.values()) - {""})
                raise UsageError(
                    f"no array or folder {wanted!r} for --{role} in {files.location}; "
                    f"there are {', '.join(allowed)}.{suggest(wanted, allowed)}"
                )
    rest: dict[str, list[str]] = {}
    for name in arrays:
        rest.setdefault(_role(files, name), []).append(name)
    if "image" not in lists and "image" not in rest and "other" in rest:
        rest["image"] = rest["other"]
    return {role: names for role in ("image", "text") if (names := lists.get(role) or rest.get(role))}


def _role(files: Files, name: str) -> str:
    for part in (posixpath.basename(name), posixpath.dirname(name)):
        words = re.findall(r"[a-z]+", part.lower())
        roles = [role for role, known in _ROLES.items() if any(word.startswith(known) for word in words)]
        if len(roles) > 1:
            raise PoolError(f"{files.path(name)}: image or text? rename it, or give the arrays with --image and --text")
        if roles:
            return roles[0]
    return "other"


def _same_numbers(files: Files, lists: dict[str, list[str]]) -> None:
    """Check that paired files have the same numbers: image 1 must not be paired with text 2."""
    (first, *_), numbers = lists, {role: _numbers(names) for role, names in lists.items()}
    for role, own in numbers.items():
        for i, (number, other) in enumerate(zip(own, numbers[first], strict=False)):
            if number != other:
                raise PoolError(
                    f"{files.path(lists[role][i])}: would belong to {files.path(lists[first][i])}, but has another "
                    "number; is a file missing? otherwise give them the same numbers"
                )


def _numbers(names: Sequence[str]) -> tuple[int, ...]:
    """Return the last number of each name that differs between names; () if there is none."""
    digits_by_name = [[int(digits) for digits in re.findall(r"\d+", posixpath.basename(name))] for name in names]
    varying = [numbers for numbers in zip(*digits_by_name, strict=False) if len(set(numbers)) > 1]
    return varying[-1] if varying else ()
