"""Learning rates that go by the progress of a run: epochs may shrink as they like."""

from __future__ import annotations

import math
from collections.abc import Callable

from thresher.dynamic.loop import PruningLoop
from thresher.errors import UsageError


def cosine_by_progress(loop: PruningLoop, *, warmup: float = 0.05, final: float = 0.0) -> Callable[[int], float]:
    """Return the factor function of warm-up, then half a cosine down, for torch's ``LambdaLR``.

    Use it as ``schedule = LambdaLR(optimizer, cosine_by_progress(sampler))``, and call ``schedule.step()`` after every
    ``optimizer.step()``. The factor follows from the progress of the sampler alone, not from how often the schedule was
    stepped, so nothing of the schedule has to be saved: make it before or after the optimizer's state is loaded.

    While rates rise, the batch at hand counts as done: the first step is taken at a rate above 0. They start to fall
    from their peak at the first batch after, and reach their end with the last: no step is taken at a rate of 0.

    Args:
        loop: Whose progress counts: a ``PruningSampler`` or a ``StreamPruner``.
        warmup: Share of the run's samples over which rates rise, below 1.
        final: What the rates end at, as a share of where they start.

    Raises:
        UsageError: A share out of range.
    """
    if not 0 <= warmup < 1 or not 0 <= final <= 1:
        raise UsageError(f"warmup = {warmup}, final = {final}; give shares, the warm-up below 1")

    def factor(_: int) -> float:
        progress = loop.progress
        if progress < warmup:
            ahead = progress + (1 - progress) / loop.steps_left()  # with the batch at hand
            return min(1.0, ahead / warmup)
        down = (progress - warmup) / (1 - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * down))

    return factor  # a function, not an object with __call__: of those torch saves the attributes
