"""Embeds raw data into a pool: decode workers feed the model, one shard after the other, resumable."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.data import Data, DataOptions, Part, Place, Sample, noted, open_data
from thresher.data.location import refuse_inside
from thresher.embedding.encoders import Encoder, importable, make_encoder, shaped
from thresher.embedding.pool import (
    FOLDERS,
    JOBS,
    LOCK,
    OWN,
    SET_ASIDE,
    TABLES,
    PoolPlan,
    Shard,
    ShardWriter,
    all_written,
    holding,
    identity_of,
    listed,
    may_retry,
    shard_path,
    shards_of,
    sweep_pool,
    unfinished,
    writing_shard,
    written,
)
from thresher.embedding.prepare import Decoded, DecodeOptions, DecodeTask, Pixels, Slots, Tokens, prepare
from thresher.embedding.quality import Head, Quality
from thresher.errors import ChangedError, OutputError, PoolError, ThresherError, UnreachedError, UsageError
from thresher.export.keys import hashes_of
from thresher.io.listing import named
from thresher.io.open import open_file
from thresher.io.paths import visible, writable
from thresher.io.pictures import PIXELS
from thresher.io.places import located, place
from thresher.io.plan import PLAN
from thresher.io.remote import forget_listings
from thresher.runtime.engine import Engine, Stateful, check_files, cores
from thresher.runtime.engines.processes import Processes
from thresher.runtime.engines.serial import Serial
from thresher.runtime.files import refuse_foreign_files, writing
from thresher.runtime.format import counted
from thresher.runtime.jobs import ArrayJob, Jobs, job_of
from thresher.runtime.locks import create_locked, sweep
from thresher.runtime.places import AnyPath, RemotePath
from thresher.runtime.progress import Advance, Progress, Silent
from thresher.runtime.results import record_in

Vectors = dict[str, npt.NDArray[np.float16]]
Unreached = list[tuple[int, str]]  # shards that were not reached, and why

_CHUNK = 64  # samples prepared together
_MISSED = 3  # shards in a row that were not reached, after which the others are not tried
_REQUESTS = 16  # at once
_LOOK = 5.0  # seconds between looks at whether a command that writes to a remote pool still runs
_AHEAD = 2  # batches queued for the model
_LOOKED_AT, _PARTS = 64, 8  # samples of a part, and parts, that are read to see if the data has captions and uids
_UID = re.compile("[0-9a-fA-F]{32}")  # DataComp's


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """Options of :func:`embed`.

    Attributes:
        encoder: See :func:`thresher.embedding.encoders.make_encoder`.
        device: "auto", "cpu", "cuda" (all GPUs), or several separated by commas, each with a process of its own:
            "cuda:0,cuda:1".
        precision: Precision of the model: "auto", "float32", "bfloat16" or "float16".
        batch_size: Samples per batch of the model (default: 64 on the CPU, 512 on a GPU).
        workers: Processes that decode (default: the number of cores, on the CPU one less; 0: decode in this process).
        thumbnails: Pixels of the longer side of thumbnails, which reports can show; 0 for none.
        pixel_limit: Most pixels of an image; a larger one counts as a decompression bomb.
        only: "image" or "text" to embed only that.
        quality: Columns to compute from every image, separated by commas, see :mod:`thresher.embedding.quality`.
        data: How to read the data.
    """

    encoder: str
    device: str = "auto"
    precision: str = "auto"
    batch_size: int | None = None
    workers: int | None = None
    thumbnails: int = 0
    pixel_limit: int = PIXELS
    only: str | None = None
    quality: str | None = None
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        """Validate the options."""
        for name, value, least in (
            ("batch-size", self.batch_size, 1),
            ("workers", self.workers, 0),
            ("thumbnails", self.thumbnails, 0),
            ("pixel-limit", self.pixel_limit, 1),
        ):
            if value is not None and value < least:
                raise UsageError(f"--{name} {value}: must be at least {least}")
        if self.only not in (None, *FOLDERS):
            raise UsageError(f"--only {self.only}: must be image or text")
        Quality.parse(self.quality)


@dataclass(frozen=True)
class Embedded:
    """Result of :func:`embed`.

    Attributes:
        pool: The folder.
        rows: Rows of the pool.
        new: Rows that this call embedded.
        skipped: Number of skipped samples, which are listed in ``set_aside.txt``.
        damaged: Number of data files that could be read only in part, or not at all.
        shards: Number of shards.
        fields: The vectors in the pool: "image", "text" or both.
        notes: Messages for the user.
    """

    pool: str
    rows: int
    new: int
    skipped: int
    damaged: int
    shards: int
    fields: tuple[str, ...]
    notes: tuple[str, ...] = ()


def embed(
    data: str,
    pool: str | os.PathLike[str] | AnyPath,
    settings: EmbedSettings,
    *,
    overwrite: bool = False,
    retry_damaged: bool = False,
    engine: Engine | None = None,
    shard: ArrayJob | None = None,
    progress: Progress | None = None,
) -> Embedded:
    """Embed images and captions into a pool that every other command opens.

    Called again after it was killed, it resumes with the first missing shard; called with more data, it adds shards at
    the end. Samples that cannot be used are skipped, counted and listed. A shard is written once all of its data was
    read: the shards of data that was not reached are missing, and the next call embeds them. Memory does not grow with
    the data.

    Args:
        data: See :func:`thresher.data.open_data`.
        pool: Folder or address to write to: float16 vectors and parquet tables in clip-retrieval's layout, and
            ``pool.json``.
        settings: The options.
        overwrite: Replace an existing pool.
        retry_damaged: Embed the shards again whose data was damaged or lacked images.
        engine: Where shards are embedded, one in each task, by a model of the worker's own. A worker decodes for
            itself, or with the helpers that its engine has; see :class:`thresher.runtime.engine.Stateful`. By default
            on the devices of this machine, with ``settings.workers`` processes that decode. On other machines, the data
            and the pool must be on storage that all of them share.
        shard: Embed only the share of one of several jobs, see :mod:`thresher.runtime.jobs`. The pool is finished by a
            call without it after all jobs have finished; its bytes are those of one call.
        progress: Receives progress updates.

    Raises:
        PoolError: There is no data, or no sample can be used.
        UnreachedError: Some data was not reached; all shards of other data are written.
        ChangedError: The data changed while it was read; the shards of unchanged data are written.
        UsageError: An encoder, device or column does not exist, or the pool cannot grow with this data.
        OutputError: The folder cannot be written, or holds other files, or jobs have not finished.
    """
    if shard is not None and (overwrite or retry_damaged):
        option = "--overwrite" if overwrite else "--retry-damaged"
        raise UsageError(f"--shard {shard}: {option} would change what other jobs work on; leave it out")
    if engine is not None and "," in settings.device:
        raise UsageError(
            f"--device {settings.device}: with --engine each worker has one device; pass auto, cuda or cpu"
        )
    progress = progress or Silent()
    folder = place(pool)
    source, refusal = _opened(data, settings)
    refuse_inside(data, folder)
    known = None if overwrite else PoolPlan.read(folder)
    if known is None:
        refuse_foreign_files(
            folder, [PLAN, SET_ASIDE, TABLES, JOBS, *FOLDERS.values(), *(path.name for path in unfinished(folder))]
        )
    shards = shards_of(source.parts)  # before anything slow: from here on the data must not change
    devices = _devices(settings.device)
    encoder = make_encoder(settings.encoder, device=devices[0], precision=settings.precision)
    asked, notes = _planned(source, shards, encoder, settings)
    notes = (*source.notes, *refusal, *notes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created ({error.strerror}); choose another folder") from None
    with ExitStack() as held:
        still_held = held.enter_context(holding(folder, None if shard is None else progress.say))
        if overwrite:
            _clear(folder)
        known = PoolPlan.read(folder)  # again: another process may have written to it before the lock was acquired
        if known is None and (
            others := [path for name in (TABLES, *FOLDERS.values()) for path in _files(folder, name)]
        ):
            raise OutputError(
                f"{folder}: holds {others[0].parent.name}/{others[0].name}, but no {PLAN} that describes it; choose "
                "another folder, or pass --overwrite"
            )
        numbers = range(len(known.shards) if known else 0)
        if shard is None:
            infos = all_written(folder, numbers)
            again = {n for n, info in enumerate(infos) if info and may_retry(info)} if retry_damaged else set()
            done = {n for n, info in enumerate(infos) if info and n not in again}
        else:  # it reads its own shards later: other jobs wait for this lock
            again, done = set(), listed(folder, numbers)
        jobs = Jobs(folder / JOBS, f"the pool {folder}", _request(asked))
        if overwrite:
            jobs.remove()
        if jobs.of and shard is None:
            jobs.finished()
        elif shard is not None and (jobs.of or not _is_finished(folder, asked)):
            jobs.begin(shard)
        plan = known.grown(folder, asked, again) if known else asked
        parts = {identity_of(part): part for part in source.parts}
        todo = [n for n in range(len(plan.shards)) if n not in done]
        lost = [n for n in todo if plan.shards[n].part not in parts]
        if lost:
            raise UsageError(
                f"{folder}: shard {lost[0]} of an earlier call is not written yet, and its data, "
                f"{plan.shards[lost[0]].path}, is not in {data}; finish that call first"
            )
        if todo and jobs.of and shard is None:
            missing = f"{shard_path(folder, 'table', todo[0]).name} is missing"
            raise jobs.missing(missing, sorted({job_of(n, jobs.of).number for n in todo}), jobs.of)
        if todo or known is None:
            plan.saved(folder)
        if shard is not None:
            if not jobs.of:
                return _of_job(folder, plan, shard, set(), (*notes, "the pool is finished already"))
            held.close()  # the jobs write at the same time
            still_held = held.enter_context(jobs.running(shard, progress.say))
            own = shard.share(range(len(plan.shards)))
            todo = [n for n, info in zip(own, all_written(folder, own), strict=True) if info is None]
        work = [(n, parts[plan.shards[n].part]) for n in todo]
        unreached: Unreached = []
        if engine is not None and work:
            lock = folder / LOCK if shard is None else jobs.lock(shard)
            unreached = _on_engine(folder, plan, encoder, settings, work, engine, progress, lock, again)
        elif len(devices) > 1 and len(work) > 1:
            lock = folder / LOCK if shard is None else jobs.lock(shard)
            unreached = _on_many(folder, plan, settings, work, devices, progress, lock)
        elif work:
            with progress.task("embed", _expected(source, [part for _, part in work])) as advance:
                unreached = _embed(folder, plan, encoder, settings, work, advance)
        if unreached:
            raise UnreachedError(
                f"{folder}: {len(unreached):,} of {counted(len(plan.shards), 'shard')} are missing, "
                "because their data was not "
                f"reached; run the same command again to embed them. The first: {min(unreached)[1]}"
            )
        _check_unchanged(plan, source.parts)
        still_held()
        if shard is not None:
            result = _of_job(folder, plan, shard, set(todo), notes)
            return replace(result, notes=(*result.notes, jobs.finish(shard, rows=result.rows)))
        result = _finished(folder, plan, set(todo), (*notes, *source.without_end()), data)
        jobs.remove()
        return result


def _request(plan: PoolPlan) -> dict[str, Any]:
    """Return the options that jobs of one pool have in common; of the data a hash."""
    data = [(shard.path, shard.first, shard.rows, shard.stamp) for shard in plan.shards]
    return {
        "encoder": dict(plan.encoder),
        "fields": plan.fields,
        "columns": dict(plan.columns),
        **plan.options,
        "shards": len(plan.shards),
        "data": hashlib.sha256(json.dumps(data).encode()).hexdigest(),
    }


def _is_finished(folder: AnyPath, asked: PoolPlan) -> bool:
    """Return whether a pool was finished with the same plan."""
    known = PoolPlan.read(folder)
    return known == asked and "rows" in record_in(folder / PLAN)


def _of_job(folder: AnyPath, plan: PoolPlan, job: ArrayJob, new: set[int], notes: Sequence[str]) -> Embedded:
    """Return the counts of the shards of one job.

    Raises:
        PoolError: One of them was removed in the meantime.
    """
    rows, fresh, skipped, damaged = 0, 0, 0, 0
    own = job.share(range(len(plan.shards)))
    for number, info in zip(own, all_written(folder, own), strict=True):
        if info is None:
            raise _removed(folder, number)
        rows += info["rows"]
        fresh += info["rows"] if number in new else 0
        skipped, damaged = skipped + len(info["set_aside"]), damaged + bool(info["damage"])
    return Embedded(str(folder), rows, fresh, skipped, damaged, len(own), plan.fields, tuple(notes))


def _removed(folder: AnyPath, number: int) -> PoolError:
    return PoolError(f"{folder}: shard {number} was removed during embedding; run the command again")


def _files(folder: AnyPath, name: str) -> list[AnyPath]:
    return sorted((folder / name).glob(f"{name}_*.*"), key=str)


def _clear(folder: AnyPath) -> None:
    """Remove a pool; it counts as unfinished from the start of the removal."""
    with writing(folder / PLAN) as scratch:
        Path(scratch).write_text('{"shards": []}\n', encoding="ascii")
    for name in (TABLES, *FOLDERS.values()):
        for path in _files(folder, name):
            path.unlink()
    for name in (SET_ASIDE, PLAN):
        (folder / name).unlink(missing_ok=True)


def _devices(text: str) -> list[str]:
    """Return the devices of a list separated by commas; "cuda" and "auto" stand for all GPUs."""
    named = [name.strip() for name in text.split(",") if name.strip()]
    if named not in (["auto"], ["cuda"]):
        return named or ["auto"]
    try:
        import torch
    except ImportError:
        return named
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{i}" for i in range(count)] if count > 1 else named


def _opened(data: str, settings: EmbedSettings) -> tuple[Data, tuple[str, ...]]:
    """Open the data. If only images are embedded, captions that cannot be read are a note and not an error."""
    try:
        return open_data(data, replace(settings.data, pictures=settings.only != "text")), ()
    except PoolError as error:
        if settings.only != "image":
            raise
        return open_data(data, replace(settings.data, captions=False)), (f"without captions: {error}",)


def _planned(
    source: Data, shards: tuple[Shard, ...], encoder: Encoder, settings: EmbedSettings
) -> tuple[PoolPlan, tuple[str, ...]]:
    """Return the plan of the pool (vectors, columns, shards) and notes for the user."""
    offered = [name for name, dim in (("image", encoder.image_dim), ("text", encoder.text_dim)) if dim]
    if settings.only and settings.only not in offered:
        raise UsageError(f"--only {settings.only}: {encoder.name} encodes only {' and '.join(offered)}")
    fields = [name for name in offered if settings.only in (None, name)]
    notes: list[str] = []
    first = _some(source)
    if "text" in fields and not any(sample.text for sample in first):
        if elsewhere := source.captions_elsewhere():
            raise PoolError(f"{elsewhere}, or pass --only image")
        if fields == ["text"]:
            raise PoolError(f"{source.location}: has no captions; name their column with --caption")
        fields.remove("text")
        notes.append("the data has no captions: only the images are embedded")
    columns = {"key": "string", "text": "string"}
    uids = bool(first) and all(sample.uid for sample in first)
    if not source.parts[0].roles():  # no column with that role: in the json of a tar, "uid" may be anything
        uids &= all(_UID.fullmatch(sample.uid) for sample in first)
    columns |= {"uid": "string"} if uids else {}
    columns |= {"width": "int32", "height": "int32"} if "image" in fields else {}
    quality = _quality(source, settings, fields)
    heads = quality.read_heads(encoder.image_dim) if quality.heads else ()
    columns |= quality.types()
    columns |= {"shard": "string", "offset": "int64"}
    columns |= {"filepath": "string"} if source.parts[0].pictures_apart else {}
    columns |= {name: str(kind) for name, kind in source.columns.items() if name not in OWN}
    columns |= {"thumbnail": "picture"} if settings.thumbnails and "image" in fields else {}
    dims = {"image": encoder.image_dim, "text": encoder.text_dim}
    info = {
        "name": encoder.name,
        "weights": encoder.weights(),
        "precision": getattr(encoder, "precision", settings.precision),
        **{f"{name}_dim": dims[name] for name in fields},
    }
    reading = settings.data
    options = {
        "image": reading.image,
        "caption": reading.caption,
        "key": reading.key,
        "root": reading.root and os.path.abspath(reading.root),
        "captions": reading.captions_file and os.path.abspath(reading.captions_file),
        "pixel-limit": settings.pixel_limit,
        "thumbnails": settings.thumbnails,
        **({"columns": reading.columns} if reading.columns else {}),
        **({"allow-outside": True} if reading.allow_outside else {}),
        **({"reader": reading.reader} if reading.reader else {}),
        **({"heads": {head.name: head.digest for head in heads}} if heads else {}),
    }
    return PoolPlan(info, tuple(fields), columns, options, shards, source.versions), tuple(notes)


def _quality(source: Data, settings: EmbedSettings, fields: Sequence[str]) -> Quality:
    """Return the columns to compute from every image."""
    quality = Quality.parse(settings.quality)
    names = quality.types()
    if names and "image" not in fields:
        raise UsageError(f"--quality {settings.quality}: is computed from images, and only texts are embedded")
    if there := [name for name in names if name in source.columns or name in OWN]:
        raise UsageError(f"--quality {there[0]}: {source.location} has a column {there[0]} already; leave it out")
    return quality


def _some(source: Data) -> list[Sample]:
    """Return the first samples of some parts spread over the data; of further parts, if none of those can be read.

    Raises:
        UnreachedError: No part was reached.
    """
    samples: list[Sample] = []
    missed: UnreachedError | None = None
    places = np.linspace(0, len(source.parts) - 1, min(_PARTS, len(source.parts))).astype(int).tolist()
    for number in dict.fromkeys((*places, *range(len(source.parts)))):
        if samples and number not in places:
            break
        try:  # problems are reported when the part is embedded
            samples += islice(source.parts[number].samples(), _LOOKED_AT)
        except PoolError:
            continue
        except UnreachedError as error:
            missed = missed or error
    if missed and not samples:
        raise missed
    return samples


def _expected(source: Data, parts: Sequence[Part]) -> int:
    """Return the number of samples of parts; for tars an estimate from the first tar and the sizes of all."""
    if all(part.rows is not None for part in parts):
        return sum(part.rows or 0 for part in parts)
    sizes = [shard.stamp[0] or 0 for shard in shards_of(parts)]
    for part, size in zip(parts, sizes, strict=True):
        try:
            rows = sum(1 for _ in part.samples())
        except (PoolError, UnreachedError):
            continue
        if rows and size:
            return max(rows, round(sum(sizes) * rows / size))
    return len(parts)


# --- many devices ---------------------------------------------------------------------------------


def _on_many(
    folder: AnyPath,
    plan: PoolPlan,
    settings: EmbedSettings,
    jobs: Sequence[tuple[int, Part]],
    devices: Sequence[str],
    progress: Progress,
    lock: AnyPath,
) -> Unreached:
    """Embed with one process per device; each shard is embedded by one of them. Return what was not reached."""
    workers = cores() if settings.workers is None else settings.workers
    each = replace(settings, workers=workers // len(devices))
    engine = Processes(len(devices))
    tasks = [(device, list(jobs[i :: len(devices)])) for i, device in enumerate(devices)]
    ended = Event()
    with (
        _running(folder, lock) as running,
        progress.task("embed", len(jobs), "shards") as advance,
        ThreadPoolExecutor(1) as background,
    ):
        watching = background.submit(_watch, folder, [number for number, _ in jobs], advance, ended)
        on_one = partial(_on_one, folder, plan, each, running)
        try:
            found = list(engine.map(on_one, [task for task in tasks if task[1]]))
        finally:
            ended.set()
        watching.result()
    return [one for unreached in found for one in unreached]


@contextmanager
def _running(folder: AnyPath, lock: AnyPath) -> Iterator[AnyPath]:
    """Yield the path of a file that exists until the block ends: processes stop when it is gone."""
    if isinstance(folder, RemotePath):
        yield lock
        return
    file, path = create_locked(folder, ".embed.", ".tmp")
    try:
        yield Path(path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.close(file)


def _watch(folder: AnyPath, numbers: Sequence[int], advance: Advance, ended: Event) -> None:
    """Report shards as they appear, until ``ended`` is set."""
    left, last = set(numbers), False
    while not last:
        last = ended.wait(_LOOK if isinstance(folder, RemotePath) else 1)
        new = listed(folder, left)
        if new:
            advance(len(new))
        left -= new


def _on_one(
    folder: AnyPath, plan: PoolPlan, settings: EmbedSettings, running: AnyPath, task: tuple[str, list[tuple[int, Part]]]
) -> Unreached:
    """Embed shards on one device until they are done, or until the file ``running`` is gone."""
    device, jobs = task
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the parent removes that file instead, so that temporary files are cleaned up
    encoder = make_encoder(settings.encoder, device=device, precision=settings.precision)
    return _embed(folder, plan, encoder, settings, jobs, partial(_check_running, folder, running))


# --- an engine ------------------------------------------------------------------------------------


def _on_engine(
    folder: AnyPath,
    plan: PoolPlan,
    encoder: Encoder,
    settings: EmbedSettings,
    jobs: Sequence[tuple[int, Part]],
    engine: Engine,
    progress: Progress,
    lock: AnyPath,
    again: Collection[int],
) -> Unreached:
    """Embed each shard as a task of an engine. Return what was not reached, as :func:`_embed` does."""
    # In one precision everywhere: "auto" would mean another one on a machine with a GPU.
    precision, quality = getattr(encoder, "precision", settings.precision), Quality.parse(settings.quality).text()
    each = replace(settings, precision=precision, quality=quality)
    files = dict.fromkeys((part.protocol, part.path) for _, part in jobs)
    unreached: Unreached = []
    in_a_row = 0
    with _running(folder, lock) as running, progress.task("embed", len(jobs), "shards") as advance:
        heads = [("file", os.path.abspath(path)) for _, path in Quality.parse(quality).heads]
        check_files(engine, lambda: [*files, located(str(running)), *heads])
        call = partial(_on_worker, folder, plan, each, running, frozenset(again))
        work = Stateful(partial(_Worker.make, each), call, gpu=settings.device != "cpu")
        for done, missed in enumerate(engine.map(work, jobs), 1):
            unreached += missed
            in_a_row = in_a_row + 1 if missed else 0
            if in_a_row == _MISSED:
                return unreached + _not_tried(plan, [number for number, _ in jobs[done:]])
            advance(1)
    sweep_pool(folder)  # of workers that were lost
    return unreached


@dataclass(frozen=True)
class _Worker:
    """What a worker of an engine keeps: the model, and where its images are decoded."""

    encoder: Encoder
    helpers: Engine

    @staticmethod
    def make(settings: EmbedSettings, helpers: Engine) -> _Worker:
        return _Worker(make_encoder(settings.encoder, device=settings.device, precision=settings.precision), helpers)


def _on_worker(
    folder: AnyPath,
    plan: PoolPlan,
    settings: EmbedSettings,
    running: AnyPath,
    again: Collection[int],
    worker: _Worker,
    job: tuple[int, Part],
) -> Unreached:
    """Embed a shard with the model of a worker, unless the file ``running`` is gone.

    A shard that is there, and not one to write ``again``, was written by a worker that was lost before it said so.
    """
    number, _ = job
    if number not in again and written(folder, number) is not None:
        return []
    advance = partial(_check_running, folder, running)
    return _embed(folder, plan, worker.encoder, settings, [job], advance, worker.helpers)


def _check_running(folder: AnyPath, running: AnyPath, _: int) -> None:
    every = _LOOK if isinstance(running, RemotePath) else 0.001  # a look is a request
    if not _is_running(running, int(time.monotonic() / every)):
        raise ThresherError(f"{folder}: embedding was stopped")


@lru_cache(maxsize=1)
def _is_running(running: AnyPath, _now: int) -> bool:
    return running.exists()


def _not_tried(plan: PoolPlan, numbers: Sequence[int]) -> Unreached:
    return [(number, f"{plan.shards[number].path}: was not tried") for number in numbers]


# --- one device -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Samples of one shard that are prepared together, skipped samples, and the damage that ended reading.

    With ``unreached``, its samples and those before it must not be used. With ``retry``, the image of a skipped sample
    is a file that may be there later.
    """

    number: int
    samples: tuple[Sample, ...]
    skipped: tuple[tuple[str, int, str], ...] = ()
    damage: str = ""
    unreached: str = ""
    retry: bool = False


