"""Every rule about names that come from files: which are safe to follow, to write, and to show.

Names of members of archives, paths in tables and keys are written by strangers. Nothing in this package joins one to a
folder, writes it into an archive or prints it without asking here.
"""

from __future__ import annotations

import os
import re
import unicodedata

_LONG = 400  # characters of a text that are shown
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, zero-width and bidirectional, lone surrogates, line separators
_PARENT_PART = r"\.\.[. \t\r\n]*"  # dots and blanks at the end of a name do not count on Windows
PARENT = rf"(?:^|[/\\]){_PARENT_PART}(?:[/\\]|$)"  # has_parent as a regular expression, for columns of an Arrow table
_PARENT = re.compile(rf"(?<![^/\\]){_PARENT_PART}(?![^/\\])")


def has_parent(name: str) -> bool:
    """Return whether one of the parts of a name, between slashes or backslashes, is ``..``: no key may have one."""
    return ".." in name and _PARENT.search(name) is not None


def without_parent(name: str) -> str:
    """Return a name as a key: parts that are ``..`` are written ``%2E%2E``, as in addresses on the web."""
    return _PARENT.sub(lambda part: part[0].replace(".", "%2E"), name) if ".." in name else name


def is_unsafe(name: str) -> bool:
    """Return whether a name, joined to a folder, may mean something outside it, here or on Windows.

    So do names with a part ``..``, absolute ones, those that begin with a drive (``C:``), and those with a zero byte.
    Names that Windows reserves (``NUL.jpg``) do not lead anywhere and are safe.
    """
    return name.startswith(("/", "\\")) or name[1:2] == ":" or "\0" in name or has_parent(name)


def all_plain(names: str) -> bool:
    """Return whether none of many names can be unsafe, by a quick look at all; False does not say that one is.

    Args:
        names: The names, each with a zero byte before it.
    """
    return not (".." in names or "\\" in names or ":" in names or "\0/" in names)


def inside(root: str, name: str) -> str | None:
    """Return the path of what a name means below a folder, or None where it leads out of it, by itself or by a link.

    Args:
        root: The folder, without links (``os.path.realpath``).
        name: A relative name, or an absolute path, which counts where it lies below the folder.

    Returns:
        The path without links. Whether a file is there is not looked at.
    """
    if "\0" in name or is_unsafe(name) and not os.path.isabs(name):
        return None
    try:
        path = os.path.realpath(os.path.join(root, name))
    except (OSError, ValueError):  # no name that this file system could have
        return None
    return path if path.startswith(os.path.join(root, "")) else None


def writable(text: str) -> str:
    """Return text as it is, with an escape for what no UTF-8 can say: half of a pair, a byte of a name that is none."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def visible(text: str, limit: int | None = _LONG) -> str:
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
