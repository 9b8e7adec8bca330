"""Selections: which rows are kept, and why each of the others was dropped.

A selection is a mask over the rows of a store (or a repeat count per row), the fingerprint of the store, and the
chain of steps that produced it, each with its parameters, counts and evidence.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt

from thresher import __version__
from thresher.errors import BudgetError, OutputError, PoolError, UsageError, require_package
from thresher.io.paths import relative, shortened, visible
from thresher.io.places import local_copy, place
from thresher.runtime.files import refuse_foreign_files
from thresher.runtime.format import counted, percent
from thresher.runtime.parameters import meant
from thresher.runtime.places import AnyPath
from thresher.runtime.results import Name, Say, exists_already, is_unfinished, result_folder
from thresher.runtime.template import filled_each, formats, parts_of
from thresher.runtime.untrusted import FLOATS, INTEGERS, SIGNED, TEXT, Fields, mapped_array, read_json

T_co = TypeVar("T_co", covariant=True)

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import pyarrow as pa
    from matplotlib.figure import Figure
    from torch.utils.data import Subset

    from thresher.export.write import Exported
    from thresher.pool.store import EmbeddingStore
    from thresher.pruning.registry import Method
    from thresher.report.compare import Comparison
    from thresher.report.notebook import Gallery
    from thresher.runtime.cache import Cache
    from thresher.viewer.server import Viewer

    class _Frame(Protocol):
        @property
        def iloc(self) -> Any: ...

    class _Array(Protocol):
        @property
        def dtype(self) -> Any: ...

    class _Concatenated(Protocol):
        @property
        def cumulative_sizes(self) -> Any: ...

    class _TorchDataset(Protocol[T_co]):
        """A ``torch.utils.data.Dataset``, which no other collection matches: the sum of two is a ConcatDataset."""

        def __getitem__(self, index: Any, /) -> T_co: ...
        def __add__(self, other: Any, /) -> _Concatenated: ...


D = TypeVar("D")
F = TypeVar("F", bound="_Frame | _Array")
T = TypeVar("T")
Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]

FORMAT = 1
FILES = ("selection.json", "mask.npy", "dropped_by.npy", "repeats.npy", "steps")
COMBINED = ("intersection", "union", "difference")  # methods of steps that combine two selections

# Limits on what a folder of someone else can make this machine do.
_MOST_STEPS = 1_000
_MOST_CLUSTERS = 2**20  # or the number of rows, if that is higher
_MOST_REPEATS = 100_000  # per row of the pool, on average
_BLOCK = 2**18  # rows checked at a time, so that they stay in the CPU cache
_FEW = 16
_REPEATED = ("duplicate_of", "reference")  # evidence that is the number of another row, -1 for none
_EPOCHS = ("marked", "seen")  # evidence that counts epochs from 0, as the log of a run does; texts count from 1


@dataclass(frozen=True)
class Keep:
    """A budget: a share of the input rows, or a number of rows.

    ``Keep.parse`` accepts ``"30%"``, ``"0.3"`` / ``0.3`` (strictly between 0 and 1) and integers (``3_000_000``).
    ``1.0`` is rejected because it is ambiguous: it could mean one row or all rows.
    """

    share: Fraction | None = None
    count: int | None = None

    @classmethod
    def parse(cls, value: str | int | float | Keep) -> Keep:
        """Parse a budget.

        Raises:
            UsageError: The value is not a valid budget; the message says what is allowed.
        """
        if isinstance(value, Keep):
            return value
        hint = "give a share like 30% or 0.3 (strictly between 0 and 1), or a number of rows like 3_000_000"
        if isinstance(value, bool):
            raise UsageError(f"cannot keep {value!r}; {hint}")
        if isinstance(value, int):
            if value >= 10**18:
                raise UsageError(f"cannot keep so many rows, 10^18 or more; {hint}")
            if value < 1:
                raise UsageError(f"cannot keep {max(value, -(10**18)):,} rows; {hint}")
            return cls(count=value)
        text = str(value).strip()
        if len(text) > 100:
            raise UsageError(f"cannot read {text[:100]!r}... ({len(text):,} characters) as an amount to keep; {hint}")
        if re.fullmatch(r"\d{1,18}|\d{1,3}(_\d{3})+", text):
            return cls.parse(int(text))
        number = text.removesuffix("%").strip()
        if not re.fullmatch(r"(\d{1,40}\.?\d{0,40}|\.\d{1,40})([eE][+-]?\d{1,3})?", number):
            raise UsageError(f"cannot read {text!r} as an amount to keep; {hint}{_closest(text)}")
        share = Fraction(Decimal(number))
        if text.endswith("%"):
            share /= 100
            if not 0 < share <= 1:
                raise UsageError(f"cannot keep {text}; {hint}")
        elif not 0 < share < 1:
            ends = "for all rows write 100%, for one row write 1; " if share == 1 else ""
            raise UsageError(f"cannot keep {text}: {ends}{hint}{'' if ends else _closest(text)}")
        return cls(share=share)

    def of(self, rows: int, *, repeats: bool = False) -> int:
        """Return the exact number of rows to keep out of ``rows``; shares are rounded down.

        Args:
            rows: Number of available rows.
            repeats: Whether a row may count more than once, so that the result may exceed ``rows``.

        Raises:
            BudgetError: The budget exceeds ``rows``, or a share comes to less than one row.
        """
        count = self.count if self.count is not None else int(self.share * rows) if self.share else 0
        if count > rows and not repeats:
            raise BudgetError(f"cannot keep {count:,} rows of the {rows:,} available")
        if count == 0:
            raise BudgetError(f"{self} of {counted(rows, 'row')} is less than one row; keep more")
        return count

    def __repr__(self) -> str:
        """Return an expression that makes this budget."""
        return f"Keep.parse({str(self)!r})"

    def __str__(self) -> str:
        """Return the budget as a user would write it."""
        if self.share is None:
            return str(self.count)
        share = self.share * 100
        exact = f"{float(share):.10f}".rstrip("0").rstrip(".")
        return f"{exact}%" if Fraction(Decimal(exact)) == share else f"{float(share)!r}%"


def _closest(text: str) -> str:
    """Return the end of a message about a budget that cannot be read: what to type for what it seems to mean."""
    likely = meant(float, text)  # 1 is left out: it may be one row or all
    return f"; type {likely}" if likely not in (text, "1") and re.fullmatch(r"0\.\d+|[1-9]\d{0,17}", likely) else ""


if TYPE_CHECKING:
    Budget: TypeAlias = Keep | str | int | float  # what is given; an instance of a method has it as a Keep
else:
    Budget = Keep


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One step of a chain.

    Attributes:
        method: Name of the method.
        parameters: Parameters including defaults, as JSON values.
        seed: Random seed.
        rows_in: Number of input rows.
        rows_out: Number of kept rows.
        reasons: Templates for the reason why a row was dropped, filled from its evidence by name
            (``{score:.4f}``, ``{cut:.4f}``, ``{duplicate_of}``, ``{cluster}``, ``{quota:,}``, ``{size:,}``,
            ``{reference_key}``), see :mod:`thresher.runtime.template`. If there are several, the row's evidence "code"
            is the index of the one that applies.
        score: Description of the score; "" if the method has none.
        cut: The score threshold, if there is a single one.
        version: Version of thresher that made the step.
        package: The package that provides the method, {"name", "version"}.
        notes: Information for the user, such as why a number was chosen.
        rows: Evidence per input row, (rows_in,): "score" float32, "duplicate_of" int64, "cluster" int32,
            "code" uint8, "reference" int64 (the row of a reference pool that a dropped row repeats, else -1).
        groups: Evidence per cluster, (K,): "size", "quota", "kept", "complexity", "d_intra", "d_inter",
            "name" (text).
        reference: Evidence per row of a reference pool that a dropped row repeats: "row" (H,) int64, its row number
            there, ascending; "key" and "caption", text as :func:`packed` with "key_ends" and "caption_ends".
    """

    method: str
    parameters: Mapping[str, Any]
    seed: int
    rows_in: int
    rows_out: int
    reasons: tuple[str, ...]
    score: str = ""
    cut: float | None = None
    version: str = __version__
    notes: tuple[str, ...] = ()
    rows: Mapping[str, Array] = field(default_factory=dict)
    groups: Mapping[str, Array] = field(default_factory=dict)
    reference: Mapping[str, Array] = field(default_factory=dict)
    package: Mapping[str, str] = field(default_factory=lambda: {"name": "thresher", "version": __version__})

    def __repr__(self) -> str:
        """Return the method and the counts in one line."""
        return f"Step({self.method}: kept {self.rows_out:,} of {counted(self.rows_in, 'row')})"

    def __post_init__(self) -> None:
        """Check the templates of the reasons.

        Raises:
            UsageError: One is not valid, names what is not evidence of the step, or has a format that does not fit it.
        """
        kinds = self._kinds()
        for _, name, spec in self._parts():
            if name and name not in kinds:
                raise UsageError(
                    f"{self.method}: a reason uses {name!r}, which is not evidence of the step; it has "
                    f"{', '.join(kinds)}"
                )
            if name and not formats(spec, kinds[name]):
                raise UsageError(
                    f"{self.method}: a reason has {{{name}:{spec}}}, but {name} is "
                    f"{'text' if kinds[name] == 'U' else 'not an integer'}"
                )

    def _parts(self) -> list[tuple[str, str, str]]:
        try:
            return [part for reason in self.reasons for part in parts_of(reason)]
        except UsageError as error:
            raise UsageError(f"{self.method}: {error}") from None

    def _kinds(self) -> dict[str, str]:
        """Return the names that a reason may use, each with the NumPy kind of its values."""
        known: dict[str, str] = {"cut": "f", **{name: array.dtype.kind for name, array in self.rows.items()}}
        if "reference" in self.rows:
            kinds = {"row": "i", "key": "U", "caption": "U"}
            known |= {f"reference_{name}": kind for name, kind in kinds.items() if name in self.reference}
        groups = self.groups if "cluster" in self.rows else {}
        return {**{name: array.dtype.kind for name, array in groups.items()}, **known}

    def _repr_html_(self) -> str:
        from thresher.report.notebook import in_notebook, step_html

        return in_notebook(step_html, self)

    @property
    def foreign(self) -> str:
        """Name and version of the package that provides the method, "" for thresher itself."""
        name, version = self.package["name"], self.package["version"]
        return "" if name == "thresher" else f"{name} {version}".strip()

    def why(self, i: int) -> str:
        """Return why row ``i`` of the input rows was dropped; a step does not know which rows it kept."""
        return self.why_each(np.array([i]))[0]

    def why_each(self, positions: npt.NDArray[Any]) -> list[str]:
        """Return why some of the input rows were dropped, as :meth:`why` does, in the order of ``positions`` (M,)."""
        texts = np.full(len(positions), "", object)
        codes = np.asarray(self.rows["code"])[positions] if "code" in self.rows else np.zeros(len(positions), np.int64)
        for code, reason in enumerate(self.reasons):
            here = np.flatnonzero(codes == code)
            named = {name for _, name, _ in parts_of(reason)}
            for name in named.intersection(_REPEATED, self.rows):
                kept = np.asarray(self.rows[name])[positions[here]] < 0
                texts[here[kept]] = "does not repeat another row"
                here = here[~kept]
            texts[here] = filled_each(reason, partial(self._values, positions[here]), len(here))
        return list(texts)

    def _values(self, positions: npt.NDArray[Any], name: str) -> list[Any]:
        if name == "cut":
            return ["unknown" if self.cut is None else self.cut] * len(positions)
        if name in self.rows:
            values: list[Any] = np.asarray(self.rows[name])[positions].tolist()
            return values if name not in _EPOCHS else [v + 1 if v >= 0 else "unknown" for v in values]
        if name.startswith("reference_") and name.removeprefix("reference_") in self.reference:
            part = name.removeprefix("reference_")
            return [(self.repeated(i) or {}).get(part, "unknown") for i in positions.tolist()]
        return list(np.asarray(self.groups[name])[np.asarray(self.rows["cluster"])[positions]].tolist())

    def repeated(self, i: int) -> dict[str, Any] | None:
        """Return the row of a reference pool that row ``i`` of the input rows repeats.

        Returns:
            A dictionary with "row", the row number in the reference pool, and "key" and "caption" if the reference
            pool has them; None if the row was not dropped as a repeat of a reference row.
        """
        row = int(self.rows["reference"][i]) if "reference" in self.rows else -1
        if row < 0:
            return None
        at = int(np.searchsorted(self.reference["row"], row))
        texts = {
            name: _unpacked(self.reference[name], self.reference[f"{name}_ends"], at)
            for name in ("key", "caption")
            if name in self.reference
        }
        return {"row": row, **texts}

    def header(self) -> dict[str, Any]:
        """Return everything except the arrays, as JSON values."""
        return {
            "method": self.method,
            "parameters": dict(self.parameters),
            "seed": self.seed,
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "score": self.score,
            "cut": self.cut,
            "version": self.version,
            "package": dict(self.package),
            "reasons": list(self.reasons),
            "notes": list(self.notes),
            "rows": sorted(self.rows),
            "groups": sorted(self.groups),
            "reference": sorted(self.reference),
        }


