"""The story of one row: kept or dropped, by which step, and on what evidence."""

from __future__ import annotations

from typing import Any

import numpy as np

from thresher.errors import UsageError
from thresher.selection import Selection
from thresher.store import EmbeddingStore


def explain(selection: Selection, store: EmbeddingStore, key: str) -> dict[str, Any]:
    """Tell what each step made of a row.

    Args:
        selection: Any chain of steps.
        store: Its pool.
        key: The row's key; ``row:17`` names a row by number.

    Returns:
        row, key, caption, kept, uses (how often the row is to be used), and for each step it met: method,
        verdict, reason, score, cut, cluster with size, quota and kept, and the duplicate's row and key.

    Raises:
        UsageError: No such row.
    """
    row = find_row(store, key)
    found: dict[str, Any] = {
        "row": row,
        **_told(store, row),
        "kept": bool(selection.dropped_by[row] == -1),
        "uses": int(selection.dropped_by[row] == -1 if selection.repeats is None else selection.repeats[row]),
        "steps": [],
    }
    for number, step in enumerate(selection.steps):
        by = int(selection.dropped_by[row])
        if 0 <= by < number:
            break
        place = int(np.searchsorted(selection.given(number), row))
        dropped = by == number
        part: dict[str, Any] = {
            "method": step.method,
            "verdict": "dropped" if dropped else "kept",
            "reason": step.why(place) if dropped else "",
        }
        if "score" in step.rows:
            part |= {"score": float(step.rows["score"][place]), "meaning": step.score, "cut": step.cut}
        if "cluster" in step.rows:
            cluster = int(step.rows["cluster"][place])
            part["cluster"] = {"number": cluster} | {k: v[cluster].item() for k, v in step.groups.items()}
        twin = int(step.rows["duplicate_of"][place]) if dropped and "duplicate_of" in step.rows else -1
        if twin >= 0:
            part["duplicate"] = {"row": twin, **_told(store, twin), "kept": bool(selection.dropped_by[twin] == -1)}
        found["steps"].append(part)
    return found


def find_row(store: EmbeddingStore, key: str) -> int:
    """Return the row of a key, or of ``row:17``.

    Raises:
        UsageError: No row has it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    number = key.removeprefix("row:")
    if (key.startswith("row:") or store.layout.key is None) and number.isdecimal() and int(number) < store.total:
        return int(number)
    if store.layout.key is not None and not key.startswith("row:"):
        for ids, part in store.scan([store.layout.key]):
            at = pc.index(pc.cast(part.column(0), pa.string()), key).as_py()
            if at >= 0:
                return int(ids[at])
    named = f"column {store.layout.key!r}" if store.layout.key else "no key column: rows go by number"
    raise UsageError(
        f"no row {key!r} in {store.layout.location} ({named}); "
        f"rows can be named by number, row:0 to row:{store.total - 1}"
    )


def _told(store: EmbeddingStore, row: int) -> dict[str, str]:
    found = {"key": str(row), "caption": ""}
    columns = {"key": store.layout.key, "caption": store.layout.caption}
    names = [name for name in dict.fromkeys(columns.values()) if name]
    if names:
        part = next(iter(store.lookup(names, np.array([row]))))
        cells = {role: part.column(names.index(name))[0].as_py() for role, name in columns.items() if name}
        found |= {role: "" if cell is None else str(cell) for role, cell in cells.items()}
    return found