def _embed(
    folder: AnyPath,
    plan: PoolPlan,
    encoder: Encoder,
    settings: EmbedSettings,
    jobs: Sequence[tuple[int, Part]],
    advance: Advance,
    decoders: Engine | None = None,
) -> Unreached:
    """Write some shards with one model; return which were not reached, and why.

    Images are decoded by an engine, or by processes of this machine as the settings say.

    After a few shards in a row that were not reached, it stops: the network is down, or access has expired.
    """
    gpu = str(getattr(encoder, "device", "cpu")).startswith(("cuda", "mps"))
    size = settings.batch_size or (512 if gpu else 64)
    workers = max(1, cores() - (not gpu)) if settings.workers is None else settings.workers
    quality = Quality.parse(settings.quality)
    options = DecodeOptions(
        encoder.preprocess if "image" in plan.fields else None,
        encoder.tokenize if "text" in plan.fields else None,
        settings.pixel_limit,
        settings.thumbnails if "thumbnail" in plan.columns else 0,
        quality=quality.measured,
    )
    heads = quality.read_heads(encoder.image_dim) if quality.heads else ()
    widths = {name: int(plan.encoder[f"{name}_dim"]) for name in plan.fields}
    schema = _schema(plan)
    # There are more slots than tasks in flight in the engine, plus the one in use here, before a slot is reused.
    with (
        _slots(options, workers + 4 if workers and decoders is None else 0) as options,
        _decoding(workers) if decoders is None else nullcontext(decoders) as engine,
        importable(settings.encoder),  # it may import modules only when it encodes
        _Model(encoder, 2 if gpu else 1) as model,
    ):
        unreached: Unreached = []
        in_a_row = 0
        parts = dict(jobs)
        left = _Left()
        prepared = _prepared(engine, options, _chunks(plan, jobs, left))
        for number, chunks in groupby(prepared, key=lambda item: item[0].number):
            try:
                with writing_shard(folder, number, widths, schema) as writer:
                    batches = _Batches(model, writer, plan.shards[number].name, size, heads)
                    for chunk, decoded, pixels in chunks:
                        if why := chunk.unreached or decoded.unreached:
                            raise UnreachedError(why)
                        batches.add(chunk, decoded, pixels)
                        advance(len(chunk.samples) + len(chunk.skipped))
                    batches.finish()
                    _check_part(plan.shards[number], parts[number])
                in_a_row = 0
            except UnreachedError as error:
                left.number = number
                unreached.append((number, str(error)))
                in_a_row += 1
                if in_a_row == _MISSED:
                    rest = list(parts)[list(parts).index(number) + 1 :]
                    return unreached + _not_tried(plan, rest)
        return unreached


