"""MetaCLIP (arXiv 2309.16671): balance a pool over the entries that its captions contain.

An entry is a word or phrase. An entry in count rows keeps each of them with probability min(1, t / count), so that rare
entries keep all of their rows and a common one about t. A row with several entries is kept if any of them keeps it:
with probability 1 - product of (1 - min(1, t / count)). Rows without an entry are dropped.

Every row draws one number, tied to its id, and is kept if it is below the probability. The probability rises with t, so
every row has a least t that keeps it, and a budget is met exactly: the rows with the smallest are kept.

With a column of languages, rows are counted by language. t belongs to the language with the most matches. The t of
another is the one with the same share of matches in tail entries, those in up to t rows, as in MetaCLIP 2 (arXiv
2507.22062).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import BudgetError, UsageError
from thresher.io.columns import as_text
from thresher.ops.cut import top
from thresher.pruning.entries import (
    CHARACTERS,
    Matcher,
    caption_column,
    captions,
    frequent,
    read_entries,
    require_matcher,
)
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.format import counted
from thresher.runtime.random import digest
from thresher.runtime.untrusted import cut
from thresher.selection import Budget, Keep, Selection

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Matches = Callable[[], Iterator["_Matched"]]

_MOST_COUNTS = 2**27  # entries times languages; each count takes 8 bytes
_MOST_LANGUAGES = 1_000
_SHOWN = 10  # commonest entries, and languages, in the notes
_STEPS = 64  # of a bisection, which halves a range of float64


@method("metaclip")
@dataclass(frozen=True, kw_only=True)
class MetaClip:
    """Balance the pool over the words and phrases of its captions, so that common ones do not dominate."""

    name: ClassVar[str]
    other: ClassVar[dict[str, Any]] = {"t": {"keep": None, "t": 40.0}}

    keep: Budget | None = field(default=None, metadata={"help": "share or number of rows to keep; t is found"})
    t: float | None = field(
        default=None, metadata={"help": "rows that a common entry keeps, on average; 20,000 for 400 million pairs"}
    )
    entries: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "text file with one entry a line, or the folder of WordNet (default: phrases of the captions)",
        },
    )
    words: int = field(default=2, metadata={"help": "without entries: words of the longest phrase, 1 to 5"})
    least: int = field(default=100, metadata={"help": "without entries: captions that must contain a word or phrase"})
    case: Literal["exact", "ignore"] = field(
        default="exact", metadata={"help": "whether captions and entries must agree in case"}
    )
    match: Literal["words", "anywhere"] = field(
        default="words", metadata={"help": "find entries as whole words, or anywhere, for languages without spaces"}
    )
    language: str | None = field(
        default=None, metadata={"metavar": "COLUMN", "help": "column of languages, each with a t of its own"}
    )

    def __post_init__(self) -> None:
        """Validate the parameters: exactly one of ``keep`` and ``t``."""
        if (self.keep is None) == (self.t is None):
            both = ", not both" if self.keep is not None else ""
            raise UsageError(f"metaclip needs either keep (such as 30%) or t (such as 20000){both}")
        if self.t is not None and not 0 < self.t <= 1e15:
            raise UsageError(f"t = {self.t}: must be above 0 and up to 1e15; it is a number of rows")
        if not 1 <= self.words <= 5:
            raise UsageError(f"words = {self.words}: must be from 1 to 5")
        if self.least < 1:
            raise UsageError(f"least = {self.least}: must be at least 1")
        if self.entries is not None and (self.words, self.least) != (2, 100):
            raise UsageError("words and least are for entries made from the captions; leave them out with entries")

    @property
    def only_columns(self) -> tuple[str, ...]:
        """The captions, and the column of languages."""
        return ("text",) if self.language is None else ("text", self.language)

    def select(self, run: Run) -> Selection:
        """Match entries, count rows for each, and draw the rows by their probabilities."""
        require_matcher()
        column = caption_column(run.store, "metaclip")
        budget = None if self.keep is None else Keep.parse(self.keep).of(len(run.store))
        entries, notes = self._entries(run, column)
        languages_n, names, more = _languages(run, self.language)
        if len(entries) * len(names) > _MOST_COUNTS:
            raise UsageError(
                f"language = {self.language!r}: {len(names):,} languages x {len(entries):,} entries are more than "
                f"{_MOST_COUNTS:,} counts; give fewer entries, or raise least"
            )
        matches = self._matches(run, column, entries)
        counts_LE, number_n = np.zeros((len(names), len(entries)), np.int64), np.zeros(len(run.store), np.int32)
        long = 0
        for block in matches():
            number_n[block.rows] = block.sizes_B
            np.add.at(counts_LE, (np.repeat(languages_n[block.rows], block.sizes_B), block.entries_M), 1)
            long += block.cut
        tails = [_Tail.of(counts_E) for counts_E in counts_LE]
        main = int(np.argmax(counts_LE.sum(axis=1)))
        with_entry = int(np.count_nonzero(number_n))
        if not with_entry:
            raise UsageError("no caption contains an entry; give other entries, or pass case = 'ignore'")
        drawn_n = (run.random_ranks("metaclip").astype(np.float64) + 0.5) / run.store.total
        if budget is None:
            t = float(self.t or 0)
        else:
            if budget > with_entry:
                raise BudgetError(
                    f"cannot keep {budget:,} rows: only {with_entry:,} of {len(number_n):,} captions contain an entry"
                )
            least_n = np.full(len(number_n), np.inf)
            for rows, values in _least(matches(), counts_LE, languages_n, drawn_n):
                for j, tail in enumerate(tails):
                    own = languages_n[rows] == j
                    least_n[rows[own]] = values[own] if j == main else tail.as_in(tails[main], values[own])
            mask_n = top(-least_n, budget)
            t = float(least_n[mask_n].max())
        t_L = np.array([t if j == main else tails[main].as_in(tail, np.array([t]))[0] for j, tail in enumerate(tails)])
        probability_n = np.zeros(len(number_n))
        for rows, counts, starts in _counts(matches(), counts_LE, languages_n):
            row_t = np.repeat(t_L[languages_n[rows]], np.diff(np.append(starts, len(counts))))
            probability_n[rows] = _probability(row_t / counts, starts)
        if budget is None:
            mask_n = drawn_n < probability_n
            if not mask_n.any():
                raise UsageError(f"t = {self.t}: keeps no row; give a larger t")
        return run.selection(
            self,
            mask_n,
            reasons=(
                "its caption contains no entry",
                "matches {entries} entry, kept with probability {score:.4f}; drew {drawn:.4f}",
                "matches {entries} entries, kept with probability {score:.4f}; drew {drawn:.4f}",
            ),
            score="probability of being kept",
            notes=(
                *notes,
                *more,
                *(_too_long(long) if long else ()),
                *self._summary(entries, counts_LE, number_n, names, t_L, main, probability_n),
            ),
            rows={
                "score": probability_n.astype(np.float32),
                "entries": number_n,
                "drawn": drawn_n.astype(np.float32),
                "code": np.minimum(number_n, 2).astype(np.uint8),
            },
        )

    def _entries(self, run: Run, column: str) -> tuple[list[str], tuple[str, ...]]:
        """Return the entries, sorted, and notes."""
        ignore = self.case == "ignore"
        if self.entries is not None:
            given, repeated = read_entries(self.entries, ignore)
            mark = digest("\n".join(given))[:32]
            note = f"{counted(len(given), 'entry', 'entries')} from {self.entries}, fingerprint {mark}"
            return given, (note + (f"; {repeated:,} repeat another" if repeated else ""),)

        def make() -> npt.NDArray[np.uint8]:
            with run.progress.task("metaclip: count phrases", len(run.store)) as advance:

                def read() -> Iterator[list[str]]:
                    for block in captions(run.store, column, run.store.block):
                        yield block
                        advance(len(block))

                phrases, least = frequent(read, self.words, self.least, ignore)
            return np.frombuffer("\n".join([str(least), *phrases]).encode(), np.uint8)

        key = run.key(MetaClip, column=column, words=self.words, least=self.least, ignore=ignore)
        least, *found = run.cache.array("metaclip.entries", key, make).tobytes().decode().split("\n")
        if not found:
            raise UsageError(
                f"least = {self.least:,}: no word is in so many captions; give a smaller least, or a file of entries"
            )
        note = (
            f"{counted(len(found), 'entry', 'entries')} made from the captions: words and phrases of up to "
            f"{counted(self.words, 'word')} in at least {int(least):,} captions"
        )
        if int(least) > self.least:
            note += f" (not {self.least:,}: there are too many different phrases to count the rarer ones)"
        return found, (note,)

    def _matches(self, run: Run, column: str, entries: list[str]) -> Matches:
        """Return a function that yields the matches block by block, and reads and searches only what is not cached."""
        ignore, size, rows = self.case == "ignore", run.store.block, len(run.store)
        key = run.key(MetaClip, column=column, entries=digest("\n".join(entries)), ignore=ignore, match=self.match)
        matcher = cache(partial(Matcher, entries, ignore, self.match))

        def make(reader: Iterator[tuple[int, list[str]]], lo: int) -> npt.NDArray[np.int32]:
            texts = next(block for start, block in reader if start == lo)
            found = [matcher()(text) for text in texts]
            long = sum(len(text) > CHARACTERS for text in texts)
            return np.array([long, *map(len, found), *chain.from_iterable(found)], np.int32)

        def matches() -> Iterator[_Matched]:
            reader = zip(range(0, rows, size), captions(run.store, column, size), strict=True)
            with run.progress.task("metaclip: match entries", rows) as advance:
                for lo in range(0, rows, size):
                    count = min(size, rows - lo)
                    made = run.cache.array(
                        "metaclip.matches",
                        {**key, "row": lo},
                        partial(make, reader, lo),
                        ArraySpec("int32", (None,), 0, max(len(entries), size)),
                    ).astype(np.int64)
                    yield _Matched(lo, made[1 : count + 1], made[count + 1 :], int(made[0]))
                    advance(count)

        return matches

    def _summary(
        self,
        entries: list[str],
        counts_LE: Ints,
        number_n: npt.NDArray[np.int32],
        names: list[str],
        t_L: Floats,
        main: int,
        probability_n: Floats,
    ) -> list[str]:
        """Return notes on what was matched and how it was balanced."""
        counts_E = counts_LE.sum(axis=0)
        order = np.lexsort((np.arange(len(entries)), -counts_E))[:_SHOWN]
        common = ", ".join(f"{cut(entries[e], 40)} ({counts_E[e]:,})" for e in order if counts_E[e])
        none = int(np.count_nonzero(number_n == 0))
        found = "t found for the budget" if self.t is None else "t"
        notes = [
            f"{np.count_nonzero(counts_E):,} of {counted(len(entries), 'entry', 'entries')} match; "
            f"{number_n.mean(dtype=np.float64):.1f} entries per row on average; the commonest (rows): {common}",
            f"{counted(none, 'row matches', 'rows match')} no entry",
            f"{found}: {t_L[main]:.6g}; {np.count_nonzero((counts_LE > t_L[:, None]).any(axis=0)):,} entries are in "
            f"more rows; {probability_n.sum():,.1f} rows are kept on average over all seeds",
        ]
        if self.language is not None:
            shown = sorted(range(len(names)), key=lambda j: -int(counts_LE[j].sum()))[:_SHOWN]
            rest = f", and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            notes.append(f"t by language: {', '.join(f'{cut(names[j], 40)} {t_L[j]:.6g}' for j in shown)}{rest}")
        return notes


@dataclass(frozen=True, eq=False)
class _Matched:
    """The entries of a block of rows.

    Attributes:
        lo: The first row.
        sizes_B: Number of entries of each row, (B,).
        entries_M: Numbers of the entries, row by row, (M,).
        cut: Number of captions that were too long to be searched to their end.
    """

    lo: int
    sizes_B: Ints
    entries_M: Ints
    cut: int

    @property
    def rows(self) -> slice:
        """Where the rows are in the view."""
        return slice(self.lo, self.lo + len(self.sizes_B))


@dataclass(frozen=True, eq=False)
class _Tail:
    """The share of a language's matches that are in entries of up to so many rows, linear between the counts.

    Attributes:
        counts: Different counts of entries, ascending, from 0.
        shares: Share of the matches in entries with up to that count.
    """

    counts: Floats
    shares: Floats

    @classmethod
    def of(cls, counts_E: Ints) -> _Tail:
        """Return the shares of a language with these rows per entry."""
        values, numbers = np.unique(counts_E[counts_E > 0], return_counts=True)
        sums = np.cumsum(np.append(0, values * numbers))
        return cls(np.append(0, values).astype(np.float64), sums / max(int(sums[-1]), 1))

    def as_in(self, other: _Tail, t: Floats) -> Floats:
        """Return the t of another language with the same share in its tail."""
        return np.asarray(np.interp(np.interp(t, self.counts, self.shares), other.shares, other.counts))


def _counts(
    matches: Iterator[_Matched], counts_LE: Ints, languages_n: npt.NDArray[np.int32]
) -> Iterator[tuple[Ints, Floats, Ints]]:
    """Yield by block: rows with entries (R,), counts of their entries (M,), and the place of each row's first (R,)."""
    for block in matches:
        some = np.flatnonzero(block.sizes_B)
        if len(some):
            languages_M = np.repeat(languages_n[block.rows], block.sizes_B)
            starts_B = np.cumsum(block.sizes_B) - block.sizes_B
            yield block.lo + some, counts_LE[languages_M, block.entries_M].astype(np.float64), starts_B[some]


