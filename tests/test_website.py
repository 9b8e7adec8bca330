"""The site of the documentation: every page is in its navigation, links work, and nothing comes from another host."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from thresher.pruning.registry import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def nav() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "website" / "nav.py"))


def test_every_page_is_in_the_navigation_once(nav: dict[str, Any]) -> None:
    sections = nav["arranged"](PAGES)
    assert sorted(page for own in sections.values() for page in own) == PAGES
    assert sections["Start"][0] == "index.md"
    assert {f"methods/{name}.md" for name in METHODS.all()} <= {*sections["Methods"]}


def test_a_new_page_has_a_place_without_being_named(nav: dict[str, Any]) -> None:
    sections = nav["arranged"]([*PAGES, "methods/new.md", "adding-a-thing.md", "brand-new.md"])
    assert "methods/new.md" in sections["Methods"]
    assert "adding-a-thing.md" in sections["Extend"]
    assert "brand-new.md" in sections["More"]


@pytest.mark.parametrize("name", METHODS.all())
def test_every_method_has_a_small_picture(name: str) -> None:
    text = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    found = re.search(r"^!\[([^\]]{20,})\]\((pictures/[\w-]+\.webp)\)$", text, re.MULTILINE)
    assert found, f"docs/methods/{name}.md has no picture; see website/pictures.py"
    path = DOCS / "methods" / found[2]
    assert path.stem == name
    assert path.stat().st_size < 60_000
    with Image.open(path) as picture:
        assert picture.width >= 1000


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    site = tmp_path / "site"
    words = ["-m", "mkdocs", "build", "--strict", "-q", "-f", str(ROOT / "website" / "mkdocs.yml"), "-d", str(site)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        assert (site / page.replace("README.md", "index.md")).with_suffix(".html").is_file()
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    for name in ("thresher.select", "semdedup", "What did it drop, and why?"):
        assert name in index
    assert 'src="iframe-worker.js"' in (site / "index.html").read_text(encoding="utf-8")  # search from disk
    notebook = next(site.glob("notebooks/*what-did-it-drop.html")).read_text(encoding="utf-8")
    assert notebook.count("data:image/webp") > 20
    assert "OUTPUT-" not in notebook
    reference = (site / "reference" / "1-functions.html").read_text(encoding="utf-8")
    assert 'id="thresher.select"' in reference
    assert ":func:" not in reference
    for place in site.rglob("*.html"):
        text = place.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=\"(?:https?:)?//[^>]*>", text), (
            place
        )
