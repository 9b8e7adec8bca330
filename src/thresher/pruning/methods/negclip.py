"""negCLIPLoss (arXiv 2405.19547): the CLIP score, minus how well image and caption match other pairs.

The score of a row is its cosine, minus half of temperature x logsumexp(cosines / temperature) of its image with
all captions of a random batch, minus half of the same for its caption with all images. This is the negative of the
CLIP loss, times the temperature. Images and captions that match everything do not get a high score.

Batches are near-equal parts of random partitions of the rows. The work is done in tiles: one matrix product gives the
sums over its rows and over its columns, so a B x B matrix is never needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.ops.vectors import F32
from thresher.pool.store import EmbeddingStore
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.pruning.scores import Score, Scored
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.format import counted

F64 = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

_MOST_REPEATS = 10_000
_TILE = 1024  # rows and columns of a product, so that it stays in the CPU cache
_DEEP, _HIGH = 65, 75  # exp(-_DEEP) and the sum of _TILE times exp(_HIGH) are normal float32


@method("negclip")
@dataclass(frozen=True, kw_only=True)
class NegClip(Scored):
    """Keep the pairs whose image and caption match each other better than they match those of other pairs."""

    meaning: ClassVar[str] = "negCLIPLoss"

    temperature: float = field(
        default=0.01, metadata={"help": "of the softmax that the encoder was trained with; 0.01 for OpenAI's CLIP"}
    )
    batch_size: int = field(default=32_768, metadata={"help": "maximum number of pairs compared with each other"})
    repeats: int = field(default=5, metadata={"help": "number of random partitions into batches to average over"})

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        if not 1e-6 <= self.temperature <= 1e6:
            raise UsageError(f"temperature = {self.temperature}: must be from 0.000001 to 1,000,000; CLIP used 0.01")
        if self.batch_size < 2:
            raise UsageError(f"batch_size = {self.batch_size}: must be at least 2, to have a pair to compare with")
        if not 1 <= self.repeats <= _MOST_REPEATS:
            raise UsageError(f"repeats = {self.repeats:,}: must be from 1 to {_MOST_REPEATS:,}; each compares all rows")

    def score(self, run: Run) -> Score:
        """Return the mean score over all partitions; each partition is cached separately."""
        run.store.require_joint("negclip")
        n = len(run.store)
        batches = -(-n // self.batch_size)
        repeats = self.repeats if batches > 1 else 1
        total = np.zeros(n)
        for repeat in range(repeats):
            order = run.rng("negclip", repeat).permutation(n)
            ends = [n * i // batches for i in range(batches + 1)]
            for lo, hi in zip(ends[:-1], ends[1:], strict=True):
                order[lo:hi].sort()  # the same batch, read in file order
            key = run.key(_fill, repeat=repeat, seed=run.seed, batches=batches, temperature=self.temperature)
            label = f"negclip: repeat {repeat + 1} of {repeats}"
            fill = partial(_fill, run, label, self.temperature, order, ends)
            spec = ArraySpec("float32", least=-1e9, most=1e9)
            total[order] += run.cache.columns("negclip", key, {"score": spec}, n, fill)["score"]
        size = counted(-(-n // batches), "pair")
        note = f"the mean of {repeats} random partitions into {batches:,} batches of {size} at most"
        if batches == 1:
            note = f"one batch of all {size}, so that repeats would change nothing"
        return Score((total / repeats).astype(np.float32), (note,))


def _fill(run: Run, label: str, temperature: float, order: Rows, ends: list[int], start: int) -> Iterator[tuple[F64]]:
    """Yield the scores of each batch in turn, starting with the batch that begins at row ``start``."""
    run = run.local("joint")
    batches = [order[lo:hi] for lo, hi in zip(ends[:-1], ends[1:], strict=True) if lo >= start]
    size = _panel_rows(run.store)
    tasks = [(batch, lo) for batch in batches for lo in range(0, len(batch), size)]
    with run.progress.task(label, len(order)) as advance:
        advance(start)
        done = zip(tasks, run.engine.map(partial(_panel, run.store, temperature), tasks), strict=True)
        for (batch, lo), (own, rows, columns) in done:
            if lo == 0:
                scores, sums = np.empty(len(batch)), columns
            else:
                sums = np.logaddexp(sums, columns)
            scores[lo : lo + len(own)] = own - rows / 2
            advance(len(own))
            if lo + len(own) == len(batch):
                yield (temperature * (scores - sums / 2),)


def _panel_rows(store: EmbeddingStore) -> int:
    """Return the number of images in a task: half a block, rounded to whole tiles."""
    return max(store.block // 2 // _TILE, 1) * _TILE


def _panel(store: EmbeddingStore, temperature: float, task: tuple[Rows, int]) -> tuple[F64, F64, F64]:
    """Compare the images of a part of a batch with all its captions.

    Returns:
        Cosines of the part's own pairs, (P,), logsumexp over captions, (P,), and logsumexp over the images of the
        part, (B,); all of cosines / temperature.
    """
    batch, lo = task
    part = batch[lo : lo + _panel_rows(store)]
    images = store.vectors_at("image", part)
    images /= np.float32(temperature)
    own, rows, columns = np.empty(len(part)), np.full(len(part), -np.inf), np.full(len(batch), -np.inf)
    for c in range(0, len(batch), _TILE):
        texts = store.vectors_at("text", batch[c : c + _TILE])
        for r in range(0, len(part), _TILE):
            tile = images[r : r + _TILE] @ texts.T
            if lo + r == c:
                own[r : r + _TILE] = tile.diagonal()
            row_sums, column_sums = log_sums(tile)
            rows[r : r + _TILE] = np.logaddexp(rows[r : r + _TILE], row_sums)
            columns[c : c + _TILE] = np.logaddexp(columns[c : c + _TILE], column_sums)
    return own, rows, columns


def log_sums(tile_RC: F32) -> tuple[F64, F64]:
    """Return logsumexp over each row and over each column of a tile; overwrites the tile.

    If the range of all entries fits into float32, as it does for CLIP cosines / 0.01, one exponential
    with one shift is used for both. Otherwise each row and column is shifted by its own maximum.
    """
    low, high = tile_RC.min(), tile_RC.max()
    if high - low < _DEEP + _HIGH:
        shift = min(high, low + np.float32(_DEEP))  # close to high, because large exponents have larger rounding errors
        tile_RC -= shift
        np.exp(tile_RC, out=tile_RC)
        return _log(tile_RC.sum(axis=1), shift), _log(tile_RC.sum(axis=0), shift)
    sums: list[Any] = []
    for axis in (1, 0):
        shifts = tile_RC.max(axis=axis, keepdims=True)
        sums.append(_log(np.exp(tile_RC - shifts).sum(axis=axis), shifts.ravel()))
    return sums[0], sums[1]


def _log(sums: F32, shift: Any) -> F64:
    return np.asarray(np.log(sums, dtype=np.float64) + shift)
