"""Datasets of the Hugging Face Hub as raw data, against the contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.hub import Hub as Server
from tests.hub import Repo, at_hand
from thresher.data.layouts.hub import Hub
from thresher.testing import DataReaderContract
from thresher.testing.data_reader import DATA, Pair


class TestHub(DataReaderContract):
    plugin = Hub

    @pytest.fixture(autouse=True)
    def _server(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with at_hand(monkeypatch) as self.server:
            yield

    def write(self, folder: Path, what: Sequence[Pair], files: int) -> str:
        DATA["parquet"](folder, what, files)
        server: Server = self.server
        server.datasets[f"org/{folder.name}"] = Repo(folder)
        return f"hf://datasets/org/{folder.name}"
