"""What a shell completes for arguments and options that take text: files, and names of plug-ins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

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


class Completed(_Text):
    """Text that a shell completes with names, and, if none fits, with files."""

    def __init__(self, names: Callable[[], Iterable[str]] | None, *, files: bool) -> None:
        """Store what can be completed; the function is called when the names are needed."""
        self._names, self._files = names, files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin with a word; else a request for files, if files can be given."""
        names = sorted(name for name in self._names() if name.startswith(incomplete)) if self._names else []
        found = [CompletionItem(name) for name in names]
        return found or ([CompletionItem(incomplete, type="file")] if self._files else [])


def complete(command: click.Command) -> None:
    """Make the arguments and options of a command that take text completable; used only while a shell completes."""
    for param in command.params:
        if type(param.type) is not type(click.STRING):
            continue
        words = set(re.split(r"[^\w.]+", param.metavar or str(param.name).upper()))
        files = bool(words & _FILES)
        source = _NAMES.get((str(command.name), str(param.name))) or _NAMES.get(("", str(param.name)))
        if files or source:
            param.type = Completed(source, files=files)


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


def _settings() -> Iterable[str]:
    from thresher.runtime.config import SETTINGS

    return SETTINGS


# The names that a parameter takes, by command ("" for every command) and name.
_NAMES: dict[tuple[str, str], Callable[[], Iterable[str]]] = {
    ("", "recipe"): _recipes,
    ("", "method"): _methods,
    ("", "policy"): _policies,
    ("", "encoder"): _encoders,
    ("lab", "plan"): _plans,
    ("methods", "name"): _methods,
    ("recipes", "name"): _recipes,
    ("set", "name"): _settings,
    ("unset", "name"): _settings,
}
