"""Policies by name, as command lines give them: a share to prune, and what else was said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.dynamic.d_pruning import DPruning
from thresher.dynamic.dynamic_random import DynamicRandom
from thresher.dynamic.full import Full
from thresher.dynamic.infobatch import InfoBatch
from thresher.dynamic.policy import Policy
from thresher.dynamic.scan import Scan
from thresher.dynamic.static import Static
from thresher.errors import UsageError, suggest

POLICIES = ("full", "scan", "infobatch", "dynamic-random", "d-pruning", "static")
PRUNE = 0.3  # where a policy has no share of its own and none is given
_OPTIONS = {
    "scan": ("rho", "cycle", "warmup", "threshold", "mode", "scope"),
    "infobatch": ("delta",),
    "d-pruning": ("rule", "warmup"),
}
_SOLVED = ("rho", "threshold")  # by a share to prune: not given beside one


def policy_named(
    name: str,
    epochs: int,
    *,
    prune: float | None = None,
    times_N: npt.NDArray[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Policy:
    """Return the policy of a name for a run of ``epochs`` epochs.

    Args:
        name: One of POLICIES.
        epochs: Length of the run.
        prune: Share of the samples of the run to leave out, warm-up included; None for the policy as published
            (``dynamic-random`` and ``d-pruning``, published with several, leave out 30% of an epoch).
        times_N: How often each row comes, for ``static`` alone.
        options: Parameters of the policy; None stands for its default.

    Raises:
        UsageError: No such policy, an option it does not have, or a share it cannot reach.
    """
    if name not in POLICIES:
        raise UsageError(f"no policy {name!r}; there are {', '.join(POLICIES)}.{suggest(name, POLICIES)}")
    given = {key: value for key, value in (options or {}).items() if value is not None}
    known = _OPTIONS.get(name, ())
    if odd := set(given) - set(known):
        raise UsageError(f"policy {name} has no {', '.join(sorted(odd))}; it has {', '.join(known) or 'no options'}")
    if (times_N is None) == (name == "static"):
        raise UsageError("policy static needs a selection, and no other policy takes one")
    if prune is not None and name in ("full", "static"):
        raise UsageError(f"policy {name} leaves out what it is told to, not a share; do not give one")
    if prune is not None and (odd := set(given) & set(_SOLVED)):
        raise UsageError(f"{', '.join(sorted(odd))} follow from the share to prune; give one or the other")
    if times_N is not None:
        return Static(times_N=times_N if np.max(times_N) > 1 else np.asarray(times_N, np.bool_))
    if name == "full":
        return Full()
    if name == "dynamic-random":
        return DynamicRandom(keep=1 - (PRUNE if prune is None else prune))
    if name == "scan":
        return Scan(**given) if prune is None else Scan.for_budget(prune, epochs, **given)
    if name == "infobatch":
        return InfoBatch(epochs=epochs, **given) if prune is None else InfoBatch.for_budget(prune, epochs, **given)
    return DPruning(keep=1 - PRUNE, **given) if prune is None else DPruning.for_budget(prune, epochs, **given)


def epochs_for(
    samples: int, rows: int, name: str, *, prune: float | None = None, options: Mapping[str, Any] | None = None
) -> int:
    """Return about how many epochs of a policy take ``samples`` samples of ``rows`` rows, 1 or more.

    A policy plans by the length of the run, and the length follows from what it leaves out: found by going to and fro.
    """
    if name == "static":
        raise UsageError("the epochs of a selection follow from its rows")
    epochs = max(1, round(samples / rows))
    for _ in range(100):
        kept = 1 - _expected(name, epochs, prune, options)
        following = max(1, round(samples / (rows * kept)))
        if following == epochs:
            break
        epochs = following
    return epochs


def _expected(name: str, epochs: int, prune: float | None, options: Mapping[str, Any] | None) -> float:
    if prune is not None and name not in ("full", "static"):
        return prune
    return policy_named(name, epochs, options=options).expected_pruned(epochs)
