"""Resharding from end to end: scan, plan, write what is not there yet, finish."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from thresher import __version__
from thresher.data import Data, DataOptions, Part, open_data
from thresher.data.layouts.webdataset import TarPart
from thresher.errors import OutputError, PoolError, UsageError
from thresher.export.keys import Chosen, KeySet, each_key, read_keys
from thresher.io.open import open_file, trusting
from thresher.pool.store import reopen
from thresher.reshard import PER_SHARD, Form, Resharded, convert, csvs, tables, tars
from thresher.reshard.plan import (
    NOTHING,
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
from thresher.runtime.engine import Engine, make_engine
from thresher.runtime.files import DAMAGED, check_writable, refuse_foreign_files, writing
from thresher.runtime.progress import Advance, Progress, Silent
from thresher.selection import Selection

T = TypeVar("T")
RESULT, SIZES, MISSING, ASIDE = "reshard.json", "sizes.json", "missing.txt", "set-aside.txt"
CSV, WORK, PLAN, FOUND = "train.csv", ".reshard", "plan.json", "found.npz"
_LONG = 2.0  # seconds of reading headers that are worth starting processes for
_SCRATCH = re.compile(r"\..*\.tmp(\.\w+)?")
_OWN = re.compile(rf"\d{{8,}}\.tar|\d{{8,}}_stats\.json|train-\d{{5,}}-of-\d{{5,}}\.parquet|{_SCRATCH.pattern}")
_PLAN = 2  # format of plans: another number where the same plan would make other files


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked; see :func:`thresher.reshard.reshard`."""

    data: str
    out: str
    form: Form | None = None
    per_shard: int = PER_SHARD
    shuffle: int | None = None
    overwrite: bool = False
    processes: bool = False
    options: DataOptions = field(default_factory=DataOptions)


@dataclass(frozen=True, eq=False)
class _Found:
    """What was found in the data.

    Attributes:
        plan: In the order of the data.
        by: "place", "uid" or "key".
        chosen: Samples the selection asked for.
        aside: (file, key, why) of damaged files and of samples that are not copied.
        wanted: The selection, N keys, where samples were found by uid or key.
        seen_N: Which of its keys were found.
    """

    plan: ReshardPlan
    by: str
    chosen: int
    aside: list[tuple[str, str, str]]
    wanted: KeySet | None = None
    seen_N: Any = None


def carry_out(job: Job, sel: Chosen, workers: int | None, progress: Progress | None) -> Resharded:
    """Do it."""
    progress = progress or Silent()
    engine = make_engine("threads", workers)
    data = _opened(job)
    form = _form(job.form, data)
    out = Path(job.out)
    _apart(out, data)
    check_writable(out)
    sources = [_source(part) for part in data.parts]
    inputs = _inputs(data, sources, sel)
    found = _remembered(out / WORK / FOUND, inputs, sel)
    if found is None:
        found = _find(data, sources, sel, engine, progress, processes=job.processes)
    asked = {"as": form, "per_shard": job.per_shard, "shuffle": job.shuffle}
    digest = found.plan.digest(_PLAN, asked, data.kind, [source.stamp for source in sources])
    with _holding(out, digest, progress.say, overwrite=job.overwrite):
        if (done := _finished(out, digest)) is None:
            if not (out / WORK / FOUND).exists():
                _remember(out / WORK / FOUND, inputs, found)
            told = _Writing(job, data, form, sources, found.plan, digest, out, engine, progress).carry_out()
            done = _finish(job, sel, sources, found, form, digest, told)
    return done


