"""Filter by an SQL condition on the metadata columns, evaluated by DuckDB.

``words(text) > 2 AND characters(text) > 5 AND least(original_width, original_height) >= 200 AND
aspect(original_width, original_height) <= 3`` is DataComp's basic filter without its test for English. A
condition that is NULL because a value is missing drops the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError, suggest
from thresher.pruning.condition import Condition, Query
from thresher.pruning.database import cursor
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.format import counted
from thresher.selection import Selection


@method("filter")
@dataclass(frozen=True, kw_only=True)
class Filter:
    """Keep rows whose metadata satisfies an SQL condition."""

    name: ClassVar[str]

    where: str = field(
        metadata={
            "metavar": "SQL",
            "help": "SQL condition on metadata columns; also words(t), characters(t), aspect(w, h)",
        }
    )

    def __post_init__(self) -> None:
        """Validate the condition: it must parse, depend on the row alone, and have a bounded cost."""
        _ = self._condition

    @property
    def only_columns(self) -> tuple[str, ...]:
        """The columns that the condition names."""
        return self._condition.columns

    @cached_property
    def _condition(self) -> Condition:
        return Condition.parse(self.where)

    def select(self, run: Run) -> Selection:
        """Evaluate clause by clause, so that each dropped row records the clause that it fails."""
        import duckdb

        condition = self._condition
        columns = self._columns(run)
        key = run.key(_failed, clauses=[clause.text for clause in condition.clauses], duckdb=duckdb.__version__)
        n, counts = len(run.store), 64 * len(condition.sources)
        made = run.cache.columns(
            "filter",
            key,
            {"failed": ArraySpec("uint8", most=len(condition.clauses))},
            n + counts,  # the counts of NaN follow the rows, so that both are saved at once
            lambda start: _failed(run, condition, columns, start),
            say=run.progress.say,
        )["failed"]
        codes, nans = made[:n], np.packbits(made[n:]).view(np.int64)
        notes = [
            f"{counted(count, 'row has', 'rows have')} no number (NaN) in {name}, which counts as "
            "missing: no comparison with it is true"
            for name, count in zip(
                (source.replace('"', "") for source in condition.sources), nans.tolist(), strict=True
            )
            if count
        ]
        if run.store.options.metadata and (alone := int(np.count_nonzero(run.store.column("joined") == 0))):
            notes.append(
                f"{counted(alone, 'row has', 'rows have')} no match in {run.store.options.metadata}: its "
                "columns are empty there"
            )
        return run.selection(
            self, np.asarray(codes) == 0, notes=notes, reasons=condition.reasons(), rows={"code": codes}
        )

    def _columns(self, run: Run) -> list[str]:
        """Return the columns of the condition as the pool writes them.

        Raises:
            UsageError: The pool has no such column, or several that differ only in case.
        """
        store, where = run.store, self._condition.shown
        if not store.columns:
            raise UsageError(f"{store.layout.location} has no metadata to filter by")
        columns = []
        for name in self._condition.columns:
            alike = [other for other in store.columns if other.lower() == name.lower()]
            if len(alike) > 1:
                raise UsageError(f"{where}: the columns {', '.join(alike)} differ only in case")
            if not alike:
                raise UsageError(
                    f"{where}: no metadata column {name!r}; {store.layout.location} has {', '.join(store.columns)}."
                    f"{suggest(name, store.columns)}"
                )
            columns += alike
        return columns or list(store.columns[:1])


def _failed(run: Run, condition: Condition, columns: list[str], start: int) -> Iterator[tuple[npt.NDArray[np.uint8]]]:
    """Yield, batch by batch, the number (from 1) of the first clause that each row fails, 0 if none.

    A last batch has the number of rows that are NaN, by source, as the bits of int64: no item is above the last number.
    """
    queries: dict[str, Query] = {}
    nans = dict.fromkeys(condition.sources, 0)
    done = 0
    with cursor() as db, run.progress.task("filter", len(run.store)) as advance:

        def query_for(schema: Any) -> Query:
            if (types := str(schema)) not in queries:
                queries[types] = condition.query(db, schema)
            return queries[types]

        query_for(run.store.layout.tables[0].schema(columns))  # finds errors in the condition before data is read
        for _, part in run.store.scan(columns):
            query = query_for(part.schema)
            done += len(part)
            if done > start or query.sources:
                codes, found = query.run(db, part)
                for source, count in found.items():
                    nans[source] += count
                if done > start:
                    yield (codes,)
            advance(len(part))
    if nans:
        yield (np.unpackbits(np.array(list(nans.values()), np.int64).view(np.uint8)),)
