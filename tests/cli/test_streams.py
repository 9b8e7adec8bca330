"""Standard streams that are closed, full, broken or of another encoding: no traceback, and the right exit code."""

from __future__ import annotations

import itertools
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher.runtime.progress import Bars, Lines, Silent, progress_for

THRESHER = [sys.executable, "-m", "thresher"]
KEY = "é😀3"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of keys that are not ASCII, a selection of it, and a cache."""
    folder = tmp_path_factory.mktemp("streams")
    pool = folder / "pool"
    pool.mkdir()
    np.save(pool / "image.npy", np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32))
    table = {"uid": [f"é😀{row}" for row in range(40)], "text": [f"caption ü {row}" for row in range(40)]}
    pq.write_table(pa.table(table), pool / "meta.parquet")
    run = [*THRESHER, "select", "random", "pool", "-o", "sel", "--keep", "50%", "--cache", "cache"]
    subprocess.run(run, cwd=folder, check=True, capture_output=True)
    return folder


COMMANDS = {
    "help": ("--help", 0),
    "help of a method": ("select semdedup --help", 0),
    "explain": (f"explain sel {KEY}", 0),
    "json": (f"explain sel {KEY} --json", 0),
    "no such key": ("explain sel 😀", 2),
    "error as json": ("explain sel 😀 --json", 2),
    "usage": ("explain", 2),
    "select": ("select random pool -o sel2 --keep 50% --cache cache --overwrite", 0),
}


def shell(folder: Path, words: str, redirection: str, **env: str) -> tuple[int, str, str]:
    """Run a command with a redirection; return its exit code and all that was printed."""
    line = f"{sys.executable} -m thresher {words} {redirection}"
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, timeout=60, env={**os.environ, **env})
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


CLOSED = ["2>&-", ">&- 2>&-", ">&-", "<&- >&- 2>&-"]
ONE_EACH = {("explain", ">&-"), ("no such key", "2>&-"), ("select", "<&- >&- 2>&-")}


@pytest.mark.parametrize(
    ("name", "redirection"),
    [
        pytest.param(*case, marks=() if case in ONE_EACH else pytest.mark.slow)
        for case in itertools.product(["explain", "no such key", "select"], CLOSED)
    ],
)
def test_closed_streams(made: Path, name: str, redirection: str) -> None:
    words, expected = COMMANDS[name]
    before = {path: path.read_bytes() for path in (made / "pool").iterdir()}
    code, out, err = shell(made, words, redirection)
    assert code == expected
    assert "Traceback" not in out + err
    assert "Exception ignored" not in err
    assert before == {path: path.read_bytes() for path in (made / "pool").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "| true"])
@pytest.mark.parametrize("name", COMMANDS)
def test_all_commands_with_all_streams(made: Path, name: str, redirection: str) -> None:
    words, expected = COMMANDS[name]
    code, out, err = shell(made, words, f"{redirection}; exit ${{PIPESTATUS[0]}}")
    allowed = {expected, 2} if redirection == ">/dev/full" else {expected}
    assert code in allowed, err
    assert "Traceback" not in out + err
    assert "Exception ignored" not in err


def test_a_full_disk_is_an_error_and_a_gone_reader_is_not(made: Path) -> None:
    code, _, err = shell(made, COMMANDS["explain"][0], ">/dev/full")
    assert (code, err) == (2, "Error: standard output: cannot be written (No space left on device)\n")
    code, _, err = shell(made, f"{COMMANDS['json'][0]}", "| true; exit ${PIPESTATUS[0]}")
    assert (code, err) == (0, "")
    code, out, _ = shell(made, "--help", "| head -n 1; exit ${PIPESTATUS[0]}")
    assert (code, out.count("\n")) == (0, 1)


@pytest.mark.parametrize(
    ("env", "name"),
    [
        pytest.param({"PYTHONIOENCODING": "latin-1"}, "explain", id="latin-1-explain", marks=pytest.mark.slow),
        pytest.param({"PYTHONIOENCODING": "latin-1"}, "no such key", id="latin-1-no such key"),
        pytest.param({"PYTHONIOENCODING": "ascii"}, "explain", id="ascii-explain"),
        pytest.param({"PYTHONIOENCODING": "ascii"}, "no such key", id="ascii-no such key", marks=pytest.mark.slow),
        pytest.param({"LC_ALL": "C"}, "explain", id="C-explain", marks=pytest.mark.slow),
        pytest.param({"LC_ALL": "C"}, "no such key", id="C-no such key", marks=pytest.mark.slow),
    ],
)
def test_terminals_that_lack_characters(made: Path, name: str, env: dict[str, str]) -> None:
    words, expected = COMMANDS[name]
    code, out, err = shell(made, words, "", **env)
    assert code == expected
    assert "Traceback" not in out + err
    assert re.search(r"\\U0001f600|\\udcf0|😀".encode().decode("latin-1"), out + err), out + err


@pytest.mark.parametrize("term", ["dumb", "xterm"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_bars_on_terminals(made: Path, term: str, encoding: str) -> None:
    code = (
        "import time, sys; from thresher.runtime.progress import progress_for\n"
        "bars = progress_for(False)\n"
        "with bars.task('é😀', 3) as advance:\n advance(1); bars.say('é😀'); advance(2)\n"
    )
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": term, "PYTHONIOENCODING": encoding}
    done = subprocess.Popen([sys.executable, "-c", code], stderr=slave, stdout=slave, env=env)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert done.wait(30) == 0
    assert b"Traceback" not in shown
    assert "é".encode(encoding) in shown


class Broken:
    """A stream whose reader has gone."""

    encoding, closed = "utf-8", False

    def __init__(self, terminal: bool) -> None:
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def fileno(self) -> int:
        raise OSError("not a file")

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_that_cannot_be_written_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(terminal))
    progress = progress_for(False)
    assert type(progress) is (Bars if terminal else Lines)
    with progress.task("read", 3) as advance:
        advance(3)
    progress.say("done")
    monkeypatch.setattr(sys, "stderr", None)
    assert type(progress_for(False)) is Silent
