"""Data that change while they are copied: it stops, names the file, and keeps no shard that may be wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import thresher
from thresher.errors import ChangedError, OutputError
from thresher.resharding import job, reshard
from thresher.runtime.progress import Silent

from .common import hashes, keys_file, picture, plain, tar

N = 24
KEYS = [f"{i:06d}" for i in range(N)]


def tars(folder: Path, order: list[int]) -> Path:
    samples = plain(N)
    tar(folder / "0.tar", plain(3, 100))
    return tar(folder / "1.tar", [samples[i] for i in order])


def pictures(folder: Path, order: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for key, i in zip(KEYS, order, strict=True):
        (folder / f"{key}.png").write_bytes(picture(i))
    return folder / f"{KEYS[4]}.png"


def captions(folder: Path, order: list[int]) -> Path:
    pictures(folder, list(range(N)))
    for key, i in zip(KEYS, order, strict=True):
        (folder / f"{key}.txt").write_text(f"picture {i:06d}")
    return folder / f"{KEYS[4]}.txt"


def csv(folder: Path, order: list[int]) -> Path:
    pictures(folder / "pictures", list(range(N)))
    path = folder / "all.csv"
    path.write_text("filepath\ttitle\n" + "".join(f"pictures/{KEYS[i]}.png\ttitle {i:06d}\n" for i in order))
    return path


def csv_pictures(folder: Path, order: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    csv(folder, list(range(N)))
    return pictures(folder / "pictures", order)


def table(order: list[int]) -> pa.Table:
    cells = {"key": [KEYS[i] for i in order], "image": [picture(i) for i in order], "text": [f"{i:06d}" for i in order]}
    return pa.table(cells)


def parquet(folder: Path, order: list[int]) -> Path:
    pq.write_table(table(order), folder / "0.parquet", row_group_size=5, compression="none", use_dictionary=False)
    return folder / "0.parquet"


def paths(folder: Path, order: list[int]) -> Path:
    """A table with paths of images."""
    changed = pictures(folder / "pictures", order)
    names = [f"pictures/{key}.png" for key in KEYS]
    if not (folder / "0.parquet").exists():
        pq.write_table(pa.table({"key": KEYS, "image_path": names, "text": KEYS}), folder / "0.parquet")
    return changed


def structs(folder: Path, order: list[int], *, kind: str = "parquet", several: bool = False) -> Path:
    """A table as ``datasets`` has it, with paths of images instead of their bytes, or lists of such images."""
    changed = pictures(folder / "pictures", order)
    if not (folder / f"0.{kind}").exists():
        cells: list[Any] = [{"bytes": None, "path": f"pictures/{key}.png"} for key in KEYS]
        cells = [[cell, cell] for cell in cells] if several else cells
        inner = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        content = pa.table({"key": KEYS, "image": pa.array(cells, pa.list_(inner) if several else inner), "text": KEYS})
        if kind == "parquet":
            pq.write_table(content, folder / "0.parquet")
        else:
            with pa.OSFile(str(folder / "0.arrow"), "wb") as file, pa.ipc.new_stream(file, content.schema) as writer:
                writer.write_table(content, max_chunksize=5)
    return changed


def structs_in_arrow(folder: Path, order: list[int]) -> Path:
    return structs(folder, order, kind="arrow")


def lists_of_structs(folder: Path, order: list[int]) -> Path:
    return structs(folder, order, several=True)


def arrow(folder: Path, order: list[int]) -> Path:
    content = table(order)
    with pa.OSFile(str(folder / "0.arrow"), "wb") as file, pa.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content, max_chunksize=5)
    return folder / "0.arrow"


class Meanwhile(Silent):
    """Calls ``change`` once, when a task has come so far."""

    def __init__(self, label: str, share: float, change: Callable[[], object]) -> None:
        self.label, self.share, self.change, self.done = label, share, change, False

    @contextmanager
    def task(self, label: str, total: int, unit: str = "rows") -> Iterator[Any]:
        count = 0

        def advance(many: int) -> None:
            nonlocal count
            count += many
            if label == self.label and count >= self.share * total and not self.done:
                self.done = True
                self.change()

        advance(0)
        yield advance


KINDS: list[tuple[Any, dict[str, Any], str]] = [
    (tars, {}, "write"),
    (tars, {"shuffle": 1}, "write"),
    (pictures, {}, "write"),
    (pictures, {"form": "parquet"}, "write"),
    (pictures, {"shuffle": 1}, "convert"),
    (captions, {}, "write"),
    (csv, {}, "write"),
    (csv, {"shuffle": 1}, "write"),
    (csv, {"form": "webdataset"}, "write"),
    (csv_pictures, {"form": "webdataset"}, "write"),
    (csv_pictures, {"form": "parquet"}, "write"),
    (parquet, {}, "write"),
    (parquet, {"shuffle": 1}, "gather"),
    (parquet, {"form": "webdataset"}, "write"),
    (paths, {"form": "webdataset"}, "write"),
    (structs, {"form": "webdataset"}, "write"),
    (structs_in_arrow, {"form": "webdataset"}, "write"),
    (lists_of_structs, {"form": "webdataset"}, "write"),
    (arrow, {}, "write"),
]


@pytest.mark.parametrize(
    "share",
    [pytest.param(0, id="found"), pytest.param(0.5, id="between", marks=pytest.mark.slow), pytest.param(1, id="end")],
)
@pytest.mark.parametrize(("make", "how", "label"), KINDS)
def test_data_that_change_while_they_are_copied(
    tmp_path: Path, make: Callable[..., Path], how: dict[str, Any], label: str, share: float
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    changed = make(folder, list(range(N)))
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    size = changed.stat().st_size
    data = str(folder / "all.csv") if "csv" in make.__name__ else str(folder)
    names = [f"pictures/{key}.png" for key in KEYS] if "csv" in make.__name__ else KEYS
    sel = keys_file(tmp_path / "k", names[:10])
    given = {"per_shard": 3, "workers": 1, **how}
    reshard(data, sel, str(tmp_path / "whole"), **given)
    wanted = hashes(tmp_path / "whole")

    meanwhile = Meanwhile(label, share, lambda: make(folder, list(range(N))[::-1]))
    said = "was changed while it was copied; wait until nothing writes to it"
    with pytest.raises(ChangedError, match=said) as raised:
        reshard(data, sel, str(out), **given, progress=meanwhile)
    assert meanwhile.done
    assert changed.stat().st_size == size
    assert (str(raised.value).endswith("then run again with --overwrite"), "\n" in str(raised.value)) == (True, False)
    assert str(raised.value).startswith(str(folder))
    # What is there was copied from the old data, or is not a result.
    found = {name: content for name, content in hashes(out).items() if not name.startswith(".reshard")}
    assert {name for name in found if not name.endswith("_stats.json") and found[name] != wanted[name]} == set()
    assert "reshard.json" not in found

    with pytest.raises(OutputError, match="other data or options; choose another folder or pass --overwrite"):
        reshard(data, sel, str(out), **given)
    reshard(data, sel, str(out), **given, overwrite=True)
    reshard(data, sel, str(tmp_path / "fresh"), **given)
    assert hashes(out) == hashes(tmp_path / "fresh")


@pytest.mark.parametrize("make", [tars, csv, parquet])
def test_data_that_change_while_they_are_scanned(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    changed = make(folder, list(range(N)))
    os.utime(changed, (1e9, 1e9))
    data = str(changed if make is csv else folder)
    sel = keys_file(tmp_path / "k", ["pictures/000004.png" if make is csv else "000004"])
    meanwhile = Meanwhile("scan", 1, lambda: make(folder, list(range(N))[::-1]))
    with pytest.raises(ChangedError, match=rf"^{folder}/.*: was changed while it was copied; wait .*, then run again$"):
        reshard(data, sel, str(tmp_path / "out"), progress=meanwhile)
    assert not (tmp_path / "out").exists()
    assert reshard(data, sel, str(tmp_path / "out")).samples == 1


def test_a_file_of_keys_that_changes(tmp_path: Path) -> None:
    tars(tmp_path / "in", list(range(N)))
    sel = keys_file(tmp_path / "k", KEYS[:6])
    meanwhile = Meanwhile("write", 0.5, lambda: keys_file(tmp_path / "k", [*KEYS[:5], "another"]))
    with pytest.raises(ChangedError, match=rf"{sel}: was changed while it was copied"):
        reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"), per_shard=3, progress=meanwhile)


def test_a_file_that_is_gone_or_cut_off_has_changed(tmp_path: Path) -> None:
    for change in (Path.unlink, lambda path: os.truncate(path, 3_000)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        path = tars(tmp_path / "in", list(range(N)))
        meanwhile = Meanwhile("write", 0, lambda change=change, path=path: change(path))
        with pytest.raises(ChangedError, match=rf"{path}: was changed while it was copied"):
            reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", KEYS), str(tmp_path / "out"), progress=meanwhile)
        assert not list((tmp_path / "out").glob("*.tar"))


def test_a_remote_file_that_changes(tmp_path: Path) -> None:
    """Its listing is not taken from a cache."""
    import fsspec

    remote = fsspec.filesystem("memory")

    def put(order: list[int]) -> None:
        path = tars(tmp_path / "in", order)
        remote.pipe("/originals/1.tar", path.read_bytes())

    put(list(range(N)))
    sel = keys_file(tmp_path / "k", KEYS[:10])
    try:
        meanwhile = Meanwhile("write", 0.5, lambda: put(list(range(N))[::-1]))
        with pytest.raises(ChangedError, match=r"/originals/1.tar: was changed while it was copied"):
            reshard("memory://originals", sel, str(tmp_path / "out"), per_shard=3, workers=1, progress=meanwhile)
        with pytest.raises(OutputError, match="other data or options"):
            reshard("memory://originals", sel, str(tmp_path / "out"), per_shard=3)
    finally:
        remote.rm("/originals", recursive=True)


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("make", "how"), [(tars, {}), (tars, {"shuffle": 1}), (pictures, {}), (parquet, {})])
def test_half_a_job_goes_on_under_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Path], how: dict[str, Any]
) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in", list(range(N)))
    asked = (str(tmp_path / "in"), keys_file(tmp_path / "k", KEYS))
    given = {"per_shard": 3, "workers": 1, **how}
    reshard(*asked, str(tmp_path / "whole"), **given)
    with pytest.raises(KeyboardInterrupt):
        reshard(*asked, str(tmp_path / "out"), **given, progress=Meanwhile("write", 0.5, stop))
    shards = {path: path.stat().st_ino for path in (tmp_path / "out").iterdir() if path.suffix in (".tar", ".parquet")}
    assert len(shards) >= 4
    for module in (thresher, job):
        monkeypatch.setattr(module, "__version__", "99.0.1")
    reshard(*asked, str(tmp_path / "out"), **given)
    assert {path: path.stat().st_ino for path in shards} == shards
    found, wanted = hashes(tmp_path / "out"), hashes(tmp_path / "whole")
    assert found.pop("reshard.json") != wanted.pop("reshard.json")  # it says which version finished it
    assert found == wanted


@pytest.mark.parametrize("make", [tars, pictures, captions, parquet, arrow])
def test_data_edited_to_the_same_size_are_other_data(tmp_path: Path, make: Callable[..., Path]) -> None:
    (tmp_path / "in").mkdir()
    changed = make(tmp_path / "in", list(range(N)))
    os.utime(changed, (1e9, 1e9))
    asked = (str(tmp_path / "in"), keys_file(tmp_path / "k", KEYS), str(tmp_path / "out"))
    reshard(*asked)
    size = changed.stat().st_size
    make(tmp_path / "in", [1, 0, *range(2, N)])
    assert changed.stat().st_size == size
    with pytest.raises(OutputError, match="other data or options"):
        reshard(*asked)
