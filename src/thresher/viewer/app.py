"""The routes of the server. Everything but saving only reads."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from thresher.errors import OutputError, ThresherError, UsageError
from thresher.report.facts import plain
from thresher.runtime.memory import OUT_OF_MEMORY, is_out_of_memory
from thresher.runtime.untrusted import parse_json
from thresher.viewer import answers, maps, runs, words
from thresher.viewer.cuts import save
from thresher.viewer.pictures import SIDES, Pictures
from thresher.viewer.sets import Wanted, cut_of, rows_of
from thresher.viewer.subject import Cut, Subject

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from thresher.pool.store import EmbeddingStore

TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "txt": "text/plain"}
_LONGEST = 1_000_000  # characters of a caption that is shown as a whole
_BODY = 2**16  # bytes of a request to save
_UNCACHED = {"cache-control": "no-store"}


def packed(head: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return a header and arrays as bytes: little-endian length of the header, the header as JSON, then the arrays.

    The header lists "arrays", each with name, dtype and length. Each array begins at a multiple of 8 bytes.
    """
    listed = [{"name": name, "dtype": array.dtype.str[1:], "length": array.size} for name, array in arrays.items()]
    text = json.dumps({**head, "arrays": listed}, allow_nan=False).encode()
    text += b" " * (-(len(text) + 4) % 8)
    parts = [struct.pack("<I", len(text)), text]
    for array in arrays.values():
        data = np.ascontiguousarray(array).tobytes()
        parts += [data, b"\0" * (-len(data) % 8)]
    return b"".join(parts)


class _Given:
    """The values in the address of a request."""

    def __init__(self, request: Request) -> None:
        self._values = request.query_params

    def text(self, name: str, usual: str = "") -> str:
        return self._values.get(name, usual)

    def whole(self, name: str, usual: int = 0) -> int:
        text = self._values.get(name, str(usual))
        if not (text.isascii() and text.isdecimal() and len(text) < 16):
            raise UsageError(f"{name} = {text[:40]!r}: give a whole number")
        return int(text)

    def some(self, name: str) -> int | None:
        return self.whole(name) if name in self._values else None

    def cut(self) -> Cut | None:
        text = self._values.get("cut")
        if text is None:
            return None
        try:
            return cut_of(parse_json(text))
        except ValueError as error:
            raise UsageError(f"cut: not JSON ({error})") from None

    def wanted(self) -> Wanted:
        return Wanted.parse(self.text("set"))


class _Watch:
    """Refuses to show a pool whose files have changed since it was opened: what is held of it may be of earlier files.

    It looks at local files once a second at most, and at those elsewhere, which takes requests, once a minute.
    """

    def __init__(self, stores: Sequence[EmbeddingStore]) -> None:
        local = all(protocol == "file" for store in stores for protocol, _ in store.files())
        self._stores, self._every, self._next = stores, 1 if local else 60, 0.0

    def check(self) -> None:
        """Raise a PoolError if a file has changed."""
        if time.monotonic() < self._next:
            return
        for store in self._stores:
            store.check_unchanged("it was shown")
        self._next = time.monotonic() + self._every