def _check_unchanged(plan: PoolPlan, parts: Sequence[Part]) -> None:
    """Check that no data changed while other data was embedded.

    Raises:
        ChangedError: A file changed, or is gone.
    """
    shards = {shard.part: shard for shard in plan.shards}
    for protocol in {part.protocol for part in parts}:
        forget_listings(protocol)
    with ThreadPoolExecutor(_REQUESTS) as threads:  # each is a request if the data is remote
        for _ in threads.map(lambda part: _check_stamp(shards[identity_of(part)], part), parts):
            pass


def _check_part(shard: Shard, part: Part) -> None:
    forget_listings(part.protocol)
    _check_stamp(shard, part)


def _check_stamp(shard: Shard, part: Part) -> None:
    try:
        same = shard.stamp == tuple(part.stamp())[: len(shard.stamp)]
    except PoolError:  # the file is gone
        same = False
    if not same:
        raise ChangedError(
            f"{shard.path}: changed while it was embedded; run the command again once writing has finished"
        )


@contextmanager
def _decoding(workers: int) -> Iterator[Engine]:
    """Yield an engine that decodes: in processes, or in this one if ``workers`` is 0."""
    if not workers:
        yield Serial()
        return
    engine = Processes(workers)
    try:
        yield engine
    finally:
        engine.close()


