"""The contract of engines, as tests to inherit.

class TestMine(EngineContract):
    plugin = Mine
"""

from __future__ import annotations

import pickle
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import threadpoolctl

from thresher.runtime.engine import Engine, Stateful, reduced
from thresher.runtime.engines.serial import Serial
from thresher.runtime.parameters import parameters_of


class EngineContract:
    """Order, few tasks in flight, exceptions, the same bytes as in this thread, one BLAS thread, and closing.

    Attributes:
        plugin: The engine, a frozen dataclass.
        options: Fields to make it with, next to ``workers``.
        ahead: How many more small tasks than workers it may take before the first result is requested; of large ones
            at most 3.
    """

    plugin: ClassVar[type[Any]]
    options: ClassVar[dict[str, Any]] = {}
    ahead: ClassVar[int] = 3

    @classmethod
    def make(cls) -> Engine:
        """Return an engine with 2 workers, or with its own number if that is fixed."""
        names = [item.name for item in parameters_of(cls.plugin)]
        made: Engine = cls.plugin(**({"workers": 2} if "workers" in names else {}), **cls.options)
        return made

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Iterator[Engine]:
        """Provide one engine for all tests of the class, and close it if it has ``close``."""
        made = cls.make()
        yield made
        if hasattr(made, "close"):
            made.close()

    def test_it_is_a_frozen_dataclass_whose_options_have_help(self) -> None:
        """Its name is the value of ``--engine``; fields other than ``workers`` are options."""
        plugin: Any = self.plugin
        assert is_dataclass(plugin)
        assert vars(plugin)["__dataclass_params__"].frozen
        assert self.plugin.name
        for item in parameters_of(self.plugin):
            assert item.name == "workers" or item.metadata.get("help"), f"the option {item.name} has no help"

    def test_it_has_workers(self, engine: Engine) -> None:
        """It has at least one worker."""
        assert engine.workers >= 1

    def test_results_come_in_the_order_of_tasks(self, engine: Engine) -> None:
        """Also when later tasks finish first, and for no task or one."""
        assert list(engine.map(_square, range(50))) == [x * x for x in range(50)]
        assert list(engine.map(_square, iter([]))) == []
        assert list(engine.map(_square, [7])) == [49]

    def test_functions_keep_their_arguments(self, engine: Engine) -> None:
        """A partial keeps its arguments, and different partials are not confused."""
        assert list(engine.map(partial(_add, 5), range(4))) == [5, 6, 7, 8]
        assert list(engine.map(partial(_add, 6), range(4))) == [6, 7, 8, 9]

    def test_an_exception_is_raised_in_order_and_the_engine_still_works(self, engine: Engine) -> None:
        """Results of earlier tasks are returned first."""
        results = engine.map(_fail_at_three, range(100))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="three"):
            next(results)
        assert list(engine.map(_square, range(5))) == [0, 1, 4, 9, 16]

    def test_an_exception_of_the_iterator_of_tasks_is_raised(self, engine: Engine) -> None:
        """For example, of a file that cannot be read."""

        def tasks() -> Iterator[int]:
            yield 1
            raise OSError("no more")

        with pytest.raises(OSError, match="no more"):
            list(engine.map(_square, tasks()))

    @pytest.mark.parametrize("large", [False, True])
    def test_few_tasks_are_taken_ahead(self, engine: Engine, large: bool) -> None:
        """Tasks can be so large that only a few fit in memory."""
        taken, most = 0, 0
        count = 12 if large else 100

        def tasks() -> Iterator[Any]:
            nonlocal taken
            for x in range(count):
                taken += 1
                yield np.full(2**18, x, np.float64) if large else x

        for done, _ in enumerate(engine.map(_largest if large else _square, tasks())):
            most = max(most, taken - done)
        assert taken == count
        assert most <= engine.workers + (3 if large else self.ahead)

    @pytest.mark.parametrize("after", [0, 1, 5])
    def test_an_abandoned_map_ends_at_once(self, engine: Engine, after: int) -> None:
        """Also with endless tasks; the engine still works afterwards."""
        started = time.monotonic()
        results = engine.map(_square, iter(int, 1))  # endless
        for _ in range(after):
            next(results)
        results.close()  # type: ignore[attr-defined]
        assert time.monotonic() - started < 20
        assert list(engine.map(_square, [2])) == [4]

    def test_the_bytes_are_those_of_this_thread(self, engine: Engine) -> None:
        """Products of float32 matrices."""
        tasks = [np.random.default_rng(seed).normal(size=(60, 48)).astype(np.float32) for seed in range(7)]
        here = [product.tobytes() for product in Serial().map(_product, tasks)]
        assert [product.tobytes() for product in engine.map(_product, tasks)] == here

    @pytest.mark.parametrize("count", [0, 1, 16, 40])
    def test_sums_have_the_bytes_of_this_thread(self, engine: Engine, count: int) -> None:
        """Also if the engine adds them up where the tasks run; what else the tasks return comes in their order."""
        kept, total = _reduced(engine, count)
        here, expected = _reduced(Serial(), count)
        assert kept == here == list(range(count))
        assert (total is None) == (expected is None) == (not count)
        assert count == 0 or total.tobytes() == expected.tobytes()

    def test_a_state_is_made_once_by_a_worker(self, engine: Engine, tmp_path: Path) -> None:
        """Of a function with a state, such as a model, which gets an engine for parts of a task."""
        results = list(engine.map(Stateful(partial(_make, tmp_path), _name_of), range(40)))
        assert [x for x, _ in results] == list(range(40))
        assert {name for _, name in results} == {path.name for path in tmp_path.iterdir()}
        assert len(list(tmp_path.iterdir())) <= engine.workers
        with pytest.raises(OSError, match="none"):
            list(engine.map(Stateful(partial(_make, tmp_path / "none"), _name_of), range(4)))

    def test_blas_has_one_thread_inside_and_is_as_before_outside(self, engine: Engine) -> None:
        """More BLAS threads per worker would compete for cores, and could round differently."""
        before = _blas_threads(0)
        assert set(engine.map(_blas_threads, range(4))) == {1}
        next(abandoned := engine.map(_square, range(9)))
        abandoned.close()  # type: ignore[attr-defined]
        assert _blas_threads(0) == before

    def test_it_pickles(self, engine: Engine) -> None:
        """Before and after use; the copy starts its own workers."""
        assert list(engine.map(_square, [3])) == [9]
        again = pickle.loads(pickle.dumps(engine))
        assert again == engine
        assert pickle.loads(pickle.dumps(self.make())) == self.make()

    def test_it_leaves_no_threads_and_can_be_closed(self) -> None:
        """After ``close()``, if it has that; closing twice is allowed, and a closed engine starts again."""
        before = threading.active_count()
        engine = self.make()
        next(results := engine.map(_square, range(100)))
        results.close()  # type: ignore[attr-defined]
        if hasattr(engine, "close"):
            engine.close()
            engine.close()
            assert threading.active_count() == before
            assert list(engine.map(_square, [5])) == [25]
            engine.close()
        assert threading.active_count() == before


