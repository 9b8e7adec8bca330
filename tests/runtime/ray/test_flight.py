"""Tasks in flight: order, limits, groups, errors; with carriers of this process, and with a simulated Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.runtime.ray.carriers import How, Tasks
from thresher.runtime.ray.flight import Flight
from thresher.runtime.ray.packing import Packed, pack, size_of, unpack
from thresher.runtime.ray.worker import Done

from .simulated import CLOCK, simulated_ray


@dataclass(frozen=True)
class Work:
    """A task."""

    number: int
    seconds: float = 0.0
    bytes: int = 0
    result_bytes: int = 0
    fails: bool = False
    padding: bytes = b""

    def result(self) -> tuple[int, bytes]:
        CLOCK.sleep(self.seconds)
        if self.fails:
            raise ValueError(f"task {self.number}")
        return self.number, bytes(self.result_bytes)


def work(**values: Any) -> Work:
    return Work(**values, padding=bytes(values.get("bytes", 0)))


class Here:
    """Carriers that run a group when its result is taken.

    Attributes:
        groups: Numbers of tasks of the groups that were sent, without those that were sent again.
        ran: How many tasks of each group ran.
        waiting: Packed groups that were sent, and not taken.
        most_groups: The largest number of those.
        sent_at: Bytes of those, just before another one was sent.
        closed: How many were waiting at the end.
    """

    def __init__(self) -> None:
        self.groups: list[int] = []
        self.ran: list[int] = []
        self.last = -1  # number of the last task that was sent
        self.waiting: list[Packed] = []
        self.sent_at: list[int] = []
        self.most_groups = 0
        self.closed: list[int] = []

    def send(self, tasks: Packed) -> Packed:
        numbers = [task.number for task in unpack(tasks)]
        again = numbers[0] <= self.last
        if not again:
            self.sent_at.append(sum(map(size_of, self.waiting)))
            self.groups.append(len(numbers))
            self.last = numbers[-1]
        self.waiting.append(tasks)
        if not again:
            self.most_groups = max(self.most_groups, len(self.waiting))
        return tasks

    def result(self, sent: Packed) -> Packed:
        (place,) = (i for i, one in enumerate(self.waiting) if one is sent)
        del self.waiting[place]
        begin, results, error = CLOCK.now, [], None
        for task in unpack(sent):
            try:
                results.append(task.result())
            except ValueError as failed:
                error = partial(type(failed), *failed.args)
                break
            if CLOCK.now - begin > 1:
                break
        self.ran.append(len(results))
        return pack(Done(results, error, CLOCK.now - begin))

    def tasks(self, sent: Packed) -> Packed:
        return sent

    def close(self, waiting: Sequence[Packed]) -> None:
        assert {id(one) for one in waiting} == {id(one) for one in self.waiting}
        self.closed.append(len(waiting))


LIMIT = 30_000

TASKS = st.lists(
    st.builds(
        dict,
        seconds=st.sampled_from([0.0, 0.001, 0.01, 0.2, 3.0]),
        bytes=st.sampled_from([0, 100, 9_000, 40_000]),
        result_bytes=st.sampled_from([0, 100, 9_000, 40_000]),
        fails=st.integers(0, 30).map(lambda x: x == 0),
    ),
    max_size=150,
)


@given(made=TASKS, workers=st.integers(1, 5), known=st.booleans(), most=st.sampled_from([1, 7, 1024]))
def test_results_come_in_order_and_the_limits_hold(made: Any, workers: int, known: bool, most: int) -> None:
    tasks = [work(number=i, **how) for i, how in enumerate(made)]
    first = next((task.number for task in tasks if task.fails), None)
    with simulated_ray(1):
        carriers = Here()
        results = Flight(carriers, workers, len(tasks) if known else 0, LIMIT, most).run(iter(tasks))
        for task in tasks[:first]:
            assert next(results) == (task.number, bytes(task.result_bytes))
        if first is None:
            assert list(results) == []
            assert sum(carriers.groups) == len(tasks)
            assert carriers.closed == [0]
        else:
            with pytest.raises(ValueError, match=f"^task {first}$"):
                next(results)
            assert carriers.closed == [len(carriers.waiting)]
    assert carriers.most_groups <= workers + 2 + workers // 4
    assert max(carriers.groups, default=0) <= most
    assert max(carriers.sent_at, default=0) <= LIMIT


def groups(tasks: Sequence[Work], workers: int = 2, known: bool = True, limit: float = 1e9) -> list[int]:
    with simulated_ray(1):
        carriers = Here()
        list(Flight(carriers, workers, len(tasks) if known else 0, limit).run(tasks))
    return carriers.groups


def test_tasks_are_sent_together_for_about_50_ms() -> None:
    """Twice as many as last time at most, also the first time; at the end every worker gets some."""
    unknown = groups([work(number=i, seconds=0.001) for i in range(1_000)], known=False)
    assert unknown[:4] == [1] * 4
    assert max(unknown) == 50
    assert all(after <= 2 * max(unknown[: i + 1]) for i, after in enumerate(unknown[1:]))
    known = groups([work(number=i, seconds=0.001) for i in range(1_000)])
    assert known[:16] == unknown[:16]
    assert known[-4:] == [1] * 4
    assert groups([work(number=i, seconds=0.06) for i in range(20)]) == [1] * 20
    assert max(groups([work(number=i) for i in range(5_000)], known=False)) == 1024


def test_groups_become_small_again_when_tasks_become_long() -> None:
    sizes = groups([work(number=i, seconds=0.001 if i < 1_000 else 0.1) for i in range(1_500)], known=False)
    assert max(sizes) == 50
    assert sizes[-1] == 1


@pytest.mark.parametrize("kind", ["bytes", "result_bytes"])
def test_large_tasks_and_large_results_are_not_sent_together(kind: str) -> None:
    assert groups([work(number=i, **{kind: 2**21}) for i in range(20)]) == [1] * 20
    assert 2 <= max(groups([work(number=i, **{kind: 2**18}) for i in range(60)])) <= 4


def test_tasks_that_are_suddenly_large_are_not_sent_together() -> None:
    """After 5,000 tasks without a byte a group has 1,024; of those of 1 MB at most two are sent together."""
    drawn = 0

    def tasks() -> Any:
        nonlocal drawn
        for i in range(5_200):
            drawn += 1
            yield work(number=i, bytes=2**20 if i >= 5_000 else 0)

    with simulated_ray(1):
        carriers, sent = Here(), list[int]()
        flight = Flight(carriers, 2, 0, 1e9)
        for number, result in enumerate(flight.run(tasks())):
            assert result == (number, b"")
            sent.append(drawn - number - 1)
    assert max(carriers.groups) == 1024
    assert sum(carriers.groups) == 5_200
    of_large = [n for n, end in zip(carriers.groups, np.cumsum(carriers.groups), strict=True) if end > 5_001]
    assert max(of_large) <= 2
    assert max(sent[4_999:]) <= 32 + 4 * 2, "drawn and not yet taken: a step, and what was sent"


def test_tasks_that_are_suddenly_long_are_shared_by_all_workers() -> None:
    """After 5,000 tasks without work a group has 1,024; of those of 3 seconds each runs alone, and none twice."""
    tasks = [work(number=i, seconds=3.0 if i >= 5_000 else 0.0) for i in range(5_100)]
    with simulated_ray(1):
        carriers = Here()
        flight = Flight(carriers, 4, 0, 1e9)
        assert [number for number, _ in flight.run(iter(tasks))] == list(range(5_100))
    assert max(carriers.groups) == 1024
    assert sum(carriers.ran) == 5_100
    of_long = [n for n, end in zip(carriers.ran, np.cumsum(carriers.ran), strict=True) if end > 5_001]
    assert of_long == [1] * 99
    with simulated_ray(4):
        list(Flight(Tasks(Work.result, How({"num_cpus": 1}, 0, lambda: None)), 4, 0, 1e9).run(iter(tasks)))
        assert CLOCK.now < 3 * 100 / 4 * 1.5


def test_large_results_count_before_they_are_there() -> None:
    """As many as the last ones had: if 10 fit, no more than 11 groups wait."""
    with simulated_ray(1):
        carriers = Here()
        tasks = (work(number=i, seconds=0.06, result_bytes=20_000) for i in range(200))
        results = Flight(carriers, 40, 0, 10 * 20_500).run(tasks)
        next(results)
        assert carriers.most_groups == 40 + 2 + 10  # of which nothing was known
        for _ in range(60):
            next(results)
        assert 9 <= len(carriers.waiting) <= 11
        results.close()


def test_one_task_is_sent_however_large_it_is() -> None:
    tasks = [work(number=i, bytes=100_000) for i in range(5)]
    with simulated_ray(1):
        carriers = Here()
        assert len(list(Flight(carriers, 3, 5, 1).run(tasks))) == 5
    assert carriers.most_groups == 1


def test_what_was_sent_is_given_up_if_the_tasks_end_in_an_error_or_nobody_wants_more() -> None:
    def broken() -> Any:
        yield work(number=0)
        yield work(number=1)
        raise OSError("no more")

    with simulated_ray(1):
        carriers = Here()
        with pytest.raises(OSError, match="no more"):
            list(Flight(carriers, 2, 0, 1e9).run(broken()))
        assert carriers.closed == [2]
        carriers = Here()
        results = Flight(carriers, 2, 0, 1e9).run(work(number=i) for i in range(100))
        next(results)
        results.close()
        assert carriers.closed == [len(carriers.waiting)]
        assert carriers.waiting
