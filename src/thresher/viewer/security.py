"""Who may use the server: requests with the token in their path, to a known name, from the page itself.

The token is the first part of the path, so that every address on the page is relative, also behind a proxy such as
that of Jupyter, and no cookie is needed that a browser would send along with requests of other pages.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
WRITES = ("/save",)  # the only paths that take POST

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def new_token() -> str:
    """Return a token that cannot be guessed."""
    return secrets.token_urlsafe(24)


def host_of(header: str) -> str | None:
    """Return the name in a Host header, in lower case, without port and brackets; None if it is not one."""
    try:
        parts = urlsplit(f"//{header}")
        parts.port  # noqa: B018 - raises for a port that is not one
    except ValueError:
        return None
    plain = not (parts.path or parts.query or parts.fragment or parts.username or parts.password)
    return parts.hostname.rstrip(".") if plain and parts.hostname else None


@dataclass(frozen=True)
class Guard:
    """An ASGI application that passes on only what may be served.

    Attributes:
        app: The application. It sees paths without the token.
        token: The token.
        hosts: Names under which the server may be called. A name that is not here may be one that a page of others
            made to point to this machine (DNS rebinding).
        any_address: Whether it may also be called by an IP address: the server listens to other machines.
    """

    app: App
    token: str
    hosts: frozenset[str] = LOOPBACK
    any_address: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no WebSocket is used
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        status, text = self._judged(scope)
        if status:
            body = f"{text}\n".encode()
            plain = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
            await guarded({"type": "http.response.start", "status": status, "headers": plain})
            await guarded({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
            return
        rest = scope["path"][len(self.token) + 1 :]
        await self.app({**scope, "path": rest, "raw_path": rest.encode(), "root_path": ""}, receive, guarded)

    def _judged(self, scope: Scope) -> tuple[int, str]:
        """Return the status and the message of a refusal; (0, "") for what may pass."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts, origins = headers.get("host", []), headers.get("origin", [])
        if len(hosts) != 1 or not self._known(hosts[0]):
            return 403, "this name is not one of the server's; open the address that thresher view printed"
        if len(origins) > 1 or (origins and not _same(origins[0], hosts[0])):
            return 403, "requests of other pages are refused"
        if "cross-site" in headers.get("sec-fetch-site", []) and "navigate" not in headers.get("sec-fetch-mode", []):
            return 403, "requests of other pages are refused"
        first, _, rest = scope["path"].removeprefix("/").partition("/")
        if not secrets.compare_digest(first.encode(), self.token.encode()) or f"/{first}" == scope["path"]:
            return 404, "the token is missing or wrong; open the whole address that thresher view printed"
        method = scope["method"]
        if method == "POST" and f"/{rest}" in WRITES:
            kind = headers.get("content-type", [""])[0].partition(";")[0].strip()
            if kind != "application/json":  # a form of another page cannot send this
                return 415, "expected application/json"
            return (0, "") if origins else (403, "saving needs a request of the page itself")
        return (0, "") if method in ("GET", "HEAD") else (405, f"{method} is not allowed here")

    def _known(self, header: str) -> bool:
        name = host_of(header)
        if name is None:
            return False
        if name in self.hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.any_address or address.is_loopback


def _same(origin: str, host: str) -> bool:
    """Return whether an Origin header names the server that the Host header names."""
    scheme, _, rest = origin.partition("://")
    return scheme in ("http", "https") and rest.lower() == host.lower()
