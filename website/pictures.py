"""Draw what each method keeps and drops on the example pool: docs/methods/pictures/NAME.webp.

Type: python website/pictures.py [NAME ...]

The selection is that of the first ``thresher select NAME`` on the page of the method; the blocks before it run, too.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import thresher as th
from thresher.cli.main import main
from thresher.pruning.registry import METHODS

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
WIDTH, TILE, PICTURE, GAP = 1200, 98, 60, 2
INK, SOFT, PAPER, KEPT, DROPPED = "#1d2a28", "#5c6b68", "#ffffff", "#1f6f8b", "#d9822b"
CLUSTERS = ("density", "hkmeans", "match", "herd", "clipcov", "ssp")
MOST = 60_000  # bytes of a picture


@dataclass(frozen=True)
class Band:
    """A row of images: its heading, and rows of the pool that are kept or not."""

    heading: str
    rows: Sequence[tuple[int, bool]]


# --- selections -----------------------------------------------------------------------------------


def selection_of(name: str) -> th.Selection:
    """Run the page of a method up to its first selection by the method, and return that."""
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {"__name__": "page"}
    for kind, block in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if kind == "python":
            exec(block, scope)
        for command in re.findall(r"^\$ (thresher .*)", block, re.MULTILINE) if kind == "console" else ():
            words = shlex.split(command)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                if main(words[1:]):
                    raise SystemExit(f"{name}: {command}\n{said.getvalue()}")
            if words[1:3] == ["select", name]:
                return th.Selection.load(words[words.index("-o") + 1])
    raise SystemExit(f"docs/methods/{name}.md has no command 'thresher select {name}'")


def bands_of(name: str, kept: th.Selection) -> list[Band]:
    """Return what to draw."""
    step, count = kept.steps[-1], WIDTH // TILE
    ids = kept.given(len(kept.steps) - 1)
    kept_n = np.asarray(kept.dropped_by[ids] == -1)
    if "duplicate_of" in step.rows:
        return list(_pairs(ids, kept_n, step, count))
    if name in CLUSTERS and "cluster" in step.rows:
        return list(_clusters(ids, kept_n, np.asarray(step.rows["cluster"]), step, count))
    best, worst = np.flatnonzero(kept_n), np.flatnonzero(~kept_n)
    headings = [f"Kept: {len(best):,} rows", f"Dropped: {len(worst):,} rows"]
    if "score" in step.rows and name != "random":
        score_n = np.asarray(step.rows["score"], np.float64)
        best = best[np.argsort(-score_n[best], kind="stable")]
        worst = worst[np.argsort(score_n[worst], kind="stable")]
        what = (re.findall(r"\((.+)\)", step.score) or [step.score])[0]
        headings = [f"{headings[0]}, highest {what} first", f"{headings[1]}, lowest first"]
    else:
        best, worst = (part[np.linspace(0, len(part) - 1, count).astype(int)] for part in (best, worst))
    parts = ((headings[0], best, True), (headings[1], worst, False))
    return [Band(heading, [(int(ids[i]), kept) for i in part[:count]]) for heading, part, kept in parts]


def _pairs(ids: Any, kept_n: Any, step: th.Step, count: int) -> Iterator[Band]:
    """Rows that are repeated most often, each with what repeats it; exact copies only if there are no others."""
    of = np.array(step.rows["duplicate_of"])
    close = np.asarray(step.rows.get("score", np.ones(len(of)))) < 0.999
    of = np.where(close, of, -1) if (of[close] >= 0).any() else of
    of = np.where(np.isin(of, ids[kept_n]), of, -1)  # what they repeat may itself be dropped
    repeated, times = np.unique(of[of >= 0], return_counts=True)
    first = repeated[np.argsort(-times, kind="stable")][[0, 1]].tolist() if len(repeated) else []
    for row in first:
        copies = ids[of == row][: count - 1].tolist()
        yield Band(
            f"Kept, and dropped as its duplicates: {int((of == row).sum()):,} rows",
            [(row, True), *((i, False) for i in copies)],
        )
    alone = [row for row in repeated[np.argsort(times, kind="stable")].tolist() if row not in first]
    chosen = (
        [alone[i] for i in np.linspace(0, len(alone) - 1, min(count // 2, len(alone))).astype(int)] if alone else []
    )
    pairs = [part for row in chosen for part in ((row, True), (int(ids[np.argmax(of == row)]), False))]
    yield Band("Pairs: a kept row, and a row that repeats it", pairs)


def _clusters(ids: Any, kept_n: Any, label_n: Any, step: th.Step, count: int) -> Iterator[Band]:
    """The clusters of which the most, a middle and the least share is kept."""
    size = np.bincount(label_n)
    share = np.bincount(label_n[kept_n], minlength=len(size)) / np.maximum(size, 1)
    known = np.flatnonzero(size >= min(count, np.median(size[size > 0])))
    order = known[np.argsort(-share[known], kind="stable")]
    for k in dict.fromkeys([order[0], order[len(order) // 2], order[-1]]):
        inside = np.flatnonzero(label_n == k)
        if "score" in step.rows:
            inside = inside[np.argsort(-np.asarray(step.rows["score"])[inside], kind="stable")]
        most = max(1, min(count - 1, round(share[k] * count))) if 0 < share[k] < 1 else count
        chosen = [*inside[kept_n[inside]][:most], *inside[~kept_n[inside]][::-1]][:count]
        heading = f"A cluster of {size[k]:,} rows: {int(share[k] * size[k] + 0.5):,} kept"
        yield Band(heading, [(int(ids[i]), bool(kept_n[i])) for i in chosen])


# --- drawing --------------------------------------------------------------------------------------


def drawn(bands: Sequence[Band], store: th.EmbeddingStore) -> Image.Image:
    """Draw bands of images with captions; kept rows have a blue frame, dropped ones an orange one and less colour."""
    fonts = {size: ImageFont.load_default(size) for size in (12, 17)}
    height = sum(34 + TILE + 20 for _ in bands) + 14
    page = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(page)
    top = 10
    for band in bands:
        pen.text((8, top), band.heading, INK, fonts[17])
        top += 30
        for i, (row, kept) in enumerate(band.rows):
            caption, data = _row(store, row)
            left = 4 + i * ((WIDTH - 8) // (WIDTH // TILE))
            image = Image.open(io.BytesIO(data)).convert("RGB").resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
            if not kept:
                image = Image.blend(image, Image.new("RGB", image.size, PAPER), 0.35)
            x = left + (TILE - PICTURE) // 2
            pen.rounded_rectangle(
                (x - 4, top, x + PICTURE + 3, top + PICTURE + 7), 6, PAPER, KEPT if kept else DROPPED, 3
            )
            page.paste(image, (x, top + 4))
            for n, line in enumerate(_lines(caption, fonts[12])):
                pen.text((left + TILE / 2, top + PICTURE + 12 + 14 * n), line, SOFT, fonts[12], anchor="ma")
        top += TILE + 24
    return page


def _lines(caption: str, font: Any) -> list[str]:
    """Return a caption as at most two lines that fit a tile."""
    lines: list[str] = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= TILE - GAP or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    short = lines[:2]
    if len(lines) > 2:
        short[1] += " ..."
    for n, line in enumerate(short):
        while font.getlength(line) > TILE - GAP:
            line = line.removesuffix("...").rstrip()[:-1] + "..."
        short[n] = line
    return short


def _row(store: th.EmbeddingStore, row: int) -> tuple[str, bytes]:
    found = next(iter(store.lookup(["text", "image"], np.array([row]))))
    return found.column(0)[0].as_py(), found.column(1)[0].as_py()["bytes"]


def draw(name: str) -> Path:
    """Draw the picture of a method and return its file."""
    folder, before = PAGES / "pictures", os.getcwd()
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "examples").symlink_to(ROOT / "examples")
        os.chdir(scratch)
        try:
            kept = selection_of(name)
            page = drawn(bands_of(name, kept), th.open("examples/twemoji"))
        finally:
            os.chdir(before)
    path = folder / f"{name}.webp"
    for quality in (82, 70, 55, 40):
        page.save(path, "WEBP", quality=quality, method=6)
        if path.stat().st_size < MOST:
            break
    return path


if __name__ == "__main__":
    for name in sys.argv[1:] or METHODS.all():
        made = draw(name)
        print(f"{made.relative_to(ROOT)}: {made.stat().st_size:,} bytes")
