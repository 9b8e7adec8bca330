"""Several values of one parameter of a method, as a table: what each would keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.pool.store import EmbeddingStore
from thresher.pruning.covariance import covariance_errors
from thresher.pruning.recipe import run_steps
from thresher.pruning.registry import METHODS, build
from thresher.pruning.run import Run
from thresher.report.compare import clusters_of
from thresher.runtime.parameters import from_text, type_of, without_none
from thresher.selection import Selection

_MOST = 200  # values
_STEPS = 9  # values of a range


@dataclass(frozen=True, eq=False)
class Sweep:
    """A table with one row per value; iterate over it, or convert it with :meth:`to_pandas` and others.

    Attributes:
        method: Name of the method.
        parameter: Name of the parameter that varies.
        rows: One dictionary per value: the parameter, "rows" kept, "share" of all rows, "duplicates" dropped, "score",
            the mean score of the rows kept, "covariance", the relative error of the image-text cross-covariance, and
            "covariance_ratio", that error divided by the one of a random subset of this size; "clusters" with a row
            kept as a share of all clusters ("coverage"), and the lowest share of a cluster that is kept
            ("least_kept"). None where it does not apply.
        notes: What was done besides cutting.
        selections: The selections, by position.
    """

    method: str
    parameter: str
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    selections: tuple[Selection, ...]

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the table."""
        return iter(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        """Return a column of the table."""
        return [row[column] for row in self.rows]

    def __repr__(self) -> str:
        """Return the table as text."""
        return "\n".join(self.lines())

    def to_pandas(self) -> Any:
        """Return the table as a pandas DataFrame."""
        return self.to_arrow().to_pandas()

    def to_polars(self) -> Any:
        """Return the table as a polars DataFrame."""
        import polars

        return polars.from_arrow(self.to_arrow())

    def to_arrow(self) -> Any:
        """Return the table as an Arrow table."""
        import pyarrow as pa

        columns = {name: self[name] for name in self.rows[0]}
        if len({type(value) for value in columns[self.parameter]}) > 1:  # such as "10%" and 50
            columns[self.parameter] = [str(value) for value in columns[self.parameter]]
        return pa.table(columns)

    def lines(self) -> Iterator[str]:
        """Yield the table as lines of text, without columns that are empty."""
        names = [name for name in self.rows[0] if any(row[name] is not None for row in self.rows)]
        cells = [[_cell(name, row[name]) for name in names] for row in self.rows]
        widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
        for line in [names, *cells]:
            yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def sweep(
    store: EmbeddingStore,
    method: str,
    parameter: str,
    values: Sequence[Any],
    others: Mapping[str, Any] | None = None,
    *,
    covariance: bool = True,
    **how: Any,
) -> Sweep:
    """Select with several values of a parameter: one pass over the vectors, then a cut per value.

    The first value is selected as usual; the others are cut from what that cached. Methods that take rows one by one,
    such as ``clipcov``, run again for every value, with the same clustering.

    Args:
        store: The pool.
        method: Name of the method.
        parameter: Name of the parameter that varies.
        values: Its values.
        others: The other parameters.
        covariance: Also measure the error of the image-text cross-covariance, if the pool has both embeddings: one more
            pass for all values together.
        **how: seed, within, engine, cache and progress, as for :func:`thresher.pruning.recipe.run_steps`.

    Raises:
        UsageError: There are no values or too many, or the method cannot run with one of them.
    """
    cls = METHODS.find(method)
    names = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    if parameter not in names:
        raise UsageError(f"{method} has no {parameter}; it has {', '.join(names)}")
    if not 0 < len(values) <= _MOST:
        raise UsageError(f"{len(values)} values of {parameter}; give 1 to {_MOST}")
    kind = without_none(type_of(cls, parameter))
    if kind in (int, float):
        values = [from_text(kind, value) if isinstance(value, str) else value for value in values]
    rest = dict(others or {})
    methods = [build(method, {**rest, parameter: value}) for value in values]  # all are checked before any work
    selections = [run_steps(store, [methods[0]], **how)]
    again = 0
    for value, made in zip(values[1:], methods[1:], strict=True):
        try:
            selections.append(selections[0].recut(**{parameter: value}))
        except UsageError:
            selections.append(run_steps(store, [made], **how))
            again += 1
    notes = [f"{method} was run again for {again} of {len(values)} values"] if again else []
    labels_N = clusters_of(selections)
    errors: Mapping[str, Any] = {}
    if covariance and "joint" in store.fields:
        run = Run(store, selections[0], how["engine"], how["cache"], how.get("seed", 0), how["progress"])
        errors = covariance_errors(run, {str(i): one for i, one in enumerate(selections)}, labels_N)
    rows = []
    for i, (value, selection) in enumerate(zip(values, selections, strict=True)):
        step, mask_N = selection.steps[-1], selection.mask()
        kept_n = mask_N[selection.given(len(selection.steps) - 1)]
        error = errors.get(str(i))
        row = {
            parameter: value,
            "rows": len(selection),
            "share": len(selection) / selection.total,
            "duplicates": _duplicates(step.rows),
            "score": _mean(step.rows.get("score"), kept_n),
            "covariance": None if error is None else error.overall.error,
            "covariance_ratio": None if error is None else error.overall.ratio,
            **_coverage(labels_N, mask_N),
        }
        rows.append(row)
    return Sweep(method, parameter, tuple(rows), tuple(notes), tuple(selections))


def values_of(text: str) -> list[str]:
    """Return the values in a text: ``0.01,0.02``, or ``10%..90%`` for nine evenly spaced values.

    Raises:
        UsageError: It is neither.
    """
    if ".." not in text:
        found = [part.strip() for part in text.split(",")]
        if not all(found):
            raise UsageError(f"{text!r}: an empty value; write 0.01,0.02 or 10%..90%")
        return found
    low, _, high = text.partition("..")
    unit = "%" if low.strip().endswith("%") and high.strip().endswith("%") else ""
    try:
        first, last = (Decimal(part.strip().removesuffix(unit or " ")) for part in (low, high))
        if not (first.is_finite() and last.is_finite() and first < last):
            raise InvalidOperation
    except InvalidOperation:
        raise UsageError(f"{text!r}: not a range from a lower to a higher number, such as 10%..90%") from None
    step = (last - first) / (_STEPS - 1)
    spaced = [first + step * i for i in range(_STEPS)]
    return [f"{value.normalize():f}{unit}" for value in spaced]


def _duplicates(rows: Mapping[str, npt.NDArray[Any]]) -> int | None:
    twins = rows.get("duplicate_of")
    return None if twins is None else int(np.count_nonzero(np.asarray(twins) >= 0))


def _mean(score_n: npt.NDArray[Any] | None, kept_n: npt.NDArray[np.bool_]) -> float | None:
    if score_n is None:
        return None
    of_kept = np.asarray(score_n, np.float64)[kept_n]
    of_kept = of_kept[np.isfinite(of_kept)]
    return float(of_kept.mean()) if len(of_kept) else None


def _coverage(labels_N: npt.NDArray[Any] | None, mask_N: npt.NDArray[np.bool_]) -> dict[str, float | None]:
    if labels_N is None or not (labels_N >= 0).any():
        return {"coverage": None, "least_kept": None}
    sizes_K = np.bincount(labels_N[labels_N >= 0])
    kept_K = np.bincount(labels_N[(labels_N >= 0) & mask_N], minlength=len(sizes_K))
    shares = (kept_K / np.maximum(sizes_K, 1))[sizes_K > 0]
    return {"coverage": float((shares > 0).mean()), "least_kept": float(shares.min())}


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("share", "coverage", "least_kept"):
        return f"{value:.1%}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) and name not in ("keep", "eps", "threshold") else str(value)
