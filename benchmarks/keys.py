"""Key sets compared with Python sets: memory, construction, and lookups one by one and in batches."""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from common import median, side_by_side, table  # chooses the kernels before NumPy loads

# isort: split
import numpy as np

from thresher.dynamic.stream import StaticKeys
from thresher.export.keys import KeySet, key_batches, read_keys


def number(i: int) -> str:
    """A key as in img2dataset."""
    return f"{i:09d}"


def uid(i: int) -> str:
    """A key as in DataComp."""
    return hashlib.md5(str(i).encode()).hexdigest()


def keys(name: Callable[[int], str], start: int, stop: int) -> Iterator[str]:
    """Yield new keys, without other references to them."""
    return (name(i) for i in range(start, stop))


def grown(make: Callable[[], object]) -> tuple[float, float, object]:
    """Return final and peak memory in bytes of a construction, and the object."""
    tracemalloc.start()
    made = make()
    stays, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return stays, most, made


def one_by_one(chosen: KeySet, asked: list[str]) -> int:
    """Look up keys as a stage of a stream does."""
    return sum(chosen.find(key) >= 0 for key in asked)


def in_a_set(chosen: set[str], asked: list[str]) -> int:
    """Look up keys in a Python set."""
    return sum(key in chosen for key in asked)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument(
        "--traced", type=int, default=1_000_000, help="maximum number of keys for memory tracing, which is slow"
    )
    parser.add_argument("--asked", type=int, default=500_000, help="keys to look up, half of which are kept")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sizes, speeds = [], []
    for rows in args.rows:
        for name in (number, uid):
            asked = [*keys(name, 0, args.asked // 2), *keys(name, rows, rows + args.asked // 2)]
            np.random.default_rng(0).shuffle(asked)
            ours = KeySet.from_keys(keys(name, 0, rows))
            contestants = {
                "find": partial(one_by_one, ours, asked),
                "find_many": partial(ours.find_many, asked),
                "build": lambda name=name, rows=rows: KeySet.from_keys(keys(name, 0, rows)),
                "keys alone": lambda name=name, rows=rows: sum(1 for _ in keys(name, 0, rows)),
            }
            sizes_of_set = [f"{name.__name__}s, {rows:,}", f"{ours.nbytes / rows:.2f}"]
            if rows <= args.traced:
                _, most, _ = grown(lambda name=name, rows=rows: KeySet.from_keys(keys(name, 0, rows)))
                stays, _, theirs = grown(lambda name=name, rows=rows: set(keys(name, 0, rows)))
                contestants["set"] = partial(in_a_set, theirs, asked)
                sizes_of_set += [f"{most / rows:.1f}", f"{stays / rows:.0f}"]
            sizes.append([*sizes_of_set, *["-"] * (4 - len(sizes_of_set))])
            times = {what: median(spent) for what, spent in side_by_side(contestants, args.rounds).items()}
            building = times["build"] - times["keys alone"]
            rates = [
                f"{args.asked / times[what] / 1e6:.2f}" if what in times else "-"
                for what in ("find", "find_many", "set")
            ]
            speeds.append([f"{name.__name__}s, {rows:,}", *rates, f"{rows / building / 1e6:.2f}"])
            del ours, contestants
    print("Bytes per key\n")
    print(table(["keys", "KeySet", "peak, while it is built", "Python set"], sizes))
    print("\nMillion keys per second\n")
    print(table(["keys", "find", "find_many", "in a Python set", "building"], speeds))
    with tempfile.TemporaryDirectory() as folder:
        rows = args.rows[0]
        texts, subset = Path(folder, "keys.txt"), Path(folder, "subset.npy")
        texts.write_text("".join(f"{key}\n" for key in keys(number, 0, rows)))
        halves = np.random.default_rng(0).integers(0, 2**64, (rows, 2), np.uint64)
        np.save(subset, np.sort(halves.view("u8,u8").ravel()))
        contestants = {
            "text": partial(read_keys, texts),
            ".npy of uids": partial(read_keys, subset),
            "text as StaticKeys of a stream": lambda: StaticKeys.of_batches(key_batches(texts), rows),
        }
        times = side_by_side(contestants, args.rounds)
        _, most, _ = grown(contestants["text as StaticKeys of a stream"]) if rows <= args.traced else (0, 0, None)
    print(
        f"\nRead from a file of {rows:,}: "
        + ", ".join(f"{what} {median(spent):.2f} s" for what, spent in times.items())
    )
    if most:
        print(f"StaticKeys take {most / rows:.1f} bytes per key while they are built")


if __name__ == "__main__":
    main()