def _schema(plan: PoolPlan) -> Any:
    import pyarrow as pa

    thumbnail = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {name: thumbnail if name == "thumbnail" else pa.type_for_alias(kind) for name, kind in plan.columns.items()}
    return pa.schema(list(kinds.items()))


@dataclass
class _Left:
    """The shard whose samples are no longer needed, because some of its data was not reached; -1 for none."""

    number: int = -1


def _chunks(plan: PoolPlan, jobs: Sequence[tuple[int, Part]], left: _Left) -> Iterator[_Chunk]:
    """Yield the samples of parts in chunks, at least one chunk per part."""
    for number, part in jobs:
        samples, last = part.samples(), False
        while not last and left.number != number:
            batch, damage = list[Sample](), ""
            try:
                batch += islice(samples, _CHUNK)
            except PoolError as error:
                damage = str(error)
            except UnreachedError as error:
                yield _Chunk(number, (), unreached=str(error))
                break
            last = len(batch) < _CHUNK
            reasons = [_unusable(plan, sample) for sample in batch]
            yield _Chunk(
                number,
                tuple(sample for sample, why in zip(batch, reasons, strict=True) if not why),
                tuple((sample.key, sample.at, why) for sample, why in zip(batch, reasons, strict=True) if why),
                damage,
                retry=any(sample.picture_apart for sample, why in zip(batch, reasons, strict=True) if why),
            )


