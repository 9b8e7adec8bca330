"""A small plan and its data. Jobs are done in this process, so that torch is loaded once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.train.conftest import emoji
from thresher.errors import ThresherError
from thresher.lab import runner, work

PLAN = """
name = "small"
seeds = 1
[data]
train = "train.parquet"
evals = ["held.parquet"]
[trainer]
epochs = 4
batch_size = 20
[evaluation]
labels = ["kind"]
[proxy]
epochs = 1
early = 1
reference = 1
[[corpus]]
name = "noisy"
swapped = 0.3
[[row]]
name = "full"
[[row]]
name = "full-short"
[[row]]
name = "scan"
policy = "scan"
prune = 0.2
options = { warmup = 1, cycle = 1 }
[[row]]
name = "rho"
policy = "rho"
[[row]]
name = "coreset"
coreset_of = "scan"
keep = "70%"
[[row]]
name = "c-rho"
steps = [{ method = "c-rho", proxy = "early-proxy", keep = "70%" }]
[[row]]
name = "drrho"
loss = "drrho"
[[row]]
name = "cabs"
compose = "diversity"
[[row]]
name = "random"
steps = [{ method = "random", keep = "70%" }]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab-runs")
    table = emoji(150).append_column("kind", pa.array([["even", "odd"][row % 2] for row in range(150)]))
    pq.write_table(table.slice(0, 100), folder / "train.parquet")
    pq.write_table(table.slice(100), folder / "held.parquet")
    return folder


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def plain(out: Path) -> list[dict[str, Any]]:
    """The runs without their times."""
    return [{name: value for name, value in run.items() if name != "seconds"} for run in results(out)["runs"]]


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.returncode = code

    def poll(self) -> int:
        return self.returncode

    def kill(self) -> None: ...

    def wait(self) -> int:
        return self.returncode


@contextmanager
def jobs_in_this_process() -> Iterator[list[str]]:
    """Do jobs here; yields the names of the jobs that were started in the folder ``out``."""
    begun: list[str] = []
    before = torch.get_num_threads()

    def started(own: Path, count: int) -> Ended:
        begun.append(str(own).rpartition("/out/")[2])
        try:
            work.do(own)
        except ThresherError as error:
            (own / work.OUTPUT).write_text(f"error: {error}\n")
            return Ended(1)
        return Ended(0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "_started", started)
        patched.setattr(work, "_TRIAL", 4)  # steps; the trial run says how long the others take, and no more
        torch.set_num_threads(1)
        yield begun
        torch.set_num_threads(before)


@pytest.fixture
def in_process() -> Iterator[list[str]]:
    """The jobs that were started, which are done in this process."""
    with jobs_in_this_process() as begun:
        yield begun
