"""Values and errors on their way between processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from thresher.runtime.ray.connection import settings_kept
from thresher.runtime.ray.packing import pack, portable, size_of, unpack


@pytest.fixture(autouse=True)
def _settings_kept() -> Iterator[None]:
    """Ray's pickles need Ray, which changes settings when it is imported."""
    with settings_kept():
        yield


def test_arrays_stay_apart_and_are_copied_unless_they_are_shared() -> None:
    rows = np.arange(1_000.0)
    packed = pack({"rows": rows, "names": ["a"]})
    data, (buffer,) = packed
    assert len(data) < 500
    assert np.shares_memory(buffer, rows)
    assert size_of(packed) == len(data) + 8_000
    assert np.shares_memory(unpack(packed, shared=True)["rows"], rows)
    copied = unpack(packed)["rows"]
    copied += 1
    assert (copied == rows + 1).all()


def test_functions_without_a_module_are_packed() -> None:
    three = 3
    assert unpack(pack(lambda x: x + three))(4) == 7


class OfTwoError(Exception):
    """Its class takes other arguments than those that it passes on."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")
        self.two = two


class Holding(Exception):
    """It holds what cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def raised(error: BaseException) -> BaseException:
    try:
        try:
            raise KeyError("cause")
        except KeyError as cause:
            raise error from cause
    except BaseException as caught:
        return caught


@pytest.mark.parametrize("error", [ValueError("one"), OfTwoError("one", "two"), SystemExit("left"), OSError(2, "no")])
def test_errors_arrive_as_they_are_with_their_traceback_as_a_note(error: BaseException) -> None:
    arrived: Any = unpack(pack(portable(raised(error))))()
    assert type(arrived) is type(error)
    assert (arrived.args, str(arrived)) == (error.args, str(error))
    assert {**vars(arrived)} == {**vars(error)}
    assert arrived.__cause__ is None
    (note,) = arrived.__notes__
    assert note.startswith("in a worker of Ray:\nTraceback")
    assert "KeyError: 'cause'" in note


def test_an_error_that_cannot_be_pickled_arrives_in_words() -> None:
    arrived = unpack(pack(portable(raised(Holding("text")))))()
    assert type(arrived) is RuntimeError
    assert str(arrived) == "Holding: text"
