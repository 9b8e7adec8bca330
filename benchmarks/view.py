"""thresher view on many rows: first paint, slider, search, map, frames and memory of the server.

    python benchmarks/view.py --rows 2000000

Needs Chromium and playwright; frames are those of the renderer that Chromium finds, which the output names.
"""

from __future__ import annotations

from common import embeddings, seconds  # first: it chooses the kernels, before NumPy loads

# isort: split
import argparse
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import thresher as th

DIM = 32
PART = 100_000
ARGUMENTS = (
    "--headless --no-sandbox --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --use-angle=swiftshader --enable-unsafe-swiftshader"
).split()
SLIDE = """
async (value) => {
  const range = document.querySelector('.slider input[type=range]'), line = document.querySelector('.figure-line');
  const changed = new Promise((done) => new MutationObserver((_, self) => { self.disconnect(); done(); }).observe(line, { childList: true }));
  const from = performance.now();
  range.value = value;
  range.dispatchEvent(new Event('input', { bubbles: true }));
  await changed;
  await new Promise((done) => requestAnimationFrame(() => done()));
  return performance.now() - from;
}"""  # noqa: E501
PAN = """
async () => {
  const canvas = document.querySelector('.stage canvas'), from = performance.now();
  let frames = 0;
  while (performance.now() - from < 5000) {
    canvas.dispatchEvent(new KeyboardEvent('keydown', { key: frames % 2 ? 'ArrowLeft' : 'ArrowRight' }));
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())));
    frames++;
  }
  const gl = document.createElement('canvas').getContext('webgl2');
  const info = gl && gl.getExtension('WEBGL_debug_renderer_info');
  const renderer = info ? gl.getParameter(info.UNMASKED_RENDERER_WEBGL) : 'no WebGL 2';
  return [1000 * frames / (performance.now() - from), renderer];
}"""


def picture(i: int) -> bytes:
    rng = np.random.default_rng(i)
    tiles = rng.integers(0, 255, (8, 8, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    file = io.BytesIO()
    Image.fromarray(tiles).save(file, "webp", quality=80)
    return file.getvalue()


def made_pool(folder: Path, rows: int) -> Path:
    """Image and text embeddings in .npy files, captions, thumbnails and a column in parquet, in parts."""
    pool = folder / f"view-pool-{rows}"
    if (pool / "done").exists():
        return pool
    for name in ("img_emb", "text_emb", "metadata"):
        (pool / name).mkdir(parents=True, exist_ok=True)
    pictures = [picture(i) for i in range(512)]
    words = [f"word{i}" for i in range(2_000)]
    rng = np.random.default_rng(0)
    for part, lo in enumerate(range(0, rows, PART)):
        n = min(PART, rows - lo)
        image = embeddings(n, DIM, 500, seed=part)
        text = image + 0.3 * rng.standard_normal(image.shape, dtype=np.float32)
        np.save(pool / "img_emb" / f"img_emb_{part}.npy", image.astype(np.float16))
        np.save(pool / "text_emb" / f"text_emb_{part}.npy", text.astype(np.float16))
        picks = rng.integers(0, len(words), (n, 6))
        table = pa.table(
            {
                "key": [f"{i:012d}" for i in range(lo, lo + n)],
                "caption": [" ".join(words[j] for j in row) for row in picks],
                "image": pa.array([pictures[i % 512] for i in range(lo, lo + n)], pa.binary()),
                "width": rng.integers(64, 2_048, n),
            }
        )
        pq.write_table(table, pool / "metadata" / f"metadata_{part}.parquet", row_group_size=2_000)
    (pool / "done").touch()
    return pool


def peak(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, default=Path("out/bench"))
    parser.add_argument("--quick", action="store_true", help="only the first paint and the slider")
    given = parser.parse_args()
    folder, rows = given.folder.absolute(), given.rows
    pool, cache = made_pool(folder, rows), folder / "cache"
    selection = folder / f"view-selection-{rows}"
    if not selection.exists():
        chain = (th.SemDeDup(eps=0.05, clusters=400, iterations=5), th.Density(keep="40%", clusters=400, iterations=5))
        th.select(pool, *chain, cache=cache).save(selection)
    command = [sys.executable, "-m", "thresher", "view", str(selection), "--no-browser", "--cache", str(cache)]
    began = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip() if server.stdout else ""
        load = f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        print(f"rows {rows:,}; {load}\nserver starts {time.perf_counter() - began:.2f} s")
        measure(url, server.pid, given.quick)
    finally:
        server.terminate()
        server.wait(20)


def measure(url: str, pid: int, quick: bool) -> None:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        page: Any = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
        page.set_default_timeout(900_000)
        page.goto("about:blank")

        def first() -> None:
            page.goto(f"{url}#rows")
            page.wait_for_selector(".tile img")
            page.locator(".tile img").first.evaluate("image => image.decode()")

        print(f"first paint, with images {seconds(first):.2f} s")
        page.locator(".scroll").evaluate("e => e.scrollTo(0, e.scrollHeight)")
        print(f"jump to the end {seconds(lambda: page.wait_for_selector('.item:last-child .tile img')):.2f} s")
        page.goto("about:blank")
        page.goto(f"{url}#cut")
        page.wait_for_selector(".slider input")
        page.wait_for_timeout(3_000)
        times = []
        for i in range(20):
            times.append(page.evaluate(SLIDE, 100 + 37 * i))
            page.wait_for_timeout(1_500)  # what changed, and the histogram, follow
        page.wait_for_timeout(2_000)
        print(f"slider, until the page shows it: median {np.median(times):.0f} ms, slowest {max(times):.0f} ms")
        print(f"server, peak memory so far {peak(pid):.2f} GB")
        if quick:
            browser.close()
            return
        page.goto("about:blank")
        page.goto(f"{url}#rows")
        page.wait_for_selector(".tile img")

        def search() -> None:
            page.get_by_label("Search").fill("word77 ")
            page.wait_for_selector(".count:has-text(' of ')")

        print(f"search in the captions {seconds(search):.2f} s")
        for title, where, what in (("clusters", "clusters", ".cluster-name"), ("what was lost", "lost", ".interval")):
            page.goto("about:blank")
            print(f"{title} {seconds(lambda: (page.goto(f'{url}#{where}'), page.wait_for_selector(what))):.2f} s")  # noqa: B023
        for title in ("map, first time", "map, again"):
            page.goto("about:blank")
            ready = ".stage[data-state=ready]"
            print(f"{title} {seconds(lambda: (page.goto(f'{url}#map'), page.wait_for_selector(ready))):.2f} s")  # noqa: B023
        frames, renderer = page.evaluate(PAN)
        print(f"map, while it moves: {frames:.1f} frames a second on {renderer}")
        print(f"server, peak memory {peak(pid):.2f} GB")
        browser.close()


if __name__ == "__main__":
    main()
