"""Results that exist already: the same is accepted and left alone, anything else is refused or replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.runtime.common import begin, change_of, end_of, wait_for
from thresher.errors import OutputError
from thresher.runtime.files import writing
from thresher.runtime.results import record_in, refuse_other, result_file, result_files, result_folder


def test_a_file(tmp_path: Path) -> None:
    path, said = tmp_path / "a.txt", list[str]()

    def write(text: str, *, overwrite: bool = False) -> None:
        with result_file(path, overwrite=overwrite, say=said.append) as scratch:
            Path(scratch).write_text(text)

    write("one")
    before = change_of(path)
    write("one")
    assert said == [f"{path}: already done; nothing was changed"]
    assert change_of(path) == before
    for other in ("two", "one more", ""):
        with pytest.raises(OutputError, match=rf"^{path}: exists already; choose another name or pass --overwrite$"):
            write(other)
    assert path.read_text() == "one"
    write("two", overwrite=True)
    assert path.read_text() == "two"
    assert (os.listdir(tmp_path), len(said)) == (["a.txt"], 1)


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def write(*names: str, overwrite: bool = False) -> None:
        with result_folder(folder, overwrite=overwrite) as scratch:
            for name in names:
                (scratch / name).parent.mkdir(exist_ok=True)
                (scratch / name).write_text(name)

    folder.mkdir()  # empty: nothing is there
    write("a", "b/c")
    before = change_of(folder)
    write("a", "b/c")
    assert change_of(folder) == before
    for other in (("a",), ("a", "b/c", "d"), ("a", "b/d")):
        with pytest.raises(OutputError, match="exists already"):
            write(*other)
    assert sorted(path.name for path in folder.rglob("*")) == ["a", "b", "c"]
    write("d", overwrite=True)
    assert os.listdir(folder) == ["d"]
    assert os.listdir(tmp_path) == ["out"]


def test_several_files_are_one_result(tmp_path: Path) -> None:
    """Part of it may be there; one that is different stops all."""
    one, two, old = (tmp_path / name for name in ("one", "two", "old"))
    order: list[tuple[bool, bool]] = []

    def write(*, content: str = "x", overwrite: bool = False) -> None:
        with result_files(overwrite=overwrite, replaces=[old, two]) as new:
            new(one).write_text(content)
            new(two).write_text(content)
            order.append((one.exists(), two.exists()))

    old.write_text("old")
    two.write_text("y")
    with pytest.raises(OutputError, match=f"{two}: exists already"):
        write()
    assert (one.exists(), two.read_text(), old.exists()) == (False, "y", True)
    write(overwrite=True)
    assert (one.read_text(), two.read_text(), old.exists()) == ("x", "x", False)
    two.unlink()
    write()
    assert (two.read_text(), sorted(os.listdir(tmp_path))) == ("x", ["one", "two"])
    one.unlink()
    os.mkfifo(one)
    with pytest.raises(OutputError, match=f"{one}: is a pipe or a device"):
        write()


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    path, sign = tmp_path / "a.txt", tmp_path / "sign"

    def held() -> None:
        with writing(path):
            sign.touch()
            while sign.exists():
                pass

    killed = begin(held)
    wait_for(sign)
    os.kill(killed, 9)
    end_of(killed)
    (left,) = tmp_path.glob(".a.txt.*")
    sign.unlink()
    other = begin(held)
    wait_for(sign)
    with result_file(path, overwrite=False) as scratch:
        Path(scratch).write_text("done")
    assert not left.exists()
    assert len(list(tmp_path.glob(".a.txt.*"))) == 1
    sign.unlink()
    assert end_of(other) == 0


def test_another_request_is_refused_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("", "{", "[1]", "[" * 100_000, "null", '{"seed": 1}'):
        path.write_text(text)
        with pytest.raises(OutputError, match="exists already"):
            refuse_other(path, record_in(path), {"seed": 2})
    refuse_other(path, record_in(path), {"seed": 1})
    assert record_in(tmp_path / "none") == {}
