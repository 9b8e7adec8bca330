"""Plug-ins: classes found by name, in a folder of this package or offered by another package.

Methods, policies, engines, readers of pools and of raw data, encoders and exports are all plug-ins of the same kind: a
frozen dataclass in a file of its own, with its name as the class attribute ``name`` and its options as fields. The
folder is scanned, so there is no list to edit. Another package offers one by an entry point of the group.

A plug-in of another package that cannot be loaded is reported in one line and breaks nothing else.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import pkgutil
import re
import sys
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from types import CodeType, FunctionType, ModuleType
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
        own_names = {cls.name for module in self._modules() for cls in self._classes(self._load(module))}
        if name not in own_names:
            for point in entry_points(group=self.group):  # the one of that name alone: others may take long to load
                if point.name == name and (offered := self._offered(point)) is not None and offered.name == name:
                    one: type[T] = offered
                    return one
        if name not in own_names and (broken := next(iter(self.broken(name)), None)) is not None:
            raise UsageError(f"the {self.noun} {name!r} cannot be loaded: {broken.package}: {broken.why}")
        every = self.all()
        if name in every:
            return every[name]
        raise UsageError(f"no {self.noun} {name!r}; there are {', '.join(every)}.{suggest(name, every)}")

    def build(self, text: str) -> T:
        """Make a plug-in from its name, or from ``NAME:OPTION=VALUE,OPTION=VALUE``.

        Raises:
            UsageError: No such plug-in, no such option (suggests the nearest), or a value that is not allowed.
        """
        from thresher.runtime import parameters

        name, _, rest = text.partition(":")
        cls, given = self.find(name), {}
        known = {item.name for item in parameters.parameters_of(cls)}
        for one in filter(None, rest.split(",")):
            option, equals, value = one.partition("=")
            if not equals:
                raise UsageError(f"the {self.noun} {text!r}: write options as OPTION=VALUE, with commas between them")
            given[option] = parameters.from_text(parameters.type_of(cls, option), value) if option in known else value
        return parameters.build(cls, f"the {self.noun} {name!r}", given)

    def broken(self, name: str | None = None) -> list[Broken]:
        """Return the plug-ins of other packages that cannot be used, all of them or those of a name, and why."""
        found = []
        for point in entry_points(group=self.group):
            if name in (None, point.name):
                try:
                    self._checked(point)
                except (Exception, SystemExit) as error:
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
        except (Exception, SystemExit) as error:  # whatever another package raises must not end this program
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
    module = cls.__module__
    top = module.partition(".")[0]
    if top == "thresher":
        from thresher import __version__

        return Origin("thresher", __version__)
    return _distribution(module) or Origin(top, str(getattr(sys.modules.get(top), "__version__", "")))


def _distribution(module: str) -> Origin | None:
    """Return the distribution that offers plug-ins from a module or from the nearest package around it."""
    known = _distributions()
    while module and module not in known:
        module = module.rpartition(".")[0]
    return known.get(module)


@cache
def _distributions() -> dict[str, Origin]:
    """Return the distribution of every module that offers plug-ins, and of the packages around it."""
    every = entry_points()
    found: dict[str, Origin] = {}
    for point in (one for group in every.groups if group.startswith("thresher.") for one in every.select(group=group)):
        if point.dist is not None:
            parts = point.module.split(".")
            for length in range(len(parts), 0, -1):
                found.setdefault(".".join(parts[:length]), Origin(point.dist.name, point.dist.version))
    return found


# --- the version of code ---------------------------------------------------------------------------

# What thresher computes with: a change elsewhere, such as to messages or options, changes no number.
_COMPUTES = ("thresher.ops.", "thresher.select.", "thresher.pool.store")
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]*(\((?:[^)#]|#[^\n]*)*\)|(?:[^\n\\]|\\.)*)"
    r"|import[ \t]+((?:[^\n\\]|\\.)*))",
    re.MULTILINE | re.DOTALL,
)


def code_version(made_by: Callable[..., Any] | str) -> str:
    """Return a hash of the code that computes something: part of the key under which the result is cached.

    It covers the source of the function's module and of what that imports, directly or not: of thresher, the
    modules that compute (``ops``, ``select``, the store); of another package, that package's own modules, and its
    version. So a result is never answered from the cache once the code behind it has changed. It depends neither on
    where a package is installed nor on compiled files. Code without a source file, as in a notebook, is known by
    its bytecode.

    Args:
        made_by: The function, or a ``functools.partial`` of it, or the name of a module.
    """
    while isinstance(made_by, partial):
        made_by = made_by.func
    if isinstance(made_by, str):
        module = made_by
    else:
        module = getattr(made_by, "__module__", None) or type(made_by).__module__
    start = _source_of(module)
    if start is None and not isinstance(made_by, str):
        return _hashed([("", _bytecode(made_by, module))])
    found: dict[str, str] = {}
    left = [module]
    while left:
        name = left.pop()
        if name not in found and (source := _source_of(name)) is not None:
            found[name] = source.digest
            left += [one for one in source.imports if _counts(one, module) and _is_module(one)]
    package = None if module.startswith("thresher.") else _distribution(module)
    return _hashed([*sorted(found.items()), *([(package.package, package.version)] if package else [])])


def _hashed(parts: list[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _counts(name: str, module: str) -> bool:
    """Whether an imported module is part of the version of another."""
    return name.startswith((*_COMPUTES, module.partition(".")[0] + ".")) and (
        not name.startswith("thresher.") or name.startswith(_COMPUTES)
    )


@dataclass(frozen=True)
class _Source:
    """The source of a module: its hash, and the dotted names that it may import."""

    digest: str
    imports: tuple[str, ...]


class _Loaded:
    """A module as it was loaded, to remember its source by: reloading a module gives it another spec."""

    def __init__(self, spec: ModuleSpec) -> None:
        """Keep the spec."""
        self.spec = spec

    def __eq__(self, other: object) -> bool:
        """Whether it is the same spec."""
        return isinstance(other, _Loaded) and other.spec is self.spec

    def __hash__(self) -> int:
        """By identity."""
        return id(self.spec)


def _source_of(module: str) -> _Source | None:
    """Return the source of a module, which is read once for each time it is loaded; None where it has none."""
    loaded = sys.modules.get(module)
    spec = _found(module) if loaded is None else getattr(loaded, "__spec__", None)
    if spec is not None:
        return _read(_Loaded(spec))
    file = getattr(loaded, "__file__", None)  # a script
    return None if file is None else _parsed(_text(file), "")


@cache
def _read(loaded: _Loaded) -> _Source | None:
    spec = loaded.spec
    get = getattr(spec.loader, "get_source", None)
    try:
        text = get(spec.name) if get is not None else None
    except (ImportError, OSError):
        text = None
    if text is None and spec.has_location and str(spec.origin).endswith(".py"):
        text = _text(str(spec.origin))
    if text is not None:
        return _parsed(text, spec.name if spec.submodule_search_locations is not None else spec.parent or "")
    code = getattr(spec.loader, "get_code", lambda name: None)(spec.name)  # compiled, without its source
    return None if code is None else _Source(_hashed([("", str(part)) for part in _instructions(code)]), ())


def _text(file: str) -> str | None:
    try:
        with tokenize.open(file) as lines:
            return lines.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _parsed(text: str | None, package: str) -> _Source | None:
    if text is None:
        return None
    return _Source(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(), tuple(imported(text, package)))


def imported(text: str, package: str) -> list[str]:
    """Return the dotted names that a module's source imports, anywhere in it, sorted; of ``from a import b`` both.

    Args:
        text: The source.
        package: The package that relative imports start from.
    """
    names = set()
    for origin, several, plain in _IMPORT.findall(text):
        words = [re.split(r"[\s;]", word.strip())[0] for word in _words(several or plain)]
        if origin:
            base = origin.lstrip(".")
            if dots := len(origin) - len(base):
                around = package.split(".")[: len(package.split(".")) - dots + 1]
                base = ".".join([*around, *([base] if base else [])])
            names |= {base, *(f"{base}.{word}" for word in words if word)}
        else:
            names |= {word for word in words if word}
    return sorted(names)


def _words(text: str) -> list[str]:
    return re.sub(r"#[^\n]*|\\\n|[()]", " ", text).split(",")


@cache
def _found(module: str) -> ModuleSpec | None:
    """Return the spec of a module that is not loaded."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # its parent is no package
        return None