def _reduced(engine: Engine, count: int) -> tuple[list[int], Any]:
    sums = reduced(engine, _numbers, range(count), _sum)
    return list(sums), sums.total


def _numbers(x: int) -> tuple[int, Any]:
    return x, np.random.default_rng(x).normal(size=5) * 10.0 ** (x % 7)


def _sum(one: Any, other: Any) -> Any:
    one += other  # the first may be changed
    return one


def _square(x: int) -> int:
    time.sleep((x % 3) * 0.002)  # later tasks may finish first
    return x * x


def _largest(rows_N: Any) -> int:
    return int(rows_N.max())


def _add(to: int, x: int) -> int:
    return to + x


def _fail_at_three(x: int) -> int:
    if x == 3:
        raise ValueError("three")
    return x


def _make(folder: Path, helpers: Engine) -> str:
    assert list(helpers.map(_square, range(5))) == [0, 1, 4, 9, 16]
    name = uuid.uuid4().hex
    (folder / name).touch()
    return name


def _name_of(state: str, x: int) -> tuple[int, str]:
    time.sleep(0.005)
    return x, state


def _product(rows_ND: Any) -> Any:
    return rows_ND @ rows_ND.T


def _blas_threads(_: int) -> int:
    np.ones((4, 4)) @ np.ones((4, 4))
    return max(int(pool["num_threads"]) for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas")