def application(subject: Subject) -> Starlette:
    """Return the application, without the guard: see :mod:`thresher.viewer.security`."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response
    from starlette.routing import Route

    pictures, watch = Pictures(subject.stores), _Watch(subject.stores)
    static = resources.files("thresher.viewer").joinpath("static")
    files = {entry.name: entry.read_bytes() for entry in static.iterdir() if entry.name.rpartition(".")[2] in TYPES}

    def answer(value: Any, status: int = 200) -> Response:
        return Response(json.dumps(value, allow_nan=False), status, _UNCACHED, "application/json")

    def binary(head: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Response:
        return Response(packed(head, arrays), 200, _UNCACHED, "application/octet-stream")

    def static_file(name: str) -> Response:
        if name not in files:
            return Response("no such page\n", 404, media_type="text/plain")
        kind = TYPES[name.rpartition(".")[2]]
        return Response(files[name], 200, {"cache-control": "no-cache"}, kind)

    def failed(error: Exception) -> Response:
        """Return the answer for an error that is meant for a person; raise any other."""
        if is_out_of_memory(error):
            return answer({"error": OUT_OF_MEMORY}, 503)
        if isinstance(error, OutputError):
            return answer({"error": plain(error, 600)}, 409)
        if isinstance(error, ThresherError):
            return answer({"error": plain(error, 600)}, 400)
        if isinstance(error, OSError):
            return answer({"error": plain(error.strerror or error, 300)}, 500)
        raise error

    def guarded(function: Callable[[_Given], Response | Any]) -> Callable[[Request], Any]:
        """Answer in a thread; a message meant for a person becomes the answer."""

        def work(request: Request) -> Response:
            try:
                made = function(_Given(request))
                watch.check()
            except Exception as error:
                return failed(error)
            return made if isinstance(made, Response) else answer(made)

        async def endpoint(request: Request) -> Response:
            return await run_in_threadpool(work, request)

        return endpoint

    async def index(request: Request) -> Response:
        return static_file("index.html")

    async def page_file(request: Request) -> Response:
        return static_file(request.path_params["name"])

    def rows(given: _Given) -> Any:
        source, wanted = given.whole("source"), given.wanted()
        return answers.page_of(subject, pictures, wanted, source, given.whole("start"), given.whole("count", 60))

    def listed(given: _Given) -> Any:
        source = given.whole("source")
        total = subject.store(source).total
        texts = [text for text in given.text("rows").split(",") if text]
        if len(texts) > answers.MOST_ROWS or not all(text.isdecimal() and len(text) < 16 for text in texts):
            raise UsageError(f"rows: give at most {answers.MOST_ROWS} numbers")
        ids = [int(text) for text in texts]
        if any(row >= total for row in ids):
            raise UsageError(f"rows: the pool has {total:,}")
        wanted = Wanted(selection=given.some("selection"), cut=given.cut())
        return {"rows": answers.rows_with(subject, pictures, ids, source, wanted)}

    def members(given: _Given) -> Any:
        ids = rows_of(subject, given.wanted())
        mask_N = np.zeros(subject.store().total, np.bool_)
        mask_N[ids] = True
        return binary({"total": len(ids)}, {"bits": np.packbits(mask_N, bitorder="little")})

    def explanation(given: _Given) -> Any:
        row = given.whole("row")
        run = given.some("run")
        if run is not None:
            return answers.explained_by_run(subject, pictures, row, run)
        return answers.explained(subject, pictures, row, given.some("selection"), given.cut())

    def caption(given: _Given) -> Any:
        store, row = subject.store(given.whole("source")), given.whole("row")
        return {"caption": answers.caption_of(store, row, _LONGEST).encode("utf-8", "replace").decode()}

    def picture(request: Request) -> Response:
        at = request.path_params
        source, row, side = at["source"], at["row"], at["side"]
        if side not in SIDES or source >= len(subject.stores) or row >= subject.stores[source].total:
            return Response("no such image\n", 404, media_type="text/plain")
        try:
            data = pictures.get(source, row, side)
        except (ThresherError, OSError, MemoryError):
            data = b""
        if not data:
            return Response("no such image\n", 404, media_type="text/plain")
        return Response(data, 200, {"cache-control": "private, max-age=3600"}, "image/webp")

    async def picture_of(request: Request) -> Response:
        return await run_in_threadpool(picture, request)

    def cut(given: _Given) -> Any:
        head, steps_N = answers.cut_of(subject, given.whole("selection"), given.cut())
        return binary(head, {"steps": steps_N})

    def command(given: _Given) -> Any:
        name = given.text("name") or "selection"
        return answers.command_of(subject, given.whole("selection"), given.cut(), name[:100])

    def histogram(given: _Given) -> Any:
        return answers.histogram_of(subject, given.whole("selection"), given.cut(), given.whole("step"))

    def map_of(given: _Given) -> Any:
        head, points_N2 = maps.points_of(subject)
        return binary(head, {"points": points_N2})

    def colours(given: _Given) -> Any:
        head, codes_N = answers.colours_of(subject, given.text("by"), given.some("selection"), given.cut())
        return binary(head, {"codes": codes_N})

    def clusters(given: _Given) -> Any:
        number = given.whole("selection")
        made = answers.clusters_of(subject, number, given.cut(), given.some("clustered"))
        if made is None:
            return None
        named, typical = words.names_of(subject, number, made["step"], len(made["size"]))
        shown = zip(typical, made["examples"], strict=True)
        examples = [[row, *(one for one in others if one != row)][:5] if row >= 0 else others for row, others in shown]
        return {**made, "words": named, "examples": examples}

    def lost(given: _Given) -> Any:
        return words.lost_of(subject, given.whole("selection"), given.cut())

    def compared(given: _Given) -> Any:
        made = answers.comparison_of(subject)
        return {**made, "words": words.names_of(subject, made["clustered"], None)[0] if made["clusters"] else []}

    def covariance(given: _Given) -> Any:
        return subject.kept.get("covariance", lambda: answers.covariance_of(subject))

    def run(given: _Given) -> Any:
        number = given.whole("run")
        if number >= len(subject.runs):
            raise UsageError(f"run {number}: there are {len(subject.runs)}")
        one = subject.runs[number]
        if given.text("stamp") == runs.stamp(one):
            return {"same": True}
        made = runs.described(one)
        if one.source is not None:
            for group in made["groups"]:
                ids = [entry["row"] for entry in group["rows"]]
                texts = answers.read_texts(subject.store(one.source), set(ids))
                group["rows"] = [{**entry, **texts[entry["row"]]} for entry in group["rows"]]
                pictures.expect(one.source, ids)
        return made

    def save_cut(given: Mapping[str, Any]) -> dict[str, Any]:
        watch.check()
        return save(subject, given)

    async def saved(request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _BODY:
                return answer({"error": "the request is too long"}, 413)
        try:
            given = parse_json(body)
        except ValueError as error:
            return answer({"error": plain(error, 600)}, 400)
        try:
            if not isinstance(given, dict):
                raise UsageError("expected an object")
            return answer(await run_in_threadpool(save_cut, given))
        except Exception as error:
            return failed(error)

    readers = {
        "subject": lambda given: answers.subject_of(subject, pictures),
        "rows": rows,
        "listed": listed,
        "members": members,
        "explanation": explanation,
        "caption": caption,
        "cut": cut,
        "command": command,
        "histogram": histogram,
        "map": map_of,
        "colours": colours,
        "clusters": clusters,
        "lost": lost,
        "compare": compared,
        "covariance": covariance,
        "run": run,
    }
    return Starlette(
        routes=[
            Route("/", index),
            Route("/static/{name}", page_file),
            *(Route(f"/api/{name}", guarded(function)) for name, function in readers.items()),
            Route("/picture/{source:int}/{row:int}/{side:int}", picture_of),
            Route("/save", saved, methods=["POST"]),
        ]
    )
