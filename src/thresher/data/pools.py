"""Pools given where raw data are wanted: their thumbnails must not pass for the images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from thresher.data.location import Location
from thresher.data.parts import Data
from thresher.errors import PoolError, UnreachedError, UsageError
from thresher.io.paths import typed, visible
from thresher.io.plan import PLAN, datasets_in, paths_of, plan_of_pool

_FOLDERS = ("metadata", "img_emb", "text_emb")  # of a pool
_THUMBNAIL = "thumbnail"
_RAW = (".tar", ".tar.gz", ".tgz", ".csv", ".tsv", ".jsonl", ".jpg", ".jpeg", ".png", ".webp", ".gif")
_PLACES = {"shard", "offset"}  # columns of the tables of pools


def refuse_pool(where: Location) -> None:
    """Refuse the folder of a pool: of ``thresher embed``, or a part of it, clip-retrieval or DataComp; on this machine.

    Raises:
        UsageError: It is one; the message has the data it was made from.
    """
    if not where.local:
        return
    for folder in _pools_of(os.path.abspath(os.path.expanduser(where.text))):
        if (plan := _plan(folder)) is not None:
            thumbnails = _THUMBNAIL in plan.get("columns", ())
            raise _refusal(where.text, folder, _made_from(plan), thumbnails=thumbnails)
    if where.is_folder and not where.has(*_RAW) and _has_vectors(where.text):
        raise _refusal(where.text, where.text, "", thumbnails=False)


def refuse_thumbnails(data: Data) -> None:
    """Refuse tables of a pool whose ``pool.json`` is not there, in which thumbnails are the only images.

    Raises:
        UsageError: They are such tables.
    """
    first = data.parts[0]
    if first.roles().get("picture") == _THUMBNAIL and set(first.schema().names) >= _PLACES:
        raise _refusal(data.location, data.location, "", thumbnails=True)


def _pools_of(path: str) -> list[str]:
    """Return the folders that a path is in, or is, if it belongs to a pool."""
    above, name = os.path.split(path)
    top, folder = os.path.split(above)
    return [
        *([path] if os.path.isdir(path) else []),
        *([above] if name in (*_FOLDERS, PLAN) else []),
        *([top] if folder in _FOLDERS else []),
    ]


def _has_vectors(folder: str) -> bool:
    """Return whether a folder has vectors as clip-retrieval or DataComp lay them out."""

    def stems(part: str, ending: str) -> set[str]:
        path = os.path.join(folder, part)
        names = os.listdir(path) if os.path.isdir(path) else []
        return {name[: -len(ending)] for name in names if name.lower().endswith(ending)}

    return any(stems(part, ".npy") for part in ("img_emb", "text_emb")) or any(
        stems(part, ".npz") & stems(part, ".parquet") for part in ("", "metadata")
    )


def _plan(folder: str) -> Mapping[str, Any] | None:
    path = os.path.join(folder, PLAN)
    if not os.path.isfile(path):
        return None
    try:
        return plan_of_pool("file", path)
    except (PoolError, UnreachedError):  # other data may have a file of this name
        return None


def _made_from(plan: Mapping[str, Any]) -> str:
    """Return where the data of a pool are: the one dataset, file or folder of all its shards, "" if unknown."""
    paths = set(paths_of(plan))
    with suppress(ValueError):  # other data may have a file of this name
        for dataset in datasets_in(plan):
            if all(path.startswith(f"{dataset}/") for path in paths):
                return dataset
    if len(paths) <= 1:
        return next(iter(paths), "")
    folders = {path.rpartition("/")[0] for path in paths}
    return folders.pop() if len(folders) == 1 else f"{min(paths)} and {len(paths) - 1:,} more"


def _refusal(location: str, pool: str, origin: str, *, thumbnails: bool) -> UsageError:
    source = f"{visible(origin)}, which it was made from" if origin else "the data it was made from"
    insist = "; to use its thumbnails as images pass --thumbnails-as-data" if thumbnails else ""
    return UsageError(
        f"{location}: is a pool, not raw data; give {source}{insist}; to look at the pool type "
        f"thresher inspect {typed(pool)}"
    )