def _inputs(data: Data, sources: list[Source], sel: Chosen) -> str:
    """Return a hash of all that decides which samples are found where."""
    found = hashlib.sha256(json.dumps([_PLAN, data.kind, [(source.path, source.stamp) for source in sources]]).encode())
    if not isinstance(sel, Selection) and os.path.isdir(sel):
        sel = Selection.load(sel)
    if isinstance(sel, Selection):
        found.update(json.dumps(sel.header(), default=str).encode())
        for array in (sel.dropped_by, sel.repeats):
            found.update(b"" if array is None else np.ascontiguousarray(array).data)
    elif os.path.isfile(sel):
        with open(sel, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _remembered(path: Path, inputs: str, sel: Chosen) -> _Found | None:
    """Return what an earlier call found in the same data for the same selection: headers are read once."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        told = json.loads(arrays.pop("told").tobytes())
        if told.pop("inputs") != inputs:
            return None
        aside = [tuple(entry) for entry in told.pop("aside")]
        seen_N, plan = arrays.pop("seen_N", None), ReshardPlan.of(arrays)
    except (*DAMAGED, OSError, KeyError, zlib.error):  # or not there
        return None
    return _Found(plan, aside=aside, wanted=None if seen_N is None else read_keys(sel), seen_N=seen_N, **told)


def _remember(path: Path, inputs: str, found: _Found) -> None:
    told = {"inputs": inputs, "by": found.by, "chosen": found.chosen, "aside": found.aside}
    arrays: dict[str, Any] = {"told": np.frombuffer(json.dumps(told).encode(), np.uint8), **found.plan.arrays()}
    if found.seen_N is not None:
        arrays["seen_N"] = found.seen_N
    with writing(path) as scratch, open(scratch, "wb") as file:
        np.savez(file, **arrays)


def _opened(job: Job) -> Data:
    if os.path.isfile(os.path.join(job.data, "selection.json")):
        raise UsageError(f"{job.data}: is a selection, where data are to be; type thresher reshard DATA SEL -o DIR")
    return open_data(job.data, job.options)


def _form(asked: Form | None, data: Data) -> Form:
    natural = data.parts[0].copied_as or "webdataset"
    allowed: list[Form] = list(dict.fromkeys([natural, "webdataset", "parquet"]))
    if asked is not None and asked not in allowed:
        raise UsageError(f"--as {asked}: {data.location} is {data.kind}, of which {' or '.join(allowed)} is made")
    return asked or natural


def _apart(out: Path, data: Data) -> None:
    """Refuse to write into the data, or above them: shards would become data, or stand among them."""
    there = os.path.realpath(out) + os.sep
    paths = {os.path.realpath(part.path) for part in data.parts if part.protocol == "file"}
    folders = {path if os.path.isdir(path) else os.path.dirname(path) for path in paths}
    inside = os.path.isdir(data.location) and there.startswith(os.path.realpath(data.location) + os.sep)
    if inside or any((folder + os.sep).startswith(there) for folder in folders):
        raise OutputError(f"{out}: lies in the data, or they lie in it; choose a folder elsewhere")


def _source(part: Part) -> Source:
    if part.protocol == "file":
        size = os.path.getsize(part.path) if os.path.isfile(part.path) else 0
        return Source(part.path, part.protocol, size, part, _stamp(part))
    try:
        with open_file(part.protocol, part.path) as file:
            size = trusting(part.path, lambda: file.seek(0, os.SEEK_END))
    except PoolError:
        size = -1  # told as damage when it is read
    return Source(part.path, part.protocol, size, part, _stamp(part))


def _stamp(part: Part) -> tuple[Any, ...]:
    try:
        return tuple(part.stamp())
    except PoolError:  # told as damage when it is read
        return ()


# --- finding --------------------------------------------------------------------------------------


def _find(
    data: Data, sources: list[Source], sel: Chosen, engine: Engine, progress: Progress, *, processes: bool
) -> _Found:
    """Find the chosen samples: by place where the pool of the selection knows them, else by uid or key."""
    if not isinstance(sel, Selection) and os.path.isdir(sel):
        sel = Selection.load(sel)
    if isinstance(sel, Selection) and not len(sel):
        raise UsageError("the selection keeps nothing")
    places = places_of(sel, sources)
    if places is not None:
        try:
            with progress.task("look up", len(sources), "files") as advance:
                tasks = list(zip(sources, places, strict=True))
                found = _read(sources, _placed, tasks, engine, processes=processes)
                plan, _ = planned(sources, _noted(found, sources, [], advance), None)
            return _Found(plan, "place", len(plan), [])
        except PlaceError:
            progress.say(f"{data.location}: has changed since it was embedded; samples are looked for by their keys")
    if isinstance(sel, Selection) and reopen(sel).layout.key is None:
        raise UsageError(
            f"{sel.pool}: its rows go by their numbers, which are no keys of {data.location}, and it does not know "
            "their places; select from a pool that `thresher embed` made of these data, or from one with keys"
        )
    wanted = read_keys(sel)
    if not len(wanted):
        raise UsageError(f"{sel}: keeps nothing")
    aside: list[tuple[str, str, str]] = []
    with progress.task("scan", len(sources), "files") as advance:
        found = _read(sources, partial(_matched, wanted), sources, engine, processes=processes)
        plan, seen = planned(sources, _noted(found, sources, aside, advance), wanted)
    seen[[wanted.find(key) for _, key, _ in aside if key]] = True  # they were found
    if not len(plan):
        damaged = f"; {aside[0][0]}: {aside[0][2]}" if aside else ""
        raise PoolError(f"{data.location}: has none of the {len(wanted):,} keys chosen{damaged}; are they other data?")
    return _Found(plan, "uid" if wanted.uids and data.parts[0].has_uids else "key", wanted.total, aside, wanted, seen)


def _read(
    sources: list[Source], read: Callable[[T], Matched], tasks: list[T], engine: Engine, *, processes: bool
) -> Iterator[Matched]:
    """Yield what is found in every source, in order.

    With tars that are at hand it is Python that takes the time, and in one process one thread at a time: more would
    only be in each other's way. So this thread reads, until it is seen that it would go on for long.

    Args:
        sources: All of them.
        read: What finds it; picklable.
        tasks: What that is given for each source.
        engine: Where other files are read.
        processes: Whether processes may be started.
    """
    if not all(source.part.scanning_is_slow and source.protocol == "file" for source in sources):
        yield from engine.map(read, tasks)
        return
    begin, done, left = time.monotonic(), 0, sum(source.size for source in sources)
    for i, (source, task) in enumerate(zip(sources, tasks, strict=True)):
        if processes and engine.workers > 1 and (time.monotonic() - begin) * left > _LONG * done > 0:
            yield from make_engine("processes", engine.workers).map(read, tasks[i:])
            return
        yield read(task)
        done, left = done + source.size, left - source.size


def _noted(
    found: Iterator[Matched], sources: list[Source], aside: list[tuple[str, str, str]], advance: Advance
) -> Iterator[Matched]:
    """Hand on what was found, and note what was not to be had."""
    for source, part in zip(sources, found, strict=True):
        aside += [(source.path, "", part.damage)] if part.damage else []
        aside += [(source.path, key, why) for key, why in part.aside]
        advance(1)
        yield part


def _matched(wanted: KeySet, source: Source) -> Matched:
    return match(source.part.scan(uids=wanted.uids), wanted)


def _placed(task: tuple[Source, Places | None]) -> Matched:
    source, places = task
    if places is None:
        return NOTHING
    try:
        return match_places(source.part.scan_at(places.at_c), places)
    except PoolError:
        raise PlaceError from None


# --- the folder -----------------------------------------------------------------------------------


@contextmanager
def _holding(out: Path, digest: str, say: Callable[[str], None], *, overwrite: bool) -> Iterator[None]:
    """Make the folder ready: go on with what was begun by the same plan, refuse or remove what others left.

    Raises:
        OutputError: It holds something else, or another process is writing there.
    """
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    own = {RESULT, SIZES, MISSING, ASIDE, CSV, WORK, *filter(_OWN.fullmatch, names)}
    begun = _plan_of(out / RESULT) or _plan_of(out / WORK / PLAN)
    if names - own or (names - {WORK} and not begun):
        refuse_foreign_files(out, own if begun else (WORK,))
    if (out / WORK).is_symlink():
        raise OutputError(f"{out / WORK}: is a link, where a folder is to be made; remove it")
    if begun not in ("", digest) and not overwrite:
        raise OutputError(f"{out}: holds a reshard of other data or options; choose another folder or pass --overwrite")
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror}); choose another place") from None
    with locks.holding(out / WORK / locks.LOCK, f"the folder {out}", wait=False) as locked:
        if not locked:
            say(f"{out}: {locks.NO_LOCKS}")
        if begun != digest:
            for name in names & own - {RESULT, WORK}:
                (out / name).unlink(missing_ok=True)
            for path in (out / WORK).iterdir():
                if path.name != locks.LOCK:
                    path.unlink()
            (out / RESULT).unlink(missing_ok=True)
        locks.sweep(out / name for name in filter(_SCRATCH.fullmatch, names))  # of a run that was killed
        _write_json(out / WORK / PLAN, {"plan": digest})
        yield
        shutil.rmtree(out / WORK, ignore_errors=True)


def _plan_of(path: Path) -> str:
    return str(_json(path).get("plan", ""))


def _json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _write_json(path: Path, told: Any) -> None:
    with writing(path) as scratch:
        Path(scratch).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Writing:
    """Writes the shards of a plan that are not there yet."""

    job: Job
    data: Data
    form: Form
    sources: list[Source]
    plan: ReshardPlan
    digest: str
    out: Path
    engine: Engine
    progress: Progress

    def carry_out(self) -> list[dict[str, Any]]:
        """Write all shards; returns what is told of each."""
        if self.form == "webdataset" and self.data.parts[0].copied_as != "webdataset":
            return self._converted()
        plan = self._ordered(self.plan)
        if self.form == "webdataset":
            return self._all(plan, self.out, _tar_names, partial(_tar, self.sources))
        if self.form == "csv":
            return self._all(plan, self.out, lambda _: [CSV], partial(_csv, self.sources))
        return self._all(plan, self.out, _parquet_names, self._table(plan))

    def _ordered(self, plan: ReshardPlan) -> ReshardPlan:
        return plan if self.job.shuffle is None else plan.shuffled(self.job.shuffle)

    def _table(self, plan: ReshardPlan) -> Callable[[ReshardPlan, str], dict[str, Any]]:
        """Return what writes a parquet file; to shuffle, the chosen rows are first gathered in Arrow files."""
        schema, group, spools = tables.schema_of(self.sources), tables.group_rows(self.sources), None
        if self.job.shuffle is not None:
            rows = {number: np.unique(plan.start_M[at]) for number, at in plan.by_source()}
            paths = {number: str(self.out / WORK / f"{number:08d}.arrow") for number in rows}
            todo = [number for number in rows if not os.path.exists(paths[number])]
            with self.progress.task("gather", len(plan)) as advance:
                spooled = self.engine.map(partial(_spooled, self.sources, rows, schema, paths), todo)
                for number, _ in zip(todo, spooled, strict=True):
                    advance(len(rows[number]))
            spools = tables.Spools(paths, rows)
        return partial(_parquet, self.sources, schema, group, spools)

    def _converted(self) -> list[dict[str, Any]]:
        """Write tars of samples; to shuffle, first in the order of the data, so that tables are read only once."""
        write = partial(_convert, self.sources)
        if self.job.shuffle is None:
            return self._all(self.plan, self.out, _tar_names, write)
        told = self._all(self.plan, self.out / WORK, _tar_names, write, "convert")
        paths = [str(self.out / WORK / name) for name in _tar_names(len(told))]
        sources = [_source(TarPart(path)) for path in paths]
        found = [source.part.scan() for source in sources]
        counts = [len(part.keys) for part in found]
        plan = ReshardPlan(
            np.repeat(np.arange(len(found), dtype=np.uint32), counts),
            np.concatenate([part.start_n for part in found]),
            np.concatenate([part.length_n for part in found]),
            np.zeros(sum(counts), np.int32),
            None,
        )
        done = self._all(self._ordered(plan), self.out, _tar_names, partial(_tar, sources))
        aside = [entry for one in told for entry in one.get("set_aside", [])]
        return [{**done[0], "set_aside": aside}, *done[1:]] if done else told

    def _all(
        self,
        plan: ReshardPlan,
        folder: Path,
        names: Callable[[int], list[str]],
        write: Callable[[ReshardPlan, str], dict[str, Any]],
        label: str = "write",
    ) -> list[dict[str, Any]]:
        """Write each piece of a plan to a file, and what is told of it beside it; passes over those that are there."""
        step = len(plan) if self.form == "csv" else self.job.per_shard
        tasks = [
            (number, name, plan.part(number * step, (number + 1) * step))
            for number, name in enumerate(names(-(-len(plan) // step)) if len(plan) else [])
        ]
        with self.progress.task(label, len(plan), "samples") as advance:
            told = []
            for one in self.engine.map(partial(_shard, folder, self.digest, write), tasks):
                told.append(one)
                advance(len(tasks[len(told) - 1][2]))
        return told


def _tar_names(count: int) -> list[str]:
    return [f"{number:08d}.tar" for number in range(count)]


def _parquet_names(count: int) -> list[str]:
    return [f"train-{number:05d}-of-{count:05d}.parquet" for number in range(count)]


def _shard(
    folder: Path, digest: str, write: Callable[[ReshardPlan, str], dict[str, Any]], task: tuple[int, str, ReshardPlan]
) -> dict[str, Any]:
    """Write one file and what is told of it, unless both are there."""
    number, name, part = task
    path = folder / name
    stats = folder / f"{number:08d}_stats.json" if name.endswith(".tar") else folder / WORK / f"{name}.json"
    told = _json(stats)
    if told.get("plan") == digest and path.is_file() and path.stat().st_size == told.get("bytes"):
        return {**told, "name": name}
    with writing(path) as scratch:
        told = write(part, scratch)
        told |= {"bytes": os.path.getsize(scratch), "plan": digest}
    _write_json(stats, told)
    return {**told, "name": name}


def _tar(sources: list[Source], part: ReshardPlan, path: str) -> dict[str, Any]:
    tars.write(part, sources, path)
    return {"successes": len(part)}


def _convert(sources: list[Source], part: ReshardPlan, path: str) -> dict[str, Any]:
    samples, aside = convert.write(part, sources, path)
    return {"successes": samples, "set_aside": aside} if aside else {"successes": samples}


def _parquet(
    sources: list[Source], schema: Any, group: int, spools: tables.Spools | None, part: ReshardPlan, path: str
) -> dict[str, Any]:
    tables.write(part, sources, schema, group, path, spools)
    return {"successes": len(part)}


def _csv(sources: list[Source], part: ReshardPlan, path: str) -> dict[str, Any]:
    csvs.write(part, sources, path)
    return {"successes": len(part)}


def _spooled(sources: list[Source], rows: Any, schema: Any, paths: Any, number: int) -> None:
    with writing(paths[number]) as scratch:
        tables.spool(sources[number], rows[number], schema, scratch)


# --- the end --------------------------------------------------------------------------------------


def _finish(
    job: Job,
    sel: Chosen,
    sources: list[Source],
    found: _Found,
    form: Form,
    digest: str,
    told: list[dict[str, Any]],
) -> Resharded:
    """Write what belongs to the shards as a whole, and at last the result."""
    out = Path(job.out)
    aside = [*found.aside, *(("", key, why) for one in told for key, why in one.get("set_aside", []))]
    _write_lines(out / ASIDE, ("\t".join(map(_line, entry)) for entry in aside), bool(aside))
    missing = 0
    if found.wanted is not None:
        missing = int((~found.seen_N).sum())
        _write_lines(out / MISSING, map(_line, _missing(sel, found.wanted, found.seen_N)), bool(missing))
    if form == "webdataset":
        _write_json(out / SIZES, {one["name"]: one["successes"] for one in told})
    done = Resharded(
        out=job.out,
        form=form,
        shards=len(told),
        samples=sum(one["successes"] for one in told),
        chosen=found.chosen,
        missing=missing,
        aside=len(aside),
        bytes=sum(one["bytes"] for one in told),
        by=found.by,
    )
    counts = {name: value for name, value in asdict(done).items() if name not in ("out", "form")}
    files: dict[str, int] = {}
    for source in sources:
        files[source.path] = source.size
    _write_json(
        out / RESULT,
        {
            "plan": digest,
            "version": __version__,
            "data": job.data,
            "selection": sel.pool if isinstance(sel, Selection) else str(sel),
            "as": form,
            "per_shard": job.per_shard,
            "shuffle": job.shuffle,
            **counts,
            "inputs": [{"path": path, "bytes": size} for path, size in files.items()],
            "outputs": [{"name": one["name"], "samples": one["successes"], "bytes": one["bytes"]} for one in told],
        },
    )
    return done


def _finished(out: Path, digest: str) -> Resharded | None:
    """Return what an earlier call of the same finished, None where it did not, or files are gone."""
    told = _json(out / RESULT)
    if told.get("plan") != digest:
        return None
    for one in told["outputs"]:
        path = out / one["name"]
        if not path.is_file() or path.stat().st_size != one["bytes"]:
            (out / RESULT).unlink()
            return None
    names = [item.name for item in fields(Resharded) if item.name not in ("out", "form")]
    return Resharded(out=str(out), form=told["as"], **{name: told[name] for name in names})


def _missing(sel: Chosen, wanted: KeySet, seen_N: Any) -> Iterator[str]:
    """Yield the keys that were not found, each once."""
    told_N = seen_N.copy()
    for key, _ in each_key(sel):
        number = wanted.find(key)
        if not told_N[number]:
            told_N[number] = True
            yield key


def _line(text: str) -> str:
    """Return a text as part of a line: tabs and line breaks of its own would be taken for the list's."""
    return text if text.isprintable() else repr(text)


def _write_lines(path: Path, lines: Iterable[str], there: bool) -> None:
    if not there:
        path.unlink(missing_ok=True)
        return
    with writing(path) as scratch, open(scratch, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(f"{line}\n" for line in lines)