def _is_module(name: str) -> bool:
    return name in sys.modules or _found(name) is not None


def _bytecode(thing: Any, module: str) -> str:
    """Return what a function or class does, and whatever of its module it reaches by name, as text."""
    seen: dict[int, Any] = {}
    parts: list[str] = []
    left = [thing]
    while left:
        one = left.pop()
        one = getattr(one, "__func__", getattr(one, "fget", one))
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, type):
            parts.append(one.__qualname__)
            left += [value for _, value in sorted(vars(one).items()) if callable(value) or hasattr(value, "fget")]
            left += [base for base in one.__bases__ if base.__module__ == module]
        elif isinstance(one, FunctionType):
            steps = list(_instructions(one.__code__))
            parts += map(str, [one.__qualname__, *steps, one.__defaults__, one.__kwdefaults__])
            values = [one.__globals__[name] for name in _names(one.__code__) if name in one.__globals__]
            values += [cell.cell_contents for cell in one.__closure__ or ()]
            parts += [repr(value) for value in values if isinstance(value, (int, float, str, bytes, tuple))]
            left += [value for value in values if getattr(value, "__module__", None) == module]
    return "\n".join(parts)


def _instructions(code: CodeType) -> Iterator[Any]:
    """Yield what identifies compiled code: no file names and no line numbers."""
    yield from (code.co_code.hex(), code.co_names, code.co_varnames)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _instructions(const)
        else:
            yield sorted(map(repr, const)) if isinstance(const, frozenset) else repr(const)


def _names(code: CodeType) -> list[str]:
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const)]
    return sorted({*code.co_names, *inner})


# --- checks ----------------------------------------------------------------------------------------


def _is_named(cls: type[Any]) -> bool:
    return (
        is_dataclass(cls)
        and isinstance(vars(cls).get("name"), str)
        and not any(item.name == "name" for item in fields(cls))
    )


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module.partition(".")[0]


def _line(error: BaseException) -> str:
    told = next(iter(str(error).splitlines()), "")
    return told if isinstance(error, ThresherError) else f"{type(error).__name__}: {told}"
