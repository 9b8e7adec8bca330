"""Names from outside: which are safe, and how a message shows them."""

from __future__ import annotations

import os
import unicodedata

_SHOWN = 400  # characters of a name in a message
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, zero-width and bidirectional, lone surrogates, line separators


def climbs(name: str) -> bool:
    """Whether a name from outside would lead out of the folder it is put in."""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or name.startswith(("/", "\\")) or "\0" in name or (len(name) > 1 and name[1] == ":")


def lies_in(path: str, root: str) -> bool:
    """Return whether a path lies below a folder, both without links (``os.path.realpath``)."""
    return path.startswith(os.path.join(root, ""))


def writable(text: str) -> str:
    """Return text as it is, with an escape for what no UTF-8 can say: half of a pair, a byte of a name that is none."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def shown(text: str) -> str:
    """Return a name from a file as a message shows it: in one line, cut where it is long."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")[1:-1]


def visible(text: str) -> str:
    """Return text for a terminal: what a terminal would obey, or not show, becomes an escape such as ``\\x1b``.

    That is control characters (escape sequences, line breaks, tabs), zero-width and bidirectional formatting, line and
    paragraph separators, and lone surrogates. The result is one line.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(one) if unicodedata.category(one) in _HIDDEN else one for one in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
