"""Parquet for the Hugging Face Hub: chunks by content, row groups for the viewer, and columns declared as images.

With chunks by content, a row that is added or removed changes only the pages around it: of the next version of a file,
the Hub stores and transfers only these. The viewer reads pages by their index, and refuses row groups above 300 MB; it
shows images of columns that the features of ``datasets`` declare as such.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from thresher.errors import MissingPackageError
from thresher.runtime.untrusted import parse_json

GROUP_ROWS = 10_000  # rows of a row group
GROUP_BYTES = 100 << 20  # as ``datasets`` writes them
_FEATURES = b"huggingface"
# Arrow types whose name is that of a ``Value``; timestamps, times, durations and decimals have parameters.
_VALUES = frozenset(
    "null bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 string large_string binary "
    "large_binary date32 date64 string_view binary_view".split()
)
_RENAMED = {"halffloat": "float16", "float": "float32", "double": "float64", "date32[day]": "date32"}
_WITH_PARAMETERS = ("timestamp[", "time32[", "time64[", "duration[", "decimal128(", "decimal256(")


def writer_options() -> dict[str, Any]:
    """Return the options of ``pyarrow.parquet.ParquetWriter``.

    Raises:
        MissingPackageError: This pyarrow cannot write chunks by content.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if "use_content_defined_chunking" not in inspect.signature(pq.ParquetWriter.__init__).parameters:
        raise MissingPackageError(
            f"--for-hub needs pyarrow 21 or later, not {pa.__version__}; type: pip install -U pyarrow"
        )
    return {"use_content_defined_chunking": True, "write_page_index": True}


def with_features(schema: Any, picture: str | None) -> Any:
    """Return a schema whose metadata has the features of all columns, as ``datasets`` reads them.

    Features that are there already stay, if they describe these columns and declare the images. Images as bytes become
    structs of bytes and path, because ``datasets`` takes nothing else for images; see :func:`fitted`.

    Args:
        schema: The Arrow schema.
        picture: The column of images, None for none. If it contains paths it stays text.
    """
    metadata = dict(schema.metadata or {})
    features = _declared(metadata.get(_FEATURES), schema.names)
    is_image = picture is not None and _holds_images(schema.field(picture).type)
    if features is None:
        made = {field.name: _feature(field.type) for field in schema}
        features = {} if None in made.values() else made
    if is_image and features and picture is not None and not _has_image(features[picture]):
        features[picture] = {"_type": "Image"}
        field = schema.field(picture)
        schema = schema.set(schema.get_field_index(picture), field.with_type(_image_type(field.type)))
    if not features:  # a type that datasets does not have
        return schema
    return schema.with_metadata({**metadata, _FEATURES: json.dumps({"info": {"features": features}}).encode()})


def fitted(table: Any, schema: Any) -> Any:
    """Return a table with the types of a schema that :func:`with_features` returned for its own."""
    import pyarrow as pa

    for i, field in enumerate(schema):
        if (column := table.column(i)).type != field.type:  # images as bytes
            chunks = [
                pa.StructArray.from_arrays(
                    [one.cast(pa.binary()), pa.nulls(len(one), pa.string())],
                    fields=list(field.type),
                    mask=one.is_null(),
                )
                for one in column.chunks
            ]
            table = table.set_column(i, field, pa.chunked_array(chunks, field.type))
    return table


def _image_type(kind: Any) -> Any:
    import pyarrow as pa

    return kind if pa.types.is_struct(kind) else pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _declared(content: bytes | None, names: list[str]) -> dict[str, Any] | None:
    try:
        features = parse_json(content or b"")["info"]["features"]
        good = all(isinstance(features[name], (dict, list)) for name in names)
        return dict(features) if good and list(features) == names else None
    except (KeyError, TypeError, ValueError):
        return None


def _has_image(feature: Any) -> bool:
    todo = [feature]  # not recursive: features are untrusted, and may be nested deeply
    while todo:
        one = todo.pop()
        if isinstance(one, list):
            todo += one
        elif isinstance(one, Mapping):
            if one.get("_type") == "Image":
                return True
            todo.append(one.get("feature"))
    return False


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _feature(kind: Any) -> Any:
    """Return the feature of an Arrow type, None if there is none."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        inner = {kind.field(i).name: _feature(kind.field(i).type) for i in range(kind.num_fields)}
        return None if None in inner.values() else inner
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if (item := _feature(kind.value_type)) is None:
            return None
        if pa.types.is_large_list(kind):
            return {"feature": item, "_type": "LargeList"}
        length = {"length": kind.list_size} if pa.types.is_fixed_size_list(kind) else {}
        return [item] if pa.types.is_struct(kind.value_type) else {"feature": item, **length, "_type": "Sequence"}
    name = _RENAMED.get(str(kind), str(kind))
    return {"dtype": name, "_type": "Value"} if name in _VALUES or name.startswith(_WITH_PARAMETERS) else None
