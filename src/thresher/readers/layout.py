"""What a reader finds: fields of vectors and tables of metadata, as lists of pieces of files."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from thresher.errors import PoolError, UsageError, suggest
from thresher.readers.pieces import Piece, TablePiece, protocol_of

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to read a pool where names or marks do not say it.

    Attributes:
        image: Stored array or column that holds the image embeddings (default: by usual names).
        text: The same for the captions' embeddings.
        key: Metadata column that identifies a row.
        caption: Metadata column with the caption.
        dtype: "bfloat16" where uint16 arrays hold bfloat16 bits; "float16" or "float32" for binary columns.
        metadata: Location of an img2dataset output joined by key.
        skip_bad: Set unusable files and rows aside, counted and listed, instead of stopping.
    """

    image: str | None = None
    text: str | None = None
    key: str | None = None
    caption: str | None = None
    dtype: str | None = None
    metadata: str | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class Aside:
    """A file, or the rows of one, that ``skip_bad`` left out."""

    path: str
    why: str


@dataclass(frozen=True)
class Files:
    """The files below a location, by sorted relative name; any fsspec location."""

    location: str
    protocol: str
    root: str
    names: tuple[str, ...]

    @classmethod
    def at(cls, location: str) -> Files:
        """List a folder (two levels down) or a single file.

        Raises:
            PoolError: Nothing is there.
        """
        import fsspec

        try:
            fs, root = fsspec.core.url_to_fs(location)
            found = fs.find(root, maxdepth=2)
        except (OSError, ValueError, ImportError) as error:
            raise PoolError(f"{location}: cannot be listed ({error})") from None
        root = root.rstrip("/") or root
        if not found:
            there = "it is an empty folder" if fs.exists(root) else "nothing is there"
            raise PoolError(f"{location}: {there}; give a folder or file of embeddings")
        if found == [root]:
            root, names = posixpath.dirname(root), [posixpath.basename(root)]
        else:
            names = [posixpath.relpath(path, root) for path in found]
        visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        return cls(location, protocol_of(fs), root, tuple(sorted(visible, key=natural)))

    def path(self, name: str) -> str:
        """Return the full path of a listed name."""
        return posixpath.join(self.root, name)

    def matching(self, pattern: str) -> list[str]:
        """Return the names that match a regular expression entirely, in natural order."""
        return [name for name in self.names if re.fullmatch(pattern, name)]


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key under which ``a2`` comes before ``a10``."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part)


@dataclass(frozen=True)
class Layout:
    """N rows over files. Row order is file order; cuts of one field need not match another's."""

    kind: str
    location: str
    vectors: Mapping[str, tuple[Piece, ...]]
    tables: tuple[TablePiece, ...] = ()
    key: str | None = None
    caption: str | None = None
    image: str | None = None
    scores: tuple[str, ...] = ()
    aside: tuple[Aside, ...] = ()

    @property
    def rows(self) -> int:
        """N."""
        for pieces in self.vectors.values():
            return sum(piece.rows for piece in pieces)
        return sum(piece.rows for piece in self.tables)

    @property
    def columns(self) -> tuple[str, ...]:
        """Metadata columns found in every table."""
        if not self.tables:
            return ()
        common = set(self.tables[0].columns).intersection(*(piece.columns for piece in self.tables))
        return tuple(name for name in self.tables[0].columns if name in common)

    def check(self, options: Options) -> None:
        """Refuse fields of different lengths, widths or types, and columns that are not there."""
        if not self.vectors and not self.tables:
            raise PoolError(f"{self.location}: no usable file is left of the {len(self.aside)} found")
        counts = {name: sum(p.rows for p in pieces) for name, pieces in self.vectors.items()}
        if self.tables:
            counts["metadata"] = sum(piece.rows for piece in self.tables)
        if len(set(counts.values())) > 1:
            first = {n: p[0].path for n, p in self.vectors.items()} | (
                {"metadata": self.tables[0].path} if self.tables else {}
            )
            told = ", ".join(f"{name} has {count:,} rows (from {first[name]})" for name, count in counts.items())
            raise PoolError(f"{self.location}: row counts differ: {told}")
        if self.rows == 0:
            raise PoolError(f"{self.location}: the pool has no rows")
        for name, pieces in self.vectors.items():
            for piece in pieces:
                if (piece.dim, piece.dtype) != (pieces[0].dim, pieces[0].dtype):
                    raise PoolError(
                        f"{piece.path}: {name} rows are {piece.dim} x {piece.dtype}, but those of "
                        f"{pieces[0].path} are {pieces[0].dim} x {pieces[0].dtype}; convert one of them"
                    )
        for role, wanted in (("key", options.key), ("caption", options.caption)):
            if wanted and wanted not in self.columns:
                raise UsageError(
                    f"no metadata column {wanted!r} for --{role} in {self.location}; "
                    f"columns: {', '.join(self.columns) or 'none'}.{suggest(wanted, self.columns)}"
                )


def each_shard(
    names: Iterable[str], read: Callable[[str], _T], files: Files, skip_bad: bool
) -> tuple[list[_T], list[Aside]]:
    """Read shard after shard; a PoolError stops, or with ``skip_bad`` sets that shard aside."""
    good: list[_T] = []
    aside: list[Aside] = []
    for name in names:
        try:
            good.append(read(name))
        except PoolError as error:
            if not skip_bad:
                raise
            aside.append(Aside(files.path(name), str(error)))
    return good, aside


def same_rows(what: Mapping[str, Piece | TablePiece]) -> None:
    """Refuse files of one shard that disagree on the number of rows."""
    rows = {piece.rows for piece in what.values()}
    if len(rows) > 1:
        told = ", ".join(f"{piece.path}: {piece.rows:,}" for piece in what.values())
        raise PoolError(f"files that belong together have different row counts: {told}")


def usual_type(shards: Sequence[Mapping[str, Piece]], skip_bad: bool) -> tuple[list[bool], list[Aside]]:
    """Mark the shards of the most common width and type; the others are set aside or left to fail."""
    kinds = [tuple(sorted((n, p.dim, p.dtype) for n, p in shard.items())) for shard in shards]
    if not skip_bad or len(set(kinds)) < 2:
        return [True] * len(shards), []
    usual = max(dict.fromkeys(kinds), key=kinds.count)
    aside = [
        Aside(next(iter(shard.values())).path, f"rows are {_told(kind)}, most of the pool is {_told(usual)}")
        for shard, kind in zip(shards, kinds, strict=True)
        if kind != usual
    ]
    return [kind == usual for kind in kinds], aside


def _told(kind: tuple[tuple[str, int, str], ...]) -> str:
    return ", ".join(f"{name} {dim} x {dtype}" for name, dim, dtype in kind)


KEYS = ("uid", "key", "id", "__key__", "image_path", "path", "url")
CAPTIONS = ("text", "caption", "captions", "title", "TEXT", "alt_text")
IMAGES = ("image", "thumbnail", "jpg", "png", "image_path", "path", "filepath")
SCORES = ("clip_l14_similarity_score", "clip_b32_similarity_score", "similarity", "clip_score", "clip_similarity")


def with_roles(layout: Layout, options: Options) -> Layout:
    """Name the key, caption, image and score columns of a layout's tables."""
    columns = layout.columns

    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in columns), None)

    return replace(
        layout,
        key=options.key or first(KEYS),
        caption=options.caption or first(CAPTIONS),
        image=first(IMAGES),
        scores=tuple(name for name in SCORES if name in columns),
    )
