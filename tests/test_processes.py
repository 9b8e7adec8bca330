"""A command that takes too long leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import finished, kill_tree

PARENT = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
children = [subprocess.Popen(sleep, start_new_session=own) for own in (False, True)]
open(sys.argv[1], "w").write(" ".join(str(child.pid) for child in children))
print("begun", flush=True)
time.sleep(float(sys.argv[2]))
[child.kill() for child in children]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_command_that_takes_too_long_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "children")]
    with subprocess.Popen([*command, "60"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        kill_tree(process.pid)
    for number in (tmp_path / "children").read_text().split():
        begin = time.monotonic()
        while alive(int(number)):
            assert time.monotonic() - begin < 10, f"process {number} is still there"
            time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        finished([*command, "60"], timeout=0.05)
    assert finished([*command, "0"], timeout=60).stdout == "begun\n"


def alive(number: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent to notice."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX" and os.path.exists(f"/proc/{number}")
