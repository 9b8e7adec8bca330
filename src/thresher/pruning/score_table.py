"""The scores of a method for every row, as a table that other tools can read and join by key."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher import __version__
from thresher.errors import PoolError, UsageError
from thresher.export.write import check_target
from thresher.io.columns import NO_KEY
from thresher.io.parquet import parquet_metadata
from thresher.io.places import local_copy, located, place
from thresher.pool.store import EmbeddingStore, absolute
from thresher.pruning.recipe import run_steps
from thresher.pruning.run import Run
from thresher.pruning.scores import CUTS, MARK, Scored, scoring_methods
from thresher.runtime import random
from thresher.runtime.cache import Cache
from thresher.runtime.engine import Engine, make_engine
from thresher.runtime.files import DAMAGED, writing
from thresher.runtime.format import counted
from thresher.runtime.jobs import ArrayJob, Jobs
from thresher.runtime.parameters import recorded
from thresher.runtime.places import AnyPath
from thresher.runtime.process import one_blas_thread
from thresher.runtime.progress import Progress, Silent
from thresher.runtime.results import exists_already, refuse_other, result_file
from thresher.selection import Selection


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """The scores of a method, and how they were computed.

    Attributes:
        ids_n: (n,) ids of the rows that were scored, ascending.
        values_n: (n,) their scores, float32 or float64.
        info: Method, parameters, seed, version, pool, fingerprint of the store, earlier steps, notes.
        store: The pool, to show rows in a notebook.
    """

    ids_n: npt.NDArray[np.int64]
    values_n: npt.NDArray[Any]
    info: dict[str, Any]
    store: EmbeddingStore | None = None

    def __repr__(self) -> str:
        """Return the method and the number of rows in one line."""
        return f"ScoreTable({self.info.get('method', 'score')}: {counted(len(self.values_n), 'row')})"

    def _repr_html_(self) -> str:
        from thresher.report.notebook import in_notebook, scores_html

        return in_notebook(scores_html, self)


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
    """Compute the scores of a method for the rows of a pool.

    Args:
        store: The pool.
        method: A scoring method, as made by ``scorer("clip-score")``; it drops no rows here.
        seed: Seed of all randomness.
        within: Score only the rows that an earlier selection kept.
        engine: Where work runs; threads on all cores by default.
        cache: Where computed arrays are kept; the default cache folder by default.
        progress: Where progress and notes are reported; nowhere by default.

    Raises:
        UsageError: The method is not a scoring method, or cannot run.
        PoolError: The pool is damaged, has bad rows, or changed during the run.
    """
    if not isinstance(method, Scored):
        raise UsageError(f"{method!r} does not score rows; the scoring methods: {', '.join(scoring_methods())}")
    engine, cache, progress = engine or make_engine(), cache or Cache.at(), progress or Silent()
    good = run_steps(store, (), seed=seed, within=within, engine=engine, cache=cache, progress=progress)
    run = Run(store.where(good.mask()), good, engine, cache, seed, progress)
    try:
        with one_blas_thread:  # as in engines: results must not depend on the number of cores
            result = method.score(run)
    except UsageError as error:
        raise type(error)(f"{method.name}: {error}") from None
    store.check_unchanged(f"{method.name} ran")
    values = np.asarray(result.values_N)
    return ScoreTable(
        run.store.ids,
        values if values.dtype == np.float32 else values.astype(np.float64),
        _info(method, seed, store, good, good.pool, len(values), result.notes),
        store,
    )


def write_scores(
    store: EmbeddingStore,
    method: Scored,
    target: str | os.PathLike[str],
    *,
    name: str | None = None,
    overwrite: bool = False,
    shard: ArrayJob | None = None,
    **how: Any,
) -> ScoreTable:
    """Compute the scores of a method as :func:`score` does, and write them to a parquet file atomically.

    The table has the pool's key column (or ``row``, the row number, if the pool has no keys) and one column of
    scores; rows that were not scored are left out. The metadata of the schema holds, under "thresher", how the table
    was made, as JSON.

    Args:
        store: The pool.
        method: A scoring method.
        target: File to write, ending in ``.parquet`` or ``.pq``.
        name: Name of the column of scores; by default the method's name with underscores.
        overwrite: Replace a different file.
        shard: Score only the rows of one of several jobs, see :mod:`thresher.runtime.jobs`, and keep the scores in a
            folder next to ``target``. A call without it, after all jobs have finished, writes the file.
        **how: seed, within, engine, cache and progress, as in :func:`score`.

    Raises:
        UsageError: ``target`` or ``name`` is not allowed, jobs cannot share the rows, or as in :func:`score`.
        OutputError: A different file exists, the file belongs to the pool or cannot be written, or jobs have not
            finished.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = place(target)
    key = store.layout.key
    column = name or method.name.replace("-", "_")
    if column == (key or NO_KEY):
        raise UsageError(f"the column of scores cannot be named {column!r}: that is the key column; give another name")
    if path.suffix.lower() not in (".parquet", ".pq"):
        raise UsageError(f"{path}: scores are written as parquet; use a file name that ends in .parquet")
    check_target(path, store)
    if path.exists() and not overwrite:
        requested = _request(method, how.get("seed", 0))
        refuse_other(path, info_in(path), {**requested, "store": store.fingerprint()})
    jobs = _jobs(path, store, method, how)
    if shard is not None:
        if overwrite:
            raise UsageError(f"--shard {shard}: --overwrite would remove what other jobs wrote; leave it out")
        if path.exists():
            return _finished_already(path, store, method, how)
        return _score_share(jobs, shard, store, method, how)
    table = _merged(jobs, store, method, how) if jobs.of and not overwrite else score(store, method, **how)
    kind = pa.int64()
    if key:
        schemas = [piece.schema([key]) for piece in store.layout.tables]
        kind = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    numbers = pa.float32() if table.values_n.dtype == np.float32 else pa.float64()
    schema = pa.schema([(key or NO_KEY, kind), (column, numbers)], {MARK: json.dumps(table.info)})
    done = 0
    say = None if how.get("progress") is None else how["progress"].say
    # Arrow itself opens only names in UTF-8.
    with (
        result_file(path, overwrite=overwrite, say=say) as scratch,
        open(scratch, "wb") as raw,
        pq.ParquetWriter(raw, schema) as file,
    ):
        for keys in _keys(store, table.ids_n):
            values = table.values_n[done : done + len(keys)]
            file.write_table(pa.table([keys.cast(kind), pa.array(values)], schema=schema))
            done += len(keys)
        store.check_unchanged("its keys were read")
    jobs.remove()
    return table


