"""Docstrings refer to names as Sphinx does, :class:`Name`; the reference shows them as links if it has them."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Turn roles in docstrings into links, or code if the reference does not have the name."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(self._link, obj.docstring.value)

    @staticmethod
    def _link(match: re.Match[str]) -> str:
        from reference import PUBLIC

        name = match[1].removeprefix("thresher.selection.").removeprefix("thresher.")
        head = name.partition(".")[0]
        if head in PUBLIC:
            return f"[`{match[1]}`][thresher.{name}]"
        return f"`{match[1]}`"
