"""A program for test_ray.py: a cluster of three raylets on this machine, of which one dies during each command."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # of a cluster that others can join; read when Ray is imported

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.resharding.common import hashes
from thresher import Ray, UsageError, make_engine
from thresher.cli.main import main


def square(folder: Path, x: int) -> int:
    with open(folder / "calls", "a") as file:
        file.write(f"{x} {ray.get_runtime_context().get_node_id()}\n")
    time.sleep(0.1)
    return x * x


def lose(cluster: Any, node: Any, after: float) -> threading.Thread:
    """Kill a raylet after some seconds."""
    thread = threading.Timer(after, cluster.remove_node, (node,), {"allow_graceful": False})
    thread.start()
    return thread


def tasks(cluster: Any, node: Any, folder: Path) -> None:
    """Tasks of the lost node run again, others only once."""
    from functools import partial

    engine = Ray(3, address=cluster.address)
    results = engine.map(partial(square, folder), range(60))
    first = next(results)
    thread = lose(cluster, node, 1)
    assert [first, *results] == [x * x for x in range(60)]
    thread.join()
    lines = [line.split() for line in (folder / "calls").read_text().splitlines()]
    assert any(where == node.node_id for _, where in lines), "the node did nothing"
    again = len(lines) - len({x for x, _ in lines})
    assert again <= 3, f"{again} tasks ran again"
    engine.close()


def same(cluster: Any, node: Any, folder: Path, command: list[str], out: str) -> None:
    """A command gives the bytes of serial."""
    found = []
    for engine in (["serial"], ["ray", "--ray-address", cluster.address]):
        where = folder / engine[0]
        more = ["--cache", str(where / "cache")] if command[0] == "run" else []
        thread = lose(cluster, node, 2.5) if engine[0] == "ray" else None
        assert main([*command, "-o", str(where / out), *more, "--engine", *engine, "--quiet"]) == 0
        found.append(hashes(where / out))
        if thread is not None:
            thread.join()
    assert found[0] == found[1], command
    assert len(found[0]) > 3


def refusals(cluster: Any) -> None:
    """Ray connects to one cluster at a time, and nodes must have what tasks need."""
    for text, why in (
        (f"ray:num_gpus=1,address={cluster.address}", "no node has what a task needs (CPU 1, GPU 1)"),
        (f"ray:device=cuda,address={cluster.address}", "no node has what a task needs (CPU 1, GPU 1)"),
        ("ray:address=127.0.0.1:1", "cannot connect (Connection refused)"),
        ("ray:address=nonsense", "cannot connect"),
    ):
        with pytest.raises(UsageError, match=re.escape(why)):
            make_engine(text)


if __name__ == "__main__":
    work = Path(sys.argv[1])
    short = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="t-", dir="/tmp")  # of sockets: their paths have a limit
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    refusals(made)
    tasks(made, made.add_node(num_cpus=1), work)
    assert make_engine(f"ray:address={made.address}").workers == 2
    for number, one in enumerate(sys.argv[2:]):
        same(made, made.add_node(num_cpus=1), work, one.split(" "), f"out{number}")

    ray.shutdown()  # a cluster does not end while this process is connected to it
    made.shutdown()
    shutil.rmtree(short)
    sys.stdout.write("good\n")
