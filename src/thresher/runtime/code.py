"""The version of code: part of the cache key of what the code computes."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.machinery import ModuleSpec
from types import CodeType, FunctionType
from typing import Any

from thresher.runtime.plugins import distribution_of

# The modules that compute: a change elsewhere, such as to messages or options, changes no number.
_COMPUTES = ("thresher.ops.", "thresher.pruning.", "thresher.pool.store")
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
            left += [one for one in _counted(source, module.partition(".")[0]) if _is_module(one)]
    package = None if module.startswith("thresher.") else distribution_of(module)
    return _hashed([*sorted(digests.items()), *([(package.package, package.version)] if package else [])])


def _hashed(parts: list[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class _Source:
    """The source of a module: its hash, and the dotted names that it may import."""

    digest: str
    imports: tuple[str, ...]


@lru_cache(maxsize=4096)  # sources are compared by identity
def _counted(source: _Source, package: str) -> tuple[str, ...]:
    """Return the imports of a module that are part of the code version of a package."""
    counted = _COMPUTES if package == "thresher" else (*_COMPUTES, f"{package}.")
    return tuple(one for one in source.imports if one.startswith(counted))


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
