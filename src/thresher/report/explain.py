"""Explain one row: kept or dropped, by which step and why, or its history in a training run."""

from __future__ import annotations

from typing import Any

import numpy as np

from thresher.dynamic.ledger import ILL_MATCHED, LEFT_OUT, REDUNDANT
from thresher.dynamic.mismatch import Mismatch
from thresher.dynamic.run_folder import Training
from thresher.errors import UsageError
from thresher.io.columns import as_text
from thresher.io.key_forms import difference
from thresher.io.paths import cut
from thresher.pool.layout import shown
from thresher.pool.store import EmbeddingStore
from thresher.report.facts import plain
from thresher.selection import Selection

_READ = "the row was read"
_TEXT = 2_000  # characters of a key or a caption that are returned
_KINDS = {REDUNDANT: "redundant", ILL_MATCHED: "ill-matched", LEFT_OUT: "left out"}


def explain(selection: Selection, store: EmbeddingStore, key: str | int) -> dict[str, Any]:
    """Return what each step decided about a row.

    Args:
        selection: Any chain of steps.
        store: Its pool.
        key: The row's key, a number if keys are numbers; ``row:17`` names a row by number.

    Returns:
        row, key and caption (both cut after 2,000 characters, with a note of their length), kept, uses (how often the
        row is used), and for each step that saw it: method, package (name and version; "" for methods of thresher),
        verdict, reason, score, cut, group of duplicates (first, its lowest row, and size), cluster with size, quota and
        kept, duplicate (row, key, caption, kept; if it was dropped as a duplicate too, "last" is the row at the end of
        the chain and "links" its length), pool, row, key and caption of the reference row that it repeats, and, for a
        coreset, the history of the row in training, as in :func:`history`.

    Raises:
        UsageError: No such row.
        PoolError: A file of the pool changed while it was read.
    """
    row = find_row(store, key)
    result: dict[str, Any] = {
        "row": row,
        **_key_and_caption(store, row),
        "kept": bool(selection.dropped_by[row] == -1),
        "uses": int(selection.dropped_by[row] == -1 if selection.repeats is None else selection.repeats[row]),
        "steps": [],
    }
    for number, step in enumerate(selection.steps):
        by = int(selection.dropped_by[row])
        if 0 <= by < number:
            break
        at = int(np.searchsorted(selection.given(number), row))
        dropped = by == number
        part: dict[str, Any] = {
            "method": step.method,
            "package": plain(step.foreign, 80),
            "verdict": "dropped" if dropped else "kept",
            "reason": step.why(at) if dropped else "",
        }
        known = step.repeated(at) if dropped else None
        if known is not None:
            part["reference"] = {"pool": step.parameters.get("reference"), **known}
        elif "score" in step.rows and not ("duplicate_of" in step.rows and step.rows["score"][at] <= -1):
            # A row that no other one was compared with has a cosine of -1.
            part |= {"score": float(step.rows["score"][at]), "meaning": step.score, "cut": step.cut}
        if set(_EVIDENCE) <= set(step.rows):
            part["history"] = _history(*(step.rows[name][at].item() for name in _EVIDENCE))
        if {"duplicate_group", "group_size"} <= set(step.rows):
            part["group"] = {"first": int(step.rows["duplicate_group"][at]), "size": int(step.rows["group_size"][at])}
        if "cluster" in step.rows:
            cluster = int(step.rows["cluster"][at])
            part["cluster"] = {"number": cluster} | {k: v[cluster].item() for k, v in step.groups.items()}
        if dropped and "duplicate_of" in step.rows:
            chain = duplicates(selection, number, row)
            found = [
                {"row": twin, **_key_and_caption(store, twin), "kept": bool(selection.dropped_by[twin] == -1)}
                for twin in (*chain[:1], *chain[1:][-1:])
            ]
            if found:
                part["duplicate"] = found[0]
            if len(found) > 1:
                part["duplicate"] |= {"links": len(chain), "last": found[1]}
        result["steps"].append(part)
    store.check_unchanged(_READ)
    return result


