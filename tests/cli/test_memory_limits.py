"""Commands under a limit of their address space: one line, or the same result as without a limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher.runtime.memory import OUT_OF_MEMORY, is_out_of_memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v has no effect elsewhere")

COMMANDS = {
    "select": "select semdedup pool -o new --eps 0.5 --clusters 5 --overwrite --quiet --cache {cache}",
    "inspect": "inspect pool --quiet --cache {cache}",
    "export": "export sel --as parquet -o new.parquet --overwrite",
    "explain": "explain sel row:7",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limits")
    pool = folder / "pool"
    pool.mkdir()
    np.save(pool / "image.npy", np.random.default_rng(0).standard_normal((3000, 32)).astype(np.float32))
    pq.write_table(pa.table({"uid": [f"k{i}" for i in range(3000)]}), pool / "meta.parquet")
    run = "select semdedup pool -o sel --eps 0.5 --clusters 5 --cache first"
    subprocess.run([sys.executable, "-m", "thresher", *run.split()], cwd=folder, check=True, capture_output=True)
    return folder


def limited(folder: Path, name: str, megabytes: int, more: str = "") -> subprocess.CompletedProcess[str]:
    words = COMMANDS[name].format(cache=f"cache-{name}-{megabytes}")
    line = f"ulimit -v {megabytes * 1024}; exec {sys.executable} -m thresher {words} {more}"
    return subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=120)


def check(folder: Path, name: str, megabytes: int) -> bool:
    """Check a command under a limit; return whether it had enough memory."""
    done = limited(folder, name, megabytes)
    if done.returncode != 0:
        assert (done.returncode, done.stderr) == (2, f"Error: {OUT_OF_MEMORY}\n"), done.stdout
        return False
    if name == "select":
        for array in ("mask.npy", "dropped_by.npy"):
            assert (folder / "sel" / array).read_bytes() == (folder / "new" / array).read_bytes()
    return True


@pytest.mark.parametrize(("name", "megabytes"), [("select", 60), ("select", 120), ("inspect", 160), ("explain", 140)])
def test_too_little_memory_is_one_line(made: Path, name: str, megabytes: int) -> None:
    assert not check(made, name, megabytes)


def test_too_little_memory_as_json(made: Path) -> None:
    done = limited(made, "inspect", 100, "--json")
    assert (done.returncode, done.stderr) == (2, "")
    assert json.loads(done.stdout) == {"error": {"type": "MemoryError", "message": OUT_OF_MEMORY}}


def test_the_command_ends_when_its_process_is_killed(tmp_path: Path) -> None:
    """It runs in a child of the process that a scheduler knows."""
    script = (
        "import os, time\nfrom thresher.runtime.limited import run_limited\n"
        "def command():\n    open('started', 'w').write(str(os.getpid()))\n    time.sleep(60)\n    return 0\n"
        "run_limited(command, lambda: 2)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    number = ""
    while not number:
        time.sleep(0.05)
        number = (tmp_path / "started").read_text() if (tmp_path / "started").exists() else ""
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while is_running(number) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(number)


def is_running(number: str) -> bool:
    """Return whether a process exists and has not ended: one that nobody waits for stays as a zombie."""
    try:
        return Path("/proc", number, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_any_limit(made: Path, name: str) -> None:
    sizes = (30, 45, 60, 90, 120, 160, 200, 240, 280, 320, 360, 400, 450, 500, 560, 640, 720, 800, 900, 1000, 1200)
    enough = [megabytes for megabytes in (*sizes, 1400, 1700, 2000, 2500, 3000, 8000) if check(made, name, megabytes)]
    assert 8000 in enough


@pytest.mark.slow
def test_a_command_that_is_not_short_of_memory_is_as_without_a_limit(made: Path) -> None:
    done = limited(made, "explain", 8000)
    free = subprocess.run(
        [sys.executable, "-m", "thresher", *COMMANDS["explain"].split()], cwd=made, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (free.returncode, free.stdout, free.stderr)
    line = f"ulimit -v 8000000; exec {sys.executable} -m thresher explain sel nothing"
    done = subprocess.run(["bash", "-c", line], cwd=made, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: no row 'nothing'")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("os.write(2, b'terminate called: std::bad_alloc\\n'); os.abort()", (2, "short\n")),
        ("os.write(2, b'OpenBLAS error: Memory allocation still failed\\n'); os._exit(1)", (2, "short\n")),
        ("os._exit(127)", (2, "short\n")),
        ("os.write(2, b'something else\\n'); os._exit(1)", (1, "something else\n")),
        ("sys.stderr.write('mine\\n'); sys.exit(2)", (2, "mine\n")),
        ("os.kill(os.getpid(), 9)", (137, "")),
        ("import atexit; atexit.register(os.abort); return 2", (2, "")),
        ("import atexit; atexit.register(os.abort); return 0", (0, "")),
    ],
)
def test_how_a_child_ended(code: str, expected: tuple[int, str]) -> None:
    script = (
        "import os, sys\nfrom thresher.runtime.limited import run_limited\n"
        f"def command():\n    {code}\n"
        "def short():\n    sys.stderr.write('short\\n')\n    return 2\n"
        "sys.exit(run_limited(command, short))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == expected


@pytest.mark.parametrize(
    ("before", "expected"),
    [("OpenBLAS blas_thread_init: pthread_create failed for thread 1 of 2", "MemoryError"), ("", "KeyboardInterrupt")],
)
def test_openblas_that_interrupts_its_process_is_not_the_user(before: str, expected: str) -> None:
    script = (
        "import os, signal\nfrom thresher.runtime.limited import run_limited\n"
        "def command():\n"
        f"    os.write(2, {before.encode()!r})\n"
        "    try:\n        signal.raise_signal(signal.SIGINT)\n"
        "    except BaseException as error:\n        print(type(error).__name__)\n"
        "    return 2\n"
        "run_limited(command, lambda: 3)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"{expected}\n"


def test_a_child_that_can_get_no_memory_gets_the_reserve(tmp_path: Path) -> None:
    """Python loops forever if it finds no memory for a number while it raises an exception."""
    script = (
        "import mmap, os, resource, time\nfrom thresher.runtime.limited import run_limited\n"
        "def command():\n"
        "    first = resource.getrlimit(resource.RLIMIT_AS)[0]\n"
        "    kept = []\n"
        "    for size in (1 << 20, 4096):\n"
        "        try:\n            while True: kept.append(mmap.mmap(-1, size))\n"
        "        except (OSError, MemoryError): pass\n"
        "    while resource.getrlimit(resource.RLIMIT_AS)[0] == first: pass\n"
        "    os.write(1, b'%d' % (resource.getrlimit(resource.RLIMIT_AS)[0] - first))\n"
        "    os._exit(0)\n"
        "run_limited(command, lambda: 2)\n"
    )
    line = f'ulimit -v 200000; exec {sys.executable} -c "$0"'
    done = subprocess.run(["bash", "-c", line, script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == 2 << 20


def test_which_errors_mean_that_there_is_no_memory() -> None:
    for error in (
        MemoryError(),
        pa.ArrowMemoryError("x"),
        np._core._exceptions._ArrayMemoryError((2**40,), np.dtype("f8")),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        ValueError("field 'target' is required for AnnAssign"),
        ImportError("libarrow.so: failed to map segment from shared object"),
        pa.ArrowException("Unknown error: Failed to launch worker thread: Resource temporarily unavailable"),
        duckdb.OutOfMemoryException("Out of Memory Error: Failed to allocate block of 16 bytes (bad allocation)"),
    ):
        assert is_out_of_memory(error)
        outer = ValueError("the file is damaged")
        outer.__context__ = error
        assert is_out_of_memory(outer)
    for error in (
        None,
        ValueError("a model is required for this step"),
        OSError(28, "No space left on device"),
        KeyboardInterrupt(),
    ):
        assert not is_out_of_memory(error)
