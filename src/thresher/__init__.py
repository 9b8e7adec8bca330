"""Thresher: choose the image-text pairs worth training on.

The public names; everything else is private. They load on first use, so that ``import thresher`` is
instant and the command line can set up the machine before NumPy starts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thresher.cache import Cache
    from thresher.engine import Engine, Processes, Serial, Threads, make_engine
    from thresher.errors import (
        BadRowsError,
        BudgetError,
        MissingExtraError,
        OutputError,
        PoolError,
        ThresherError,
        UnreachedError,
        UsageError,
    )
    from thresher.groups import Clustered, Groups
    from thresher.keys import select_indices
    from thresher.readers.layout import Options
    from thresher.recipe import Recipe, run_steps
    from thresher.registry import build, method
    from thresher.run import Run
    from thresher.scores import Score, Scored
    from thresher.selection import Keep, Selection, Step
    from thresher.store import EmbeddingStore, open_store

_HOMES = {
    "cache": ("Cache",),
    "engine": ("Engine", "Processes", "Serial", "Threads", "make_engine"),
    "errors": (
        "BadRowsError", "BudgetError", "MissingExtraError", "OutputError", "PoolError", "ThresherError",
        "UnreachedError", "UsageError",
    ),
    "groups": ("Clustered", "Groups"),
    "keys": ("select_indices",),
    "readers.layout": ("Options",),
    "recipe": ("Recipe", "run_steps"),
    "registry": ("build", "method"),
    "run": ("Run",),
    "scores": ("Score", "Scored"),
    "selection": ("Keep", "Selection", "Step"),
    "store": ("EmbeddingStore", "open_store"),
}  # fmt: skip

__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"thresher.{home}"), name)
    raise AttributeError(f"module 'thresher' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
