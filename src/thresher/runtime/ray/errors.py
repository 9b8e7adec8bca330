"""Ray's errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from thresher.errors import ThresherError, UsageError


@contextmanager
def readable_errors(node: str = "") -> Iterator[None]:
    """Raise errors of Ray as :func:`readable` ones."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise readable(error, node) from None


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
