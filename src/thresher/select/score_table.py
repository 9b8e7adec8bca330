"""A method's number for every row, once, as a table that any tool reads and joins by key."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import threadpoolctl

from thresher import __version__
from thresher.errors import PoolError, UsageError
from thresher.export.write import check_target
from thresher.pool.layout import NO_KEY
from thresher.pool.store import EmbeddingStore
from thresher.runtime.cache import Cache
from thresher.runtime.engine import Engine, make_engine
from thresher.runtime.files import writing
from thresher.runtime.parameters import coerced, recorded
from thresher.runtime.progress import Progress, Silent
from thresher.select.recipe import run_steps
from thresher.select.run import Run
from thresher.select.scores import MARK, Scored, scoring_methods
from thresher.selection import Selection

CUTS = tuple(item.name for item in fields(Scored))  # parameters that a number does not depend on


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """A method's numbers, and how they were made.

    Attributes:
        ids_n: Rows of the pool, ascending: those that were judged.
        values_n: The number of each, float32 or float64.
        info: Method, parameters, seed, version, pool, fingerprint of the store, earlier steps, notes.
    """

    ids_n: npt.NDArray[np.int64]
    values_n: npt.NDArray[Any]
    info: dict[str, Any]


def score(
    store: EmbeddingStore,
    method: Scored,
    *,
    seed: int = 0,
    within: Selection | None = None,
    engine: Engine | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> ScoreTable:
    """Compute a method's number for the rows of a pool.

    Args:
        store: The pool.
        method: A scoring method, as ``scorer("clip-score")`` makes one; it cuts nothing here.
        seed: Of all randomness.
        within: Judge only the rows that an earlier selection kept.
        engine: Where work runs; threads on all cores by default.
        cache: Arrays already computed; the default cache folder by default.
        progress: Where to tell.

    Raises:
        UsageError: The method gives rows no number, or cannot be carried out.
        PoolError: The pool cannot be trusted.
    """
    if not isinstance(method, Scored):
        raise UsageError(f"{method!r} gives rows no number; the methods that do: {', '.join(scoring_methods())}")
    method = coerced(method, method.name)
    engine, cache, progress = engine or make_engine(), cache or Cache.at(), progress or Silent()
    good = run_steps(store, (), seed=seed, within=within, engine=engine, cache=cache, progress=progress)
    run = Run(store.where(good.mask()), good, engine, cache, seed, progress)
    try:
        with threadpoolctl.threadpool_limits(1):  # as in engines: bits must not depend on the cores
            found = method.score(run)
    except UsageError as error:
        raise type(error)(f"{method.name}: {error}") from None
    if store.changed():
        raise PoolError(
            f"{good.pool}: a file of the pool changed while {method.name} ran; run again when it is at rest"
        )
    values = np.asarray(found.values_N)
    return ScoreTable(
        run.store.ids,
        values if values.dtype == np.float32 else values.astype(np.float64),
        {
            "method": method.name,
            "parameters": {name: value for name, value in recorded(method).items() if name not in CUTS},
            "seed": seed,
            "version": __version__,
            "pool": good.pool,
            "store": good.store,
            "rows": len(values),
            "of": store.total,
            "steps": [step.header() for step in good.steps],
            "notes": list(found.notes),
        },
    )


def write_scores(
    store: EmbeddingStore,
    method: Scored,
    target: str | os.PathLike[str],
    *,
    name: str | None = None,
    overwrite: bool = False,
    **how: Any,
) -> ScoreTable:
    """Compute a method's numbers as :func:`score` does, and write them as parquet, whole or not at all.

    The table has the pool's key column (``row``, the row number, where there is none) and one column of
    numbers; rows that were not judged are left out. How it was made is JSON under "thresher" in the schema's
    metadata.

    Args:
        store: The pool.
        method: A scoring method.
        target: File to write; an ending ``.parquet`` lets it be named as a column later.
        name: Column of the numbers; by default the method's name with underscores.
        overwrite: Replace an existing file.
        **how: seed, within, engine, cache and progress, as in :func:`score`.

    Raises:
        OutputError: The file exists, belongs to the pool or cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(target)
    key = store.layout.key
    column = name or method.name.replace("-", "_")
    if column == (key or NO_KEY):
        raise UsageError(f"the numbers cannot be called {column!r}: that is the column of keys; give another name")
    if path.suffix not in (".parquet", ".pq"):
        raise UsageError(f"{path}: scores are written as parquet; give a name that ends in .parquet")
    check_target(path, store, overwrite=overwrite)
    found = score(store, method, **how)
    kind = pa.int64()
    if key:
        schemas = [table.schema([key]) for table in store.layout.tables]
        kind = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    numbers = pa.float32() if found.values_n.dtype == np.float32 else pa.float64()
    schema = pa.schema([(key or NO_KEY, kind), (column, numbers)], {MARK: json.dumps(found.info)})
    done = 0
    with writing(path) as scratch, pq.ParquetWriter(scratch, schema) as file:
        for keys in _keys(store, found.ids_n):
            values = found.values_n[done : done + len(keys)]
            file.write_table(pa.table([keys.cast(kind), pa.array(values)], schema=schema))
            done += len(keys)
    return found


def _keys(store: EmbeddingStore, ids_n: npt.NDArray[np.int64]) -> Iterator[Any]:
    import pyarrow as pa

    if not store.layout.key:
        yield pa.array(ids_n)
        return
    mask = np.zeros(store.total, np.bool_)
    mask[ids_n] = True
    for _, part in store.where(mask).scan([store.layout.key]):
        yield part.column(0)
