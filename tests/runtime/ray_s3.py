"""A program for test_ray_s3.py: several raylets, everything in object storage, and what dies meanwhile.

Arguments: a folder with a pool, tars and the results of ``serial`` on disk; the address of the same in object storage.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # of a cluster that others can join; read when Ray is imported

from ray.cluster_utils import Cluster

from tests.objects import hashes_at
from tests.resharding.common import hashes
from thresher.io.places import place


def commands(work: Path, top: str) -> dict[str, list[str]]:
    """The commands whose results must be those of serial on disk."""
    return {
        "out": ["run", str(work / "recipe.toml"), f"{top}/pool", "--cache", str(work / "cache")],
        "embedded": ["embed", f"{top}/tars/{{00000..00011}}.tar", "--encoder", "tests.toy:Slow", "--batch-size", "4"],
        "shards": ["reshard", f"{top}/tars/{{00000..00011}}.tar", str(work / "keys"), "--per-shard", "6"],
    }


def started(cluster: Any, command: list[str], out: str) -> subprocess.Popen[str]:
    """Start a command on the cluster, in a process of its own."""
    words = [*command, "-o", out, "--engine", "ray", "--ray-address", cluster.address, "--quiet"]
    return subprocess.Popen([sys.executable, "-m", "thresher", *words], text=True, stderr=subprocess.PIPE)


def finished(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something is there, or the command has ended."""
    end = time.monotonic() + 60
    while not there() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def workers() -> list[int]:
    """The processes of Ray's workers that run tasks."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ")
            mine = os.environ["RAY_TMPDIR"].encode() in (path / "environ").read_bytes()
        except OSError:
            continue
        if words.startswith(b"ray::") and not re.search(b"IDLE|Agent", words) and mine:
            found.append(int(path.name))
    return found


def main(work: Path, top: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    asked = commands(work, top)

    # All three, each with a node that is lost meanwhile.
    for name, command in asked.items():
        node, out = cluster.add_node(num_cpus=1), place(f"{top}/{name}")
        process = started(cluster, command, str(out))
        # ``run`` works in the cache at first, the others write to where the result goes.
        begun = (work / "cache" / "arrays").exists if name == "out" else out.exists
        wait_for(begun, process)
        assert process.poll() is None, name
        cluster.remove_node(node, allow_graceful=False)
        finished(process)
        assert hashes_at(str(out)) == hashes(work / name), name

    # A worker is killed, then the command itself; the same command again does only what is missing.
    out = place(f"{top}/again")
    tables = out / "metadata"
    process = started(cluster, asked["embedded"], str(out))
    wait_for(lambda: bool(tables.entries()), process)
    for worker in workers()[:1]:
        os.kill(worker, signal.SIGKILL)
    wait_for(lambda: len(tables.entries()) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(1)  # the cluster stops its tasks
    before = {path.name: path.stat().st_mtime for path in tables.iterdir()}
    assert 3 <= len(before) < 12, before
    finished(started(cluster, asked["embedded"], str(out)))
    assert hashes_at(str(out)) == hashes(work / "embedded")
    again = [name for name, changed in before.items() if (tables / name).stat().st_mtime != changed]
    assert not again, again
    cluster.shutdown()


if __name__ == "__main__":
    short = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="t-", dir="/tmp")  # of sockets: their paths have a limit
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    finally:
        shutil.rmtree(short, ignore_errors=True)
    sys.stdout.write("good\n")
