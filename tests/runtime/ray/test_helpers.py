"""The engine with which an actor has parts of its tasks done, with a simulated Ray."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from thresher import Serial
from thresher.runtime.ray.helpers import Helpers, helpers_of
from thresher.runtime.ray.needs import Needs

from .simulated import simulated_ray


def node(**resources: float) -> dict[str, Any]:
    return {"Alive": True, "Resources": resources}


@pytest.mark.parametrize(
    ("actors", "needs", "nodes", "helpers"),
    [
        (1, Needs(), [node(CPU=4)], Helpers(3, 5, False, 1)),
        (2, Needs(), [node(CPU=4)], Helpers(1, 5, False, 0.5)),
        (3, Needs(), [node(CPU=4)], Serial()),
        (2, Needs(), [node(CPU=1), node(CPU=5)], Helpers(2, 5, False, 0.5)),
        (2, Needs(1, 1), [node(CPU=4, GPU=1), node(CPU=4, GPU=1), node(CPU=8)], Helpers(7, 5, False, 1)),
        (1, Needs(2), [node(CPU=4), node(CPU=1)], Helpers(2, 5, True, 1)),
        (1, Needs(1, 0, {"disk": 1}), [node(CPU=4, disk=1), node(CPU=8)], Helpers(3, 5, True, 1)),
    ],
)
def test_actors_share_the_cpus_that_none_has_reserved(actors: int, needs: Needs, nodes: Any, helpers: Any) -> None:
    with simulated_ray(1) as ray:
        ray.alive = nodes
        assert helpers_of(actors, needs, 5) == helpers


class Strategy:
    """Where a task runs, in a version of Ray that does not know the option."""

    def __init__(self, node_id: str, soft: bool) -> None:
        self.node_id, self.soft = node_id, soft


class Spilling(Strategy):
    def __init__(self, node_id: str, soft: bool, _spill_on_unavailable: bool = False) -> None:
        super().__init__(node_id, soft)
        self.spills = _spill_on_unavailable


@pytest.mark.parametrize("known", [Strategy, Spilling])
@pytest.mark.parametrize("bound", [False, True])
def test_parts_run_on_the_node_of_the_actor_and_on_others_if_it_is_busy(
    monkeypatch: pytest.MonkeyPatch, known: type[Any], bound: bool
) -> None:
    """By an option of Ray that is private: a version without it chooses the node itself."""
    monkeypatch.setitem(
        sys.modules, "ray.util.scheduling_strategies", SimpleNamespace(NodeAffinitySchedulingStrategy=known)
    )
    with simulated_ray(2) as ray:
        assert list(Helpers(2, 0, bound, 1.0).map(abs, [-1, -2, -3])) == [1, 2, 3]
        near = ray.options["scheduling_strategy"]
    if bound:
        assert (near.node_id, near.soft) == ("here", False)
    elif known is Spilling:
        assert (near.node_id, near.soft, near.spills) == ("here", True, True)
    else:
        assert near == "DEFAULT"
