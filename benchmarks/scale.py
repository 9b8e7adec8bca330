"""Seconds and memory of each step on N x 64 float16 in clusters of very different sizes, from 10^6 rows to 10^8.

    python benchmarks/scale.py --rows 1_000_000 10_000_000 100_000_000 --folder /data/scale

Own memory is what is in no file: ``RssAnon``, sampled every 10 ms; mapped arrays are not in it. Memory a row is its
growth over the next smaller number of rows. Every step runs in a process of its own, and its result is kept in the
folder: the same command goes on where it was stopped, and ``--steps`` chooses some. 10^8 rows take 60 GB of disk
(26 GB for vectors, 4 GB for keys, the rest for the cache and results of one step, such as vectors in cluster order) and
an hour without clipcov, whose work in 500 classes grows with the square of the rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

from common import table  # chooses the kernels before NumPy loads

# isort: split
import numpy as np

DIM = 64
SHARD = 2_000_000
TOPICS = 2_000
STEPS = {
    "cluster": ["cluster", "POOL", "-o", "OUT", "--clusters", "500"],
    "density": ["select", "density", "POOL", "-o", "OUT", "--keep", "30%", "--clusters", "500"],
    "semdedup": ["select", "semdedup", "POOL", "-o", "OUT", "--eps", "0.05"],
    "semdedup keep": ["select", "semdedup", "POOL", "-o", "OUT", "--keep", "60%"],
    "semdedup prefer": ["select", "semdedup", "POOL", "-o", "OUT", "--eps", "0.05", "--prefer", "clip-score"],
    "clipcov": ["select", "clipcov", "POOL", "-o", "OUT", "--keep", "30%", "--clusters", "500"],
    "clip-score": ["select", "clip-score", "POOL", "-o", "OUT", "--keep", "30%"],
    "random": ["select", "random", "POOL", "-o", "OUT", "--keep", "30%"],
    "export": ["export", "SELECTION", "--as", "keys", "-o", "OUT"],
}


def write(folder: Path, rows: int) -> Path:
    """Write the shards that are missing: topics of sizes like 1 / i, a tenth of the rows nearly repeats another one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    topics = np.random.default_rng(0).standard_normal((TOPICS, DIM)).astype(np.float32)
    share = 1 / np.arange(1, TOPICS + 1)
    for number, lo in enumerate(range(0, rows, SHARD)):
        count, rng = min(SHARD, rows - lo), np.random.default_rng([1, number])
        names = ("image.npy", "text.npy", "metadata.parquet")
        targets = {name: folder / f"{name.partition('.')[0]}_{number:03}{Path(name).suffix}" for name in names}
        if all(path.exists() for path in targets.values()):
            continue
        image = topics[rng.choice(TOPICS, count, p=share / share.sum())]
        image += 0.7 * rng.standard_normal((count, DIM), np.float32)
        again = rng.choice(count, count // 10, replace=False)
        image[again] = image[rng.integers(0, count, len(again))] + 0.05 * rng.standard_normal(
            (len(again), DIM), np.float32
        )
        text = image + rng.standard_normal((count, DIM), np.float32)
        for name, array in (("image.npy", image), ("text.npy", text)):
            with open(folder / ".part", "wb") as file:
                np.save(file, array.astype(np.float16))
            (folder / ".part").rename(targets[name])
        keys = pa.array([f"{row:032x}" for row in range(lo, lo + count)])
        pq.write_table(pa.table({"uid": keys}), folder / ".part")
        (folder / ".part").rename(targets["metadata.parquet"])
    return folder


def own_memory() -> int:
    """Bytes of this process that are in no file."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def run_here(words: list[str]) -> None:
    """Run a command in this process, and print what it took as JSON."""
    from thresher.cli.main import main

    peak, ended = [own_memory()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], own_memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    begin, busy = time.perf_counter(), time.process_time()
    with redirect_stdout(sys.stderr):
        code = main(words)
    ended.set()
    thread.join()
    spent = {"seconds": time.perf_counter() - begin, "busy": time.process_time() - busy, "own": peak[0]}
    print(json.dumps({"code": code, **spent}))


def measured(top: Path, rows: int, step: str, workers: int) -> dict[str, float]:
    """Return what a step took, from an earlier run if there is one."""
    known = top / f"{rows}-{step.replace(' ', '-')}.json"
    if known.exists():
        return dict(json.loads(known.read_text()))
    out, cache = top / f"{rows}-{step.replace(' ', '-')}", top / f"{rows}-cache-{step.partition(' ')[0]}"
    places = {"POOL": str(top / f"{rows}"), "OUT": str(out), "SELECTION": str(top / f"{rows}-clip-score")}
    words = [places.get(word, word) for word in STEPS[step]] + ["--quiet"]
    if step != "export":
        words += ["--cache", str(cache), "--workers", str(workers), "--overwrite"]
    done = subprocess.run([sys.executable, __file__, "--run", *words], stdout=subprocess.PIPE, text=True, check=True)
    found = dict(json.loads(done.stdout.splitlines()[-1]))
    if found["code"]:
        raise SystemExit(f"{' '.join(words)}: failed")
    known.write_text(json.dumps(found))
    shutil.rmtree(cache, ignore_errors=True)
    if step not in ("clip-score", "export"):
        shutil.rmtree(out, ignore_errors=True)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        run_here(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[300_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=Path("out/scale"))
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    lines, before = [], dict[str, tuple[int, dict[str, float]]]()
    for rows in sorted(asked.rows):
        write(asked.folder / f"{rows}", rows)
        for step in asked.steps:
            found = measured(asked.folder, rows, step, asked.workers)
            growth = times = ""
            if step in before:
                fewer, known = before[step]
                growth = f"{(found['own'] - known['own']) / (rows - fewer):.1f}"
                times = f"{found['busy'] / known['busy'] * fewer / rows:.2f}x"
            before[step] = rows, found
            cells = [
                f"{found['seconds']:.0f}",
                f"{found['busy']:.0f}",
                f"{found['own'] / 2**20:,.0f} MiB",
                growth,
                times,
            ]
            lines.append([step, f"{rows:,}", *cells])
            print(lines[-1], file=sys.stderr, flush=True)
    print(table(["step", "rows", "s", "processor s", "own memory", "bytes a row", "processor time a row"], lines))


if __name__ == "__main__":
    main()
