"""Every reader of raw data that is found, against the contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thresher.data import DATA_READERS
from thresher.testing import DataReaderContract
from thresher.testing.data_reader import DATA, Pair

# A line less, a picture cut off (found where it is decoded), a tar that ends between two members (found by doctor).
UNMARKED = ("csv", "folder", "jsonl", "webdataset")


def contract(name: str, reader: type) -> type:
    class Contract(DataReaderContract):
        plugin = reader
        marks_cuts = name not in UNMARKED

        def write(self, folder: Path, what: Sequence[Pair], files: int) -> str:
            return DATA[name](folder, what, files)

    return Contract


for _name, _reader in DATA_READERS.all().items():
    if _name in DATA:  # other readers have a test of their own
        globals()[f"Test_{_name}"] = contract(_name, _reader)
