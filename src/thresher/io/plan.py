"""``pool.json``: what ``thresher embed`` writes about a pool, as other commands read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thresher.io.listing import Files
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


def plan_in(files: Files) -> Mapping[str, Any] | None:
    """Read the ``pool.json`` of a pool, as :func:`plan_of_pool` does; None if it has none."""
    return plan_of_pool(files.protocol, files.path(PLAN)) if PLAN in files.names else None


def datasets_in(plan: Mapping[str, Any]) -> dict[str, int]:
    """Return the datasets that keep versions which a pool was made of, and their versions: "versions" of a plan.

    Raises:
        ValueError: The entry is not what ``thresher embed`` writes.
    """
    found = plan.get("versions", {})
    if not isinstance(found, dict) or not all(type(one) is int and 0 < one < 2**63 for one in found.values()):
        raise ValueError('its entry "versions" is not that of thresher embed')
    return found


def paths_of(plan: Mapping[str, Any]) -> dict[str, str]:
    """Return the path of the data of each shard, and its name in the column "shard"; not those of damaged entries."""
    shards = (one for one in plan["shards"] if isinstance(one, list) and len(one) > 1)
    return {path: name for path, name, *_ in shards if isinstance(path, str) and isinstance(name, str)}
