"""A loop that was killed at any moment goes on, and ends with the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.common import killed_at
from thresher.runtime.checksums import ArraySpec, CacheWarning, append_checksum
from thresher.runtime.resumable import Resumable

pytest.importorskip("fcntl")

STEPS = 8
SPECS = {"sums": ArraySpec("float64", (3,)), "done": ArraySpec("int64", (), 0, STEPS)}


def loop(folder: Path, every: float = -1) -> list[int]:
    """Sum up numbers, as careful as can be; returns which were added."""
    saved = Resumable(folder / "sums.state.npz", every)
    state = saved.load(SPECS) or {"sums": np.zeros(3), "done": 0}
    sums, added = np.asarray(state["sums"]), []
    for step in range(int(state["done"]), STEPS):
        sums = sums + step
        added.append(step)
        saved.offer(lambda sums=sums, step=step: {"sums": sums, "done": step + 1})  # type: ignore[misc]
    np.save(folder / "sums.npy", sums)
    saved.remove()
    return added


@pytest.mark.slow
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


ONE = {"a": ArraySpec("int64")}


def test_it_is_saved_when_it_is_time(tmp_path: Path) -> None:
    saved = Resumable(tmp_path / "a.npz", every=3600)
    assert not saved.offer(lambda: pytest.fail("not asked for"))
    assert saved.load(ONE) is None
    saved = Resumable(tmp_path / "a.npz", every=-1)
    assert saved.offer(lambda: {"a": 1})
    assert int((saved.load(ONE) or {})["a"]) == 1
    assert saved.load({**ONE, "b": ArraySpec("int64")}) is None, "the state of another version"
    assert saved.load({}) is None


def test_a_damaged_state_counts_as_none(tmp_path: Path) -> None:
    saved = Resumable(tmp_path / "a.npz")
    saved.save({"a": np.arange(100)})
    whole = saved.path.read_bytes()
    damaged = [b"", b"PK", b"x" * 500, whole[:-20], whole[:-1], whole + b"!"]
    damaged += [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    for text in damaged:
        saved.path.write_bytes(text)
        with pytest.warns(CacheWarning, match=r"a\.npz is damaged \(.*\); it is computed again"):
            assert saved.load(ONE) is None
    saved.save({"a": 1})
    assert saved.load(ONE) is not None


def write(path: Path, save: Any, **arrays: Any) -> None:
    """Write a state with a good checksum, as another program could."""
    with open(path, "w+b") as file:
        save(file, **arrays)
        append_checksum(file)


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"a": np.zeros(3, np.float32)}, "it contains float32, not int64"),
        ({"a": np.zeros((3, 1), np.int64)}, "its shape is"),
        ({"a": np.zeros(4, np.int64)}, "its shape is"),
        ({"a": np.array([0, 5, 10])}, "not within 0 to 9"),
        ({"a": np.array([0, -1, 9])}, "not within 0 to 9"),
        ({"a": np.array([{}] * 3, object)}, "of type object"),
    ],
)
def test_a_state_of_other_arrays_counts_as_none(tmp_path: Path, state: Any, why: str) -> None:
    saved, spec = Resumable(tmp_path / "a.npz"), {"a": ArraySpec("int64", (3,), 0, 9)}
    write(saved.path, np.savez, a=np.array([0, 5, 9]))
    assert saved.load(spec) is not None
    write(saved.path, np.savez, **state)
    with pytest.warns(CacheWarning, match=why):
        assert saved.load(spec) is None


def test_a_state_that_unfolds_is_refused(tmp_path: Path) -> None:
    saved = Resumable(tmp_path / "a.npz")
    write(saved.path, np.savez_compressed, a=np.zeros(10**6, np.int64))
    with pytest.warns(CacheWarning, match="is compressed"):
        assert saved.load(ONE) is None
