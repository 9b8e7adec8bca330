"""Jobs that share the work of one command: N processes on any machines, started by any scheduler (``--shard I/N``).

They run in any order, at any time, and again after a kill. A job does its share of the tasks and then writes a
completion manifest into a folder of the result. The same command without ``--shard`` checks that all manifests and all
files are there, and merges. The folder also records N and the options of the command, so that jobs of different
commands do not mix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from thresher.errors import OutputError, UsageError
from thresher.runtime.files import writing
from thresher.runtime.locks import holding
from thresher.runtime.places import AnyPath, remove_tree
from thresher.runtime.results import record_in

T = TypeVar("T")

MOST = 100_000  # jobs
_NAMED = 8  # in a message


@dataclass(frozen=True)
class ArrayJob:
    """One of the jobs that share the work of a command.

    Attributes:
        number: Its number, from 1 to ``of``.
        of: How many jobs there are.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        """Validate the numbers."""
        if not 1 <= self.of <= MOST:
            raise UsageError(f"--shard {self}: N must be from 1 to {MOST:,}")
        if not 1 <= self.number <= self.of:
            hint = "; jobs are numbered from 1: with Slurm, --array=1-N" if self.number == 0 else ""
            raise UsageError(f"--shard {self}: I must be from 1 to {self.of}{hint}")

    def __str__(self) -> str:
        """Return the job as it is typed: "3/16"."""
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> ArrayJob:
        """Read "3/16".

        Raises:
            UsageError: It is something else.
        """
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*", text)
        if match is None:
            raise UsageError(f"--shard {text}: must be I/N, such as 3/16 for the third of 16 jobs")
        return cls(int(match[1]), int(match[2]))

    def share(self, tasks: Sequence[T]) -> list[T]:
        """Return the tasks of this job: every N-th."""
        return list(tasks[self.number - 1 :: self.of])

    def span(self, count: int) -> tuple[int, int]:
        """Return the first and the last number plus one of this job's share of ``count`` tasks in a row."""
        return count * (self.number - 1) // self.of, count * self.number // self.of


def job_of(task: int, of: int) -> ArrayJob:
    """Return the job that :meth:`ArrayJob.share` gives the task with a number, from 0 on."""
    return ArrayJob(task % of + 1, of)


@dataclass(frozen=True)
class Jobs:
    """The jobs that share the work on one result.

    Attributes:
        folder: Where they keep their records; removed after the merge.
        result: The result, for messages.
        request: The options that all jobs must have, by name: numbers, texts, or lists of these.
    """

    folder: AnyPath
    result: str
    request: Mapping[str, Any]

    @property
    def of(self) -> int:
        """Number of jobs, 0 if none has started."""
        of = record_in(self.folder / _ALL).get("of")
        return of if isinstance(of, int) and 1 <= of <= MOST else 0

    def begin(self, job: ArrayJob) -> None:
        """Record that a job has started.

        Raises:
            UsageError: Other jobs of this result were started with another N or other options.
        """
        with holding(self.folder / _LOCK, f"the jobs of {self.result}"):
            if of := self.of:
                if of != job.of:
                    raise UsageError(
                        f"--shard {job}: the jobs of {self.result} were started as one of {of}, such as "
                        f"--shard {min(job.number, of)}/{of}; give the same N, or remove {self.folder} to start again"
                    )
                self._check_request()
            else:
                _write_json(self.folder / _ALL, {"of": job.of, "request": dict(self.request)})

    @contextmanager
    def running(self, job: ArrayJob, say: Callable[[str], None] | None = None) -> Iterator[Callable[[], None]]:
        """Hold a job during the block: the same job, started twice, waits for the first and then finds it done.

        Yields:
            See :func:`thresher.runtime.locks.holding`.
        """
        with holding(self.lock(job), f"--shard {job} of {self.result}", say=say) as still_held:
            self._manifest(job.number).unlink(missing_ok=True)
            yield still_held

    def lock(self, job: ArrayJob) -> AnyPath:
        """Return the lock file of a job, which is there while it runs."""
        return self.folder / f"{job.number:05d}.lock"

    def finish(self, job: ArrayJob, **manifest: Any) -> str:
        """Write the completion manifest of a job; return how many jobs have finished, as a sentence."""
        _write_json(self._manifest(job.number), {"job": job.number, "of": job.of, **manifest})
        left = len(self._unfinished(job.of))
        if left:
            return f"--shard {job} has finished; {left:,} of {job.of:,} jobs have not"
        return f"--shard {job} has finished, and so have all others: run the same command without --shard"

    def finished(self) -> list[dict[str, Any]]:
        """Return the manifests of all jobs, in order.

        Raises:
            OutputError: Some jobs have not finished; the message names them.
            UsageError: They were started with other options.
        """
        of = self.of
        self._check_request()
        if left := self._unfinished(of):
            raise self.missing(f"{len(left):,} of {of:,} jobs have not finished", left, of)
        return [record_in(self._manifest(number)) for number in range(1, of + 1)]

    def missing(self, why: str, numbers: Sequence[int], of: int) -> OutputError:
        """Return the error for jobs that have to run, or to run again."""
        named = ", ".join(f"{number}/{of}" for number in numbers[:_NAMED]) + (", ..." if numbers[_NAMED:] else "")
        return OutputError(f"{self.result}: {why}: run the command with --shard {named}, then without --shard again")

    def remove(self) -> None:
        """Remove the records of the jobs."""
        remove_tree(self.folder)

    def _unfinished(self, of: int) -> list[int]:
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return [number for number in range(1, of + 1) if self._manifest(number).name not in there]

    def _manifest(self, number: int) -> AnyPath:
        return self.folder / f"{number:05d}.json"

    def _check_request(self) -> None:
        known, now = record_in(self.folder / _ALL).get("request"), json.loads(json.dumps(dict(self.request)))
        if known == now:
            return
        was = known if isinstance(known, dict) else {}
        apart = _differences(now, was)
        shown = "; ".join(f"{name} is {_short(here)} here and {_short(there)} there" for name, here, there in apart)
        raise UsageError(
            f"{self.result}: its jobs were started with other options ({shown}); give the same options, or "
            f"remove {self.folder} to start again"
        )


_ALL, _LOCK = "jobs.json", "jobs.lock"


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name and both values of each option that differs; of objects only what differs in them."""
    for name in sorted(here.keys() | there.keys()):
        one, other = here.get(name), there.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from ((f"{name} {inner}", *values) for inner, *values in _differences(one, other))
        elif one != other:
            yield name, one, other


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}..."


def _write_json(path: AnyPath, content: Any) -> None:
    with writing(path) as scratch:
        Path(scratch).write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
