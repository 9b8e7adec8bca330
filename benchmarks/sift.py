"""What sift finds among planted wrong captions, epoch by epoch: share found, precision and recall.

    python benchmarks/sift.py DATA.parquet --within article_type [--rows 10000 --epochs 4]

DATA has ``image`` and ``text``. Kinds of wrong captions: those of other rows at random, those of other rows of the same
class (near misses), captions cut to their first word, and captions in other letters, which stand for another language.
A tiny model is trained on all rows, with batches of 256, seed 0.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from thresher.dynamic.mismatch import Mismatch
from thresher.dynamic.run_folder import Training
from thresher.train.clip import ClipSettings, train_clip
from thresher.train.loop import Schedule

LETTERS = str.maketrans("abcdefghijklmnopqrstuvwxyz", "абцдефгхийклмнопярстуввхыз")


def planted(table: pa.Table, kind: str, share: float, within: str | None) -> tuple[pa.Table, np.ndarray]:
    """Return the table with some captions changed, and which rows have another caption now."""
    rng = np.random.default_rng(0)
    texts = table["text"].to_pylist()
    chosen = rng.permutation(len(texts))[: round(share * len(texts))]
    after = list(texts)
    if kind in ("random", "same class"):
        labels = np.zeros(len(texts), np.int64)
        if kind == "same class":
            labels = np.unique(np.array(table[within].to_pylist(), str), return_inverse=True)[1]
        for label in np.unique(labels[chosen]):
            rows = chosen[labels[chosen] == label]
            for row, other in zip(rows, np.roll(rows, 1), strict=True):
                after[row] = texts[other]
    else:
        for row in chosen:
            after[row] = texts[row].split()[0] if kind == "first word" else texts[row].lower().translate(LETTERS)
    wrong = np.array([a != b for a, b in zip(texts, after, strict=True)])
    return table.set_column(table.column_names.index("text"), "text", pa.array(after)), wrong


class Watch:
    """Looks at the ledger after every epoch."""

    def __init__(self, folder: Path, wrong: np.ndarray) -> None:
        self.folder, self.wrong, self.lines = folder, wrong, {}

    def task(self, label: str, total: int, unit: str = "rows") -> Any:
        """Show nothing."""
        return nullcontext(lambda _: None)

    def say(self, line: str) -> None:
        """Note what the ledger shows."""
        training = Training.load(self.folder)
        epochs = len(training.log())
        if epochs and epochs not in self.lines:
            found = Mismatch.of("sift", training.ledger()).wrong_N
            hits, count = np.count_nonzero(found & self.wrong), np.count_nonzero(found)
            precision = hits / count if count else float("nan")
            recall = hits / self.wrong.sum() if self.wrong.any() else float("nan")
            self.lines[epochs] = "none" if not count else f"{count / len(found):.1%}, {precision:.2f}, {recall:.2f}"


def main() -> None:
    """Print a table: a row per kind and share, a column per epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--within", default=None, help="class column, for captions of the same class")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--shares", default="0,0.1,0.3,0.5")
    parser.add_argument("--kinds", default="random,same class,first word,other letters")
    given = parser.parse_args()
    table = pq.read_table(given.data)
    if given.rows is not None:
        table = table.take(np.random.default_rng(0).permutation(len(table))[: given.rows])
    print(f"{len(table):,} rows; share found, precision, recall after each epoch on all rows\n")
    head = ["captions", "wrong", *(f"epoch {epoch}" for epoch in range(1, given.epochs + 1))]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    shares = [float(share) for share in given.shares.split(",")]
    cases = [("as they are", 0.0)] if 0.0 in shares else []
    kinds = [kind for kind in given.kinds.split(",") if kind != "same class" or given.within]
    for kind, share in cases + [(kind, share) for kind in kinds for share in shares if share]:
        with tempfile.TemporaryDirectory() as folder:
            changed, wrong = planted(table, kind, share, given.within)
            pq.write_table(changed, f"{folder}/data.parquet", row_group_size=1000)
            watch = Watch(Path(folder, "run"), wrong)
            schedule = Schedule(
                epochs=given.epochs, batch_size=256, policy="sift", options={"warmup": given.epochs}, workers=0
            )
            train_clip(f"{folder}/data.parquet", watch.folder, ClipSettings(schedule=schedule), progress=watch)
        cells = [watch.lines.get(epoch, "-") for epoch in range(1, given.epochs + 1)]
        print(f"| {kind} | {wrong.mean():.0%} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
