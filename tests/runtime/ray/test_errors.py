"""Ray's errors in one line, with the errors of a simulated Ray."""

from __future__ import annotations

import re

import pytest

from thresher import ThresherError, UsageError
from thresher.runtime.ray.errors import readable_errors

from .simulated import ERRORS, simulated_ray

TRACEBACK = "ray::call()\n  File 'x.py'\n\nValueError: too long\n"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        (
            "OutOfMemoryError",
            "a\nb",
            "memory ran out{where}, and Ray stopped workers several times; use fewer --workers",
        ),
        ("WorkerCrashedError", "a\nb", "a worker process of Ray was killed{where}, several times, perhaps because"),
        ("NodeDiedError", "a\nb", "a worker process of Ray was killed{where}, several times, perhaps because"),
        ("RayActorError", "a\nb", "a worker process of Ray was killed{where}, several times, perhaps because"),
        ("RayTaskError", TRACEBACK, "a worker of Ray{where} failed (ValueError: too long)"),
        ("ObjectLostError", "\n a\nb", "a worker of Ray{where} failed (a)"),
        (
            "RayTaskError",
            "ray::call()\n ModuleNotFoundError: No module named 'thresher'\n",
            "a worker of Ray{where} cannot start (ModuleNotFoundError: No module named 'thresher'); install thresher",
        ),
    ],
)
@pytest.mark.parametrize(("node", "where"), [("", ""), ("10.0.0.7", " on node 10.0.0.7")])
def test_an_error_of_ray_is_one_line(name: str, text: str, line: str, node: str, where: str) -> None:
    with (
        simulated_ray(1),
        pytest.raises(ThresherError, match=f"^{re.escape(line.format(where=where))}") as caught,
        readable_errors(node),
    ):
        raise getattr(ERRORS, name)(text)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert isinstance(caught.value, UsageError) == ("No module" in text)


def test_other_errors_pass() -> None:
    with simulated_ray(1), pytest.raises(KeyError), readable_errors():
        raise KeyError("mine")
