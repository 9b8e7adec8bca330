"""Texts are plain English: messages, help, docstrings, comments, templates and pages, and the names in the source.

``WORDS`` lists what is not written here, and what to write instead. ``ALLOWED`` lists the exceptions.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "thresher"


class Word(NamedTuple):
    """What is not to be written, what to write instead, and a text in which it is found."""

    pattern: str
    instead: str
    example: str


WORDS = (
    Word(r"told", "says, shows, reports, records", "The rows a step was told about."),
    Word(r"tell(s|ing)?", "say, show, report, record", "The message tells which file."),
    Word(r"(?<![-_])aside(?!\.txt)|set-aside(?!\.txt)", "skipped", "Bad rows are set aside."),
    Word(r"story|stories", "explanation, history", "The story of one row."),
    Word(r"anew", "again, from the start", "Cluster the pool anew."),
    Word(r"mend(s|ed|ing)?", "fix", "Mend the file."),
    Word(r"climb(s|ed|ing)?", "unsafe keys; keys with '..'", "2 keys climb out of the folder."),
    Word(r"nobody|somebody(?: else)?('s)?", "no one, unknown, another", "Of which nobody knows when it ends."),
    Word(r"link to nowhere", "broken symlink", "Is it missing, or a link to nowhere?"),
    Word(r"at rest", "once writing has finished", "Run again when it is at rest."),
    Word(r"labels no row", "has no labels", "The file labels no row."),
    Word(
        r"(its|their|whose) (words|numbers|values|names) (is|are) none",
        "is not a known string, is not a number",
        "Its numbers are none.",
    ),
    Word(r"is none of an epoch", "is not in this epoch", "Row 3 is none of an epoch."),
    Word(
        r"(?<!there )(is|are) no (?!longer|more|less|fewer|other|need|way|reason|single)[.a-z]\S*",
        "is not a ...",
        "The file is no picture.",
    ),
    Word(r"could make right", "validate options before reading data", "Refuse what no data could make right."),
    Word(r"refuse what", "Validate the parameters.", "Refuse what cannot be carried out."),
    Word(r"to and fro", "by binary search", "Found by going to and fro."),
    Word(r"for want of", "because there is no", "Skipped for want of a caption."),
    Word(r"lest", "so that ... not", "Sorted, lest they repeat."),
    Word(r"a polite request", "SIGTERM", "A polite request to end."),
    Word(r"(could|can) least have done without", "were most redundant", "Rows it could least have done without."),
    Word(r"yet to come", "started later", "Threads that are yet to come."),
    Word(r"just now", "network error (...); retry later", "It cannot be reached just now."),
    Word(r"skim(s|med|ming)?", "fast tar scan", "Skim the tar."),
    Word(r"latent", "class statistics", "The latent classes of a pool."),
    Word(r"thresh(ed|es|ing)", "pruned", "Twemoji, threshed."),
    Word(r"pictures?", "image, images", "A folder of pictures."),
    Word(r"goes on(?= (from|where|after|with|when|at|until)\b| ?[.,;:)]|$)", "resumes, continues", "The run goes on."),
    Word(r"one's|others' (?=[a-z])", "your own, another package's, ... of others", "An encoder of one's own."),
    Word(r"of so many", "N ...", "An array of so many rows."),
    Word(r"beside", "next to, and, compared with", "The names are beside it."),
    Word(r"yardstick", "baseline", "The yardstick is a random subset."),
)
PATTERNS = [(re.compile(rf"(?<!\w)(?:{word.pattern})(?!\w)", re.IGNORECASE), word) for word in WORDS]

NAMES = {
    "told": "info, meta, summary, message, text, notes",
    "_told": "info, meta, summary, message, text, notes",
    "story": "explain, explanation, history",
    "skim": "scan",
    "latent": "class_statistics",
    "settle": "record_epoch",
    "only": "refuse_foreign_files",
    "probe": "check_writable",
}


class Allowed(NamedTuple):
    """Text that may stay although it matches a word, in files whose path matches, and why."""

    path: str
    text: str
    why: str


ALLOWED = (
    Allowed(r".*", r"io[./]pictures(\.py)?", "the module thresher.io.pictures"),
    Allowed(r".*\.py", r'"[\w.-]+"', "a key or value in quotes"),
    Allowed(r".*\.py", r"(?m)^ +\w+:(?= )", "the name of an argument or attribute that a docstring describes"),
    Allowed(r".*\.md", r'"(pictures|told)":', "a key of --json output"),
    Allowed(r"CONTRIBUTING\.md", r"`picture`", "a kind of input of tests.fuzz_data"),
    Allowed(r".*", r"tell\(\)", "the method of files"),
)
# A name that may stay: where, which one, and why.
ALLOWED_NAMES = {
    ("embedding/pipeline.py", "only"): "EmbedSettings.only is the flag --only of embed",
    ("evaluation/linear_probe.py", "probe"): "a linear probe, the term of the field",
    ("train/moco.py", "probe"): "a linear probe, the term of the field",
}

# --- texts ----------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A text and the line it begins at."""

    line: int
    text: str


def texts_of_python(source: str) -> Iterator[Text]:
    """String literals and docstrings, and comments; names and keys, which are literals without a space, are not texts.

    The values in an f-string are left out, and comments on consecutive lines are one text.
    """
    tree = ast.parse(source)
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            if " " in text.strip():
                yield Text(node.lineno, text)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            if " " in node.value.strip():
                yield Text(node.lineno, node.value)
    begin, lines = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if lines and token.start[0] != begin + len(lines):
                yield Text(begin, "\n".join(lines))
                lines = []
            begin = begin if lines else token.start[0]
            lines.append(token.string.lstrip("# "))
    if lines:
        yield Text(begin, "\n".join(lines))


