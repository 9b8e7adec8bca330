"""A pool in memory: arrays, tensors and frames as a store like any other.

Vectors are not copied where NumPy can see the memory of their owner. They are identified by a hash of their values, so
that what was computed from them is found in the cache whenever the same values come again. Worker processes read them
from a file that is written once. Metadata is written to a Parquet file in the cache.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError, UsageError, suggest
from thresher.io.columns import CAPTIONS, KEYS, NO_KEY, plain_batch, plain_type
from thresher.io.npy import npy_piece
from thresher.io.parquet import TablePiece, first_length, table_piece, vectors_of
from thresher.io.paths import shortened, visible
from thresher.io.pictures import bytes_of
from thresher.io.pieces import DIMENSIONS, FLOATS, Array, Piece, stored_dtype
from thresher.ops.vectors import to_float32
from thresher.pool.layout import Layout, Options, embedding_columns, with_roles
from thresher.pool.store import IN_MEMORY, EmbeddingStore, block_of
from thresher.runtime.config import cache_folder
from thresher.runtime.engine import cores
from thresher.runtime.engines.threads import Threads
from thresher.runtime.files import writing
from thresher.runtime.locks import Pin, pin
from thresher.runtime.random import digest

FOLDER = "joined"  # of the cache: the tables that it makes for pools
_CHUNK = 64 * 2**20  # bytes hashed or written at a time
_SHORT = 4_096  # rows of a chunk that is read where it is; shorter ones are copied together
_SAMPLED = 1_000  # rows that are compared to see whether an array has changed
_PICTURE = 64 * 2**20  # bytes of an image, at most
_SIDE = 512  # pixels of the longer side of an image of PIL, which is made smaller

Picture = Any  # a path, bytes, an image of PIL, or None
_GIVE = (
    "give a NumPy array, a tensor, a list of vectors, or a column of a pandas or polars frame, an Arrow table or a "
    "Hugging Face Dataset"
)


def from_arrays(
    image: Any = None,
    text: Any = None,
    *,
    keys: Any = None,
    captions: Any = None,
    table: Any = None,
    images: Sequence[Picture] | Callable[[int], Picture] | str | None = None,
    skip_bad: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> EmbeddingStore:
    """Return a store of data in memory: for every method, with the results that the same values give from files.

    Vectors are not copied if they are NumPy arrays, tensors on the CPU, or columns without nulls of Arrow, polars or
    Hugging Face Datasets. Do not change them while the store is in use; a run after a change ends with an error.

    Args:
        image: Image embeddings, (N, D) float16, float32, float64 or bfloat16: an array, a tensor (also on a GPU), a
            list of vectors, or the name of a column of ``table``. Or a frame, which is the same as ``table``.
        text: Caption embeddings, (N, E), in the same ways.
        keys: What identifies a row: N texts or numbers, or the name of a column of ``table``; "row" for row numbers. By
            default a column of ``table`` with a usual name (uid, key, id, ...), else the row number.
        captions: N captions, or the name of a column of ``table`` (default: text, caption, ...).
        table: N rows of metadata: a pandas or polars frame, an Arrow table, a Hugging Face Dataset, or a dictionary of
            columns. Without ``image`` and ``text``, its columns of vectors with usual names (image_embedding,
            text_embedding, embedding, ...) are the embeddings.
        images: The images, for reports: N paths, bytes or PIL images, a function of the row number that returns one
            of these, or the name of a column of ``table``.
        skip_bad: Skip rows with unusable vectors or keys, and count and list them, instead of stopping.
        cache: The cache folder (default: the usual one), where ``table`` is written.

    Raises:
        UsageError: There are no vectors, or lengths, shapes or types are not as above; the message says which.
    """
    if table is None and image is not None and _is_table(image):
        image, table = None, image
    if _class_of(table) == ("datasets", "Dataset"):
        table, images = _without_images(table, images)
    frame = None if table is None else _arrow(table)
    folder = Path(cache or cache_folder()) / FOLDER
    given: dict[str, Any] = {"image": image, "text": text}
    if image is None and text is None and frame is not None:
        if frame.num_columns and not frame.num_rows:
            raise UsageError("there are no rows")
        types = {item.name: str(item.type) for item in frame.schema if _is_vector_type(item.type)}
        given |= embedding_columns("the table", types, Options())
        if given["image"] is None and given["text"] is None:
            vectors = [name for name in frame.column_names if _is_vectors(frame, name)]
            if len(vectors) != 1:
                raise UsageError(_which(frame, vectors))
            given["image"] = vectors[0]
    pieces = {}
    for role, value in given.items():
        if value is not None:
            pieces[role] = _pieces(role, value, frame, str(folder))
    if not pieces:
        raise UsageError(f"no vectors: {_GIVE} as image= or text=")
    rows = {role: sum(piece.rows for piece in own) for role, own in pieces.items()}
    n = next(iter(rows.values()))
    used = [name for name in given.values() if isinstance(name, str)]
    frame, options, shown = _metadata(frame, used, n, keys, captions, images)
    counts = {**rows, **({"table": frame.num_rows} if frame is not None else {})}
    if len({*counts.values()}) > 1:
        raise UsageError(
            "all must have the same number of rows, but " + ", ".join(f"{k} has {v:,}" for k, v in counts.items())
        )
    if not n:
        raise UsageError("there are no rows")
    options = replace(options, skip_bad=skip_bad)
    tables: tuple[TablePiece, ...] = ()
    held: tuple[Pin, ...] = ()
    if frame is not None and frame.num_columns:
        path, held_file = _written(frame, folder)
        tables, held = (table_piece("file", path),), (held_file,)
    layout: Layout = _Arrays(kind="arrays", location=IN_MEMORY, vectors=pieces, tables=tables, pictures=shown)
    layout = replace(with_roles(layout, options), image=None)
    layout.check()
    layout = replace(layout, location=f"{IN_MEMORY}{layout.fingerprint[:16]}")
    layout.changed()  # remembers the values of now
    return EmbeddingStore(layout, options, block=block_of(layout), held=held)


# --- vectors --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ArrayPiece:
    """Rows of an array in memory. A pickled copy reads them from a file, which is written once.

    Attributes:
        values_ND: (N, D) as stored; bfloat16 as uint16.
        dtype: Type of the values.
        path: Name in messages.
        folder: Where the file is written.
    """

    values_ND: Array
    dtype: str
    path: str
    folder: str

    protocol = "memory"
    array = ""
    seekable = True
    mapped = True

    @property
    def rows(self) -> int:
        """N."""
        return len(self.values_ND)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.values_ND.shape[1])

    def read(self, start: int, stop: int) -> Array:
        """Return rows start..stop, without a copy."""
        return self.values_ND[start:stop]

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return scattered rows."""
        return np.asarray(self.values_ND[rows])

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order."""
        for start in range(0, self.rows, batch):
            yield self.read(start, min(start + batch, self.rows))

    @cached_property
    def content(self) -> str:
        """Hash of type, width and values."""
        return content_of([self])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the file."""
        return npy_piece, ("file", self._file[0], self.dtype)

    @cached_property
    def _file(self) -> tuple[str, Pin | None]:
        path = os.path.join(self.folder, f"{self.content[:32]}.npy")
        while (held := pin(path)) is None:
            with writing(path) as scratch, open(scratch, "wb") as file:
                header = {"descr": stored_dtype(self.dtype).str, "fortran_order": False, "shape": self.values_ND.shape}
                np.lib.format.write_array_header_1_0(file, header)
                for part in _chunks([self]):
                    file.write(np.ascontiguousarray(part).data)
        return path, held


