"""Plug-ins: classes found by name, in a folder of this package or in another package.

Methods, policies, engines, readers of pools and of raw data, encoders and exports are all plug-ins of the same kind: a
frozen dataclass in its own file, with its name as the class attribute ``name`` and its options as fields. The folder is
scanned, so there is no list to edit. Another package registers a plug-in with an entry point of the group.

A plug-in of another package that cannot be loaded is reported in one line; everything else still works.
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
        folder: The package whose modules are scanned, such as "thresher.select.methods".
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
        return own | {point.name for point in entry_points(group=self.group)}

    def all(self) -> dict[str, type[T]]:
        """Return every plug-in by name, sorted; those of other packages only if they can be loaded."""
        plugins: dict[str, Any] = {}
        for module in self._modules():
            plugins |= {cls.name: cls for cls in self._classes(self._load(module))}
        for point in entry_points(group=self.group):
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
            for point in entry_points(group=self.group):  # only the one with that name: others may take long to load
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
        """Create a plug-in from ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``.

        Raises:
            UsageError: Unknown plug-in or option (the message suggests a similar name), or a value that is not allowed.
        """
        from thresher.runtime import parameters

        name, _, rest = text.partition(":")
        cls, options = self.find(name), {}
        known = {item.name for item in parameters.parameters_of(cls)}
        for one in filter(None, rest.split(",")):
            option, equals, value = one.partition("=")
            if not equals:
                raise UsageError(f"the {self.noun} {text!r}: write options as OPTION=VALUE, separated by commas")
            options[option] = parameters.from_text(parameters.type_of(cls, option), value) if option in known else value
        return parameters.build(cls, f"the {self.noun} {name!r}", options)

    def broken(self, name: str | None = None) -> list[Broken]:
        """Return the plug-ins of other packages that cannot be used, all or only those with a name, and why."""
        result = []
        for point in entry_points(group=self.group):
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
    return _distribution(module) or Origin(top, str(getattr(sys.modules.get(top), "__version__", "")))


def _distribution(module: str) -> Origin | None:
    """Return the distribution that registers plug-ins from a module or from its nearest parent package."""
    known = _distributions()
    while module and module not in known:
        module = module.rpartition(".")[0]
    return known.get(module)


@cache
def _distributions() -> dict[str, Origin]:
    """Return the distribution of every module that registers plug-ins, and of its parent packages."""
    points = entry_points()
    distributions: dict[str, Origin] = {}
    groups = [group for group in points.groups if group.startswith("thresher.")]
    for point in (point for group in groups for point in points.select(group=group)):
        if point.dist is not None:
            parts = point.module.split(".")
            for length in range(len(parts), 0, -1):
                distributions.setdefault(".".join(parts[:length]), Origin(point.dist.name, point.dist.version))
    return distributions


# --- the version of code ---------------------------------------------------------------------------

# The modules that compute: a change elsewhere, such as to messages or options, changes no number.
_COMPUTES = ("thresher.ops.", "thresher.select.", "thresher.pool.store")
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]*(\((?:[^)#]|#[^\n]*)*\)|(?:[^\n\\]|\\.)*)"
    r"|import[ \t]+((?:[^\n\\]|\\.)*))",
    re.MULTILINE | re.DOTALL,
)


def code_version(made_by: Callable[..., Any] | str) -> str:
    """Return a hash of the code that computes a result: part of the cache key of the result.

    It covers the source of the function's module and of the modules that it imports, directly or not: in thresher,
    the modules that compute (``ops``, ``select``, the store); in another package, all modules of that package, and
    its version. A result is therefore never read from the cache once its code has changed. The hash does not depend
    on where a package is installed or on compiled files. Code without a source file, as in a notebook, is hashed by
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
    digests: dict[str, str] = {}
    left = [module]
    while left:
        name = left.pop()
        if name not in digests and (source := _source_of(name)) is not None:
            digests[name] = source.digest
            left += [one for one in source.imports if _counts(one, module) and _is_module(one)]
    package = None if module.startswith("thresher.") else _distribution(module)
    return _hashed([*sorted(digests.items()), *([(package.package, package.version)] if package else [])])


def _hashed(parts: list[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _counts(name: str, module: str) -> bool:
    """Return whether an imported module is part of the code version of another."""
    return name.startswith((*_COMPUTES, module.partition(".")[0] + ".")) and (
        not name.startswith("thresher.") or name.startswith(_COMPUTES)
    )


@dataclass(frozen=True)
class _Source:
    """The source of a module: its hash, and the dotted names that it may import."""

    digest: str
    imports: tuple[str, ...]


class _Loaded:
    """The cache key of a loaded module's source: reloading a module gives it another spec."""

    def __init__(self, spec: ModuleSpec) -> None:
        """Store the spec."""
        self.spec = spec

    def __eq__(self, other: object) -> bool:
        """Return whether it is the same spec."""
        return isinstance(other, _Loaded) and other.spec is self.spec

    def __hash__(self) -> int:
        """Return a hash by identity."""
        return id(self.spec)


def _source_of(module: str) -> _Source | None:
    """Return the source of a module, read once each time it is loaded; None if it has no source."""
    loaded = sys.modules.get(module)
    spec = _spec_of(module) if loaded is None else getattr(loaded, "__spec__", None)
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
    code = getattr(spec.loader, "get_code", lambda name: None)(spec.name)  # compiled, without source
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
    """Return the dotted names that a module imports anywhere, sorted; for ``from a import b`` both ``a`` and ``a.b``.

    Args:
        text: The source code.
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
def _spec_of(module: str) -> ModuleSpec | None:
    """Return the spec of a module that is not loaded."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # its parent is not a package
        return None


def _is_module(name: str) -> bool:
    return name in sys.modules or _spec_of(name) is not None


def _bytecode(thing: Any, module: str) -> str:
    """Return the bytecode of a function or class, and of everything in its module that it refers to, as text."""
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
    """Yield what identifies compiled code, without file names and line numbers."""
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
    line = next(iter(str(error).splitlines()), "")
    return line if isinstance(error, ThresherError) else f"{type(error).__name__}: {line}"
