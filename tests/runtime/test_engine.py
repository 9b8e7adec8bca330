from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import threadpoolctl

from thresher import Processes, Serial, Threads, UsageError, make_engine
from thresher.runtime.engine import cores


def square(x: int) -> int:
    time.sleep((x % 3) * 0.002)  # later tasks may finish first
    return x * x


def fail_at_three(x: int) -> int:
    if x == 3:
        raise ValueError("three")
    return x


def blas_threads(_: int) -> int:
    np.ones((4, 4)) @ np.ones((4, 4))
    return max(pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas")


@pytest.fixture(scope="module")
def processes() -> Processes:
    return Processes(2)


@pytest.fixture(params=["serial", "threads 1", "threads 3", "processes"])
def engine(request, processes):
    return {"serial": Serial(), "threads 1": Threads(1), "threads 3": Threads(3), "processes": processes}[request.param]


def test_results_come_in_the_order_of_tasks(engine) -> None:
    assert list(engine.map(square, range(50))) == [x * x for x in range(50)]
    assert list(engine.map(square, iter([]))) == []
    assert list(engine.map(square, [7])) == [49]


def test_an_exception_comes_through_in_its_place_and_the_engine_goes_on(engine) -> None:
    results = engine.map(fail_at_three, range(100))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert list(engine.map(square, range(5))) == [0, 1, 4, 9, 16]


def test_an_exception_of_the_tasks_themselves_comes_through(engine) -> None:
    def tasks():
        yield 1
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(engine.map(square, tasks()))


def test_few_tasks_are_taken_ahead(engine) -> None:
    taken, most = 0, 0

    def tasks():
        nonlocal taken
        for x in range(100):
            taken += 1
            yield x

    for done, _ in enumerate(engine.map(square, tasks())):
        most = max(most, taken - done)
    assert taken == 100
    assert most <= engine.workers + 3


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_map_that_is_abandoned_ends_at_once(engine, after) -> None:
    started = time.monotonic()
    results = engine.map(square, iter(int, 1))  # endless
    for _ in range(after):
        next(results)
    results.close()
    assert time.monotonic() - started < 20
    assert list(engine.map(square, [2])) == [4]


def test_an_abandoned_map_leaves_no_threads() -> None:
    before = threading.active_count()
    results = Threads(3).map(square, range(100))
    next(results)
    del results
    assert threading.active_count() == before


def test_blas_has_one_thread_inside(engine) -> None:
    assert set(engine.map(blas_threads, range(4))) == {1}


def test_blas_is_as_before_outside(engine) -> None:
    before = blas_threads(0)
    list(engine.map(square, range(4)))
    next(abandoned := engine.map(square, range(9)))
    abandoned.close()
    assert blas_threads(0) == before


def test_engines_by_name() -> None:
    assert isinstance(make_engine("serial"), Serial)
    assert make_engine("threads", 3).workers == 3
    assert make_engine("processes", 5).workers == 5
    assert make_engine().workers == cores()
    with pytest.raises(UsageError, match="no engine 'thread'.*Did you mean 'threads'"):
        make_engine("thread")
    with pytest.raises(UsageError, match="at least 1"):
        make_engine("threads", 0)
