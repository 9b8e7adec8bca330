"""Plug-ins: classes found by name, in a folder of this package or in another package.

Methods, policies, engines, readers of pools and of raw data, encoders and exports are all plug-ins of the same kind: a
frozen dataclass in its own file, with its name as the class attribute ``name`` and its options as fields. The folder is
scanned, so there is no list to edit. Another package registers a plug-in with an entry point of the group.

A plug-in of another package that cannot be loaded is reported in one line; everything else still works.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
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
        package: Name of the distribution, such as "thresher"; for a class outside a distribution, its top-level module.
        version: Version of the distribution, "" if it has none.
    """

    package: str
    version: str


@dataclass(frozen=True)
class Broken:
    """A plug-in of another package that cannot be used.

    Attributes:
        name: Name of its entry point.
        package: The distribution that provides it.
        why: The error, in one line.
    """

    name: str
    package: str
    why: str

    def __str__(self) -> str:
        """Return the message in one line."""
        return f"{self.package} offers {self.name!r}, which cannot be used: {self.why}"


@dataclass(frozen=True)
class PluginPoint(Generic[T]):
    """All plug-ins of one kind.

    Attributes:
        noun: Name of the kind in messages, such as "method".
        folder: The package whose modules are scanned, such as "thresher.pruning.methods".
        group: The entry point group for plug-ins of other packages, such as "thresher.methods".
        needs: Attributes that every plug-in must have.
        adapt: Turns the name and the object of an entry point into a plug-in class, if other objects are accepted too.
    """

    noun: str
    folder: str
    group: str
    needs: tuple[str, ...] = ()
    adapt: Callable[[str, Any], Any] | None = None

    def names(self) -> set[str]:
        """Return all names, without loading plug-ins of other packages: for those, the names of their entry points."""
        own = {cls.name for module in self._modules() for cls in self._classes(self._load(module))}
        return own | {point.name for point in _entry_points(self.group)}

    def all(self) -> dict[str, type[T]]:
        """Return every plug-in by name, sorted; those of other packages only if they can be loaded."""
        plugins: dict[str, Any] = {}
        for module in self._modules():
            plugins |= {cls.name: cls for cls in self._classes(self._load(module))}
        for point in _entry_points(self.group):
            cls = self._offered(point)
            if cls is not None and plugins.setdefault(cls.name, cls) is not cls:
                self._warn(point, f"the name {cls.name!r} is taken by {origin_of(plugins[cls.name]).package}")
        return dict(sorted(plugins.items()))

    def find(self, name: str) -> type[T]:
        """Return the plug-in with a name; loads only its own module if the file has the name of the plug-in.

        Raises:
            UsageError: There is no such plug-in (the message suggests a similar name), or it cannot be loaded.
        """
        module = name.replace("-", "_")
        if module in self._modules():
            plugin: type[T] | None = next((c for c in self._classes(self._load(module)) if c.name == name), None)
            if plugin is not None:
                return plugin
        own_names = {cls.name for module in self._modules() for cls in self._classes(self._load(module))}
        if name not in own_names:
            named = [point for point in _entry_points(self.group) if point.name == name]
            for point in named:  # only those of that name: others may take long to load
                try:
                    offered: type[T] = self._checked(point)
                except (Exception, SystemExit) as error:
                    why = f"{_package(point)}: {_line(error)}"
                    raise UsageError(f"the {self.noun} {name!r} cannot be loaded: {why}") from error
                if offered.name == name:  # type: ignore[attr-defined]
                    return offered
        every = self.all()
        if name in every:
            return every[name]
        raise UsageError(f"no {self.noun} {name!r}; there are {', '.join(every)}.{suggest(name, every)}")

    def build(self, text: str) -> T:
        """Create a plug-in from ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``.

        Raises:
            UsageError: Unknown plug-in or option (the message suggests a similar name), or a value that is not allowed.
        """
        from thresher.runtime import parameters

        cls, options = self.parsed(text)
        return parameters.build(cls, f"the {self.noun} {text.partition(':')[0]!r}", options)

    def parsed(self, text: str) -> tuple[type[T], dict[str, Any]]:
        """Return the class and the options of ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``.

        Raises:
            UsageError: Unknown plug-in, or an option without a value.
        """
        from thresher.runtime import parameters

        name, _, rest = text.partition(":")
        cls, options = self.find(name), dict[str, Any]()
        known = {item.name for item in parameters.parameters_of(cls)}
        for one in filter(None, rest.split(",")):
            option, equals, value = one.partition("=")
            if not equals:
                raise UsageError(f"the {self.noun} {text!r}: write options as OPTION=VALUE, separated by commas")
            options[option] = parameters.from_text(parameters.type_of(cls, option), value) if option in known else value
        return cls, options

    def broken(self, name: str | None = None) -> list[Broken]:
        """Return the plug-ins of other packages that cannot be used, all or only those with a name, and why."""
        result = []
        for point in _entry_points(self.group):
            if name in (None, point.name):
                try:
                    self._checked(point)
                except (Exception, SystemExit) as error:
                    result.append(Broken(point.name, _package(point), _line(error)))
        return result

    def _modules(self) -> list[str]:
        return [info.name for info in pkgutil.iter_modules(importlib.import_module(self.folder).__path__)]

    def _load(self, module: str) -> ModuleType:
        return importlib.import_module(f"{self.folder}.{module}")

    def _classes(self, module: ModuleType) -> Iterator[Any]:
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__ and _is_named(cls):
                yield cls

    def _offered(self, point: EntryPoint) -> Any:
        """Return the plug-in of another package, or None with a warning if it cannot be used."""
        try:
            return self._checked(point)
        except (Exception, SystemExit) as error:  # no error of another package may end this program
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
    """Return the package of a plug-in, and its version."""
    module = cls.__module__
    top = module.partition(".")[0]
    if top == "thresher":
        from thresher import __version__

        return Origin("thresher", __version__)
    return distribution_of(module) or Origin(top, str(getattr(sys.modules.get(top), "__version__", "")))


