"""Who may use the server: names, origins, the token, methods, paths; with and without a browser's headers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.viewer.shown import TOKEN, Shown, make_shown
from thresher.viewer.security import HEADERS, LOOPBACK, Guard, host_of, new_token


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    with make_shown(tmp_path_factory.mktemp("viewer")) as made:
        yield made


def status(shown: Shown, path: str, method: str = "GET", **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return int(shown.client.request(method, path, headers=named).status_code)


def test_the_page_is_served_with_the_token_only(shown: Shown) -> None:
    assert status(shown, f"/{TOKEN}/") == 200
    assert status(shown, f"/{TOKEN}/api/subject") == 200
    for path in ("/", "/api/subject", "/static/app.js", f"/{TOKEN}", f"/{TOKEN[:-1]}/", f"/{TOKEN}x/", f"//{TOKEN}/",
                 f"/x/../{TOKEN}x/", f"/api/subject?token={TOKEN}"):  # fmt: skip
        answer = shown.client.get(path)
        assert answer.status_code == 404, path
        assert shown.caption not in answer.text
        assert TOKEN not in answer.text


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "evil.example:8888", "", "a@[::1]",
             "127.0.0.1/x", "127.0.0.1:port", "192.168.0.7", "[::2]", "10.0.0.1:80"],
)  # fmt: skip
def test_other_names_are_refused(shown: Shown, host: str) -> None:
    """A page of others may make its own name point to this machine (DNS rebinding)."""
    assert status(shown, f"/{TOKEN}/api/subject", host=host) == 403


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:1234", "localhost:8888", "LOCALHOST", "[::1]:80", "127.0.0.2"]
)
def test_names_of_this_machine_are_known(shown: Shown, host: str) -> None:
    assert status(shown, f"/{TOKEN}/api/subject", host=host) == 200


def test_several_host_headers_are_refused(shown: Shown) -> None:
    sent = [("host", "127.0.0.1"), ("host", "evil.example")]
    assert shown.client.get(f"/{TOKEN}/", headers=sent).status_code == 403


@pytest.mark.parametrize(
    ("origin", "expected"),
    [("http://testhost", 200), ("http://evil.example", 403), ("null", 403), ("http://testhost:81", 403),
     ("https://testhost", 200), ("testhost", 403), ("file://testhost", 403), ("http://testhost.evil.example", 403)],
)  # fmt: skip
def test_requests_of_other_pages_are_refused(shown: Shown, origin: str, expected: int) -> None:
    assert status(shown, f"/{TOKEN}/api/subject", origin=origin) == expected


def test_images_and_scripts_in_other_pages_are_refused(shown: Shown) -> None:
    path = f"/{TOKEN}/picture/0/1/192"
    assert status(shown, path, sec_fetch_site="same-origin", sec_fetch_mode="no-cors") == 200
    assert status(shown, path, sec_fetch_site="cross-site", sec_fetch_mode="no-cors") == 403
    assert status(shown, f"/{TOKEN}/", sec_fetch_site="cross-site", sec_fetch_mode="navigate") == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_is_written_by_reading_routes(shown: Shown, method: str) -> None:
    json = {"content_type": "application/json", "origin": "http://testhost"}
    for path in ("", "api/subject", "api/rows", "static/app.js", "api/cut"):
        assert status(shown, f"/{TOKEN}/{path}", method, **json) == 405


def test_every_answer_has_the_headers(shown: Shown) -> None:
    for path in (f"/{TOKEN}/", f"/{TOKEN}/static/app.js", f"/{TOKEN}/api/subject", "/", f"/{TOKEN}/api/none"):
        sent = shown.client.get(path).headers
        assert {name: sent[name] for name in HEADERS} == HEADERS
    policy = HEADERS["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert shown.client.get(f"/{TOKEN}/api/subject").headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    ["static/../app.py", "static/..%2fapp.py", "static/%2e%2e/%2e%2e/app.py", "static/", "static/secret.txt",
     "static//etc/passwd", "static/..\\app.py", "static/app.js/../../x", "picture/0/../0/1", "picture/0/999999999/192",
     "picture/9/0/192", "picture/0/0/193", "picture/0/-1/192", "picture/0/0x1/192", "picture/0/1e3/192",
     "picture/0/99999999999999999999999999/192"],
)  # fmt: skip
def test_paths_lead_nowhere_else(shown: Shown, path: str) -> None:
    answer = shown.client.get(f"/{TOKEN}/{path}")
    assert answer.status_code == 404
    assert "import" not in answer.text
    assert "root:" not in answer.text


def test_websockets_are_closed() -> None:
    import asyncio

    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("passed on")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(app, "t")({"type": "websocket", "path": "/t/", "headers": []}, None, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_more_names_when_asked_for(tmp_path: Path) -> None:
    with make_shown(tmp_path, hosts=LOOPBACK | {"hub.example"}) as shown:
        assert status(shown, f"/{TOKEN}/", host="hub.example") == 200
        assert status(shown, f"/{TOKEN}/", host="hub.example:443", origin="https://hub.example:443") == 200
        assert status(shown, f"/{TOKEN}/", host="hub.example", origin="https://evil.example") == 403
        assert status(shown, f"/{TOKEN}/", host="192.168.0.7") == 403
    with make_shown(tmp_path / "any", any_address=True) as shown:
        assert status(shown, f"/{TOKEN}/", host="192.168.0.7:80") == 200
        assert status(shown, f"/{TOKEN}/", host="evil.example") == 403


def test_tokens_differ_and_are_long() -> None:
    tokens = {new_token() for _ in range(50)}
    assert len(tokens) == 50
    assert all(len(token) >= 32 for token in tokens)


def test_names_in_host_headers() -> None:
    assert host_of("LocalHost:80") == "localhost"
    assert host_of("[::1]:80") == "::1"
    assert host_of("localhost.") == "localhost"
    assert [host_of(bad) for bad in ("", ":80", "a/b", "a?b", "u@a", "a:b", "[::1")] == [None] * 7
