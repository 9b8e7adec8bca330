"""Tables of keys and scores as text: CSV and TSV with a line of names, JSON Lines, and JSON lists.

Opening reads the file once, because the type of a column follows from all of its values:

- whole numbers: int64, if all are written without leading zeros and have at most 18 digits;
- numbers, with ``nan`` and ``inf`` in any case: float64;
- anything else, and the columns that usually have keys: text, exactly as in the file. So a key keeps its zeros.

An empty cell and ``null`` are null. Rows are converted in batches, so memory does not grow with a CSV or JSON Lines
file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError
from thresher.io.columns import KEYS
from thresher.io.csv import Lines, header, rows
from thresher.io.open import open_file, trusting
from thresher.io.parquet import TablePiece, check_names, exactly, picked
from thresher.runtime.format import counted
from thresher.runtime.untrusted import cut, load_json, parse_json

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")

_LINE = 1 << 24  # maximum bytes of a line of JSON
_BATCH = 64 * 2**20  # characters of a record batch, unless a single row has more
_COLUMNS = 4_096
_WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})", re.ASCII)
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
_NULL, _BOOL, _INT, _FLOAT, _TEXT = "null", "bool", "int64", "double", "string"  # names of Arrow types

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TextTable(TablePiece):
    """The rows of a file of text.

    Attributes:
        kinds: The Arrow type of every column.
    """

    kinds: tuple[str, ...] = ()

    def stream(self, columns: Sequence[str], batch: int = 65536) -> Iterator[Any]:
        """Yield record batches of the columns, in row order."""
        return exactly(self, self._batches(self.schema(columns), batch))

    def take(self, columns: Sequence[str], rows: npt.NDArray[np.int64]) -> Iterator[Any]:
        """Yield record batches of the given rows (ascending); reads the file up to the last."""
        return picked(self.stream(columns), rows)

    def schema(self, columns: Sequence[str]) -> Any:
        """Return the Arrow schema of some columns, in the order of ``columns``."""
        import pyarrow as pa

        kinds = dict(zip(self.columns, self.kinds, strict=True))
        return pa.schema([(name, pa.type_for_alias(kinds[name])) for name in columns])

    def _batches(self, schema: Any, batch: int) -> Iterator[Any]:
        import pyarrow as pa

        kinds = dict(zip(schema.names, map(str, schema.types), strict=True))
        held: list[list[Any]] = []
        length = 0

        def made() -> Any:
            cells = [list(column) for column in zip(*held, strict=True)] if held else [[] for _ in kinds]
            return pa.RecordBatch.from_arrays(
                [pa.array(cell, kind) for cell, kind in zip(cells, schema.types, strict=True)], schema=schema
            )

        with open_file(self.protocol, self.path) as file:
            for row in _rows(file, self.path):
                try:
                    cells = [_as(row.get(name), kind) for name, kind in kinds.items()]
                except ValueError as error:
                    raise PoolError(f"{self.path}: has changed since it was opened ({error}); start again") from None
                held.append(cells)
                length += sum(len(cell) for cell in cells if isinstance(cell, str))
                if len(held) >= batch or length > _BATCH:
                    yield made()
                    held, length = [], 0
        if held:
            yield made()


def text_table(protocol: str, path: str, text: Iterable[str | None] = KEYS) -> TextTable:
    """Read a table of text once for its columns, their types and the number of rows.

    Args:
        protocol: Protocol of the file system.
        path: The file; its ending says what it is.
        text: Columns that stay text, as keys do.

    Raises:
        PoolError: The file is damaged, has no line of names, or a row has another number of cells.
    """
    kinds: dict[str, str] = {}
    count, keys = 0, set(text)
    with open_file(protocol, path) as file:
        if _is_csv(path):
            kinds = dict.fromkeys(_named(file, path)[0], _NULL)
        for row in _rows(file, path):
            count += 1
            for name, value in row.items():
                kinds[name] = _wider(kinds.get(name, _NULL), _kind(value))
            if len(kinds) > _COLUMNS:
                raise PoolError(f"{path}: has more than {_COLUMNS:,} columns; keep those with keys and scores")
    if not kinds:
        raise PoolError(f"{path}: has no rows")
    kinds = {name: _TEXT if name in keys and kind in (_NULL, _INT) else kind for name, kind in kinds.items()}
    if _is_csv(path):  # its numbers are text too
        kinds = {name: _TEXT if name in keys else kind for name, kind in kinds.items()}
    return TextTable(path, count, tuple(kinds), protocol, kinds=tuple(kinds.values()))


# --- rows -----------------------------------------------------------------------------------------


def _is_csv(path: str) -> bool:
    return path.lower().endswith((".csv", ".tsv"))


def _named(file: IO[bytes], path: str) -> tuple[list[str], str, int]:
    names, delimiter, at = header(file, path, KEYS)
    if not names:
        raise PoolError(f"{path}: has no rows")
    if "" in names:
        raise PoolError(f"{path}: its first line must have a name for every column, such as key,score")
    check_names(path, names)
    return names, delimiter, at


def _rows(file: IO[bytes], path: str) -> Iterator[Row]:
    """Yield the rows; cells of CSV files are text, "" if empty."""
    if _is_csv(path):
        names, delimiter, at = _named(file, path)
        for begin, _, cells in rows(file, path, at, delimiter):
            if len(cells) != len(names):
                raise PoolError(
                    f"{path}: the row at byte {begin:,} has {counted(len(cells), 'cell')}, but the first line has "
                    f"{len(names)}; fix that row"
                )
            yield dict(zip(names, map(_Cell, cells), strict=True))
    elif path.lower().endswith(".json"):
        file.seek(0)
        content = trusting(path, lambda: load_json(file))
        if not isinstance(content, list):
            raise PoolError(
                f'{path}: is not a list; write a list of keys, or of objects such as {{"key": ..., "score": ...}}'
            )
        for number, value in enumerate(content):
            yield _row(value, f"{path}: entry {number:,}")
    else:
        lines = Lines(file, path, most=_LINE)
        found, begin = iter(lines), 0
        while (line := trusting(path, lambda: next(found, None))) is not None:
            where = f"{path}: the line at byte {begin:,}"
            begin = lines.at
            if line.strip():
                try:
                    yield _row(parse_json(line), where)
                except ValueError as error:
                    raise PoolError(f"{where} is not JSON ({error}); fix or remove it") from None


class _Cell(str):
    """The text of a cell of a CSV file, which may be a number."""

    __slots__ = ()


def _row(value: Any, where: str) -> Row:
    if isinstance(value, dict):
        return value
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return {"key": value}
    raise PoolError(f"{where} is {cut(json.dumps(value))}; write an object, or a key as text")


# --- values ---------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    if isinstance(value, _Cell):
        word = value.strip()
        if not word:
            return _NULL if not value else _TEXT
        return _INT if _WHOLE.fullmatch(word) else _FLOAT if _NUMBER.fullmatch(word) and not _long(word) else _TEXT
    if value is None or isinstance(value, bool):
        return _NULL if value is None else _BOOL
    if isinstance(value, int):
        return _INT if -(2**63) <= value < 2**63 else _TEXT
    return _FLOAT if isinstance(value, float) else _TEXT


def _long(word: str) -> bool:
    """Return whether a number is a whole number of more digits than float64 can hold."""
    return word.lstrip("+-").isdigit()


def _wider(one: str, other: str) -> str:
    """Return the type that holds the values of two types."""
    if one == other or other == _NULL:
        return one
    if one == _NULL:
        return other
    return _FLOAT if {one, other} == {_INT, _FLOAT} else _TEXT


def _as(value: Any, kind: str) -> Any:
    """Return a value as Python holds it for an Arrow type."""
    if value is None or (isinstance(value, _Cell) and not value):
        return None
    if kind == _TEXT:
        return str(value) if isinstance(value, str) else json.dumps(value)
    if kind == _NULL:
        raise ValueError("a column without values now has some")
    if kind == _BOOL and not isinstance(value, bool):
        raise ValueError("a column of true and false now has others")
    try:
        return value if kind == _BOOL else int(value) if kind == _INT else float(value)
    except (TypeError, OverflowError):
        raise ValueError("a column of numbers now has others") from None
