"""The contract of export formats, for every one that is found; and that it notices what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from thresher import EmbeddingStore, Selection
from thresher.export.registry import EXPORTS, Written, kept_rows, writes_folder
from thresher.testing import ExportContract
from thresher.testing.export import _pool

EXAMPLES = {"energon": {"shard_column": "width"}}  # the pool of the contract has no tars

for _name, _cls in EXPORTS.all().items():
    if writes_folder(_cls):  # each has tests of its own
        continue
    _members = {"plugin": _cls, "example": EXAMPLES.get(_name, {})}
    globals()[f"Test_{_name}"] = type(f"Test_{_name}", (ExportContract,), _members)


@dataclass(frozen=True)
class Wrong:
    """A list of keys and paths that does one thing wrong."""

    name: ClassVar[str] = "wrong"
    what: str

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        lines, missing = [], []
        paths = dict(
            (int(row), name)
            for ids, part in store.scan(["filepath"])
            for row, name in zip(ids, part.column(0).to_pylist(), strict=True)
        )
        for ids, keys, times in kept_rows(selection, store):
            for row, key, count in zip(ids.tolist(), keys, times.tolist(), strict=True):
                good = key.isprintable() and (paths[row].isprintable() and ".." not in paths[row])
                if not good and self.what in ("", "repeats", "beside", "silent"):
                    missing += [(row, key)] if self.what != "silent" else []
                    continue
                if self.what == "lines" and ".." in paths[row] or self.what == "paths" and not key.isprintable():
                    missing.append((row, key))
                    continue
                lines += [f"{key}\t{paths[row]}"] * (1 if self.what == "repeats" else count)
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
        if self.what == "beside":
            Path(f"{path}.txt").touch()
        return Written(len(lines), tuple(missing))


CASES = {
    "lines": "test_entries_cannot_be_forged",
    "paths": "test_no_path_leads_out_of_its_folder",
    "repeats": "test_rows_are_written_as_often_as_they_are_to_be_used",
    "beside": "test_it_writes_its_file_and_nothing_else",
    "silent": "test_every_row_kept_is_written_or_listed",
}


@pytest.mark.parametrize(("what", "test"), CASES.items())
def test_the_contract_notices(what: str, test: str, tmp_path: Path) -> None:
    contract: Any = ExportContract()
    getattr(contract, test)(Wrong(""), _pool(tmp_path / "a" / "pool"), tmp_path / "a")
    with pytest.raises(AssertionError):
        getattr(contract, test)(Wrong(what), _pool(tmp_path / "b" / "pool"), tmp_path / "b")
