"""Some spans of a remote file: the bytes of the file, with the requests that are needed and no others."""

from __future__ import annotations

import random

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ahead_fs import Ahead, memory
from thresher.errors import PoolError
from thresher.io import spans
from thresher.io.spans import SpanFile, joined, open_spans

__all__ = ["memory"]
pytestmark = pytest.mark.usefixtures("memory")
SIZE = 3_000_000
CONTENT = random.Random(0).randbytes(SIZE)
PLACE = st.integers(0, SIZE + 1000)
SPAN = st.tuples(PLACE, st.integers(1, 300_000)).map(lambda one: (one[0], one[0] + one[1]))


@pytest.fixture
def path(memory: None) -> str:
    fsspec.filesystem("memory").pipe_file("/f", CONTENT)
    return "/f"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(SPAN, max_size=8), st.lists(SPAN, max_size=6), st.booleans())
def test_what_is_read_is_the_file(
    path: str, wanted: list[tuple[int, int]], read: list[tuple[int, int]], go: bool
) -> None:
    """Whether it is in a span or not, in the order of the spans or another."""
    with open_spans("ahead", path, sorted(wanted) if go else wanted) as file:
        for start, stop in [*wanted, *read]:
            file.seek(start)
            assert file.read(stop - start) == CONTENT[start:stop]
            assert file.tell() == min(stop, max(start, SIZE)) or start > SIZE


def test_near_spans_are_one_request_and_far_ones_are_exact(path: str) -> None:
    near = [(1000, 2000), (90_000, 91_000), (600_000, 600_001), (2_000_000, 2_100_000)]
    assert joined(near) == [(1000, 91_000), (600_000, 600_001), (2_000_000, 2_100_000)]
    with open_spans("ahead", path, near) as file:
        for start, stop in near:
            file.seek(start)
            file.read(stop - start)
    assert Ahead.counts == {"requests": 3, "bytes": 90_000 + 1 + 100_000}


def test_spans_that_go_back_are_not_joined() -> None:
    assert joined([(5, 9), (0, 3), (3, 4)]) == [(5, 9), (0, 4)]
    assert joined([(0, 8 << 20), (8 << 20, 9 << 20)]) == [(0, 8 << 20), (8 << 20, 9 << 20)]
    assert joined([(0, 9 << 20)]) == [(0, 9 << 20)]


def test_a_file_that_is_needed_as_a_whole_is_read_as_usual(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "_MOST", 1 << 20)
    parts = [(at, at + 100_000) for at in range(0, SIZE, 300_000)]
    with open_spans("ahead", path, parts) as file:
        assert not isinstance(getattr(file, "raw", None), SpanFile)
        for start, stop in parts:
            file.seek(start)
            assert file.read(stop - start) == CONTENT[start:stop]
    assert Ahead.counts["requests"] == 1


def test_a_file_of_unknown_size_is_read_as_usual(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a web server that does not say."""
    monkeypatch.setattr(spans, "info_of", lambda *_: {"size": None})
    with open_spans("ahead", path, [(0, 5)]) as file:
        assert file.read(5) == CONTENT[:5]
    with pytest.raises(PoolError, match="no such file"):
        open_spans("ahead", "/gone", [(0, 5)]).read(1)
