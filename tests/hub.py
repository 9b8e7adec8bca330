"""A server that speaks the part of the Hugging Face Hub that is used: listings, files, commits, access."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest

TOKEN = "hf_" + "s3cret" * 5


def _sha(*parts: bytes) -> str:
    return hashlib.sha1(b"\0".join(parts), usedforsecurity=False).hexdigest()


@dataclass
class Repo:
    """A dataset.

    Attributes:
        folder: Files on disk that are served as they are now; None for those of ``commits``.
        card: The metadata of its README.
        gated: Whether its terms must be accepted, which no account here has done.
        private: Whether it needs the token.
    """

    folder: Path | None = None
    card: dict[str, Any] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    known: dict[Path, tuple[tuple[int, ...], bytes]] = field(default_factory=dict)

    def _read(self, path: Path) -> bytes:
        stamp = (path.stat().st_size, path.stat().st_mtime_ns)
        if self.known.get(path, ((), b""))[0] != stamp:
            self.known[path] = (stamp, path.read_bytes())
        return self.known[path][1]

    def push(self, files: dict[str, bytes], revision: str = "main") -> str:
        """Add a commit with these files; return its hash."""
        base = self.commits.get(self.refs.get(revision, ""), {})
        files = {**base, **files}
        sha = _sha(str(len(self.commits)).encode(), *(name.encode() + body for name, body in sorted(files.items())))
        self.commits[sha], self.refs[revision] = files, sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and files of a revision, None if there is none."""
        if self.folder is not None:
            top = self.folder
            paths = sorted(path for path in top.rglob("*") if path.is_file())
            files = {path.relative_to(top).as_posix(): self._read(path) for path in paths}
            return _sha(*(name.encode() + body for name, body in files.items())), files
        sha = self.refs.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


@dataclass
class Hub:
    """The server.

    Attributes:
        url: Its address.
        datasets: The datasets by name.
        buckets: Files of the buckets by name.
        requests: Method and path of every request, and its range.
        fails: Called with the path of a request; returns the status to answer, 0 to answer as usual.
        lies: Called with every answer that is JSON; returns what is sent instead.
    """

    url: str = ""
    datasets: dict[str, Repo] = field(default_factory=dict)
    buckets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fails: Callable[[str], int] = lambda path: 0
    lies: Callable[[Any], Any] = lambda answer: answer

    def counted(self, pattern: str) -> int:
        """How many requests match a pattern."""
        return sum(bool(re.search(pattern, one)) for one in self.requests)


