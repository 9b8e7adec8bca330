"""Plug-ins: classes found by name, in a folder of this package or offered by another package.

Methods, policies, engines, readers of pools and of raw data, encoders and exports are all plug-ins of the same kind: a
frozen dataclass in a file of its own, with its name as the class attribute ``name`` and its options as fields. The
folder is scanned, so there is no list to edit. Another package offers one by an entry point of the group.

A plug-in of another package that cannot be loaded is reported in one line and breaks nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar

from thresher.errors import ThresherError, UsageError, suggest

T = TypeVar("T")


class PluginWarning(UserWarning):
    """A plug-in of another package cannot be used."""


@dataclass(frozen=True)
class Origin:
    """Where a plug-in comes from.

    Attributes:
        package: Name of the distribution, such as "thresher"; of a class of your own, its top module.
        version: Version of the distribution, "" where it has none.
    """

    package: str
    version: str


@dataclass(frozen=True)
class Broken:
    """A plug-in of another package that cannot be used.

    Attributes:
        name: Name of its entry point.
        package: The distribution that offers it.
        why: The error, in one line.
    """

    name: str
    package: str
    why: str

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.package} offers {self.name!r}, which cannot be used: {self.why}"


@dataclass(frozen=True)
class PluginPoint(Generic[T]):
    """A place where plug-ins of one kind are found.

    Attributes:
        noun: What one is called in messages, such as "method".
        folder: The package whose modules are scanned, such as "thresher.select.methods".
        group: The group of entry points by which other packages offer more, such as "thresher.methods".
        needs: Attributes every plug-in must have.
        adapt: Makes a plug-in of what an entry point of a name offers, where something else may be offered too.
    """

    noun: str
    folder: str
    group: str
    needs: tuple[str, ...] = ()
    adapt: Callable[[str, Any], Any] | None = None

    def names(self) -> set[str]:
        """Return what can be asked for, without loading what other packages offer: of those, names of entry points."""
        own = {cls.name for module in self._modules() for cls in self._classes(self._load(module))}
        return own | {point.name for point in entry_points(group=self.group)}

    def all(self) -> dict[str, type[T]]:
        """Return every plug-in by name, sorted: those of this package, then those of others that can be loaded."""
        found: dict[str, Any] = {}
        for module in self._modules():
            found |= {cls.name: cls for cls in self._classes(self._load(module))}
        for point in entry_points(group=self.group):
            cls = self._offered(point)
            if cls is not None and found.setdefault(cls.name, cls) is not cls:
                self._warn(point, f"the name {cls.name!r} is taken by {origin_of(found[cls.name]).package}")
        return dict(sorted(found.items()))

    def find(self, name: str) -> type[T]:
        """Return the plug-in of a name; loads only its own module where the file is named like the plug-in.

        Raises:
            UsageError: There is none, or it cannot be loaded; suggests the nearest.
        """
        own = name.replace("-", "_")
        if own in self._modules():
            found: type[T] | None = next((c for c in self._classes(self._load(own)) if c.name == name), None)
            if found is not None:
                return found
        if not any(c.name == name for module in self._modules() for c in self._classes(self._load(module))):
            for point in entry_points(group=self.group):  # the one of that name alone: others may take long to load
                if point.name == name and (offered := self._offered(point)) is not None and offered.name == name:
                    one: type[T] = offered
                    return one
        known = self.all()
        if name in known:
            return known[name]
        if (broken := next((one for one in self.broken() if one.name == name), None)) is not None:
            raise UsageError(f"the {self.noun} {name!r} cannot be loaded: {broken.package}: {broken.why}")
        raise UsageError(f"no {self.noun} {name!r}; there are {', '.join(known)}.{suggest(name, known)}")

    def broken(self) -> list[Broken]:
        """Return the plug-ins of other packages that cannot be used, and why."""
        found = []
        for point in entry_points(group=self.group):
            try:
                self._checked(point)
            except Exception as error:
                found.append(Broken(point.name, _package(point), _line(error)))
        return found

    def _modules(self) -> list[str]:
        return [info.name for info in pkgutil.iter_modules(importlib.import_module(self.folder).__path__)]

    def _load(self, module: str) -> ModuleType:
        return importlib.import_module(f"{self.folder}.{module}")

    def _classes(self, module: ModuleType) -> Iterator[Any]:
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__ and _is_named(cls):
                yield cls

    def _offered(self, point: EntryPoint) -> Any:
        """Return what another package offers, or None where it cannot be used; that is told once."""
        try:
            return self._checked(point)
        except Exception as error:  # whatever somebody else's code raises must not end this program
            self._warn(point, _line(error))
            return None

    def _checked(self, point: EntryPoint) -> Any:
        cls = point.load()
        if self.adapt is not None:
            cls = self.adapt(point.name, cls)
        if not (isinstance(cls, type) and _is_named(cls)):
            raise UsageError(f"{point.value} is not a dataclass with a class attribute 'name'")
        if missing := [name for name in self.needs if not hasattr(cls, name)]:
            raise UsageError(f"{point.value} has no {', '.join(missing)}")
        return cls

    def _warn(self, point: EntryPoint, why: str) -> None:
        warnings.warn(str(Broken(point.name, _package(point), why)), PluginWarning, stacklevel=3)


def origin_of(cls: type[Any]) -> Origin:
    """Return which package a plug-in comes from, and its version."""
    top = cls.__module__.partition(".")[0]
    if top == "thresher":
        from thresher import __version__

        return Origin("thresher", __version__)
    package = _distributions().get(top)
    if package is not None:
        from importlib.metadata import version

        return Origin(package, version(package))
    return Origin(top, str(getattr(sys.modules.get(top), "__version__", "")))


@cache
def code_version(module: str) -> str:
    """Return a hash of the code that a module computes with: part of the key of whatever it caches.

    It covers the source of the module and, of thresher's own, of all modules of ``ops`` and ``select`` that it
    imports, directly or not; of another package, that package's version too. So a result is never answered from the
    cache once the code that made it has changed.
    """
    digest = hashlib.sha256()
    for name in sorted(_closure(module)):
        digest.update(f"{name}\0{_source(name)}\0".encode())
    top = module.partition(".")[0]
    if top != "thresher" and (package := _distributions().get(top)):
        from importlib.metadata import version

        digest.update(f"{package} {version(package)}".encode())
    return digest.hexdigest()[:16]


def _closure(module: str) -> set[str]:
    """Return a module and thresher's own modules of arithmetic that it imports."""
    seen: set[str] = set()
    left = [module]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(_source(name))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            left += [one for one in names if one.startswith(("thresher.ops.", "thresher.select.")) and _is_module(one)]
    return seen


@cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def _source(module: str) -> str:
    """Return a module's source, "" where there is none (a notebook, a shell)."""
    try:
        return inspect.getsource(sys.modules.get(module) or importlib.import_module(module))
    except (OSError, TypeError, ImportError):
        return ""


@cache
def _distributions() -> dict[str, str]:
    """Return the distribution of every top-level module that offers plug-ins."""
    every = entry_points()
    groups = [group for group in every.groups if group.startswith("thresher.")]
    points = [point for group in groups for point in every.select(group=group)]
    return {point.module.partition(".")[0]: point.dist.name for point in points if point.dist is not None}


def _is_named(cls: type[Any]) -> bool:
    return (
        is_dataclass(cls)
        and isinstance(vars(cls).get("name"), str)
        and not any(item.name == "name" for item in fields(cls))
    )


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module.partition(".")[0]


def _line(error: Exception) -> str:
    told = next(iter(str(error).splitlines()), "")
    return told if isinstance(error, ThresherError) else f"{type(error).__name__}: {told}"
