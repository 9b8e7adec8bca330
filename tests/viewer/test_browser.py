"""A browser drives the page: search, lasso, slider, save, compare, a run, keys, dark, hostile captions.

No console error, no request to anything but the server, and no serious violation that axe finds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import thresher as th
from tests.runs import make_run
from tests.viewer.shown import HOSTILE, select_some, write_pool
from thresher import Selection

pytestmark = pytest.mark.slow

POOL = Path(__file__).parents[2] / "examples" / "twemoji"
CHAIN = (th.SemDeDup(eps=0.15, clusters=40), th.ClipScore(keep="80%"), th.Density(keep="50%", clusters=40))
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-angle=swiftshader --enable-unsafe-swiftshader"
).split()
# Seconds to wait for what a page shows: a busy machine may need a minute to lay out the map.
PATIENCE = 180
# What drivers of software rendering say, not the page.
HARMLESS = re.compile(r"GL Driver Message|GPU stall")


def browser_path() -> str:
    """Where Chromium is. .ci/run installs it; a missing one is a failure, not a skipped test."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    assert found, "no Chromium: install it (apt-get install chromium), or set CHROMIUM to its path"
    return found


class Tab:
    """A page of the browser, and what it logged and requested."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.logged: list[str] = []
        self.requested: list[str] = []
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", lambda message: self.logged.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.logged.append(f"error: {error}"))
        page.on("request", lambda request: self.requested.append(request.url))

    def open(self, where: str = "rows") -> Any:
        self.page.goto("about:blank")
        self.page.goto(f"{self.url}#{where}")
        self.page.wait_for_selector("main > .page")
        return self.page

    def check(self) -> None:
        """Nothing was logged that is wrong, and nothing was asked of anyone else."""
        bad = [line for line in self.logged if line.startswith(("error", "warning")) and not HARMLESS.search(line)]
        assert not bad, bad
        outside = [url for url in self.requested if not url.startswith((self.url, "data:", "about:"))]
        assert not outside, outside


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser_path(), args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("browser")
    cache = made / "cache"
    th.select(POOL, *CHAIN, cache=cache, progress=False).save(made / "chain")
    th.select(POOL, th.Random(keep="40%"), cache=cache, progress=False).save(made / "random")
    make_run(made / "run", th.open(POOL), prune=0.2, epochs=7, stop=5)
    make_run(made / "again", th.open(POOL), prune=0.2, epochs=7)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    what = [folder / name for name in ("chain", "random", "run", "again")]
    with th.view(*what, cache=folder / "cache") as viewer:
        yield viewer.url


@pytest.fixture
def tab(browser: Any, server: str) -> Iterator[Tab]:
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    made = Tab(context.new_page(), server)
    yield made
    made.check()
    context.close()


def until(page: Any, condition: str, seconds: float = PATIENCE) -> None:
    """Wait for a condition. The content policy of the page forbids the waiting that Playwright does inside it."""
    for _ in range(round(10 * seconds)):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not so: {condition}")


def count(page: Any) -> int:
    """The number of rows of the set, once it has settled."""
    page.wait_for_selector(".gallery:not([aria-busy])")
    page.wait_for_timeout(120)
    return int(re.sub(r"\D", "", page.locator(".count").inner_text().split(" of ")[0].split(" rows")[0]))


def test_search_filters_and_explanations(tab: Tab, folder: Path) -> None:
    page, kept = tab.open(), Selection.load(folder / "chain")
    assert count(page) == kept.total
    page.get_by_label("Search").fill("waving hand")
    until(page, "document.querySelector('.count').textContent.includes(' of ')")
    found = count(page)
    assert 0 < found < 40
    assert page.locator(".tile .caption").first.inner_text().startswith("waving hand")
    page.get_by_role("radio", name="Dropped").check()
    page.wait_for_timeout(400)
    assert 0 < count(page) < found
    page.get_by_label("Dropped by").select_option("0")
    page.wait_for_timeout(400)
    tile = page.locator(".tile").first
    assert tile.locator("img").count() == 2, "a duplicate is shown next to what it repeats"
    tile.click()
    detail = page.get_by_role("complementary", name="One row")
    detail.get_by_text("duplicate of row").first.wait_for()
    assert detail.locator(".chain li").count() >= 1
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert not detail.is_visible()
    page.get_by_role("button", name="Clear").click()
    page.wait_for_timeout(400)
    assert count(page) == kept.total
    assert page.locator(".tile img").first.get_attribute("alt")


def test_the_gallery_is_endless(tab: Tab) -> None:
    page = tab.open()
    count(page)
    first = page.locator(".item").first.get_attribute("aria-posinset")
    page.locator(".scroll").evaluate("element => element.scrollTo(0, element.scrollHeight)")
    until(page, "document.querySelector('[aria-posinset=\"3953\"] .caption')")
    assert first == "1"
    assert page.locator(".item").count() < 120
    page.go_back()


def test_the_map_colours_lassos_and_explains(tab: Tab, folder: Path) -> None:
    page = tab.open("map")
    page.wait_for_selector(".stage[data-state=ready]")
    page.wait_for_timeout(500)
    canvas = page.locator(".stage canvas")
    box = canvas.bounding_box()
    assert painted(page) > 500, "points are drawn"
    for colour in ("score", "cluster", "column:group", "column:similarity", "fate"):
        page.get_by_label("Colour").select_option(colour)
        page.wait_for_timeout(250)
    assert "dropped by 1. semdedup" in page.locator(".legend").inner_text()
    page.get_by_role("button", name="Lasso").click()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(middle[0] - 150, middle[1] - 150)
    page.mouse.down()
    for dx, dy in ((150, -150), (150, 150), (-150, 150), (-150, -140)):
        page.mouse.move(middle[0] + dx, middle[1] + dy, steps=6)
    page.mouse.up()
    page.get_by_text("inside the lasso").wait_for()
    page.wait_for_timeout(600)
    inside = count(page)
    assert 0 < inside < Selection.load(folder / "chain").total
    assert page.locator(".map-side .tile").count() > 0
    canvas.focus()
    page.keyboard.press("Escape")
    page.wait_for_timeout(500)
    assert count(page) == Selection.load(folder / "chain").total
    for key in ("+", "+", "ArrowLeft", "-", "0", "+", "+", "+"):
        page.keyboard.press(key)
    page.keyboard.press("v")
    page.get_by_text("inside the lasso").wait_for()
    page.wait_for_timeout(500)
    assert count(page) < Selection.load(folder / "chain").total
    page.keyboard.press("Enter")
    page.get_by_role("complementary", name="One row").get_by_text("key").first.wait_for()


def painted(page: Any) -> int:
    """How many pixels of the map are not of the ground, from a picture of the screen."""
    import io

    from PIL import Image

    box = page.locator(".stage canvas").bounding_box()
    clip = {"x": box["x"] + 20, "y": box["y"] + 80, "width": box["width"] - 40, "height": box["height"] - 260}
    with Image.open(io.BytesIO(page.screenshot(clip=clip))) as shot:
        pixels = np.asarray(shot.convert("RGB")).astype(int)
    return int((np.abs(pixels - pixels[0, 0]).sum(axis=2) > 60).sum())


def test_the_slider_moves_everything_and_saves(tab: Tab, folder: Path) -> None:
    page = tab.open("cut")
    slider = page.get_by_role("slider", name="keep")
    slider.wait_for()
    slider.focus()
    for _ in range(100):
        page.keyboard.press("ArrowLeft")
    until(page, "document.querySelector('header .chip')")
    page.wait_for_timeout(800)
    text = page.get_by_label("keep, typed").input_value()
    expected = Selection.load(folder / "chain").recut(keep=text, cache=folder / "cache")
    assert page.locator(".figure-line b").inner_text() == f"{len(expected):,}"
    assert f"{len(expected):,}" in page.locator(".funnel").inner_text()
    before = Selection.load(folder / "chain")
    gone = int((before.mask() & ~expected.mask()).sum())
    assert f"{gone:,} rows" in page.locator(".moved").inner_text()
    assert f'keep = "{text}"' in page.locator(".code-box").first.inner_text()
    page.get_by_label("Name").fill("moved")
    page.get_by_role("button", name="Save as selection").click()
    page.get_by_text("Saved").wait_for()
    saved = Selection.load(folder / "moved")
    assert np.array_equal(saved.dropped_by, expected.dropped_by)
    page.get_by_role("button", name="Save as selection").click()
    page.get_by_text("exists already").wait_for()
    tab.logged = [line for line in tab.logged if "409" not in line]  # the browser logs the refusal itself
    page.get_by_label("temperature, typed").fill("hot")
    page.keyboard.press("Tab")
    page.get_by_text("give a number").wait_for()
    tab.logged = [line for line in tab.logged if "400" not in line]
    page.get_by_role("link", name="Rows").click()
    page.wait_for_timeout(500)
    page.get_by_role("radio", name="Kept").check()
    page.wait_for_timeout(500)
    assert count(page) == len(expected)
    page.get_by_role("link", name="Clusters").click()
    page.wait_for_selector(".cluster-name")
    assert page.locator("th[aria-sort]").count() >= 5
    assert page.get_by_text("change", exact=True).count() == 1
    page.locator("header .chip").click()
    page.wait_for_timeout(500)
    assert page.locator("header .chip").count() == 0


def test_clusters_losses_and_comparisons(tab: Tab, folder: Path) -> None:
    page = tab.open("clusters")
    page.wait_for_selector(".cluster-name")
    assert page.locator("tbody tr").count() == 40
    sizes = [int(text.replace(",", "")) for text in page.locator("tbody tr td:nth-child(2)").all_inner_texts()]
    assert sizes == sorted(sizes, reverse=True)
    page.get_by_role("button", name="share kept").click()
    page.get_by_label("Find").fill("flag")
    page.wait_for_timeout(400)
    assert 0 < page.locator("tbody tr").count() < 40
    page.locator(".cluster-name .link").first.click()
    page.wait_for_timeout(500)
    assert 0 < count(page) < 1_000
    page.get_by_role("link", name="What did I lose?").click()
    page.get_by_text("Kept least").wait_for()
    assert page.locator(".interval").count() > 10
    page.get_by_role("link", name="Compare").click()
    page.get_by_text("Kept by only one").wait_for()
    page.wait_for_selector(".side-by-side .tile")
    both = int((Selection.load(folder / "chain").mask() & Selection.load(folder / "random").mask()).sum())
    assert page.locator(f'.matrix td[title^="{both:,} rows"]').count() == 2
    page.get_by_role("button", name="Measure").click()
    page.get_by_text("A ratio above 1 does not mean").wait_for()


def test_runs_and_their_live_refresh(tab: Tab, folder: Path) -> None:
    page = tab.open("runs")
    page.wait_for_selector(".charts svg")
    assert page.get_by_role("img", name="Mean loss of the rows trained on").count() == 1
    page.get_by_label("Run", exact=True).select_option("1")
    page.get_by_text("Do searches agree?").first.wait_for()
    assert page.locator(".strip .tile img").count() > 5
    page.get_by_label("Run", exact=True).select_option("0")
    run = th.Training.load(folder / "run")
    log = run.log()
    run.record([*log, {**log[-1], "epoch": 5}], run.ledger())
    page.get_by_text("6 of 7 epochs").wait_for()
    page.locator(".strip .tile").first.click()
    page.get_by_role("complementary", name="One row").get_by_text("candidate").first.wait_for()


def test_everything_by_keyboard(tab: Tab) -> None:
    page = tab.open()
    count(page)
    first = page.evaluate("document.querySelector('a, button, input, select').textContent")
    assert first == "To the content"
    page.keyboard.press("/")
    page.keyboard.type("cat")
    page.wait_for_timeout(700)
    found = count(page)
    assert 0 < found < 300
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "End", "Home", "ArrowRight"):
        page.keyboard.press(key)
        page.wait_for_timeout(120)
    assert page.evaluate("document.activeElement.closest('.item').getAttribute('aria-posinset')") == "2"
    page.keyboard.press("Enter")
    page.get_by_role("complementary", name="One row").get_by_text("key").first.wait_for()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(400)
    page.keyboard.press("Escape")
    page.wait_for_timeout(200)
    assert page.evaluate("document.activeElement.closest('.item').getAttribute('aria-posinset')") == "3"
    for number, name in (
        (2, "Map"),
        (3, "Cut"),
        (4, "Clusters"),
        (5, "What did I lose?"),
        (6, "Compare"),
        (7, "Training"),
    ):
        page.keyboard.press(str(number))
        page.wait_for_timeout(300)
        assert page.locator("nav [aria-current=page]").inner_text() == name
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.wait_for_timeout(300)
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.tagName"))
    assert {"INPUT", "SELECT", "A", "BUTTON"} <= seen


def test_no_ring_of_the_focus_is_cut(tab: Tab) -> None:
    page = tab.open()
    page.locator(".tile").first.focus()
    page.keyboard.press("Enter")
    until(page, "document.activeElement.matches('.detail')")
    box = page.locator(".detail").bounding_box()
    for x, y in ((box["width"] / 2, 1), (1, box["height"] / 2), (box["width"] - 1, box["height"] / 2)):
        shown = page.evaluate("([x, y]) => document.elementFromPoint(x, y).className", [box["x"] + x, box["y"] + y])
        assert shown == "detail", "something covers the ring, which is drawn inside the panel"
    page.keyboard.press("Escape")
    link, around = page.locator("nav a").first, page.locator("nav").bounding_box()
    link.focus()
    offset, width = page.evaluate(
        "['outlineOffset', 'outlineWidth'].map((name) => parseFloat(getComputedStyle(document.activeElement)[name]))"
    )
    assert width == 2
    assert link.bounding_box()["y"] - offset - width >= around["y"]


def test_who_types_slowly_or_changes_a_control_keeps_the_focus(tab: Tab) -> None:
    """Else letters typed after a pause are keys of the page, and the next Tab begins at its top."""
    page = tab.open()
    page.keyboard.press("/")
    page.keyboard.type("wav")
    until(page, "document.querySelector('.count').textContent.includes(' of ')")
    page.wait_for_timeout(300)
    page.keyboard.type("ing t")  # t alone is the key of light and dark
    assert page.get_by_label("Search").input_value() == "waving t"
    page.get_by_role("button", name="Clear").focus()
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.gallery:not([aria-busy])') && document.activeElement.id === 'main'")

    held = "(document.activeElement.labels?.[0] ?? document.activeElement).textContent"
    for where in ("rows", "map", "cut", "clusters", "lost", "runs"):
        page = tab.open(where)
        page.wait_for_timeout(800)
        controls = page.locator("main select:visible, main input:visible")
        for at in range(controls.count()):
            if at >= controls.count():  # what was chosen has fewer controls
                break
            controls.nth(at).focus()
            page.keyboard.press("ArrowDown")
            page.wait_for_timeout(350)
            assert page.evaluate("document.activeElement.matches('select, input')"), (where, at, page.evaluate(held))
    page = tab.open("lost")
    page.locator("main button.link").first.focus()
    page.keyboard.press("Enter")
    until(page, "location.hash.startsWith('#rows') && document.activeElement.id === 'main'")


def test_light_and_dark(tab: Tab, browser: Any, server: str) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page = tab.open()
    light = page.evaluate(ground)
    page.keyboard.press("t")
    assert page.evaluate(ground) != light
    context = browser.new_context(color_scheme="dark")
    dark = Tab(context.new_page(), server)
    assert dark.open().evaluate(ground) != light
    dark.check()
    context.close()


def test_hostile_captions_are_text(browser: Any, tmp_path: Path) -> None:
    chains = select_some(tmp_path, write_pool(tmp_path / "pool"), tmp_path / "cache")
    with th.view(*chains[:2], cache=tmp_path / "cache") as viewer:
        context = browser.new_context(viewport={"width": 900, "height": 800})
        tab = Tab(context.new_page(), viewer.url)
        page = tab.open()
        page.on("dialog", lambda dialog: tab.logged.append(f"error: dialog {dialog.message}"))
        count(page)
        texts = page.locator(".tile .caption").all_inner_texts()
        assert texts[0] == HOSTILE[0]
        assert texts[1] == HOSTILE[1]
        assert page.locator("main script, main img[src=x]").count() == 0
        assert page.title().endswith("Thresher")
        assert page.locator(".tile .caption bdi").first.evaluate("e => getComputedStyle(e).unicodeBidi") == "isolate"
        boxes = [one.bounding_box() for one in page.locator(".item").all()[:8]]
        assert len({round(box["height"]) for box in boxes}) == 1, "long captions do not move the others"
        page.locator(".tile").nth(3).click()
        page.get_by_role("button", name="Show all").click()
        page.get_by_role("region", name="The whole caption").wait_for()
        length = page.get_by_role("region", name="The whole caption").evaluate("e => e.textContent.length")
        assert length == len(HOSTILE[3]) >= 100_000
        page.keyboard.press("Escape")
        for where in ("map", "cut", "clusters", "lost", "compare"):
            tab.open(where)
            page.wait_for_timeout(1_500)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{where} is too wide"
        page.wait_for_load_state("networkidle")
        tab.logged = [line for line in tab.logged if "404" not in line]  # rows without a readable image
        tab.check()
        context.close()


@pytest.mark.parametrize("width", [400, 1200, 2560])
def test_no_page_is_wider_than_the_window(browser: Any, server: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900})
    tab = Tab(context.new_page(), server)
    for where in ("rows", "map", "cut", "clusters", "lost", "compare", "runs"):
        page = tab.open(where)
        page.wait_for_timeout(900)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{where} at {width}"
    tab.check()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, server: str, scheme: str) -> None:
    # The file of the package, with the script of axe-core: a test evaluates it in the page, past the content policy.
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec is not None
    assert spec.origin
    script = (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")
    context = browser.new_context(viewport={"width": 1280, "height": 860}, color_scheme=scheme, bypass_csp=True)
    tab = Tab(context.new_page(), server)
    found: dict[str, list[str]] = {}
    for where in ("rows", "map", "cut", "clusters", "lost", "compare", "runs"):
        page = tab.open(where)
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(1_200)
        if where == "rows":
            page.locator(".tile").first.click()
            page.wait_for_timeout(800)
        page.evaluate(script)
        for one in json.loads(page.evaluate("axe.run().then(JSON.stringify)"))["violations"]:
            if one["impact"] in ("serious", "critical"):
                found[f"{where}: {one['id']}"] = [node["html"][:200] for node in one["nodes"][:3]]
    assert not found, json.dumps(found, indent=1)
    context.close()


def test_pools_with_little_to_show(browser: Any, tmp_path: Path) -> None:
    """Without images, rows are words; a mark fits where an image is missing; two rows are too few to compare."""
    pool = write_pool(tmp_path / "pool")
    table = pq.read_table(pool / "metadata" / "metadata_0.parquet")
    th.select(pool, th.SemDeDup(eps=0.1, clusters=4), progress=False).save(tmp_path / "pictures")
    plain = tmp_path / "plain"
    shutil.copytree(pool, plain)
    pq.write_table(table.drop_columns(["image"]), plain / "metadata" / "metadata_0.parquet")
    th.select(plain, th.Random(keep="50%"), progress=False).save(tmp_path / "words")
    th.select(write_pool(tmp_path / "two", 2), th.Random(keep=1), progress=False).save(tmp_path / "few")
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    for name, where in (("pictures", "clusters"), ("words", "rows"), ("few", "lost")):
        with th.view(tmp_path / name, cache=tmp_path / "cache") as viewer:
            page = Tab(context.new_page(), viewer.url).open(where)
            if name == "pictures":
                page.locator(".thumbs .picture.none").first.wait_for()
                inside = "[...document.querySelectorAll('.thumbs .none')].every(one => one.scrollHeight <= 44)"
                assert page.evaluate(inside)
            elif name == "words":
                page.locator(".tile.words").first.wait_for()
                assert page.locator(".tile .pictures").count() == 0
                assert page.locator(".item").first.bounding_box()["height"] < 150
            else:
                page.get_by_text("no value or word is in 5 rows or more").wait_for()
    context.close()
