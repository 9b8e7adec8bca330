"""The connection of this process to Ray.

Ray changes settings of the process that uses it: the environment, ``sys.path``, hooks, signal handlers. They are put
back. A thread of its own starts, holds and stops the connection: Ctrl-C then ends the wait for Ray, and not Ray's start
in the middle.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from thresher.errors import ThresherError, UsageError
from thresher.runtime.locks import Scratch, scratch_folder
from thresher.runtime.ray.cluster import alive_nodes, environment, on_every_node
from thresher.runtime.ray.needs import Needs
from thresher.runtime.ray.versions import about, check_versions

_PREFIX = "thresher-ray-"
_LONGEST = 40  # characters of the folder for temporary files; a socket's path may have 107
_STOPPED = 20.0  # seconds to wait for Ray to stop
_ANSWER = 10.0  # seconds to wait for a cluster to answer
_OUT_OF_MEMORY = 3  # times that a task is run again after memory ran out; by default Ray never stops


class Connection:
    """The connection of an engine, none before the first task; one process has one. A copy starts without.

    Attributes:
        seen: Files that all nodes can read.
    """

    def __init__(self) -> None:
        """Do not connect yet."""
        self.seen: set[str] = set()
        self._holder: _Holder | None = None
        self._stop: Callable[[], Any] | None = None

    def __reduce__(self) -> Any:
        """Return how a copy is made."""
        return Connection, ()

    def is_local(self, address: str) -> bool:
        """Return whether all workers are, or will be, on this machine because this object starts Ray."""
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            return self._holder is not None and self._holder.local
        return not (address or os.environ.get("RAY_ADDRESS"))

    def open(self, address: str, workers: int, needs: Needs) -> None:
        """Connect, unless this process is connected: to a cluster, or to one that is started here.

        Args:
            address: Of the cluster; "" for that of ``RAY_ADDRESS``, or to start Ray here.
            workers: Number of tasks that Ray can run at once if it is started here.
            needs: What a task needs.

        Raises:
            UsageError: There is no such cluster, its nodes cannot run the tasks, or this process uses another one.
            ThresherError: Ray cannot be started.
        """
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            if self._holder is None:
                _check_same(address)
            return
        self.seen.clear()
        holder = _Holder(address, workers, needs)
        self._stop = weakref.finalize(self, holder.stop, os.getpid())  # also at exit
        self._holder = holder
        try:
            holder.start()
            _keep_sigterm()
            if not any(map(needs.capacity, alive_nodes())):
                raise UsageError(f"the engine ray: no node has what a task needs ({needs}); start such a node first")
            if not holder.local:
                check_versions(on_every_node(needs, about, None, environment()))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection, if this object made it."""
        if self._stop is not None:
            self._stop()
        self._holder = self._stop = None


class _Holder:
    """A thread that connects to Ray, or starts it, and ends that on request.

    Attributes:
        local: Whether it starts Ray on this machine.
    """

    def __init__(self, address: str, workers: int, needs: Needs) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS", "")
        self.local = not self.address
        self._cpus = math.ceil(workers * max(needs.cpus, 1))
        self._resources = {name: amount * workers for name, amount in needs.others.items()}
        self._ready, self._end = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._hold, name="holds Ray", daemon=True)

    def start(self) -> None:
        """Start, and wait until Ray is ready."""
        self._thread.start()
        self._ready.wait()
        if isinstance(self._error, ThresherError):
            raise self._error
        if self._error is not None:
            why = getattr(self._error, "strerror", None) or next(iter(str(self._error).splitlines()), "no reason given")
            if self.local:
                raise ThresherError(f"Ray cannot be started on this machine ({why})") from self._error
            raise UsageError(
                f"Ray at {self.address}: cannot connect ({why}); start a cluster with 'ray start --head', or omit the "
                "address (and unset RAY_ADDRESS) to start Ray on this machine"
            ) from self._error

    def stop(self, owner: int) -> None:
        """End the connection, unless this is a forked copy of the process. If Ray is still starting, do not wait."""
        if os.getpid() == owner:
            self._end.set()
            if self._ready.is_set():
                self._thread.join(_STOPPED)

    def _hold(self) -> None:
        folder, level = None, logging.getLogger("ray").level
        try:
            with settings_kept():
                if self.local:
                    folder = _folder()
                self._connect(folder)
        except BaseException as error:
            self._error = error
        else:
            self._ready.set()
            self._end.wait()
        finally:
            if ray := sys.modules.get("ray"):
                with suppress(Exception):
                    ray.shutdown(wait_for_processes=True)
                    _forget_token()
                    ray._private.worker._worker_logs_enabled = True
            logging.getLogger("ray").setLevel(level)
            if folder is not None:
                folder.remove()
            self._ready.set()

    def _connect(self, folder: Scratch | None) -> None:
        """Start Ray with its files in a folder, or connect to a cluster; without output of Ray's."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_task_oom_retries", str(_OUT_OF_MEMORY))
        os.environ.setdefault("RAY_worker_niceness", "0")  # by default workers give way to every other program
        if folder is not None and not any(name.startswith("RAY_AUTH_") for name in os.environ):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray writes one to the home folder
        if folder is None:
            _check_port(self.address)
        import ray

        _forget_token()
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        ray._private.worker._worker_logs_enabled = False  # Ray's own switch: it prints lost workers to standard output
        options: dict[str, Any] = {"configure_logging": False, "logging_level": logging.CRITICAL}
        if "://" not in self.address:
            options["log_to_driver"] = False
        if folder is not None:
            options |= {"num_cpus": self._cpus, "resources": self._resources, "include_dashboard": False}
            options["_temp_dir"] = str(folder.path)
        ray.init(address=self.address or "local", **options)


@contextmanager
def settings_kept() -> Iterator[None]:
    """Put back what Ray changes in the process."""
    environment, path, hook, fault = dict(os.environ), list(sys.path), sys.excepthook, faulthandler.is_enabled()
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ |= environment
        sys.path[:] = path
        sys.excepthook = hook
        if not fault:
            faulthandler.disable()


def _keep_sigterm() -> None:
    """Put back what SIGTERM does: Ray's libraries, which Python does not know of, would abort the process."""
    here = signal.getsignal(signal.SIGTERM)
    if here is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, here)


def _check_port(address: str) -> None:
    """Raise an OSError if nothing listens at an address; Ray would try for minutes."""
    host, colon, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if colon and port.isdecimal() and int(port) < 2**16:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()


def _forget_token() -> None:
    """Make Ray read its token again: this process may have used another cluster before, or may do so later."""
    import ray._raylet

    loader = getattr(ray._raylet, "AuthenticationTokenLoader", None)  # private, and not in every version
    if loader is not None:
        loader.instance().reset_cache()


def _folder() -> Scratch:
    """Make a folder for Ray's sockets and logs, with a short path."""
    shared = Path(tempfile.gettempdir())
    if len(os.fsencode(shared)) > _LONGEST and os.path.isdir("/tmp"):  # noqa: S108
        shared = Path("/tmp")  # noqa: S108
    return scratch_folder(shared, _PREFIX, mode=0o700)


def _check_same(address: str) -> None:
    """Refuse an address other than that of the cluster that this process uses already."""
    import ray

    host, _, port = address.rpartition(":")
    if host and "://" not in address and host not in ("localhost", "127.0.0.1"):  # Ray knows those by another name
        here = ray.get_runtime_context().gcs_address
        with suppress(OSError):
            host = socket.gethostbyname(host)
        if here != f"{host}:{port}":
            raise UsageError(f"Ray at {address}: this process is connected to {here}; call ray.shutdown() first")
