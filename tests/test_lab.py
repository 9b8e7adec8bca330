"""The experiments run, in small, and print a table of what they ran."""

from __future__ import annotations

import re
import subprocess
import sys
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


def table_of(script: str, *arguments: str) -> list[list[str]]:
    command = [sys.executable, str(LAB / script), *arguments, "--threads", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_policies_are_compared_at_equal_samples(sets: tuple[str, str], tmp_path: Path) -> None:
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


def test_moco_is_compared_with_the_net_untrained(sets: tuple[str, str], tmp_path: Path) -> None:
    arguments = [*sets, "-o", str(tmp_path / "runs"), "--epochs", "2", "--batch-size", "20", "--arms", "full"]
    found = table_of("moco.py", *arguments)
    assert [row[0] for row in found] == ["untrained", "full"]
    assert all(0 <= float(cell) <= 100 for row in found for cell in row[2:])
