"""Render pages from templates: everything is escaped unless marked as safe, and nothing is loaded from the network."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.io.paths import visible
from thresher.io.places import place
from thresher.report import figures
from thresher.report.facts import number, plain
from thresher.runtime.format import counted, percent
from thresher.runtime.places import AnyPath
from thresher.runtime.results import Name, Say, result_file

if TYPE_CHECKING:
    from jinja2 import Environment

_KEPT = re.compile("([\n\u200c\u200d])")  # line breaks, and joiners, which are parts of words and emoji


@dataclass(frozen=True)
class Entry:
    """An entry of a table of contents: the id of a section, and its title."""

    anchor: str
    title: str


def rendered(template: str, **values: Any) -> str:
    """Return the page of a template of this folder; pass charts (``<svg>`` elements) as ``Markup``.

    A template may use ``script``, the only script that its Content-Security-Policy with ``script_hash`` permits.
    """
    from markupsafe import Markup

    script = _template("page.js").strip()
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {"script": Markup(script), "script_hash": f"'sha256-{allowed}'", **values}  # ours, so it is safe
    return _environment().get_template(template).render(**values)


def write_page(page: str, target: Name, *, overwrite: bool, say: Say | None) -> AnyPath:
    """Write a page to a file and return its path, see :func:`thresher.runtime.results.result_file`."""
    path = place(target)
    with result_file(path, overwrite=overwrite, say=say) as scratch:
        # A path may contain bytes that are not valid UTF-8; the page must not fail on them.
        Path(scratch).write_text(page, encoding="utf-8", errors="replace", newline="\n")
    return path


@cache  # compiling the templates takes longer than rendering them
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_codes,
    )
    environment.filters.update(counted=counted, number=number, percent=percent, plain=plain)
    environment.globals["colours"] = {"kept": figures.KEPT, "dropped": figures.DROPPED}
    return environment


def _without_codes(value: Any) -> Any:
    """Escape hidden and control characters in the text that a page shows: it comes from files of others."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(part if _KEPT.fullmatch(part) else visible(part, limit=None) for part in _KEPT.split(value))


def _template(name: str) -> str:
    return resources.files("thresher.report").joinpath(name).read_text(encoding="utf-8")
