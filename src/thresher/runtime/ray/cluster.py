"""The nodes of a cluster, and functions that run on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from thresher.errors import ThresherError
from thresher.runtime.ray.errors import readable
from thresher.runtime.ray.needs import Needs
from thresher.runtime.ray.packing import pack, unpack
from thresher.runtime.ray.worker import packed_call, place

R = TypeVar("R")

_IN_FLIGHT = 0.3  # of the object store of a node: bytes of tasks and results that wait


def alive_nodes() -> list[dict[str, Any]]:
    """Return the nodes that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def check_left(needs: Needs) -> None:
    """Refuse to wait for ever.

    Raises:
        ThresherError: The nodes that have what a task needs are lost.
    """
    if not any(map(needs.capacity, alive_nodes())):
        raise ThresherError(
            f"no node is left that has what a task needs ({needs}); start one, and run the command again"
        )


def bytes_in_flight(share: float = 1.0) -> float:
    """Return how many bytes of tasks and results may wait, with a share of the object store of a node, up to 1."""
    stores = (node["Resources"].get("object_store_memory", 0) for node in alive_nodes())
    return share * _IN_FLIGHT * min(filter(None, stores), default=2**30)


def on_every_node(
    needs: Needs, fn: Callable[[Any], R], argument: Any, options: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], R]]:
    """Yield each node that can run tasks or parts of them, and what a function returns there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in alive_nodes() if needs.uses(node)]
    packed = ray.put(pack(argument))
    sent = []
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        how = {"num_cpus": 0, "max_retries": 1, "scheduling_strategy": there, **options}
        sent.append(remote(packed_call).options(**how).remote(place(), fn, packed))
    for node, result in zip(nodes, sent, strict=True):
        try:
            answer = unpack(ray.get(result))
        except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
            continue  # it has just left the cluster
        except ray.exceptions.RayError as error:
            raise readable(error, node["NodeManagerAddress"]) from None
        yield node, answer


def environment() -> dict[str, Any]:
    """Return the option that gives workers the environment of this process as far as results depend on it."""
    kernels = os.environ.get("OPENBLAS_CORETYPE")
    return {"runtime_env": {"env_vars": {"OPENBLAS_CORETYPE": kernels}}} if kernels else {}


def remote(fn: Callable[..., Any]) -> Any:
    """Return a function that runs in workers; a new one would be sent to each of them again."""
    import ray

    return _remote_of_job(fn, ray.get_runtime_context().get_job_id())


@lru_cache(maxsize=8)
def _remote_of_job(fn: Callable[..., Any], _: str) -> Any:
    import ray

    return ray.remote(fn)
