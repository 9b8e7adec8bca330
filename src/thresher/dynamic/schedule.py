"""Learning rates that follow the progress of a run, so that epochs may change their length."""

from __future__ import annotations

import math
from collections.abc import Callable

from thresher.dynamic.loop import PruningLoop
from thresher.errors import UsageError


def cosine_by_progress(loop: PruningLoop, *, warmup: float = 0.05, final: float = 0.0) -> Callable[[int], float]:
    """Return a learning rate factor for torch's ``LambdaLR``: linear warm-up, then half a cosine down.

    Use it as ``schedule = LambdaLR(optimizer, cosine_by_progress(sampler))``, and call ``schedule.step()`` after every
    ``optimizer.step()``. The factor depends only on the progress of the sampler, not on how often the schedule was
    stepped. So the schedule has no state to save: create it before or after you load the optimizer's state.

    During warm-up the current batch counts as done, so the first step has a rate above 0. The rate starts to fall from
    its peak at the first batch after the warm-up, and reaches its end after the last: no step has a rate of 0.

    Args:
        loop: The ``PruningSampler`` or ``StreamPruner`` whose progress to follow.
        warmup: Share of the run's samples over which the rate rises, below 1.
        final: The rate at the end, as a share of the peak.

    Raises:
        UsageError: A share is out of range.
    """
    if not 0 <= warmup < 1 or not 0 <= final <= 1:
        raise UsageError(f"warmup = {warmup}, final = {final}; give shares from 0 to 1, the warm-up below 1")

    def factor(_: int) -> float:
        progress = loop.progress
        if progress < warmup:
            ahead = progress + (1 - progress) / loop.steps_left()  # including the current batch
            return min(1.0, ahead / warmup)
        down = (progress - warmup) / (1 - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * down))

    return factor  # a function: torch would save the attributes of an object with __call__
