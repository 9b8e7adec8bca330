"""Finds methods by name: every module of ``thresher.methods``, and what other packages offer.

A method is a frozen dataclass of parameters, marked ``@method("name")``, with
``select(run) -> Selection``. Another package offers one by an entry point in the group
``thresher.methods``. Flags, recipe keys and documentation all come from the fields.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union

from thresher.errors import UsageError, suggest
from thresher.select.run import Run
from thresher.selection import Keep, Selection

C = TypeVar("C", bound=type)


class Method(Protocol):
    """A frozen dataclass of parameters that can choose rows."""

    name: ClassVar[str]

    def select(self, run: Run) -> Selection:
        """Return the selection so far with one more step."""
        ...


def method(name: str) -> Callable[[C], C]:
    """Mark a frozen dataclass as the method of a name."""

    def mark(cls: C) -> C:
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return mark


def methods() -> dict[str, type[Method]]:
    """Return all methods by name, sorted."""
    import thresher.select.methods as folder

    modules = [importlib.import_module(f"{folder.__name__}.{m.name}") for m in pkgutil.iter_modules(folder.__path__)]
    found = {
        cls.name: cls
        for module in modules
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ == module.__name__ and is_dataclass(cls) and hasattr(cls, "name")
    }
    for point in entry_points(group="thresher.methods"):
        cls = point.load()
        found.setdefault(cls.name, cls)
    return dict(sorted(found.items()))


def find(name: str) -> type[Method]:
    """Return the method of a name.

    Raises:
        UsageError: There is none; suggests the nearest.
    """
    known = methods()
    if name not in known:
        raise UsageError(f"no method {name!r}; there are {', '.join(known)}.{suggest(name, known)}")
    return known[name]


def build(name: str, parameters: Mapping[str, Any]) -> Method:
    """Make a method from loosely typed parameters (flags, TOML).

    Raises:
        UsageError: An unknown parameter (suggests the nearest), a missing one, or a value that is not allowed.
    """
    cls = find(name)
    known = {item.name: item for item in parameters_of(cls)}
    values = {}
    for key, value in parameters.items():
        if key not in known:
            raise UsageError(f"{name} has no parameter {key!r}; it has {', '.join(known)}.{suggest(key, known)}")
        values[key] = _coerce(f"{name}: {key}", type_of(cls, key), value)
    missing = [item for item in known.values() if item.default is MISSING and item.name not in values]
    if missing:
        told = "; ".join(f"{item.name} ({item.metadata.get('help', 'no default')})" for item in missing)
        raise UsageError(f"{name} needs {told}")
    return cls(**values)


def coerced(step: Method) -> Method:
    """Return a method made in Python with its values checked as flags and recipes are: ``keep="30%"`` works."""
    values = {
        item.name: _coerce(f"{step.name}: {item.name}", type_of(type(step), item.name), getattr(step, item.name))
        for item in parameters_of(type(step))
    }
    return replace(step, **values)  # type: ignore[type-var]


def parameters_of(cls: type[Any]) -> tuple[Field[Any], ...]:
    """Return a method's parameters; ``metadata["help"]`` describes each."""
    return fields(cls)


def type_of(cls: type[Any], name: str) -> Any:
    """Return the resolved type of a parameter."""
    return typing.get_type_hints(cls)[name]


def choices(kind: Any) -> tuple[str, ...]:
    """Return the words a ``Literal`` parameter allows, else ()."""
    return tuple(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else ()


def without_none(kind: Any) -> Any:
    """Return X for ``X | None``."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        rest = [part for part in typing.get_args(kind) if part is not type(None)]
        return rest[0] if len(rest) == 1 else kind
    return kind


def _coerce(told: str, kind: Any, value: Any) -> Any:
    if value is None and kind != without_none(kind):
        return None
    kind = without_none(kind)
    if kind is Keep:
        try:
            return Keep.parse(value)
        except UsageError as error:
            raise UsageError(f"{told}: {error}") from None
    if words := choices(kind):
        if value not in words:
            raise UsageError(f"{told} = {value!r}; allowed: {', '.join(words)}.{suggest(str(value), words)}")
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise UsageError(f"{told} = {value!r}; allowed: true, false")
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is float and not math.isfinite(value)):
        wanted = {int: "a whole number", float: "a finite number", str: "text"}
        raise UsageError(f"{told} = {value!r}; expected {wanted.get(kind, kind.__name__)}")
    return value
