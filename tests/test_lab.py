"""The experiments run, in small, and print a table of what they ran."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.train.conftest import emoji

LAB = Path(__file__).parents[1] / "lab"


@pytest.fixture
def sets(tmp_path: Path) -> tuple[str, str]:
    table = emoji(160)
    table = table.append_column("label_name", pa.array([["even", "odd"][row % 2] for row in range(160)]))
    pq.write_table(table.slice(0, 120), tmp_path / "train.parquet")
    pq.write_table(table.slice(120), tmp_path / "held.parquet")
    return str(tmp_path / "train.parquet"), str(tmp_path / "held.parquet")


Table = Callable[..., list[list[str]]]


@pytest.fixture
def table_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Table:
    """Run a script and return the cells of the table it prints."""

    def run(script: str, *arguments: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--threads", "1"])
        runpy.run_path(str(LAB / script), run_name="__main__")
        lines = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]

    return run


@pytest.mark.slow
def test_policies_are_compared_at_equal_samples(sets: tuple[str, str], tmp_path: Path, table_of: Table) -> None:
    arguments = [*sets, "-o", str(tmp_path / "runs"), "--epochs", "4", "--seeds", "0", "1", "--batch-size", "20"]
    arms = ["--arms", "full", "scan", "full, the samples of scan", "dynamic random"]
    found = {row[0]: row[1:] for row in table_of("dynamic.py", *arguments, *arms, "--quiet")}
    assert list(found) == arms[1:]
    assert found["full"][0] == "480 / 480"
    assert found["full"][1] == "0.0% / 0.0%"
    assert found["scan"][0] == found["full, the samples of scan"][0] != found["full"][0]
    assert len(list((tmp_path / "runs").glob("*/training.json"))) == 8
    assert all(re.fullmatch(r"\*\*[\d.]+\*\* \([\d.]+ / [\d.]+\)", cell) for row in found.values() for cell in row[4:])
    again = {row[0]: row[1:] for row in table_of("dynamic.py", *arguments, *arms, "--quiet")}
    assert again == found  # nothing was run again


@pytest.mark.slow
def test_moco_is_compared_with_the_net_untrained(sets: tuple[str, str], tmp_path: Path, table_of: Table) -> None:
    arguments = [*sets, "-o", str(tmp_path / "runs"), "--epochs", "2", "--batch-size", "20", "--arms", "full"]
    found = table_of("moco.py", *arguments)
    assert [row[0] for row in found] == ["untrained", "full"]
    assert all(0 <= float(cell) <= 100 for row in found for cell in row[2:])
