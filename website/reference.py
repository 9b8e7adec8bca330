"""The pages of the reference: the public names of ``thresher``, from their docstrings."""

from __future__ import annotations

import ast
from pathlib import Path

_SOURCE = Path(__file__).parents[1] / "src" / "thresher"


def _public() -> dict[str, str]:
    """Return the public names and the modules that define them, in the order of the imports."""
    found = {}
    for node in ast.walk(ast.parse((_SOURCE / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("thresher"):
            found |= {alias.name: str(node.module) for alias in node.names}
    return found


PUBLIC = _public()

_PAGES = {
    "reference/1-functions.md": ("Functions", ("thresher.api", "thresher.pool.memory"), "What the command line does."),
    "reference/2-selections.md": (
        "Selections and stores",
        ("thresher.selection", "thresher.pool.store", "thresher.pool.layout", "thresher.export.keys"),
        "What functions return, and what can be done with it.",
    ),
    "reference/3-methods.md": (
        "Methods",
        ("thresher.pruning.methods",),
        "They select rows; see also [one page each](../index.md).",
    ),
    "reference/4-policies.md": (
        "Policies",
        ("thresher.dynamic",),
        "They prune while a model trains; see [in the training loop](../dynamic.md).",
    ),
    "reference/5-plug-ins.md": (
        "Recipes, engines, plug-ins",
        ("thresher.pruning", "thresher.runtime"),
        "What methods use, and what methods of your own use.",
    ),
    "reference/6-errors.md": (
        "Errors",
        ("thresher.errors",),
        "Every error that is raised on purpose is a `ThresherError`.",
    ),
}


def pages_of_reference() -> dict[str, str]:
    """Return the pages of the reference as Markdown."""
    left = dict(PUBLIC)
    pages = {}
    for page, (title, modules, about) in _PAGES.items():
        own = [name for name, home in left.items() if any(home == m or home.startswith(f"{m}.") for m in modules)]
        for name in own:
            del left[name]
        text = "".join(f"\n::: thresher.{name}\n" for name in sorted(own, key=str.lower))
        pages[page] = f"# {title}\n\n{about}\n{text}"
    if left:
        raise SystemExit(f"the reference has no page for {', '.join(left)}; add their modules in {__file__}")
    return pages
