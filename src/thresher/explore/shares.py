"""What did I lose? The share kept of every value of a metadata column, and of the captions with every word.

Many values are compared at once, and some of them differ by chance. So every value has two intervals: its own 95%
interval, to show, and a wider one, corrected for the number of comparisons, that decides what is surely different.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.explore.words import STOP_WORDS, caption_texts, words_in
from thresher.io.columns import is_words, not_text
from thresher.pool.store import EmbeddingStore, heavy

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Kind = Literal["text", "number", "date", "bool", "words"]

VALUES = 200  # listed of a column
CAPTIONS = 1_000_000  # whose words are counted
TEXT = 200  # characters of a value; longer ones count as equal if they begin with the same
_SHOWN = 0.0005  # the least sure difference that is shown: 0.05 points
_EXACT = 100  # rows expected to be kept, or dropped, below which an exact test has the last word
_COMPARED = 5  # rows that a value must have: a rarer one could not differ surely
_HELD = 50_000  # values of a column counted at a time
_FEW = 20  # whole numbers up to this many different ones are values, not ranges
_RANGES = 10
_DATES = 24
_SAMPLED = 1_000_000  # numbers that quantiles are computed from
_LEVEL = 0.95


@dataclass(frozen=True)
class Share:
    """How many of the rows with a value were kept.

    Attributes:
        value: The value as text, of untrusted origin; None for rows without one.
        rows: Rows of the pool with this value.
        kept: Rows of these that were kept.
        low: Lower end of the 95% interval of the share kept (Wilson 1927), as if rows were kept independently.
        high: Upper end.
        shift: By how much the share kept surely differs from that of the other rows counted: from the share of the
            pool to the nearer end of the interval corrected for all comparisons; negative if fewer were kept, 0 if the
            interval contains the share of the pool, or if an exact test of few rows says that it may be chance.
        at_least: Lower end of a range of numbers, else None.
        at_most: Highest number in it, so that the rows are those from ``at_least`` to ``at_most``.
    """

    value: str | None
    rows: int
    kept: int
    low: float = 0.0
    high: float = 1.0
    shift: float = 0.0
    at_least: float | None = None
    at_most: float | None = None

    @property
    def share(self) -> float:
        """The share kept."""
        return self.kept / self.rows if self.rows else math.nan

    @property
    def differs(self) -> bool:
        """Whether the share kept surely differs, by 0.05 points or more: less is not worth a line."""
        return abs(self.shift) >= _SHOWN


@dataclass(frozen=True)
class ColumnShares:
    """The shares of the values of a column.

    Attributes:
        name: Of the column.
        kind: "text", "number", "date", "bool", or "words" for the words of captions.
        values: Those that surely lost most first, those that surely kept most last, and in between, by share, those
            that may differ by chance. Not those of fewer than 5 rows, and of more than 200 only those with the largest
            sure difference, then with the most rows.
        rows: Rows counted: all of the pool, or of the captions that were read.
        kept: Rows of these that were kept.
        others: Number of values that are not listed; None if there are too many to count.
    """

    name: str
    kind: Kind
    values: tuple[Share, ...]
    rows: int
    kept: int
    others: int | None = 0

    @property
    def share(self) -> float:
        """The share kept of all rows counted."""
        return self.kept / self.rows if self.rows else math.nan


@dataclass(frozen=True)
class KeptShares:
    """The shares of all columns.

    Attributes:
        columns: Those with the largest sure difference first.
        comparisons: Number of values that were compared; intervals that decide are corrected for it.
        left_out: Columns that were not counted, and why.
    """

    columns: tuple[ColumnShares, ...]
    comparisons: int
    left_out: Mapping[str, str]

    def most(self, count: int) -> tuple[tuple[tuple[str, Share], ...], tuple[tuple[str, Share], ...]]:
        """Return (column, share) of the values that surely lost most, and of those that surely kept most."""
        shares = [(column.name, share) for column in self.columns for share in column.values]
        pairs = [(name, share) for name, share in shares if share.differs]
        pairs.sort(key=lambda pair: pair[1].shift)
        lost = tuple(pair for pair in pairs if pair[1].shift < 0)
        gained = tuple(pair for pair in pairs[::-1] if pair[1].shift > 0)
        return lost[:count], gained[:count]


def wilson(kept: Any, rows: Any, level: float = _LEVEL) -> tuple[Floats, Floats]:
    """Return the ends of the Wilson score interval of shares, float64; 0 and 1 where there are no rows.

    Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    k, n = np.asarray(kept, np.float64), np.asarray(rows, np.float64)
    z = -NormalDist().inv_cdf((1 - level) / 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = k / n
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        low, high = np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)
    # Exactly 0 and 1, not nearly.
    return np.where((n > 0) & (k > 0), low, 0.0), np.where((n > 0) & (k < n), high, 1.0)


