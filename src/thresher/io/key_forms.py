"""What an error says of keys that are on one side but not on the other: an example of each, and how they differ.

Keys are compared as text and never changed, so that two different keys are never taken for one. Where many keys differ
in the same way, the error says so, and what to type to write them alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from os.path import splitext

from thresher.runtime.untrusted import cut

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_HEX = re.compile(r"[0-9a-f-]{16,}", re.IGNORECASE)
_DIGITS = re.compile(r"\d+", re.ASCII)
_EXTENSION = re.compile(r"\.(?=\w*[a-zA-Z])\w{1,8}")


def difference(one: str, other: str) -> str:
    """Return how the forms of two keys differ and how to write them alike, to follow "; "; "" if that is not known.

    Known are a leading ``./``, a folder, a file extension, the dashes of a UUID, upper case, and leading zeros. The
    keys need not be of the same sample.
    """
    if not one or not other:
        return ""
    found, typed = [], []
    for what, write, changed in _FORMS:
        first, second = changed(one, other), changed(other, one)
        if (first != one) != (second != other):
            found.append(what)
            typed.append(write)
            one, other = first, second
    if not found:
        return ""
    return f"; these differ by {' and '.join(found)}: write both alike, such as with {' and '.join(typed)} in Python"


def unlike(here: str, ours: Iterable[str], there: str, theirs: Iterable[str]) -> str:
    """Return an example of the keys of each side and how their forms differ, for a message.

    Args:
        here: What has the keys ``ours``, such as "the pool".
        ours: Its keys; only the first is used.
        there: What has the keys ``theirs``.
        theirs: Its keys; only the first is used.
    """
    one, other = next(iter(ours), None), next(iter(theirs), None)
    if one is None or other is None:
        return f"{here if one is None else there} has no keys"
    return f"{here} has keys such as {cut(one)!r}, {there} such as {cut(other)!r}{difference(one, other)}"


def _without_folder(key: str, _: str) -> str:
    return key if "://" in key else key.rpartition("/")[2] or key


def _without_extension(key: str, _: str) -> str:
    stem, ending = splitext(key)
    return stem if "://" not in key and _EXTENSION.fullmatch(ending) else key


def _without_dashes(key: str, _: str) -> str:
    return key.replace("-", "") if _UUID.fullmatch(key) else key


def _lower(key: str, other: str) -> str:
    same = key.lower() == other.lower() or (_HEX.fullmatch(key) and _HEX.fullmatch(other) and len(key) == len(other))
    return key.lower() if same else key


def _without_zeros(key: str, other: str) -> str:
    numbers = _DIGITS.fullmatch(key) and _DIGITS.fullmatch(other) and len(key) != len(other)
    return (key.lstrip("0") or "0") if numbers else key


_FORMS: tuple[tuple[str, str, Callable[[str, str], str]], ...] = (
    ("a leading './'", "key.removeprefix('./')", lambda key, _: key.removeprefix("./")),
    ("a folder", "key.rpartition('/')[2]", _without_folder),
    ("a file extension", "os.path.splitext(key)[0]", _without_extension),
    ("the dashes of a UUID", "key.replace('-', '')", _without_dashes),
    ("upper case", "key.lower()", _lower),
    ("leading zeros", "str(int(key))", _without_zeros),
)
