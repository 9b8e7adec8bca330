"""Write a selection as a file for a training tool; rows that cannot be written are counted and listed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from thresher.errors import OutputError, UsageError
from thresher.export.registry import Export, build, writes_folder
from thresher.io.open import file_stamp, open_file
from thresher.io.places import located, place
from thresher.pool.store import EmbeddingStore, reopen, same_pool, whole_pool
from thresher.runtime import locks, parameters
from thresher.runtime.files import check_writable
from thresher.runtime.places import AnyPath, RemotePath
from thresher.runtime.plugins import origin_of
from thresher.runtime.progress import Advance, Progress, Silent
from thresher.runtime.results import record_in, refuse_other, result_files
from thresher.selection import Selection

_DATA = (".npy", ".npz", ".parquet", ".pq")
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # could be read as a new line or column
_CHUNK = 1 << 20  # bytes hashed at a time


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        path: The file.
        rows: Rows written, including repeats.
        missing: Rows of the selection that could not be written, listed in ``missing_file``.
        missing_file: The list of these rows, "" if there are none.
        manifest: The JSON manifest, "" if it was not requested.
    """

    path: str
    rows: int
    missing: int
    missing_file: str
    manifest: str


def export(
    selection: Selection,
    kind: str | Export,
    target: str | os.PathLike[str] | RemotePath,
    *,
    store: EmbeddingStore | None = None,
    manifest: bool = True,
    hash_inputs: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a selection in one of the formats of :data:`thresher.export.registry.EXPORTS`.

    Args:
        selection: The selection to write.
        kind: Name of a format, or a format object with options.
        target: File to write; replaced atomically. If the same export is there already, nothing is changed.
        store: The pool; by default it is opened from its recorded location.
        manifest: Also write ``<target>.manifest.json``: recipe, size and time of all inputs, SHA-256 of the outputs.
        hash_inputs: Add the SHA-256 of the inputs to the manifest; this reads every file of the pool.
        overwrite: Replace a different file.
        progress: Shows the number of bytes hashed.

    Raises:
        UsageError: Unknown format, or the pool does not have what it needs.
        PoolError: The pool is damaged, or changed while it was exported.
        OutputError: A different file exists, another process is writing it, or it cannot be written.
    """
    made = build(kind, {}) if isinstance(kind, str) else kind
    path = place(target)
    if store is None:
        store = reopen(selection)
    else:
        whole_pool(store)
        same_pool(selection, store)
    if writes_folder(made):
        return _export_folder(selection, made, path, store, hash_inputs, overwrite, progress or Silent())
    check_target(path, store, marked=manifest)
    listed, missing_file = (path.with_name(path.name + ending) for ending in (".manifest.json", ".missing.txt"))
    requested = _request(selection, made, store)
    if manifest and not overwrite and path.exists() and listed.exists():
        refuse_other(path, record_in(listed), requested)
    progress = progress or Silent()
    with locks.holding(path.with_name(f".{path.name}.lock"), str(path), wait=False) as still_held:
        # The file itself is moved into place last: it is never without its manifest.
        beside = (listed, missing_file)
        with result_files(overwrite=overwrite, say=progress.say, replaces=beside) as new:
            made_files = {path: new(path)}
            written = made.write(selection, store, str(made_files[path]))
            if written.missing and not written.rows:
                lacks = written.lacks or "what this format needs"
                raise UsageError(
                    f"--as {made.name}: no selected row has {lacks}, so the file would be empty; --as parquet and "
                    "--as csv write rows of any kind"
                )
            if written.missing:
                text = "".join(f"{row}\t{_one_line(key)}\n" for row, key in written.missing)
                made_files[missing_file] = new(missing_file)
                made_files[missing_file].write_text(text, encoding="utf-8", errors="backslashreplace")
            if manifest:
                content = {
                    **requested,
                    "rows": written.rows,
                    "missing": len(written.missing),
                    "inputs": _inputs(store, hash_inputs, progress),
                    "outputs": [_output(target, scratch) for target, scratch in made_files.items()],
                }
                new(listed).write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
            store.check_unchanged("it was exported")
            still_held()
    many = len(written.missing)
    return Exported(str(path), written.rows, many, str(missing_file) if many else "", str(listed) if manifest else "")


def _export_folder(
    selection: Selection,
    made: Export,
    path: AnyPath,
    store: EmbeddingStore,
    hash_inputs: bool,
    overwrite: bool,
    progress: Progress,
) -> Exported:
    """Write a format that is a folder, or changes a dataset."""
    if hash_inputs:
        raise UsageError(f"--as {made.name} writes no manifest; leave out --manifest full")
    if isinstance(path, RemotePath):
        raise UsageError(f"{path}: --as {made.name} writes on this machine; give a folder, and copy it afterwards")
    if any((folder / "selection.json").exists() for folder in (path.resolve(), *path.resolve().parents)):
        raise OutputError(f"{path}: is in a selection folder; choose another folder")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file; give the name of a new folder")
    check_writable(path)
    with locks.holding(path.with_name(f".{path.name}.lock"), str(path), wait=False):
        written = cast(Any, made).write(selection, store, str(path), overwrite=overwrite, say=progress.say)
    return Exported(str(path), written.rows, len(written.missing), "", "")


def _request(selection: Selection, made: Export, store: EmbeddingStore) -> dict[str, Any]:
    """Return what an export depends on apart from files, as JSON values: the first entries of its manifest."""
    request = {
        "format": made.name,
        "format_options": parameters.recorded(made),
        "format_from": asdict(origin_of(type(made))),
        "selection": selection.header(),
        "options": asdict(store.options),
    }
    return dict(json.loads(json.dumps(request)))


def check_target(path: AnyPath, store: EmbeddingStore | None, *, marked: bool = False) -> None:
    """Check that a file may be written: it is not a folder, a file of the pool or a part of a selection.

    It must also not look like a new part of the pool, unless a manifest next to it will mark it (``marked``).

    Raises:
        OutputError: The file may not be written; the message says why.
    """
    if isinstance(path, RemotePath):
        _check_remote(path, store, marked)
        return
    if store and str(path.resolve()) in {os.path.realpath(name) for kind, name in store.files() if kind == "file"}:
        raise OutputError(f"{path}: is a file of the pool, which is never overwritten; choose another name")
    inside = store is not None and os.path.isdir(place := os.path.realpath(store.layout.location))
    if inside and path.suffix.lower() in _DATA and str(path.resolve()).startswith(place + os.sep) and not marked:
        raise OutputError(f"{path}: would be read as part of the pool in this folder; choose another folder")
    if any((folder / "selection.json").exists() for folder in path.resolve().parents):
        raise OutputError(f"{path}: is in a selection folder; choose another folder")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give a file")


def _check_remote(path: RemotePath, store: EmbeddingStore | None, marked: bool) -> None:
    if store and located(path.url) in store.files():
        raise OutputError(f"{path}: is a file of the pool, which is never overwritten; choose another name")
    location = store.layout.location.rstrip("/") if store else ""
    if "://" in location and path.suffix.lower() in _DATA and path.url.startswith(f"{location}/") and not marked:
        raise OutputError(f"{path}: would be read as part of the pool in this folder; choose another folder")
    if (path.parent / "selection.json").exists():
        raise OutputError(f"{path}: is in a selection folder; choose another folder")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give a file")


# --- manifest -------------------------------------------------------------------------------------


def _inputs(store: EmbeddingStore, hashed: bool, progress: Progress) -> list[dict[str, Any]]:
    """Return an entry for every file of a pool, if ``hashed`` with its SHA-256, which reads the whole pool."""
    files = store.files()
    entries = [_entry(protocol, path) for protocol, path in files]
    if hashed:
        with progress.task("hash the pool", sum(entry["bytes"] or 0 for entry in entries), "bytes") as advance:
            for entry, (protocol, path) in zip(entries, files, strict=True):
                entry["sha256"] = _sha256(protocol, path, advance)
    return entries


def _entry(protocol: str, path: str) -> dict[str, Any]:
    """Return path, size and version of a file: its modification time in nanoseconds, or the ETag in object storage."""
    size, version = file_stamp(protocol, path)
    return {"path": path, "bytes": size, "version": version}


def _output(path: AnyPath, scratch: Path) -> dict[str, Any]:
    """Return the entry of a file that is written, without its time: the same export has the same manifest."""
    return {"path": str(path), "bytes": scratch.stat().st_size, "sha256": _sha256("file", str(scratch))}


def _sha256(protocol: str, path: str, advance: Advance = lambda _: None) -> str:
    digest = hashlib.sha256()
    with open_file(protocol, path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _one_line(key: str) -> str:
    """Return a key on one line: a key with a line break or another control character is quoted."""
    return repr(key) if _BREAKS.search(key) else key