def tail(kept: int, rows: int, share: float) -> float:
    """Return the probability that at least as many rows are kept by chance, or at most as many if fewer than expected.

    Args:
        kept: Rows that were kept.
        rows: Rows that each are kept with the same probability, independently: a binomial distribution.
        share: That probability, above 0 and below 1.
    """
    if kept < share * rows:
        kept, share = rows - kept, 1 - share  # as many dropped
    term = math.exp(
        math.lgamma(rows + 1) - math.lgamma(kept + 1) - math.lgamma(rows - kept + 1)
        + kept * math.log(share) + (rows - kept) * math.log1p(-share)
    )  # fmt: skip
    total = 0.0
    while kept <= rows and term > 1e-17 * total:
        total += term
        term *= (rows - kept) / (kept + 1) * share / (1 - share)
        kept += 1
    return min(total, 1.0)


def kept_shares(
    store: EmbeddingStore,
    kept_N: Bools,
    columns: Sequence[str] | None = None,
    *,
    words: bool = True,
    captions: int = CAPTIONS,
    values: int = VALUES,
) -> KeptShares:
    """Count how many rows of each value of the metadata were kept.

    Numbers are counted in ranges with about equal numbers of rows, dates by year, month, day or hour, and words by the
    captions that contain them. Memory does not grow with the number of different values: of columns with more
    than 50,000, only frequent ones are counted, in a second pass; one number per row is held.

    Args:
        store: The whole pool.
        kept_N: (N,) bool.
        columns: Columns (default: all but the key, the caption and the image).
        words: Whether to count words of captions.
        captions: Number of evenly spaced rows whose captions are read, at most.
        values: How many values of a column to list.

    Raises:
        UsageError: There is no such column.
    """
    layout = store.layout
    if columns is None:
        columns = [name for name in store.columns if name not in (layout.key, layout.caption, layout.image)]
    store.require(columns, "this")
    kinds, left_out = {}, {}
    for name in columns:
        kind = _kind(store, name)
        if isinstance(kind, str) and kind in ("text", "number", "date", "bool"):
            kinds[name] = kind
        else:
            left_out[name] = kind.removeprefix("- ")
    counted: list[ColumnShares] = []
    for name, kind in kinds.items():
        if kind in ("text", "bool"):
            continue
        made = _numbers(store, name, kept_N) if kind == "number" else _dates(store, name, kept_N)
        if made is None:
            left_out[name] = "contains values that are not of one type"
        else:
            counted.append(made)
    texts = [name for name, kind in kinds.items() if kind in ("text", "bool")]
    for name, tally in _texts(store, texts, kept_N).items():
        if tally.approximate and tally.rare():
            left_out[name] = "almost every row has its own value"
            continue
        counted.append(_column(name, kinds[name], tally, store.total, int(np.count_nonzero(kept_N))))
    if words and layout.caption is not None:
        counted.append(_words(store, kept_N, captions))
    counted = [made for column in counted if len((made := _without_rare(column)).values)]
    comparisons = max(sum(len(column.values) for column in counted), 1)
    judged = [_judged(column, comparisons, values) for column in counted]
    judged.sort(key=lambda column: -max((abs(share.shift) for share in column.values), default=0))
    return KeptShares(tuple(judged), comparisons, left_out)