def distribution_of(module: str) -> Origin | None:
    """Return the distribution that registers plug-ins from a module or from its nearest parent package."""
    known = _distributions(_import_path())
    while module and module not in known:
        module = module.rpartition(".")[0]
    return known.get(module)


def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group."""
    return _installed(_import_path()).get(group, ())


def _import_path() -> tuple[tuple[str, int], ...]:
    """Return the folders that Python imports from, and when each was changed; installing a package changes it."""
    return tuple(_changed(str(folder)) for folder in sys.path)


def _changed(folder: str) -> tuple[str, int]:
    try:
        return os.path.abspath(folder), os.stat(folder or os.curdir).st_mtime_ns
    except (OSError, ValueError):
        return folder, -1


@lru_cache(maxsize=1)  # to list them, the metadata of every package of the environment is read
def _installed(import_path: tuple[tuple[str, int], ...]) -> dict[str, tuple[EntryPoint, ...]]:
    """Return the entry points of every group of ours."""
    points = entry_points()
    return {group: tuple(points.select(group=group)) for group in points.groups if group.startswith("thresher.")}


@lru_cache(maxsize=1)
def _distributions(import_path: tuple[tuple[str, int], ...]) -> dict[str, Origin]:
    """Return the distribution of every module that registers plug-ins, and of its parent packages."""
    distributions: dict[str, Origin] = {}
    for point in (point for points in _installed(import_path).values() for point in points):
        if point.dist is not None:
            parts = point.module.split(".")
            for length in range(len(parts), 0, -1):
                distributions.setdefault(".".join(parts[:length]), Origin(point.dist.name, point.dist.version))
    return distributions


def _is_named(cls: type[Any]) -> bool:
    return (
        is_dataclass(cls)
        and isinstance(vars(cls).get("name"), str)
        and not any(item.name == "name" for item in fields(cls))
    )


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module.partition(".")[0]


def _line(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "")
    return line if isinstance(error, ThresherError) else f"{type(error).__name__}: {line}"
