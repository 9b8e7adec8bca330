"""How long it takes to compose a batch of 4,096 rows out of 20,480 by their concepts (CPU time on one core).

    python benchmarks/cabs.py [--rounds 5]

Concepts are drawn by rank from a vocabulary of 500,000 with probability 1/rank or 1/rank^1.2, as words are.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from thresher.dynamic.cabs import Concepts, choose

ROWS, BATCH, VOCABULARY = 20_480, 4_096, 500_000


def concepts_of(words: int, exponent: float) -> Concepts:
    """Draw the concepts of a super-batch: up to ``words`` per row, without repeats."""
    share_K = 1 / np.arange(1, VOCABULARY + 1) ** exponent
    drawn = np.random.default_rng(0).choice(VOCABULARY, size=(ROWS, words), p=share_K / share_K.sum())
    rows = [np.unique(row) for row in drawn]
    return Concepts(np.cumsum([len(row) for row in rows]), np.concatenate(rows).astype(np.int32))


def main() -> None:
    """Print a line per number of concepts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| concepts per row | different concepts | diversity, ms | frequency, ms |\n|---|---|---|---|")
    for words in (1, 2, 5, 10, 14):
        for exponent in (1.0, 1.2):
            concepts, least = concepts_of(words, exponent), dict.fromkeys(("diversity", "frequency"), np.inf)
            for _ in range(rounds):
                for kind in least:
                    begin = time.process_time()
                    choose(concepts, BATCH, kind)
                    least[kind] = min(least[kind], 1000 * (time.process_time() - begin))
            print(
                f"| {concepts.counts().mean():.1f} | {len(np.unique(concepts.ids_M)):,} | "
                f"{least['diversity']:.1f} | {least['frequency']:.1f} |"
            )


if __name__ == "__main__":
    main()
