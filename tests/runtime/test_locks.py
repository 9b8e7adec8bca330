"""Who holds what: locks go with their process, and nothing that is in use is removed."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import stat
import time
from pathlib import Path

import pytest

from tests.runtime.common import as_nobody, begin, end_of, needs_root, run, wait_for
from thresher import OutputError
from thresher.runtime import locks
from thresher.runtime.locks import (
    Held,
    create_locked,
    create_locked_folder,
    holding,
    pin,
    remove_unused,
    scratch_folder,
    sweep,
)

pytest.importorskip("fcntl")


def hold(path: Path, sign: Path, seconds: float = 60) -> None:
    with holding(path, "it"):
        sign.touch()
        time.sleep(seconds)


def test_one_holds_and_the_other_is_refused_or_waits_and_says_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sign = tmp_path / "deep" / "lock", tmp_path / "held"
    other = begin(lambda: hold(path, sign, 0.6))
    wait_for(sign)
    with pytest.raises(OutputError, match=rf"the pool: process {other} on \S+ is using it; wait until"):
        holding(path, "the pool", wait=False).__enter__()
    monkeypatch.setattr(locks, "_FIRST_WORD", 0.1)
    said: list[str] = []
    with holding(path, "the pool", say=said.append):
        assert path.exists()
    assert not path.exists()
    assert len(said) == 1
    assert said[0].startswith(f"waiting for the pool: process {other} on ")
    assert end_of(other) == 0


def test_what_somebody_else_wrote_into_a_lock_file_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with open(path, "w") as file:
        file.write("\x1b[31mprocess of evil\n")
        file.flush()
        assert locks.try_lock(file.fileno()) is Held.HERE
        with pytest.raises(OutputError, match="it: another process is using it"):
            holding(path, "it", wait=False).__enter__()


def test_a_lock_goes_with_its_process_however_that_ends(tmp_path: Path) -> None:
    path, sign = tmp_path / "lock", tmp_path / "held"
    other = begin(lambda: hold(path, sign))
    wait_for(sign)
    os.kill(other, signal.SIGKILL)
    assert end_of(other) == -signal.SIGKILL
    assert path.exists()
    with holding(path, "it", wait=False):
        assert path.exists()


def test_a_forked_worker_does_not_keep_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    path, sign = tmp_path / "lock", tmp_path / "held"

    def parent() -> None:
        with holding(path, "it"):
            begin(worker)
            time.sleep(60)

    def worker() -> None:
        locks.set_up_worker(path)
        sign.write_text(str(os.getpid()))
        time.sleep(60)

    other = begin(parent)
    wait_for(sign)
    with pytest.raises(OutputError, match="is using it"):
        holding(path, "it", wait=False).__enter__()
    os.kill(other, signal.SIGKILL)
    end_of(other)
    try:
        with holding(path, "it", wait=False):
            pass
    finally:
        os.kill(int(sign.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    "code",
    [0, errno.ENOLCK, *(pytest.param(code, marks=pytest.mark.slow) for code in (errno.ENOSYS, errno.EOPNOTSUPP))],
)
def test_never_two_at_once_though_the_file_comes_and_goes(tmp_path: Path, code: int) -> None:
    """Every holder removes the lock file, and every second the whole folder, while others wait for it."""
    folder, count = tmp_path / "folder", tmp_path / "count"
    count.write_text("0")

    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    def work() -> None:
        import fcntl

        if code:
            fcntl.flock = refused
        for turn in range(60):
            with holding(folder / "lock", "it"):
                number = int(count.read_text())
                count.write_text("")  # whoever else reads now fails
                count.write_text(str(number + 1))
                if turn % 2:
                    locks.remove_folder(folder)

    others = [begin(work) for _ in range(4)]
    assert [end_of(other) for other in others] == [0] * 4
    assert count.read_text() == "240"
    assert [path.name for path in tmp_path.iterdir() if not path.is_dir()] == ["count"]
    assert not folder.exists() or not list(folder.iterdir())


def test_other_refusals_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", refused)
    with pytest.raises(OSError, match="Input/output error"):
        holding(tmp_path / "lock", "it").__enter__()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="link: cannot be locked"):
        holding(tmp_path / "link", "it").__enter__()
    assert not (tmp_path / "elsewhere").exists()


def test_scratch_of_the_living_stays_and_of_the_killed_goes(tmp_path: Path) -> None:
    def scratch(name: str) -> None:
        create_locked(tmp_path, f"{name}.", ".tmp")
        folder = create_locked_folder(tmp_path, f"{name}-folder.", ".tmp")
        (folder.path / "part").write_text("x")
        (tmp_path / name).touch()
        while name == "living":
            time.sleep(1)
        os._exit(0)  # as if it had been killed

    living = begin(lambda: scratch("living"))
    assert run(lambda: scratch("killed")) == 0
    wait_for(tmp_path / "living")
    (tmp_path / "link.tmp").symlink_to(tmp_path / "killed")
    sweep(tmp_path.glob("*.tmp"))
    left = sorted(path.name.split(".")[0] for path in tmp_path.glob("*.tmp"))
    assert left == ["link", "living", "living-folder"]
    os.kill(living, signal.SIGKILL)
    end_of(living)
    sweep(tmp_path.glob("*.tmp"))
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["link.tmp"]


def test_sweeping_while_scratch_is_made(tmp_path: Path) -> None:
    """A file is nobody's for the moment between being made and being locked; whoever made it notices."""

    def make() -> None:
        for _ in range(300):
            file, path = create_locked(tmp_path, "a.", ".tmp")
            os.write(file, b"x")
            time.sleep(0)
            assert os.path.exists(path)
            os.unlink(path)
            os.close(file)
            folder = create_locked_folder(tmp_path, "b.", ".tmp")
            assert (folder.path / "lock").exists()
            folder.remove()

    makers = [begin(make) for _ in range(2)]
    while any(os.waitid(os.P_PID, one, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for one in makers):
        sweep(tmp_path.glob("*.tmp"))
    assert [end_of(maker) for maker in makers] == [0, 0]


def test_a_new_folder_replaces_those_of_its_kind_that_nobody_uses(tmp_path: Path) -> None:
    for name in ("b[1].killed.tmp", "b[1].other", "b1.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    used = create_locked_folder(tmp_path, "b[1].", ".tmp")
    made = scratch_folder(tmp_path, "b[1].", ".tmp", mode=0o700)
    names = {"b[1].other", "b1.tmp", used.path.name, made.path.name}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700


def test_a_pin_keeps_a_file_as_long_as_it_lives_here(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    os.utime(path, (1, 1))
    assert pin(tmp_path / "nothing") is None
    one, two = pin(path), pin(path)
    assert one is not None
    assert time.time() - path.stat().st_mtime < 60, "it was not marked as used"
    copy = pickle.loads(pickle.dumps(one))  # noqa: S301 - our own
    del one
    assert not remove_unused(path)
    del two
    assert remove_unused(path), "a copy in another process keeps nothing"
    del copy


@needs_root
def test_files_of_others_are_used_and_left_alone(tmp_path: Path) -> None:
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.name.startswith(("test_", "popen-", "pytest-")):
            folder.chmod(0o755)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "file").write_text("x")
    (shared / "secret").touch(0o600)

    def other() -> None:
        assert pin(shared / "file") is not None
        assert not remove_unused(shared / "file"), "in a sticky folder it is not ours to remove"
        assert not remove_unused(shared / "secret")
        with pytest.raises(PermissionError):
            pin(shared / "secret")
        file, path = create_locked(shared, "own.", ".tmp", 0o600)
        sweep(shared.iterdir())
        assert os.path.exists(path)
        os.close(file)
        sweep(shared.iterdir())
        assert not os.path.exists(path)

    assert run(as_nobody(other)) == 0
    assert (shared / "file").exists()
