"""Tables of keys and scores in any format that is read."""

from __future__ import annotations

from collections.abc import Iterable

from thresher.io import arrow, text_table
from thresher.io.columns import KEYS
from thresher.io.parquet import TablePiece, table_piece

TEXTS = text_table.ENDINGS
TABLES = (".parquet", ".pq", *arrow.ENDINGS, *TEXTS)


def any_table(protocol: str, path: str, text: Iterable[str | None] = KEYS) -> TablePiece:
    """Open a table; the ending of its name, one of :data:`TABLES`, says what it is.

    Args:
        protocol: Protocol of the file system.
        path: The file.
        text: Columns of a file of text that stay text, as keys do.

    Raises:
        PoolError: The file is damaged.
    """
    name = path.lower()
    if name.endswith(TEXTS):
        return text_table.text_table(protocol, path, text)
    return arrow.arrow_table(protocol, path) if name.endswith(arrow.ENDINGS) else table_piece(protocol, path)