def history(training: Training, store: EmbeddingStore, key: str) -> dict[str, Any]:
    """Return what a training run recorded about a row of its pool.

    Args:
        training: A run, finished or not.
        store: Its pool.
        key: The row's key, a number if keys are numbers; ``row:17`` names a row by number.

    Returns:
        row, key, caption, policy, epochs (finished), searches (epochs that selected candidates), and history: candidate
        (number of epochs in which the row was a candidate for pruning), last (the last of these epochs, or None), kinds
        (kinds of candidate in that epoch), loss (the last loss, None before the row was trained on) and seen (the
        epoch of that loss, or None). Epochs count from 1; the log and the ledger of the run count from 0. For the
        policy ``sift`` also mismatch: rank (mean rank of the loss, 0 to 1, or None) and chance (the probability that
        the pair is mismatched, or None if nothing says that any is).

    Raises:
        UsageError: No such row.
        PoolError: No epoch is finished, the folder is damaged, or a file of the pool changed while it was read.
    """
    ledger, log, row = training.ledger(), training.log(), find_row(store, key)
    mismatch = Mismatch.of(training.policy, ledger)
    arrays = (ledger.times_N, ledger.marked_N, ledger.marks_N, ledger.loss_N, ledger.seen_N)
    result = {
        "row": row,
        **_key_and_caption(store, row),
        "policy": training.policy,
        "epochs": len(log),
        "searches": sum(1 for entry in log if entry.get("candidates")),
        "history": _history(*(array[row].item() for array in arrays)),
        **({} if mismatch is None else {"mismatch": _mismatch(mismatch, row)}),
    }
    store.check_unchanged(_READ)
    return result


def duplicates(selection: Selection, number: int, row: int) -> list[int]:
    """Return the row that a row duplicates, the row that this one duplicates, and so on within one step."""
    given, twin_n = selection.given(number), selection.steps[number].rows["duplicate_of"]
    chain: dict[int, None] = {row: None}  # in order; a damaged selection may lead back to an earlier row
    while selection.dropped_by[row] == number:
        row = int(twin_n[np.searchsorted(given, row)])
        if row < 0 or row in chain:
            break
        chain[row] = None
    return list(chain)[1:]


_EVIDENCE = ("score", "marked", "marks", "loss", "seen")  # the evidence of a coreset that is the history of a row


def _history(times: float, marked: int, marks: int, loss: float, seen: int) -> dict[str, Any]:
    return {
        "candidate": int(times),
        "last": marked + 1 if marked >= 0 else None,
        "kinds": [name for bit, name in _KINDS.items() if marks & bit],
        "loss": loss if seen >= 0 else None,
        "seen": seen + 1 if seen >= 0 else None,
    }


def _mismatch(mismatch: Mismatch, row: int) -> dict[str, float | None]:
    rank = mismatch.ranks_N[row].item()
    known = mismatch.found is not None and rank == rank
    return {
        "rank": rank if rank == rank else None,
        "chance": mismatch.chance_N[row].item() if known else None,
    }


def find_row(store: EmbeddingStore, key: str | int) -> int:
    """Return the row of a key, or of ``row:17``.

    Raises:
        UsageError: No such row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        key = str(key)
    if not isinstance(key, str):
        raise UsageError(f"a key is text or a whole number, not {type(key).__name__}; give row:17 for a row by number")
    number = key.removeprefix("row:")
    if (key.startswith("row:") or store.layout.key is None) and number.isdecimal() and int(number) < store.total:
        return int(number)
    if store.layout.key is not None and not key.startswith("row:"):
        for ids, part in store.scan([store.layout.key]):
            text = as_text(part.column(0), store.layout.location, store.layout.key)
            at = pc.index(text, pa.scalar(key, text.type)).as_py()
            if at >= 0:
                return int(ids[at])
    named, forms = "no key column", ""
    if store.layout.key:
        first = next((keys[0] for _, keys in store.keys() if keys), "")
        named, forms = f"column {store.layout.key!r}, such as {cut(first, 60)!r}", difference(key, first)
    raise UsageError(
        f"no row {cut(key, 400)!r} in {store.layout.location} ({named}){forms}; "
        f"give a key, or a row number from row:0 to row:{store.total - 1}"
    )


def _key_and_caption(store: EmbeddingStore, row: int) -> dict[str, str]:
    result = {"key": str(row), "caption": ""}
    columns = {"key": store.layout.key, "caption": store.layout.caption}
    names = [name for name in dict.fromkeys(columns.values()) if name]
    if names:
        part = next(iter(store.lookup(names, np.array([row]))))
        result |= {role: shown(part.column(names.index(name)), _TEXT)[0] for role, name in columns.items() if name}
    return result
