"""Jobs are done in this process, so that torch is loaded once."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Do jobs here; yields the names of the jobs that were started in the folder ``out``."""
    begun: list[str] = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def started(own: Path, count: int) -> Ended:
        begun.append(str(own).rpartition("/out/")[2])
        try:
            work.do(own)
        except ThresherError as error:
            (own / work.OUTPUT).write_text(f"error: {error}\n")
            return Ended(1)
        return Ended(0)

    monkeypatch.setattr(runner, "_started", started)
    yield begun
    torch.set_num_threads(before)
