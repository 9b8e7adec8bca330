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
    advise,
    cluster,
    compare,
    coreset,
    doctor,
    embed,
    evaluate,
    evaluate_model,
    inspect,
    open,
    prove,
    reference,
    reshard,
    run_plan,
    score,
    select,
    sweep,
    train_clip,
    train_moco,
    view,
)

if TYPE_CHECKING:
    from thresher.dynamic.policies.d_pruning import DPruning
    from thresher.dynamic.policies.dissect import Dissect
    from thresher.dynamic.policies.dynamic_random import DynamicRandom
    from thresher.dynamic.policies.full import Full
    from thresher.dynamic.policies.infobatch import InfoBatch
    from thresher.dynamic.policies.jest import Jest
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
    from thresher.pruning.clusters import Clustered, Groups
    from thresher.pruning.methods.c_rho import CRho
    from thresher.pruning.methods.clip_score import ClipScore
    from thresher.pruning.methods.clipcov import ClipCov
    from thresher.pruning.methods.combine import Combine
    from thresher.pruning.methods.dedup import Dedup
    from thresher.pruning.methods.density import Density
    from thresher.pruning.methods.filter import Filter
    from thresher.pruning.methods.herd import Herd
    from thresher.pruning.methods.hkmeans import HierarchicalKMeans
    from thresher.pruning.methods.match import Match
    from thresher.pruning.methods.metaclip import MetaClip
    from thresher.pruning.methods.negclip import NegClip
    from thresher.pruning.methods.normsim import NormSim
    from thresher.pruning.methods.random import Random
    from thresher.pruning.methods.scs import SoftCapSampling
    from thresher.pruning.methods.semdedup import SemDeDup
    from thresher.pruning.methods.ssp import Ssp
    from thresher.pruning.recipe import Recipe, run_steps
    from thresher.pruning.registry import build, method
    from thresher.pruning.run import Run
    from thresher.pruning.scores import Score, Scored
    from thresher.runtime.cache import Cache
    from thresher.runtime.engine import Engine, make_engine
    from thresher.runtime.engines.processes import Processes
    from thresher.runtime.engines.ray import Ray
    from thresher.runtime.engines.serial import Serial
    from thresher.runtime.engines.threads import Threads
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
    "pruning.clusters": ("Clustered", "Groups"),
    "export.keys": ("select_indices",),
    "pool.layout": ("Options",),
    "pool.memory": ("from_arrays",),
    "pruning.recipe": ("Recipe", "run_steps"),
    "pruning.registry": ("build", "method"),
    "pruning.run": ("Run",),
    "pruning.scores": ("Score", "Scored"),
    "selection": ("Keep", "Selection", "Step"),
    "pool.store": ("EmbeddingStore", "open_store"),
    # methods
    "pruning.methods.c_rho": ("CRho",),
    "pruning.methods.clip_score": ("ClipScore",),
    "pruning.methods.clipcov": ("ClipCov",),
    "pruning.methods.combine": ("Combine",),
    "pruning.methods.dedup": ("Dedup",),
    "pruning.methods.density": ("Density",),
    "pruning.methods.filter": ("Filter",),
    "pruning.methods.herd": ("Herd",),
    "pruning.methods.hkmeans": ("HierarchicalKMeans",),
    "pruning.methods.match": ("Match",),
    "pruning.methods.metaclip": ("MetaClip",),
    "pruning.methods.negclip": ("NegClip",),
    "pruning.methods.normsim": ("NormSim",),
    "pruning.methods.random": ("Random",),
    "pruning.methods.scs": ("SoftCapSampling",),
    "pruning.methods.semdedup": ("SemDeDup",),
    "pruning.methods.ssp": ("Ssp",),
    # policies
    "dynamic.policies.d_pruning": ("DPruning",),
    "dynamic.policies.dissect": ("Dissect",),
    "dynamic.policies.dynamic_random": ("DynamicRandom",),
    "dynamic.policies.full": ("Full",),
    "dynamic.policies.infobatch": ("InfoBatch",),
    "dynamic.policies.jest": ("Jest",),
    "dynamic.policies.rho": ("Rho",),
    "dynamic.policies.scan": ("Scan",),
    "dynamic.policies.seta": ("Seta",),
    "dynamic.policies.sift": ("Sift",),
    "dynamic.policies.static": ("Static",),
}  # fmt: skip

__all__ = [
    "AccessError", "BadRowsError", "BudgetError", "CRho", "Cache", "ChangedError", "ClipCov", "ClipScore",
    "Clustered", "Combine", "DPruning", "Dedup", "Density", "Dissect", "DynamicRandom", "EmbeddingStore", "Engine",
    "Filter", "Full", "Groups", "Herd", "HierarchicalKMeans", "InfoBatch", "Jest", "Keep", "Match", "MetaClip",
    "MissingExtraError", "MissingPackageError", "NegClip", "NormSim", "Options", "OutputError", "PoolError",
    "Processes", "Random", "Ray", "Recipe", "Rho", "Run", "Scan", "Score", "Scored", "Selection", "SemDeDup",
    "Serial", "Seta", "Sift", "SoftCapSampling", "Ssp", "Static", "Step", "Threads", "ThresherError", "Training",
    "UnreachedError", "UsageError", "advise", "build", "cluster", "compare", "coreset", "doctor", "embed", "evaluate",
    "evaluate_model", "from_arrays", "inspect", "make_engine", "method", "open", "open_store", "prove", "reference",
    "reshard", "run_plan", "run_steps", "score", "select", "select_indices", "sweep", "train_clip",
    "train_moco", "view",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"thresher.{home}"), name)
    raise AttributeError(f"module 'thresher' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