def _without_rare(column: ColumnShares) -> ColumnShares:
    values = tuple(share for share in column.values if share.rows >= _COMPARED)
    others = None if column.others is None else column.others + len(column.values) - len(values)
    return replace(column, values=values, others=others)


def _judged(column: ColumnShares, comparisons: int, most: int) -> ColumnShares:
    """Add intervals and differences, sort, and cut to the values to list."""
    rows = np.array([share.rows for share in column.values], np.float64)
    kept = np.array([share.kept for share in column.values], np.float64)
    low, high = wilson(kept, rows)
    least, greatest = wilson(kept, rows, 1 - (1 - _LEVEL) / comparisons)
    overall = column.share
    shift = np.where(greatest < overall, greatest - overall, np.where(least > overall, least - overall, 0.0))
    # Wilson's interval is too narrow for a few rows of a small share: 1 of 5 where 1% are kept would surely differ.
    few = np.minimum(overall, 1 - overall) * rows < _EXACT
    for i in np.flatnonzero(few & (shift != 0)).tolist():
        if tail(int(kept[i]), int(rows[i]), overall) > (1 - _LEVEL) / (2 * comparisons):
            shift[i] = 0.0
    listed = np.lexsort((np.arange(len(rows)), -rows, -np.abs(shift)))[:most]
    order = listed[np.lexsort((listed, kept[listed] / rows[listed], shift[listed]))]
    shares = tuple(
        replace(column.values[i], low=float(low[i]), high=float(high[i]), shift=float(shift[i])) for i in order.tolist()
    )
    others = None if column.others is None else column.others + len(rows) - len(listed)
    return replace(column, values=shares, others=others)


# --- values that are texts ------------------------------------------------------------------------


class _Tally:
    """Counts of values, of the most frequent ones if there are too many.

    Attributes:
        counts: Value -> [rows, rows kept].
        approximate: Whether rare values were dropped, so that the counts are lower bounds.
    """

    def __init__(self, wanted: Sequence[str | None] | None = None) -> None:
        """Count all values, or only some."""
        self.counts: dict[str | None, list[int]] = {} if wanted is None else {value: [0, 0] for value in wanted}
        self.approximate = False
        self._open = wanted is None

    def add(self, values: Sequence[str | None], rows: Ints, kept: Ints) -> None:
        """Add the counts of different values."""
        for value, n, k in zip(values, rows.tolist(), kept.tolist(), strict=True):
            if not n:
                continue
            count = self.counts.get(value)
            if count is not None:
                count[0] += n
                count[1] += k
            elif self._open:
                self.counts[value] = [n, k]
        if len(self.counts) > 2 * _HELD:
            self.approximate = True
            rows_V = np.fromiter((count[0] for count in self.counts.values()), np.int64, len(self.counts))
            limit = int(np.partition(rows_V, -_HELD)[-_HELD])
            self.counts = {value: count for value, count in self.counts.items() if count[0] > limit}

    def largest(self, count: int) -> list[tuple[str | None, list[int]]]:
        """Return the values with the most rows, in the order of their texts on ties."""
        return sorted(self.counts.items(), key=lambda item: (-item[1][0], item[0] or ""))[:count]

    def rare(self) -> bool:
        """Return whether no value has more than a few rows."""
        return max((count[0] for count in self.counts.values()), default=0) < 3


def _texts(store: EmbeddingStore, names: Sequence[str], kept_N: Bools) -> dict[str, _Tally]:
    if not names:
        return {}
    tallies = {name: _Tally() for name in names}
    _count(store, tallies, kept_N)
    again = {
        name: _Tally([value for value, _ in tally.largest(1_000)])
        for name, tally in tallies.items()
        if tally.approximate and not tally.rare()
    }
    if again:
        _count(store, again, kept_N)
        for name, tally in again.items():
            tally.approximate = True
            tallies[name] = tally
    return tallies


