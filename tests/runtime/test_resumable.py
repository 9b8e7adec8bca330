"""A loop that was killed at any moment goes on, and ends with the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.runtime.common import killed_at
from thresher.runtime.resumable import Resumable

pytest.importorskip("fcntl")

STEPS = 8


def loop(folder: Path, every: float = -1) -> list[int]:
    """Sum up numbers, as careful as can be; returns which were added."""
    saved = Resumable(folder / "sums.state.npz", every)
    state = saved.load("sums", "done") or {"sums": np.zeros(3), "done": 0}
    sums, added = np.asarray(state["sums"]), []
    for step in range(int(state["done"]), STEPS):
        sums = sums + step
        added.append(step)
        saved.offer(lambda sums=sums, step=step: {"sums": sums, "done": step + 1})  # type: ignore[misc]
    np.save(folder / "sums.npy", sums)
    saved.remove()
    return added


def test_killed_at_any_moment(tmp_path: Path) -> None:
    point, least = 0, STEPS
    while True:
        folder = tmp_path / f"{point}"
        folder.mkdir()
        if not killed_at(point, lambda folder=folder: loop(folder)):  # type: ignore[misc]
            break
        least = min(least, len(loop(folder)))
        assert np.load(folder / "sums.npy").tolist() == [sum(range(STEPS))] * 3
        assert not (folder / "sums.state.npz").exists()
        point += 1
    assert point > 3 * STEPS
    assert least == 0, "nothing of what had been done was used"


def test_killed_again_and_again_it_ends(tmp_path: Path) -> None:
    assert not all(killed_at(9, lambda: loop(tmp_path)) for _ in range(3 * STEPS))
    assert np.load(tmp_path / "sums.npy").tolist() == [sum(range(STEPS))] * 3


def test_it_is_saved_when_it_is_time(tmp_path: Path) -> None:
    saved = Resumable(tmp_path / "a.npz", every=3600)
    assert not saved.offer(lambda: pytest.fail("not asked for"))
    assert saved.load("a") is None
    saved = Resumable(tmp_path / "a.npz", every=-1)
    assert saved.offer(lambda: {"a": 1})
    assert int((saved.load("a") or {})["a"]) == 1
    assert saved.load("a", "b") is None, "the state of another version"
    assert saved.load() is None


@pytest.mark.parametrize("damage", [b"", b"PK", b"x" * 500])
def test_a_damaged_state_counts_as_none(tmp_path: Path, damage: bytes) -> None:
    saved = Resumable(tmp_path / "a.npz")
    saved.save({"a": np.arange(100)})
    whole = saved.path.read_bytes()
    for text in (damage, whole[:-20], whole[:60] + b"!" + whole[61:]):
        saved.path.write_bytes(text)
        found = saved.load("a")
        assert found is None or found["a"].tolist() == list(range(100))
    saved.save({"a": 1})
    assert saved.load("a") is not None


def test_pickles_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([{}], object))
    assert Resumable(tmp_path / "a.npz").load("a") is None
