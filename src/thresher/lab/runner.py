"""Runs a plan: every job that is not done yet, each in a process of its own, as many at a time as fit."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import thresher
from thresher.data import open_data
from thresher.data.location import refuse_inside
from thresher.errors import OutputError, PoolError, UsageError
from thresher.evaluation.sets import read_eval
from thresher.lab.jobs import FREE, Job, bytes_of, check, jobs_of, run_name, samples_of
from thresher.lab.plan import Plan, Trainer
from thresher.lab.results import Run, write_results
from thresher.lab.reuse import reuse
from thresher.lab.work import JOB, OUTPUT, RESULT, TRAIN, is_missing, read_result, write_json
from thresher.runtime import locks
from thresher.runtime.engine import Engine, cores
from thresher.runtime.format import counted, duration
from thresher.runtime.places import local_path
from thresher.runtime.progress import Progress, Silent

LOCK = ".lock"
_ALONE = ("corpus", "trial")  # kinds of jobs that other kinds wait for
_FOR_RUNS = ("trial", "proxy", "reference")  # kinds of jobs that are only needed by runs
_PAUSE = 0.2  # seconds between two looks at the processes


def run_plan(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] = ".",
    workers: int | None = None,
    minutes: float | None = None,
    engine: Engine | None = None,
    others: Sequence[str | os.PathLike[str]] = (),
    progress: Progress | None = None,
) -> list[Run]:
    """Run what is not done yet, and write the results; return the finished runs.

    Args:
        plan: The plan.
        out: Folder of the results. The same call resumes: finished jobs are not repeated, and killed ones continue
            from their last checkpoint, with the same result.
        data: Folder of the data that the plan names by a relative path.
        workers: Runs at the same time; None for the plan's, else for as many as fit the cores.
        minutes: Stop after this time; the same call then continues.
        engine: Start the processes on the workers of an engine, such as Ray, instead of here; all of them must see the
            folder and the data. Not with ``minutes``.
        others: Folders of other plans, or their ``details.json``; finished runs are taken where they are the same, see
            :func:`reuse`.
        progress: Where to report progress.

    Raises:
        UsageError: The plan does not fit the data, or a run failed; its output is in its folder.
        OutputError: The folder has results of another plan, or another process works there.
    """
    if engine is not None and minutes is not None:
        raise UsageError("minutes is for runs on this machine, not for an engine; give one of the two")
    if minutes is not None and not minutes >= 0:
        raise UsageError(f"minutes = {minutes}; give 0 or more")
    folder, progress = Path(os.path.abspath(local_path(out))), progress or Silent()
    plan = located(plan, data)
    plan.check_lengths()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; name a folder")
    if not folder.exists():
        refuse_inside(plan.data.train, folder)
    at_once = workers or plan.trainer.at_once or max(1, cores() // plan.trainer.threads)
    jobs = jobs_of(plan)
    with locks.holding(folder / LOCK, f"the lab {folder}", wait=False) as still_held:
        for job in jobs:
            check(folder, job)
        if others:
            taken = reuse(folder, jobs, others, _precision(plan.trainer), still_held)
            progress.say(f"{counted(len(taken), 'run')} taken from other plans")
        scheduler = _Scheduler(plan, folder, jobs, at_once, minutes, progress, engine, still_held)
        scheduler.run()
        runs = finished(plan, folder)
        if scheduler.failed:
            name, why = next(iter(scheduler.failed.items()))
            raise UsageError(
                f"{counted(len(scheduler.failed), 'job')} failed: {name}: {why}; all of its output is in "
                f"{folder / name / OUTPUT}"
            )
        return runs


def _precision(trainer: Trainer) -> str:
    from thresher.train.loop import device_named, precision_on

    return precision_on(device_named(trainer.device), trainer.precision)


def located(plan: Plan, data: str | os.PathLike[str]) -> Plan:
    """Return the plan with absolute paths; relative ones are below ``data``.

    Raises:
        PoolError: Something is missing.
    """

    def at(path: str) -> str:
        whole = path if "://" in path or os.path.isabs(path) else os.path.join(os.path.abspath(os.fspath(data)), path)
        if is_missing(whole):
            raise PoolError(f"{whole}: does not exist; give the folder of the data with --data, or other data")
        return whole

    sources = plan.data
    off_topic = at(sources.off_topic) if sources.off_topic and any(one.off_topic for one in plan.corpora) else ""
    made = replace(sources, train=at(sources.train), evals=tuple(map(at, sources.evals)), off_topic=off_topic)
    return replace(plan, data=made)


def finished(plan: Plan, folder: Path) -> list[Run]:
    """Return the finished runs of a plan, by corpus, row and seed."""
    return [
        Run(corpus=corpus.name, row=row.name, seed=seed, result=read_result(where, "run"))
        for corpus in plan.corpora
        for row in plan.rows
        for seed in plan.seeds
        if ((where := folder / run_name(corpus.name, row.name, seed)) / RESULT).exists()
    ]


class _Scheduler:
    """Starts jobs as soon as what they need is done and there is room."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        jobs: Sequence[Job],
        at_once: int,
        minutes: float | None,
        progress: Progress,
        engine: Engine | None,
        still_held: Callable[[], None],
    ) -> None:
        self.engine, self.still_held = engine, still_held
        self.plan, self.folder, self.jobs = plan, folder, jobs
        self.at_once, self.progress = at_once, progress
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.waiting = {job.name: job for job in jobs}
        self.running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.promised = False
        self.spent = self.expected = 0.0  # seconds of the jobs done here, and what the trial run promised for them

    def run(self) -> None:
        """Run until everything is done, has failed, or time is up; all processes have ended when it returns."""
        for name in [name for name in self.waiting if (self.folder / name / RESULT).exists()]:
            del self.waiting[name]
            self._mark_done(name)
        needed = {need for job in self.waiting.values() for need in job.needs.values()}
        if any(job.kind == "run" for job in self.waiting.values()):
            needed.add("trial")
        for job in [job for job in self.waiting.values() if job.kind in _FOR_RUNS and job.name not in needed]:
            del self.waiting[job.name]  # the runs that it is for are done
        if self.done and self.waiting:
            self.progress.say(f"{len(self.done):,} of {counted(len(self.jobs), 'job')} done already")
        if self.engine is not None:
            self._run_on(self.engine)
            return
        try:
            while (self.waiting or self.running) and time.monotonic() < self.end:
                changed = self._collect()
                self._start()
                if changed:
                    self.write()
                if not self.running and not self._ready():
                    break
                if not changed:
                    time.sleep(_PAUSE)
        finally:
            for process, _ in self.running.values():
                process.kill()
                process.wait()
            self.write()
        if time.monotonic() >= self.end and (self.waiting or self.running):
            left = len(self.waiting) + len(self.running)
            self.progress.say(f"time is up: {counted(left, 'job is', 'jobs are')} left; the same command continues")

    def _run_on(self, engine: Engine) -> None:
        """Run on the workers of an engine, in steps: what is ready at the same time, corpora and the trial alone."""
        while ready := self._ready():
            first = [job for job in ready if job.kind in _ALONE]
            step = [job for job in ready if job.kind == first[0].kind] if first else ready
            self._promise()
            for job in step:
                del self.waiting[job.name]
            folders = [str(prepare(self.folder, job, self.plan, self.at_once)) for job in step]
            tasks = [(folder, self.plan.trainer.threads) for folder in folders]
            for job, code in zip(step, engine.map(_run_elsewhere, tasks), strict=True):
                if code == 0 and (self.folder / job.name / RESULT).exists():
                    self._mark_done(job.name)
                    self.progress.say(f"{job.name}: done")
                else:
                    self._fail(job.name, _why(self.folder / job.name / OUTPUT, code))
                self.write()

    def _ready(self) -> list[Job]:
        return [job for job in self.waiting.values() if set(job.needs.values()) <= self.done]

    def _start(self) -> None:
        # The trial runs alone: it is timed.
        if "trial" in self.running:
            return
        for job in self._ready():
            if len(self.running) >= self.at_once:
                return
            if job.kind == "trial" and self.running:
                continue
            if job.kind not in ("corpus", "trial") and "trial" in self.waiting:
                continue
            if job.kind != "corpus" and any(name.startswith("corpora/") for name in (*self.waiting, *self.running)):
                continue  # corpora first: their rows are needed to say what the plan will cost
            self._promise()
            del self.waiting[job.name]
            self.running[job.name] = (start(self.folder, job, self.plan, self.at_once), time.monotonic())
            if job.kind == "trial":
                return

    def _collect(self) -> bool:
        """Take over the results of processes that have ended; return whether there were any."""
        changed = False
        for name, (process, began) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[name]
            changed = True
            spent = time.monotonic() - began
            if process.returncode == 0 and (self.folder / name / RESULT).exists():
                self._mark_done(name)
                self._measure(name, spent)
                self.progress.say(f"{name}: done in {duration(spent)}{self._left()}")
            else:
                self._fail(name, _why(self.folder / name / OUTPUT, process.returncode))
        return changed

    def _mark_done(self, name: str) -> None:
        """Mark a job as done; with the rows of a corpus, check that policies can leave out their shares."""
        self.done.add(name)
        for corpus in self.plan.corpora:
            if name == f"corpora/{corpus.name}":
                self.plan.check_lengths(read_result(self.folder / name, "corpus")["rows"])

    def _measure(self, name: str, spent: float) -> None:
        """Compare the time of a finished job with what was expected, for the times that are shown from now on."""
        if "trial" in self.done and (expected := self._cost([job for job in self.jobs if job.name == name])):
            self.spent, self.expected = self.spent + spent, self.expected + expected

    def _fail(self, name: str, why: str) -> None:
        self.failed[name] = why
        self.progress.say(f"{name}: failed: {why}")
        for job in list(self.waiting.values()):
            if name in job.needs.values() and self.waiting.pop(job.name, None) is not None:
                self._fail(job.name, f"needs {name}, which failed")

    def _promise(self) -> None:
        """Say what the plan will cost, once it is known."""
        if self.promised or "trial" in self.waiting or "trial" not in self.done:
            return
        self.promised = True
        trial, left = read_result(self.folder / "trial", "trial"), self._cost(self.waiting.values())
        runs = sum(job.kind == "run" for job in self.waiting.values())
        self.progress.say(
            f"{self.plan.name}: {counted(runs, 'run')} to do, {trial['samples_per_second']:,.0f} samples/s in the "
            f"trial run: about {duration(left / self.at_once)} with {counted(self.at_once, 'run')} at a time"
        )

    def _cost(self, jobs: Any) -> float:
        """Return about how many seconds jobs take, one after the other."""
        trial = read_result(self.folder / "trial", "trial")
        total = 0.0
        for job in jobs:
            if job.kind in ("corpus", "trial"):
                continue
            rows = (
                read_result(self.folder / job.needs["corpus"], "corpus")["rows"]
                if job.needs["corpus"] in self.done
                else 0
            )
            total += trial["other_seconds"] + samples_of(self.plan, job, rows) / trial["samples_per_second"]
        return total

    def _left(self) -> str:
        if "trial" not in self.done or not (self.waiting or self.running):
            return ""
        every = {job.name: job for job in self.jobs}
        left = self._cost([*self.waiting.values(), *(every[name] for name in self.running)]) / self.at_once
        left *= self.spent / self.expected if self.expected else 1.0
        total = len(self.jobs)
        return f"; {len(self.done):,} of {total:,} done, about {duration(left)} left"

    def write(self) -> None:
        """Write the results of what is finished."""
        self.still_held()
        runs = finished(self.plan, self.folder)
        corpora = {
            corpus.name: {
                name: value for name, value in read_result(where, "corpus").items() if name not in ("data", "evals")
            }
            for corpus in self.plan.corpora
            if ((where := self.folder / f"corpora/{corpus.name}") / RESULT).exists()
        }
        trial = read_result(self.folder / "trial", "trial") if "trial" in self.done else None
        total = len(self.plan.corpora) * len(self.plan.rows) * len(self.plan.seeds)
        extra = {
            "corpora": corpora, "trial": trial, "missing": total - len(runs),
            "version": thresher.__version__, "data_bytes": bytes_of(self.plan.data),
        }  # fmt: skip
        write_results(_named(self.plan), runs, self.folder, extra)


