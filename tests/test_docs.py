"""The documentation is correct: its blocks run, its tables match the fields, its links work."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from thresher.cli.main import main
from thresher.pruning.registry import METHODS
from thresher.runtime.parameters import parameters_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Pages that take long run with the marker slow; one of them also by default, on few rows.
SHORTER = "docs/train.md"
LONG = """
cli coreset for/data-engineer growing lance-and-mds load-time methods/clipcov methods/herd methods/hkmeans
other-viewers python reference report sweep train
""".split()
WHOLE = ("README.md", *(f"docs/{name}.md" for name in LONG))
SMALL = {
    "thresher train clip examples/twemoji ": "thresher train clip few --batch-size 64 ",
    "--samples-seen 17152": "--samples-seen 640",
    'train_clip("examples/twemoji", ': 'train_clip("few", ',
    "batch_size=512": "batch_size=64",
}
BLOCKS = [
    pytest.param(page, small, id=f"{name}-{'small' if small else 'whole'}", marks=marks)
    for page, name in zip(PAGES, NAMES, strict=True)
    for small, marks in [
        *([(True, [pytest.mark.early])] if name == SHORTER else []),
        (False, [pytest.mark.early, pytest.mark.slow] if name in WHOLE else []),
    ]
]


def blocks(text: str) -> Iterator[tuple[str, int, str]]:
    """Kind, line and content of every fenced block."""
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], text[: match.start(2)].count("\n") + 1, match[2]


def prose(text: str) -> str:
    """The page without its blocks and code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def shape(text: str) -> list[str]:
    """What is printed, but for numbers, verdicts and lines that only a slow machine prints."""
    lines = [
        line.rstrip()
        for line in text.strip().splitlines()
        if not re.search(r": [\d,]+ \w+ in [\d.]+ (s|min.*)$|ETA|matrix products use", line)
    ]
    return [re.sub(r"\d[\d,.]*|\b(kept|dropped)\b", "#", line) for line in lines]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some rows of the examples."""
    folder = tmp_path_factory.mktemp("few")
    rows = ds.dataset(ROOT / "examples" / "twemoji", exclude_invalid_files=True).to_table()
    groups = {group: i for i, group in enumerate(dict.fromkeys(rows["group"].to_pylist()))}
    kept = [groups[group] % 24 == groups["1f44b"] % 24 for group in rows["group"].to_pylist()]
    pq.write_table(rows.filter(kept), folder / "few.parquet")
    return folder


@pytest.fixture
def place(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that has the examples, some rows of them as ``few``, and a cache of its own."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "few").symlink_to(few)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "small"), BLOCKS)
def test_blocks_run(
    page: Path, small: bool, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = types.ModuleType("page")  # dataclasses and pickle look their module up
    monkeypatch.setitem(sys.modules, "page", module)
    content = page.read_text(encoding="utf-8")
    for whole, part in SMALL.items() if small else ():
        content = content.replace(whole, part)
    for kind, line, text in blocks(content):
        if kind == "python":
            exec(compile("\n" * (line - 1) + text, str(page), "exec", dont_inherit=True), vars(module))
        for entry in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:] if kind == "console" else ():
            command, _, shown = entry.partition("\n")
            if not command.startswith("thresher "):
                continue
            capsys.readouterr()
            code = main(shlex.split(command)[1:])
            out, err = capsys.readouterr()
            assert code == 0, f"{page.name}: {command}\n{err}"
            found = err + out
            if small:  # few rows cannot give the exact share, which is noted
                found = re.sub(r" \([\d.]+% requested\)$", "", found, flags=re.MULTILINE)
            assert not shown.strip() or shape(shown) == shape(found), f"{page.name}: {command}"
    for name, fn in list(vars(module).items()):
        if name.startswith("test_"):  # a page's own example of a test
            (place / name).mkdir()
            fn(**{"tmp_path": place / name} if inspect.signature(fn).parameters else {})


@pytest.mark.parametrize("name", METHODS.all())
def test_every_method_has_a_page_with_its_parameters(name: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    table = text.partition("## Parameters")[2].partition("\n**")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE))
    fields = {}
    for item in parameters_of(METHODS.all()[name]):
        plain = str(item.default).lower() if isinstance(item.default, bool) else str(item.default)
        fields[item.name] = "none" if item.default is None else f"`{plain}`"
        if item.default is MISSING:
            fields[item.name] = "required"
    assert told == fields
    assert "**Output.**" in text


def test_every_page_of_a_method_has_one() -> None:
    assert {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")} == set(METHODS.all())


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)", there.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{page.name} links to {target}; there are {', '.join(anchors)}"


@pytest.mark.parametrize("page", PAGES[1:], ids=NAMES[1:])
def test_every_page_is_listed(page: Path) -> None:
    index = ROOT / "docs" / "index.md"
    if page.parent.name == "results" and page.name != "README.md":
        index = page.parent / "README.md"
    listed = re.findall(r"\]\(([^)\s]+)\)", index.read_text(encoding="utf-8"))
    assert page == index or str(page.relative_to(index.parent)) in listed
