"""Engines on one pool: density and semdedup, a task that does nothing, and what is sent to workers and back."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from common import median, pool_of, ratio, side_by_side, table  # chooses the kernels before NumPy loads

# isort: split
from ray import cloudpickle

from thresher import Cache, Processes, Ray, Threads, build, open_store, run_steps
from thresher.runtime.process import one_blas_thread

BEST = "threads"


@dataclass(frozen=True)
class Counting:
    """Runs tasks in this thread, and counts the bytes that another engine would send."""

    name: ClassVar[str] = "counting"
    shares_memory: ClassVar[bool] = False

    workers: int = 2
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("maps", "tasks", "sent", "received"), 0))

    def map(self, fn: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        self.bytes["maps"] += 1
        self.bytes["sent"] += len(cloudpickle.dumps(fn, protocol=5))
        with one_blas_thread:
            for task in tasks:
                result = fn(task)
                self.bytes["tasks"] += 1
                self.bytes["sent"] += len(cloudpickle.dumps(task, protocol=5))
                self.bytes["received"] += len(cloudpickle.dumps(result, protocol=5))
                yield result


def steps(clusters: int) -> dict[str, Any]:
    """The methods that are timed."""
    return {
        "density": build("density", {"keep": "30%", "clusters": clusters}),
        "semdedup": build("semdedup", {"eps": 0.05, "clusters": clusters}),
    }


def each_task(engine: Any, count: int) -> float:
    """Milliseconds of a task that does nothing."""
    begin = time.perf_counter()
    for _ in engine.map(abs, iter(range(count))):
        pass
    return (time.perf_counter() - begin) * 1e3 / count


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pools", type=Path, default=Path(tempfile.gettempdir()) / "thresher-bench")
    args = parser.parse_args()
    store = open_store(str(pool_of(args.rows, args.dim, args.pools)))
    begin = time.perf_counter()
    ray = Ray(2)
    list(ray.map(abs, range(2)))
    print(f"Ray starts in {time.perf_counter() - begin:.1f} s\n")
    engines = {BEST: Threads(2), "processes": Processes(2), "ray": ray}
    for name, engine in engines.items():
        list(engine.map(abs, range(4)))  # starts the workers
        print(f"{name}: {each_task(engine, 3_000):.3f} ms for a task that does nothing")

    def run(step: Any, engine: Any) -> None:
        with tempfile.TemporaryDirectory() as cache:
            run_steps(store, [step], engine=engine, cache=Cache.at(cache))

    lines = []
    for name, step in steps(args.clusters).items():
        times = side_by_side({key: lambda e=e, s=step: run(s, e) for key, e in engines.items()}, args.rounds)
        for key in engines:
            lines.append([name, key, f"{median(times[key]):.1f}", f"{ratio(times, key, BEST):.2f}x"])
    ray.close()
    engines["processes"].close()
    print("\n" + table(["", "engine, 2 workers", "seconds", "relative to threads"], lines))
    lines = []
    for name, step in steps(args.clusters).items():
        run(step, counting := Counting())
        sent = counting.bytes
        megabytes = [f"{sent[way] / 2**20:,.0f} MiB" for way in ("sent", "received")]
        lines.append([name, f"{sent['maps']:,}", f"{sent['tasks']:,}", *megabytes])
    print("\n" + table(["", "maps", "tasks", "sent to workers", "received"], lines))


if __name__ == "__main__":
    main()