@dataclass(frozen=True, eq=False)
class Source:
    """What a selection was made from and with, while the program runs; it is not saved with the selection.

    Attributes:
        store: The open pool.
        methods: The methods of the last steps, in order.
        cache: Where computed arrays are kept.
    """

    store: EmbeddingStore
    methods: tuple[Method, ...] = ()
    cache: Cache | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Which rows of a store are kept, and which step dropped each of the others.

    Attributes:
        store: Fingerprint of the store; selections of different stores cannot be combined.
        pool: Location of the pool, to look up keys and captions later.
        options: Options with which the pool was opened.
        dropped_by: (N,) int16: index of the step that dropped the row, -1 for kept rows.
        steps: The chain of steps.
        repeats: (N,) int32, how often each kept row is used, 0 for dropped rows; None if each is used once.
        source: The open pool and the methods, if the selection was made in this program or :meth:`with_pool` gave it
            its pool; otherwise the pool is opened at ``pool`` when it is needed.
    """

    store: str
    pool: str
    options: Mapping[str, Any]
    dropped_by: npt.NDArray[np.int16]
    steps: tuple[Step, ...] = ()
    repeats: npt.NDArray[np.int32] | None = None
    source: Source | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        """Return the counts of the selection and of its steps in two lines."""
        repeated = f", {self.uses:,} with repeats" if self.repeats is not None else ""
        pool = shortened(visible(relative(self.pool)), 80)
        share = f" ({percent(len(self), self.total)})" if self.total else ""
        chain = " -> ".join([f"{self.total:,}", *(f"{step.method} {step.rows_out:,}" for step in self.steps[-6:])])
        return f"Selection({len(self):,} of {counted(self.total, 'row')}{share}{repeated} of {pool}\n  {chain})"

    @classmethod
    def everything(cls, store: str, pool: str, options: Mapping[str, Any], rows: int) -> Selection:
        """Return the selection of all rows, before any step."""
        return cls(store=store, pool=pool, options=options, dropped_by=np.full(rows, -1, np.int16))

    def mask(self) -> Bools:
        """Return (N,) bool, True for kept rows."""
        return np.asarray(self.dropped_by == -1, np.bool_)

    def rows(self) -> npt.NDArray[np.int64]:
        """Return the global ids of the kept rows, ascending."""
        return np.flatnonzero(self.dropped_by == -1)

    def __len__(self) -> int:
        """Number of kept rows."""
        return int(np.count_nonzero(self.dropped_by == -1))

    @property
    def total(self) -> int:
        """N, the number of rows of the store."""
        return len(self.dropped_by)

    @property
    def uses(self) -> int:
        """Number of kept rows, each counted as often as it is used."""
        return len(self) if self.repeats is None else int(self.repeats.sum(dtype=np.int64))

    def given(self, step: int) -> npt.NDArray[np.int64]:
        """Return the global ids of the input rows of step number ``step``."""
        return np.flatnonzero((self.dropped_by == -1) | (self.dropped_by >= step))

    def then(self, step: Step, keep_n: Bools, repeats_n: npt.NDArray[np.int32] | None = None) -> Selection:
        """Return the selection after one more step.

        Args:
            step: The step.
            keep_n: (n,) bool, which of the rows kept so far to keep.
            repeats_n: (n,) int32, how often to use each row, 0 for dropped rows; by default as often as before.

        Raises:
            UsageError: An array has the wrong length, or an earlier step repeats rows already.
        """
        kept_N = self.mask()
        if keep_n.shape != (rows := np.count_nonzero(kept_N),):
            raise UsageError(f"{step.method} returned a mask of {len(keep_n):,} rows for {rows:,} input rows")
        by_n = np.where(keep_n, np.int16(-1), np.int16(len(self.steps)))
        if rows == self.total:
            dropped_by = by_n
        else:
            dropped_by = np.array(self.dropped_by)
            dropped_by[kept_N] = by_n
        repeats = self.repeats
        if repeats_n is not None:
            if repeats is not None:
                raise UsageError("an earlier step repeats rows already; draw only once, and filter before or after")
            if not np.array_equal(repeats_n > 0, keep_n):
                raise UsageError(f"{step.method} must repeat the rows it keeps at least once, and no other row")
            repeats = np.zeros(self.total, np.int32)
            repeats[kept_N] = repeats_n
        elif repeats is not None:
            repeats = np.where(dropped_by == -1, repeats, 0).astype(np.int32)
        return replace(self, dropped_by=dropped_by, steps=(*self.steps, step), repeats=repeats)

    # --- set algebra --------------------------------------------------------------------------

    def __and__(self, other: Selection) -> Selection:
        """Return the rows kept by both."""
        return self._combined("intersection", other, self.mask() & self.same_store(other).mask())

    def __or__(self, other: Selection) -> Selection:
        """Return the rows kept by either."""
        return self._combined("union", other, self.mask() | self.same_store(other).mask())

    def __sub__(self, other: Selection) -> Selection:
        """Return the rows kept by this selection and not by ``other``."""
        return self._combined("difference", other, self.mask() & ~self.same_store(other).mask())

    def same_store(self, other: Selection) -> Selection:
        """Return ``other`` after checking that it belongs to the same store.

        Raises:
            UsageError: It belongs to a different store.
        """
        if (other.store, other.total) != (self.store, self.total):
            raise UsageError(
                f"these selections belong to different pools: {self.pool} ({self.total:,} rows, {self.store[:12]}) "
                f"and {other.pool} ({other.total:,} rows, {other.store[:12]})"
            )
        return other

    def _combined(self, name: str, other: Selection, mask: Bools) -> Selection:
        if self.repeats is not None or other.repeats is not None:
            raise UsageError(f"cannot take the {name} of selections that repeat rows: they are not sets")
        origins = [[step.header() for step in part.steps] for part in (self, other)]
        step = Step(
            method=name,
            parameters={"of": origins},
            seed=0,
            rows_in=self.total,
            rows_out=int(mask.sum()),
            reasons=(f"not in the {name} of two selections",),
        )
        start = Selection.everything(self.store, self.pool, self.options, self.total)
        source = self.source or other.source
        return replace(start, source=source and replace(source, methods=())).then(step, mask)

    # --- what to do with it -------------------------------------------------------------------

    def with_pool(self, pool: Any) -> Selection:
        """Return this selection with its pool: where it is now, or the store that :func:`thresher.from_arrays` made.

        Args:
            pool: A store, the location of the pool if it was moved, or data in memory that ``from_arrays`` takes.

        Raises:
            UsageError: It is another pool.
        """
        from thresher.pool.store import absolute, whole_pool

        store = self._opened(pool, None)
        whole_pool(store)
        source = replace(self.source, store=store) if self.source is not None else Source(store)
        return replace(self, pool=absolute(store.layout.location), source=source)

    def to_table(self, columns: Sequence[str] | None = None) -> Any:
        """Return an Arrow table with a row per row of the pool, N rows in its order.

        Args:
            columns: By default "row", "key", "kept", "step" (the method that dropped the row, "" if kept), "reason"
                ("kept" if kept), "repeats" if rows are repeated, and the evidence of each step, such as
                "semdedup_score", "semdedup_duplicate_of" (-1 for none) and "density_score" (NaN where the step did not
                see the row). Also possible are "density_cluster", "score" and "duplicate_of" of the last step that saw
                the row, and any column of the pool. Without "key" and columns of the pool, the pool is not opened.

        Raises:
            UsageError: There is no such column; the message lists all.
            PoolError: The pool cannot be opened.
        """
        from thresher.export.table import as_table, needs_pool
        from thresher.pool.store import reopen

        return as_table(self, reopen(self) if needs_pool(self, columns) else None, columns)

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return :meth:`to_table` as a ``pyarrow.Table``."""
        return self.to_table(columns)

    def to_pandas(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return :meth:`to_table` as a pandas frame.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        require_package("pandas", "to_pandas")
        frame: pd.DataFrame = self.to_table(columns).to_pandas()
        return frame

    def to_polars(self, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """Return :meth:`to_table` as a polars frame.

        Raises:
            MissingPackageError: polars is not installed.
        """
        frame: pl.DataFrame = require_package("polars", "to_polars").from_arrow(self.to_table(columns))
        return frame

    # For type checkers: literals become the type of their elements, and a dataset of torch a Subset of it. Frames and
    # arrays come before it, because their + may return anything.
    @overload
    def filter(self, dataset: list[T], *, keys: str | Iterable[Any] | None = None) -> list[T]: ...
    @overload
    def filter(self, dataset: tuple[T, ...], *, keys: str | Iterable[Any] | None = None) -> tuple[T, ...]: ...
    @overload
    def filter(self, dataset: F, *, keys: str | Iterable[Any] | None = None) -> F: ...
    @overload
    def filter(self, dataset: _TorchDataset[T], *, keys: str | Iterable[Any] | None = None) -> Subset[T]: ...
    @overload
    def filter(self, dataset: D, *, keys: str | Iterable[Any] | None = None) -> D: ...
    def filter(self, dataset: Any, *, keys: str | Iterable[Any] | None = None) -> Any:
        """Return the kept rows of a dataset, each as often as the selection uses it, as the type that came in.

        Args:
            dataset: A Hugging Face Dataset or IterableDataset, a map-style dataset of torch (the result is a Subset of
                it), a pandas or polars frame or series, an Arrow table or array, a NumPy array or a tensor (by its
                first axis), a list or a tuple.
            keys: The column with the key of every row, or the keys, as for
                :func:`thresher.select_indices`. By default the column, or the index of a pandas frame, with the name of
                the key column of the pool. If there is none, the dataset must have the N rows of the pool in its order.

        Raises:
            UsageError: The dataset has another number of rows and no keys, none of its keys is kept, or it is something
                else.
        """
        from thresher.export.filter import filtered

        return filtered(self, dataset, keys)

    def _repr_html_(self) -> str:
        from thresher.report.notebook import in_notebook, selection_html

        return in_notebook(selection_html, self)

    def show(
        self,
        dropped_by: str | int | None = None,
        n: int = 24,
        *,
        first: Literal["borderline", "clear"] = "borderline",
        pool: Any = None,
    ) -> Gallery:
        """Return a gallery of dropped rows for a notebook, with images, captions and reasons.

        Rows that were dropped as duplicates are shown next to the row that they repeat.

        Args:
            dropped_by: Name of a method, or number of a step, from 1 (default: the same number of rows of each step).
            n: Number of rows or pairs, 1 to 200.
            first: "borderline": the rows that were nearest to being kept, which are the most surprising; "clear": the
                rows farthest from the threshold. Rows of a step without a single threshold are spread evenly over its
                scores instead.
            pool: The pool, if it was moved: a store or a location.

        Raises:
            UsageError: No such step, or another pool.
            PoolError: The pool cannot be opened.
        """
        from thresher.report.notebook import selection_gallery

        return selection_gallery(self, self._opened(pool, None), dropped_by, n, first)

    def plot(self, step: str | int | None = None) -> Figure:
        """Return a matplotlib figure: the rows that every step kept, or a histogram of the scores of one step.

        The figure does not belong to pyplot, so nothing has to be closed: ``kept.plot().savefig("funnel.png")``.

        Args:
            step: Name of a method, or number of a step, from 1, for a histogram of its scores.

        Raises:
            UsageError: No such step, or it has no scores.
        """
        from thresher.report.notebook import plotted

        return plotted(self, step)

    def explain(self, key: str | int, *, pool: Any = None, metadata: str | None = None) -> dict[str, Any]:
        """Return what each step decided about a row, see :func:`thresher.report.explain.explain`.

        Args:
            key: The key of the row, a number if keys are numbers; ``row:17`` names a row by number.
            pool: The pool, if it was moved: a store or a location.
            metadata: An img2dataset output to join by key.

        Raises:
            UsageError: No such row, or another pool.
        """
        from thresher.report.explain import explain

        return explain(self, self._opened(pool, metadata), key)

    def report(self, path: Name, *, pool: Any = None, metadata: str | None = None, **how: Any) -> AnyPath:
        """Write an HTML page about the selection and return its path, see :func:`thresher.report.write_report`.

        Args:
            path: The file; replaced atomically.
            pool: The pool, if it was moved: a store or a location; False for a page without captions and images.
            metadata: An img2dataset output to join by key.
            **how: title, examples, cells, points, cache, covariance, overwrite and say of ``write_report``.
        """
        from thresher.export.write import check_target
        from thresher.report import write_report

        store = None if pool is False else self._opened(pool, metadata)
        check_target(place(path), store)
        if self.source is not None and self.source.cache is not None:
            how = {"cache": self.source.cache, **how}
        return write_report(self, path, store=store, **how)

    def view(self, *others: Any, **how: Any) -> Viewer:
        """Show the selection in the browser, compared with others of the same pool if there are any.

        See :func:`thresher.view`.
        """
        from thresher.api import view

        return view(self, *others, **how)

    def export(
        self, format: Any, path: str | os.PathLike[str], *, pool: Any = None, metadata: str | None = None, **how: Any
    ) -> Exported:
        """Write the selection in a format that training tools read, see :func:`thresher.export.write.export`.

        Args:
            format: Name of a format, such as "open_clip", "keys" or "parquet", or a format object with options.
            path: The file; replaced atomically.
            pool: The pool, if it was moved: a store or a location.
            metadata: An img2dataset output to join by key.
            **how: manifest, hash_inputs, overwrite and progress of ``export``.
        """
        from thresher.export.write import export

        return export(self, format, path, store=self._opened(pool, metadata), **how)

    def compare(self, other: Selection, *more: Selection, worst: int = 10) -> Comparison:
        """Compare this selection with others of the same pool, see :func:`thresher.compare`.

        The selections have the names "1", "2" and so on in the result.
        """
        from thresher.report.compare import compare

        return compare({str(i): one for i, one in enumerate((self, other, *more), 1)}, worst=worst)

    def recut(self, *, cache: str | os.PathLike[str] | Cache | None = None, **changes: Any) -> Selection:
        """Return the selection with other parameters of its last step, computed from what is cached.

        The result is the one that the same chain of methods would give from the start, but no vectors are read.

        Args:
            cache: The cache folder, for a selection that was loaded (default: the one that it was made with, else the
                usual one).
            **changes: Parameters of the last method. ``keep`` replaces a threshold, and the other way round:
                ``kept.recut(keep="30%")``, ``kept.recut(eps=0.2)``.

        Raises:
            UsageError: The last step does not have such parameters, or its result for others needs vectors: another
                clustering, ``clipcov``, ``semdedup`` with ``against="kept"``, or scores that are no longer in the
                cache.
            PoolError: The pool has changed or cannot be opened.
        """
        from thresher.pruning.recut import recut

        return recut(self, changes, cache)

    def _opened(self, pool: Any, metadata: str | None) -> EmbeddingStore:
        """Return the pool, checked to be the one of this selection."""
        from thresher.pool.memory import from_arrays
        from thresher.pool.store import EmbeddingStore, reopen, same_pool

        if pool is None or isinstance(pool, (str, os.PathLike)):
            return reopen(self, None if pool is None else os.fspath(pool), metadata)
        store = pool if isinstance(pool, EmbeddingStore) else from_arrays(pool)
        same_pool(self, store)
        return store

    # --- on disk ------------------------------------------------------------------------------

    def header(self) -> dict[str, Any]:
        """Return the content of ``selection.json``."""
        return {
            "format": FORMAT,
            "store": self.store,
            "pool": self.pool,
            "options": dict(self.options),
            "rows": self.total,
            "kept": len(self),
            "uses": self.uses,
            "repeats": self.repeats is not None,
            "steps": [step.header() for step in self.steps],
        }

    def save(self, folder: Name, *, overwrite: bool = False, say: Say | None = None) -> AnyPath:
        """Write a selection folder atomically; does nothing if it holds this selection already.

        The folder contains ``selection.json``, ``mask.npy`` (N,) bool, ``dropped_by.npy`` (N,) int16,
        ``repeats.npy`` if rows are repeated, and evidence in ``steps/<number>-<method>/*.npy``.

        Args:
            folder: The folder, on this machine or an address such as ``s3://bucket/subset``.
            overwrite: Replace a different selection.
            say: Called with one line if the folder holds this selection already.

        Raises:
            OutputError: The folder holds something else, and ``overwrite`` is false or it is not a selection; or it
                cannot be written.
        """
        target = place(folder)
        header = json.dumps(self.header(), indent=1, allow_nan=False) + "\n"
        if not is_unfinished(target) and target.exists() and not (target.is_dir() and not any(target.iterdir())):
            known = target / "selection.json"
            if not known.is_file():
                raise OutputError(f"{target}: is not a selection folder, so it is not overwritten")
            if not overwrite and known.read_text(encoding="utf-8", errors="replace") != header:
                raise exists_already(target)
        refuse_foreign_files(target, FILES)
        with result_folder(target, marker="selection.json", overwrite=overwrite, say=say) as scratch:
            self._write(scratch, header)
        return target

    def _write(self, folder: Path, header: str) -> None:
        def put(name: str, array: Array) -> None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                np.save(file, array, allow_pickle=False)

        put("mask.npy", self.mask())
        put("dropped_by.npy", self.dropped_by)
        if self.repeats is not None:
            put("repeats.npy", self.repeats)
        for number, step in enumerate(self.steps):
            for name, array in step.rows.items():
                put(f"{_step_folder(number, step.method)}/rows.{name}.npy", array)
            for name, array in step.groups.items():
                put(f"{_step_folder(number, step.method)}/groups.{name}.npy", array)
            for name, array in step.reference.items():
                put(f"{_step_folder(number, step.method)}/reference.{name}.npy", array)
        (folder / "selection.json").write_text(header, encoding="utf-8")

    @classmethod
    def load(cls, folder: Name) -> Selection:
        """Load a selection folder, also one made by others; arrays are memory-mapped. A remote one is copied first.

        Raises:
            PoolError: The folder is not a selection folder, or it is damaged; the message names the file.
        """
        with local_copy(folder, "selection.json") as path:
            return cls._loaded(path)

    @classmethod
    def _loaded(cls, path: Path) -> Selection:
        try:
            head = Fields(read_json(path / "selection.json"), str(path / "selection.json"))
        except (FileNotFoundError, NotADirectoryError):
            why = "selection.json is missing" if path.exists() else "nothing is there"
            raise PoolError(
                f"{path}: not a selection folder ({why}); give a folder that thresher select or run wrote"
            ) from None
        except (OSError, ValueError) as error:
            raise PoolError(f"{path / 'selection.json'}: cannot be read, it may be damaged ({error})") from None
        if (version := head.whole("format", 0, 10**9)) != FORMAT:
            raise PoolError(f"{path}: has format {version}, but this version reads format {FORMAT}")
        total = head.whole("rows", 0, 2**40)
        heads = head.objects("steps", _MOST_STEPS)
        dropped_by = _load(path, "dropped_by.npy", SIGNED, (total,), -1, len(heads) - 1)
        repeats = _load(path, "repeats.npy", INTEGERS, (total,), 0, 2**31 - 1) if head.flag("repeats") else None
        dropped, uses = _counted(path, dropped_by, repeats, len(heads))
        kept = total - sum(dropped)
        if kept != head.whole("kept"):
            raise PoolError(f"{path}: {kept:,} rows are kept, but selection.json says {head.whole('kept'):,}")
        if "uses" in head.values and uses != head.whole("uses"):
            raise PoolError(f"{path}: rows are used {uses:,} times, but selection.json says {head.whole('uses'):,}")
        steps, given = [], total
        for number, (fields, out) in enumerate(zip(heads, dropped, strict=True)):
            steps.append(_load_step(path, number, fields, total))
            said = steps[-1].rows_in, steps[-1].rows_out
            if said != (given, given - out):
                raise PoolError(
                    f"{path}: step {number + 1} ({steps[-1].method}) says that it kept {said[1]:,} of {said[0]:,} "
                    f"rows, but dropped_by.npy says {given - out:,} of {given:,}; the selection is damaged"
                )
            given -= out
        options = head.object("options")
        for name, value in options.values.items():
            if value is not None and not isinstance(value, bool):
                options.text(name)
        return cls(
            store=head.text("store"),
            pool=head.text("pool", empty=False),
            options=options.values,
            dropped_by=dropped_by,
            steps=tuple(steps),
            repeats=repeats,
        )


# --- loading --------------------------------------------------------------------------------------
# A folder may come from someone else: everything is checked before it is used.

_NUMBERS = ("bool", *INTEGERS, *FLOATS)
_SCORES = (*FLOATS, *INTEGERS)
_OF_ROWS = {
    "score": _SCORES, "duplicate_of": SIGNED, "duplicate_group": SIGNED, "group_size": INTEGERS, "cluster": INTEGERS,
    "code": INTEGERS, "reference": SIGNED, "reference_cosine": FLOATS, "loss": FLOATS,
    "marks": ("uint8",), "marked": SIGNED, "seen": SIGNED,
}  # fmt: skip
_OF_GROUPS = {"size": INTEGERS, "kept": INTEGERS, "quota": INTEGERS, "name": (TEXT,)}
_OF_REFERENCE = {
    "row": ("int64",), "key": ("uint8",), "caption": ("uint8",), "key_ends": ("int64",), "caption_ends": ("int64",),
}  # fmt: skip


def _load(
    folder: Path,
    name: str,
    dtypes: Sequence[str],
    shape: tuple[int | None, ...],
    low: int | None = None,
    high: int | None = None,
) -> Array:
    try:
        return mapped_array(folder / name, dtypes, shape, low, high)
    except FileNotFoundError:
        raise PoolError(f"{folder}: not a selection folder ({Path(name).name} is missing)") from None


def _counted(folder: Path, dropped_by: Array, repeats: Array | None, steps: int) -> tuple[list[int], int]:
    """Return how many rows each step dropped, and how often rows are used, after comparing the arrays of all rows."""
    total = len(dropped_by)
    mask = _load(folder, "mask.npy", ("bool",), (total,))
    counts, uses = np.zeros(1 + steps, np.int64), 0
    for lo in range(0, total, _BLOCK):
        by, kept = dropped_by[lo : lo + _BLOCK], np.asarray(mask[lo : lo + _BLOCK])
        if len(counts) <= _FEW:  # comparing is several times faster than bincount, which converts to int64 first
            counts += [np.count_nonzero(by == step) for step in range(-1, len(counts) - 1)]
        else:
            counts += np.bincount(by + np.int16(1), minlength=len(counts))
        if not np.array_equal(kept.view(np.uint8), by == -1):  # a byte may have another value than 0 and 1
            raise PoolError(f"{folder}: mask.npy does not match dropped_by.npy; the selection is damaged")
        if repeats is None:
            continue
        times = repeats[lo : lo + _BLOCK]
        if not np.array_equal(times > 0, kept):
            raise PoolError(f"{folder}: repeats.npy does not match the kept rows; the selection is damaged")
        uses += int(times.sum(dtype=np.int64))
    if uses > _MOST_REPEATS * total:
        raise PoolError(
            f"{folder}: repeats.npy uses {total:,} rows {uses:,} times, more than {_MOST_REPEATS:,} times each; select "
            "again with fewer repeats"
        )
    return counts[1:].tolist(), int(counts[0]) if repeats is None else uses


def _load_step(folder: Path, number: int, fields: Fields, total: int) -> Step:
    head = _head(fields)
    n, base = head["rows_in"], _step_folder(number, head["method"])
    if n > total:
        raise fields.wrong("rows_in", f"at most {total:,}, the rows of the pool")
    most = max(total, _MOST_CLUSTERS)
    groups = {
        name: _load(folder, f"{base}/groups.{name}.npy", _OF_GROUPS.get(name, _NUMBERS), (None,))
        for name in _evidence(fields, "groups")
    }
    k = max((len(array) for array in groups.values()), default=most)
    if k > most or any(len(array) != k for array in groups.values()):
        raise PoolError(
            f"{folder / base}: the arrays of its clusters have {', '.join(f'{len(a):,}' for a in groups.values())} "
            f"entries, but must have one for each cluster, at most {most:,}; the selection is damaged"
        )
    highest = {
        "cluster": (0, k - 1), "duplicate_of": (-1, total - 1), "duplicate_group": (-1, total - 1),
        "reference": (-1, 2**62), "code": (0, (len(head["reasons"]) or 2**32) - 1),
    }  # fmt: skip
    rows = {
        name: _load(
            folder, f"{base}/rows.{name}.npy", _OF_ROWS.get(name, (*_NUMBERS, TEXT)), (n,), *highest.get(name, ())
        )
        for name in _evidence(fields, "rows")
    }
    _check_sizes(folder / base, groups, n)
    reference = {
        name: _load(folder, f"{base}/reference.{name}.npy", _OF_REFERENCE[name], (None,))
        for name in _evidence(fields, "reference")
    }
    _check_reference(folder, rows, reference)
    try:
        return Step(**head, rows=rows, groups=groups, reference=reference)
    except UsageError as error:
        raise PoolError(f"{folder}: {error}; the selection is damaged") from None


def _head(fields: Fields) -> dict[str, Any]:
    """Return what a step says about itself, without its arrays."""
    fields.refuse_others([item for item in Step.__dataclass_fields__])
    method = fields.text("method")
    if not _METHOD.fullmatch(method):
        raise fields.wrong("method", "the name of a method")
    parameters = fields.object("parameters")
    if method in COMBINED:
        for chain in parameters.lists("of", 2):
            for step in chain:
                _head(step)
    # Older selections do not record the package.
    package = fields.object("package") if "package" in fields.values else None
    rows_in, reasons = fields.whole("rows_in", 0, 2**40), fields.texts("reasons")
    try:
        for reason in reasons:
            parts_of(reason)
    except UsageError as error:
        raise PoolError(f"{fields.where}: {error}") from None
    return {
        "method": method,
        "parameters": parameters.values,
        "seed": fields.whole("seed", -(2**200), 2**200),
        "rows_in": rows_in,
        "rows_out": fields.whole("rows_out", 0, rows_in),
        "reasons": reasons,
        "score": fields.text("score"),
        "cut": fields.number("cut"),
        "version": fields.text("version"),
        "notes": fields.texts("notes"),
        "package": {
            "name": package.text("name") if package else "thresher",
            "version": package.text("version") if package else fields.text("version"),
        },
    }


def _evidence(fields: Fields, kind: str) -> tuple[str, ...]:
    """Return the names of a step's arrays, which are parts of file names."""
    names = fields.texts(kind) if kind in fields.values or kind != "reference" else ()
    if not all(_EVIDENCE.fullmatch(name) for name in names) or (kind == "reference" and {*names} - {*_OF_REFERENCE}):
        raise fields.wrong(kind, "a list of names of arrays")
    return names


def _check_sizes(folder: Path, groups: Mapping[str, Array], n: int) -> None:
    """Check that clusters have at most as many rows as there are, and keep at most those."""
    size, kept = (np.asarray(groups.get(name, ())) for name in ("size", "kept"))
    for name, array in (("size", size), ("kept", kept)):
        if array.min(initial=0) < 0 or array.max(initial=0) > n:
            raise PoolError(f"{folder}/groups.{name}.npy: has values that are not between 0 and {n:,}, the rows given")
    if len(size) and len(kept) and (kept > size).any():
        raise PoolError(f"{folder}: a cluster keeps more rows than it has; the selection is damaged")


def packed(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return texts as concatenated UTF-8 bytes, (B,) uint8, and the end offset of each text, (H,) int64."""
    parts = [text.encode("utf-8", "replace") for text in texts]
    return np.frombuffer(b"".join(parts), np.uint8), np.cumsum([len(part) for part in parts], dtype=np.int64)


def _unpacked(bytes_B: Array, ends_H: Array, at: int) -> str:
    start = int(ends_H[at - 1]) if at else 0
    return bytes(bytes_B[start : int(ends_H[at])]).decode("utf-8", "replace")


def _check_reference(path: Path, rows: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
    """Check that all repeated reference rows are described, and that their texts have end offsets."""
    known = np.asarray(reference.get("row", np.empty(0, np.int64)))
    wanted = np.unique(np.asarray(rows.get("reference", np.empty(0, np.int64))))
    good = bool((np.diff(known) > 0).all() and np.isin(wanted[wanted >= 0], known).all())
    for name in ("key", "caption"):
        if {name, f"{name}_ends"} & set(reference):
            ends = np.asarray(reference.get(f"{name}_ends", np.empty(0, np.int64)))
            size = len(reference.get(name, ()))
            good &= len(ends) == len(known) and bool((np.diff(ends, prepend=0, append=size) >= 0).all())
    if not good:
        raise PoolError(f"{path}: does not describe the reference rows that were repeated; the selection is damaged")


_METHOD = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")
_EVIDENCE = re.compile(r"[a-z_]{1,99}")


def _step_folder(number: int, method: str) -> str:
    if not _METHOD.fullmatch(method):
        raise PoolError(f"{method!r} is not a valid method name")
    return f"steps/{number:02d}-{method}"
