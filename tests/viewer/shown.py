"""A small pool with images, hostile captions and selections, and a client for the server that shows it."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import thresher as th
from thresher.runtime.cache import Cache
from thresher.viewer.app import application
from thresher.viewer.security import LOOPBACK, Guard
from thresher.viewer.subject import Subject, opened

TOKEN = "t0ken-of-the-tests"
ROWS = 240
HOSTILE = {
    0: "<script>document.title = 'hacked'</script>",
    1: "<img src=x onerror=\"document.title='hacked'\">",
    2: "\u202eevil\u202c right to left \u05d0\u05d1",
    3: "long " * 20_000,
    4: "",
    5: "javascript:alert(1) {{7*7}} ${7*7} &lt;b&gt; \x00\x1b[31m",
    6: "'\"; DROP TABLE rows; --",
}


def picture(i: int) -> bytes:
    """A PNG whose colour depends on the row; every 9th row has none, every 10th a broken one."""
    if i % 9 == 8:
        return b""
    if i % 10 == 7:
        return b"\x89PNG\r\n\x1a\nbroken"
    file = io.BytesIO()
    Image.new("RGB", (40 + i % 7, 30), ((37 * i) % 255, (91 * i) % 255, (13 * i) % 255)).save(file, "PNG")
    return file.getvalue()


def write_pool(folder: Path, rows: int = ROWS) -> Path:
    """Clip-retrieval layout: embeddings with duplicates, captions, images, a number, a text and a flag."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(6, 16))
    groups = rng.integers(0, 6, rows)
    image = centers[groups] + 0.5 * rng.normal(size=(rows, 16))
    image[rows // 2 :: 3] = image[: len(image[rows // 2 :: 3])] + 0.01 * rng.normal(
        size=(len(image[rows // 2 :: 3]), 16)
    )
    text = image + 0.8 * rng.normal(size=image.shape)
    for name, vectors in (("img_emb", image), ("text_emb", text)):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / f"{name}_0.npy", vectors.astype(np.float32))
    words = ("red shoe", "blue hat", "green tree", "white house", "small dog", "old car")
    captions = [HOSTILE.get(i, f"a {words[groups[i]]} number {i}") for i in range(rows)]
    (folder / "metadata").mkdir()
    table = pa.table(
        {
            "key": [f"k{i:04d}" for i in range(rows)],
            "caption": captions,
            "image": pa.array([{"bytes": picture(i), "path": None} for i in range(rows)]),
            "width": pa.array([None if i == 9 else 100 + i for i in range(rows)]),
            "site": [("a.example", "b.example", "<b>c</b>")[i % 3] for i in range(rows)],
            "safe": [i % 4 > 0 for i in range(rows)],
        }
    )
    pq.write_table(table, folder / "metadata" / "metadata_0.parquet", row_group_size=50)
    return folder


@dataclass(frozen=True, eq=False)
class Shown:
    """The client and what it looks at."""

    client: Any
    subject: Subject
    folder: Path
    caption: str = "a red shoe number"

    def get(self, name: str, /, **values: Any) -> Any:
        """The JSON of an answer, which must be good."""
        answer = self.client.get(self.address(name, **values))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, name: str, **values: Any) -> str:
        """The message of a refusal."""
        answer = self.client.get(self.address(name, **values))
        assert answer.status_code == 400, answer.text[:200]
        return str(answer.json()["error"])

    def arrays(self, name: str, /, **values: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A header and arrays."""
        data = self.client.get(self.address(name, **values)).content
        length = struct.unpack("<I", data[:4])[0]
        head, at = json.loads(data[4 : 4 + length]), 4 + length
        assert at % 8 == 0
        found = {}
        for one in head.pop("arrays"):
            dtype = np.dtype(one["dtype"])
            found[one["name"]] = np.frombuffer(data, dtype, one["length"], at)
            at += -(-one["length"] * dtype.itemsize // 8) * 8
        assert at == len(data)
        return head, found

    @staticmethod
    def address(name: str, /, **values: Any) -> str:
        """The address of something to read; sets and cuts are written as JSON."""
        texts = {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in values.items() if v is not None}
        query = "&".join(f"{key}={quote(str(value))}" for key, value in texts.items())
        return f"/{TOKEN}/api/{name}?{query}"

    def rows(self, start: int = 0, count: int = 240, **wanted: Any) -> list[dict[str, Any]]:
        """All rows of a set."""
        page = self.get("rows", set=wanted, start=start, count=count)
        assert page["total"] == len(page["rows"]) or page["total"] > count or start
        rows: list[dict[str, Any]] = page["rows"]
        return rows

    def ids(self, **wanted: Any) -> list[int]:
        """The ids of the rows of a set."""
        return [row["row"] for row in self.rows(**wanted)]


def select_some(folder: Path, pool: Path, cache: Path) -> list[Path]:
    """Three selections: a chain of three steps, a random one and one by a threshold."""
    chains: Sequence[Sequence[Any]] = (
        (th.SemDeDup(eps=0.1, clusters=4), th.ClipScore(keep="80%"), th.Density(keep="50%", clusters=5)),
        (th.Random(keep="40%"),),
        (th.ClipScore(threshold=0.5),),
    )
    names = ("chain", "random", "clip")
    made = []
    for name, chain in zip(names, chains, strict=True):
        made.append(th.select(pool, *chain, cache=cache, progress=False).save(folder / name))
    return made


@contextmanager
def make_shown(folder: Path, what: Sequence[Any] | None = None, **guard: Any) -> Iterator[Shown]:
    """A client for three selections of a small pool."""
    from starlette.testclient import TestClient

    folder.mkdir(exist_ok=True)
    if what is None:
        what = select_some(folder, write_pool(folder / "pool"), folder / "cache")
    subject = opened(what, cache=Cache.at(str(folder / "cache")))
    guarded = Guard(application(subject), TOKEN, guard.pop("hosts", LOOPBACK | {"testhost"}), **guard)
    with TestClient(guarded, base_url="http://testhost") as client:
        yield Shown(client, subject, folder)
