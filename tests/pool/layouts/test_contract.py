"""Every reader of pools that is found, against the contract."""

from __future__ import annotations

from pathlib import Path

from thresher.pool.layouts import POOL_READERS
from thresher.testing import PoolReaderContract
from thresher.testing.pool_reader import POOLS, Rows

NO_VECTORS = ("img2dataset",)


def contract(name: str, reader: type) -> type:
    class Contract(PoolReaderContract):
        plugin = reader
        fields = () if name in NO_VECTORS else ("image", "text")
        opening = 0.4 if name in NO_VECTORS else 0.2  # it reads the status of every row

        def write(self, folder: Path, rows: Rows, files: int) -> str:
            return POOLS[name](folder, rows, files)

    return Contract


for _name, _reader in POOL_READERS.all().items():
    if _name in POOLS:  # other readers have a test of their own
        globals()[f"Test_{_name.replace('-', '_')}"] = contract(_name, _reader)
