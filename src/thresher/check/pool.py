"""A check of a pool: what it holds, what looks wrong, and what a run on it will cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from thresher.check.calibration import product_speed
from thresher.check.cost import Cluster, Constants, estimate, rows_of
from thresher.data import raw_reader
from thresher.errors import ThresherError
from thresher.io.arrow import ENDINGS, lacks_end
from thresher.io.listing import Files, named
from thresher.io.paths import typed
from thresher.io.readers import recognising
from thresher.io.remote import in_parallel
from thresher.ops.vectors import norms_of
from thresher.pool.layouts import POOL_READERS
from thresher.pool.store import Block, EmbeddingStore
from thresher.pruning.audit import EMPTY, REPEATED, UNSAFE, key_codes
from thresher.pruning.clusters import automatic
from thresher.pruning.registry import build
from thresher.pruning.run import Run
from thresher.runtime.format import counted
from thresher.runtime.kernels import has_avx512
from thresher.runtime.process import matrix_kernels

_QUICK = 100_000
_SECONDS = 0.2  # of timing a matrix product


def inspect(run: Run, *, quick: bool = False) -> dict[str, Any]:
    """Check a pool.

    Args:
        run: A run on the whole store.
        quick: Check about 100,000 vectors instead of all, in evenly spaced blocks, or the first ones of compressed
            files; keys are not compared.

    Returns:
        rows, layout, fields (dim, dtype, norms, counts of NaN, infinite and zero rows with the first few ids),
        columns, keys (counts of "repeated", "unsafe" and "empty" ones), "skipped" (files, and why), "empty" (files
        without rows), "cut_off" (files that may be cut off between two batches of rows), "warnings" as sentences, and
        "cost" (seconds of typical runs, estimated from a matrix product timed on this machine, the peak memory of each
        in bytes, and the largest of these).
    """
    store = run.store
    fields = {part: _field(run, part, quick) for part in store.layout.vectors}
    report: dict[str, Any] = {
        "location": store.layout.location,
        "layout": store.layout.kind,
        "rows": store.total,
        "files": len(store.files()),
        "fields": fields,
        "columns": list(store.columns),
        "key": store.layout.key,
        "caption": store.layout.caption,
        "scores": list(store.layout.scores),
        "skipped": [{"path": aside.path, "why": aside.why} for aside in store.layout.skipped],
        "empty": store.layout.without_rows(),
        "cut_off": _cut_off(store),
        "keys": None,
    }
    if store.layout.key and not quick:
        codes = key_codes(run)
        report["keys"] = {
            "repeated": int(np.count_nonzero(codes == REPEATED)),
            "unsafe": int(np.count_nonzero(codes == UNSAFE)),
            "empty": int(np.count_nonzero(codes == EMPTY)),
            "first": run.store.ids[np.flatnonzero(codes)[:5]].tolist(),
        }
    report["warnings"] = _warnings(report, store)
    report["cost"] = _cost(store, run.engine.workers)
    if slow := _slow_kernel():
        report["warnings"].append(slow)
    return report


def look_instead(location: str) -> str:
    """Return what to type to look at a location as a pool, to follow an error about raw data; "" if it is none."""
    try:
        pool = recognising(POOL_READERS, Files.at(location)) is not None
    except ThresherError:
        pool = False
    return f"; if it is a pool, type thresher inspect {typed(location)}" if pool else ""


def _field(run: Run, part: str, quick: bool) -> dict[str, Any]:
    store = run.store
    pieces = store.layout.vectors[part]
    if quick and store.seekable(part) and store.total > _QUICK:
        starts = np.linspace(0, store.total - 4096, _QUICK // 4096).astype(int)
        blocks = [Block(int(lo), int(lo) + 4096) for lo in starts]
        seen = [norms(part, store, block)[0] for block in blocks]
        ids = np.concatenate([np.arange(b.lo, b.hi) for b in blocks])
        values = np.concatenate(seen)
    elif quick and store.total > _QUICK:  # compressed: the first rows, without unfolding the others
        first = islice(store.blocks(part), -(-_QUICK // store.block))
        values = np.concatenate([norms(part, store, block)[0] for block in first])
        ids = np.arange(len(values))
    else:
        values = np.asarray(run.column(f"norms {part}", part, partial(norms, part), {"norm": "float64"})["norm"])
        ids = store.ids
    good = np.isfinite(values) & (values > 0)
    spread = np.percentile(values[good], [0, 5, 50, 95, 100]).tolist() if good.any() else []
    return {
        "dim": pieces[0].dim,
        "dtype": pieces[0].dtype,
        "bytes": store.stored_bytes(part),
        "looked_at": len(values),
        "norms": dict(zip(("min", "p5", "median", "p95", "max"), spread, strict=False)),
        "nan_rows": int(np.count_nonzero(np.isnan(values))),
        "infinite_rows": int(np.count_nonzero(np.isinf(values))),
        "zero_rows": int(np.count_nonzero(values == 0)),
        "first_bad": ids[~good][:5].tolist(),
    }


def _cut_off(store: EmbeddingStore) -> list[str]:
    """Return the Arrow streams that may be cut off between two batches."""
    files = [(protocol, path) for protocol, path in store.files() if path.lower().endswith(ENDINGS)]
    if not files:
        return []
    lacking = in_parallel(files[0][0], lambda file: lacks_end(*file), files)
    return [path for (_, path), lacks in zip(files, lacking, strict=True) if lacks]


def norms(part: str, store: EmbeddingStore, block: Block) -> tuple[Any]:
    """Return the norms of a block's rows (B,) float64: 0 for zero rows, NaN or infinity where a value is."""
    return (norms_of(store.raw(part, block)),)


