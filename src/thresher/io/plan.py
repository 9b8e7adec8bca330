"""``pool.json``: what ``thresher embed`` writes about a pool, as other commands read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thresher.io.open import open_file, trusting
from thresher.runtime.untrusted import load_json

PLAN = "pool.json"
BYTES = 1 << 30  # maximum size: a million shards and more


def plan_of_pool(protocol: str, path: str) -> Mapping[str, Any] | None:
    """Read a ``pool.json``; None if ``thresher embed`` did not write it.

    It has the list "shards", and "rows" once the pool is finished. Nothing in it has been checked.

    Raises:
        PoolError: The file is damaged.
    """
    with open_file(protocol, path) as raw:
        plan = trusting(path, lambda: load_json(raw, BYTES))
    return plan if isinstance(plan, dict) and isinstance(plan.get("shards"), list) else None
