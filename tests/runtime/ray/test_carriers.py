"""Tasks of Ray, actors and sums, with a simulated Ray: order, what runs again, what is in flight at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher import Serial, ThresherError
from thresher.runtime.engine import reduced
from thresher.runtime.ray.carriers import Actors, How, Parts, Tasks
from thresher.runtime.ray.flight import Flight
from thresher.runtime.ray.sums import Sums

from .simulated import CLOCK, ERRORS, Killed, simulated_ray

CPU = {"num_cpus": 1}
CALLS: list[int] = []  # numbers of the tasks that ran


@dataclass(frozen=True)
class Work:
    """A task: its time, whether it raises an error, and how many workers it kills before that."""

    number: int
    seconds: float = 0.06
    fails: bool = False
    kills: int = 0
    padding: bytes = b""


def done(task: Work) -> int:
    CALLS.append(task.number)
    CLOCK.sleep(task.seconds)
    if CALLS.count(task.number) <= task.kills:
        raise Killed
    if task.fails:
        raise ValueError(f"task {task.number}")
    return task.number


def pair(task: Work) -> tuple[int, str]:
    return done(task), str(task.number)


def joined(one: str, other: str) -> str:
    return f"({one} {other})"


def nothing_lost() -> None:
    """Looks for nodes, and finds some."""


def flown(flying: Any, tasks: Iterable[Work], workers: int = 2) -> Any:
    CALLS.clear()
    return Flight(flying, workers, 0, 1e9).run(tasks)


WORK = st.tuples(st.sampled_from([0.0, 0.001, 0.06, 0.2, 70.0]), st.integers(0, 30).map(lambda x: x == 0))


@pytest.mark.parametrize("kind", [Tasks, Actors])
@given(
    made=st.lists(WORK, max_size=60),
    killer=st.integers(0, 80),
    kills=st.integers(1, 4),
    workers=st.integers(1, 4),
    cpus=st.integers(1, 4),
    retries=st.integers(0, 3),
)
def test_lost_tasks_run_again_and_those_that_fail_do_not(
    kind: Any, made: list[tuple[float, bool]], killer: int, kills: int, workers: int, cpus: int, retries: int
) -> None:
    tasks = [Work(i, *how, kills if i == killer else 0) for i, how in enumerate(made)]
    last = next((task for task in tasks if task.fails or task.kills > retries), None)
    good = [task.number for task in tasks[: last.number if last else None]]
    with simulated_ray(cpus) as ray:
        more = (workers,) if kind is Actors else ()
        taken, ending = [], None
        try:
            for result in flown(kind(done, How(CPU, retries, nothing_lost), *more), tasks, workers):
                taken.append(result)
        except (ThresherError, ValueError) as error:
            ending = error
        if last is None:
            assert (ending, taken) == (None, good)
            assert not ray.cancelled
        elif last.kills > retries:
            assert "was killed, several times" in str(ending)
            assert CALLS.count(last.number) == retries + 1
            together = good[len(taken) :]  # results of its group are lost with it
            assert all(CALLS.count(number) == retries + 1 for number in together)
        else:
            assert (str(ending), taken) == (f"task {last.number}", good)
            assert CALLS.count(last.number) == last.kills + 1
        assert taken == good[: len(taken)]
        if killer >= len(tasks):
            assert max(Counter(CALLS).values(), default=1) == 1
        if kind is Actors:
            assert ray.most_calls <= 2
            assert ray.cpus == cpus  # no actor is left


def test_only_the_group_that_a_lost_actor_worked_on_counts_as_lost() -> None:
    """The next one waits with it, and goes to another after it."""
    tasks = [Work(i, kills=2 if i == 0 else 0) for i in range(6)]
    with simulated_ray(1):
        assert list(flown(Actors(done, How(CPU, 2, nothing_lost), 1), tasks)) == list(range(6))
    assert CALLS == [0, 0, 0, 1, 2, 3, 4, 5]


def test_actors_that_cannot_start_are_an_error() -> None:
    for lost, fine in ((2, True), (3, False)):
        with simulated_ray(2) as ray:
            ray.starts_lost = lost
            results = flown(Actors(done, How(CPU, 2, nothing_lost), 1), [Work(0)])
            if fine:
                assert list(results) == [0]
            else:
                with pytest.raises(ThresherError, match="was killed"):
                    list(results)
            assert ray.cpus == 2


@pytest.mark.parametrize("kind", [Tasks, Actors])
def test_while_nothing_comes_back_it_looks_whether_nodes_are_left(kind: Any) -> None:
    looks: list[float] = []

    def look() -> None:
        looks.append(CLOCK.now)
        if len(looks) == 3:
            raise ThresherError("no node is left")

    more = (1,) if kind is Actors else ()
    with simulated_ray(1):
        assert list(flown(kind(done, How(CPU, 0, look), *more), [Work(0, seconds=70)])) == [0]
        assert len(looks) == 2
    with simulated_ray(0), pytest.raises(ThresherError, match="no node is left"):
        list(flown(kind(done, How(CPU, 0, look), *more), [Work(0)]))


def test_tasks_of_lost_workers_are_sent_again_by_ray_and_others_are_not() -> None:
    with simulated_ray(1) as ray:
        list(flown(Tasks(done, How({"num_cpus": 3, "x": 1}, 7, nothing_lost)), [Work(0)]))
        assert ray.options == {"max_retries": 7, "retry_exceptions": False, "num_cpus": 3, "x": 1}
        list(flown(Actors(done, How({"num_cpus": 3, "x": 1}, 7, nothing_lost), 1), [Work(0)]))
        assert ray.options == {"max_restarts": 0, "max_task_retries": 0, "num_cpus": 3, "x": 1}


@pytest.mark.parametrize("kind", [Tasks, Actors])
def test_a_map_that_is_abandoned_gives_up_what_was_sent(kind: Any) -> None:
    more = (2,) if kind is Actors else ()
    with simulated_ray(2) as ray:
        results = flown(kind(done, How(CPU, 0, nothing_lost), *more), (Work(i) for i in range(100)))
        assert next(results) == 0
        results.close()
        assert ray.cpus == 2 if kind is Actors else len(ray.cancelled) == 3
    assert len(CALLS) <= 4


@pytest.mark.parametrize("padding", [b"", bytes(200_000)])
def test_an_actor_does_parts_itself_that_no_cpu_is_free_for(padding: bytes) -> None:
    """Also those that are in the object store."""
    tasks = [Work(i, padding=padding) for i in range(4)]
    with simulated_ray(0) as ray:
        assert list(flown(Parts(done, How(CPU, 0, nothing_lost)), tasks)) == [0, 1, 2, 3]
        assert len(ray.cancelled) == 4
    with simulated_ray(1) as ray:
        assert list(flown(Parts(done, How(CPU, 0, nothing_lost)), tasks)) == [0, 1, 2, 3]
        assert not ray.cancelled


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        (Tasks, "OutOfMemoryError", "memory ran out, and Ray stopped workers several times"),
        (Actors, "OutOfMemoryError", "memory ran out, and Ray stopped workers several times"),
        (Tasks, "ObjectLostError", r"a worker of Ray failed \(some line\)"),
        (Actors, "ObjectLostError", r"a worker of Ray failed \(some line\)"),
        (Tasks, "RayError", r"a worker of Ray failed \(some line\)"),
        (Actors, "RayError", r"a worker of Ray failed \(some line\)"),
    ],
)
def test_errors_of_ray_are_one_line(kind: Any, name: str, why: str) -> None:
    """An actor that was lost for another reason is replaced; any other error ends the map."""
    more = (1,) if kind is Actors else ()
    with simulated_ray(1) as ray:
        ray.fail_with(getattr(ERRORS, name)("some line\nand another"))
        with pytest.raises(ThresherError, match=f"^{why}"):
            list(flown(kind(done, How(CPU, 1, nothing_lost), *more), [Work(0)]))
        assert ray.failed == (2 if kind is Actors and name != "RayError" else 1)


# --- sums -----------------------------------------------------------------------------------------


def added(count: int, kills: Callable[[int], int] = lambda _: 0) -> tuple[list[int], Any, int]:
    """What comes in order, the sum, and how many calls added something up."""
    CALLS.clear()
    with simulated_ray(3) as ray:
        flying = Sums(pair, How(CPU, 3, nothing_lost), joined)
        kept = []
        for one in Flight(flying, 3, count, 1e9, most=1).run(Work(i, kills=kills(i)) for i in range(count)):
            kept.append(one)
            flying.add_next()
        return kept, flying.total(), ray.submitted - count


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 33, 256, 257])
def test_sums_are_added_in_the_tree_of_other_engines(count: int) -> None:
    expected = reduced(Serial(), pair, (Work(i) for i in range(count)), joined)
    kept = list(expected)
    assert added(count)[:2] == (kept, expected.total)


def test_sixteen_parts_are_added_by_one_call() -> None:
    assert [added(count)[2] for count in (0, 1, 2, 16, 17, 32, 33, 256, 257)] == [0, 0, 1, 1, 2, 3, 3, 17, 18]


def test_parts_of_lost_workers_are_made_again() -> None:
    assert added(40, lambda x: x % 3)[:2] == added(40)[:2]


def test_a_task_that_fails_ends_a_sum() -> None:
    with simulated_ray(2):
        results = Flight(Sums(pair, How(CPU, 3, nothing_lost), joined), 2, 0, 1e9, most=1).run(
            [Work(0), Work(1, fails=True), Work(2)]
        )
        assert next(results) == 0
        with pytest.raises(ValueError, match="^task 1\n"):
            next(results)
