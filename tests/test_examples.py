"""The examples run as they are, from anywhere, and print what they are to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path) -> tuple[list[tuple[str, int, int, float]], float, str]:
    """Every epoch's phase, rows, all rows and loss; the share pruned; all that was printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^\d+ (\S+) +([\d,]+) of ([\d,]+) rows, loss ([\d.]+)$", done.stdout, re.MULTILINE)
    epochs = [(a, int(b.replace(",", "")), int(c.replace(",", "")), float(d)) for a, b, c, d in lines]
    pruned = re.search(r"^([\d.]+)% of the samples pruned", done.stdout, re.MULTILINE)
    assert pruned, done.stdout
    return epochs, float(pruned[1]) / 100, done.stdout


def check_share(epochs: list[tuple[str, int, int, float]], pruned: float, promised: float) -> None:
    """The share told is that of the epochs, and what was promised."""
    assert pruned == pytest.approx(1 - sum(e[1] for e in epochs) / sum(e[2] for e in epochs), abs=1e-3)
    assert pruned == pytest.approx(promised, abs=0.025)
    assert all((rows < total) == (phase == "mutation") for phase, rows, total, _ in epochs)


def test_the_plain_loop_learns_and_prunes(tmp_path: Path) -> None:
    epochs, pruned, printed = run("plain_loop.py", tmp_path)
    assert len(epochs) == 10
    check_share(epochs, pruned, 0.25)
    whole = [loss for _, rows, total, loss in epochs if rows == total]  # of one make-up: these compare
    assert whole == sorted(whole, reverse=True)
    assert whole[-1] < 0.5 * whole[0]
    found = re.search(r"caption among the best 5 of 3,953: ([\d.]+)%", printed)
    assert found
    assert float(found[1]) > 30


def test_moco_of_lightly_prunes(tmp_path: Path) -> None:
    epochs, pruned, _ = run("lightly_moco.py", tmp_path)
    assert len(epochs) == 6
    check_share(epochs, pruned, 0.2)
    losses = [loss for *_, loss in epochs]
    assert losses[-1] < losses[1]  # the first is against a queue of noise
    assert list(tmp_path.iterdir()) == []