def _probability(kept_M: Floats, starts_R: Ints) -> Floats:
    """Return 1 - product of (1 - min(1, kept)) over the entries of each row, (R,)."""
    return np.asarray(1 - np.multiply.reduceat(1 - np.minimum(kept_M, 1), starts_R))


def _least(
    matches: Iterator[_Matched],
    counts_LE: Ints,
    languages_n: npt.NDArray[np.int32],
    drawn_n: Floats,
) -> Iterator[tuple[Ints, Floats]]:
    """Yield, block by block, the rows with entries and the least t of their language that keeps each, by bisection."""
    for rows, counts_M, starts in _counts(matches, counts_LE, languages_n):
        sizes = np.diff(np.append(starts, len(counts_M)))
        low, high = np.zeros(len(rows)), np.minimum.reduceat(counts_M, starts)  # the rarest entry keeps all its rows
        for _ in range(_STEPS):
            middle = (low + high) / 2
            kept = drawn_n[rows] < _probability(np.repeat(middle, sizes) / counts_M, starts)
            low, high = np.where(kept, low, middle), np.where(kept, middle, high)
        yield rows, high


def _too_long(captions: int) -> tuple[str]:
    return (
        f"{counted(captions, 'caption has', 'captions have')} more than {CHARACTERS:,} characters; only the first "
        f"{CHARACTERS:,} are searched",
    )


def _languages(run: Run, column: str | None) -> tuple[npt.NDArray[np.int32], list[str], tuple[str, ...]]:
    """Return the language of each row as a number, (n,), the names of the languages, and notes."""
    languages_n = np.zeros(len(run.store), np.int32)
    if column is None:
        return languages_n, [""], ()
    run.store.require([column], "language")
    numbers: dict[str, int] = {}
    done = empty = 0
    for _, part in run.store.scan([column]):
        cells = as_text(part.column(0), run.store.layout.location, column).to_pylist()
        empty += cells.count(None)
        for name in cells:
            numbers.setdefault(name or "none", len(numbers))
        if len(numbers) > _MOST_LANGUAGES:
            raise UsageError(
                f"language = {column!r}: has more than {_MOST_LANGUAGES:,} different values; give a column of languages"
            )
        languages_n[done : done + len(cells)] = [numbers[name or "none"] for name in cells]
        done += len(cells)
    note = f"{counted(empty, 'row has', 'rows have')} no language, which counts as one of its own (none)"
    return languages_n, list(numbers), (note,) if empty else ()
