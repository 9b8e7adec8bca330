"""Run the server in a thread, and give its address."""

from __future__ import annotations

import html
import logging
import os
import socket
import sys
import threading
import time
import webbrowser
from typing import TYPE_CHECKING, Any

from thresher.errors import MissingExtraError, OutputError, UsageError, installed
from thresher.viewer.security import LOOPBACK, Guard, host_of, new_token
from thresher.viewer.subject import Subject

if TYPE_CHECKING:
    import uvicorn

_START = 20.0  # seconds that the server may take to start


def _nothing(record: logging.LogRecord) -> bool:
    return False


class Viewer:
    """A running server: open ``url`` in a browser. It ends with :meth:`close`, or with the program.

    Attributes:
        url: The address, with the token; whoever has it can see the data.
    """

    def __init__(self, url: str, server: uvicorn.Server, thread: threading.Thread, subject: Subject) -> None:
        """Remember a server that runs in a thread."""
        self.url = url
        self._subject = subject
        self._server, self._thread = server, thread

    def __repr__(self) -> str:
        """Return the address."""
        return f"Viewer({self.url})" if self._thread.is_alive() else "Viewer(closed)"

    def _repr_html_(self) -> str:
        if not self._thread.is_alive():
            return "<p>The viewer is closed.</p>"
        url = html.escape(self.url, quote=True)
        return f'<p>Open <a href="{url}" target="_blank" rel="noreferrer">{url}</a>; <code>close()</code> ends it.</p>'

    @property
    def is_busy(self) -> bool:
        """Whether something, such as a map, is still being computed."""
        return self._subject.kept.is_making

    def close(self) -> None:
        """Stop the server; does nothing if it is stopped already."""
        log = logging.getLogger("uvicorn.error")
        log.addFilter(_nothing)  # it reports requests that end with it as errors, with their tracebacks
        try:
            self._server.should_exit = True
            self._thread.join(timeout=10)
        finally:
            log.removeFilter(_nothing)

    def wait(self) -> None:
        """Return when the server ends; an interruption ends it."""
        try:
            while self._thread.is_alive():
                self._thread.join(timeout=0.5)
        finally:
            self.close()

    def __enter__(self) -> Viewer:
        """Return the viewer, for a ``with`` block at whose end the server stops."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the server."""
        self.close()


def check_installed() -> None:
    """Check, before anything is read, that the packages of the extra are there.

    Raises:
        MissingExtraError: They are not; the message says what to type.
    """
    if not (installed("starlette") and installed("uvicorn")):
        raise MissingExtraError("thresher view", "view")


def serve(
    subject: Subject, *, host: str = "127.0.0.1", port: int = 0, names: tuple[str, ...] = (), token: str = ""
) -> Viewer:
    """Start a server in a thread.

    Args:
        subject: What to show.
        host: The address to listen at; any other than a loopback one can be reached from other machines.
        port: The port; 0 for a free one.
        names: Other names under which the server is called, such as that of a proxy.
        token: The token (default: a new one).

    Raises:
        MissingExtraError: The extra ``view`` is not installed.
        UsageError: A name is not one.
        OutputError: The server cannot listen there.
    """
    check_installed()
    import uvicorn

    from thresher.viewer.app import application

    known = [host_of(name) for name in names]
    if None in known:
        raise UsageError(f"{names[known.index(None)]!r}: not the name of a host")
    token = token or new_token()
    is_local = host in LOOPBACK
    own = set() if is_local else {socket.gethostname().lower(), socket.getfqdn().lower()}
    guard = Guard(application(subject), token, LOOPBACK | own | {*filter(None, known)}, any_address=not is_local)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot listen at {host}:{port} ({reason}); give another --port or --host") from None
    config = uvicorn.Config(
        guard, log_level="error", access_log=False, lifespan="off", server_header=False, date_header=False,
        proxy_headers=False, timeout_graceful_shutdown=2, ws="none",
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="thresher-view", daemon=True)
    thread.start()
    until = time.monotonic() + _START
    while not server.started:
        if not thread.is_alive() or time.monotonic() > until:
            server.should_exit = True
            raise OutputError("the server did not start")
        time.sleep(0.01)
    shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    shown = f"[{shown}]" if ":" in shown else shown
    return Viewer(f"http://{shown}:{listening.getsockname()[1]}/{token}/", server, thread, subject)


def open_browser(url: str) -> None:
    """Open the address in a browser with windows, if this machine has one."""
    has_windows = sys.platform in ("darwin", "win32") or any(os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY"))
    if has_windows:
        webbrowser.open(url)


def show(what: Any, **how: Any) -> Viewer:
    """Open what is to be looked at, and start a server: see :func:`thresher.view`."""
    from thresher.viewer.subject import opened

    check_installed()
    own = {name: how.pop(name) for name in ("host", "port", "names") if name in how}
    return serve(opened(what, **how), **own)
