"""What Ray reserves for a task, and which nodes have it."""

from __future__ import annotations

from typing import Any

import pytest

from thresher.runtime.engine import cores
from thresher.runtime.ray.needs import Needs


def node(**resources: float) -> dict[str, Any]:
    return {"Resources": resources}


@pytest.mark.parametrize(
    ("needs", "resources", "count"),
    [
        (Needs(), {"CPU": 8}, 8),
        (Needs(), {}, 0),
        (Needs(0.5), {"CPU": 1.5}, 3),
        (Needs(2), {"CPU": 7}, 3),
        (Needs(1, 1), {"CPU": 8}, 0),
        (Needs(1, 1), {"CPU": 8, "GPU": 2}, 2),
        (Needs(1, 0.25), {"CPU": 8, "GPU": 2}, 8),
        (Needs(1, 0, {"disk": 3}), {"CPU": 8, "disk": 7}, 2),
        (Needs(1, 0, {"disk": 3}), {"CPU": 8}, 0),
        (Needs(1, 0, {"disk": 0}), {"CPU": 8}, 8),
        (Needs(0), {"CPU": 64}, cores()),
    ],
)
def test_how_many_tasks_a_node_can_run(needs: Needs, resources: dict[str, float], count: int) -> None:
    assert needs.capacity(node(**resources)) == count


def test_nodes_without_a_gpu_do_parts_of_tasks_that_need_one() -> None:
    """Not if other resources are needed: those nodes were not checked for files."""
    assert Needs(1, 1).uses(node(CPU=1))
    assert not Needs(1, 1).uses(node(CPU=0.5))
    assert not Needs(1, 1, {"disk": 1}).uses(node(CPU=1))
    assert not Needs(2, 1).uses(node(CPU=4))
    assert not Needs(1, 0, {"disk": 1}).uses(node(CPU=1))
    assert Needs(2, 1).uses(node(CPU=2, GPU=1))


def test_what_messages_and_ray_are_given() -> None:
    assert str(Needs(0.5, 1, {"disk": 2, "tape": 0})) == "CPU 0.5, GPU 1, disk 2"
    assert Needs(0.5, 1, {"disk": 2}).options == {"num_cpus": 0.5, "num_gpus": 1, "resources": {"disk": 2}}
    assert Needs().options == {"num_cpus": 1.0, "num_gpus": 0.0, "resources": None}
