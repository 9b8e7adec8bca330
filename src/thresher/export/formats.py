"""From a selection to files that training tools read; what could not be found is counted and listed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from thresher.errors import OutputError, UsageError, suggest
from thresher.io.open import open_file
from thresher.pool.store import EmbeddingStore, heavy, reopen, same_pool, whole_pool
from thresher.runtime.files import writing
from thresher.selection import Selection

Rows = npt.NDArray[np.int64]

_PATHS = ("filepath", "image_path", "path", "file_name", "image")
_DATA = (".npy", ".npz", ".parquet", ".pq")
_URLS = ("url", "URL", "image_url")


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: The file.
        rows: Rows written, repeats included.
        missing: Rows of the selection that could not be written, listed in ``missing_file``.
        missing_file: Where they are listed, "" when there are none.
        manifest: The JSON manifest, "" when none was asked for.
    """

    path: str
    rows: int
    missing: int
    missing_file: str
    manifest: str


def export(
    selection: Selection,
    kind: str,
    target: str | os.PathLike[str],
    *,
    store: EmbeddingStore | None = None,
    manifest: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Write a selection in a format of :func:`formats`.

    Args:
        selection: What to write.
        kind: Name of the format.
        target: File to write, atomically.
        store: The pool; opened again by default.
        manifest: Also write ``<target>.manifest.json``: recipe, and sha256 of all inputs and outputs.
        overwrite: Replace an existing file.

    Raises:
        UsageError: No such format, or the pool lacks what it needs.
        OutputError: The file exists or cannot be written.
    """
    known = formats()
    if kind not in known:
        raise UsageError(f"no format {kind!r}; there are {', '.join(known)}.{suggest(kind, known)}")
    path = Path(target)
    if store is None:
        store = reopen(selection)
    else:
        whole_pool(store)
        same_pool(selection, store)
    check_target(path, store, overwrite=overwrite, marked=manifest)
    with writing(path) as scratch:
        rows, missing = known[kind](selection, store, scratch)
    for ending in (".missing.txt", ".manifest.json"):  # those of an export that is replaced
        path.with_name(path.name + ending).unlink(missing_ok=True)
    outputs = [path]
    if missing:
        outputs.append(path.with_name(path.name + ".missing.txt"))
        with writing(outputs[1]) as scratch:
            Path(scratch).write_text("".join(f"{row}\t{key}\n" for row, key in missing), encoding="utf-8")
    listed = ""
    if manifest:
        listed = str(path.with_name(path.name + ".manifest.json"))
        with writing(listed) as scratch:
            found = _manifest(selection, store, kind, rows, len(missing), outputs)
            Path(scratch).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Exported(str(path), rows, len(missing), str(outputs[1]) if missing else "", listed)


def check_target(path: Path, store: EmbeddingStore | None, *, overwrite: bool, marked: bool = False) -> None:
    """Refuse a file that is in the way: an earlier result, a file of the pool, a part of a selection.

    Nor may it look like a new part of the pool, unless it will be ``marked`` by a manifest beside it.

    Raises:
        OutputError: Says which.
    """
    if store and str(path.resolve()) in {os.path.realpath(name) for kind, name in store.files() if kind == "file"}:
        raise OutputError(f"{path}: is a file of the pool; it is never overwritten")
    inside = store is not None and os.path.isdir(place := os.path.realpath(store.layout.location))
    if inside and path.suffix in _DATA and str(path.resolve()).startswith(place + os.sep) and not marked:
        raise OutputError(f"{path}: would be taken for a part of the pool it lies in; choose another place")
    if any((folder / "selection.json").exists() for folder in path.resolve().parents):
        raise OutputError(f"{path}: lies in a selection folder; choose another place")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; choose another name or pass --overwrite")


Writer = Callable[[Selection, EmbeddingStore, str], tuple[int, list[tuple[int, str]]]]


def formats() -> dict[str, Writer]:
    """Return the formats by name; each writer returns the rows written and the (row, key) not found."""
    return {
        "datacomp": _datacomp,
        "parquet": _parquet,
        "keys": _keys,
        "open_clip": _open_clip,
        "img2dataset": _img2dataset,
    }


# --- formats --------------------------------------------------------------------------------------


def _kept(selection: Selection, store: EmbeddingStore) -> Iterator[tuple[Rows, list[str], npt.NDArray[np.int64]]]:
    """Yield ids, keys and repeat counts of the kept rows, in order."""
    mask = selection.mask()
    for ids, keys in store.where(mask).keys():
        counts = np.ones(len(ids), np.int64) if selection.repeats is None else selection.repeats[ids].astype(np.int64)
        yield ids, keys, counts


def _datacomp(selection: Selection, store: EmbeddingStore, path: str) -> tuple[int, list[tuple[int, str]]]:
    """DataComp's subset: sorted (u8, u8) of the 32-hex uid, as often as the row is to be used."""
    parts: list[npt.NDArray[Any]] = []
    missing: list[tuple[int, str]] = []
    for ids, keys, counts in _kept(selection, store):
        uids, good = _uids(keys)
        missing += [(int(ids[i]), keys[i]) for i in np.flatnonzero(~good)]
        parts.append(np.repeat(uids[good], counts[good]))
    found = np.concatenate(parts) if parts else np.empty(0, "u8,u8")
    if missing and not len(found):
        raise UsageError(
            f"no key of {store.layout.location} is a DataComp uid (32 hexadecimal characters), such as "
            f"{missing[0][1]!r}; name the column with --key, or export --as keys"
        )
    found = found[np.lexsort((found["f1"], found["f0"]))]
    with open(path, "wb") as file:
        np.save(file, found, allow_pickle=False)
    return len(found), missing


def _uids(keys: list[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Decode uids, vectorised; marks which are 32 hexadecimal characters."""
    good = np.array([len(key) == 32 and key.isascii() for key in keys], np.bool_)
    text = "".join(key if ok else "0" * 32 for key, ok in zip(keys, good, strict=True)).encode()
    codes = np.frombuffer(text, np.uint8).reshape(-1, 32)
    values = np.full(256, 255, np.uint8)
    values[np.frombuffer(b"0123456789", np.uint8)] = np.arange(10)
    values[np.frombuffer(b"abcdef", np.uint8)] = values[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)
    digits = values[codes]
    good &= (digits < 16).all(axis=1)
    pairs = ((digits[:, 0::2] & 15) << 4 | (digits[:, 1::2] & 15)).astype(np.uint8)
    halves = np.ascontiguousarray(pairs).view(">u8").astype(np.uint64)
    out = np.empty(len(keys), "u8,u8")
    out["f0"], out["f1"] = halves[:, 0], halves[:, 1]
    return out, good


def _parquet(selection: Selection, store: EmbeddingStore, path: str) -> tuple[int, list[tuple[int, str]]]:
    """One row per pool row: row, key, kept, step, reason, duplicate_of, score, and repeats where there are some."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("key", pa.string()),
            ("kept", pa.bool_()),
            ("step", pa.string()),
            ("reason", pa.string()),
            ("duplicate_of", pa.int64()),
            ("score", pa.float32()),
        ]
    )
    if selection.repeats is not None:
        schema = schema.append(pa.field("repeats", pa.int32()))
    score, twin = evidence(selection)
    given = [selection.given(step) for step in range(len(selection.steps))]
    names = [step.method for step in selection.steps]
    with pq.ParquetWriter(path, schema) as writer:
        for ids, keys in store.keys():
            by = np.asarray(selection.dropped_by[ids])
            reasons = ["kept"] * len(ids)
            for number, step in enumerate(selection.steps):
                at = np.flatnonzero(by == number)
                for i, place in zip(at, np.searchsorted(given[number], ids[at]), strict=True):
                    reasons[i] = step.why(int(place))
            columns = [ids, keys, by == -1, [names[b] if b >= 0 else "" for b in by], reasons, twin[ids], score[ids]]
            columns += [] if selection.repeats is None else [selection.repeats[ids]]
            writer.write_table(
                pa.table([pa.array(c, kind) for c, kind in zip(columns, schema.types, strict=True)], schema=schema)
            )
    return selection.total, []


def evidence(selection: Selection) -> tuple[npt.NDArray[np.float32], Rows]:
    """Return score and duplicate of every row of the pool, from the last step that judged it.

    Returns:
        (N,) float32, NaN where no step gave one, and (N,) int64, -1 where the row duplicates none.
    """
    score = np.full(selection.total, np.nan, np.float32)
    twin = np.full(selection.total, -1, np.int64)
    for number, step in enumerate(selection.steps):
        ids = selection.given(number)
        if "score" in step.rows:
            score[ids] = step.rows["score"]
        if "duplicate_of" in step.rows:
            twin[ids] = step.rows["duplicate_of"]
    return score, twin


def _keys(selection: Selection, store: EmbeddingStore, path: str) -> tuple[int, list[tuple[int, str]]]:
    """One key a line."""
    written = 0
    missing: list[tuple[int, str]] = []
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for ids, keys, counts in _kept(selection, store):
            for row, key, count in zip(ids, keys, counts, strict=True):
                if "\n" in key or "\r" in key:  # would read back as two keys
                    missing.append((int(row), repr(key)))
                    continue
                file.write(f"{key}\n" * int(count))
                written += int(count)
    return written, missing


def _open_clip(selection: Selection, store: EmbeddingStore, path: str) -> tuple[int, list[tuple[int, str]]]:
    """open_clip's csv: tab separated, columns filepath and title."""
    import csv

    column = next((found for found in (_path_column(store, name) for name in _PATHS) if found), None)
    if column is None or store.layout.caption is None:
        raise UsageError(
            f"open_clip's csv needs a caption and a column of image paths ({', '.join(_PATHS)}); "
            f"{store.layout.location} has {', '.join(store.columns) or 'no metadata'}"
        )
    written = 0
    missing: list[tuple[int, str]] = []
    with open(path, "w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, delimiter="\t", lineterminator="\n")
        lines.writerow(["filepath", "title"])
        for ids, part in store.where(selection.mask()).scan([column, store.layout.caption]):
            cells = part.column(0).to_pylist()
            for row, cell, title in zip(ids.tolist(), cells, part.column(1).to_pylist(), strict=True):
                name = cell.get("path") if isinstance(cell, dict) else cell
                if not isinstance(name, str) or not name or ".." in name.split("/") or not str(title or "").strip():
                    missing.append((row, str(name or "")))
                    continue
                count = 1 if selection.repeats is None else int(selection.repeats[row])
                lines.writerows([[name, " ".join(str(title).split())]] * count)
                written += count
    return written, missing


def _img2dataset(selection: Selection, store: EmbeddingStore, path: str) -> tuple[int, list[tuple[int, str]]]:
    """Parquet that img2dataset takes as input list: key, url, caption, and the other metadata columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    url = next((name for name in _URLS if name in store.columns), None)
    if url is None:
        raise UsageError(
            f"img2dataset needs a column of addresses ({', '.join(_URLS)}); {store.layout.location} has "
            f"{', '.join(store.columns) or 'no metadata'}"
        )
    light = [name for name in store.columns if not heavy(store, name)]
    given = {"url": url, "key": store.layout.key, "caption": store.layout.caption}
    sources = {name: source for name, source in given.items() if source}  # one column may serve as two
    sources |= {name: name for name in light if name not in sources and name not in sources.values()}
    columns = list(dict.fromkeys(sources.values()))
    kinds = pa.unify_schemas([table.schema(columns) for table in store.layout.tables], promote_options="permissive")
    schema = pa.schema([kinds.field(source).with_name(name) for name, source in sources.items()])
    written = 0
    missing: list[tuple[int, str]] = []
    with pq.ParquetWriter(path, schema) as writer:
        for ids, part in store.where(selection.mask()).scan(columns):
            cells = [part.column(columns.index(source)) for source in sources.values()]
            table = pa.table([c.cast(f.type) for c, f in zip(cells, schema, strict=True)], schema=schema)
            found = np.asarray(table.column("url").is_valid())
            keys = table.column("key") if "key" in sources else None
            missing += [(int(ids[i]), str(keys[int(i)].as_py()) if keys else "") for i in np.flatnonzero(~found)]
            counts = found.astype(np.int64)
            if selection.repeats is not None:
                counts *= selection.repeats[ids]
            table = table.take(np.repeat(np.arange(len(ids)), counts))
            writer.write_table(table)
            written += len(table)
    return written, missing


def _path_column(store: EmbeddingStore, name: str) -> str | None:
    """Return the column to read for paths, ``name.path`` of structs, without their pictures; None if it has none."""
    import pyarrow as pa

    if name not in store.columns:
        return None
    kinds = [table.schema([name]).field(0).type for table in store.layout.tables]
    if all(pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 for kind in kinds):
        return f"{name}.path"
    words = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    return name if all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in words) else None


# --- manifest -------------------------------------------------------------------------------------


def _manifest(
    selection: Selection, store: EmbeddingStore, kind: str, rows: int, missing: int, outputs: list[Path]
) -> dict[str, Any]:
    return {
        "format": kind,
        "rows": rows,
        "missing": missing,
        "selection": selection.header(),
        "options": asdict(store.options),
        "inputs": [_entry(protocol, path) for protocol, path in store.files()],
        "outputs": [_entry("file", str(path)) for path in outputs],
    }


def _entry(protocol: str, path: str) -> dict[str, Any]:
    with open_file(protocol, path) as file:
        digest, size = _sha256(file)
    return {"path": path, "bytes": size, "sha256": digest}


def _sha256(file: IO[bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(1 << 20):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size
