"""Engines by name, and what processes leave behind; what all engines promise is in test_engine_contract.py."""

from __future__ import annotations

import functools
import gc
import pickle
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from thresher import Processes, Serial, Threads, UsageError, make_engine
from thresher.runtime.engine import ENGINES, cores, reduced


def square(x: int) -> int:
    return x * x


def named(x: int) -> tuple[int, str]:
    return x, str(x)


def joined(one: str, other: str) -> str:
    return f"({one} {other})"


def by_hand(parts: list[str]) -> str:
    """Sixteen in a row from the left, then sixteen of these sums, until one is left."""
    while len(parts) > 1:
        parts = [functools.reduce(joined, parts[lo : lo + 16]) for lo in range(0, len(parts), 16)]
    return parts[0]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 32, 33, 255, 256, 257, 4_097])
def test_sums_are_added_in_a_tree_that_depends_on_their_number_only(count: int) -> None:
    engines = [Serial(), *(Threads(workers) for workers in (range(1, 9) if count < 300 else (3,)))]
    for engine in engines:
        sums = reduced(engine, named, iter(range(count)), joined)
        assert list(sums) == list(range(count))
        assert sums.total == by_hand([str(x) for x in range(count)])


def test_few_sums_are_held_at_a_time() -> None:
    """One of each level: the sums of 50,000 clusters are large."""
    held: list[int] = []

    def made(x: int) -> tuple[int, Sum]:
        return x, Sum(held)

    for _ in reduced(Serial(), made, range(1_000), Sum.plus):
        assert len(held) <= 4


class Sum:
    """Says how many of its kind there are."""

    def __init__(self, held: list[int]) -> None:
        self.held = held
        held.append(1)

    def __del__(self) -> None:
        self.held.pop()

    def plus(self, other: Sum) -> Sum:
        return self


def test_an_abandoned_map_leaves_no_threads() -> None:
    before = threading.active_count()
    results = Threads(3).map(square, range(100))
    next(results)
    del results
    assert threading.active_count() == before


def test_engines_by_name() -> None:
    assert list(ENGINES.all()) == ["processes", "ray", "serial", "threads"]
    assert make_engine("serial", 4) == Serial()
    assert make_engine("threads", 3) == Threads(3)
    assert make_engine("processes", 5) == Processes(5)
    assert make_engine().workers == cores()
    assert make_engine("threads:workers=2") == Threads(2)
    assert make_engine("threads:workers=2", 3) == Threads(3)
    with pytest.raises(UsageError, match="no engine 'thread'.*Did you mean 'threads'"):
        make_engine("thread")
    with pytest.raises(UsageError, match="at least 1"):
        make_engine("threads", 0)
    with pytest.raises(UsageError, match="the engine .threads. has no parameter 'address'; it has workers"):
        make_engine("threads", 2, {"address": "x"})


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files that only this test has."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def folders(place: Path) -> list[Path]:
    return sorted(place.glob("thresher-tasks-*"))


def test_the_folder_of_processes_is_their_user_s_alone_and_goes_with_them(temporary: Path) -> None:
    engine = Processes(1)
    assert folders(temporary) == []
    assert list(engine.map(square, range(3))) == [0, 1, 4]
    (folder,) = folders(temporary)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in folder.iterdir()) == ["begun", "lock"]  # a function's file goes with its map
    engine.close()
    assert folders(temporary) == []
    assert list(engine.map(square, range(3))) == [0, 1, 4]
    del engine
    gc.collect()
    assert folders(temporary) == []


KILLED = """
import os, sys, tempfile
tempfile.tempdir = sys.argv[1]
from thresher import Processes
engine = Processes(1)
results = engine.map(abs, iter(lambda: -1, 0))
next(results)
print("ready", flush=True)
sys.stdin.read()
"""


def test_only_what_killed_processes_left_is_swept(temporary: Path) -> None:
    """A folder that a living process holds stays, whatever the numbers of processes say."""
    command = [sys.executable, "-c", KILLED, str(temporary)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout.readline() == "ready\n"
        (held,) = folders(temporary)
        left = temporary / "thresher-tasks-left"
        left.mkdir()
        (left / "x.task").write_bytes(b"")
        (left / "lock").touch()
        (temporary / "thresher-tasks-link").symlink_to(held)
        assert list(Processes(1).map(square, [2])) == [4]
        assert held.exists()
        assert not left.exists()
        assert (temporary / "thresher-tasks-link").is_symlink()
        living.kill()
        living.wait()
    assert list(Processes(1).map(square, [2])) == [4]
    assert not held.exists()


def test_a_copy_of_processes_has_none_yet(temporary: Path) -> None:
    engine = Processes(1)
    assert list(engine.map(square, [2])) == [4]
    again = pickle.loads(pickle.dumps(engine))
    assert again == engine
    assert list(again.map(square, [3])) == [9]
    assert len(folders(temporary)) == 2
    again.close()
    assert list(engine.map(square, [4])) == [16]
    engine.close()


def test_a_script_that_its_workers_would_run_again_says_what_to_write(tmp_path: Path) -> None:
    """A worker imports the script, which would start workers: it ends without a word, and the script with one line."""
    script = tmp_path / "script.py"
    script.write_text(
        "import thresher as th\n"
        "try:\n"
        "    print(*th.Processes(2).map(abs, [-1, -2]))\n"
        "except Exception as error:\n"
        "    print(f'{type(error).__name__}: {error}')\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("UsageError: the worker processes do not start: in a script, what starts them goes")
    assert done.stdout.count("\n") == 1
