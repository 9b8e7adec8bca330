"""Jobs of an array embed one pool: the bytes of one call; kills, repeats, and what does not belong together."""

from __future__ import annotations

import dataclasses
import os
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.embedding.raw import parquet, tars
from tests.embedding.test_pipeline import TOY, Killed, digests
from thresher import api, open_store
from thresher.cli.main import main
from thresher.data import DataOptions
from thresher.embedding import pool as module
from thresher.embedding.pipeline import embed
from thresher.errors import OutputError, PoolError, UsageError
from thresher.runtime.jobs import ArrayJob

HOW = dataclasses.replace(TOY, data=DataOptions(per_part=10))


@pytest.mark.parametrize(("kind", "of"), [("tars", 2), ("parquet", 3), ("tars", 7)])
def test_jobs_in_any_order_give_the_bytes_of_one_call(tmp_path: Path, kind: str, of: int) -> None:
    data = str(tars(tmp_path / "tars", 43) if kind == "tars" else parquet(tmp_path / "rows.parquet", 43))
    whole = embed(data, tmp_path / "whole", HOW)
    pool = tmp_path / "pool"
    with pytest.raises(PoolError, match="is not finished|nothing is there"):
        open_store(str(pool))
    done = []
    for number in range(of, 0, -1):
        done.append(embed(data, pool, HOW, shard=ArrayJob(number, of)))
        if number > 1:
            with pytest.raises(PoolError, match="is not finished"):
                open_store(str(pool))
            with pytest.raises(OutputError, match=rf"have not finished: run the command with --shard 1/{of}"):
                embed(data, pool, HOW)
    assert sum(one.rows for one in done) == sum(one.new for one in done) == whole.rows
    assert done[-1].notes[-1].endswith("and so have all others: run the same command without --shard")
    merged = embed(data, pool, HOW)
    assert (merged.rows, merged.new) == (whole.rows, 0)
    assert digests(pool) == digests(tmp_path / "whole")
    late = embed(data, pool, HOW, shard=ArrayJob(1, of))  # started again by the scheduler, after the merge
    assert late.notes[-1] == "the pool is finished already"
    assert digests(pool) == digests(tmp_path / "whole")


def test_killed_jobs_resume_and_do_no_shard_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(tars(tmp_path / "tars", 60))
    embed(data, tmp_path / "whole", HOW)
    pool, replace, tables = tmp_path / "pool", os.replace, 0

    def put(source: Any, target: Any) -> None:
        nonlocal tables
        if str(target).endswith("00002.parquet"):
            raise Killed
        tables += str(target).endswith(".parquet")
        replace(source, target)

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(os, "replace", put)
        embed(data, pool, HOW, shard=ArrayJob(1, 2))
    assert tables == 1
    embed(data, pool, HOW, shard=ArrayJob(2, 2))
    with pytest.raises(OutputError, match=r"1 of 2 jobs have not finished: run the command with --shard 1/2, then"):
        embed(data, pool, HOW)
    assert embed(data, pool, HOW, shard=ArrayJob(1, 2)).new == 20
    embed(data, pool, HOW)
    assert digests(pool) == digests(tmp_path / "whole")


def test_a_job_reads_no_shard_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All jobs wait for each other while one looks at what is there."""
    data, read = str(tars(tmp_path / "tars", 60)), set()

    def written(folder: Any, number: int) -> Any:
        read.add(number)
        return whole(folder, number)

    whole = module.written
    embed(data, tmp_path / "pool", HOW, shard=ArrayJob(1, 2))
    monkeypatch.setattr(module, "written", written)
    embed(data, tmp_path / "pool", HOW, shard=ArrayJob(2, 2))
    assert read == {1, 3, 5}
    assert embed(data, tmp_path / "pool", HOW).rows == 60
    assert read == set(range(6))


def test_a_job_started_twice_at_once_does_its_work_once(tmp_path: Path) -> None:
    data = str(tars(tmp_path / "tars", 40))
    embed(data, tmp_path / "whole", HOW)
    results = []
    both = [
        threading.Thread(target=lambda: results.append(embed(data, tmp_path / "pool", HOW, shard=ArrayJob(1, 2)).new))
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    assert sorted(results) == [0, 20]
    embed(data, tmp_path / "pool", HOW, shard=ArrayJob(2, 2))
    embed(data, tmp_path / "pool", HOW)
    assert digests(tmp_path / "pool") == digests(tmp_path / "whole")


def test_what_jobs_do_not_share_is_refused(tmp_path: Path) -> None:
    data, pool = str(tars(tmp_path / "tars", 40)), tmp_path / "pool"
    embed(data, pool, HOW, shard=ArrayJob(1, 4))
    with pytest.raises(UsageError, match=r"started as one of 4, such as --shard 2/4; give the same N"):
        embed(data, pool, HOW, shard=ArrayJob(2, 5))
    for other, why in ((dataclasses.replace(HOW, thumbnails=8), "thumbnails is 8 here and 0 there"),):
        with pytest.raises(UsageError, match=why):
            embed(data, pool, other, shard=ArrayJob(2, 4))
    tars(tmp_path / "tars", 50)
    with pytest.raises(UsageError, match=r"shards is 5 here and 4 there"):
        embed(data, pool, HOW, shard=ArrayJob(2, 4))
    with pytest.raises(UsageError, match=r"--overwrite would change what other jobs work on"):
        embed(data, pool, HOW, shard=ArrayJob(2, 4), overwrite=True)
    with pytest.raises(UsageError, match=r"--retry-damaged would change"):
        embed(data, pool, HOW, shard=ArrayJob(2, 4), retry_damaged=True)
    assert embed(data, pool, HOW, overwrite=True).rows == 50


def test_a_file_that_went_missing_is_named(tmp_path: Path) -> None:
    data, pool = str(tars(tmp_path / "tars", 40)), tmp_path / "pool"
    for number in (1, 2):
        embed(data, pool, HOW, shard=ArrayJob(number, 2))
    (pool / "metadata" / "metadata_00003.parquet").unlink()
    with pytest.raises(OutputError, match=r"metadata_00003.parquet is missing: run the command with --shard 2/2, then"):
        embed(data, pool, HOW)
    assert embed(data, pool, HOW, shard=ArrayJob(2, 2)).new == 10
    assert embed(data, pool, HOW).rows == 40


def test_jobs_from_the_command_line_and_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(tars(tmp_path / "tars", 30))
    command = ["embed", data, "-o", str(tmp_path / "pool"), "--encoder", "tests.toy:Toy", "--workers", "0", "--quiet"]
    for number in (1, 2):
        assert main([*command, "--shard", f"{number}/2"]) == 0
        assert f"--shard {number}/2 has finished" in capsys.readouterr().out
    assert main([*command, "--shard", "0/2"]) == 2
    assert re.search("jobs are numbered from 1: with Slurm, --array=1-N", capsys.readouterr().err)
    assert main(command) == 0
    store = open_store(str(tmp_path / "pool"))
    how: dict[str, Any] = {"encoder": "tests.toy:Toy", "workers": 0, "progress": False}
    assert api.embed(data, tmp_path / "python", shard="1/1", **how).rows == 30
    assert api.embed(data, tmp_path / "python", **how).fingerprint() == store.fingerprint()
    with pytest.raises(UsageError, match="jobs share files"):
        api.embed(data, None, shard="1/1", **how)
