"""Columns of tables: the usual names by content, and the text of a column of any Arrow type.

Keys are compared as text. :func:`as_text` is the only place that says what this text is:

- text (string, large_string, string_view) and dictionaries: their values;
- binary (binary, large_binary, binary_view): UTF-8, or it is refused;
- UUIDs (``arrow.uuid`` and fixed_size_binary[16]): 32 hexadecimal digits as 8-4-4-4-12;
- integers, booleans, decimals, dates, times, timestamps and durations: what Arrow's own cast to text writes;
- floats, other fixed_size_binary, lists, structs and maps: refused.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from thresher.errors import UsageError
from thresher.io.paths import visible

KEYS = ("uid", "key", "id", "__key__", "image_path")  # not URLs: pools repeat them
NO_KEY = "row"  # requests row numbers as keys, unless a column has this name
CAPTIONS = ("text", "texts", "caption", "captions", "title", "TEXT", "alt_text")
# Of the names of image files.
FILES = ("file_name", "filename", "filepath", "image_path", "image", "path", "image_name", "images", "name")
IMAGES = ("image", "thumbnail", "jpg", "png", "image_path", "path", "filepath")
ADDRESSES = ("url", "urls", "image_url", "img_url", "image_link")  # of images on the internet
SCORES = ("clip_l14_similarity_score", "clip_b32_similarity_score", "similarity", "clip_score", "clip_similarity")

_UUID = 16  # bytes


def known(columns: Iterable[str], usual: Sequence[str]) -> list[str]:
    """Return the columns with usual names, in the order of ``usual``; case and blanks around a name do not count."""
    own: dict[str, str] = {}
    for column in columns:
        own.setdefault(column.strip().lower(), column)
    return list(dict.fromkeys(own[name.lower()] for name in usual if name.lower() in own))


# --- types ----------------------------------------------------------------------------------------


def plain_type(kind: Any) -> Any:
    """Return the Arrow type with the same values that Arrow can filter and take from: no views, no runs, no tensors."""
    import pyarrow as pa

    if isinstance(kind, pa.FixedShapeTensorType):
        return kind.storage_type
    if pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_list_view(kind):
        return pa.list_(_without_views(kind.value_field))
    if pa.types.is_large_list_view(kind):
        return pa.large_list(_without_views(kind.value_field))
    return _without_views(pa.field("", kind)).type


def _without_views(field: Any, decode: bool = False) -> Any:
    """Return a field with large text and bytes instead of views, which Arrow can cast to; lists of views stay.

    With ``decode``, also with the values of dictionaries instead of them.
    """
    import pyarrow as pa

    kind, of = field.type, pa.types
    if of.is_dictionary(kind):
        values = _without_views(field.with_type(kind.value_type))
        return values if decode else field.with_type(pa.dictionary(kind.index_type, values.type, kind.ordered))
    if of.is_string_view(kind):
        return field.with_type(pa.large_string())
    if of.is_binary_view(kind):
        return field.with_type(pa.large_binary())
    if of.is_list(kind):
        return field.with_type(pa.list_(_without_views(kind.value_field, decode)))
    if of.is_large_list(kind):
        return field.with_type(pa.large_list(_without_views(kind.value_field, decode)))
    if of.is_fixed_size_list(kind):
        return field.with_type(pa.list_(_without_views(kind.value_field, decode), kind.list_size))
    if of.is_map(kind):
        key, item = (_without_views(one, decode) for one in (kind.key_field, kind.item_field))
        return field.with_type(pa.map_(key, item, keys_sorted=kind.keys_sorted))
    if of.is_struct(kind):
        return field.with_type(pa.struct([_without_views(kind.field(i), decode) for i in range(kind.num_fields)]))
    return field


def plain_schema(schema: Any) -> Any:
    """Return a schema with plain types, see :func:`plain_type`, and the same metadata."""
    import pyarrow as pa

    return pa.schema([field.with_type(plain_type(field.type)) for field in schema], schema.metadata)


def decoded_schema(schema: Any) -> Any:
    """Return a schema of plain types with the values of dictionaries instead of them; batches can be cast to it."""
    import pyarrow as pa

    return pa.schema([_without_views(field, True) for field in plain_schema(schema)], schema.metadata)


def plain_batch(batch: Any) -> Any:
    """Return a record batch with plain types, see :func:`plain_type`; the same batch if it has no others."""
    return cast_batch(batch, plain_schema(batch.schema))


def cast_batch(batch: Any, schema: Any) -> Any:
    """Return a record batch cast to the types of a schema; columns of the same type are not touched."""
    import pyarrow as pa

    if schema.equals(batch.schema):
        return batch
    cells = [_cast(column, field.type) for column, field in zip(batch.columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(cells, schema=schema)


def _cast(column: Any, kind: Any) -> Any:
    """Cast an array, also where Arrow's own cast makes invalid arrays: list views, and slices of structs with nulls."""
    import pyarrow as pa
    import pyarrow.compute as pc

    own, of = column.type, pa.types
    if own.equals(kind):
        return column
    if isinstance(own, pa.FixedShapeTensorType):
        return _cast(column.storage, kind)
    if of.is_run_end_encoded(own):
        return _cast(pc.run_end_decode(column), kind)
    if of.is_dictionary(own):  # Arrow takes no values of dictionaries of views, as of polars' Categorical
        values = _cast(column.dictionary, plain_type(own.value_type))
        plain = pa.DictionaryArray.from_arrays(column.indices, values, ordered=own.ordered)
        return plain if plain.type.equals(kind) else plain.cast(kind)
    views = of.is_list_view(own) or of.is_large_list_view(own)
    if views or (of.is_list(own) or of.is_large_list(own)) and of.is_dictionary(own.value_type):
        lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        ends = pa.array(np.append(0, np.cumsum(lengths, dtype=np.int64)))
        cells = column.flatten() if views else _cast(column.flatten(), kind.value_type)
        return pa.LargeListArray.from_arrays(ends, cells, mask=column.is_null()).cast(kind)
    if of.is_struct(own) and of.is_struct(kind) and own.num_fields == kind.num_fields:
        fields = [kind.field(i) for i in range(kind.num_fields)]
        cells = [_cast(column.field(i), field.type) for i, field in enumerate(fields)]
        return pa.StructArray.from_arrays(cells, fields=fields, mask=column.is_null())
    return column.cast(kind)