def content_of(pieces: Sequence[Piece]) -> str:
    """Return a hash of the type, the width and the values of consecutive pieces, however they are split."""
    parts = list(Threads(cores()).map(digest, _chunks(pieces)))
    return digest([pieces[0].dtype, pieces[0].dim, *parts])


def _chunks(pieces: Sequence[Piece]) -> Iterator[Array]:
    """Yield the rows of consecutive pieces, a fixed number at a time; without a copy within a piece."""
    size = max(_CHUNK // (pieces[0].dim * stored_dtype(pieces[0].dtype).itemsize), 1)
    held: list[Array] = []
    for piece in pieces:
        start = 0
        while start < piece.rows:
            stop = min(start + size - sum(map(len, held)), piece.rows)
            held.append(piece.read(start, stop))
            start = stop
            if sum(map(len, held)) == size:
                yield held[0] if len(held) == 1 else np.concatenate(held)
                held = []
    if held:
        yield held[0] if len(held) == 1 else np.concatenate(held)


@dataclass(frozen=True, kw_only=True)
class _Arrays(Layout):
    """A layout whose vectors are in memory."""

    @cached_property
    def version(self) -> str:
        """Hash of the values of the vectors and of the metadata."""
        vectors = [[name, content_of(pieces)] for name, pieces in sorted(self.vectors.items())]
        tables = [os.path.basename(piece.path) for piece in self.table_parts]
        return digest([vectors, tables, self.key, self.caption])[:32]

    @cached_property
    def sample(self) -> str:
        """Hash of evenly spaced rows when the pool was made."""
        return self._sampled()

    def _sampled(self) -> str:
        at = np.unique(np.linspace(0, self.rows - 1, _SAMPLED).astype(np.int64))
        return digest(*(to_float32(self.raw_at(name, at)) for name in sorted(self.vectors)))

    def changed(self) -> bool:
        """Return whether evenly spaced rows have other values than when the pool was first used."""
        return self._sampled() != self.sample

    def __getstate__(self) -> dict[str, Any]:
        """Pickle with the hashes of the values, so that a copy need not compute them again."""
        return {**vars(self), "version": self.version, "fingerprint": self.fingerprint}

    def files(self) -> list[tuple[str, str]]:
        """Return the file of the metadata."""
        return [(piece.protocol, piece.path) for piece in self.table_parts]


def _pieces(role: str, value: Any, frame: Any, folder: str) -> tuple[ArrayPiece, ...]:
    """Return vectors as pieces, one per chunk of memory."""
    if isinstance(value, str) and frame is None:
        raise UsageError(f"{role} = {value!r} names a column; give its table too, with table=")
    if _is_table(value):
        raise UsageError(f"{role} is a whole table; give it as table=, and the name of its column as {role}=")
    if not isinstance(value, str) and (column := _column(role, value)) is not None:
        import pyarrow as pa

        frame, value = pa.table({role: column}), role
    parts = _of_column(role, frame, value) if isinstance(value, str) else [_of_array(role, value)]
    return tuple(ArrayPiece(array, dtype, f"{IN_MEMORY}{role}", folder) for array, dtype in parts)


def _column(role: str, value: Any) -> Any:
    """Return a column of a frame, an Arrow array or vectors one by one as an Arrow array, None for anything else."""
    import pyarrow as pa

    if isinstance(value, (pa.Array, pa.ChunkedArray)):
        return value
    one_by_one = isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 1
    if one_by_one or isinstance(value, (list, tuple)) and any(row is None for row in value):
        return _cells_of(role, list(value))
    return _cells_of(role, value) if _top(value) in ("pandas", "polars") else None


def by_position(values: Any) -> Any:
    """Return values that are indexed by position: a series of pandas is indexed by label."""
    return values.iloc if hasattr(values, "iloc") else values


def array_of(value: Any) -> Array:
    """Return an array, a tensor or a list of numbers as a NumPy array, without a copy where possible.

    Raises:
        UsageError: It is a tensor whose values NumPy cannot read.
    """
    return _of_tensor(value) if _top(value) == "torch" else np.asarray(value)


def _of_tensor(value: Any, bits: bool = False) -> Array:
    """Return a tensor as an array; bfloat16, which NumPy does not have, as float32, or with ``bits`` as uint16."""
    try:
        here = value.detach().cpu()
        if str(here.dtype) == "torch.bfloat16":
            import torch

            here = here.contiguous().view(torch.uint16) if bits else here.float()
        return np.asarray(here.numpy())
    except (TypeError, RuntimeError) as error:
        raise UsageError(
            f"cannot read a tensor of {value.dtype}, {str(value.layout).removeprefix('torch.')}, on {value.device} "
            f"({_first_line(error)}); give a dense one of float16, float32, float64 or bfloat16"
        ) from None


def _first_line(error: Exception) -> str:
    return shortened(visible(str(error).partition("\n")[0]), 200)


def _of_array(role: str, value: Any) -> tuple[Array, str]:
    """Return an array or a tensor as stored, and its type; without a copy where possible."""
    if isinstance(value, np.ma.MaskedArray):
        value = value.filled(np.nan) if value.dtype.kind == "f" else value
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        return _plain(role, _of_tensor(value, bits=True), "bfloat16")
    try:
        array = array_of(value)
    except ValueError:
        raise UsageError(f"{role}: the vectors differ in length; {_GIVE}") from None
    except TypeError as error:  # of arrays of other libraries
        raise UsageError(f"{role}: {type(value).__name__}: {_first_line(error)}; {_GIVE}") from None
    if array.dtype.name == "bfloat16":  # of ml_dtypes
        return _plain(role, array.view(np.uint16), "bfloat16")
    if array.dtype.name not in FLOATS and array.dtype.kind in "biuf":
        raise UsageError(
            f"{role}: {type(value).__name__} of {array.dtype}; vectors are of float16, float32, float64 or bfloat16: "
            "convert them, as numpy.asarray(x, 'float32')"
        )
    if array.dtype.name not in FLOATS:
        raise UsageError(
            f"{role}: {type(value).__name__} of {array.dtype}; {_GIVE}, of float16, float32, float64 or bfloat16"
        )
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return _plain(role, array, array.dtype.name)


def _plain(role: str, array: Array, dtype: str) -> tuple[Array, str]:
    if array.ndim and not len(array):
        raise UsageError("there are no rows")
    if array.ndim != 2 or not array.shape[1]:
        flat = ", as x.reshape(len(x), -1)" if array.ndim > 2 else ""
        raise UsageError(f"{role}: has shape {array.shape}; give (rows, dimensions){flat}")
    if array.shape[1] > DIMENSIONS:
        raise UsageError(f"{role}: has {array.shape[1]:,} dimensions; embeddings have at most {DIMENSIONS:,}")
    view = array.view(np.ndarray)[:]
    view.flags.writeable = False
    return view, dtype


def _of_column(role: str, frame: Any, name: str) -> list[tuple[Array, str]]:
    """Return a column of vectors as arrays, one per chunk; rows without a vector are NaN."""
    import pyarrow as pa

    if name not in frame.column_names:
        raise UsageError(
            f"{role} = {name!r}: no such column; there are {', '.join(frame.column_names)}."
            f"{suggest(name, frame.column_names)}"
        )
    column = frame.select([name])
    if len(column) < _SHORT * column.column(0).num_chunks:  # of a shuffled Dataset, each row is a chunk
        column = column.combine_chunks()
    parts = [plain_batch(part) for part in column.to_batches() if len(part)]
    if not parts:
        raise UsageError("there are no rows")
    kind = parts[0].schema.types[0]
    if not _is_vector_type(kind):
        raise UsageError(
            f"{role} = {name!r}: contains {shortened(visible(str(kind)), 100)}; vectors are lists of float16, float32 "
            f"or float64: give them as an array, as {role}=numpy.asarray(list(table[{name!r}]), 'float32')"
        )
    dtype = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}[kind.value_type]
    if pa.types.is_fixed_size_list(kind):
        dim = kind.list_size
    else:
        dim = first_length(part.column(0) for part in parts)
    if not dim:
        raise UsageError(f"{role} = {name!r}: no row has a vector")
    return [(_plain(role, vectors_of(part.column(0), dim, dtype), dtype)) for part in parts]


