"""Templates of reasons, such as ``"cosine {score:.4f} > {cut:.4f}"``: plain names and a short list of formats.

A template may come from a file of someone else. Python's own format strings would give it access to the attributes of
every value, and could ask for gigabytes of spaces.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

from thresher.errors import UsageError

_NAME = re.compile(r"[a-z][a-z0-9_]{0,99}")
_FORMAT = re.compile(r",?(d|(\.(\d|1\d))?[efg%])?")
_RULE = (
    "write {name} or {name:FORMAT} with one of the formats d, f, e, g and %, with precision as in .4f, or with a comma "
    "as in ,d; write {{ and }} for braces"
)


class RoundedFloat(float):
    """A float whose fixed-point format never shows a small value as 0: it switches to significant digits instead."""

    def __format__(self, spec: str) -> str:
        """Format like a float, except for small values with a specification such as ``.4f``."""
        return format(float(self), ".3g" if spec.endswith("f") and 0 < abs(self) < 5e-4 else spec)


def parts_of(template: str) -> list[tuple[str, str, str]]:
    """Split a template into (text, name, format); the name is "" where text is not followed by a name.

    Raises:
        UsageError: It has anything else between braces than a name and an allowed format.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"the reason {_short(template)} cannot be read ({error}); {_RULE}") from None
    parts = []
    for text, name, spec, conversion in parsed:
        if name is not None and not (_NAME.fullmatch(name) and _FORMAT.fullmatch(spec or "") and not conversion):
            raise UsageError(f"the reason {_short(template)} has {{{_short(name)}}} with more than a name; {_RULE}")
        parts.append((text, name or "", spec or ""))
    return parts


def formats(spec: str, kind: str) -> bool:
    """Return whether a format fits values of a NumPy kind: "f" for floats, "i", "u" and "b" for integers, "U" for text.

    The format must be allowed by :func:`parts_of`.
    """
    if kind in "iub":
        return True
    return not spec if kind == "U" else not spec.endswith("d")


def filled(template: str, value_of: Callable[[str], Any]) -> str:
    """Return the text of a template, with the value of each name; text in place of a number is not formatted.

    Raises:
        UsageError: It is not a valid template.
    """
    return filled_each(template, lambda name: [value_of(name)], 1)[0]


def filled_each(template: str, values_of: Callable[[str], Sequence[Any]], count: int) -> list[str]:
    """Return the texts of a template for ``count`` rows, as :func:`filled` does for one.

    Args:
        template: The template.
        values_of: Returns the values of a name, one for each row.
        count: Number of rows.
    """
    columns: list[Iterable[str]] = []
    for text, name, spec in parts_of(template):
        columns.append(repeat(text, count))
        if name:
            columns.append([_formatted(value, spec) for value in values_of(name)])
    return ["".join(texts) for texts in zip(*columns, strict=True)] if columns else [""] * count


def _formatted(value: Any, spec: str) -> str:
    if isinstance(value, str):
        return value
    return format(RoundedFloat(value) if isinstance(value, float) else value, spec)


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."