def stored_type(kind: Any) -> Any:
    """Return the type of the values of a dictionary or an extension type, as :func:`plain_type`."""
    import pyarrow as pa

    while True:
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        elif isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        else:
            return plain_type(kind)


def is_words(kind: Any) -> bool:
    """Return whether values of an Arrow type are text or bytes, possibly in a dictionary."""
    import pyarrow as pa

    kind = stored_type(kind)
    return is_text(kind) or bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_text(kind: Any) -> bool:
    """Return whether values of an Arrow type are text, possibly in a dictionary."""
    import pyarrow as pa

    kind = stored_type(kind)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_uuid(kind: Any) -> bool:
    """Return whether values of an Arrow type are UUIDs, or 16 bytes."""
    import pyarrow as pa

    kind = stored_type(kind)
    return bool(pa.types.is_fixed_size_binary(kind)) and kind.byte_width == _UUID


def is_caption(kind: Any) -> bool:
    """Return whether values of an Arrow type are captions: text or bytes, or lists of them."""
    inner = _element(stored_type(kind))
    return is_words(kind) if inner is None else is_words(inner)


def element_of(kind: Any) -> Any:
    """Return the type of the elements of a list type, without dictionaries; of other types the type itself."""
    kind = stored_type(kind)
    inner = _element(kind)
    return kind if inner is None else stored_type(inner)


def is_bytes_list(kind: Any) -> bool:
    """Return whether values of an Arrow type are bytes as lists of numbers."""
    import pyarrow as pa

    inner = _element(stored_type(kind))
    return inner is not None and bool(pa.types.is_uint8(inner))


def _element(kind: Any) -> Any:
    """Return the type of the elements of a list type, after :func:`plain_type`; None for other types."""
    import pyarrow as pa

    is_list = any(is_it(kind) for is_it in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))
    return kind.value_type if is_list else None


