"""CABS: batches composed by the concepts of their rows (arXiv 2511.20643), before anything is decoded.

A batch of b rows is chosen from a super-batch of the next B rows by the concepts that are stored with them: a cluster,
tags, or the entries that match a caption. ``diversity`` balances concepts: it takes the row with the highest gain, one
by one, until the batch is full. The gain is the mean over the concepts c of a row of ``(t - n_c) / max(1, t) + 1/F_c``
or, where n_c has reached t, of -0.5. n_c rows of the batch have c so far, F_c rows of the super-batch have it, and the
target t is b / (concepts in the super-batch), from 1 to ``cap``. ``frequency`` takes the rows with the most
concepts. Among equal rows the first in the order of the super-batch wins, and rows without a concept come last.

The gains of concepts are integers (times 2^32), so that sums are exact and the result does not depend on their order.
After a choice only the sums of rows that share a concept with it are changed, and only until the concept has reached
its target. If no row has more than one concept, all gains are known in advance and are sorted.

Shape letters: N rows of the data, B of a super-batch, b of a batch, K concepts, M pairs of a row and a concept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.dynamic.references import positions_of
from thresher.errors import UsageError
from thresher.ops.key_hash import records_of
from thresher.runtime.random import digest

Ints = npt.NDArray[np.int64]
_CHOSEN = -(2**62)  # a sum below those of all rows that are not chosen
Kind = Literal["diversity", "frequency"]


@dataclass(frozen=True, eq=False)
class Concepts:
    """The concepts of N rows, each an integer from 0.

    Attributes:
        ends_N: (N,) int64, where the concepts of each row end in ``ids_M``, and those of the next row start.
        ids_M: (M,) int32, the concepts, ascending and without repeats within a row.
    """

    ends_N: Ints
    ids_M: npt.NDArray[np.int32]

    @classmethod
    def of_labels(cls, labels_N: npt.ArrayLike) -> Concepts:
        """Use one number per row, such as its cluster; negative for none.

        Raises:
            UsageError: They are not integers, (N,).
        """
        labels = np.asarray(labels_N)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise UsageError(
                f"labels of shape {labels.shape} and type {labels.dtype}; give integers, (N,), negative for none"
            )
        known_N = labels >= 0
        ids = np.unique(labels[known_N], return_inverse=True)[1]
        return cls(np.cumsum(known_N, dtype=np.int64), ids.astype(np.int32))

    @classmethod
    def of_lists(cls, rows: Iterable[Iterable[Any] | None]) -> Concepts:
        """Use a list of tags for each row: any values that can be dictionary keys; None for no tags.

        None and NaN in a list are left out.
        """
        known: dict[Any, int] = {}
        ids: list[int] = []
        ends: list[int] = []
        for tags in rows:
            there = (tag for tag in (() if tags is None else tags) if not _is_missing(tag))
            ids += sorted({known.setdefault(tag, len(known)) for tag in there})
            ends.append(len(ids))
        return cls(np.array(ends, np.int64), np.array(ids, np.int32))

    def __len__(self) -> int:
        """Return N."""
        return len(self.ends_N)

    def of(self, rows_B: Ints) -> Concepts:
        """Return the concepts of some rows, in their order."""
        starts_N = np.concatenate([[0], self.ends_N[:-1]])
        counts_B = self.ends_N[rows_B] - starts_N[rows_B]
        ends_B = np.cumsum(counts_B, dtype=np.int64)
        at_M = np.repeat(starts_N[rows_B] - (ends_B - counts_B), counts_B) + np.arange(ends_B[-1] if len(ends_B) else 0)
        return Concepts(ends_B, self.ids_M[at_M])

    def counts(self) -> Ints:
        """Return the number of concepts of each row, (N,)."""
        return np.diff(self.ends_N, prepend=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cabs:
    """Composes batches by concepts; give it to :class:`~thresher.dynamic.sampler.PruningSampler` as ``composition``.

    Attributes:
        concepts: The concepts of the N rows of the data.
        kind: "diversity" balances concepts, "frequency" takes the rows with the most.
        super_batch: Batches of rows that a batch is chosen from: 5 as published, so 4 of 5 rows are left out.
        cap: The most rows of a concept that a batch aims for.
    """

    concepts: Concepts = field(repr=False)
    kind: Kind = "diversity"
    super_batch: int = 5
    cap: int = 10

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if self.kind not in ("diversity", "frequency"):
            raise UsageError(f"kind = {self.kind!r}; give diversity or frequency")
        if self.super_batch < 2 or self.cap < 1:
            raise UsageError(f"super_batch = {self.super_batch}, cap = {self.cap}; give 2 or more, and 1 or more")
        if not len(self.concepts.ids_M):
            raise UsageError(f"none of {len(self.concepts):,} rows has a concept; give labels, tags or entries")

    def described(self) -> str:
        """Return the parameters and a hash of the concepts, to compare runs."""
        of = self.concepts
        return f"Cabs({self.kind}, {self.super_batch}, {self.cap}, {digest(of.ends_N)[:16]}{digest(of.ids_M)[:16]})"

    def arranged(self, order_M: Ints, batch_size: int) -> Ints:
        """Return the rows of composed batches, batch after batch.

        Args:
            order_M: (M,) rows in random order; each ``super_batch * batch_size`` of them are a super-batch. The last
                rows that do not fill one are left out, unless there are only these.
            batch_size: Rows of a batch.
        """
        wide = self.super_batch * batch_size
        parts = [order_M[lo : lo + wide] for lo in range(0, max(1, len(order_M) // wide) * wide, wide)]
        return np.concatenate([part[self.chosen(part, self.batch_of(len(part), batch_size))] for part in parts])

    def batch_of(self, rows: int, batch_size: int) -> int:
        """Return the rows to choose from a super-batch of this many."""
        return min(batch_size, max(1, rows // self.super_batch))

    def length(self, samples: int, batch_size: int) -> int:
        """Return how many rows :meth:`arranged` leaves of ``samples``."""
        wide = self.super_batch * batch_size
        return (samples // wide) * batch_size if samples >= wide else self.batch_of(samples, batch_size)

    def chosen(self, rows_B: Ints, count: int) -> Ints:
        """Return the positions of the rows of a super-batch that are its batch, (count,) ascending."""
        return np.sort(choose(self.concepts.of(rows_B), count, self.kind, self.cap))


class cabs_stream:  # noqa: N801 - reads as the verb it is
    """A pipeline stage that composes batches by the concepts of samples, before they are decoded.

    It buffers the samples of a super-batch, as they were read, and yields those of a batch in their order. Put it after
    the stage that groups bytes into samples, and before the decoder; a shuffle buffer belongs before it, and the batch
    size of the loader should be that of this stage. The last samples that do not fill a super-batch are composed too.
    The buffer has ``super_batch * batch_size`` encoded samples in each process that runs the stage.

    Attributes:
        seen: Samples read by this stage in this process.
        passed: Samples yielded.
        unknown: Samples whose key has no concepts, because it is not known or has none.
    """

    def __init__(
        self,
        keys: Sequence[str],
        concepts: Concepts,
        batch_size: int,
        *,
        kind: Kind = "diversity",
        super_batch: int = 5,
        cap: int = 10,
        key: str = "__key__",
    ) -> None:
        """Create the stage.

        Args:
            keys: N keys.
            concepts: Their concepts.
            batch_size: Samples of a batch in a process.
            kind: As for :class:`Cabs`.
            super_batch: As for :class:`Cabs`.
            cap: As for :class:`Cabs`.
            key: The field of a sample with its key.

        Raises:
            UsageError: A value is not allowed, or the numbers of keys and of rows with concepts differ.
        """
        if len(keys) != len(concepts) or batch_size < 1:
            raise UsageError(f"{len(keys):,} keys for concepts of {len(concepts):,} rows, {batch_size=}; give as many")
        self._how = Cabs(concepts=concepts, kind=kind, super_batch=super_batch, cap=cap)
        self._key, self._batch = key, batch_size
        records_N = records_of(keys)
        self._order = np.lexsort((records_N["check"], records_N["hash"]))
        self._records_N = records_N[self._order]
        ends_N = concepts.ends_N
        self._concepts = Concepts(np.append(ends_N, ends_N[-1:]), concepts.ids_M)  # one row more, without concepts
        self.seen = self.passed = self.unknown = 0

    def __call__(self, samples: Iterable[Any]) -> Iterator[Any]:
        """Yield the samples of composed batches.

        Raises:
            UsageError: A sample does not have the field of the key.
        """
        rest, how = iter(samples), self._how
        while held := list(islice(rest, how.super_batch * self._batch)):
            try:
                records = records_of([str(sample[self._key]) for sample in held])
            except (KeyError, TypeError, IndexError):
                raise UsageError(f"a sample has no {self._key!r}; name the field of its key with key=") from None
            at_B = positions_of(self._records_N, records["hash"], records["check"])
            of_held = self._concepts.of(np.where(at_B >= 0, self._order[at_B], len(self._order)))
            chosen = np.sort(choose(of_held, how.batch_of(len(held), self._batch), how.kind, how.cap))
            self.seen, self.passed = self.seen + len(held), self.passed + len(chosen)
            self.unknown += int(np.count_nonzero(of_held.counts() == 0))
            yield from (held[at] for at in chosen)


def choose(concepts: Concepts, count: int, kind: Kind = "diversity", cap: int = 10) -> Ints:
    """Choose the rows of a batch from those of a super-batch.

    Args:
        concepts: The concepts of the B rows of the super-batch.
        count: b, the rows to choose; at most B.
        kind: What to choose by.
        cap: The most rows of a concept that "diversity" aims for.

    Returns:
        (b,) positions in the super-batch, in the order in which they are chosen.
    """
    count = min(count, len(concepts))
    if kind == "frequency":
        return np.argsort(-concepts.counts(), kind="stable")[:count]
    ids_M, order_M, rows_K = _grouped(concepts.ids_M)
    target = float(np.clip(count / max(1, len(rows_K)), 1, cap))
    how = _by_sorting if concepts.counts().max(initial=0) <= 1 else _one_by_one
    return how(concepts, ids_M, order_M, rows_K, target, count)


def _is_missing(tag: Any) -> bool:
    return tag is None or (isinstance(tag, (float, np.floating)) and tag != tag)


def _grouped(ids_M: npt.NDArray[np.int32]) -> tuple[Ints, Ints, Ints]:
    """Number the concepts that are present from 0 to K - 1.

    Returns:
        (M,) the number of each, (M,) the positions in the order of their numbers, and (K,) how often each occurs.
    """
    sorted_M = np.sort((ids_M.astype(np.int64) << 32) | np.arange(len(ids_M)))  # one sort for all three
    order_M, known_M = sorted_M & 0xFFFFFFFF, sorted_M >> 32
    first_M = np.append(True, known_M[1:] != known_M[:-1])[: len(known_M)]
    numbers_M = np.empty(len(ids_M), np.int64)
    numbers_M[order_M] = np.cumsum(first_M) - 1
    return numbers_M, order_M, np.diff(np.flatnonzero(np.append(first_M, True)))


def _by_sorting(concepts: Concepts, ids_M: Ints, order_M: Ints, rows_K: Ints, target: float, count: int) -> Ints:
    """Choose rows with at most one concept each: the k-th row of a concept has a gain that is known in advance."""
    has_B = concepts.counts() > 0
    before_M = np.empty(len(ids_M), np.int64)  # rows of the same concept that come earlier
    before_M[order_M] = np.arange(len(ids_M)) - np.repeat(np.cumsum(rows_K) - rows_K, rows_K)
    gains_B = np.full(len(concepts), -np.inf)
    levels = range(int(np.ceil(target)) + 1)
    gains_LK = np.stack([_gains(float(level), rows_K, target) for level in levels])
    gains_B[has_B] = gains_LK[np.minimum(before_M, levels[-1]), ids_M]
    return np.lexsort((np.arange(len(gains_B)), -gains_B))[:count]


def _one_by_one(concepts: Concepts, ids_M: Ints, order_M: Ints, rows_K: Ints, target: float, count: int) -> Ints:
    """Choose rows with any number of concepts; a choice changes the sums of the rows that share one of its concepts."""
    counts_B, rows = concepts.counts(), len(concepts)
    row_M = np.repeat(np.arange(rows), counts_B)
    first_K = _gains(0.0, rows_K, target)
    sums_B = np.bincount(row_M, first_K[ids_M], rows).astype(np.int64)  # exact: the sums are below 2^53
    divisor_B = np.maximum(counts_B, 1).astype(np.float64)
    gains_B = np.where(counts_B > 0, sums_B / divisor_B, -np.inf)
    # Only a concept of several rows changes the gains of others.
    shared_M = rows_K[ids_M] > 1
    rows_of_M = row_M[order_M[shared_M[order_M]]]
    ids_M, row_M = ids_M[shared_M], row_M[shared_M]
    ends_K = np.cumsum(np.where(rows_K > 1, rows_K, 0)).tolist()
    ends_B, flat = np.cumsum(np.bincount(row_M, minlength=rows)).tolist(), ids_M.tolist()
    falls_LK = np.diff([_gains(float(taken), rows_K, target) for taken in range(int(np.ceil(target)) + 1)], axis=0)
    falls: list[list[int]] = falls_LK.tolist()
    taken_K = [0] * len(rows_K)
    least = float(_gains(target, np.ones(1), target)[0])
    chosen: list[int] = []
    while len(chosen) < count:
        row = int(gains_B.argmax())
        if gains_B[row] <= least:  # no choice changes a gain any more
            left_B = np.ones(rows, np.bool_)
            left_B[chosen] = False
            left = np.flatnonzero(left_B)
            rest = left[np.argsort(-gains_B[left], kind="stable")]
            return np.concatenate([np.array(chosen, np.int64), rest[: count - len(chosen)]])
        chosen.append(row)
        gains_B[row], sums_B[row] = -np.inf, _CHOSEN
        touched = []
        for c in flat[ends_B[row - 1] if row else 0 : ends_B[row]]:
            level = taken_K[c]
            if level < len(falls):
                taken_K[c] = level + 1
                others = rows_of_M[ends_K[c - 1] if c else 0 : ends_K[c]]
                sums_B[others] += falls[level][c]
                touched.append(others)
        if touched:
            again = np.concatenate(touched) if len(touched) > 1 else touched[0]
            gains_B[again] = sums_B[again] / divisor_B[again]
    return np.array(chosen, np.int64)


def _gains(taken: float, rows_K: npt.NDArray[Any], target: float) -> Ints:
    """Return the gain of each concept of which ``taken`` rows are chosen, as integers: their sums are exact."""
    gains_K = (target - taken) / target + 1 / rows_K if taken < target else np.full(len(rows_K), -0.5)
    return np.rint(gains_K * 2**32).astype(np.int64)
