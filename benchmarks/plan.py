"""``thresher plan --calibrate`` against real runs, by method and number of rows.

Compares seconds, and processor seconds, which are the same if other programs run at the same time.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import table  # chooses the kernels before NumPy loads

# isort: split
import numpy as np

from thresher import build, make_engine, open_store
from thresher.check.calibration import calibrated
from thresher.check.cost import Cluster, estimate, rows_of
from thresher.testing.pools import clustered

METHODS = {
    "clip-score": {"keep": "30%"},
    "density": {"keep": "30%"},
    "semdedup": {"eps": 0.05},
    "clipcov": {"keep": "30%"},
}


def write(folder: Path, rows: int, dim: int) -> str:
    folder.mkdir()
    for seed, name in enumerate(("image", "text")):
        file = np.lib.format.open_memmap(str(folder / f"{name}.npy"), "w+", np.float16, (rows, dim))
        for lo in range(0, rows, 100_000):
            part = slice(lo, min(lo + 100_000, rows))
            file[part] = clustered(part.stop - lo, dim, 300, seed=seed + lo)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as top:
        for rows in asked.rows:
            pool = write(Path(top) / f"{rows}", rows, asked.dim)
            for name, parameters in ((name, METHODS[name]) for name in asked.methods):
                constants = calibrated(make_engine("threads", asked.workers), asked.dim)
                steps, cluster = [build(name, parameters)], Cluster(1, asked.workers)
                foretold = estimate(steps, rows_of(open_store(pool)), cluster, constants)
                busy = sum(asked.workers * one.parts["compute"] + one.parts["driver"] for one in foretold.steps)
                busy += constants.start + constants.step * len(foretold.steps)
                words = [f"--{key}={value}" for key, value in parameters.items()]
                command = [sys.executable, "-m", "thresher", "select", name, pool, *words, "--quiet"]
                command += ["--workers", str(asked.workers), "-o", f"{top}/{rows}-{name}"]
                command += ["--cache", f"{top}/c{rows}-{name}"]
                begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                spent = time.perf_counter() - begin
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
                numbers = [f"{value:.1f}" for value in (foretold.seconds, spent, busy, used)]
                lines.append([name, f"{rows:,}", *numbers, f"{busy / used:.2f}x"])
                print(lines[-1], flush=True)
    heads = ["seconds estimated", "measured", "processor seconds estimated", "measured", "ratio"]
    print(table(["method", "rows", *heads], lines))


if __name__ == "__main__":
    main()