def texts_of(path: Path) -> Iterator[Text]:
    """The texts of a file."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from texts_of_python(content)
    elif path.suffix == ".jinja":
        yield Text(1, re.sub(r"\{%.*?%\}|\{\{.*?\}\}", _blank, content, flags=re.DOTALL))
    else:
        yield Text(1, content)


def _blank(match: re.Match[str]) -> str:
    """Spaces in place of a match, so that lines and offsets stay."""
    return re.sub(r"[^\n]", " ", match[0])


def _without_code(text: str) -> str:
    """A text without code spans, roles and link targets."""
    return re.sub(r"``[^`]+``|`[^`\n]+`|\]\([^)\s]*\)", _blank, text)


def problems(name: str, texts: Iterator[Text]) -> list[str]:
    """A line for each word found in the texts of a file: where, what, and what to write instead."""
    found = []
    for begin, text in texts:
        for path, allowed, _ in ALLOWED:
            if re.fullmatch(path, name):
                text = re.sub(allowed, _blank, text)
        text = _without_code(text)
        ends = [match.start() for match in re.finditer("\n", text)]
        # One space for a line break and its indentation would move offsets: pad it to the same length in front.
        line = re.sub(r"\s*\n\s*", lambda match: "\0" * (len(match[0]) - 1) + " ", text)
        kept = [i for i, char in enumerate(line) if char != "\0"]
        flat = line.replace("\0", "")
        for pattern, word in PATTERNS:
            for match in pattern.finditer(flat):
                where = begin + bisect_right(ends, kept[match.start()] - 1)
                excerpt = flat[max(0, match.start() - 30) : match.end() + 30].strip()
                found.append(f"{name}:{where}: {match[0]!r}: write {word.instead} ({excerpt})")
    return found


def names_of(source: str) -> Iterator[tuple[int, str]]:
    """Names of variables, arguments, attributes, functions, classes and imports, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.alias):
            yield node.lineno, (node.asname or node.name).rpartition(".")[2]


# --- tests ----------------------------------------------------------------------------------------

SOURCES = sorted(path for path in SOURCE.rglob("*") if path.suffix in (".py", ".jinja", ".toml"))
ROOMS = sorted({path.relative_to(SOURCE).parts[0] for path in SOURCES})
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(path for top in ("docs", "examples", "lab") for path in (ROOT / top).rglob("*.md")),
]


@pytest.mark.parametrize("room", ROOMS)
def test_the_texts_of_a_room_are_plain(room: str) -> None:
    paths = [path for path in SOURCES if path.relative_to(SOURCE).parts[0] == room]
    found = [line for path in paths for line in problems(str(path.relative_to(SOURCE)), texts_of(path))]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_a_page_is_plain(page: Path) -> None:
    found = problems(str(page.relative_to(ROOT)), texts_of(page))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("room", ROOMS)
def test_the_names_of_a_room_say_what_they_are(room: str) -> None:
    found = []
    for path in SOURCES:
        name = str(path.relative_to(SOURCE))
        if path.suffix == ".py" and path.relative_to(SOURCE).parts[0] == room:
            for line, word in [(0, path.stem), *names_of(path.read_text(encoding="utf-8"))]:
                if word in NAMES and (name, word) not in ALLOWED_NAMES:
                    found.append(f"{name}:{line}: {word}: call it {NAMES[word]}, or what it is")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("word", WORDS, ids=[word.pattern for word in WORDS])
def test_each_word_is_found_wherever_it_is(word: Word, tmp_path: Path) -> None:
    broken = word.example.replace(" ", "\n    ")  # over as many lines as there are
    for source in (
        f'x = 1\n"""{word.example}"""',
        f'x = 1\n"""{broken}"""',
        f"x = 1\nfail({word.example!r})",
        f"x = 1\nfail(f{word.example + ' {x} '!r})",
        f"x = 1\n# {word.example}",
        "x = 1\n" + "\n".join(f"# {part}" for part in word.example.split()),
    ):
        lines = problems("a.py", texts_of_python(source))
        assert any(word.instead in line for line in lines), source
        assert all(re.match(r"a\.py:([2-9]|1\d): ", line) for line in lines)
    for name in ("page.md", "page.html.jinja", "recipe.toml"):
        (tmp_path / name).write_text(f"A line.\n{broken}\n")
        lines = problems(name, texts_of(tmp_path / name))
        assert any(word.instead in line for line in lines), name


def test_the_line_of_a_word_is_its_own() -> None:
    source = 'def f():\n    """First.\n\n    The rows are set\n    aside here.\n    """\n'
    assert [line.partition(": ")[0] for line in problems("a.py", texts_of_python(source))] == ["a.py:5"]


@pytest.mark.parametrize(
    "source",
    [
        "there is no file; where there are no rows",
        "The file `set_aside.txt` and the key `pictures`; :mod:`thresher.io.pictures`.",
        "set-aside.txt lists what was skipped",
        "that retells nothing, besides the threshold of a thresher",
        "it is no longer there, and takes no more than 3 rows",
    ],
)
def test_what_is_fine_is_not_found(source: str) -> None:
    assert problems("a.py", iter([Text(1, source)])) == []


def test_names_are_found() -> None:
    source = "import a as told\ndef skim(only, *, x): x.probe = story = f(settle=1)\nclass latent: _told: int"
    assert {name for _, name in names_of(source)} >= set(NAMES)
