"""Files and folders take their places whole, with the umask's permissions, and say what stood in the way."""

from __future__ import annotations

import errno
import os
import resource
import stat
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.common import KILLED, begin, end_of, killed_at, run
from thresher import OutputError
from thresher.runtime import files
from thresher.runtime.files import writing, writing_folder

pytest.importorskip("fcntl")


def test_two_processes_write_the_same_file_and_folder(tmp_path: Path) -> None:
    def work(name: str) -> None:
        for _ in range(100):
            with writing(tmp_path / "file") as scratch:
                Path(scratch).write_text(name * 10_000)
            with writing_folder(tmp_path / "folder") as folder:
                (folder / "a").write_text(name)
                (folder / "b").write_text(name)

    others = [begin(lambda name=name: work(name)) for name in "xy"]  # type: ignore[misc]
    while any(os.waitid(os.P_PID, one, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for one in others):
        try:
            text = (tmp_path / "file").read_text()
        except FileNotFoundError:
            continue
        assert text in ("x" * 10_000, "y" * 10_000)
    assert [end_of(other) for other in others] == [0, 0]
    assert (tmp_path / "folder" / "a").read_text() == (tmp_path / "folder" / "b").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("swap", [True, False])
def test_a_folder_killed_at_any_moment_is_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    if not swap:
        monkeypatch.setattr(files, "_swap", lambda *_: False)

    def write(text: str) -> None:
        with writing_folder(tmp_path / "out") as folder:
            for name in "ab":
                (folder / name).write_text(text)

    write("old")
    point, seen = 0, set()
    while killed_at(point, lambda: write("new")):
        point += 1
        if not (tmp_path / "out").exists():
            assert not swap, "there was a moment without the folder"
            files._sweep(tmp_path / "out")  # as the next writer does
        seen.add(text := (tmp_path / "out" / "a").read_text())
        assert (tmp_path / "out" / "b").read_text() == text
        write("old")
        assert [path.name for path in tmp_path.iterdir()] == ["out"], "scratch was left"
    assert point > 6
    assert seen == {"old", "new"}


def test_permissions_are_those_of_the_umask_under_threads(tmp_path: Path) -> None:
    def work() -> None:
        os.umask(0o027)
        sys.setswitchinterval(1e-6)
        ended, seen = threading.Event(), set()

        def watch() -> None:
            while not ended.is_set():
                status = Path("/proc/self/status").read_text()
                seen.add(next(line for line in status.splitlines() if line.startswith("Umask")))

        def write(number: int) -> int:
            with writing(tmp_path / f"{number}") as scratch:
                Path(scratch).write_text("x")
            with writing_folder(tmp_path / f"{number}-folder"):
                pass
            assert stat.S_IMODE((tmp_path / f"{number}-folder").stat().st_mode) == 0o750
            return stat.S_IMODE((tmp_path / f"{number}").stat().st_mode)

        watcher = threading.Thread(target=watch)
        if sys.platform == "linux":
            watcher.start()
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(write, range(200))) == {0o640}
        ended.set()
        if sys.platform == "linux":
            watcher.join()
            assert seen == {"Umask:\t0027"}

    assert run(work) == 0


def refused(path: object = None, code: int = errno.EACCES) -> OSError:
    return OSError(code, os.strerror(code), path) if path else OSError(code, os.strerror(code))


def test_only_errors_of_writing_are_called_so(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        hint = "choose another place" if code == errno.EROFS else "free some space"
        with pytest.raises(OutputError, match=rf"out: cannot be written \(.*\); {hint}"), writing(target):
            raise refused(code=code)
    for number, error in enumerate((refused("input"), refused(code=errno.EIO), refused("input", errno.ENOSPC))):
        with pytest.raises(OSError, match=r"\[Errno") as caught, writing(target):  # noqa: PT012
            raise error
        assert caught.value is error, number
        with pytest.raises(OSError, match=r"\[Errno") as caught, writing_folder(target):  # noqa: PT012
            raise error
        assert caught.value is error
    for error in (OSError("image file is truncated"), ConnectionResetError("reset")):
        with pytest.raises(OSError, match="truncated|reset") as caught, writing(target):  # noqa: PT012
            raise error
        assert caught.value is error
    with pytest.raises(FileNotFoundError), writing(target) as scratch:
        Path(scratch).write_bytes(Path(tmp_path / "no input").read_bytes())
    with pytest.raises(OutputError, match="out: cannot be written"), writing(target) as scratch:  # noqa: PT012
        os.unlink(scratch)
        os.mkdir(scratch)
        open(scratch, "wb")
    with pytest.raises(OutputError, match="out: cannot be written"), writing_folder(target) as folder:
        (folder / "nowhere" / "file").write_text("x")
    for path in tmp_path.glob(".out*"):
        path.rmdir()
    assert not list(tmp_path.iterdir()), "something was left"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="free some space"), writing(tmp_path / "out"), open("/dev/full", "w") as file:
        file.write("x")
    with (
        pytest.raises(OutputError, match="free some space"),
        writing_folder(tmp_path / "out"),
        open("/dev/full", "wb") as file,
    ):
        np.save(file, np.zeros(10**6))
    assert not list(tmp_path.iterdir())


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """NumPy writes arrays past Python's files, and gives no error number."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(OutputError, match="out.npy: cannot be written .*; free some space"):  # noqa: SIM117
            with writing(tmp_path / "out.npy") as scratch:
                np.save(scratch, np.zeros(10**5))
        with pytest.raises(OutputError, match="out: cannot be written .*; free some space"):  # noqa: SIM117
            with writing_folder(tmp_path / "out") as folder:
                np.save(folder / "a.npy", np.zeros(10**5))

    assert run(work) == 0
    assert not list(tmp_path.iterdir())


def test_the_file_is_the_old_or_the_new_when_killed(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write(text: str) -> None:
        with writing(target) as scratch:
            Path(scratch).write_text(text)

    write("old")
    point = 0
    while killed_at(point, lambda: write("new")):
        point += 1
        assert target.read_text() in ("old", "new")
    assert target.read_text() == "new"
    assert point
    assert KILLED


@pytest.mark.parametrize("rows", [0, 10, 3_000_000])
def test_space_for_a_while_is_mapped_if_it_is_large(tmp_path: Path, rows: int) -> None:
    array = files.mapped_space(tmp_path, rows, np.int64)
    assert type(array) is np.ndarray
    assert (array.shape, array.dtype) == ((rows,), np.int64)
    assert not array.any()
    array[:] = np.arange(rows)
    assert array[-1:].tolist() == [rows - 1][:rows]
    assert isinstance(array.base, np.memmap) == (rows > 10)
    assert not list(tmp_path.iterdir())


def test_space_on_a_full_disk_is_an_error_and_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, found in ((errno.ENOSPC, OutputError), (errno.EOPNOTSUPP, None)):

        def fails(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", fails)
        if found is None:
            assert len(files.mapped_space(tmp_path, 2_000_000, np.int64)) == 2_000_000
        else:
            with pytest.raises(found, match=r"cannot be written \(No space left on device\); free some space"):
                files.mapped_space(tmp_path, 2_000_000, np.int64)


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    """A device is not either: with --overwrite, an administrator would lose /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="pipe: is a pipe or a device, which would be replaced; give a file"):  # noqa: SIM117
        with writing(tmp_path / "pipe"):
            raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()