def _warnings(report: dict[str, Any], store: EmbeddingStore) -> list[str]:
    texts = []
    for name, field in report["fields"].items():
        for kind in ("nan", "infinite", "zero"):
            if count := field[f"{kind}_rows"]:
                rows = counted(count, f"{name} row is", f"{name} rows are")
                texts.append(f"{rows} {kind}; --skip-bad skips {'it' if count == 1 else 'them'}")
    if len({field["dim"] for field in report["fields"].values()}) > 1:
        texts.append("image and text embeddings differ in width: no CLIP score can be computed from them")
    if not report["fields"]:
        look = f"; to look at raw images and captions type thresher doctor {typed(report['location'])}"
        texts.append(
            "there are no embeddings here: only filter, random and stored scores will work"
            + (look if raw_reader(report["location"]) is not None else "")
        )
    if report["keys"]:
        for kind, what in (
            ("repeated", ("key repeats an earlier one", "keys repeat an earlier one")),
            ("unsafe", ("key is an unsafe path: it contains ..", "keys are unsafe paths: they contain ..")),
            ("empty", ("key is empty", "keys are empty")),
        ):
            if count := report["keys"][kind]:
                texts.append(f"{counted(count, *what)}; --skip-bad skips {'that row' if count == 1 else 'those rows'}")
    for name, field in report["fields"].items():
        if field["first_bad"]:
            texts.append(f"the first bad {name} row is {store.location_of(name, field['first_bad'][0])}")
    if report["skipped"]:
        texts.append(f"{counted(len(report['skipped']), 'file was', 'files were')} skipped")
    if empty := report["empty"]:
        texts.append(f"{counted(len(empty), 'file has', 'files have')} no rows: {named(empty)}")
    if cut := report["cut_off"]:
        files = counted(len(cut), "file does", "files do")
        texts.append(f"{files} not have the end mark of the format and may be cut off: {named(cut)}")
    if not report["key"]:
        choose = "; name one with --key" if report["columns"] else ""
        texts.append(f"there is no key column: rows are identified by their number{choose}")
    return texts


def _slow_kernel() -> str:
    """Return a warning if the matrix kernels in use are slower than the processor allows, else ''."""
    if not has_avx512():
        return ""
    slow = set(matrix_kernels()) & {"Haswell", "Zen", "Sandybridge", "Nehalem", "Prescott"}
    if not slow:
        return ""
    return (
        f"matrix products use the {slow.pop()} kernel though the processor has AVX-512, which is twice as fast; "
        "OPENBLAS_CORETYPE chooses it, and results may differ in the last digit between kernels"
    )


def _cost(store: EmbeddingStore, workers: int) -> dict[str, Any]:
    """Estimate the cost of runs by :mod:`thresher.check.cost`, with the speed of a matrix product timed now."""
    name = next(iter(store.layout.vectors), None)
    if name is None:
        return {}
    n, dim = store.total, store.dim(name)
    speed = product_speed(dim, workers, _SECONDS)
    constants, rows = Constants(products=speed), rows_of(store)
    scored = "joint" in store.fields and store.dim("image") == store.dim("text")
    steps: list[Any] = [_Step("clip-score")] if scored else []
    steps += [_Step("cluster"), _Step("density"), build("semdedup", {"eps": 0.1})]
    steps += [build("clipcov", {"keep": "50%"})] if scored else []
    costs = [estimate([step], rows, Cluster(1, workers), constants).steps[-1] for step in steps]
    memory = {cost.name: int(cost.memory(workers)) for cost in costs}
    return {
        "multiply_adds_per_second": speed * workers,
        "clusters": automatic(n)[0],
        "seconds": {cost.name: round(cost.seconds, 2) for cost in costs},
        "memory": memory,
        "memory_bytes": max(memory.values()),
        "cache_bytes": int(8 * n + (0 if store.mapped(name) else store.stored_bytes(name))),
    }


@dataclass(frozen=True)
class _Step:
    """A method with the defaults of its parameters."""

    name: str
    clusters: int | None = None
