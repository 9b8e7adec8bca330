"""Sets of keys beside Python's own: memory, building, and lookups one by one and many at once."""

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

from thresher.export.keys import KeySet, read_keys


def number(i: int) -> str:
    """A key of img2dataset."""
    return f"{i:09d}"


def uid(i: int) -> str:
    """A key of DataComp."""
    return hashlib.md5(str(i).encode()).hexdigest()


def keys(name: Callable[[int], str], start: int, stop: int) -> Iterator[str]:
    """Keys, none of which anyone else holds."""
    return (name(i) for i in range(start, stop))


def grown(make: Callable[[], object]) -> tuple[float, float, object]:
    """Bytes that stay, and bytes at the most, while something is made; and it."""
    tracemalloc.start()
    made = make()
    stays, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return stays, most, made


def one_by_one(chosen: KeySet, asked: list[str]) -> int:
    """Lookups as a stage of a stream does them."""
    return sum(chosen.find(key) >= 0 for key in asked)


def in_a_set(chosen: set[str], asked: list[str]) -> int:
    """The same in a Python set."""
    return sum(key in chosen for key in asked)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--traced", type=int, default=1_000_000, help="most keys whose memory is traced, which is slow")
    parser.add_argument("--asked", type=int, default=500_000, help="half of them kept")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    sizes, speeds = [], []
    for rows in given.rows:
        for name in (number, uid):
            asked = [*keys(name, 0, given.asked // 2), *keys(name, rows, rows + given.asked // 2)]
            np.random.default_rng(0).shuffle(asked)
            ours = KeySet.from_keys(keys(name, 0, rows))
            contestants = {
                "find": partial(one_by_one, ours, asked),
                "find_many": partial(ours.find_many, asked),
                "build": lambda name=name, rows=rows: KeySet.from_keys(keys(name, 0, rows)),
                "keys alone": lambda name=name, rows=rows: sum(1 for _ in keys(name, 0, rows)),
            }
            told = [f"{name.__name__}s, {rows:,}", f"{ours.nbytes / rows:.2f}"]
            if rows <= given.traced:
                _, most, _ = grown(lambda name=name, rows=rows: KeySet.from_keys(keys(name, 0, rows)))
                stays, _, theirs = grown(lambda name=name, rows=rows: set(keys(name, 0, rows)))
                contestants["set"] = partial(in_a_set, theirs, asked)
                told += [f"{most / rows:.1f}", f"{stays / rows:.0f}"]
            sizes.append([*told, *["-"] * (4 - len(told))])
            times = {what: median(found) for what, found in side_by_side(contestants, given.rounds).items()}
            building = times["build"] - times["keys alone"]
            rates = [
                f"{given.asked / times[what] / 1e6:.2f}" if what in times else "-"
                for what in ("find", "find_many", "set")
            ]
            speeds.append([f"{name.__name__}s, {rows:,}", *rates, f"{rows / building / 1e6:.2f}"])
            del ours, contestants
    print("Bytes a key\n")
    print(table(["keys", "KeySet", "at most, while it is made", "Python set"], sizes))
    print("\nMillion keys a second\n")
    print(table(["keys", "find", "find_many", "in a Python set", "building"], speeds))
    with tempfile.TemporaryDirectory() as folder:
        rows = given.rows[0]
        texts, subset = Path(folder, "keys.txt"), Path(folder, "subset.npy")
        texts.write_text("".join(f"{key}\n" for key in keys(number, 0, rows)))
        halves = np.random.default_rng(0).integers(0, 2**64, (rows, 2), np.uint64)
        np.save(subset, np.sort(halves.view("u8,u8").ravel()))
        times = side_by_side({"txt": partial(read_keys, texts), "npy": partial(read_keys, subset)}, given.rounds)
    print(
        f"\nRead from a file of {rows:,}: text {median(times['txt']):.2f} s, .npy of uids {median(times['npy']):.2f} s"
    )


if __name__ == "__main__":
    main()
