"""docs/works-with.md: every cell that says yes names tests, and every row has an example that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "works-with.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not set(line) <= set("|-")
]
HEADS = [row for row in ROWS if row[-1] == "example"]
LINES = [row for row in ROWS if row not in HEADS]


@pytest.mark.parametrize("row", LINES, ids=[row[0] for row in LINES])
def test_a_row_says_what_runs_it(row: list[str]) -> None:
    assert len(row) == 6
    for cell in row[1:4]:
        if "yes" not in cell:
            continue
        links = re.findall(r"\[yes[^]]*\]\(\.\./(tests/[^)]+)\)", cell)
        assert links, cell
        for link in links:
            assert re.search(r"^\s*def test_", (PAGE.parents[1] / link).read_text(encoding="utf-8"), re.MULTILINE), link
    assert re.fullmatch(r"\[[^]]+\]\((\.\./)?[\w./-]+(#[\w-]+)?\)", row[-1]), row[-1]


def test_formats_and_trainers_are_listed_once() -> None:
    names = [row[0] for row in LINES]
    assert len(names) == len(set(names)) >= 19
    assert [head[0] for head in HEADS] == ["format", "trainer"]