# --- metadata -------------------------------------------------------------------------------------


def _metadata(
    frame: Any, used: Sequence[str], n: int, keys: Any, captions: Any, images: Any
) -> tuple[Any, Options, Pictures | None]:
    """Return the table of metadata without vectors and images, the options to read it with, and the images."""
    import pyarrow as pa

    shown = None
    if isinstance(images, str):
        if frame is None or images not in frame.column_names:
            raise UsageError(f"images = {images!r}: no such column of the table; give its name, or the images")
        shown = Pictures(_cells(frame, images))
    elif callable(images):
        shown = Pictures(images)
    elif images is not None:
        if len(images) != n:
            raise UsageError(f"{len(images):,} images for {n:,} rows; give one for each row, None for none")
        shown = Pictures(by_position(images).__getitem__)
    columns: dict[str, Any] = {}
    if frame is not None:
        texts = {*KEYS, *CAPTIONS, *(name for name in (keys, captions) if isinstance(name, str))}
        for name, kind in zip(frame.column_names, frame.schema.types, strict=True):
            if name in used or _is_vector_type(kind):
                continue
            if _is_picture(kind) and name not in texts:
                shown = shown or Pictures(_cells(frame, name))
                continue
            columns[name] = frame.column(name)
    roles = {}
    for role, value in (("key", keys), ("caption", captions)):
        if value is None or isinstance(value, str):
            roles[role] = value
            continue
        if role in columns:
            raise UsageError(f"the table has a column {role!r} too; name it, as {role}s={role!r}, or leave it out")
        try:
            cells = pa.array(value.tolist() if hasattr(value, "tolist") else list(value))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UsageError(f"the {role}s are not values of one type ({_first_line(error)})") from None
        if len(cells) != n:
            raise UsageError(f"{len(cells):,} {role}s for {n:,} rows; give one for each row")
        columns[role], roles[role] = cells, role
    for role, name in roles.items():
        if name is not None and name not in columns and (role, name) != ("key", NO_KEY):
            raise UsageError(
                f"no column {name!r} for the {role}s; there are {', '.join(columns) or 'none'}.{suggest(name, columns)}"
            )
    made = pa.table(columns) if columns else None
    return made, Options(key=roles["key"], caption=roles["caption"]), shown