def _named(plan: Plan) -> Plan:
    """Return the plan with the names of its data instead of their paths."""
    name = os.path.basename
    sources = plan.data
    made = replace(
        sources, train=name(sources.train), evals=tuple(map(name, sources.evals)), off_topic=name(sources.off_topic)
    )
    return replace(plan, data=made)


def prepare(folder: Path, job: Job, plan: Plan, at_once: int) -> Path:
    """Write the ``job.json`` of a job, one of ``at_once`` at a time; return its folder."""
    where: dict[str, Any] = {"results": {purpose: str(folder / name) for purpose, name in job.needs.items()}}
    if job.kind == "corpus":
        where |= {"data": plan.data.train, "evals": list(plan.data.evals), "off_topic": plan.data.off_topic}
    else:
        # Found again below the folder, which may have been moved since the corpus was made.
        home = folder / job.needs["corpus"]
        made, corpus = read_result(home, "corpus"), next(one for one in plan.corpora if one.name == job.corpus)
        data = str(home / TRAIN) if corpus.changed else plan.data.train
        where |= {"data": data, "evals": [str(home / name) for name in made["evals"]], "rows": made["rows"]}
    own = folder / job.name
    own.mkdir(parents=True, exist_ok=True)
    free = {**{name: getattr(plan.trainer, name) for name in FREE}, "at_once": at_once}
    write_json(own / JOB, {"what": job.what, "where": where, "free": free})
    return own