def _unusable(plan: PoolPlan, sample: Sample) -> str:
    if "image" in plan.fields and sample.picture is None:
        return sample.why or "has no image"
    return "has no caption" if "text" in plan.fields and not sample.text else ""


def _prepared(
    engine: Engine, options: DecodeOptions, chunks: Iterator[_Chunk]
) -> Iterator[tuple[_Chunk, Decoded, Pixels | None]]:
    """Yield chunks with their prepared samples, in order; pixels are valid until the next chunk is requested."""
    waiting: deque[tuple[_Chunk, int]] = deque()

    def tasks() -> Iterator[DecodeTask]:
        for i, chunk in enumerate(chunks):
            slot = i % options.slots.count if options.slots else 0
            waiting.append((chunk, slot))
            pictures = tuple(s.picture for s in chunk.samples if s.picture is not None) if options.preprocess else ()
            yield DecodeTask(slot, pictures, tuple(s.text for s in chunk.samples) if options.tokenize else ())

    slots = options.slots.open() if options.slots else None
    for decoded in engine.map(partial(prepare, options), tasks()):
        chunk, slot = waiting.popleft()
        yield chunk, decoded, decoded.pixels if slots is None else slots[slot]


@contextmanager
def _slots(options: DecodeOptions, count: int) -> Iterator[DecodeOptions]:
    """Yield the options with a file in shared memory for the pixels of ``count`` tasks, removed at the end."""
    if options.preprocess is None or not count:
        yield options
        return
    from PIL import Image

    shape = (_CHUNK, *options.preprocess(Image.new("RGB", (32, 32))).shape)
    with ExitStack() as after:
        for place in ("/dev/shm", tempfile.gettempdir()):  # noqa: S108
            try:
                file = after.enter_context(_reserved(Path(place), count * int(np.prod(shape))))
            except OSError:  # missing, not writable, or too small, as in a container
                continue
            options = replace(options, slots=Slots(file, count, shape))
            break
        yield options  # without slots, pixels are sent through a pipe


