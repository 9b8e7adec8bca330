"""The fields of a frozen dataclass as parameters: checked and converted when an instance is made, and recorded as JSON.

Strings are parsed here, where they enter the program (command line, recipe, notebook), and nowhere else.
"""

from __future__ import annotations

import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from decimal import Decimal, InvalidOperation
from functools import partial, wraps
from typing import Annotated, Any, Literal, TypeVar, Union

from thresher.errors import UsageError, suggest

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])
N = TypeVar("N", int, float)

MOST = 2**63 - 1  # largest whole number as a parameter: arrays hold no larger one


def build(cls: type[T], name: str, options: Mapping[str, Any]) -> T:
    """Create a dataclass instance from loosely typed parameters (flags, TOML).

    Args:
        cls: The dataclass.
        name: Its name in messages.
        options: Parameters by field name. A type with a classmethod ``parse`` parses its own values.

    Raises:
        UsageError: A parameter is unknown (the message suggests a similar name) or missing, or a value is not allowed.
    """
    return cls(**checked(cls, name, options))


def checked(cls: type[Any], name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with the types of their fields, see :func:`build`."""
    known = {item.name: item for item in parameters_of(cls)}
    kinds = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in options.items():
        if key not in known:
            raise UsageError(
                f"{name} has no parameter {key!r}; it has {', '.join(known) or 'none'}.{suggest(key, known)}"
            )
        values[key] = coerce(f"{name}: {key}", _unnamed(kinds[key]), value)
    missing = [item for item in known.values() if is_required(item) and item.name not in values]
    if missing:
        needed = "; ".join(f"{item.name} ({item.metadata.get('help', 'no default')})" for item in missing)
        raise UsageError(f"{name} needs {needed}")
    return values


def checking(cls: C, name: str) -> C:
    """Make a dataclass check and convert its parameters before its ``__post_init__`` sees them.

    ``Density(keep="30%")`` then has the budget that a recipe with ``keep = "30%"`` has, and a wrong value or name is
    the same :class:`UsageError`.

    Args:
        cls: The dataclass; its ``__init__`` is replaced, as ``dataclass`` itself does.
        name: Its name in messages.
    """
    init = cls.__init__
    positions = [item.name for item in parameters_of(cls) if not item.kw_only]

    @wraps(init)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        given = dict(zip(positions, args, strict=False))
        if len(args) > len(positions) or given.keys() & options.keys():
            names = ", ".join(item.name for item in parameters_of(cls))
            raise UsageError(f"{name}: give each parameter once, by name; it has {names}")
        init(self, **checked(cls, name, {**given, **options}))

    cls.__init__ = __init__
    return cls


def named(name: str, what: str) -> Callable[[C], C]:
    """Return a decorator that names a plug-in and makes it check its parameters, see :func:`checking`.

    Args:
        name: The name of the plug-in, its class attribute ``name``.
        what: What messages call it.
    """

    def mark(cls: C) -> C:
        cls.name = name
        return checking(cls, what)

    return mark


def from_text(kind: Any, text: str) -> Any:
    """Convert command-line text to a value that :func:`coerce` accepts for a type."""
    kind = without_none(kind)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def recorded(made: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON values, to be saved with a result."""
    if not is_dataclass(made):
        raise TypeError(f"{made!r} is not a dataclass")
    values = {item.name: getattr(made, item.name) for item in fields(made)}
    return {name: str(value) if hasattr(type(value), "parse") else value for name, value in values.items()}


def parameters_of(cls: type[Any]) -> tuple[Field[Any], ...]:
    """Return the parameters of a dataclass: its ``init`` fields; ``metadata["help"]`` describes each."""
    return tuple(item for item in fields(cls) if item.init)


def is_required(item: Field[Any]) -> bool:
    """Return whether a parameter has no default."""
    return item.default is MISSING and item.default_factory is MISSING


def type_of(cls: type[Any], name: str) -> Any:
    """Return the resolved type of a parameter."""
    return _unnamed(typing.get_type_hints(cls, include_extras=True)[name])


def choices(kind: Any) -> tuple[str, ...]:
    """Return the strings that a ``Literal`` parameter allows, else ()."""
    return tuple(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else ()


def without_none(kind: Any) -> Any:
    """Return X for ``X | None``."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        rest = [part for part in typing.get_args(kind) if part is not type(None)]
        return _unnamed(rest[0]) if len(rest) == 1 else kind
    return kind


def _unnamed(kind: Any) -> Any:
    """Return X for a name of X: ``type Name = X`` (Python 3.12), and NumPy's ``NDArray`` from version 2.5 on."""
    while hasattr(kind, "__value__"):
        kind = kind.__value__
    return kind


def coerce(what: str, kind: Any, value: Any) -> Any:
    """Convert a loosely typed value to the type of a parameter.

    Args:
        what: Name of the parameter, for messages.
        kind: The type, as :func:`type_of` returns it.
        value: The value.

    Raises:
        UsageError: The value is not allowed; the message says what is.
    """
    if value is None and kind != without_none(kind):
        return None
    kind = without_none(kind)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a number of NumPy or torch
        short = isinstance(value.item(), float) and type(value).__module__ == "numpy"
        value = float(str(value)) if short else value.item()  # float32(0.3) is 0.3, as it prints
    if typing.get_origin(kind) is Annotated:
        kind, *notes = typing.get_args(kind)
        reads = next((note for note in notes if isinstance(note, Reads)), None)
        if reads and isinstance(value, str):
            return _parsed(what, reads.parse, value)
    if parse := getattr(kind, "parse", None):
        return _parsed(what, parse, value)
    if words := choices(kind):
        if not isinstance(value, str) or value not in words:
            hint = suggest(value[:100], words) if isinstance(value, str) else ""
            raise UsageError(f"{what} = {_shown(value)}; allowed: {', '.join(words)}.{hint}")
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise UsageError(f"{what} = {_shown(value)}; allowed: true, false")
    check_size(what, value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kind = typing.get_origin(kind) or kind  # an array of floats is checked to be an array
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is float and not math.isfinite(value)):
        wanted = {**_NUMBERS, str: "text"}.get(kind, kind.__name__)
        likely = meant(kind, value) if kind in _NUMBERS and isinstance(value, str) else ""
        raise UsageError(f"{what} = {_shown(value)}; expected {wanted}" + (f"; write {likely}" if likely else ""))
    return value


def check_size(what: str, value: Any) -> None:
    """Raise a UsageError for a whole number that is too large for an array or a floating-point number."""
    if isinstance(value, int) and not isinstance(value, bool) and not -MOST <= value <= MOST:
        raise UsageError(f"{what} = {_shown(value)}; the largest number allowed is {MOST:,}")


def _shown(value: Any) -> str:
    """Return a value for a message, at most about a hundred characters of it."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write whole numbers of more than 4,300 digits
        return f"a whole number of {value.bit_length():,} bits"
    return text if len(text) <= 100 else f"{text[:100]}... ({len(text):,} characters)"


def read(kind: Any, text: str) -> Any:
    """Parse command-line text as the type of a parameter.

    Args:
        kind: The type, as :func:`type_of` returns it.
        text: The text.

    Raises:
        UsageError: The text is not a valid value; the message says what is allowed.
    """
    kind = without_none(kind)
    if typing.get_origin(kind) is Annotated:
        kind, *notes = typing.get_args(kind)
        if reads := next((note for note in notes if isinstance(note, Reads)), None):
            return reads.parse(text)
    if parse := getattr(kind, "parse", None):
        return parse(text)
    if words := choices(kind):
        if text not in words:
            raise UsageError(f"{_shown(text)}; give one of {', '.join(words)}.{suggest(text[:100], words)}")
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise UsageError(f"{_shown(text)}; give true or false")
        return text == "true"
    if kind in (int, float):
        return number_in(kind, text)
    return text


def _parsed(what: str, parse: Callable[[Any], Any], value: Any) -> Any:
    try:
        return parse(value)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None


# --- numbers --------------------------------------------------------------------------------------

_NUMBERS = {int: "a whole number", float: "a finite number"}
_UNITS = {"": 0, "%": -2, "k": 3, "K": 3, "M": 6, "B": 9}  # what may follow a number, and the power of ten


def number_in(kind: type[N], text: str, limits: str = "", example: str = "") -> N:
    """Parse a number.

    Args:
        kind: int or float.
        text: The text.
        limits: What the number must be besides, for the message.
        example: A number for the message, if the text does not say which is meant.

    Raises:
        UsageError: It is not such a number; the message says what is allowed, and what to type instead.
    """
    try:
        value = kind(text)
        if -MOST <= value <= MOST if kind is int else math.isfinite(value):
            return value
        close, limits = "", limits or (f" of at most {MOST:,}" if kind is int else "")
    except ValueError:
        close = meant(kind, text)
    close = f"; type {close}" if close else f", such as {example or ('10' if kind is int else '0.1')}"
    raise UsageError(f"{_shown(text)}; give {_NUMBERS[kind]}{limits}{close}")


def meant(kind: type[Any], text: str) -> str:
    """Return the number that a text with a percent sign, a decimal comma or a unit means, as it should be written.

    ``10%`` and ``0,1`` are 0.1, ``1,000``, ``1e3`` and ``1k`` are 1000. "" if it means no number of the kind.
    """
    found = re.fullmatch(r"([+-]?[0-9.,]{1,40}(?:[eE][+-]?[0-9]{1,2})?)([%kKMB]?)", re.sub(r"[\s_']", "", text))
    if not found:
        return ""
    number, unit = found.groups()
    number = number.replace(",", "" if re.fullmatch(r"[+-]?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]*)?", number) else ".")
    try:
        value = Decimal(number).scaleb(_UNITS[unit])
    except InvalidOperation:
        return ""
    whole = value == value.to_integral_value() and value.adjusted() < 19
    if kind is int:
        return str(int(value)) if whole and unit != "%" else ""
    return str(int(value)) if whole else f"{value.normalize():f}"


# --- shares ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """How to parse text for an annotated type.

    Attributes:
        parse: Parses the text; raises UsageError.
        metavar: Name of the value in the help text.
    """

    parse: Callable[[str], Any]
    metavar: str


def share_of(text: str, *, whole: bool = False) -> float:
    """Parse a share such as ``30%`` or ``0.3``, strictly between 0 and 1.

    Args:
        text: The text.
        whole: Whether ``100%`` and ``1`` are allowed too.

    Raises:
        UsageError: The text is not a valid share; the message says what is allowed.
    """
    number = text.strip().removesuffix("%").strip()
    share = 0.0
    if re.fullmatch(r"([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?", number):
        share = float(Decimal(number).scaleb(-2 if text.strip().endswith("%") else 0))
    if not (0 < share < 1 or whole and share == 1):
        allowed = "above 0 and up to 1" if whole else "strictly between 0 and 1"
        likely = meant(float, text)
        close = "" if likely in ("", text) or not 0 < float(likely) < 1 else f"; type {likely}"
        raise UsageError(f"cannot read {_shown(text)} as a share; give a share {allowed}, like 30% or 0.3{close}")
    return share


Share = Annotated[float, Reads(share_of, "SHARE")]
WholeShare = Annotated[float, Reads(partial(share_of, whole=True), "SHARE")]
