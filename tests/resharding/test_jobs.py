"""Jobs of an array write one set of shards: the bytes of one call, in one round or two."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.kills import forked
from thresher.cli.main import main
from thresher.errors import OutputError, UsageError
from thresher.resharding import reshard
from thresher.runtime.jobs import ArrayJob

from .common import hashes, keys_file
from .test_job import data_of

KINDS = [
    ("tars", {}, 1),
    ("tars", {"shuffle": 1}, 1),
    ("tars", {"trainable": True}, 2),
    ("parquet", {}, 1),
    ("parquet", {"shuffle": 1}, 2),
    ("parquet", {"form": "webdataset"}, 1),
    ("parquet", {"form": "webdataset", "shuffle": 1}, 2),
]


@pytest.fixture
def sel(tmp_path: Path) -> str:
    return keys_file(tmp_path / "k", [f"{i:06d}" for i in range(0, 60, 2)] + ["000004", "nowhere"])


@pytest.mark.parametrize(("kind", "how", "rounds"), KINDS)
def test_jobs_give_the_bytes_of_one_call(tmp_path: Path, sel: str, kind: str, how: dict[str, Any], rounds: int) -> None:
    data, out = data_of(tmp_path / "in", kind), str(tmp_path / "out")
    whole = reshard(data, sel, str(tmp_path / "whole"), per_shard=4, **how)
    finished: set[int] = set()
    for turn in range(1, rounds + 1):
        for number in (3, 1, 2):
            done = reshard(data, sel, out, per_shard=4, shard=ArrayJob(number, 3), **how)
            if turn < rounds and number != 2:
                assert done.notes[-1].startswith(f"--shard {number}/3 has done the first of two rounds; run it again")
            else:
                assert done.notes[-1].startswith(f"--shard {number}/3 has finished")
                finished.add(number)
            if len(finished) < 3:
                with pytest.raises(OutputError, match=r"jobs have not finished: run the command with --shard"):
                    reshard(data, sel, out, per_shard=4, **how)
    merged = reshard(data, sel, out, per_shard=4, **how)
    assert merged.samples == whole.samples
    assert (tmp_path / "out" / "reshard.json").read_text() == (tmp_path / "whole" / "reshard.json").read_text()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert not (tmp_path / "out" / ".reshard").exists()
    late = reshard(data, sel, out, per_shard=4, shard=ArrayJob(1, 3), **how)  # by the scheduler, after the merge
    assert late.samples == whole.samples
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_job_killed_at_changes_of_a_file(tmp_path: Path, sel: str, step: int) -> None:
    data, out = data_of(tmp_path / "in", "tars"), str(tmp_path / "out")
    command = ["reshard", data, sel, "--per-shard", "8", "--workers", "1", "--quiet", "--max-missing", "1", "-o", out]
    reshard(data, sel, str(tmp_path / "whole"), per_shard=8)
    again = 0
    while forked([*command, "--shard", "1/2"], again + 1) != 0:
        again += step
    assert again + step > 9
    reshard(data, sel, out, per_shard=8, shard=ArrayJob(2, 2))
    assert main(command) == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_finished_shards_are_not_written_again(tmp_path: Path, sel: str) -> None:
    data, out = data_of(tmp_path / "in", "tars"), tmp_path / "out"
    reshard(data, sel, str(out), per_shard=4, shard=ArrayJob(1, 2))
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(before) == 4
    reshard(data, sel, str(out), per_shard=4, shard=ArrayJob(1, 2))
    reshard(data, sel, str(out), per_shard=4, shard=ArrayJob(2, 2))
    (out / "00000005.tar").unlink()
    with pytest.raises(OutputError, match=r"00000005.tar is missing: run the command with --shard 2/2, then"):
        reshard(data, sel, str(out), per_shard=4)
    reshard(data, sel, str(out), per_shard=4, shard=ArrayJob(2, 2))
    assert reshard(data, sel, str(out), per_shard=4).samples == 31
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_what_jobs_do_not_share_is_refused(tmp_path: Path, sel: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = data_of(tmp_path / "in", "tars"), str(tmp_path / "out")
    reshard(data, sel, out, per_shard=4, shard=ArrayJob(1, 4))
    with pytest.raises(UsageError, match=r"started as one of 4, such as --shard 2/4; give the same N"):
        reshard(data, sel, out, per_shard=4, shard=ArrayJob(2, 3))
    with pytest.raises(OutputError, match=r"holds a reshard of other data or options"):
        reshard(data, sel, out, per_shard=5, shard=ArrayJob(2, 4))
    with pytest.raises(UsageError, match=r"--overwrite would remove what other jobs wrote"):
        reshard(data, sel, out, per_shard=4, shard=ArrayJob(2, 4), overwrite=True)
    assert main(["reshard", data, sel, "-o", out, "--shard", "2"]) == 2
    assert re.search("must be I/N, such as 3/16", capsys.readouterr().err)
    assert json.loads((tmp_path / "out" / ".reshard" / "jobs" / "jobs.json").read_text())["of"] == 4
    assert reshard(data, sel, out, per_shard=5, overwrite=True).samples == 31  # which forgets the jobs
