"""Jobs are done in this process, so that torch is loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from thresher.errors import ThresherError
from thresher.lab import runner, work


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
        torch.set_num_threads(1)
        yield begun
        torch.set_num_threads(before)


@pytest.fixture
def in_process() -> Iterator[list[str]]:
    """The jobs that were started, which are done in this process."""
    with jobs_in_this_process() as begun:
        yield begun
