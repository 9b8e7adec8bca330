"""metaclip: captions searched for entries, by the package in use and by another, and the whole method."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from thresher import Cache, Serial, build, open_store, run_steps
from thresher.pruning.entries import Matcher
from thresher.testing.pools import write_pool

WORDS = 200_000


def captions_and_entries(rows: int, entries: int) -> tuple[list[str], list[str]]:
    """Captions of 12 words with frequencies as in Zipf's law; all words, and pairs of words, as entries."""
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, (WORDS, 10), np.uint8)
    words = [bytes(row[: 3 + i % 8]).decode() for i, row in enumerate(letters)]
    odds = 1 / np.arange(1, WORDS + 1)
    odds /= odds.sum()
    captions = [" ".join(words[i] for i in row) for row in rng.choice(WORDS, (rows, 12), p=odds)]
    found = set(words[:entries])
    while len(found) < entries:
        found.update(f"{words[a]} {words[b]}" for a, b in rng.choice(WORDS, (50_000, 2), p=odds))
    return captions, sorted(found)[:entries]


def rival(entries: list[str]) -> object:
    """The same search by pyahocorasick."""
    import ahocorasick

    automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS)
    for number, entry in enumerate(entries):
        automaton.add_word(f" {entry} ", number)
    automaton.make_automaton()
    return lambda text: sorted({number for _, number in automaton.iter(f" {' '.join(text.split())} ")})


def alone(package: str, rows: int, entries: int) -> None:
    """Build and search with one package; memory is measured in a process of its own."""
    captions, found = captions_and_entries(rows, entries)
    memory = psutil.Process().memory_info().rss
    start = time.process_time()
    find = Matcher(found, ignore_case=False) if package == "ahocorasick_rs" else rival(found)
    built = time.process_time() - start
    memory = psutil.Process().memory_info().rss - memory
    start = time.process_time()
    matches = sum(len(find(text)) for text in captions)
    took = (time.process_time() - start) / rows * 1e6
    print(f"| {package} | {built:.1f} s | {memory / 2**20:,.0f} MiB | {took:.1f} s | {matches / rows:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--few", type=int, default=100_000, help="rows for the comparison")
    parser.add_argument("--entries", type=int, default=500_000)
    parser.add_argument("--package", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.package:
        alone(args.package, args.few, args.entries)
        return
    print("| package | build | memory | search, 1 million captions, CPU time | entries per caption |")
    print("|---|---|---|---|---|")
    for package in ("ahocorasick_rs", "pyahocorasick"):
        sizes = ["--few", str(args.few), "--entries", str(args.entries)]
        subprocess.run([sys.executable, __file__, "--package", package, *sizes], check=True, env=dict(os.environ))
    captions, entries = captions_and_entries(args.rows, args.entries)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "entries.txt").write_text("\n".join(entries))
        store = write_pool(folder / "pool", np.ones((args.rows, 1), np.float16), table={"text": captions})
        del captions
        print("\n| run | time | CPU time |\n|---|---|---|")
        file = {"entries": str(folder / "entries.txt")}
        for run, given in (
            ("keep 30%", {"keep": "30%", **file}),
            ("t = 20, cached", {"t": 20.0, **file}),
            ("keep 30%, entries made from the captions", {"keep": "30%"}),
        ):
            start, cpu = time.perf_counter(), time.process_time()
            cache, step = Cache.at(folder / "cache"), build("metaclip", given)
            run_steps(open_store(store.layout.location), [step], engine=Serial(), cache=cache)
            print(f"| {run} | {time.perf_counter() - start:.1f} s | {time.process_time() - cpu:.1f} s |")


if __name__ == "__main__":
    main()
