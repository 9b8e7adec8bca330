"""`thresher select density` as a whole process: time relative to the bare products, memory by number of rows."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import bare_products, kernel, median, pool_of, table  # chooses the kernels before NumPy loads

# isort: split
import numpy as np


def one_run(pool: Path, centroids: Path, scratch: Path) -> tuple[float, float, float]:
    """Seconds, peak private memory and peak resident memory (bytes) of a run with an empty cache."""
    import psutil

    for name in ("out", "cache"):
        shutil.rmtree(scratch / name, ignore_errors=True)
    command = [sys.executable, "-m", "thresher", "select", "density", str(pool), "-o", str(scratch / "out")]
    command += ["--keep", "20%", "--centroids", str(centroids), "--cache", str(scratch / "cache"), "--quiet"]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    watched, private, resident = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        try:
            memory = watched.memory_info()
        except psutil.NoSuchProcess:
            break
        # Pages of mapped files count as shared; the rest is private memory of the process.
        private, resident = max(private, memory.rss - memory.shared), max(resident, memory.rss)
        time.sleep(0.01)
    spent = time.perf_counter() - begin
    if process.wait():
        raise SystemExit("the run failed")
    return spent, private, resident


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pools", type=Path, default=Path(tempfile.gettempdir()) / "thresher-bench")
    args = parser.parse_args()
    lines, peaks = [], {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for rows in args.rows:
            pool = pool_of(rows, args.dim, args.pools)
            sample = np.load(pool / "image.npy", mmap_mode="r")[:: rows // args.clusters][: args.clusters]
            centroids = np.ascontiguousarray(sample, np.float32)
            np.save(scratch / "centroids.npy", centroids)
            one_run(pool, scratch / "centroids.npy", scratch)  # warms the page cache
            times, bare = [], []
            for _ in range(args.rounds):
                bare.append(bare_products(rows, args.dim, args.clusters))
                spent, private, resident = one_run(pool, scratch / "centroids.npy", scratch)
                times.append(spent)
                peaks[rows] = max(peaks.get(rows, 0), private)
            relative = median([t / b for t, b in zip(times, bare, strict=True)])
            lines.append(
                [
                    f"{rows:,}", f"{median(times):.2f}", f"{median(bare):.2f}", f"{relative:.2f}x",
                    f"{peaks[rows] / 1e6:.0f} MB", f"{resident / 1e6:.0f} MB",
                ]
            )  # fmt: skip
    settings = f"{args.clusters} given centroids, {args.rounds} rounds, {kernel()} kernels"
    print(f"select density, x {args.dim} float16 .npy, {settings}\n")
    head = ["rows", "seconds", "bare products", "ratio", "own memory, peak", "with mapped pages"]
    print(table(head, lines))
    if len(peaks) > 1:
        (small, a), *_, (large, b) = sorted(peaks.items())
        print(f"\nMemory grows by {(b - a) / (large - small):.1f} bytes per row from {small:,} to {large:,} rows.")


if __name__ == "__main__":
    main()
