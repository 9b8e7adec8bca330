"""The log and ledger of a training run as arrays and example rows: pure functions.

Shape letters: E finished epochs, N rows of the pool, B bins of losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.dynamic.histogram import LOSS_EDGES, on_all_bins
from thresher.dynamic.ledger import ILL_MATCHED, LEFT_OUT, REDUNDANT, Ledger
from thresher.dynamic.mismatch import Mismatch
from thresher.errors import PoolError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_NUMBERS = (
    "rows", "total", "pruned_so_far", "samples", "loss", "redundant", "ill_matched", "candidates", "overlap", "seconds",
    "samples_per_second", "lr",
)  # fmt: skip
_CONSTANT = ("chance", "majority", "classes", "rows", "images", "texts", "l2", "slope", "converged")  # not plotted


@dataclass(frozen=True, eq=False)
class Curve:
    """A metric, and the epochs, from 1, after which it was measured."""

    metric: str
    epochs: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def best(self) -> int:
        """Index of the highest value, the first on ties."""
        return int(np.argmax(self.values))


@dataclass(frozen=True, eq=False)
class Epochs:
    """The log of a run as columns.

    Attributes:
        number_E: Numbers of the epochs from 1, ascending; the log counts from 0.
        phases: Name of the phase of each epoch.
        columns: (E,) float64 by name, NaN where an entry has no value.
        edges: (B + 1,) edges of the bins that are filled in any epoch; empty without histograms.
        counts_EB: Number of losses in each bin.
        evals: Curves by evaluation set.
    """

    number_E: Ints
    phases: tuple[str, ...]
    columns: Mapping[str, Floats]
    edges: Floats
    counts_EB: Ints
    evals: Mapping[str, tuple[Curve, ...]]

    @classmethod
    def of(cls, log: Sequence[Mapping[str, Any]]) -> Epochs:
        """Read a log.

        Raises:
            PoolError: An entry is not a log entry of a run.
        """
        try:
            columns = {name: np.array([_number(entry.get(name)) for entry in log]) for name in _NUMBERS}
            edges, counts_EB = _heat([entry.get("histogram") for entry in log])
            return cls(
                number_E=np.array([int(entry["epoch"]) + 1 for entry in log], np.int64),
                phases=tuple(str(entry.get("phase", "")) for entry in log),
                columns=columns,
                edges=edges,
                counts_EB=counts_EB,
                evals=_evals(log),
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise PoolError(f"the log of the run cannot be read; it may be damaged ({error})") from None

    def __len__(self) -> int:
        """Return E."""
        return len(self.number_E)

    def __getitem__(self, name: str) -> Floats:
        """Return a column."""
        return self.columns[name]

    @property
    def search_E(self) -> npt.NDArray[np.bool_]:
        """(E,) bool, the epochs that selected candidates."""
        return np.asarray(self["candidates"] > 0, np.bool_)

    @property
    def chance_E(self) -> Floats:
        """(E,) expected overlap of random candidates: the share of the rows that the previous search selected."""
        chance = np.full(len(self), np.nan)
        at = np.flatnonzero(self.search_E)
        chance[at[1:]] = (self["candidates"] / self["total"])[at[:-1]]
        return chance

    @property
    def saved(self) -> tuple[float, float]:
        """Number of pruned samples, and the estimated seconds they would have taken; NaN if the log has no times."""
        left_out = float(np.nansum(self["total"] - self["rows"]))
        seen = float(np.nansum(self["samples"]))
        seconds = float(self["seconds"].sum())  # NaN if an entry has none
        return left_out, left_out * seconds / seen if seen else float("nan")


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _heat(histograms: Sequence[Mapping[str, Any] | None]) -> tuple[Floats, Ints]:
    if not any(histograms):
        return np.empty(0), np.empty((len(histograms), 0), np.int64)
    none = np.zeros(len(LOSS_EDGES) - 1, np.int64)
    counts_EB = np.stack([on_all_bins(each) if each else none for each in histograms])
    filled = np.flatnonzero(counts_EB.any(axis=0))
    lo, hi = int(filled[0]), int(filled[-1]) + 1
    return LOSS_EDGES[lo : hi + 1], counts_EB[:, lo:hi]


def _evals(log: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Curve, ...]]:
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in log:
        for name, metrics in (entry.get("eval") or {}).items():
            for metric, value in metrics.items():
                if value is not None:
                    points.setdefault(name, {}).setdefault(metric, []).append((int(entry["epoch"]) + 1, float(value)))
    return {
        name: tuple(
            Curve(metric, tuple(e for e, _ in curve), tuple(v for _, v in curve)) for metric, curve in metrics.items()
        )
        for name, metrics in points.items()
    }


def is_constant(metric: str) -> bool:
    """Return whether a metric describes the evaluation set, such as the chance level, not the model."""
    return metric.endswith(_CONSTANT)


# --- rows to show ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row to show, with its history in training as text."""

    row: int
    text: str


