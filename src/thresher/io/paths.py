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


def visible(text: str, limit: int | None = _SHOWN) -> str:
    r"""Return text from a file as a terminal or a message may show it: in one line, nothing in it hidden or obeyed.

    Control characters (escape sequences, line breaks, tabs), zero-width and bidirectional formatting, line and
    paragraph separators, and lone surrogates are written as escapes: ``\x1b``, ``\n``, ``\u202e``, ``\udc80``.

    Args:
        text: Keys, captions, names of columns and files.
        limit: Characters after which it is cut; None for all.
    """
    text = text if limit is None or len(text) <= limit else f"{text[:limit]}..."
    if text.isprintable():
        return text
    return "".join(_escaped(one) if unicodedata.category(one) in _HIDDEN else one for one in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
