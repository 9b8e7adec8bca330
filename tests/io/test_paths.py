"""Every rule about names from files, and every place that has to follow it."""

from __future__ import annotations

import csv
import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.data.common import picture
from thresher.check.data import doctor
from thresher.data import DataOptions, open_data
from thresher.errors import PoolError
from thresher.export.write import export
from thresher.io.npy import npz_pieces
from thresher.io.paths import (
    PARENT,
    all_plain,
    cut,
    has_parent,
    inside,
    is_unsafe,
    shortened,
    visible,
    without_parent,
    writable,
)
from thresher.io.tar import Window, tar_samples, why_unsafe
from thresher.io.tar_fast import FastWindow, stretch
from thresher.pool.store import open_store
from thresher.pruning.recipe import run_steps
from thresher.report.examples import look_up
from thresher.resharding import reshard

# A name, whether it may lead out of the folder it is joined to, whether one of its parts is "..".
NAMES: list[tuple[str, bool, bool]] = [
    ("a.png", False, False),
    ("folder/a.png", False, False),
    ("folder/../a.png", True, True),
    ("..", True, True),
    ("../a.png", True, True),
    ("a/..", True, True),
    ("a/../../b", True, True),
    ("..\\a.png", True, True),
    ("a\\..\\b.png", True, True),
    ("a/..\\b.png", True, True),
    (".. /a.png", True, True),  # Windows leaves out blanks and dots at the end of a name
    ("a/.. ./b.png", True, True),
    (".../a.png", True, True),
    ("..\n", True, True),
    ("a..b/c..png", False, False),
    ("..a/b", False, False),
    ("a../b", False, False),
    ("./a.png", False, False),
    (".hidden", False, False),
    ("/etc/passwd", True, False),
    ("//server/share", True, False),
    ("\\windows\\system32", True, False),
    ("\\\\server\\share", True, False),
    ("C:\\a.png", True, False),
    ("c:a.png", True, False),
    ("a\0b.png", True, False),
    ("NUL", False, False),
    ("con.png", False, False),
    ("a.png. ", False, False),
    ("name\nwith\ttabs", False, False),
    ("\x1b[31mred", False, False),
    ("\u202egnp.exe", False, False),
    ("\ufeffzero\u200bwidth", False, False),
    ("half \ud800 pair", False, False),
    ("\u2025/a.png", False, False),  # one character that looks like two dots
    ("%2E%2E/a.png", False, False),
    ("x" * 5000, False, False),
    ("d/" * 3000 + "x", False, False),
]
each = pytest.mark.parametrize(("name", "leads_out", "parent"), NAMES, ids=[ascii(name)[:40] for name, _, _ in NAMES])
GOOD = ("a.png", "./a.png")
WORDS = [name for name, _, _ in NAMES if name.isprintable()]  # what tables and csv may hold as they are


@each
def test_the_rules(name: str, leads_out: bool, parent: bool) -> None:
    assert is_unsafe(name) is leads_out
    assert has_parent(name) is parent
    assert not has_parent(without_parent(name))
    assert (without_parent(name) == name) is not parent
    assert not (all_plain(f"\0{name}") and "\0" not in name and leads_out), "the quick look overlooks it"
    if "\ud800" not in name:
        assert pc.match_substring_regex(pa.array([name]), PARENT)[0].as_py() is parent


@each
def test_what_lies_inside_a_folder(tmp_path: Path, name: str, leads_out: bool, parent: bool) -> None:
    root = os.path.realpath(tmp_path / "root")
    os.mkdir(root)
    found = inside(root, name)
    if leads_out:
        assert found is None
    elif found is not None:
        assert found.startswith(root + os.sep)


