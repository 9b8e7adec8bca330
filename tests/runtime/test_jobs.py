"""Jobs that share the work of a command: numbers, shares, records, and what does not belong together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import OutputError, UsageError
from thresher.runtime.jobs import ArrayJob, Jobs, job_of


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0/4", "I must be from 1 to 4; jobs are numbered from 1: with Slurm, --array=1-N"),
        ("5/4", "I must be from 1 to 4"),
        ("1/0", "N must be from 1 to 100,000"),
        ("1/1000000", "N must be from 1 to 100,000"),
        ("3", "must be I/N, such as 3/16"),
        ("-1/4", "must be I/N"),
        ("1/2/3", "must be I/N"),
        ("", "must be I/N"),
        ("１/4", "must be I/N"),
        ("1e1/20", "must be I/N"),
    ],
)
def test_jobs_that_are_not(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=re.escape(why)):
        ArrayJob.parse(text)


@given(st.integers(0, 300), st.integers(1, 40))
def test_every_task_belongs_to_one_job(tasks: int, of: int) -> None:
    jobs = [ArrayJob(number, of) for number in range(1, of + 1)]
    shares = [job.share(range(tasks)) for job in jobs]
    assert sorted(task for share in shares for task in share) == list(range(tasks))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(job_of(task, of) == job for job, share in zip(jobs, shares, strict=True) for task in share)
    spans = [job.span(tasks) for job in jobs]
    assert [number for lo, hi in spans for number in range(lo, hi)] == list(range(tasks))


def test_all_jobs_must_finish_and_have_the_same_options(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "jobs", "the pool out", {"size": 8, "names": ("a", "b")})
    assert jobs.of == 0
    for number in (2, 1):
        jobs.begin(ArrayJob(number, 3))
    with pytest.raises(UsageError, match=r"one of 3, such as --shard 2/3; give the same N"):
        jobs.begin(ArrayJob(2, 4))
    other = Jobs(tmp_path / "jobs", "the pool out", {"size": 9, "names": ("a", "b"), "more": True})
    why = r"started with other options \(more is true here and null there; size is 9 here and 8 there\)"
    with pytest.raises(UsageError, match=why):
        other.begin(ArrayJob(3, 3))
    with jobs.running(ArrayJob(2, 3)):
        assert jobs.finish(ArrayJob(2, 3), rows=5) == "--shard 2/3 has finished; 2 of 3 jobs have not"
    with pytest.raises(OutputError, match=r"2 of 3 jobs have not finished: run the command with --shard 1/3, 3/3, "):
        jobs.finished()
    for number in (1, 3):
        said = jobs.finish(ArrayJob(number, 3), rows=number)
    assert said.endswith("and so have all others: run the same command without --shard")
    assert [one["rows"] for one in jobs.finished()] == [1, 5, 3]
    with pytest.raises(UsageError, match=r"its jobs were started with other options"):
        other.finished()
    with jobs.running(ArrayJob(1, 3)):  # started again: not finished until it is
        with pytest.raises(OutputError, match=r"1 of 3 jobs have not finished: .*--shard 1/3, then"):
            jobs.finished()
    jobs.remove()
    assert jobs.of == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", '{"of": -1}', '{"of": "4"}', '{"of": 1e9}'])
def test_damaged_records_count_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "jobs.json").write_text(content)
    jobs = Jobs(tmp_path / "jobs", "out", {})
    assert jobs.of == 0
    jobs.begin(ArrayJob(1, 4))
    assert jobs.of == 4


def test_options_that_differ_are_named_also_within_an_object(tmp_path: Path) -> None:
    """An encoder has a long name, of which the beginning is the same."""
    encoder = {"name": "open_clip:" + "x" * 80, "weights": "a", "dim": 4}
    Jobs(tmp_path / "jobs", "x", {"encoder": encoder, "seed": 0}).begin(ArrayJob(1, 2))
    other = Jobs(tmp_path / "jobs", "x", {"encoder": {**encoder, "weights": "b"}, "seed": 1})
    said = r'other options \(encoder weights is "b" here and "a" there; seed is 1 here and 0 there\); give the same'
    with pytest.raises(UsageError, match=said):
        other.begin(ArrayJob(2, 2))
