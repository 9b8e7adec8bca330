"""Split a labelled set into two parts, because there is no separate training set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.evaluation.accuracy import Bools
from thresher.runtime.format import counted
from thresher.runtime.random import generator


def split(rows: int, *, groups_N: npt.ArrayLike | None = None, share: float = 0.5, seed: int = 0) -> Bools:
    """Choose about ``share`` of the rows; a group, such as duplicates, is never split.

    The same groups (in any order), share and seed give the same parts.

    Args:
        rows: N.
        groups_N: (N,) group of each row, integers or text; by default every row has its own.
        share: Strictly between 0 and 1. Groups are taken in random order while they fit, so that large groups may
            make the part smaller.
        seed: Seed of the order.

    Returns:
        (N,) bool, True for the first part; each part has at least one row.

    Raises:
        UsageError: There are fewer than two groups, or a value is not allowed.
    """
    if not 0 < share < 1:
        raise UsageError(f"share = {share}; give a share strictly between 0 and 1")
    groups = np.arange(rows) if groups_N is None else np.asarray(groups_N)
    if groups.shape != (rows,):
        raise UsageError(f"groups of shape {groups.shape}; give one per row, ({rows},)")
    names_G, codes_N, sizes_G = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names_G) < 2:
        what = f"{counted(rows, 'row')} in {counted(len(names_G), 'group')}"
        raise UsageError(f"{what} cannot be split; give two groups or more")
    # Philox itself takes no negative seed, which every other command allows.
    random = np.random.Generator(np.random.Philox(seed)) if seed >= 0 else generator(seed, "split")
    order_G = random.permutation(len(names_G))
    upto_G = np.cumsum(sizes_G[order_G])
    taken = int(np.clip(np.searchsorted(upto_G, share * rows, side="right"), 1, len(names_G) - 1))
    first_G = np.zeros(len(names_G), np.bool_)
    first_G[order_G[:taken]] = True
    return np.asarray(first_G[codes_N], np.bool_)