def not_text(kind: Any) -> str | None:
    """Return why values of an Arrow type have no text that could be a key, None if they have one."""
    import pyarrow as pa

    kind, of = stored_type(kind), pa.types
    if of.is_floating(kind):
        return "floats are not keys"
    if of.is_fixed_size_binary(kind) and kind.byte_width != _UUID:
        return "only 16 bytes (a UUID) have a known text"
    simple = any(is_it(kind) for is_it in (of.is_primitive, of.is_boolean, of.is_decimal, of.is_null))
    if (simple and not of.is_interval(kind)) or is_words(kind) or is_uuid(kind):
        return None
    return "a key is one text or number, not a list, a struct or a map"


# --- values ---------------------------------------------------------------------------------------


def check_key(path: str, name: str, kind: Any) -> None:
    """Check that a column can be the key.

    Args:
        path: The file, for the message.
        name: The column.
        kind: Its Arrow type.

    Raises:
        UsageError: Values of this type cannot be keys.
    """
    if why := not_text(kind):
        raise _refused(path, name, kind, why)


def _refused(path: str, name: str, kind: Any, why: str) -> UsageError:
    return UsageError(
        f"{path}: the column {name!r} contains {visible(str(kind))} and cannot be the key: {why}; name a column of "
        f"text, numbers or UUIDs with --key, or pass --key {NO_KEY} for row numbers"
    )


def as_text(column: Any, path: str, name: str) -> Any:
    """Return the values of a key column as text: the same text in every reader and command.

    The module says what the text of each type is. Text is not copied.

    Args:
        column: Arrow array or chunked array.
        path: The file or pool, for the message.
        name: The column, for the message.

    Returns:
        Array or chunked array of large_string; nulls stay nulls.

    Raises:
        UsageError: Values of this type cannot be keys, or binary values are not UTF-8.
    """
    import pyarrow as pa

    kind = column.type
    if pa.types.is_large_string(kind):
        return column
    check_key(path, name, kind)
    if is_uuid(kind):
        return _map(column, lambda value: str(value if isinstance(value, uuid.UUID) else uuid.UUID(bytes=value)))
    try:
        return _values(column).cast(pa.large_string())
    except pa.ArrowInvalid:
        if not is_words(kind):
            raise
        raise _refused(path, name, kind, "its bytes are not UTF-8 text") from None


def _values(column: Any) -> Any:
    """Return a column without dictionaries, extension types and runs."""
    import pyarrow as pa
    import pyarrow.compute as pc

    while True:
        kind = column.type
        if pa.types.is_dictionary(kind):
            to = plain_type(kind.value_type)
            chunked = isinstance(column, pa.ChunkedArray)
            column = pa.chunked_array([_cast(one, to) for one in column.chunks], to) if chunked else _cast(column, to)
        elif isinstance(kind, pa.BaseExtensionType):
            column = column.cast(kind.storage_type)
        elif pa.types.is_run_end_encoded(kind):
            column = pc.run_end_decode(column)
        else:
            return column


def _map(column: Any, text_of: Any) -> Any:
    import pyarrow as pa

    texts = [None if value is None else text_of(value) for value in column.to_pylist()]
    made = pa.array(texts, pa.large_string())
    return pa.chunked_array([made]) if isinstance(column, pa.ChunkedArray) else made


def captions_in(column: Any) -> list[Any]:
    """Return the captions of a column: a text, a list of texts and None, or None for each row.

    Bytes are read as UTF-8, with U+FFFD for what is not; other values are written as :func:`as_text` does, or, if they
    have no text, as Python does.
    """
    inner = _element(stored_type(column.type))
    if is_words(column.type if inner is None else inner):
        cells: list[Any] = column.to_pylist()
        return cells if is_text(column.type) else [_decoded(value) for value in cells]
    if inner is None and not_text(column.type) is None:
        return list(as_text(column, "", "").to_pylist())
    return [
        None if value is None else [None if one is None else str(one) for one in value] if inner else str(value)
        for value in column.to_pylist()
    ]


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8-sig", "replace")
    return [_decoded(one) for one in value] if isinstance(value, list) else value