def _count(store: EmbeddingStore, tallies: Mapping[str, _Tally], kept_N: Bools) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    for ids, part in store.scan(list(tallies)):
        kept = kept_N[ids]
        for cells, tally in zip(part.columns, tallies.values(), strict=True):
            empty = np.asarray(cells.is_null())
            plain = pa.types.is_boolean(cells.type)
            texts = pc.if_else(cells, "true", "false").fill_null("") if plain else caption_texts(cells, TEXT)
            coded = texts.dictionary_encode()
            codes = np.where(empty, len(coded.dictionary), np.asarray(coded.indices, np.int64))
            values = [*coded.dictionary.to_pylist(), None]
            tally.add(
                values,
                np.bincount(codes, minlength=len(values)),
                np.bincount(codes[kept], minlength=len(values)),
            )


def _column(name: str, kind: Any, tally: _Tally, rows: int, kept: int) -> ColumnShares:
    values = tuple(Share(value, n, k) for value, (n, k) in tally.largest(len(tally.counts)))
    return ColumnShares(name, kind, values, rows, kept, None if tally.approximate else 0)


def _words(store: EmbeddingStore, kept_N: Bools, captions: int) -> ColumnShares:
    """Count the captions that contain each word."""
    caption = str(store.layout.caption)
    step = -(-store.total // captions)

    def count(tally: _Tally) -> tuple[int, int]:
        read = kept = 0
        for ids, part in store.scan([caption]):
            at = np.flatnonzero(ids % step == 0)
            cells = part.column(0) if step == 1 else part.column(0).take(at)
            words, word_W, row_W = words_in(cells)
            inside = kept_N[ids[at]]
            read, kept = read + len(at), kept + int(np.count_nonzero(inside))
            tally.add(
                words.to_pylist(),
                np.bincount(word_W, minlength=len(words)),
                np.bincount(word_W[inside[row_W]], minlength=len(words)),
            )
        return read, kept

    tally = _Tally()
    read, kept = count(tally)
    if tally.approximate:
        tally = _Tally([value for value, _ in tally.largest(5_000)])
        count(tally)
        tally.approximate = True
    for word in STOP_WORDS & {word for word in tally.counts if word is not None}:
        del tally.counts[word]
    return _column(caption, "words", tally, read, kept)


# --- numbers and dates ----------------------------------------------------------------------------


def _kind(store: EmbeddingStore, name: str) -> str:
    """Return the kind of a column, or "- " and why it has none."""
    import pyarrow as pa

    if heavy(store, name):
        return "- contains images, vectors, lists or structs"
    types = {table.schema([name]).field(0).type for table in store.layout.tables}
    types -= {pa.null()}
    values = {kind.value_type if pa.types.is_dictionary(kind) else kind for kind in types}
    if all(map(pa.types.is_boolean, types)):
        return "bool"
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in types):
        return "number"
    if all(pa.types.is_date(kind) or pa.types.is_timestamp(kind) for kind in types):
        return "date"
    if all(is_words(kind) or not_text(kind) is None for kind in values):
        return "text"
    return f"- contains {', '.join(sorted(map(str, types)))}"


