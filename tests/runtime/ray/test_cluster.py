"""The nodes of a cluster, with a simulated Ray."""

from __future__ import annotations

from typing import Any

import pytest

from thresher import ThresherError
from thresher.runtime.ray.cluster import alive_nodes, bytes_in_flight, check_left, environment, remote
from thresher.runtime.ray.needs import Needs

from .simulated import simulated_ray


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


def test_what_may_wait_is_a_part_of_the_smallest_object_store() -> None:
    with simulated_ray(1) as ray:
        ray.alive = [node(object_store_memory=4e9), node(CPU=1), node(False, object_store_memory=1.0)]
        assert bytes_in_flight() == 0.3 * 4e9
        assert bytes_in_flight(0.5) == 0.15 * 4e9
        ray.alive.append(node(object_store_memory=1e9))
        assert bytes_in_flight() == 0.3 * 1e9
        ray.alive = [node(CPU=1)]
        assert bytes_in_flight() == 0.3 * 2**30


def test_without_a_node_that_can_run_a_task_nothing_is_waited_for() -> None:
    with simulated_ray(1) as ray:
        ray.alive = [node(False, CPU=8), node(CPU=1)]
        assert alive_nodes() == [node(CPU=1)]
        check_left(Needs())
        with pytest.raises(
            ThresherError, match=r"^no node is left that has what a task needs \(CPU 2, disk 1\); start"
        ):
            check_left(Needs(2, 0, {"disk": 1}))


def test_workers_have_the_kernels_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    assert environment() == {}
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert environment() == {"runtime_env": {"env_vars": {"OPENBLAS_CORETYPE": "Haswell"}}}


def test_a_function_is_sent_once_to_each_cluster() -> None:
    with simulated_ray(1):
        first = remote(abs)
        assert remote(abs) is first
    with simulated_ray(1):
        assert remote(abs) is not first