@contextmanager
def _reserved(place: Path, size: int) -> Iterator[str]:
    """Yield a file of ``size`` bytes, all allocated: writing to a mapped file on a full disk would kill the process."""
    sweep(place.glob("thresher-*.pixels"))
    file, path = create_locked(place, "thresher-", ".pixels", 0o600)  # private to this user
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
        yield path
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.close(file)


class _Model:
    """An encoder that runs in a thread pool: batches are queued, and their vectors come back in order."""

    def __init__(self, encoder: Encoder, threads: int) -> None:
        self._encoder = encoder
        self._pool = ThreadPoolExecutor(threads)
        self._ring: deque[Pixels] = deque()

    def __enter__(self) -> _Model:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def buffer(self, shape: tuple[int, ...]) -> Pixels:
        """Return an array for the pixels of a batch; it is reused once the batches in flight are done."""
        if len(self._ring) <= _AHEAD + 1:
            self._ring.append(np.empty(shape, np.uint8))
        else:
            self._ring.rotate(-1)
        return self._ring[-1]

    def submit(self, pixels: Pixels | None, tokens: Tokens | None) -> Future[Vectors]:
        """Encode a batch in the background."""
        return self._pool.submit(self._encode, pixels, tokens)

    def _encode(self, pixels: Pixels | None, tokens: Tokens | None) -> Vectors:
        vectors: Vectors = {}
        with np.errstate(over="ignore"):  # values beyond float16 become infinite, and the row is skipped
            if pixels is not None:
                images = shaped(self._encoder, "image", len(pixels), self._encoder.encode_images(pixels))
                vectors["image"] = images.astype(np.float16)
            if tokens is not None:
                rows = len(next(iter(tokens.values())))
                texts = shaped(self._encoder, "text", rows, self._encoder.encode_texts(tokens))
                vectors["text"] = texts.astype(np.float16)
        return vectors


