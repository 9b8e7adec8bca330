"""Writes a file of reference losses, for the policy ``rho``; and computes them from the embeddings stored in a pool."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher import __version__
from thresher.dynamic.references import References
from thresher.errors import UsageError
from thresher.export.write import check_target
from thresher.pool.store import EmbeddingStore
from thresher.pruning.score_table import info_in, score
from thresher.pruning.scores import MARK, scorer
from thresher.runtime.cache import Cache
from thresher.runtime.engine import Engine
from thresher.runtime.files import writing
from thresher.runtime.format import counted
from thresher.runtime.places import local_path
from thresher.runtime.progress import Progress, Silent
from thresher.runtime.results import refuse_other, result_file


def check_references_target(
    target: str | os.PathLike[str], request: Mapping[str, Any], *, overwrite: bool, store: EmbeddingStore | None = None
) -> Path:
    """Check, before any work, that a file of reference losses may be written; return its path.

    Args:
        target: The file.
        request: How the losses are made, by name; a file that was made in the same way is accepted.
        overwrite: Replace a file that was made in another way.
        store: The pool, whose files are never overwritten.

    Raises:
        UsageError: The name does not end in .parquet or .pq.
        OutputError: A different file is there, or it cannot be written.
    """
    path = local_path(target)
    if path.suffix.lower() not in (".parquet", ".pq"):
        raise UsageError(f"{path}: reference losses are written as parquet; use a file name that ends in .parquet")
    check_target(path, store)
    if path.exists() and not overwrite:
        refuse_other(path, info_in(path), {**request, "version": __version__})
    return path


def write_references(
    path: Path,
    batches: Iterable[tuple[Sequence[str], npt.ArrayLike]],
    request: Mapping[str, Any],
    cost: Mapping[str, Any],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write reference losses, and their cost to ``<name>.cost.json`` next to them; return the cost with the counts.

    Args:
        path: The file, as checked by :func:`check_references_target`.
        batches: Keys (B,) and their losses (B,); rows whose loss is not finite are left out.
        request: How the losses were made; part of the file, so it has no times.
        cost: What they cost: gradient_samples, scored_forwards, seconds.
        overwrite: Replace a different file.
        progress: Where to report that the file is there already.

    Raises:
        UsageError: No loss is finite, or two rows have the same key.
        OutputError: A different file is there, or it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    info = {**request, "version": __version__}
    schema = pa.schema([("key", pa.string()), ("loss", pa.float32())], {MARK: json.dumps(info)})
    rows, without = 0, 0
    # Arrow itself opens only names in UTF-8.
    with (
        result_file(path, overwrite=overwrite, say=(progress or Silent()).say) as scratch,
        open(scratch, "wb") as raw,
        pq.ParquetWriter(raw, schema) as file,
    ):

        def written() -> Iterator[tuple[list[str], npt.NDArray[np.float32]]]:
            nonlocal rows, without
            for keys, losses in batches:
                losses_B = np.asarray(losses, np.float32)
                good_B = np.flatnonzero(np.isfinite(losses_B))
                kept = [keys[row] for row in good_B.tolist()]
                rows, without = rows + len(kept), without + len(losses_B) - len(kept)
                file.write_table(pa.table([pa.array(kept, pa.string()), losses_B[good_B]], schema=schema))
                yield kept, losses_B[good_B]

        try:
            References.of(written())  # refuses keys that occur twice
        except UsageError as error:
            if not rows:
                what = f"none of the {counted(without, 'row')} has a finite loss"
                raise UsageError(f"{what}; the model diverged: give a lower learning rate") from None
            raise UsageError(f"{error}; name another column with --key") from None
    result = {**info, **cost, "rows": rows, "without_loss": without}
    with writing(cost_file(path)) as scratch:
        Path(scratch).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return {"out": str(path), **result}


def cost_file(path: str | os.PathLike[str]) -> Path:
    """Return the file with the cost of a file of reference losses: ref.cost.json for ref.parquet."""
    return Path(path).with_suffix(".cost.json")


def references_from_pool(
    store: EmbeddingStore,
    target: str | os.PathLike[str],
    *,
    batch_size: int = 256,
    temperature: float = 0.01,
    seed: int = 0,
    overwrite: bool = False,
    engine: Engine | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the CLIP losses of a pool's rows by its stored embeddings: help by the model that made the pool.

    A loss is the mean over five random partitions of the rows into batches, as in negCLIPLoss. Nothing is trained, and
    no image is embedded again, so all costs but seconds are 0.

    Args:
        store: A pool with embeddings of images and captions in one space.
        target: Parquet file to write.
        batch_size: Pairs that are compared with each other; best as in training.
        temperature: Of the softmax that the model of the pool was trained with.
        seed: Seed of the partitions.
        overwrite: Replace a different file.
        engine: Where work runs; threads on all cores by default.
        cache: Where computed arrays are kept.
        progress: Where to report progress.

    Returns:
        How the losses were made, what they cost, and the counts of rows.

    Raises:
        UsageError: The pool has no joint embeddings, a value is not allowed, or keys are not unique.
        OutputError: A different file is there, or it cannot be written.
    """
    progress, method = progress or Silent(), scorer("negclip", {"temperature": temperature, "batch_size": batch_size})
    request = {
        "source": "pool",
        "store": store.fingerprint(),
        "batch_size": batch_size,
        "temperature": temperature,
        "seed": seed,
    }
    path = check_references_target(target, request, overwrite=overwrite, store=store)
    started = time.monotonic()
    try:
        table = score(store, method, seed=seed, engine=engine, cache=cache, progress=progress)
    except UsageError as error:
        raise type(error)(f"{store.layout.location}: no reference losses: {error}") from None
    cost = {"gradient_samples": 0, "scored_forwards": 0, "seconds": round(time.monotonic() - started, 3)}
    batches = _keyed(store, table.ids_n, np.asarray(table.values_n / -temperature, np.float32))
    return write_references(path, batches, request, cost, overwrite=overwrite, progress=progress)


def _keyed(
    store: EmbeddingStore, ids_n: npt.NDArray[np.int64], values_n: npt.NDArray[np.float32]
) -> Iterator[tuple[list[str], npt.NDArray[np.float32]]]:
    """Yield the keys and values of rows, some at a time."""
    mask_N, done = np.zeros(store.total, np.bool_), 0
    mask_N[ids_n] = True
    for _, keys in store.where(mask_N).keys():
        yield keys, values_n[done : done + len(keys)]
        done += len(keys)
