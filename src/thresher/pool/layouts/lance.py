"""Lance datasets with columns of embeddings; a version is read as it was, whatever is written meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from thresher.errors import PoolError
from thresher.io.lance import Fragment, LancePiece, LanceTable, fragments_of, is_lance, schema_of
from thresher.io.listing import Files
from thresher.io.parquet import TablePiece, check_names, first_length, vector_type
from thresher.io.pieces import Piece
from thresher.pool.layout import Layout, Options, Skipped, embedding_columns, from_shards, skipped_file


@dataclass(frozen=True)
class Lance:
    """A Lance dataset with columns of embeddings."""

    name: ClassVar[str] = "lance"
    rank: ClassVar[int] = 45
    looks_like: ClassVar[str] = "a Lance dataset (_versions/*.manifest) with a column of embeddings"

    version: int = field(default=0, metadata={"help": "version to read (default: as in PATH@VERSION, else the newest)"})

    def recognise(self, files: Files) -> bool:
        """Recognise the manifests of versions."""
        return is_lance(files)

    def read(self, files: Files, options: Options) -> Layout:
        """Read the manifest of a version, and the sizes of its files.

        The location of the result is ``PATH@VERSION``, so that a selection is of this version.

        Raises:
            UsageError: A requested version or column does not exist.
            PoolError: The manifest is damaged, or a file is missing or cut off.
        """
        skipped: list[Skipped] = []

        def bad(error: PoolError) -> None:
            skipped.append(skipped_file(error))

        fragments = fragments_of(files, self.version, bad if options.skip_bad else None)
        by_name = {fragment.path: fragment for fragment in fragments}
        shard = partial(_shard, by_name, options)
        layout = from_shards(self.name, files, by_name, shard, options, skipped)
        version = fragments[0].version if fragments else 0
        named = files.location if files.version or not version else f"{files.location.rstrip('/')}@{version}"
        return replace(layout, location=named)


def _shard(by_name: dict[str, Fragment], options: Options, name: str) -> tuple[dict[str, Piece], TablePiece]:
    fragment = by_name[name]
    schema = schema_of(fragment.dataset())
    check_names(fragment.path, schema.names)
    table = LanceTable(fragment.path, fragment.rows, tuple(schema.names), fragment.protocol, fragment=fragment)
    pieces: dict[str, Piece] = {}
    types = {one.name: str(one.type) for one in schema}
    for role, column in embedding_columns(fragment.path, types, options).items():
        first = partial(_first, fragment, column)
        label = f"{fragment.path} [{column}]"
        dim, kind = vector_type(label, schema.field(column), fragment.rows, first, options.dtype)
        pieces[role] = LancePiece(fragment, column, fragment.rows, dim, kind)
    return pieces, table


def _first(fragment: Fragment, column: str) -> int:
    return first_length(part.column(0) for part in fragment.batches([column], 0, fragment.rows, 64))