class _Batches:
    """Collects the usable samples of a shard into batches, and writes their vectors and columns."""

    def __init__(self, model: _Model, writer: ShardWriter, name: str, size: int, heads: Sequence[Head] = ()) -> None:
        self._model, self._writer, self._name, self._size = model, writer, name, size
        self._heads = heads
        self._waiting: deque[tuple[list[dict[str, Any]], Future[Vectors]]] = deque()
        self._rows: list[dict[str, Any]] = []
        self._tokens: list[Tokens] = []
        self._pixels: Pixels | None = None

    def add(self, chunk: _Chunk, decoded: Decoded, pixels: Pixels | None) -> None:
        """Add samples; pixels are copied."""
        self._writer.skipped += chunk.skipped
        self._writer.damage = self._writer.damage or chunk.damage
        self._writer.retry |= chunk.retry or any(chunk.samples[i].picture_apart for i in decoded.bad)
        self._writer.skipped += [
            (chunk.samples[i].key, chunk.samples[i].at, why) for i, why in sorted(decoded.bad.items())
        ]
        good = np.array([i for i in range(len(chunk.samples)) if i not in decoded.bad], np.int64)
        while len(good):
            taken, good = good[: self._size - len(self._rows)], good[self._size - len(self._rows) :]
            if pixels is not None and decoded.sizes.size:
                if self._pixels is None:
                    self._pixels = self._model.buffer((self._size, *pixels.shape[1:]))
                target = self._pixels[len(self._rows) : len(self._rows) + len(taken)]
                np.take(pixels, taken, axis=0, out=target, mode="clip")  # "raise" would copy twice
                self._writer.notes.update(note for i in taken for note in chunk.samples[i].notes)
            if decoded.tokens is not None:
                self._tokens.append({name: array[taken] for name, array in decoded.tokens.items()})
            self._rows += [self._row(chunk.samples[i], decoded, int(i)) for i in taken]
            if len(self._rows) == self._size:
                self._submit()

    def finish(self) -> None:
        """Encode the last batch and write all waiting batches."""
        if self._rows:
            self._submit()
        while self._waiting:
            self._write()

    def _row(self, sample: Sample, decoded: Decoded, i: int) -> dict[str, Any]:
        row = {**sample.columns, "key": sample.key, "text": sample.text, "uid": sample.uid or sample.key}
        if len(decoded.sizes):
            row |= {"width": int(decoded.sizes[i, 0]), "height": int(decoded.sizes[i, 1])}
        row |= decoded.quality.get(i, {})
        if decoded.thumbnails:
            row["thumbnail"] = {"bytes": decoded.thumbnails[i], "path": f"{sample.key}.webp"}
        if "filepath" in self._writer.schema.names and isinstance(sample.picture, Place):
            row["filepath"] = writable(sample.picture.path)
        return row | {"shard": self._name, "offset": sample.at}

    def _submit(self) -> None:
        pixels = None if self._pixels is None else self._pixels[: len(self._rows)]
        self._waiting.append((self._rows, self._model.submit(pixels, joined(self._tokens) if self._tokens else None)))
        self._rows, self._tokens, self._pixels = [], [], None
        while len(self._waiting) > _AHEAD:
            self._write()

    def _write(self) -> None:
        rows, future = self._waiting.popleft()
        vectors = future.result()
        good = np.ones(len(rows), np.bool_)
        for array in vectors.values():
            good &= np.isfinite(array).all(axis=1) & array.any(axis=1)
        self._writer.skipped += [
            (rows[i]["key"], rows[i]["offset"], "its embedding is zero or not finite") for i in np.flatnonzero(~good)
        ]
        kept = [rows[i] for i in np.flatnonzero(good)]
        columns = {name: [row.get(name) for row in kept] for name in self._writer.schema.names}
        columns |= {head.name: head.scores(vectors["image"][good]) for head in self._heads}
        self._writer.add({name: array[good] for name, array in vectors.items()}, columns)


