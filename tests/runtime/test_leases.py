"""File systems without locks: heartbeats show what is in use, others are kept out, the dead are replaced."""

from __future__ import annotations

import fcntl
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.common import as_nobody, begin, end_of, needs_root, no_locks, run, wait_for, without_locks
from thresher import Cache, OutputError, Processes, UsageError
from thresher.runtime import leases
from thresher.runtime.leases import HEART, Lease
from thresher.runtime.locks import (
    create_locked,
    create_locked_folder,
    holding,
    keep_while,
    open_shared,
    pin,
    remove_unused,
    sweep,
    unused,
)

SHORT = Lease(heartbeat=0.05, ends=2.5)
LONG = Lease(heartbeat=0.05, ends=600)
AGO = 1_000.0


@pytest.fixture(autouse=True)
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither here nor in the copies of this process."""
    monkeypatch.setattr("fcntl.flock", no_locks)
    yield
    deadline = time.monotonic() + 10
    while beating() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not beating(), "a thread is left, though nothing is held"


def beating() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("heartbeat")]


def made_old(path: Path, seconds: float = AGO) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def hold(path: Path, sign: Path, lease: Lease, seconds: float = 60) -> None:
    with holding(path, "it", lease=lease):
        sign.touch()
        time.sleep(seconds)


@pytest.mark.parametrize(("heartbeat", "ends"), [(0, 1), (-1, 1), (1, 1.5), (float("nan"), 1)])
def test_leases_that_cannot_be(heartbeat: float, ends: float) -> None:
    with pytest.raises(UsageError, match="at most half the lease"):
        Lease(heartbeat, ends)


def test_the_holder_keeps_others_out_and_they_wait_for_it(tmp_path: Path) -> None:
    path, sign = tmp_path / "deep" / "lock", tmp_path / "held"
    other = begin(lambda: hold(path, sign, LONG, 0.5))
    wait_for(sign)
    told = rf"the pool: process {other} on \S+ is using it \(if it was killed, its lease ends after 600 s\); wait until"
    with pytest.raises(OutputError, match=told):
        holding(path, "the pool", wait=False, lease=LONG).__enter__()
    with holding(path, "the pool", lease=LONG):
        assert path.exists()
        assert run(lambda: refused(path, LONG)) == 0
    assert end_of(other) == 0
    assert list(path.parent.iterdir()) == []


def refused(path: Path, lease: Lease) -> None:
    with pytest.raises(OutputError, match="is using it"):
        holding(path, "it", wait=False, lease=lease).__enter__()


def test_the_lease_of_a_killed_holder_ends(tmp_path: Path) -> None:
    path, sign = tmp_path / "lock", tmp_path / "held"
    other = begin(lambda: hold(path, sign, SHORT))
    wait_for(sign)
    os.kill(other, signal.SIGKILL)
    assert end_of(other) == -signal.SIGKILL
    refused(path, LONG)
    with holding(path, "it", lease=SHORT):
        assert f"process {os.getpid()} on" in path.read_text()
    assert list(tmp_path.iterdir()) == [sign]


@pytest.mark.slow
def test_a_living_holder_is_never_robbed_whatever_the_clocks_say(tmp_path: Path) -> None:
    """It holds for longer than the lease, while others try all the time, on hosts with other clocks."""
    path, sign = tmp_path / "lock", tmp_path / "held"
    other = begin(lambda: hold(path, sign, SHORT))
    wait_for(sign)

    def take(clock: int) -> None:
        real = time.time
        time.time = lambda: real() + clock  # type: ignore[assignment]
        begun = time.monotonic()
        while time.monotonic() - begun < 1.2 * SHORT.ends:
            refused(path, SHORT)
            assert not remove_unused(path, lease=SHORT)
            time.sleep(0.01)

    takers = [begin(lambda clock=clock: take(clock)) for clock in (0, 86_400, -86_400)]
    assert [end_of(taker) for taker in takers] == [0] * 3
    os.kill(other, signal.SIGKILL)
    end_of(other)


def rounds(count: int, takers: int, prepare: Callable[[Path], None], folder: Path) -> list[list[int]]:
    """In every round several processes try to take one lock; return who got it, by round."""
    context = multiprocessing.get_context("fork")
    barrier, won = context.Barrier(takers + 1), context.SimpleQueue()

    def work(number: int) -> None:
        for turn in range(count):
            barrier.wait(60)
            got = False
            with suppress(OutputError), holding(folder / f"{turn}" / "lock", "it", wait=False, lease=LONG):
                got = True
                barrier.wait(60)
            if not got:
                barrier.wait(60)
            won.put((turn, number, got))

    others = [begin(lambda number=number: work(number)) for number in range(takers)]
    for turn in range(count):
        (folder / f"{turn}").mkdir()
        prepare(folder / f"{turn}" / "lock")
        barrier.wait(60)
        barrier.wait(60)
    found: list[list[int]] = [[] for _ in range(count)]
    for _ in range(count * takers):
        turn, number, got = won.get()
        found[turn] += [number] if got else []
    assert [end_of(other) for other in others] == [0] * takers
    return found


def stale(path: Path) -> None:
    path.write_text("process 1 on gone\n0123456789abcdef")
    made_old(path)


def stale_without_text(path: Path) -> None:
    """Its holder was killed between creating and writing it."""
    path.touch()
    made_old(path)


@pytest.mark.parametrize("prepare", [stale, stale_without_text, lambda path: None], ids=["killed", "empty", "new"])
def test_of_several_takers_exactly_one_wins(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    found = rounds(150, 4, prepare, tmp_path)
    assert [len(winners) for winners in found] == [1] * 150
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_takers_that_are_killed_meanwhile_do_not_block_the_others(tmp_path: Path) -> None:
    """At every change on disk of the one that takes over, others win once the lease has ended."""
    for point in range(30):
        path = tmp_path / f"{point}" / "lock"
        path.parent.mkdir()
        stale(path)
        died = run(lambda path=path, point=point: dying_at(point, path))
        for one in path.parent.iterdir():
            made_old(one)
        with holding(path, "it", lease=LONG):
            assert run(lambda path=path: refused(path, LONG)) == 0
        for one in path.parent.iterdir():
            made_old(one)
        sweep(path.parent.iterdir(), LONG)
        assert list(path.parent.iterdir()) == []
        if died == 0:
            break
    assert died == 0
    assert point > 5


def dying_at(point: int, path: Path) -> None:
    reached = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def once(*args: Any, **named: Any) -> Any:
            nonlocal reached
            if reached == point:
                os._exit(9)
            reached += 1
            return call(*args, **named)

        return once

    for name in ("open", "utime", "unlink", "write"):
        setattr(os, name, counted(getattr(os, name)))
    with holding(path, "it", wait=False, lease=LONG):
        pass


@pytest.mark.slow
def test_a_holder_that_was_asleep_for_longer_than_the_lease_takes_nothing_from_the_next(tmp_path: Path) -> None:
    path, sign = tmp_path / "lock", tmp_path / "held"
    first = begin(lambda: hold(path, sign, SHORT, 0.2))
    wait_for(sign)
    os.kill(first, signal.SIGSTOP)
    with holding(path, "it", lease=SHORT):
        own = path.read_text()
        os.kill(first, signal.SIGCONT)
        assert end_of(first) == 0
        assert path.read_text() == own
        refused(path, SHORT)
    assert list(tmp_path.iterdir()) == [sign]


@pytest.mark.slow
def test_scratch_of_the_living_stays_and_of_the_killed_goes(tmp_path: Path) -> None:
    def scratch(name: str) -> None:
        file, _ = create_locked(tmp_path, f"{name}.", ".tmp", lease=SHORT)
        folder = create_locked_folder(tmp_path, f"{name}-folder.", ".tmp", lease=SHORT)
        (folder.path / "part").write_text("x")
        made_old(folder.path / "part")
        (tmp_path / name).touch()
        while name == "living":
            time.sleep(1)
        os._exit(0)  # as if it had been killed

    living = begin(lambda: scratch("living"))
    assert run(lambda: scratch("killed")) == 0
    wait_for(tmp_path / "living")
    sweep(tmp_path.glob("*.tmp"), LONG)
    assert len(list(tmp_path.glob("*.tmp"))) == 4, "the lease has not ended"
    begun = time.monotonic()
    while time.monotonic() - begun < 1.2 * SHORT.ends:
        sweep(tmp_path.glob("*.tmp"), SHORT)
        time.sleep(0.05)
    left = sorted(path.name.split(".")[0] for path in tmp_path.glob("*.tmp"))
    assert left == ["living", "living-folder"]
    os.kill(living, signal.SIGKILL)
    end_of(living)
    for path in [*tmp_path.glob("*.tmp"), *tmp_path.glob("*.tmp/*")]:
        made_old(path)
    sweep(tmp_path.glob("*.tmp"), SHORT)
    assert not list(tmp_path.glob("*.tmp"))


def test_of_several_sweepers_none_disturbs_the_others(tmp_path: Path) -> None:
    for number in range(40):
        folder = tmp_path / f"{number}.tmp"
        folder.mkdir()
        for name in ("lock", "a", "b"):
            (folder / name).touch()
            made_old(folder / name)
    sweepers = [begin(lambda: sweep(sorted(tmp_path.glob("*.tmp")), LONG)) for _ in range(4)]
    assert [end_of(one) for one in sweepers] == [0] * 4
    sweep(sorted(tmp_path.glob("*.tmp")), LONG)
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_block_about_an_unused_folder_is_passed_on(tmp_path: Path) -> None:
    for number, seconds in enumerate((AGO, 0)):
        folder = create_locked_folder(tmp_path, f"{number}.", ".tmp")
        made_old(folder.path / "lock", seconds)
        with pytest.raises(FileNotFoundError, match="mine"):
            look_and_fail(folder.path, seconds == AGO)
        folder.remove()


def look_and_fail(path: Path, expected: bool) -> None:
    with unused(path, lease=SHORT) as free:
        assert free == expected
        raise FileNotFoundError("mine")


@pytest.mark.slow
def test_readers_keep_what_they_use(tmp_path: Path) -> None:
    pinned, mapped_, free = (tmp_path / name for name in ("pinned", "mapped", "free"))
    for path in (pinned, mapped_, free):
        path.write_bytes(bytes(100))
        made_old(path)

    def read() -> None:
        held = pin(pinned, SHORT)
        file = open_shared(mapped_, SHORT)
        assert file is not None
        with os.fdopen(file, "rb") as opened:
            array = np.memmap(opened, np.uint8, "r")
            keep_while(array._mmap, mapped_, file, SHORT)
        view = array[3:7]
        del array
        (tmp_path / "sign").touch()
        time.sleep(60)
        assert held, view

    reader = begin(read)
    wait_for(tmp_path / "sign")
    assert remove_unused(free, lease=SHORT)
    begun = time.monotonic()
    while time.monotonic() - begun < 1.2 * SHORT.ends:
        assert not remove_unused(pinned, lease=SHORT)
        assert not remove_unused(mapped_, lease=SHORT)
        time.sleep(0.05)
    os.kill(reader, signal.SIGKILL)
    end_of(reader)
    for path in (pinned, mapped_):
        made_old(path)
        assert remove_unused(path, lease=SHORT)


def test_the_thread_is_there_while_something_is_used_and_not_in_copies_of_the_process(tmp_path: Path) -> None:
    def gone() -> bool:
        deadline = time.monotonic() + 10
        while beating() and time.monotonic() < deadline:
            time.sleep(0.01)
        return not beating()

    assert not beating()
    with holding(tmp_path / "lock", "it"), holding(tmp_path / "other", "it"):
        assert len(beating()) == 1
        assert run(lambda: no_thread_here(tmp_path)) == 0
    assert gone()
    file, path = create_locked(tmp_path, "a", ".tmp")
    assert beating()
    os.close(file)
    assert gone(), "closing the file ends its use"
    assert Path(path).exists()
    folder = create_locked_folder(tmp_path, "b")
    folder.remove()
    assert gone()
    (tmp_path / "file").touch()
    held = pin(tmp_path / "file")
    assert held
    assert beating()
    del held
    gc.collect()
    assert gone()


def no_thread_here(folder: Path) -> None:
    assert not beating()
    with holding(folder / "third", "it"):
        assert beating()


def test_arrays_of_a_cache_are_kept_while_they_are_mapped(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=0)
    path = cache.path("numbers", {})
    cache.save(path, np.arange(10))
    cache.trim()
    assert path.exists(), "it was just used, perhaps by another process"
    array = cache.load(path)
    assert array is not None
    view = np.asarray(array)[2:]
    del array
    time.sleep(1.2)  # until uses by a file that was closed have ended
    assert beating()
    del view
    gc.collect()
    made_old(path)
    cache.trim()
    assert not path.exists()


def in_worker(path: str) -> bool:
    fcntl.flock = no_locks  # type: ignore[assignment]
    with holding(path, "it", wait=False, lease=SHORT):
        own = Path(path).read_text()
        Path(path).with_name("sign").touch()
        time.sleep(1.2 * SHORT.ends)
        return Path(path).read_text() == own


@pytest.mark.slow
def test_it_works_in_worker_processes(tmp_path: Path) -> None:
    engine = Processes(1)
    found: list[bool] = []
    waiting = threading.Thread(target=lambda: found.extend(engine.map(in_worker, [str(tmp_path / "lock")])))
    waiting.start()
    wait_for(tmp_path / "sign")
    while not found:
        with suppress(OutputError), holding(tmp_path / "lock", "it", wait=False, lease=SHORT):
            break  # the worker sees it if this was too early
        time.sleep(0.02)
    waiting.join()
    engine.close()
    assert found == [True]


@needs_root
def test_what_another_user_left_is_told_and_left_alone(tmp_path: Path) -> None:
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.name.startswith(("test_", "popen-", "pytest-")):
            folder.chmod(0o755)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    stale(shared / "lock")
    (shared / "entry").write_text("x")
    made_old(shared / "entry")

    def other() -> None:
        with pytest.raises(OutputError, match="it: a killed process of another user left .*lock, which cannot be"):
            holding(shared / "lock", "it", wait=False, lease=LONG).__enter__()
        assert pin(shared / "entry", LONG) is not None
        assert not remove_unused(shared / "entry", lease=LONG)
        sweep(shared.iterdir(), LONG)

    assert run(without_locks(as_nobody(other))) == 0
    assert sorted(path.name for path in shared.iterdir()) == ["entry", "lock"]


def test_a_file_system_that_does_not_answer_blocks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat that hangs does not stop others from beginning or ending a use."""
    hangs, goes_on = threading.Event(), threading.Event()

    def beat(_: Any) -> bool:
        hangs.set()
        return goes_on.wait(20)

    monkeypatch.setattr(leases._Kept, "beat", beat)
    (tmp_path / "file").touch()
    end = HEART.keep(tmp_path / "file", Lease(0.01, 1))
    assert hangs.wait(20)
    HEART.keep(tmp_path / "file", Lease(0.01, 1))()
    end()
    goes_on.set()


def test_a_suspended_holder_notices_that_another_took_over(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holding(path, "the pool", lease=LONG) as still_held:
        still_held()
        mine = path.read_bytes()
        path.write_bytes(b"process 7 on elsewhere\n0123")
        with pytest.raises(OutputError, match="the pool: another process took it over.* for 600 s .*; nothing more"):
            still_held()
        path.unlink()
        with pytest.raises(OutputError, match="took it over"):
            still_held()
        path.write_bytes(mine)
        still_held()
