"""A file system that fails as told: local files behind ``faulty://``, read from a folder.

The plan is a JSON file: name of a file -> {"error": a key of ERRORS, "after": reads that succeed first, "times": reads
that fail, -1 for all}. Reads are counted in files next to the plan, so that a plan also works in other processes.
"""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any, ClassVar

from fsspec import AbstractFileSystem, register_implementation
from fsspec.implementations.local import LocalFileSystem

from tests import toy

PLAN = "FAULTY_PLAN"  # environment variable: path of the plan


class HttpError(Exception):
    """An error of a library for HTTP: it only carries a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


def not_found_because(cause: Exception) -> Exception:
    """What fsspec's HTTP file system raises for any failure."""
    error = FileNotFoundError("https://host/file")
    error.__cause__ = cause
    return error


ERRORS: dict[str, Any] = {
    "expired": lambda: PermissionError("The provided token has expired."),
    "reset": lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    "slow": lambda: TimeoutError("timed out"),
    "busy": lambda: HttpError(503),
    "hidden": lambda: not_found_because(HttpError(502)),
    "forbidden": lambda: not_found_because(HttpError(403)),
    "io": lambda: OSError(errno.EIO, "Input/output error"),
    "memory": lambda: MemoryError("no memory"),
    "import": lambda: ImportError("Install s3fs to access S3"),
    "full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "key": lambda: KeyError("Contents"),
    "bug": lambda: RuntimeError("a bug"),
}


class FaultyFile(io.FileIO):
    """A local file whose reads may fail."""

    def read(self, size: int = -1) -> bytes:  # type: ignore[override]
        fail(Path(str(self.name)))
        return super().read(size) or b""

    def readinto(self, buffer: Any) -> int:
        fail(Path(str(self.name)))
        return super().readinto(buffer) or 0


def fail(path: Path) -> None:
    """Raise the error that the plan has for this read of a file."""
    plan = os.environ.get(PLAN)
    what = json.loads(Path(plan).read_text()).get(path.name) if plan and os.path.exists(plan) else None
    if what is None:
        return
    counter = Path(f"{plan}.{path.name}.reads")
    with open(counter, "ab") as file:
        file.write(b".")
    read = counter.stat().st_size - 1 - what.get("after", 0)
    if read >= 0 and (what.get("times", -1) < 0 or read < what["times"]):
        raise ERRORS[what["error"]]()


class FaultyFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Local files, by absolute path: ``faulty:///folder/file``. What is known of a file is remembered, as for S3."""

    protocol = "faulty"
    cachable = False
    known: ClassVar[dict[str, dict[str, Any]]] = {}

    def _local(self) -> LocalFileSystem:
        return LocalFileSystem()

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        return dict(self.known.setdefault(path, self._local().info(path)))

    def invalidate_cache(self, path: str | None = None) -> None:
        self.known.clear()

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return self._local().ls(self._strip_protocol(path), detail=detail)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return FaultyFile(self._strip_protocol(path))


def register() -> None:
    """Make ``faulty://`` known in this process."""
    register_implementation("faulty", FaultyFileSystem, clobber=True)


register()


def preprocess(image: Any) -> Any:
    """The preprocessing of the toy encoder; importing this module makes ``faulty://`` known in decode workers."""
    return toy.preprocess(image)


class FaultyToy(toy.Toy):
    """The toy encoder for data behind ``faulty://``."""

    preprocess = staticmethod(preprocess)
