"""Thresher: choose the image-text pairs worth training on.

These are the public names; everything else is private. Names load on first use, so ``import thresher`` is fast and
the command line can configure the machine before NumPy loads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thresher.errors import (
        AccessError,
        BadRowsError,
        BudgetError,
        ChangedError,
        MissingExtraError,
        MissingPackageError,
        OutputError,
        PoolError,
        ThresherError,
        UnreachedError,
        UsageError,
    )
    from thresher.export.keys import select_indices
    from thresher.pool.layout import Options
    from thresher.pool.store import EmbeddingStore, open_store
    from thresher.runtime.cache import Cache
    from thresher.runtime.engine import Engine, make_engine
    from thresher.runtime.engines.processes import Processes
    from thresher.runtime.engines.ray import Ray
    from thresher.runtime.engines.serial import Serial
    from thresher.runtime.engines.threads import Threads
    from thresher.select.clusters import Clustered, Groups
    from thresher.select.recipe import Recipe, run_steps
    from thresher.select.registry import build, method
    from thresher.select.run import Run
    from thresher.select.scores import Score, Scored
    from thresher.selection import Keep, Selection, Step

_HOMES = {
    "runtime.cache": ("Cache",),
    "runtime.engine": ("Engine", "make_engine"),
    "runtime.engines.processes": ("Processes",),
    "runtime.engines.ray": ("Ray",),
    "runtime.engines.serial": ("Serial",),
    "runtime.engines.threads": ("Threads",),
    "errors": (
        "AccessError", "BadRowsError", "BudgetError", "ChangedError", "MissingExtraError", "MissingPackageError",
        "OutputError", "PoolError", "ThresherError", "UnreachedError", "UsageError",
    ),
    "select.clusters": ("Clustered", "Groups"),
    "export.keys": ("select_indices",),
    "pool.layout": ("Options",),
    "select.recipe": ("Recipe", "run_steps"),
    "select.registry": ("build", "method"),
    "select.run": ("Run",),
    "select.scores": ("Score", "Scored"),
    "selection": ("Keep", "Selection", "Step"),
    "pool.store": ("EmbeddingStore", "open_store"),
}  # fmt: skip

__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"thresher.{home}"), name)
    raise AttributeError(f"module 'thresher' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
