"""What a shell completes for arguments and options that take text: files, names of plug-ins, and of columns."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    _Text = click.types.StringParamType
else:
    _Text = type(click.STRING)

# Placeholders that stand for files or folders.
_FILES = {
    "DATA", "DIR", "FILE", "FILE.npy", "LAB", "MODEL", "NAMES.txt", "PATH", "PLAN", "POOL", "RECIPE", "RUN", "SEL",
}  # fmt: skip


_LOOKED = 2_000  # entries of a folder
_LINE = 1 << 20  # bytes of a line of JSON
_NAME = re.compile(r"[\w.@%+/-]+")  # of a column: nothing that a shell would read as a command, or as several words


class Completed(_Text):
    """Text that a shell completes with names, and, if none fits, with files."""

    def __init__(self, names: Callable[[], Iterable[str]] | None, *, files: bool, several: bool = False) -> None:
        """Store what can be completed; the function is called when the names are needed."""
        self._names, self._files, self._several = names, files, several

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin with a word; else a request for files, if files can be given."""
        found = _fitting(sorted(self._names()), incomplete, self._several) if self._names else []
        return found or ([CompletionItem(incomplete, type="file")] if self._files else [])


class Column(_Text):
    """Text that a shell completes with the columns of the pool, data or evaluation set that the line names."""

    def __init__(self, command: click.Command, words: Sequence[str], *, several: bool) -> None:
        """Store the command, the words after it, and whether names are separated by commas."""
        self._command, self._words, self._several = command, words, several

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the columns that begin with a word; none if there is no such file on this machine, or for any error.

        Reads one file: the first table of a folder.
        """
        try:
            names = _columns(self._location(param))
        except Exception:  # a shell must not show it, and the command itself will say what is wrong
            return []
        return _fitting(filter(_NAME.fullmatch, names), incomplete, self._several)

    def _location(self, param: click.Parameter) -> str:
        # The option has no value yet, and click does not parse arguments before an option without its value.
        words = self._words[:-1] if self._words and self._words[-1] in param.opts else self._words
        values = self._command.make_context(None, list(words), resilient_parsing=True).params
        sets = param.opts[0].startswith("--eval-") or (self._command.name, param.name) == ("prove", "labels")
        for name in ("evals",) if sets else ("pool", "data", "selection"):
            value = values.get(name)
            value = value[-1] if isinstance(value, tuple) and value else value
            if isinstance(value, str) and value:
                return _pool_of(value) if name == "selection" else value
        return ""


def _fitting(names: Iterable[str], incomplete: str, several: bool) -> list[CompletionItem]:
    """Return the names that begin with a word, or with the last of ``several`` that are separated by commas."""
    given, comma, begin = incomplete.rpartition(",") if several else ("", "", incomplete)
    taken = given.split(",")
    return [CompletionItem(given + comma + name) for name in names if name.startswith(begin) and name not in taken]


def complete(command: click.Command, words: Sequence[str] = ()) -> None:
    """Make the arguments and options of a command that take text completable; used only while a shell completes.

    Args:
        command: The command.
        words: The words after it on the line.
    """
    words = tuple(words)  # click takes them out of its list
    for param in command.get_params(click.Context(command)):
        if type(param.type) not in (type(click.STRING), Column):
            continue
        name = str(param.name)
        if (param.metavar == "COLUMN" and name != "score_column") or (command.name, name) in _COLUMN_LISTS:
            param.type = Column(command, words, several=param.metavar != "COLUMN")
            continue
        placeholders = set(re.split(r"[^\w.]+", param.metavar or name.upper()))
        files = bool(placeholders & _FILES)
        source = _NAMES.get((str(command.name), name)) or _NAMES.get(("", name))
        if files or source:
            param.type = Completed(source, files=files, several=name == "quality")


def _columns(location: str) -> Iterable[str]:
    """Return the columns of a table on this machine, or of the first table in a folder; () for others."""
    from thresher.io.tables import TABLES, TEXTS, any_table

    endings = tuple(ending for ending in TABLES if ending != ".json")  # it may be anything, and has no first row
    path = "" if "://" in location else next(_files(os.path.expanduser(location), endings), "")
    if not path:
        return ()
    if not path.lower().endswith(TEXTS):
        return any_table("file", path).columns
    from thresher.io.csv import header
    from thresher.runtime.untrusted import parse_json

    with open(path, "rb") as file:
        if path.lower().endswith((".csv", ".tsv")):
            return header(file, path)[0]
        first = next((line for line in iter(lambda: file.readline(_LINE), b"") if line.strip()), b"")
        row = parse_json(first)
    return row if isinstance(row, dict) else ()


def _files(location: str, endings: tuple[str, ...]) -> Iterator[str]:
    """Yield files with some endings: the location itself, or those in the folder, then those in its folders."""
    if os.path.isfile(location):
        yield from [location] if location.lower().endswith(endings) else []
        return
    folders = []
    for entry in _entries(location):
        if entry.is_dir():
            folders.append(entry.path)
        elif entry.name.lower().endswith(endings) and entry.is_file() and not entry.name.endswith(".manifest.json"):
            yield entry.path
    for folder in folders:
        for entry in _entries(folder):
            if entry.name.lower().endswith(endings) and entry.is_file():
                yield entry.path


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the first entries of a folder, sorted, without hidden ones; a folder may have millions."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        some = [entry for _, entry in zip(range(_LOOKED), entries, strict=False)]
    return sorted((entry for entry in some if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _pool_of(selection: str) -> str:
    """Return the location of the pool of a selection folder."""
    from thresher.runtime.untrusted import read_json

    record: Any = read_json(os.path.join(selection, "selection.json"))
    pool = record["pool"]
    return pool if isinstance(pool, str) else ""


def _methods() -> Iterable[str]:
    from thresher.pruning.registry import METHODS

    return METHODS.names()


def _policies() -> Iterable[str]:
    from thresher.dynamic.registry import POLICIES

    return POLICIES.names()


def _recipes() -> Iterable[str]:
    from thresher.pruning.recipe import shipped_recipes

    return shipped_recipes()


def _plans() -> Iterable[str]:
    from thresher.lab.plan import shipped_plans

    return shipped_plans()


def _encoders() -> Iterable[str]:
    from thresher.embedding.encoders import ENCODERS

    return ENCODERS.names()


def _quality() -> Iterable[str]:
    from thresher.embedding.quality import QUALITY

    return QUALITY


def _settings() -> Iterable[str]:
    from thresher.runtime.config import SETTINGS

    return SETTINGS


# The names that a parameter takes, by command ("" for every command) and name.
_NAMES: dict[tuple[str, str], Callable[[], Iterable[str]]] = {
    ("", "recipe"): _recipes,
    ("", "method"): _methods,
    ("", "policy"): _policies,
    ("", "encoder"): _encoders,
    ("", "quality"): _quality,
    ("lab", "plan"): _plans,
    ("methods", "name"): _methods,
    ("recipes", "name"): _recipes,
    ("set", "name"): _settings,
    ("unset", "name"): _settings,
}

# Options with names of columns, separated by commas.
_COLUMN_LISTS = {("export", "columns")}
