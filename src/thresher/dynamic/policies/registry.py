"""Policies by name, as command lines give them: a share to prune, and what else was said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.dynamic.policies.d_pruning import DPruning
from thresher.dynamic.policies.dynamic_random import DynamicRandom
from thresher.dynamic.policies.full import Full
from thresher.dynamic.policies.infobatch import InfoBatch
from thresher.dynamic.policies.scan import Scan
from thresher.dynamic.policies.static import Static
from thresher.dynamic.policy import Policy
from thresher.errors import UsageError, suggest

POLICIES = ("full", "scan", "infobatch", "dynamic-random", "d-pruning", "static")
PRUNE = 0.3  # where a policy has no share of its own and none is given
_OPTIONS = {
    "scan": ("rho", "cycle", "warmup", "threshold", "mode", "scope"),
    "infobatch": ("delta",),
    "d-pruning": ("rule", "warmup"),
}
_SOLVED = ("rho", "threshold")  # by a share to prune: not given beside one

ON_COMMAND_LINES = {"warmup": "full-epochs"}  # where "warmup" is that of the learning rate


def check_options(
    name: str,
    options: Mapping[str, Any] | None,
    *,
    prune: float | None = None,
    called: Mapping[str, str] | None = None,
) -> None:
    """Refuse a policy that is not there, and options that it does not have or that go with no share.

    Args:
        name: One of POLICIES.
        options: Parameters of the policy; None stands for its default.
        prune: Share of the samples of the run to leave out, or None.
        called: What parameters are called where they were given, as far as that is not their name.

    Raises:
        UsageError: Says which, as they are called.
    """

    def listed(keys: Iterable[str]) -> str:
        return ", ".join((called or {}).get(key, key) for key in keys)

    if name not in POLICIES:
        raise UsageError(f"no policy {name!r}; there are {', '.join(POLICIES)}.{suggest(name, POLICIES)}")
    given = {key for key, value in (options or {}).items() if value is not None}
    known = _OPTIONS.get(name, ())
    if odd := given - set(known):
        raise UsageError(f"policy {name} has no {listed(sorted(odd))}; it has {listed(known) or 'no options'}")
    if name == "d-pruning" and (options or {}).get("warmup") == 0:
        raise UsageError(f"{listed(['warmup'])} = 0; give 1 epoch or more: {name} ranks by losses that it has seen")
    if prune is not None and (odd := given & set(_SOLVED)):
        raise UsageError(f"{listed(sorted(odd))} follow from the share to prune; give one or the other")


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
    check_options(name, options, prune=prune)
    given = {key: value for key, value in (options or {}).items() if value is not None}
    if (times_N is None) == (name == "static"):
        raise UsageError("policy static needs a selection, and no other policy takes one")
    if prune is not None and name in ("full", "static"):
        what = "nothing" if name == "full" else "what the selection does"
        raise UsageError(f"policy {name} leaves out {what}, not a share; for a share give a policy such as scan")
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
    A run of so many samples ends where they do, not where its last epoch would: that may cut into a cycle of ``scan``,
    or into the last epochs of ``infobatch``, which are on everything. So the share left out may miss ``prune`` by up to
    2 points, more in runs of a few epochs; the number of samples is exact.
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
