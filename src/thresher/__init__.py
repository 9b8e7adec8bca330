"""Thresher: choose the image-text pairs worth training on.

    import thresher as th

    kept = th.select("pool/", th.SemDeDup(eps=0.1), th.Density(keep="40%"))
    train = kept.filter(dataset)

These are the public names; everything else is private. Functions load what they need when they are called, and classes
load on first use, so ``import thresher`` is fast and the command line can configure the machine before NumPy loads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from thresher.api import (  # noqa: E402 - some of what it imports needs the version
    cluster,
    compare,
    coreset,
    doctor,
    embed,
    evaluate,
    inspect,
    open,
    reshard,
    score,
    select,
    train_clip,
    train_moco,
)

if TYPE_CHECKING:
    from thresher.dynamic.policies.d_pruning import DPruning
    from thresher.dynamic.policies.dissect import Dissect
    from thresher.dynamic.policies.dynamic_random import DynamicRandom
    from thresher.dynamic.policies.full import Full
    from thresher.dynamic.policies.infobatch import InfoBatch
    from thresher.dynamic.policies.rho import Rho
    from thresher.dynamic.policies.scan import Scan
    from thresher.dynamic.policies.seta import Seta
    from thresher.dynamic.policies.sift import Sift
    from thresher.dynamic.policies.static import Static
    from thresher.dynamic.run_folder import Training
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
    from thresher.pool.memory import from_arrays
    from thresher.pool.store import EmbeddingStore, open_store
    from thresher.runtime.cache import Cache
    from thresher.runtime.engine import Engine, make_engine
    from thresher.runtime.engines.processes import Processes
    from thresher.runtime.engines.ray import Ray
    from thresher.runtime.engines.serial import Serial
    from thresher.runtime.engines.threads import Threads
    from thresher.select.clusters import Clustered, Groups
    from thresher.select.methods.c_rho import CRho
    from thresher.select.methods.clip_score import ClipScore
    from thresher.select.methods.clipcov import ClipCov
    from thresher.select.methods.combine import Combine
    from thresher.select.methods.dedup import Dedup
    from thresher.select.methods.density import Density
    from thresher.select.methods.filter import Filter
    from thresher.select.methods.herd import Herd
    from thresher.select.methods.hkmeans import HierarchicalKMeans
    from thresher.select.methods.match import Match
    from thresher.select.methods.metaclip import MetaClip
    from thresher.select.methods.negclip import NegClip
    from thresher.select.methods.normsim import NormSim
    from thresher.select.methods.random import Random
    from thresher.select.methods.scs import SoftCapSampling
    from thresher.select.methods.semdedup import SemDeDup
    from thresher.select.methods.ssp import Ssp
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
    "dynamic.run_folder": ("Training",),
    "errors": (
        "AccessError", "BadRowsError", "BudgetError", "ChangedError", "MissingExtraError", "MissingPackageError",
        "OutputError", "PoolError", "ThresherError", "UnreachedError", "UsageError",
    ),
    "select.clusters": ("Clustered", "Groups"),
    "export.keys": ("select_indices",),
    "pool.layout": ("Options",),
    "pool.memory": ("from_arrays",),
    "select.recipe": ("Recipe", "run_steps"),
    "select.registry": ("build", "method"),
    "select.run": ("Run",),
    "select.scores": ("Score", "Scored"),
    "selection": ("Keep", "Selection", "Step"),
    "pool.store": ("EmbeddingStore", "open_store"),
    # methods
    "select.methods.c_rho": ("CRho",),
    "select.methods.clip_score": ("ClipScore",),
    "select.methods.clipcov": ("ClipCov",),
    "select.methods.combine": ("Combine",),
    "select.methods.dedup": ("Dedup",),
    "select.methods.density": ("Density",),
    "select.methods.filter": ("Filter",),
    "select.methods.herd": ("Herd",),
    "select.methods.hkmeans": ("HierarchicalKMeans",),
    "select.methods.match": ("Match",),
    "select.methods.metaclip": ("MetaClip",),
    "select.methods.negclip": ("NegClip",),
    "select.methods.normsim": ("NormSim",),
    "select.methods.random": ("Random",),
    "select.methods.scs": ("SoftCapSampling",),
    "select.methods.semdedup": ("SemDeDup",),
    "select.methods.ssp": ("Ssp",),
    # policies
    "dynamic.policies.d_pruning": ("DPruning",),
    "dynamic.policies.dissect": ("Dissect",),
    "dynamic.policies.dynamic_random": ("DynamicRandom",),
    "dynamic.policies.full": ("Full",),
    "dynamic.policies.infobatch": ("InfoBatch",),
    "dynamic.policies.rho": ("Rho",),
    "dynamic.policies.scan": ("Scan",),
    "dynamic.policies.seta": ("Seta",),
    "dynamic.policies.sift": ("Sift",),
    "dynamic.policies.static": ("Static",),
}  # fmt: skip

__all__ = [
    "AccessError", "BadRowsError", "BudgetError", "CRho", "Cache", "ChangedError", "ClipCov", "ClipScore",
    "Clustered", "Combine", "DPruning", "Dedup", "Density", "Dissect", "DynamicRandom", "EmbeddingStore", "Engine",
    "Filter", "Full", "Groups", "Herd", "HierarchicalKMeans", "InfoBatch", "Keep", "Match", "MetaClip",
    "MissingExtraError", "MissingPackageError", "NegClip", "NormSim", "Options", "OutputError", "PoolError",
    "Processes", "Random", "Ray", "Recipe", "Rho", "Run", "Scan", "Score", "Scored", "Selection", "SemDeDup",
    "Serial", "Seta", "Sift", "SoftCapSampling", "Ssp", "Static", "Step", "Threads", "ThresherError", "Training",
    "UnreachedError", "UsageError", "build", "cluster", "compare", "coreset", "doctor", "embed", "evaluate",
    "from_arrays", "inspect", "make_engine", "method", "open", "open_store", "reshard", "run_steps", "score",
    "select", "select_indices", "train_clip", "train_moco",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"thresher.{home}"), name)
    raise AttributeError(f"module 'thresher' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