def start(folder: Path, job: Job, plan: Plan, at_once: int) -> subprocess.Popen[bytes]:
    """Start the process of a job; it ends when this process ends."""
    return _started(prepare(folder, job, plan, at_once), plan.trainer.threads)


def _run_elsewhere(task: tuple[str, int]) -> int:
    """Run the job of a folder with some threads in a process, wherever this is called; return its exit code."""
    process = _started(Path(task[0]), task[1])
    try:
        return process.wait()
    finally:
        process.kill()


def _started(own: Path, count: int) -> subprocess.Popen[bytes]:
    """Start the process of the job in a folder."""
    source, threads = str(Path(thresher.__file__).parents[1]), str(count)
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    env["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(own / OUTPUT, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "thresher.lab.work", str(own)],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=env,
        )  # fmt: skip


def _why(output: Path, code: int) -> str:
    """Return the last line that a process printed."""
    lines: list[str] = []
    with suppress(OSError):
        lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1].removeprefix("error: ") if lines else "it printed nothing"
    return f"{last[:500]}" if code > 0 else f"it was ended by signal {-code}"


# --- dry run --------------------------------------------------------------------------------------


def described(plan: Plan, data: str | os.PathLike[str] = ".") -> dict[str, Any]:
    """Return what a plan would do, without doing it: of the data only captions and labels to evaluate on are read.

    Returns:
        "jobs", a list of folder, kind and samples as a share of a full run; "runs", their number; "rows", those of the
        data as far as their files say it, else None.

    Raises:
        UsageError, PoolError: The plan cannot run on these data.
    """
    plan = located(plan, data)
    plan.check_lengths()
    for path in plan.data.evals:
        read_eval(path, group=plan.evaluation.group, labels=plan.evaluation.labels or None)
    opened = open_data(plan.data.train)
    counts = [part.rows for part in opened.parts]
    rows = None if any(count is None for count in counts) else sum(count or 0 for count in counts)
    jobs = jobs_of(plan)
    listed: list[dict[str, Any]] = [
        {"name": job.name, "kind": job.kind, "of_a_full_run": round(samples_of(plan, job, 1) / plan.trainer.epochs, 4)}
        for job in jobs
    ]
    return {
        "plan": plan.name,
        "profile": plan.profile,
        "data": plan.data.train,
        "kind": opened.kind,
        "rows": rows,
        "evals": list(plan.data.evals),
        "seeds": list(plan.seeds),
        "runs": sum(job.kind == "run" for job in jobs),
        "full_runs": round(sum(one["of_a_full_run"] for one in listed), 2),
        "jobs": listed,
    }
