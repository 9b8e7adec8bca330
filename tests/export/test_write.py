"""Exports as files: what is refused, what lies beside them, and the manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import thresher
from thresher import OutputError, Selection, UsageError, open_store
from thresher.cli.main import main
from thresher.export import write
from thresher.export.registry import build
from thresher.export.write import export
from thresher.pool.store import reopen
from thresher.runtime.locks import holding
from thresher.runtime.progress import Silent
from thresher.testing.pools import write_pool

ROWS = 200


def test_manifest_has_the_hashes_of_inputs_and_outputs(uid_pool: Path, selection: Selection, tmp_path: Path) -> None:
    done = export(selection, "keys", tmp_path / "keys.txt", hash_inputs=True)
    manifest = json.loads(Path(done.manifest).read_text())
    for entry, path in (
        (manifest["inputs"][0], uid_pool / "pool.parquet"),
        (manifest["outputs"][0], tmp_path / "keys.txt"),
    ):
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["bytes"] == path.stat().st_size
    assert manifest["rows"] == len(selection)
    assert [step["method"] for step in manifest["selection"]["steps"]] == ["semdedup", "random"]


class Bytes(Silent):
    """Adds up what a bar is advanced by."""

    def __init__(self) -> None:
        self.total = self.done = 0

    @contextmanager
    def task(self, label: str, total: int, unit: str = "rows") -> Iterator[Any]:
        self.total += total
        assert unit == "bytes"

        def advance(many: int) -> None:
            self.done += many

        yield advance


def test_inputs_are_read_for_the_manifest_only_where_that_is_asked_for(
    uid_pool: Path, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    usual = write._sha256
    monkeypatch.setattr(write, "_sha256", lambda kind, path, *more: hashed.append(path) or usual(kind, path, *more))
    done = export(selection, "keys", tmp_path / "keys.txt")
    assert [Path(path).name.startswith(".keys.txt.") for path in hashed] == [True], (
        "only its own file, before it is moved"
    )
    stat = (uid_pool / "pool.parquet").stat()
    manifest = json.loads(Path(done.manifest).read_text())
    stamp = {"path": str(uid_pool / "pool.parquet"), "bytes": stat.st_size, "version": stat.st_mtime_ns}
    assert manifest["inputs"] == [stamp]
    assert manifest["format_from"] == {"package": "thresher", "version": thresher.__version__}

    bar = Bytes()
    export(selection, "keys", tmp_path / "again.txt", hash_inputs=True, progress=bar)
    assert bar.done == bar.total == stat.st_size


def test_a_format_can_be_given_with_options_of_its_own(uid_pool: Path, selection: Selection, tmp_path: Path) -> None:
    made = build("img2dataset", {"url_column": "filepath"})
    done = export(selection, made, tmp_path / "list.parquet")
    found = pq.read_table(tmp_path / "list.parquet").column("url").to_pylist()
    assert found == [f"images/{i}.jpg" for i in selection.rows()]
    assert json.loads(Path(done.manifest).read_text())["format_options"] == {"url_column": "filepath"}
    with pytest.raises(UsageError, match="column of image paths"):
        export(selection, build("open_clip", {"path_column": "width"}), tmp_path / "x")


class Counted:
    """Counts the bytes that are read from a file system."""

    def __init__(self, file: Any, name: str, read: dict[str, int]) -> None:
        self.file, self.name, self.bytes = file, name, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, *size: int) -> bytes:
        content: bytes = self.file.read(*size)
        self.bytes[self.name] = self.bytes.get(self.name, 0) + len(content)
        return content


def test_the_manifest_of_a_remote_pool_reads_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    image, keys = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32), [f"k{i}" for i in range(300)]
    store = write_pool(tmp_path / "pool", image, table={"key": keys})
    place = "memory://export-pool"
    remote = fsspec.filesystem("memory")
    for path in (path for path in Path(store.layout.location).rglob("*") if path.is_file()):
        remote.pipe(f"/export-pool/{path.relative_to(store.layout.location)}", path.read_bytes())
    sizes = {str(name): remote.size(name) for name in remote.find("/export-pool")}
    assert main(["select", "random", place, "--keep", "50%", "-o", str(tmp_path / "sel"), "--quiet"]) == 0
    read: dict[str, int] = {}
    usual = MemoryFileSystem.open

    def opened(fs: Any, path: str, *args: Any, **more: Any) -> Counted:
        return Counted(usual(fs, path, *args, **more), fs._strip_protocol(path), read)

    monkeypatch.setattr(MemoryFileSystem, "open", opened)
    counts: dict[str, dict[str, int]] = {}
    ways = {"none": ["--no-manifest"], "default": [], "short": ["--manifest", "short"], "plain": ["--manifest"]}
    for name, more in {**ways, "full": ["--manifest", "full"], "old": ["--hash-inputs"]}.items():
        read.clear()
        asked = ["export", *more, str(tmp_path / "sel"), "--as", "keys", "-o", str(tmp_path / name), "--quiet"]
        assert main(asked) == 0
        counts[name] = dict(read)
        manifest = tmp_path / f"{name}.manifest.json"
        assert manifest.exists() == (name != "none")
        if manifest.exists():
            inputs = json.loads(manifest.read_text())["inputs"]
            assert {entry["path"]: entry["bytes"] for entry in inputs} == sizes
            hashed = {entry["path"]: entry.get("sha256") for entry in inputs}
            wanted = {path: hashlib.sha256(remote.cat(path)).hexdigest() for path in sizes}
            assert hashed == (wanted if name in ("full", "old") else dict.fromkeys(sizes))
    assert counts["default"] == counts["short"] == counts["plain"] == counts["none"]
    for path, size in sizes.items():
        assert counts["full"][path] == counts["old"][path] == counts["none"].get(path, 0) + size
    for asked in (["--manifest", "full"], ["--hash-inputs"]):
        words = ["export", str(tmp_path / "sel"), "--as", "keys", "-o", str(tmp_path / "x"), "--no-manifest", *asked]
        assert main(words) == 2
        assert f"{' '.join(asked)} writes to the manifest; remove" in capsys.readouterr().err
    remote.rm("/export-pool", recursive=True)


def test_two_exports_at_once_do_not_mix(uid_pool: Path, selection: Selection, tmp_path: Path) -> None:
    with (
        holding(tmp_path / ".keys.txt.lock", "it"),
        pytest.raises(OutputError, match="keys.txt: process .* is using it"),
    ):
        export(selection, "keys", tmp_path / "keys.txt")
    export(selection, "keys", tmp_path / "keys.txt")
    assert sorted(path.name for path in tmp_path.glob("*keys.txt*")) == ["keys.txt", "keys.txt.manifest.json"]


def test_a_changed_pool_is_another_export(uid_pool: Path, selection: Selection, tmp_path: Path) -> None:
    """Though the file would be the same: its manifest would not."""
    done = export(selection, "keys", tmp_path / "keys.txt")
    before = Path(done.manifest).read_bytes()
    assert export(selection, "keys", tmp_path / "keys.txt") == done
    os.utime(uid_pool / "pool.parquet", (1e9, 1e9))
    with pytest.raises(OutputError, match=r"keys.txt.manifest.json: exists already"):
        export(selection, "keys", tmp_path / "keys.txt")
    assert Path(done.manifest).read_bytes() == before
    Path(done.manifest).unlink()  # as one that was killed before its manifest
    export(selection, "keys", tmp_path / "keys.txt")
    assert Path(done.manifest).read_bytes() != before


def test_missing_rows_are_a_line_each_whatever_their_keys(tmp_path: Path) -> None:
    names = [f"{i:032x}" for i in range(4)]
    names[1], names[2] = "7\n3\tforged", "a\rb"
    table = pa.table({"uid": names, "emb": pa.array(list(np.eye(4, dtype=np.float32)), pa.list_(pa.float32(), 4))})
    pq.write_table(table, tmp_path / "pool.parquet")
    store = open_store(str(tmp_path / "pool.parquet"))
    everything = Selection.everything(store.fingerprint(), store.layout.location, {}, 4)
    for kind in ("datacomp", "keys"):
        done = export(everything, kind, tmp_path / kind, store=store)
        assert Path(done.missing_file).read_bytes() == b"1\t'7\\n3\\tforged'\n2\t'a\\rb'\n"


def test_refusals(uid_pool: Path, selection: Selection, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'parquet'"):
        export(selection, "parquett", tmp_path / "x")
    (tmp_path / "there").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        export(selection, "keys", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "precious"
    table = pq.read_table(uid_pool / "pool.parquet")
    pq.write_table(table.slice(1), uid_pool / "pool.parquet")
    with pytest.raises(UsageError, match="not the pool of this selection"):
        reopen(selection)


def test_only_the_own_pool_is_exported(uid_pool: Path, selection: Selection, tmp_path: Path) -> None:
    table = pq.read_table(uid_pool / "pool.parquet")
    pq.write_table(table.take(np.arange(ROWS)[::-1]), tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="not the pool of this selection"):
        export(selection, "keys", tmp_path / "keys.txt", store=open_store(str(tmp_path / "other.parquet")))
    store = open_store(str(uid_pool))
    with pytest.raises(UsageError, match="whole pool"):
        export(selection, "keys", tmp_path / "keys.txt", store=store.where(selection.mask()))
    assert not (tmp_path / "keys.txt").exists()


def test_what_an_earlier_export_left_beside_it_goes_with_it(tmp_path: Path) -> None:
    names = [f"{i:032x}" for i in range(10)]
    names[3] = "not-a-uid"
    table = pa.table({"uid": names, "emb": pa.array(list(np.eye(10, dtype=np.float32)), pa.list_(pa.float32(), 10))})
    pq.write_table(table, tmp_path / "pool.parquet")
    store = open_store(str(tmp_path / "pool.parquet"))
    everything = Selection.everything(store.fingerprint(), store.layout.location, {}, 10)
    export(everything, "datacomp", tmp_path / "x", store=store)
    assert (tmp_path / "x.missing.txt").exists()
    export(everything, "keys", tmp_path / "x", store=store, overwrite=True, manifest=False)
    assert not (tmp_path / "x.missing.txt").exists()
    assert not (tmp_path / "x.manifest.json").exists()


def test_an_export_in_the_pools_folder_is_no_part_of_it(uid_pool: Path, selection: Selection) -> None:
    export(selection, "parquet", uid_pool / "rows.parquet")
    assert len(reopen(selection)) == ROWS
    with pytest.raises(OutputError, match="part of the pool"):
        export(selection, "parquet", uid_pool / "more.parquet", manifest=False)
    assert len(reopen(selection)) == ROWS
