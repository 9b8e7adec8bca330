"""All rules about names that come from files: which are safe to follow, to write and to show.

Names of archive members, paths in tables and keys are untrusted input. All code in this package uses the functions
here before it joins such a name to a folder, writes it into an archive or prints it.
"""

from __future__ import annotations

import os
import re
import shlex
import unicodedata

_LONG = 400  # maximum characters of a text that are shown
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, zero-width and bidirectional, lone surrogates, line separators
_PARENT_PART = r"\.\.[. \t\r\n]*"  # dots and blanks at the end of a name do not count on Windows
PARENT = rf"(?:^|[/\\]){_PARENT_PART}(?:[/\\]|$)"  # has_parent as a regular expression, for columns of an Arrow table
_PARENT = re.compile(rf"(?<![^/\\]){_PARENT_PART}(?![^/\\])")


def has_parent(name: str) -> bool:
    """Return whether a part of a name, between slashes or backslashes, is ``..``, which is not allowed in a key."""
    return ".." in name and _PARENT.search(name) is not None


def without_parent(name: str) -> str:
    """Convert a name to a key: parts that are ``..`` are written as ``%2E%2E``, as in URLs."""
    return _PARENT.sub(lambda part: part[0].replace(".", "%2E"), name) if ".." in name else name


def is_unsafe(name: str) -> bool:
    """Return whether a name, joined to a folder, may point outside that folder, on this system or on Windows.

    Unsafe are names with a part ``..``, absolute names, names that begin with a drive (``C:``), and names with a zero
    byte. Names that Windows reserves (``NUL.jpg``) do not point to another folder and are safe.
    """
    return name.startswith(("/", "\\")) or name[1:2] == ":" or "\0" in name or has_parent(name)


def all_plain(names: str) -> bool:
    """Return True if none of many names can be unsafe. This is a fast check: False does not mean that one is unsafe.

    Args:
        names: The names, each preceded by a zero byte.
    """
    return not (".." in names or "\\" in names or ":" in names or "\0/" in names)


def inside(root: str, name: str) -> str | None:
    """Return the path of a name below a folder, or None if it points outside, by itself or through a symlink.

    Args:
        root: The folder, without symlinks (``os.path.realpath``).
        name: A relative name, or an absolute path, which is allowed if it is below the folder.

    Returns:
        The path without symlinks. It may not exist.
    """
    if "\0" in name or is_unsafe(name) and not os.path.isabs(name):
        return None
    try:
        path = os.path.realpath(os.path.join(root, name))
    except (OSError, ValueError):  # not a valid name on this file system
        return None
    return path if path.startswith(os.path.join(root, "")) else None


def relative(location: str) -> str:
    """Return a location as it can be typed here: relative to the current folder if it is inside it, for messages."""
    try:
        here = os.path.join(os.getcwd(), "")
    except OSError:  # the folder was deleted
        return location
    return location.removeprefix(here) if len(here) > 1 and location != here else location


def writable(text: str) -> str:
    """Return text with an escape for every character that UTF-8 cannot encode, such as a lone surrogate."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def composed(name: str) -> str:
    """Return a name with composed letters (Unicode NFC); macOS, and zip files made there, decompose them."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def typed(path: str) -> str:
    """Return a path in a form that is safe to print and to type in a shell, in quotes if it needs them."""
    return shlex.quote(visible(path))


def visible(text: str, limit: int | None = _LONG) -> str:
    r"""Return text from a file in a form that is safe to print: in one line, without hidden or control characters.

    Control characters (escape sequences, line breaks, tabs), zero-width and bidirectional formatting, line and
    paragraph separators, and lone surrogates are written as escapes: ``\x1b``, ``\n``, ``\u202e``, ``\udc80``.

    Args:
        text: A key, a caption, or the name of a column or file.
        limit: Number of characters after which the text is cut, followed by its length; None for no limit.
    """
    text = text if limit is None else cut(text, limit)
    if text.isprintable():
        return text
    return "".join(_escaped(one) if unicodedata.category(one) in _HIDDEN else one for one in text)


def cut(text: str, limit: int, length: int | None = None) -> str:
    """Return a text of at most ``limit`` characters; a longer one is cut and followed by its length.

    Args:
        text: The text, or at least its first ``limit`` characters.
        limit: Number of characters to keep.
        length: Length of the whole text (default: that of ``text``).
    """
    length = len(text) if length is None else length
    return text if length <= limit else f"{text[:limit]}... ({length:,} characters)"


def shortened(text: str, limit: int) -> str:
    """Return a message that contains a text of any length: if it is too long, its middle is replaced by a note.

    The end of a message often says what to do, so it stays.

    Args:
        text: The message.
        limit: Number of characters of the message that stay, three quarters of them at its start.
    """
    if len(text) <= limit:
        return text
    return f"{text[: limit - limit // 4]} [... {len(text) - limit:,} characters ...] {text[-(limit // 4) :]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