class Pictures:
    """The images of a pool in memory, by row; a pickled copy has none."""

    def __init__(self, of: Callable[[int], Picture] = lambda row: None) -> None:
        """Store the function that returns the image of a row."""
        self._of = of

    def __reduce__(self) -> tuple[type[Pictures], tuple[()]]:
        """Pickle without the images, which only this process needs."""
        return Pictures, ()

    def __call__(self, row: int) -> bytes:
        """Return the bytes of the image of a row, b"" if there is none."""
        try:
            value = self._of(row)
        except Exception as error:  # of the function of a user
            raise UsageError(f"the image of row {row:,}: {type(error).__name__}: {_first_line(error)}") from error
        if hasattr(value, "thumbnail"):  # an image of PIL
            value = value.copy()
            value.thumbnail((_SIDE, _SIDE))
        try:
            data = bytes_of(value, f"the image of row {row:,}")
        except PoolError:  # a page shows the row without it, as for files
            return b""
        return data if len(data) <= _PICTURE else b""


def _without_images(dataset: Any, images: Any) -> tuple[Any, Any]:
    """Return a Hugging Face Dataset without its images, and the images, which are read only when they are shown."""
    names = [name for name, kind in dataset.features.items() if type(kind).__name__ == "Image"]
    if not names or not (images is None or images in names):
        return dataset.remove_columns(names), images
    shown = dataset.select_columns([images or names[0]])
    return dataset.remove_columns(names), lambda row: next(iter(shown[row].values()))


