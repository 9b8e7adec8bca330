"""What runs in workers, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from thresher.runtime.ray.carriers import stored_function
from thresher.runtime.ray.packing import pack, unpack
from thresher.runtime.ray.worker import Done, Kept, add_up, call, call_apart

from .simulated import CLOCK, simulated_ray


class Loaded:
    """A function that notes when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        (self.folder / str(len(list(self.folder.iterdir())))).touch()

    def __call__(self, x: int) -> int:
        CLOCK.sleep(0.25)
        if x == 3:
            raise ValueError("three")
        return 10 * x


def pair(x: int) -> tuple[int, str]:
    return -x, str(x)


def unlucky(x: int) -> tuple[int, Any]:
    return x, (i for i in range(x))


def joined(one: str, other: str) -> str:
    return f"({one} {other})"


def test_a_group_ends_with_the_first_task_that_raises(tmp_path: Path) -> None:
    with simulated_ray(1):
        done: Done = unpack(call(stored_function(Loaded(tmp_path)), pack([1, 2, 3, 4])))
    assert (done.results, done.seconds) == ([10, 20], 0.75)
    assert done.error is not None
    with pytest.raises(ValueError, match="^three\n"):
        raise done.error()


def test_a_group_starts_no_other_task_after_a_second(tmp_path: Path) -> None:
    with simulated_ray(1):
        done: Done = unpack(call(stored_function(Loaded(tmp_path)), pack([1, 2, 4, 5, 6, 7, 8])))
    assert (done.results, done.seconds, done.error) == ([10, 20, 40, 50, 60], 1.25, None)


def test_the_function_is_loaded_once_by_each_worker(tmp_path: Path) -> None:
    """An actor keeps its own, whatever else runs in its process: it has a state."""
    with simulated_ray(1):
        held, actor = stored_function(Loaded(tmp_path)), Kept()
        for _ in range(3):
            call(held, pack([1]))
        assert len(list(tmp_path.iterdir())) == 1
        for _ in range(3):
            actor.call(held, pack([1]))
            for other in (pair, unlucky, abs):  # more than workers without an actor keep
                call(stored_function(other), pack([1]))
        assert len(list(tmp_path.iterdir())) == 2


def test_a_result_that_cannot_be_pickled_is_the_error() -> None:
    with simulated_ray(1):
        done: Done = unpack(call(stored_function(unlucky), pack([1])))
        assert done.results == []
        assert done.error is not None
        with pytest.raises(TypeError, match="generator"):
            raise done.error()
        packed, part = call_apart(stored_function(unlucky), pack([1]))
        assert unpack(packed).results == []
        assert part is None


def test_parts_stay_apart_and_are_added_in_order() -> None:
    with simulated_ray(1):
        parts = []
        for x in (1, 2, 3):
            packed, part = call_apart(stored_function(pair), pack([x]))
            assert unpack(packed).results == [-x]
            parts.append(part)
        assert unpack(add_up(stored_function(joined), *parts)) == "((1 2) 3)"