def _tree(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]] | None:
    prefix = f"{below}/" if below else ""
    inside = {name: body for name, body in files.items() if name.startswith(prefix)}
    if not inside:
        return None
    entries: dict[str, dict[str, Any]] = {}
    for name, body in inside.items():
        parts = name[len(prefix) :].split("/")
        for depth in range(1, len(parts)):
            if recursive or depth == 1:
                path = prefix + "/".join(parts[:depth])
                entries[path] = {"type": "directory", "path": path, "oid": _sha(path.encode()), "size": 0}
        if recursive or len(parts) == 1:
            entries[name] = {"type": "file", "path": name, "oid": _sha(body), "size": len(body)}
    return list(entries.values())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *words: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, how: Callable[[str, dict[str, list[str]], bytes], None]) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path, asked = unquote(url.path), self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {path} {asked}".strip())
        if status := self.hub.fails(path):
            self._send(status, b"{}", {"Retry-After": "0"})
            return
        how(path, parse_qs(url.query), body)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, answer: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(self.hub.lies(answer)).encode(), headers)

    def _missing(self, code: str, status: int = 404) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"{code} of the test"})

    def _allowed(self, repo: Repo | None, content: bool) -> bool:
        known = self.headers.get("Authorization", "") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known):
            self._missing("RepoNotFound", 404 if known else 401)
        elif repo.gated and content:
            self._missing("GatedRepo", 403 if known else 401)
        else:
            return True
        return False

    def _file(self, body: bytes, sha: str) -> None:
        headers = {"ETag": f'"{_sha(body)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1) + 1
            if start >= len(body):
                self._send(416, b"", headers)
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            self._send(206, body[start:stop], headers)
            return
        self._send(200, body, headers)

    def _get(self, path: str, query: dict[str, list[str]], _body: bytes) -> None:
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo = self.hub.datasets.get(found[1])
            if not self._allowed(repo, content=False):
                return
            assert repo is not None
            if (at := repo.at(found[2] or "main")) is None:
                self._missing("RevisionNotFound")
                return
            siblings = [{"rfilename": name} for name in at[1]]
            self._json({"id": found[1], "sha": at[0], "siblings": siblings, "cardData": repo.card, "tags": []})
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/(refs/[^/]+/[^/]+|[^/]+)(?:/(.*))?", path):
            repo = self.hub.datasets.get(found[1])
            if self._allowed(repo, content=False):
                assert repo is not None
                at = repo.at(found[2])
                tree = None if at is None else _tree(at[1], found[3] or "", recursive)
                self._pages(tree, query)
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.*)", path):
            repo = self.hub.datasets.get(found[1])
            if self._allowed(repo, content=True):
                assert repo is not None
                at = repo.at(found[2])
                if at is None or found[3] not in at[1]:
                    self._missing("EntryNotFound")
                else:
                    self._file(at[1][found[3]], at[0])
        elif found := re.fullmatch(r"/api/buckets/([^/]+/[^/]+)(?:/tree(?:/(.*))?)?", path):
            files = self.hub.buckets.get(found[1])
            if files is None:
                self._missing("RepoNotFound")
            elif "/tree" not in path:
                self._json({"id": found[1], "private": False, "createdAt": "2026-01-01T00:00:00.000Z",
                            "size": 1, "totalFiles": len(files)})  # fmt: skip
            else:
                tree = _tree(files, found[2] or "", recursive) or []
                for one in tree:
                    one |= {"xetHash": one.pop("oid"), "mtime": "2026-01-01T00:00:00.000Z"}
                    one |= {"uploadedAt": "2026-01-01T00:00:00.000Z"}
                self._pages([one for one in tree if one["type"] == "file" or not recursive], query)
        elif found := re.fullmatch(r"/buckets/([^/]+/[^/]+)/resolve/(.*)", path):
            body = self.hub.buckets.get(found[1], {}).get(found[2])
            if body is None:
                self._missing("EntryNotFound")
            else:
                self._file(body, "")
        else:
            self._missing("NotFound")

    def _pages(self, tree: list[dict[str, Any]] | None, query: dict[str, list[str]]) -> None:
        """Send a listing of at most 1,000 entries, with the address of the next."""
        if tree is None:
            self._missing("EntryNotFound")
            return
        at = int(query.get("cursor", ["0"])[0])
        headers = {}
        if at + 1000 < len(tree):
            url = urlsplit(self.path)
            more = "&".join(f"{name}={value[0]}" for name, value in query.items() if name != "cursor")
            headers["Link"] = f'<{self.hub.url}{url.path}?{more}&cursor={at + 1000}>; rel="next"'
        self._json(tree[at : at + 1000], headers)

    def _post(self, path: str, _query: dict[str, list[str]], body: bytes) -> None:
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(preupload|commit|paths-info)/(.+)", path):
            repo = self.hub.datasets.get(found[1])
            if not self._allowed(repo, content=False):
                return
            assert repo is not None
            if found[2] == "paths-info":
                at = repo.at(found[3])
                wanted = parse_qs(body.decode()).get("paths", []) or json.loads(body)["paths"]
                tree = _tree(at[1], "", recursive=True) if at else []
                self._json([one for one in tree or [] if one["path"] in wanted])
            elif found[2] == "preupload":
                files = json.loads(body)["files"]
                self._json({"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False,
                                       "oid": None} for one in files]})  # fmt: skip
            else:
                lines = [json.loads(line) for line in body.decode().splitlines()]
                files = dict((repo.at(found[3]) or ("", {}))[1])
                for line in lines:
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "deletedFile":
                        files.pop(value["path"], None)
                sha = _sha(str(len(repo.commits)).encode(), *(n.encode() + b for n, b in sorted(files.items())))
                repo.commits[sha], repo.refs[found[3]] = files, sha
                self._json({"commitUrl": f"{self.hub.url}/datasets/{found[1]}/commit/{sha}", "commitOid": sha,
                            "success": True})  # fmt: skip
        else:
            self._missing("NotFound")


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve on this machine; ``hub.url`` is the address."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def at_hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve an empty Hub to this process, without waiting between tries."""
    monkeypatch.setenv("THRESHER_NETWORK_TRIES", "2")
    with serving(Hub()) as server:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url, "token": False})
        yield server
    fsspec.get_filesystem_class("hf").clear_instance_cache()