def _numbers(store: EmbeddingStore, name: str, kept_N: Bools) -> ColumnShares:
    values_N = store.column(name)
    empty = np.zeros(len(values_N), np.bool_)
    if isinstance(values_N, np.ma.MaskedArray):
        empty = np.ma.getmaskarray(values_N)
        values_N = np.asarray(values_N.filled(0))
    elif values_N.dtype.kind == "f":
        empty = np.isnan(values_N)
    some = values_N[:: -(-len(values_N) // _SAMPLED) or 1]
    few = np.unique(some[~empty[:: -(-len(values_N) // _SAMPLED) or 1]])
    whole = bool(np.all(few == np.round(few))) and bool(np.all(np.isfinite(few)))
    if len(few) <= _FEW and whole and np.isin(values_N[~empty], few).all():
        codes = np.where(empty, len(few), np.searchsorted(few, np.where(empty, few[0] if len(few) else 0, values_N)))
        made = [Share(f"{int(value)}", 0, 0, at_least=float(value), at_most=float(value)) for value in few.tolist()]
    else:
        finite = some[np.isfinite(some)] if some.dtype.kind == "f" else some[~empty[:: -(-len(values_N) // _SAMPLED)]]
        inner = np.empty(0)
        if len(finite):
            shares = np.linspace(0, 1, _RANGES + 1)
            inner = np.unique(np.quantile(finite.astype(np.float64), shares, method="lower"))[1:-1]
        codes = np.where(empty, len(inner) + 1, np.searchsorted(inner, values_N.astype(np.float64), side="right"))
        known = values_N[~empty].astype(np.float64)
        highest = np.full(len(inner) + 1, -np.inf)
        np.maximum.at(highest, codes[~empty], known)
        ends = [float(known.min()), *inner.tolist(), float(known.max())]
        if np.all(known == np.round(known)):  # "0 to 38", "39 to 79": each number is in one range
            texts = [_whole_range(low, max(low, high)) for low, high in zip(ends, highest.tolist(), strict=False)]
        else:
            words = _apart(ends)
            texts = [f"{low} to {high}" for low, high in itertools.pairwise(words)]
        made = [Share(text, 0, 0, at_least=ends[i], at_most=float(highest[i])) for i, text in enumerate(texts)]
    return _coded(name, "number", [*made, Share(None, 0, 0)], codes, kept_N)


def _whole_range(low: float, high: float) -> str:
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _apart(values: Sequence[float]) -> list[str]:
    """Write numbers with as few digits as make them different."""
    for digits in range(3, 18):
        texts = [f"{value:.{digits}g}" for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return [
        text if "e" not in text or abs(value) >= 1e15 or value != round(value) else f"{value:.0f}"
        for text, value in zip(texts, values, strict=True)
    ]


def _dates(store: EmbeddingStore, name: str, kept_N: Bools) -> ColumnShares | None:
    import pyarrow as pa

    parts, masks = [], []
    for _, part in store.scan([name]):
        cells = part.column(0)
        masks.append(np.asarray(cells.is_null()))
        stamp = pa.timestamp("s", cells.type.tz) if pa.types.is_timestamp(cells.type) else pa.timestamp("s")
        try:
            seconds = cells.cast(stamp, safe=False).cast(pa.int64())
        except pa.ArrowInvalid:
            return None
        parts.append(np.asarray(seconds.fill_null(0), np.int64))
    seconds_N, empty = np.concatenate(parts), np.concatenate(masks)
    stamps = seconds_N.view("datetime64[s]")
    known = stamps[~empty]
    if not len(known):
        return _coded(name, "date", [Share(None, 0, 0)], np.zeros(len(empty), np.int64), kept_N)
    found = None
    for unit in ("Y", "M", "D", "h", "m", "s"):
        units = known.astype(f"datetime64[{unit}]")
        distinct = np.unique(units)
        if found is not None and len(distinct) > _DATES:
            break
        found = unit, distinct
        if len(distinct) >= 4:
            break
    unit, distinct = found if found is not None else ("Y", known[:0])
    if len(distinct) > _DATES:  # many years: ranges of years
        edges = np.unique(np.quantile(distinct.astype(np.int64), np.linspace(0, 1, _RANGES + 1), method="lower"))
        years = stamps.astype("datetime64[Y]").astype(np.int64)
        codes = np.where(empty, len(edges) - 1, np.searchsorted(edges[1:-1], years, side="right"))
        texts = [str(np.datetime64(int(year), "Y")) for year in edges]
        made = [f"{a} to {b}" for a, b in zip(texts, texts[1:], strict=False)]
    else:
        codes = np.where(empty, len(distinct), np.searchsorted(distinct, stamps.astype(f"datetime64[{unit}]")))
        made = [str(value).replace("T", " ") for value in distinct]
    return _coded(name, "date", [*(Share(text, 0, 0) for text in made), Share(None, 0, 0)], codes, kept_N)


def _coded(name: str, kind: Kind, shares: Sequence[Share], codes_N: Ints, kept_N: Bools) -> ColumnShares:
    rows = np.bincount(codes_N, minlength=len(shares)).tolist()
    kept = np.bincount(codes_N[kept_N], minlength=len(shares)).tolist()
    counted = tuple(replace(share, rows=n, kept=k) for share, n, k in zip(shares, rows, kept, strict=True) if n)
    return ColumnShares(name, kind, counted, sum(rows), sum(kept))
