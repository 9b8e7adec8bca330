"""A check of a pool: what it holds, what looks wrong, and what a run on it will cost."""

from __future__ import annotations

import time
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import threadpoolctl

from thresher.ops.kmeans import nearest_centroid
from thresher.ops.vectors import norms_of
from thresher.pool.store import Block, EmbeddingStore
from thresher.runtime.kernels import has_avx512
from thresher.runtime.process import one_blas_thread
from thresher.select.audit import EMPTY, REPEATED, UNSAFE, key_codes
from thresher.select.clusters import automatic
from thresher.select.run import Run

_QUICK = 100_000


def inspect(run: Run, *, quick: bool = False) -> dict[str, Any]:
    """Check a pool.

    Args:
        run: A run on the whole store.
        quick: Check about 100,000 vectors instead of all, in evenly spaced blocks, or the first ones of compressed
            files; keys are not compared.

    Returns:
        rows, layout, fields (dim, dtype, norms, counts of NaN, infinite and zero rows with the first few ids),
        columns, keys (counts of repeated, unsafe and empty ones as "repeated", "climbing", "empty"), "set_aside" (the
        skipped files), "warnings" as sentences, and "cost" (seconds and bytes of typical runs, estimated from a
        matrix product timed on this machine).
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
        "set_aside": [{"path": aside.path, "why": aside.why} for aside in store.layout.skipped],
        "keys": None,
    }
    if store.layout.key and not quick:
        codes = key_codes(run)
        report["keys"] = {
            "repeated": int(np.count_nonzero(codes == REPEATED)),
            "climbing": int(np.count_nonzero(codes == UNSAFE)),
            "empty": int(np.count_nonzero(codes == EMPTY)),
            "first": run.store.ids[np.flatnonzero(codes)[:5]].tolist(),
        }
    report["warnings"] = _warnings(report, store)
    report["cost"] = _cost(store, run.engine.workers)
    if slow := _slow_kernel():
        report["warnings"].append(slow)
    return report


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


def norms(part: str, store: EmbeddingStore, block: Block) -> tuple[Any]:
    """Return the norms of a block's rows (B,) float64: 0 for zero rows, NaN or infinity where a value is."""
    return (norms_of(store.raw(part, block)),)


def _warnings(report: dict[str, Any], store: EmbeddingStore) -> list[str]:
    texts = []
    for name, field in report["fields"].items():
        for kind in ("nan", "infinite", "zero"):
            if count := field[f"{kind}_rows"]:
                texts.append(f"{count:,} {name} rows are {kind}; --skip-bad skips them")
    if len({field["dim"] for field in report["fields"].values()}) > 1:
        texts.append("image and text embeddings differ in width: no CLIP score can be computed from them")
    if not report["fields"]:
        texts.append("there are no embeddings here: only filter, random and stored scores will work")
    if report["keys"]:
        for kind, what in (
            ("repeated", "repeat an earlier one"),
            ("climbing", "are unsafe paths: they contain .."),
            ("empty", "are empty"),
        ):
            if count := report["keys"][kind]:
                texts.append(f"{count:,} keys {what}; --skip-bad skips those rows")
    for name, field in report["fields"].items():
        if field["first_bad"]:
            texts.append(f"the first bad {name} row is {store.location_of(name, field['first_bad'][0])}")
    if report["set_aside"]:
        texts.append(f"{len(report['set_aside'])} files were skipped")
    if not report["key"]:
        texts.append("there is no key column: rows are identified by their number; name one with --key")
    return texts


def _slow_kernel() -> str:
    """Return a warning if the matrix kernels in use are slower than the processor allows, else ''."""
    if not has_avx512():
        return ""
    kernels = {info.get("architecture", "") for info in threadpoolctl.threadpool_info()}
    slow = kernels & {"Haswell", "Zen", "Sandybridge", "Nehalem", "Prescott"}
    if not slow:
        return ""
    return (
        f"matrix products use the {slow.pop()} kernel though the processor has AVX-512, which is twice as fast; "
        "OPENBLAS_CORETYPE chooses it, and results may differ in the last digit between kernels"
    )


def _cost(store: EmbeddingStore, workers: int) -> dict[str, Any]:
    """Estimate the cost of runs from a matrix product timed now; the time for reading is a guess of 1 GB a second."""
    name = next(iter(store.layout.vectors), None)
    if name is None:
        return {}
    n, dim = store.total, store.dim(name)
    k = automatic(n)[0]
    rng = np.random.default_rng(0)
    narrow = min(1, 2048 / dim)  # with very wide rows, fewer tell the speed
    rows = rng.standard_normal((max(int(2048 * narrow), 64), dim), dtype=np.float32)
    centroids = rng.standard_normal((max(int(512 * narrow), 64), dim), dtype=np.float32)
    nearest_centroid(rows, centroids)
    begin = time.perf_counter()
    repeats = 0
    with one_blas_thread:
        begin = time.perf_counter()
        while time.perf_counter() - begin < 0.2:
            nearest_centroid(rows, centroids)
            repeats += 1
    speed = repeats * rows.size * len(centroids) * workers / (time.perf_counter() - begin)
    read = store.stored_bytes(name) / 1e9
    sample = min(n, max(256 * k, 65_536))
    scored = "joint" in store.fields and store.dim("image") == store.dim("text")
    largest = min(
        max(4 * n // k, 16_384), 65_536, n
    )  # rows of a cluster in memory at once, if it has four times the mean
    train = 20 * sample * k * dim / speed
    label = n * k * dim / speed + read
    pairs = n * (n / k) / 2 * dim / speed
    return {
        "multiply_adds_per_second": speed,
        "clusters": k,
        "seconds": {
            **({"clip-score": round(2 * read, 2)} if scored else {}),
            "cluster": round(train + label, 2),
            "density": round(train + label, 2),
            "semdedup": round(train + label + pairs + read, 2),
        },
        "memory_bytes": int(48 * n + max(min(sample * dim * 4, 512 * 2**20), workers * 1.5 * largest * dim * 4)),
        "cache_bytes": int(8 * n + (0 if store.mapped(name) else store.stored_bytes(name))),
    }