# --- jobs -----------------------------------------------------------------------------------------


def _jobs(path: AnyPath, store: EmbeddingStore, method: Scored, how: Mapping[str, Any]) -> Jobs:
    """Return the jobs that share the rows of a table of scores."""
    within = how.get("within")
    request = {
        **_request(method, how.get("seed", 0)),
        "pool": store.version(),
        "options": asdict(store.options),
        "within": None if within is None else random.digest(within.mask()),
    }
    return Jobs(path.with_name(f".{path.name}.jobs"), str(path), request)


def _score_share(
    jobs: Jobs, job: ArrayJob, store: EmbeddingStore, method: Scored, how: Mapping[str, Any]
) -> ScoreTable:
    """Compute and keep the scores of one job's rows."""
    within: Selection | None = how.get("within")
    if not method.by_rows:
        raise UsageError(
            f"--shard {job}: {method.name} compares rows with each other, so jobs cannot share them; leave it out, or "
            "use --engine ray"
        )
    if store.options.skip_bad and within is None:
        raise UsageError(
            f"--shard {job}: with --skip-bad, select the good rows first (thresher select random --keep 100%), and "
            "pass that selection as --within"
        )
    start = within or Selection.everything(store.fingerprint(), store.layout.location, {}, store.total)
    ids = start.rows()
    lo, hi = (block * store.block for block in job.span(-(-len(ids) // store.block)))  # so that blocks stay the same
    own = ids[lo:hi]
    dropped_by = np.zeros_like(start.dropped_by)
    dropped_by[own] = -1
    jobs.begin(job)
    with jobs.running(job, how["progress"].say if how.get("progress") else None):
        if len(own):
            table = score(store, method, **{**how, "within": replace(start, dropped_by=dropped_by, repeats=None)})
        else:
            table = ScoreTable(own, np.zeros(0, np.float32), {"notes": [], "rows": 0, "of": store.total}, store)
        with writing(_values_path(jobs, job.number)) as scratch, open(scratch, "wb") as file:
            np.save(file, table.values_n, allow_pickle=False)
        said = jobs.finish(job, rows=len(own), notes=table.info["notes"])
    return replace(table, info={**table.info, "notes": [*table.info["notes"], said]})


def _finished_already(path: AnyPath, store: EmbeddingStore, method: Scored, how: Mapping[str, Any]) -> ScoreTable:
    """Return no rows, for a job that a scheduler starts again after the merge.

    Raises:
        OutputError: The file has the scores of other rows.
    """
    within: Selection | None = how.get("within")
    rows, steps = store.total if within is None else len(within), () if within is None else within.steps
    info = info_in(path)
    if (info.get("rows"), info.get("steps")) != (rows, json.loads(json.dumps([step.header() for step in steps]))):
        raise exists_already(path)
    notes = ["the scores are finished already"]
    return ScoreTable(np.zeros(0, np.int64), np.zeros(0, np.float32), {**info, "rows": 0, "notes": notes}, store)


def _merged(jobs: Jobs, store: EmbeddingStore, method: Scored, how: Mapping[str, Any]) -> ScoreTable:
    """Return the scores of all jobs as one table, as :func:`score` returns it.

    Raises:
        OutputError: Jobs have not finished, or the scores of one are missing or damaged; the message names them.
    """
    manifests = jobs.finished()
    within: Selection | None = how.get("within")
    start = within or Selection.everything(store.fingerprint(), absolute(store.layout.location), {}, store.total)
    parts = []
    for number, manifest in enumerate(manifests, 1):
        path = _values_path(jobs, number)
        try:
            with local_copy(str(path)) as copy:
                values = np.load(copy, allow_pickle=False)
        except (*DAMAGED, OSError, PoolError):
            values = None
        if values is None or values.shape != (manifest.get("rows"),) or values.dtype.kind != "f":
            raise jobs.missing(f"{path} is missing or damaged", [number], len(manifests))
        parts.append(values)
    notes = next((list(manifest["notes"]) for manifest in manifests if manifest["rows"]), [])
    values = np.concatenate([part for part in parts if len(part)] or parts)
    info = _info(method, how.get("seed", 0), store, start, absolute(store.layout.location), len(values), notes)
    return ScoreTable(start.rows(), values, info, store)


def _values_path(jobs: Jobs, number: int) -> AnyPath:
    return jobs.folder / f"{number:05d}.npy"


def _info(
    method: Scored, seed: int, store: EmbeddingStore, within: Selection, pool: str, rows: int, notes: Iterable[str]
) -> dict[str, Any]:
    """Return how a table was made, see :class:`ScoreTable`."""
    return {
        **_request(method, seed),
        "pool": pool,
        "store": within.store,
        "rows": rows,
        "of": store.total,
        "steps": [step.header() for step in within.steps],
        "notes": list(notes),
    }


def _request(method: Scored, seed: int) -> dict[str, Any]:
    parameters = {name: value for name, value in recorded(method).items() if name not in CUTS}
    return {"method": method.name, "parameters": parameters, "seed": seed, "version": __version__}


def info_in(path: AnyPath) -> dict[str, Any]:
    """Return how the scores or losses in a parquet file were made, {} if it does not say."""
    try:
        info = json.loads(parquet_metadata(*located(str(path))).get(MARK, b"{}"))
    except (PoolError, ValueError, RecursionError):
        return {}
    return info if isinstance(info, dict) else {}


def _keys(store: EmbeddingStore, ids_n: npt.NDArray[np.int64]) -> Iterator[Any]:
    import pyarrow as pa

    if not store.layout.key:
        yield pa.array(ids_n)
        return
    mask = np.zeros(store.total, np.bool_)
    mask[ids_n] = True
    for _, part in store.where(mask).scan([store.layout.key]):
        yield part.column(0)
