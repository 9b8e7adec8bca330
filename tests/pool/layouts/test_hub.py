"""Datasets of the Hugging Face Hub as pools, against the contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import Hub as Server
from tests.hub import Repo, at_hand
from thresher.pool.layouts.hub import Hub
from thresher.testing import PoolReaderContract
from thresher.testing.pool_reader import POOLS, Rows


class TestHub(PoolReaderContract):
    plugin = Hub

    @pytest.fixture(autouse=True)
    def _server(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with at_hand(monkeypatch) as self.server:
            yield

    def write(self, folder: Path, rows: Rows, files: int) -> str:
        POOLS["parquet"](folder, rows, files)
        server: Server = self.server
        server.datasets[f"org/{folder.name}"] = Repo(folder)
        return f"hf://datasets/org/{folder.name}"