def joined(tokens: Sequence[Tokens]) -> Tokens:
    """Return the rows of several batches of tokens as one, padded with zeros to the widest."""
    whole = {}
    for name in tokens[0]:
        arrays = [one[name] for one in tokens]
        width = max(array.shape[1] for array in arrays)
        whole[name] = np.concatenate([np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays])
    return whole


# --- the end --------------------------------------------------------------------------------------


def _finished(folder: AnyPath, plan: PoolPlan, new: set[int], notes: Sequence[str], data: str) -> Embedded:
    """Mark the pool as finished, and list the samples that are not in it."""
    rows, fresh, skipped, damaged, counts = 0, 0, 0, 0, Counter[str]()
    first, empty = "", list[str]()
    with writing(folder / SET_ASIDE) as scratch, open(scratch, "w", encoding="utf-8", newline="\n") as file:
        infos = all_written(folder, range(len(plan.shards)))
        for number, (shard, info) in enumerate(zip(plan.shards, infos, strict=True)):
            if info is None:
                raise _removed(folder, number)
            rows += info["rows"]
            counts.update(info["notes"])
            fresh += info["rows"] if number in new else 0
            lines = [f"{visible(shard.name)}, {at}, key {visible(key)}: {why}" for key, at, why in info["set_aside"]]
            lines += [info["damage"]] if info["damage"] else []
            skipped, damaged = skipped + len(info["set_aside"]), damaged + bool(info["damage"])
            first = first or next(iter(lines), "")
            empty += [shard.path] if not info["rows"] and not lines else []
            file.writelines(line.replace("\n", " ").replace("\r", " ") + "\n" for line in lines)
    if not skipped and not damaged:
        (folder / SET_ASIDE).unlink()
    if not rows:
        _clear(folder)  # else the same command would find nothing to do after the data was fixed
        raise PoolError(f"{data}: none of its samples can be used; {first or 'it has none'}")
    plan.saved(folder, rows)
    repeated = _repeated(folder, len(plan.shards), "uid" if "uid" in plan.columns else "key")
    without = [f"{counted(len(empty), 'file has', 'files have')} no samples: {named(empty)}"] if empty else []
    all_notes = (*notes, *without, *noted("row", counts), *repeated)
    return Embedded(str(folder), rows, fresh, skipped, damaged, len(plan.shards), plan.fields, all_notes)


def _repeated(folder: AnyPath, shards: int, column: str) -> list[str]:
    """Return a note if several rows have the same key: methods that need unique keys will refuse the pool."""
    import pyarrow.parquet as pq

    paths = [shard_path(folder, "table", number) for number in range(shards)]

    def hashed(path: AnyPath) -> npt.NDArray[Any]:
        with open_file(*located(str(path))) as file:
            return hashes_of(pq.read_table(file, columns=[column]).column(0).to_pylist())

    with ThreadPoolExecutor(_REQUESTS if isinstance(folder, RemotePath) else 1) as threads:
        hashes = np.concatenate(list(threads.map(hashed, paths)))
    if not (repeated := len(hashes) - len(np.unique(hashes))):
        return []
    return [
        f"{counted(repeated, 'row has', 'rows have')} the {column} of an earlier row; select with --key "
        "row to keep them separate"
    ]
