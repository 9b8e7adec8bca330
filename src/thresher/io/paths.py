"""Names from outside: which are safe, and how a message shows them."""

from __future__ import annotations

import os

_SHOWN = 400  # characters of a name in a message


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