def _cells(frame: Any, name: str) -> Callable[[int], Picture]:
    column = frame.column(name)
    return lambda row: column[row].as_py()


def _written(frame: Any, folder: Path) -> tuple[str, Pin]:
    """Write a table to a Parquet file that has the name of its content."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    try:
        pq.write_table(frame, file)
    except pa.ArrowException as error:
        raise UsageError(f"the table cannot be stored ({_first_line(error)}); leave the column out") from None
    data = file.getbuffer()
    path = str(folder / f"{hashlib.sha256(data).hexdigest()[:32]}.parquet")
    while (held := pin(path)) is None:
        with writing(path) as scratch:
            Path(scratch).write_bytes(data)
    return path, held


# --- kinds ----------------------------------------------------------------------------------------


def _class_of(value: Any) -> tuple[str, str]:
    """Return the package and the name of the first class of a value that belongs to a library known here."""
    for cls in type(value).__mro__:  # a GeoDataFrame is a frame of pandas
        package = cls.__module__.partition(".")[0]
        if package in ("torch", "pandas", "polars", "pyarrow", "datasets"):
            return package, cls.__name__
    return "", ""


def _top(value: Any) -> str:
    return _class_of(value)[0]


def _is_table(value: Any) -> bool:
    """Return whether a value is a table: a frame, an Arrow table, a Dataset, or a dictionary of columns."""
    package, name = _class_of(value)
    tables = ("DataFrame", "Table", "RecordBatch", "Dataset", "LazyFrame", "IterableDataset")
    return isinstance(value, Mapping) or name in tables and package != "torch"


def _arrow(table: Any) -> Any:
    """Return a table as an Arrow table, without a copy where possible."""
    import pyarrow as pa

    top, name = _class_of(table)
    try:
        if isinstance(table, pa.Table):
            return table
        if isinstance(table, pa.RecordBatch):
            return pa.Table.from_batches([table])
        if top == "pandas":
            return pa.table(dict(_columns_of_pandas(table)))
        if top == "polars":
            table = table.collect() if name == "LazyFrame" else table
            return pa.table({column.name: _cells_of(column.name, column) for column in table})
        if top == "datasets" and name == "Dataset":
            return table.with_format("arrow")[:]
        if top == "datasets" and isinstance(table, Mapping):
            raise UsageError(f"this has the splits {', '.join(map(repr, table))}; give one of them")
        if top == "datasets":
            raise UsageError(f"an {name} has no row numbers; load it as a Dataset, without streaming=True")
        if isinstance(table, Mapping):
            return pa.table({str(column): _cells_of(str(column), values) for column, values in table.items()})
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise UsageError(f"the table cannot be read as columns ({_first_line(error)})") from None
    raise UsageError(
        f"table: {type(table).__name__}; give a pandas or polars frame, an Arrow table, a Hugging Face Dataset or a "
        "dictionary of columns"
    )


def _columns_of_pandas(frame: Any) -> Iterator[tuple[str, Any]]:
    """Yield the columns of a pandas frame, and its index if that has a name."""
    names = [str(name) for name in frame.columns]
    if repeated := next((name for name, count in Counter(names).items() if count > 1), None):
        raise UsageError(f"the table has several columns {repeated!r}; rename or leave out all but one")
    for i, name in enumerate(names):
        yield name, _cells_of(name, frame.iloc[:, i])
    if frame.index.name is not None and str(frame.index.name) not in names:
        yield str(frame.index.name), _cells_of(str(frame.index.name), frame.index)


def _cells_of(name: str, values: Any) -> Any:
    """Return the values of a column as an Arrow array, without a copy where possible.

    Raises:
        UsageError: They are not of one type, or of a type that has no columns.
    """
    import pyarrow as pa

    if _top(values) == "polars" and str(values.dtype) != "Object":
        return values.to_arrow()
    try:
        if _top(values) in ("pandas", "pyarrow"):
            return pa.array(values) if _top(values) == "pandas" else values
        if hasattr(values, "__array__"):
            values = array_of(values)
            return pa.array(list(values) if values.ndim > 1 else values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        pass  # one by one, because tensors are arrays too
    try:
        return pa.array([array_of(value) if hasattr(value, "__array__") else value for value in values])
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError, OverflowError) as error:
        raise UsageError(
            f"the column {name!r} has values of several types, or of a type that no column can have "
            f"({_first_line(error)}); convert it, as to text, or leave it out"
        ) from None


def _which(frame: Any, vectors: Sequence[str]) -> str:
    """Return a message that asks for the column with vectors."""
    if not frame.num_columns:
        return f"the table has no columns; {_GIVE}"
    names = list(vectors) or frame.column_names
    listed = [f"{shortened(visible(name), 40)!r}" for name in names[:10]] + ["..."] * (len(names) > 10)
    if vectors:
        given = f"thresher.from_arrays(table=..., image={vectors[0]!r})"
        return f"the columns {', '.join(listed)} have vectors; say which column has those to use: {given}"
    if len(names) == 1:
        listed = [f"{listed[0]}, of {shortened(visible(str(frame.schema.types[0])), 100)}"]
    numbers = all(map(_is_number, frame.schema.types))
    give = "image=numpy.asarray(table, 'float32') if every column is one dimension" if numbers else "them as image="
    return f"no column has vectors, lists of float16, float32 or float64; there are {', '.join(listed)}; give {give}"


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _is_vectors(frame: Any, name: str) -> bool:
    return _is_vector_type(frame.schema.field(name).type)


def _is_vector_type(kind: Any) -> bool:
    """Return whether values of an Arrow type are lists of floats."""
    import pyarrow as pa

    kind = plain_type(getattr(kind, "storage_type", kind))
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and pa.types.is_floating(kind.value_type))


def _is_picture(kind: Any) -> bool:
    """Return whether values of an Arrow type may be images: bytes, or a struct with bytes."""
    import pyarrow as pa

    of = pa.types
    if of.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(of.is_binary(kind) or of.is_large_binary(kind))
