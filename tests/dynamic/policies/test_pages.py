"""The pages of policies list their options, with the defaults of the fields."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from thresher.dynamic.registry import POLICIES, flag_of, options_of

PAGES = Path(__file__).parents[3] / "docs" / "policies"
NAMES = sorted(path.stem for path in PAGES.glob("*.md"))


@pytest.mark.parametrize("name", NAMES)
def test_a_page_lists_the_options_of_its_policy(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    table = text.partition("## Parameters")[2]
    told = dict(re.findall(r"^\| `--([\w-]+)` \| `(\w+)` \|", table, re.MULTILINE))
    assert told == {flag_of(item): item.name for item in options_of(POLICIES.find(name))}
    for item in options_of(POLICIES.find(name)):
        shown = re.search(rf"^\| `--{flag_of(item)}` \| `{item.name}` \| (.*?) \|", table, re.MULTILINE)
        assert shown
        if isinstance(item.default, (int, float)) and not re.search("[a-z]", shown[1]):
            number = shown[1].removesuffix("%")
            assert float(number) / (100 if number != shown[1] else 1) == pytest.approx(item.default)


def test_there_are_pages() -> None:
    assert {"sift", "rho", "dissect", "seta"} <= set(NAMES)
