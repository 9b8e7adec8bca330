"""The nodes of a cluster, functions that run on them, and Ray's errors in one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from thresher.errors import ThresherError, UsageError


def alive_nodes() -> list[dict[str, Any]]:
    """Return the nodes that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def remote(fn: Callable[..., Any]) -> Any:
    """Return a function that runs in workers; a new one would be sent to each of them again."""
    import ray

    return _remote_of_job(fn, ray.get_runtime_context().get_job_id())


@lru_cache(maxsize=8)
def _remote_of_job(fn: Callable[..., Any], _: str) -> Any:
    import ray

    return ray.remote(fn)


def readable(error: Exception, node: str = "") -> ThresherError:
    """Return an error of Ray as one line."""
    import ray

    where = f" on node {node}" if node else ""
    if "No module named" in str(error):
        missing = next(line for line in str(error).splitlines() if "No module named" in line).strip()
        return UsageError(f"a worker of Ray{where} cannot start ({missing}); install thresher on every node")
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return ThresherError(
            f"memory ran out{where}, and Ray stopped workers several times; use fewer --workers, or reserve more CPUs "
            "for a task, for example --engine ray:num_cpus=2"
        )
    if isinstance(
        error, (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.RayActorError)
    ):
        return ThresherError(
            f"a worker process of Ray was killed{where}, several times, perhaps because it ran out of memory; use "
            "fewer --workers, or reserve more CPUs for a task, for example --engine ray:num_cpus=2"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]
    return ThresherError(f"a worker of Ray{where} failed ({why})")