def test_links_and_absolute_paths(tmp_path: Path) -> None:
    root = Path(os.path.realpath(tmp_path)) / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "a.png").write_bytes(b"x")
    (root / "good.png").symlink_to(root / "a.png")
    (root / "bad.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    assert inside(str(root), "good.png") == str(root / "a.png")
    assert inside(str(root), str(root / "a.png")) == str(root / "a.png")
    assert inside(str(root), str(root / "sub" / ".." / "a.png")) == str(root / "a.png")
    assert inside("/", "etc") is not None
    for name in ("bad.png", "up/secret.png", str(tmp_path / "secret.png"), f"{root}/../secret.png", f"{root}x", ""):
        assert inside(str(root), name) is None, name


# --- every place that takes names from files ------------------------------------------------------


@each
def test_members_of_npz(tmp_path: Path, name: str, leads_out: bool, parent: bool) -> None:
    array = io.BytesIO()
    np.save(array, np.zeros((2, 3), np.float32))
    if "\0" in name or "\ud800" in name or len(name) > 60_000:
        pytest.skip("zip has no such names")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr(f"{name}.npy", array.getvalue())
    if leads_out and is_unsafe(f"{name}.npy") or "/" in name:
        with pytest.raises(PoolError, match="not a plain name"):
            npz_pieces("file", str(tmp_path / "x.npz"))
    else:
        assert len(npz_pieces("file", str(tmp_path / "x.npz"))) == 1


def tar(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(picture())
            file.addfile(info, io.BytesIO(picture()))
    return path


@each
def test_members_of_tars(tmp_path: Path, name: str, leads_out: bool, parent: bool) -> None:
    """Such a sample is not copied, nor is its name taken in the fast scan."""
    if "\ud800" in name:
        pytest.skip("tarfile writes no such names")
    path = tar(tmp_path / "x.tar", ["first.png", f"{name}.png", "last.png"])
    with open(path, "rb") as file:
        found = list(tar_samples(Window(file, str(path)), str(path)))
        quick = stretch(FastWindow(file, str(path)), 0, 100)
    for group in found:
        names = [member.name for member in group.members.values()]
        assert bool(why_unsafe(group)) is any(map(is_unsafe, names))
    assert quick is None or not any(map(is_unsafe, quick.keys))
    (tmp_path / "keys").write_text("first\nlast\n", encoding="utf-8")
    reshard(str(path), str(tmp_path / "keys"), str(tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "00000000.tar") as file:
        assert file.getnames() == ["first.png", "last.png"]


def hostile(tmp_path: Path) -> tuple[Path, bytes]:
    """A folder with a picture, and a picture outside; returns the folder and the one outside."""
    folder, secret = tmp_path / "in" / "pool", picture(9)
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(1))
    (tmp_path / "in" / "secret.png").write_bytes(secret)
    (folder / "link.png").symlink_to(tmp_path / "in" / "secret.png")
    return folder, secret


def outside(tmp_path: Path) -> list[str]:
    path = tmp_path / "in" / "secret.png"
    return ["../secret.png", str(path), "link.png", "sub/../../secret.png", f"{path.parent}/pool/../secret.png"]


def test_pictures_named_by_tables_and_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, secret = hostile(tmp_path)
    names = [*outside(tmp_path), *WORDS, "a.png"]
    pq.write_table(pa.table({"image": names, "text": names}), folder / "x.parquet")
    with open(folder / "x.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *((name, "x") for name in names)])
    monkeypatch.chdir(folder)
    for path in (folder / "x.parquet", folder / "x.csv"):
        samples = list(open_data(str(path)).samples())
        assert [sample.picture is not None for sample in samples] == [name in GOOD for name in names]
        assert all(bool(sample.why) is (sample.picture is None) for sample in samples)
        assert all(not has_parent(sample.key) for sample in samples)
    allowed = open_data(str(folder / "x.csv"), DataOptions(allow_outside=True)).samples()
    assert next(allowed).stored() == secret


def test_pictures_in_folders(tmp_path: Path) -> None:
    folder, _ = hostile(tmp_path)
    (folder / "a.txt").symlink_to(tmp_path / "in" / "secret.txt")
    (tmp_path / "in" / "secret.txt").write_text("told")
    samples = list(open_data(str(folder)).samples())
    assert [(s.key, s.text, s.picture is not None) for s in samples] == [("a", "", True), ("link", "", False)]


def pool(folder: Path, **columns: list[str]) -> str:
    rows = len(next(iter(columns.values())))
    np.save(folder / "image.npy", np.eye(rows, 8, dtype=np.float32) + 1)
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return str(folder)


def test_pictures_shown_in_reports(tmp_path: Path) -> None:
    folder, _ = hostile(tmp_path)
    names = [*outside(tmp_path), *WORDS, "a.png"]
    store = open_store(pool(folder, image_path=names, text=names))
    seen = look_up(store, range(len(names)))
    assert [bool(example.picture) for example in seen.values()] == [name in GOOD for name in names]


def test_keys_of_pools_and_paths_in_exports(tmp_path: Path) -> None:
    """A key, and a path that is written for open_clip, may be absolute, but has no part that is ".."."""
    names = list(dict.fromkeys(name for name, _, _ in NAMES if "\ud800" not in name))
    bad = [name for name in names if has_parent(name)]
    (tmp_path / "pool").mkdir()
    where = pool(tmp_path / "pool", key=names, filepath=names, text=["x"] * len(names))
    from thresher import Options

    selection = run_steps(open_store(where, Options(skip_bad=True)), [])
    assert len(names) - len(selection) == len(bad)
    kept = run_steps(open_store(where, Options(key="row")), [])
    done = export(kept, "open_clip", str(tmp_path / "out.csv"))
    control = [name for name in names if any(ord(one) < 32 or 127 <= ord(one) < 160 for one in name)]
    assert done.missing == len({*bad, *control})


def test_keys_that_doctor_counts(tmp_path: Path) -> None:
    names = list(dict.fromkeys(name for name, _, _ in NAMES if "\ud800" not in name))
    cells = [{"bytes": picture(), "path": "x.png"}] * len(names)
    pq.write_table(pa.table({"image": cells, "key": names, "text": names}), tmp_path / "x.parquet")
    assert doctor(str(tmp_path))["keys"]["unsafe"] == sum(map(has_parent, names))


# --- what is shown --------------------------------------------------------------------------------


@each
def test_what_is_shown_is_one_line_of_what_is_there(name: str, leads_out: bool, parent: bool) -> None:
    found = visible(name)
    assert len(found.splitlines()) == 1
    assert found.isprintable()
    assert len(found) < 1_000
    found.encode()
    writable(name).encode()


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain é \\ 中", "plain é \\ 中"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("\u202etxt\u200b\u2028\ud800", "\\u202etxt\\u200b\\u2028\\ud800"),
        ("x" * 401, "x" * 400 + "... (401 characters)"),
    ],
)
def test_how_it_is_shown(text: str, seen: str) -> None:
    assert visible(text) == seen


def test_all_of_it_may_be_shown() -> None:
    assert visible("x" * 1000, limit=None) == "x" * 1000
    assert visible("abc", limit=2) == "ab... (3 characters)"


def test_long_texts_are_cut_and_their_length_is_named() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcd", 3) == "abc... (4 characters)"
    assert cut("abc", 3, 200_000_000) == "abc... (200,000,000 characters)"
    assert shortened("abc", 3) == "abc"
    message = shortened("a" * 900_000 + "; type this", 400)
    assert message == "a" * 300 + " [... 899,611 characters ...] " + "a" * 89 + "; type this"
