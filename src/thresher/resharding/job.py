"""A reshard from end to end: scan the data, plan, write the missing shards, write the result."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from thresher import __version__
from thresher.data import Data, DataOptions, noted, open_data
from thresher.data.layouts.webdataset import TarPart
from thresher.data.location import refuse_inside
from thresher.data.parts import Form, Ints
from thresher.errors import OutputError, PoolError, UsageError
from thresher.export.keys import Chosen, KeySet, each_key, read_keys
from thresher.io.key_forms import difference
from thresher.io.open import file_stamp
from thresher.io.paths import visible
from thresher.io.places import located, place
from thresher.pool.store import reopen
from thresher.resharding import PER_SHARD, Resharded, convert, csvs, dali, energon, fixed, hub, indexes, tables, tars
from thresher.resharding.fixed import Fixed
from thresher.resharding.originals import AGAIN, Originals, changed, source_of
from thresher.resharding.plan import (
    NOTHING,
    Change,
    Matched,
    PlaceError,
    Places,
    ReshardPlan,
    Source,
    match,
    match_places,
    places_of,
    planned,
)
from thresher.runtime import locks
from thresher.runtime.config import cache_folder
from thresher.runtime.engine import Engine, check_files, make_engine
from thresher.runtime.files import DAMAGED, check_writable, refuse_foreign_files, writing
from thresher.runtime.format import counted
from thresher.runtime.jobs import ArrayJob, Jobs, job_of
from thresher.runtime.places import AnyPath, RemotePath, remove_tree, sizes_in
from thresher.runtime.progress import Advance, Progress, Silent
from thresher.runtime.results import record_in
from thresher.runtime.untrusted import cut, parse_json, read_npz
from thresher.selection import Selection

T = TypeVar("T")
RESULT, SIZES, WIDS = "reshard.json", "sizes.json", "wids.json"
MISSING, SKIPPED = "missing.txt", "set-aside.txt"
CSV, WORK, PLAN, FOUND, JOBS = "train.csv", ".reshard", "plan.json", "found.npz", "jobs"
_LONG = 2.0  # seconds of reading headers from which starting processes is worth it
_KEPT = 2.0  # seconds of finding samples from which what was found is kept for a call that resumes
_REQUESTS = 16  # at once
_AGAIN = f"{AGAIN} with --overwrite"
_SCRATCH = re.compile(r"\..*\.tmp(\.\w+)?")
_OWN = re.compile(
    rf"\d{{8,}}\.(tar|tar\.idx|idx)|\d{{8,}}_stats\.json|train-\d{{5,}}-of-\d{{5,}}\.parquet|{_SCRATCH.pattern}"
)
_PLAN = 3  # version of plans; changes whenever the same plan would write other files
_READING = ("image", "caption", "key", "root", "captions_file", "reader")  # options that written bytes depend on
_MATCHES = 2  # version of the file of what was found


@dataclass(frozen=True, kw_only=True)
class Job:
    """The arguments of a reshard; see :func:`thresher.resharding.reshard`."""

    data: str
    out: str
    form: Form | None = None
    per_shard: int = PER_SHARD
    shuffle: int | None = None
    trainable: bool | None = None
    for_hub: bool = False
    for_energon: bool = False
    for_dali: bool = False
    overwrite: bool = False
    processes: bool = False
    options: DataOptions = field(default_factory=DataOptions)
    engine: Engine | None = None
    shard: ArrayJob | None = None
    selection: str = ""  # where it is, if it was copied


@dataclass(frozen=True, eq=False)
class _Matches:
    """The chosen samples, as found in the data.

    Attributes:
        plan: Plan in the order of the data.
        by: How they were found: "place", "uid" or "key".
        chosen: Samples the selection asks for, repeats included.
        skipped: (file, key, why) of damaged files and of samples that are not copied.
        wanted: The selection, N keys, if samples were found by uid or key.
        seen_N: Which of its keys were found, (N,) bool.
        left_out: Samples of tars that the loader of open_clip leaves out, repeats included, by reason.
        noted: Samples with each of :attr:`thresher.data.Sample.notes`, repeats included; not of tables.
    """

    plan: ReshardPlan
    by: str
    chosen: int
    skipped: list[tuple[str, str, str]]
    wanted: KeySet | None = None
    seen_N: Any = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    noted: Mapping[str, int] = field(default_factory=dict)


def run_job(job: Job, sel: Chosen, workers: int | None, progress: Progress | None) -> Resharded:
    """Run a reshard; see :func:`thresher.resharding.reshard`."""
    progress = progress or Silent()
    engine = job.engine or make_engine("threads", workers)
    data, originals = _opened(job, sel)
    sources = originals.sources
    check_files(engine, lambda: [(source.protocol, source.path) for source in sources])
    form = _form(job.form, data)
    trainable = _trainable(job.trainable, form, data)
    if job.for_hub and form != "parquet":
        raise UsageError(f"--for-hub is for parquet: add --as parquet, or remove it to write {form}")
    if job.for_hub:
        hub.writer_options()
    out = place(job.out)
    readers: dict[str, indexes.Reader] = {
        "--for-energon": energon,
        "--for-dali": dali,
    }  # of tars, which need more files
    wanted = [flag for flag, asked in zip(readers, (job.for_energon, job.for_dali), strict=True) if asked]
    if wanted and form != "webdataset":
        raise UsageError(f"{wanted[0]} is for tars: add --as webdataset, or remove it to write {form}")
    if wanted and isinstance(out, RemotePath):
        raise UsageError(f"{wanted[0]} reads what was written: write to a folder, and copy it to {out}")
    work = _work_folder(out)
    _refuse_overlap(out, data)
    if job.shard is not None and isinstance(out, RemotePath) and _has_two_rounds(job, form, trainable, data):
        raise UsageError(
            f"--shard {job.shard}: these options need files that all jobs share; write to a folder on shared storage, "
            "or without --shard"
        )
    check_writable(out)
    inputs = _inputs(data, sources, sel)
    matches, begin = _load_matches(work / FOUND, inputs, sel), time.monotonic()
    if matches is None:
        matches = _find(data, sources, sel, engine, progress, job)
        originals.check()
    worth_keeping = time.monotonic() - begin >= _KEPT
    if form != data.parts[0].copied_as:
        originals.look_apart(matches.plan, engine, progress)
    options: dict[str, Any] = {"as": form, "per_shard": job.per_shard, "shuffle": job.shuffle}
    options |= {"trainable": True} if trainable else {}
    options |= {"for_hub": True} if job.for_hub else {}
    options |= {name: value for name in _READING if (value := getattr(job.options, name)) is not None}
    digest = matches.plan.digest(_PLAN, options, data.kind, originals.stamps())
    jobs = Jobs(out / WORK / JOBS, f"the folder {out}", {"data": data.kind, **options, "plan": digest})
    with _holding(out, work, digest, jobs, job.shard, overwrite=job.overwrite, say=progress.say) as still_held:
        check_files(engine, lambda: [located(str(out / WORK / PLAN))])
        if (done := _finished(out, digest)) is None:
            if (worth_keeping or job.shard) and not (work / FOUND).exists():
                _save_matches(work / FOUND, inputs, matches)
            shards = _Writing(job, data, form, trainable, originals, matches.plan, digest, out, engine, progress, jobs)
            try:
                written = shards.write()
            except _LaterError:
                assert job.shard is not None  # noqa: S101 - only a job waits for others
                note = f"--shard {job.shard} has done the first of two rounds; run it again after the other jobs"
                return replace(_of_job(job, matches, form, []), notes=(*data.notes, note))
            originals.check(_AGAIN)
            still_held()
            if job.shard is not None:
                done = _of_job(job, matches, form, written.shards)
                return replace(done, notes=(*data.notes, jobs.finish(job.shard, samples=done.samples)))
            done = _finish(job, sel, sources, matches, form, trainable, digest, written)
        ends = data.without_end() if matches.by != "place" else ()  # by place, all samples were found
        notes = [*data.notes, *ends, *noted("sample", done.noted)]
        if wanted and job.shard is None and not isinstance(out, RemotePath):
            names = [one["name"] for one in record_in(out / RESULT)["outputs"]]
            notes += indexes.prepare(out, names, [readers[flag] for flag in wanted], engine)
    return replace(done, notes=tuple(notes))


class _LaterError(Exception):
    """Other jobs have not done what the rest of this one needs."""


def _inputs(data: Data, sources: Sequence[Source], sel: Chosen) -> str:
    """Return a hash of everything that the matches depend on."""
    hashed = hashlib.sha256(
        json.dumps([_PLAN, _MATCHES, data.kind, [(source.path, source.stamp) for source in sources]]).encode()
    )
    if not isinstance(sel, Selection) and os.path.isdir(sel):
        sel = Selection.load(sel)
    if isinstance(sel, Selection):
        hashed.update(json.dumps(sel.header(), default=str).encode())
        for array in (sel.dropped_by, sel.repeats):
            hashed.update(b"" if array is None else np.ascontiguousarray(array).data)
    elif os.path.isfile(sel):
        with open(sel, "rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()


def _load_matches(path: Path, inputs: str, sel: Chosen) -> _Matches | None:
    """Return the matches of an earlier call with the same data and selection, so that headers are read only once."""
    try:
        arrays = read_npz(path)
        meta = parse_json(arrays.pop("meta").tobytes())
        if meta.pop("inputs") != inputs:
            return None
        skipped = [tuple(entry) for entry in meta.pop("aside")]
        seen_N, plan = arrays.pop("seen_N", None), ReshardPlan.of(arrays)
    except (*DAMAGED, OSError, KeyError, zlib.error):  # damaged, or there is no such file
        return None
    return _Matches(plan, skipped=skipped, wanted=None if seen_N is None else read_keys(sel), seen_N=seen_N, **meta)


def _save_matches(path: Path, inputs: str, matches: _Matches) -> None:
    meta = {"inputs": inputs, "by": matches.by, "chosen": matches.chosen, "aside": matches.skipped}
    meta |= {"left_out": dict(matches.left_out), "noted": dict(matches.noted)}
    arrays: dict[str, Any] = {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8), **matches.plan.arrays()}
    if matches.seen_N is not None:
        arrays["seen_N"] = matches.seen_N
    with writing(path) as scratch, open(scratch, "wb") as file:
        np.savez(file, **arrays)


def _opened(job: Job, sel: Chosen) -> tuple[Data, Originals]:
    """Open the data and take their stamps; a single file must not change in between."""
    if os.path.isfile(os.path.join(job.data, "selection.json")):
        raise UsageError(f"{job.data}: is a selection, not data; type thresher reshard DATA SEL -o DIR")
    before = file_stamp("file", job.data) if os.path.isfile(job.data) else None
    data = open_data(job.data, job.options)
    originals = Originals.of(data.parts, sel)
    if before is not None and file_stamp("file", job.data) != before:
        raise changed(job.data)
    return data, originals


def _form(form: Form | None, data: Data) -> Form:
    natural = data.parts[0].copied_as or "webdataset"
    allowed: list[Form] = list(dict.fromkeys([natural, "webdataset", "parquet"]))
    if form is not None and form not in allowed:
        raise UsageError(f"--as {form}: {data.location} is {data.kind}; allowed: {', '.join(allowed)}")
    return form or natural


def _trainable(trainable: bool | None, form: Form, data: Data) -> bool:
    if trainable and form != "webdataset":
        raise UsageError(f"--trainable is for tars: add --as webdataset, or remove it to write {form}")
    return form != data.parts[0].copied_as if trainable is None and form == "webdataset" else bool(trainable)


def _has_two_rounds(job: Job, form: Form, trainable: bool, data: Data) -> bool:
    """Return whether shards are made from files that all jobs write first."""
    if form == "parquet" or form != data.parts[0].copied_as:  # to shuffle, first in the order of the data
        return job.shuffle is not None
    return trainable


def _refuse_overlap(out: AnyPath, data: Data) -> None:
    """Refuse to write into or above the data: shards would become data, or be mixed with it."""
    refuse_inside(data.location, out)
    if isinstance(out, RemotePath):
        protocol, folder = located(out.url)
        around = any(f"{part.path}/".startswith(f"{folder}/") for part in data.parts if part.protocol == protocol)
    else:
        there = os.path.realpath(out) + os.sep
        paths = {os.path.realpath(part.path) for part in data.parts if part.protocol == "file"}
        folders = {path if os.path.isdir(path) else os.path.dirname(path) for path in paths}
        around = any((folder + os.sep).startswith(there) for folder in folders)
    if around:
        raise OutputError(f"{out}: contains the data folder; choose a folder elsewhere")


# --- finding --------------------------------------------------------------------------------------


def _find(data: Data, sources: Sequence[Source], sel: Chosen, engine: Engine, progress: Progress, job: Job) -> _Matches:
    """Find the chosen samples: by place if the pool of the selection has the places, else by uid or key."""
    if not isinstance(sel, Selection) and os.path.isdir(sel):
        sel = Selection.load(sel)
    if isinstance(sel, Selection) and not len(sel):
        raise UsageError("the selection keeps nothing")
    places = places_of(sel, sources)
    if places is not None:
        left_out, notes = Counter[str](), Counter[str]()
        try:
            with progress.task("look up", len(sources), "files") as advance:
                tasks = list(zip(sources, places, strict=True))
                results = _read(sources, _match_places, tasks, engine, job)
                plan, _ = planned(sources, _collect(results, sources, [], left_out, notes, advance), None)
            return _Matches(plan, "place", len(plan), [], left_out=left_out, noted=notes)
        except PlaceError:
            progress.say(f"{data.location}: has changed since it was embedded; looking for samples by key instead")
    if isinstance(sel, Selection) and reopen(sel).layout.key is None:
        raise UsageError(
            f"{sel.pool}: its rows are identified by their numbers, which are not keys of {data.location}, and it does "
            "not have their places; select from a pool that `thresher embed` made of this data, or from one with keys"
        )
    wanted = read_keys(sel)
    if not len(wanted):
        raise UsageError(f"{sel}: keeps nothing")
    by = "uid" if wanted.uids and data.parts[0].has_uids else "key"
    found, by_index = _by_key(by, wanted, sources, engine, progress, job, indexes=True)
    if by_index and not found.seen_N.all():
        missing = counted(int((~found.seen_N).sum()), "key")
        progress.say(f"{data.location}: its indexes do not have {missing}; reading the headers of the tars instead")
        found, _ = _by_key(by, wanted, sources, engine, progress, job, indexes=False)
    if not len(found.plan):
        skipped = found.skipped
        damaged = f"; {skipped[0][0]}: {skipped[0][2]}" if skipped else ""
        keys = counted(len(wanted), "selected key")
        raise PoolError(
            f"{data.location}: has none of {keys}{damaged}; is the selection of other data?{_examples(sources, sel)}"
        )
    return found


def _by_key(
    by: str, wanted: KeySet, sources: Sequence[Source], engine: Engine, progress: Progress, job: Job, *, indexes: bool
) -> tuple[_Matches, bool]:
    """Find the chosen samples by uid or key; return whether an index next to a tar said which samples it has."""
    skipped: list[tuple[str, str, str]] = []
    left_out, notes, by_index = Counter[str](), Counter[str](), False

    def watched(results: Iterator[Matched]) -> Iterator[Matched]:
        nonlocal by_index
        for part in results:
            by_index |= part.by_index
            if part.said:
                progress.say(part.said)
            yield part

    with progress.task("scan", len(sources), "files") as advance:
        results = watched(_read(sources, partial(_match_keys, wanted, indexes), sources, engine, job))
        plan, seen = planned(sources, _collect(results, sources, skipped, left_out, notes, advance), wanted)
    seen[[wanted.find(key) for _, key, _ in skipped if key]] = True  # skipped samples were found too
    return _Matches(plan, by, wanted.total, skipped, wanted, seen, left_out, notes), by_index


def _examples(sources: Sequence[Source], sel: Chosen) -> str:
    """Return an example of the keys of the data and of the selection, "" if no file of the data can be read."""
    chosen = next((key for key, _ in each_key(sel)), "")
    for source in sources:
        scanned = source.part.scan(uids=True)
        if len(scanned.keys):
            uid = scanned.uids[0] if scanned.uids is not None else ""
            forms = difference(chosen, scanned.keys[0]) or difference(chosen, uid)
            and_uid = f" and the uid {cut(uid)!r}" if uid and uid != scanned.keys[0] else ""
            return (
                f" It has keys such as {cut(chosen)!r}, the first sample has {cut(scanned.keys[0])!r}{and_uid}{forms}"
            )
    return ""


def _read(
    sources: Sequence[Source], read: Callable[[T], Matched], tasks: Sequence[T], engine: Engine, job: Job
) -> Iterator[Matched]:
    """Yield the chosen samples of every source, in order.

    Reading headers of local tars is bound by Python's global lock, so more threads would only slow each other down.
    Unless an engine was given, this thread reads them, and processes take over if it would take long.

    Args:
        sources: All sources.
        read: Function that finds the chosen samples of a source; picklable.
        tasks: Its argument for each source.
        engine: Engine that reads all other files.
        job: Says whether an engine was given, and whether processes may be started.
    """
    if job.engine is not None or not all(
        source.part.scanning_is_slow and source.protocol == "file" for source in sources
    ):
        yield from engine.map(read, tasks)
        return
    begin, done, left = time.monotonic(), 0, sum(source.size for source in sources)
    for i, (source, task) in enumerate(zip(sources, tasks, strict=True)):
        if job.processes and engine.workers > 1 and (time.monotonic() - begin) * left > _LONG * done > 0:
            yield from make_engine("processes", engine.workers).map(read, tasks[i:])
            return
        yield read(task)
        done, left = done + source.size, left - source.size


def _collect(
    results: Iterator[Matched],
    sources: Sequence[Source],
    skipped: list[tuple[str, str, str]],
    left_out: Counter[str],
    notes: Counter[str],
    advance: Advance,
) -> Iterator[Matched]:
    """Pass results on; add damaged files and skipped samples to ``skipped``, and the counts of all samples."""
    for source, part in zip(sources, results, strict=True):
        skipped += [(source.path, "", part.damage)] if part.damage else []
        skipped += [(source.path, key, why) for key, why in part.skipped]
        left_out.update(part.left_out)
        notes.update(part.notes)
        advance(1)
        yield part


def _match_keys(wanted: KeySet, indexes: bool, source: Source) -> Matched:
    part = source.part
    if (
        indexes and isinstance(part, TarPart) and not wanted.uids
    ):  # uids are in the json of samples, and not in an index
        return match(part.scan_chosen(lambda keys: np.flatnonzero(wanted.find_many(keys) >= 0)), wanted)
    return match(part.scan(uids=wanted.uids), wanted)


def _match_places(task: tuple[Source, Places | None]) -> Matched:
    source, places = task
    if places is None:
        return NOTHING
    try:
        return match_places(source.part.scan_at(places.at_c), places)
    except PoolError:
        raise PlaceError from None


# --- the folder -----------------------------------------------------------------------------------


@contextmanager
def _holding(
    out: AnyPath,
    work: Path,
    digest: str,
    jobs: Jobs,
    job: ArrayJob | None,
    *,
    overwrite: bool,
    say: Callable[[str], None],
) -> Iterator[Callable[[], None]]:
    """Lock and prepare the folder: resume the same plan, refuse the result of another, or remove it to overwrite.

    Several jobs only lock it to prepare it.

    Yields:
        See :func:`thresher.runtime.locks.holding`.

    Raises:
        OutputError: The folder holds other files, or another process is writing to it.
        UsageError: The other jobs have other options.
    """
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    own = {RESULT, SIZES, WIDS, MISSING, SKIPPED, CSV, WORK, *filter(_OWN.fullmatch, names)}
    if not isinstance(out, RemotePath) and energon.is_own(out):
        own.add(energon.META)
    started = _plan_of(out / RESULT) or _plan_of(out / WORK / PLAN)
    if names - own or (names - {WORK} and not started):
        refuse_foreign_files(out, own if started else (WORK,))
    if (out / WORK).is_symlink():
        raise OutputError(f"{out / WORK}: is a symlink where a folder must be created; remove it")
    if started not in ("", digest) and not overwrite:
        raise OutputError(f"{out}: holds a reshard of other data or options; choose another folder or pass --overwrite")
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be created ({error.strerror}); choose another folder") from None
    with ExitStack() as held:
        lock = locks.holding(out / WORK / locks.LOCK, f"the folder {out}", wait=job is not None, say=say)
        still_held = held.enter_context(lock)
        started = (_plan_of(out / RESULT) or _plan_of(out / WORK / PLAN)) if job is not None else started
        if started != digest:
            for name in names & own - {RESULT, WORK, energon.META}:
                (out / name).unlink(missing_ok=True)
            if energon.META in names & own:
                remove_tree(out / energon.META)
            jobs.remove()
            for folder in {out / WORK, work} if work.is_dir() else (out / WORK,):
                for path in folder.iterdir():
                    if path.name != locks.LOCK:
                        path.unlink()
            (out / RESULT).unlink(missing_ok=True)
        _sweep(out)  # of a killed run
        _write_json(out / WORK / PLAN, {"plan": digest})
        if job is None:
            yield still_held
            _remove_work(out, work)
            return
        if _is_finished(out, digest):
            yield still_held
            _remove_work(out, work)
            return
        jobs.begin(job)
        held.close()  # the jobs write at the same time
        yield held.enter_context(jobs.running(job, say))


def _work_folder(out: AnyPath) -> Path:
    """Return the folder of files from which shards are made: in the cache if the shards are written elsewhere."""
    if not isinstance(out, RemotePath):
        return out / WORK
    return Path(cache_folder()) / "reshard" / hashlib.sha256(out.url.encode()).hexdigest()[:32]


def _sweep(out: AnyPath) -> None:
    """Remove temporary files that killed processes left."""
    if not isinstance(out, RemotePath):  # nothing is left there
        locks.sweep(path for path in out.iterdir() if _SCRATCH.fullmatch(path.name))


def _remove_work(out: AnyPath, work: Path) -> None:
    _sweep(out)  # of workers that were lost
    remove_tree(out / WORK)
    remove_tree(work)


def _plan_of(path: AnyPath) -> str:
    return str(record_in(path).get("plan", ""))


def _write_json(path: AnyPath, content: Any) -> None:
    with writing(path) as scratch:
        Path(scratch).write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")


# --- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Written:
    """What was written.

    Attributes:
        shards: Statistics of each shard.
        changes: "converted", "renamed", "captioned", "blank" and "noted" of :class:`Resharded`.
        skipped: (file, key, why) of samples that were skipped.
    """

    shards: list[dict[str, Any]]
    changes: Mapping[str, Any] = field(default_factory=dict)
    skipped: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True, eq=False)
class _Writing:
    """Writes the missing shards of a plan."""

    job: Job
    data: Data
    form: Form
    trainable: bool
    originals: Originals
    plan: ReshardPlan
    digest: str
    out: AnyPath
    engine: Engine
    progress: Progress
    jobs: Jobs

    @property
    def work(self) -> Path:
        return _work_folder(self.out)

    @property
    def sources(self) -> Sequence[Source]:
        return self.originals.sources

    def write(self) -> _Written:
        """Write all shards, or those of a job.

        Raises:
            ChangedError: The data have changed. No shard that may have been copied from changed data is kept.
            OutputError: Jobs have not finished, or a file that one of them wrote is missing.
            _LaterError: Before its shards, other jobs have to do their share of a first round.
        """
        if self.job.shard is None and self.jobs.of:
            self.jobs.finished()
        if self.form == "webdataset" and self.data.parts[0].copied_as != "webdataset":
            return self._converted()
        if self.trainable:
            return self._fixed()
        plan = self._ordered(self.plan)
        if self.form == "webdataset":
            return _Written(self._all(plan, self.out, _tar_names, partial(_tar, self.sources)))
        if self.form == "csv":
            return _Written(self._all(plan, self.out, lambda _: [CSV], partial(_csv, self.sources)))
        return _Written(self._all(plan, self.out, _parquet_names, self._table(plan)))

    def _fixed(self) -> _Written:
        """Write tars of which the loader of open_clip takes every sample: first those that have to be changed.

        Raises:
            PoolError: It would take none of them.
        """
        samples = {number: np.unique(self.plan.start_M[at]) for number, at in self.plan.by_source()}
        paths = {number: str(self.work / f"{number:08d}.fixed.tar") for number in samples}
        changes, sources = dict[int, Change](), list(self.sources)
        counts, skipped = Counter[str](), list[tuple[str, str, str]]()
        with self.progress.task("check samples", len(self.plan), "samples") as advance:
            numbers = list(samples)
            fix = partial(_fix, self.originals, samples, paths)
            self._first_round(fix, numbers, [f"{paths[number]}.npz" for number in numbers])
            done = self.engine.map(fix, numbers)
            for (number, at), one in zip(self.plan.by_source(), done, strict=True):
                changes[number] = Change(one.start_k, len(sources), one.to_k, one.length_k)
                sources.append(source_of(TarPart(paths[number])))
                counts.update(one.counts(self.plan.start_M[at]))
                skipped += [(self.sources[number].path, key, why) for key, why in one.skipped]
                advance(len(at))
        plan = self._ordered(self.plan.changed(changes, sources))
        if not len(plan):
            path, key, why = skipped[0]
            raise PoolError(
                f"{path}: the sample {visible(key)} {why}, and open_clip can train on none of the "
                f"{counted(len(skipped), 'chosen sample')}; thresher doctor shows what the data contain"
            )
        return _Written(self._all(plan, self.out, _tar_names, partial(_tar, sources)), counts, skipped)

    def _ordered(self, plan: ReshardPlan) -> ReshardPlan:
        return plan if self.job.shuffle is None else plan.shuffled(self.job.shuffle)

    def _table(self, plan: ReshardPlan) -> Callable[[ReshardPlan, str], dict[str, Any]]:
        """Return the function that writes a parquet file; to shuffle, the chosen rows are first spooled to Arrow."""
        schema, group, spools = tables.schema_of(self.sources), tables.group_rows(self.sources), None
        for_hub = None
        if self.job.for_hub:
            roles = self.sources[0].part.roles()
            for_hub = hub.with_features(schema, roles.get("picture") if roles else "image")
            group = tables.group_rows(self.sources, hub.GROUP_ROWS, hub.GROUP_BYTES)
        if self.job.shuffle is not None:
            rows = {number: np.unique(plan.start_M[at]) for number, at in plan.by_source()}
            paths = {number: str(self.work / f"{number:08d}.arrow") for number in rows}
            spool = partial(_spooled, self.originals, rows, schema, paths)
            self._first_round(spool, list(rows), list(paths.values()))
            todo = [number for number in rows if not os.path.exists(paths[number])]
            with self.progress.task("gather", len(plan)) as advance:
                spooled = self.engine.map(spool, todo)
                for number, _ in zip(todo, spooled, strict=True):
                    advance(len(rows[number]))
            spools = tables.Spools(paths, rows)
        return partial(_parquet, self.sources, schema, group, spools, for_hub)

    def _converted(self) -> _Written:
        """Write tars of samples; to shuffle, first in the order of the data, so that tables are read only once."""
        write = partial(_convert, self.sources, self.trainable)
        if self.job.shuffle is None:
            stats = self._all(self.plan, self.out, _tar_names, write)
            return _Written(stats, *_changes(stats))
        stats = self._all(self.plan, self.work, _tar_names, write, "convert", last=False)
        paths = [str(self.work / name) for name in _tar_names(len(stats))]
        sources = [source_of(TarPart(path)) for path in paths]
        scans = [source.part.scan() for source in sources]
        counts = [len(scanned.keys) for scanned in scans]
        plan = ReshardPlan(
            np.repeat(np.arange(len(scans), dtype=np.uint32), counts),
            np.concatenate([scanned.start_n for scanned in scans]),
            np.concatenate([scanned.length_n for scanned in scans]),
            np.zeros(sum(counts), np.int32),
            None,
        )
        done = self._all(self._ordered(plan), self.out, _tar_names, partial(_tar, sources), original=False)
        return _Written(done, *_changes(stats))

    def _all(
        self,
        plan: ReshardPlan,
        folder: AnyPath,
        names: Callable[[int], list[str]],
        write: Callable[[ReshardPlan, str], dict[str, Any]],
        label: str = "write",
        *,
        original: bool = True,
        last: bool = True,
    ) -> list[dict[str, Any]]:
        """Write each part of a plan to a file, with a file of statistics next to it; existing files are kept.

        A job only writes its share.

        Args:
            plan: The plan.
            folder: The folder.
            names: Returns the names of a number of files.
            write: Writes a part of the plan to a path, and returns its statistics.
            label: What the progress says.
            original: Whether the plan is of the original data, which are checked after each file.
            last: Whether these are the shards of the result, and not files from which they are written.
        """
        step = len(plan) if self.form == "csv" else self.job.per_shard
        tasks = [
            (number, name, plan.part(number * step, (number + 1) * step))
            for number, name in enumerate(names(-(-len(plan) // step)) if len(plan) else [])
        ]
        check = partial(self.originals.check_part, again=_AGAIN) if original else None
        shard = partial(_shard, folder, self.digest, write, check)
        if not last:
            self._first_round(shard, tasks, [str(folder / f"{number:08d}_stats.json") for number, _, _ in tasks])
        elif self.job.shard is not None:
            tasks = self.job.shard.share(tasks)
        elif of := self.jobs.of:
            with ThreadPoolExecutor(_REQUESTS) as threads:
                there = list(threads.map(partial(_written, folder, self.digest), tasks))
            lost = [task for task, one in zip(tasks, there, strict=True) if one is None]
            if lost:
                raise self.jobs.missing(f"{lost[0][1]} is missing", _jobs_of([task[0] for task in lost], of), of)
        with self.progress.task(label, len(plan), "samples") as advance:
            stats = []
            for one in self.engine.map(shard, tasks):
                stats.append(one)
                advance(len(tasks[len(stats) - 1][2]))
        return stats

    def _first_round(self, fn: Callable[[T], Any], tasks: Sequence[T], results: Sequence[str]) -> None:
        """Do a job's share of the tasks that all jobs need before they write shards.

        Args:
            fn: Does a task; picklable.
            tasks: The tasks.
            results: The file that exists once a task is done.

        Raises:
            _LaterError: Other jobs have not done their share.
            OutputError: In the merge: a file is missing.
        """
        if isinstance(self.out, RemotePath):
            self.work.mkdir(parents=True, exist_ok=True)
            _write_json(self.work / PLAN, {"plan": self.digest})
            check_files(self.engine, lambda: [("file", str(self.work / PLAN))])
        if self.job.shard is not None:
            for _ in self.engine.map(fn, self.job.shard.share(tasks)):
                pass
        lost = [number for number, path in enumerate(results) if not os.path.exists(path)]
        if lost and self.job.shard is not None:
            raise _LaterError
        if lost and (of := self.jobs.of):
            raise self.jobs.missing(f"{results[lost[0]]} is missing", _jobs_of(lost, of), of)


def _jobs_of(tasks: Iterable[int], of: int) -> list[int]:
    return sorted({job_of(task, of).number for task in tasks})


def _tar_names(count: int) -> list[str]:
    return [f"{number:08d}.tar" for number in range(count)]


def _parquet_names(count: int) -> list[str]:
    return [f"train-{number:05d}-of-{count:05d}.parquet" for number in range(count)]


def _shard(
    folder: AnyPath,
    digest: str,
    write: Callable[[ReshardPlan, str], dict[str, Any]],
    check: Callable[[ReshardPlan], None] | None,
    task: tuple[int, str, ReshardPlan],
) -> dict[str, Any]:
    """Write one file and its statistics, unless both exist; ``check`` raises if the data have changed."""
    _, name, part = task
    if (known := _written(folder, digest, task)) is not None:
        return known
    path = folder / name
    with writing(path) as scratch:
        try:
            stats = write(part, scratch)
        finally:
            if check is not None:
                check(part)  # also if it cannot be read: it may have changed
        stats |= {"bytes": os.path.getsize(scratch), "plan": digest}
    _write_json(_stats_path(folder, task), stats)
    return {**stats, "name": name}


def _written(folder: AnyPath, digest: str, task: tuple[int, str, ReshardPlan]) -> dict[str, Any] | None:
    """Return the statistics of a file that was written by the same plan, None if it was not."""
    path, stats = folder / task[1], record_in(_stats_path(folder, task))
    if stats.get("plan") == digest and path.is_file() and path.stat().st_size == stats.get("bytes"):
        return {**stats, "name": task[1]}
    return None


def _stats_path(folder: AnyPath, task: tuple[int, str, ReshardPlan]) -> AnyPath:
    number, name, _ = task
    return folder / f"{number:08d}_stats.json" if name.endswith(".tar") else folder / WORK / f"{name}.json"


def _tar(sources: Sequence[Source], part: ReshardPlan, path: str) -> dict[str, Any]:
    tars.write(part, sources, path)
    return {"successes": len(part)}


def _convert(sources: Sequence[Source], trainable: bool, part: ReshardPlan, path: str) -> dict[str, Any]:
    done = convert.write(part, sources, path, trainable=trainable)
    stats = {"successes": done.samples, "set_aside": done.skipped, "converted": done.converted, "blank": done.blank}
    stats["noted"] = dict(done.notes)
    return {name: value for name, value in stats.items() if value or name == "successes"}


def _changes(stats: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], list[tuple[str, str, str]]]:
    """Return what the statistics of converted shards say about changes and skipped samples."""
    counts: dict[str, Any] = {name: sum(one.get(name, 0) for one in stats) for name in ("converted", "blank")}
    counts["noted"] = sum((Counter(one.get("noted", {})) for one in stats), Counter[str]())
    return counts, [("", key, why) for one in stats for key, why in one.get("set_aside", [])]


def _fix(originals: Originals, samples: Mapping[int, Ints], paths: Mapping[int, str], number: int) -> Fixed:
    """Write the samples of a tar that have to be changed, and what was changed, unless both exist."""
    path, source = paths[number], originals.sources[number]
    result = f"{path}.npz"
    with suppress(*DAMAGED, OSError, KeyError, zlib.error):
        return Fixed.load(result)
    assert isinstance(source.part, TarPart)  # noqa: S101 - only tars are fixed
    with writing(path) as scratch:
        try:
            done = fixed.write(source.part, samples[number], scratch)
        finally:
            originals.check_sources([number], _AGAIN)  # also if it cannot be read: it may have changed
    done.save(result)
    return done


def _parquet(
    sources: Sequence[Source],
    schema: Any,
    group: int,
    spools: tables.Spools | None,
    for_hub: Any,
    part: ReshardPlan,
    path: str,
) -> dict[str, Any]:
    tables.write(part, sources, schema, group, path, spools, for_hub)
    return {"successes": len(part)}


def _csv(sources: Sequence[Source], part: ReshardPlan, path: str) -> dict[str, Any]:
    csvs.write(part, sources, path)
    return {"successes": len(part)}


def _spooled(originals: Originals, rows: Any, schema: Any, paths: Any, number: int) -> None:
    with writing(paths[number]) as scratch:
        tables.spool(originals.sources[number], rows[number], schema, scratch)
        originals.check_sources([number], _AGAIN)


# --- the end --------------------------------------------------------------------------------------


def _finish(
    job: Job,
    sel: Chosen,
    sources: Sequence[Source],
    matches: _Matches,
    form: Form,
    trainable: bool,
    digest: str,
    written: _Written,
) -> Resharded:
    """Write the files about all shards together, and the result last."""
    out, stats = place(job.out), written.shards
    skipped = [*matches.skipped, *written.skipped]
    _write_lines(out / SKIPPED, ("\t".join(map(_line, entry)) for entry in skipped), bool(skipped))
    missing = 0
    if matches.wanted is not None:
        missing = int((~matches.seen_N).sum())
        _write_lines(out / MISSING, map(_line, _missing(sel, matches.wanted, matches.seen_N)), bool(missing))
    if form == "webdataset":
        _write_json(out / SIZES, {one["name"]: one["successes"] for one in stats})
        shards = [{"url": one["name"], "nsamples": one["successes"], "filesize": one["bytes"]} for one in stats]
        _write_json(out / WIDS, {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards})
    done = Resharded(
        out=job.out,
        form=form,
        shards=len(stats),
        samples=sum(one["successes"] for one in stats),
        chosen=matches.chosen,
        keys=0 if matches.wanted is None else len(matches.wanted),
        missing=missing,
        aside=len(skipped),
        damaged=sum(1 for path, key, _ in matches.skipped if path and not key),
        bytes=sum(one["bytes"] for one in stats),
        by=matches.by,
        left_out={} if trainable or form != "webdataset" else dict(matches.left_out),
        **{**written.changes, "noted": dict(Counter(matches.noted) | Counter(written.changes.get("noted", {})))},
    )
    counts = {name: value for name, value in asdict(done).items() if name not in ("out", "form", "notes")}
    files: dict[str, int] = {}
    for source in sources:
        files[source.path] = source.size
    _write_json(
        out / RESULT,
        {
            "plan": digest,
            "version": __version__,
            "data": job.data,
            "selection": job.selection or (sel.pool if isinstance(sel, Selection) else str(sel)),
            "as": form,
            "per_shard": job.per_shard,
            "shuffle": job.shuffle,
            "trainable": trainable,
            **({"for_hub": True} if job.for_hub else {}),
            **counts,
            "inputs": [{"path": path, "bytes": size} for path, size in files.items()],
            "outputs": [{"name": one["name"], "samples": one["successes"], "bytes": one["bytes"]} for one in stats],
        },
    )
    return done


def _of_job(job: Job, matches: _Matches, form: Form, stats: Sequence[Mapping[str, Any]]) -> Resharded:
    """Return the counts of the shards of one job."""
    return Resharded(
        out=job.out,
        form=form,
        shards=len(stats),
        samples=sum(one["successes"] for one in stats),
        chosen=matches.chosen,
        keys=0,
        missing=0,
        aside=0,
        damaged=0,
        bytes=sum(one["bytes"] for one in stats),
        by=matches.by,
    )


def _is_finished(out: AnyPath, digest: str) -> bool:
    return _plan_of(out / RESULT) == digest


def _finished(out: AnyPath, digest: str) -> Resharded | None:
    """Return the result of an earlier call with the same plan, None if it did not finish or files are missing."""
    result = record_in(out / RESULT)
    if result.get("plan") != digest:
        return None
    there = sizes_in(out)
    for one in result["outputs"]:
        if there.get(one["name"]) != one["bytes"]:
            (out / RESULT).unlink()
            return None
    names = [item.name for item in fields(Resharded) if item.name not in ("out", "form", "notes")]
    if not result.keys() >= set(names):  # of an older version
        return None
    return Resharded(out=str(out), form=result["as"], **{name: result[name] for name in names})


def _missing(sel: Chosen, wanted: KeySet, seen_N: Any) -> Iterator[str]:
    """Yield the keys that were not found, each once."""
    reported_N = seen_N.copy()
    for key, _ in each_key(sel):
        number = wanted.find(key)
        if not reported_N[number]:
            reported_N[number] = True
            yield key


def _line(text: str) -> str:
    """Return a text as one field of a line: tabs and line breaks in it are escaped."""
    return text if text.isprintable() else repr(text)


def _write_lines(path: AnyPath, lines: Iterable[str], any_lines: bool) -> None:
    if not any_lines:
        path.unlink(missing_ok=True)
        return
    with writing(path) as scratch, open(scratch, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(f"{line}\n" for line in lines)
