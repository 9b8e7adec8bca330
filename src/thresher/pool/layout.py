"""What a reader finds: fields of vectors and tables of metadata, as lists of pieces of files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thresher.errors import PoolError, UsageError, suggest
from thresher.io.columns import CAPTIONS, IMAGES, KEYS, SCORES
from thresher.io.listing import Files
from thresher.io.open import file_stamp
from thresher.io.parquet import (
    TablePiece,
)
from thresher.io.pieces import FLOATS, Piece


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to read a pool where names or marks do not say it.

    Attributes:
        image: Stored array or column that holds the image embeddings (default: by usual names).
        text: The same for the captions' embeddings.
        key: Metadata column that identifies a row; "row" for none: rows go by their numbers.
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

    def __post_init__(self) -> None:
        """Refuse a dtype that no file could have."""
        allowed = (*FLOATS, "bfloat16")
        if self.dtype not in (None, *allowed):
            raise UsageError(
                f"--dtype {self.dtype}: allowed are {', '.join(allowed)}.{suggest(str(self.dtype), allowed)}"
            )


@dataclass(frozen=True)
class Aside:
    """A file, or the rows of one, that ``skip_bad`` left out."""

    path: str
    why: str


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

    def check(self) -> None:
        """Refuse fields of different lengths, widths or types, and pools without rows."""
        if not self.vectors and not self.tables:
            why = f"; the first: {self.aside[0].path}: {self.aside[0].why}" if self.aside else ""
            raise PoolError(f"{self.location}: no usable file is left of the {len(self.aside)} found{why}")
        counts = {name: sum(p.rows for p in pieces) for name, pieces in self.vectors.items()}
        if self.tables:
            counts["metadata"] = sum(piece.rows for piece in self.tables)
        if len(set(counts.values())) > 1:
            first = {n: p[0].path for n, p in self.vectors.items()} | (
                {"metadata": self.tables[0].path} if self.tables else {}
            )
            told = ", ".join(f"{name} has {count:,} rows (from {first[name]})" for name, count in counts.items())
            raise PoolError(f"{self.location}: row counts differ: {told}; is a file missing, or one too many?")
        if self.rows == 0:
            raise PoolError(f"{self.location}: the pool has no rows; is it finished?")
        for name, pieces in self.vectors.items():
            for piece in pieces:
                if (piece.dim, piece.dtype) != (pieces[0].dim, pieces[0].dtype):
                    raise PoolError(
                        f"{piece.path}: {name} rows are {piece.dim} x {piece.dtype}, but those of "
                        f"{pieces[0].path} are {pieces[0].dim} x {pieces[0].dtype}; convert one of them"
                    )


def from_shards(
    kind: str,
    files: Files,
    names: Iterable[str],
    read: Callable[[str], tuple[Mapping[str, Piece], TablePiece | None]],
    options: Options,
    aside: Sequence[Aside] = (),
) -> Layout:
    """Return the layout of files that belong together shard by shard.

    ``read(name)`` gives the vectors and the table of one shard. Whatever is wrong with a shard raises,
    or with ``skip_bad`` sets that shard aside: unreadable, of differing row counts, or of other
    fields, widths or types than most.
    """
    bad = list(aside)
    shards = []
    for name in names:
        try:
            vectors, table = read(name)
            _same_rows({**vectors, **({"metadata": table} if table else {})})
            shards.append((vectors, table))
        except PoolError as error:
            if not options.skip_bad:
                raise
            bad.append(aside_of(error))
    # An empty file says nothing about types; where all are empty, they stay to be refused.
    shards = [(vectors, table) for vectors, table in shards if _first(vectors, table).rows] or shards
    kinds = [_kind(vectors, table, options) for vectors, table in shards]
    usual = max(dict.fromkeys(kinds), key=kinds.count, default=None)
    for shard, found in zip(shards, kinds, strict=True):
        if found != usual:
            odd = PoolError(f"{_first(*shard).path}: has {found}, most files have {usual}; convert or remove this one")
            if not options.skip_bad:
                raise odd
            bad.append(aside_of(odd))
    good = [shard for shard, found in zip(shards, kinds, strict=True) if found == usual]
    return with_roles(
        Layout(
            kind=kind,
            location=files.location,
            vectors={name: tuple(vectors[name] for vectors, _ in good) for name in (good[0][0] if good else ())},
            tables=tuple(table for _, table in good if table),
            aside=tuple(bad),
        ),
        options,
    )


def aside_of(error: PoolError) -> Aside:
    """Return the file that an error names, and what it says of it."""
    path, _, why = str(error).partition(": ")
    if path.endswith("]"):  # an array in the file
        path, _, array = path.rpartition(" [")
        why = f"{array[:-1]} {why}"
    return Aside(path, why)


def _first(vectors: Mapping[str, Piece], table: TablePiece | None) -> Piece | TablePiece:
    return next(piece for piece in (*vectors.values(), table) if piece)


def _same_rows(what: Mapping[str, Piece | TablePiece]) -> None:
    first, *rest = what.values()
    for piece in rest:
        if piece.rows != first.rows:
            raise PoolError(
                f"{piece.path}: has {piece.rows:,} rows, but {first.path}, which belongs to it, has {first.rows:,}; "
                "make them again together"
            )


def _kind(vectors: Mapping[str, Piece], table: TablePiece | None, options: Options) -> str:
    """Tell what has to be alike in all shards: arrays, widths, types and the column of keys."""
    told = [" ".join(f"{name} {p.array} {p.dim} x {p.dtype}".split()) for name, p in sorted(vectors.items())]
    if table:
        told.append(f"metadata by {next((name for name in (options.key, *KEYS) if name in table.columns), 'row')}")
    return ", ".join(told)


NO_KEY = "row"  # asks for row numbers in place of keys, unless a column is called so


def with_roles(layout: Layout, options: Options) -> Layout:
    """Name the key, caption, image and score columns of a layout's tables.

    Raises:
        UsageError: A column that was asked for is not there (a caption may come with ``metadata``).
    """
    columns = layout.columns

    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in columns), None)

    for role, wanted in (("key", options.key), ("caption", None if options.metadata else options.caption)):
        if wanted and wanted not in columns and (role, wanted) != ("key", NO_KEY):
            raise UsageError(
                f"no metadata column {wanted!r} for --{role} in {layout.location}; "
                f"columns: {', '.join(columns) or 'none'}.{suggest(wanted, columns)}"
            )
    return replace(
        layout,
        key=(options.key if options.key in columns else None) if options.key else first(KEYS),
        caption=options.caption or first(CAPTIONS),
        image=first(IMAGES),
        scores=tuple(name for name in SCORES if name in columns),
    )


def stamp_of(piece: Piece | TablePiece) -> list[Any]:
    """Return what changes whenever the values may have: how a piece is read, and its file's stamp."""
    return [dict(vars(piece)), *file_stamp(piece.protocol, piece.path)]
