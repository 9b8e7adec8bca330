"""img2dataset output: ``{shard}.parquet`` with a row per attempt, failed ones included.

Rows are the successes, in file order: the order of the tars is another, so everything joins by key.
There are no vectors here; a pool of vectors takes its metadata from one with ``--metadata``.
"""

from __future__ import annotations

from dataclasses import replace

from thresher.errors import PoolError
from thresher.readers.layout import Files, Layout, Options, each_shard, with_roles
from thresher.readers.pieces import TablePiece, table_piece, trusting

NAME = "img2dataset"
LOOKS_LIKE = "{00000..}.parquet with columns key and status"
RANK = 30

_PATTERN = r"\d+\.parquet"


def recognise(files: Files) -> bool:
    """Numbered parquet files with the columns key, status and error_message."""
    names = files.matching(_PATTERN)
    if not names:
        return False
    try:
        columns = table_piece(files.protocol, files.path(names[0])).columns
    except PoolError:
        return bool(files.matching(r"\d+_stats\.json"))
    return {"key", "status"} <= set(columns)


def read(files: Files, options: Options) -> Layout:
    """Count the successes of every shard (reads the status column, nothing else)."""

    def shard(name: str) -> TablePiece:
        table = table_piece(files.protocol, files.path(name))
        missing = {"key", "status"} - set(table.columns)
        if missing:
            raise PoolError(f"{files.path(name)}: has no column {', '.join(sorted(missing))}")
        table = replace(table, success_only=True)
        count = trusting(table.path, lambda: sum(len(part) for part in table.stream(["key"])))
        return replace(table, rows=count)

    tables, aside = each_shard(files.matching(_PATTERN), shard, files, options.skip_bad)
    return with_roles(
        Layout(kind=NAME, location=files.location, vectors={}, tables=tuple(tables), aside=tuple(aside)),
        replace(options, key=options.key or "key"),
    )