@dataclass(frozen=True)
class RowGroup:
    """Rows with the same history.

    Attributes:
        title: Heading of the group.
        count: Number of rows in the group.
        kept: Whether these rows were never candidates.
        rows: Examples.
    """

    title: str
    count: int
    kept: bool
    rows: tuple[Row, ...]


def row_groups(ledger: Ledger, count: int, mismatch: Mismatch | None = None) -> tuple[RowGroup, ...]:
    """Return up to ``count`` rows of each group: most often redundant, ill-matched or left out, and never a candidate.

    With ``mismatch``, the first group has the rows whose losses rank highest, instead of those last ill-matched.

    A ledger records how often a row was a candidate and its kind at the last time, not the kind each time. On equal
    counts, redundant rows are sorted by ascending loss and the others by descending loss. Rows that were never a
    candidate are evenly spaced by loss.
    """
    if not count:
        return ()
    times_N, marks_N, loss_N = ledger.times_N, ledger.marks_N, ledger.loss_N
    seen_N = ledger.seen_N >= 0
    result = [] if mismatch is None else [_mismatched(ledger, mismatch, count)]
    for title, chosen_N, sign in (
        ("Most often a candidate, last as redundant", marks_N == REDUNDANT, 1),
        ("Most often a candidate, last as ill-matched", marks_N == ILL_MATCHED, -1),
        ("Redundant in one direction, ill-matched in the other", marks_N == REDUNDANT | ILL_MATCHED, -1),
        ("Most often left out", marks_N & np.uint8(LEFT_OUT) > 0, 1),
    ):
        if mismatch is not None and title.endswith("as ill-matched"):
            continue
        rows = np.flatnonzero(chosen_N)
        first = rows[times_N[rows] == times_N[rows].max()] if len(rows) else rows
        # Sort only the rows with the highest count if there are enough of them.
        first = rows if len(first) < count else first
        loss = np.nan_to_num(sign * loss_N[first].astype(np.float64), nan=np.inf)
        order = np.lexsort((first, loss, -times_N[first].astype(np.int64)))[:count]
        result.append(RowGroup(title, len(rows), False, _rows(ledger, first[order])))
    never = np.flatnonzero((times_N == 0) & seen_N)
    spread = never[np.argsort(loss_N[never], kind="stable")]
    spread = spread[np.unique(np.linspace(0, len(spread) - 1, min(count, len(spread))).round().astype(np.int64))]
    title = "Never a candidate" if times_N.any() else "From the lowest to the highest loss"
    result.append(RowGroup(title, len(never), True, _rows(ledger, spread)))
    return tuple(group for group in result if group.rows)


def _mismatched(ledger: Ledger, mismatch: Mismatch, count: int) -> RowGroup:
    order = mismatch.order(ledger)
    known = order[: np.count_nonzero(~np.isnan(mismatch.ranks_N))]
    rows = known[::-1][:count].tolist()
    title = "Probably mismatched: the loss ranks high in every epoch on all rows"
    if mismatch.found is None:
        title = "Highest ranks of the loss; nothing shows that pairs are mismatched"
    shown = tuple(Row(row, f"rank {mismatch.ranks_N[row]:.3f}, loss {ledger.loss_N[row]:.3g}") for row in rows)
    return RowGroup(title, int(np.count_nonzero(mismatch.wrong_N)) if mismatch.found else len(known), False, shown)


def _rows(ledger: Ledger, rows: npt.NDArray[np.int64]) -> tuple[Row, ...]:
    shown = []
    for row in rows.tolist():
        words = [f"{ledger.times_N[row]}\u00d7"] if ledger.times_N[row] else []
        words += [f"loss {ledger.loss_N[row]:.3g}"] if ledger.seen_N[row] >= 0 else []
        shown.append(Row(row, ", ".join(words)))
    return tuple(shown)
