"""Addresses of the Hugging Face Hub: commits, and the Parquet files of a split of a dataset.

A dataset changes with every push. A location is therefore pinned to the commit that it has when it is opened, and all
results name this commit: what is read later is the same, whatever has been pushed since.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import unquote

from thresher.errors import PoolError, UsageError, suggest
from thresher.io.paths import is_unsafe, visible
from thresher.io.remote import file_system, requested

PROTOCOL = "hf://"
_NAME = r"[A-Za-z0-9_][\w.-]*"
_ADDRESS = re.compile(
    rf"hf://(?P<kind>datasets/|spaces/|models/)?(?!(?:datasets|spaces|models|buckets)/)(?P<name>{_NAME}/{_NAME})"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?P<path>/.*)?"
)
_BUCKETS = "hf://buckets/"
_BUCKET = re.compile(rf"hf://buckets/{_NAME}/{_NAME}(?:/.*)?")
_PAGE = re.compile(
    rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/(?P<name>{_NAME}/{_NAME})"
    r"(?:/(?:tree|blob|viewer|discussions)(?:/[^?#]*)?)?/?(?:[?#].*)?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PARQUET = (".parquet", ".pq")
# Words in the names of files and folders that ``datasets`` takes for splits.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLIT = re.compile(rf"(?<![a-zA-Z])({'|'.join(SPLITS)})(?![a-zA-Z])", re.IGNORECASE)
_SHARD = re.compile(r"(?:.*/)?(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
_CONVERTED = re.compile(r"(?P<config>[^/]+)/(?:partial-)?(?P<split>[^/]+)/\d{4}\.parquet")  # of refs/convert/parquet
_MOST = 50  # configurations and splits that a message lists
ALL = "all"  # instead of the name of a split


def is_dataset(location: str) -> bool:
    """Return whether a location is a whole dataset: ``hf://datasets/OWNER/NAME``, with or without a revision."""
    found = _ADDRESS.fullmatch(location.rstrip("/"))
    return found is not None and found["kind"] == "datasets/" and not found["path"]


def pinned(location: str) -> str:
    """Return a location with the commit that its revision has now; one request, none if it names a commit.

    Args:
        location: Any location. Those that are not of a repository on the Hub are returned as they are; buckets have no
            commits.

    Raises:
        PoolError: There is no such repository or revision, or the location is not an address of one.
        AccessError: Access was denied.
        UnreachedError: The Hub was not reached.
    """
    if page := _PAGE.fullmatch(location):
        raise PoolError(f"{visible(location)}: is a page of the Hub; give hf://datasets/{page['name']}")
    if PROTOCOL not in location:
        return location
    if "::" in location:  # a list of tars
        return "::".join(map(pinned, location.split("::")))
    if not location.startswith(PROTOCOL) or _BUCKET.fullmatch(location):
        return location
    found = _ADDRESS.fullmatch(location)
    if found is None:
        raise PoolError(
            f"{visible(location)}: is not an address of the Hub; give hf://datasets/OWNER/NAME, "
            "hf://datasets/OWNER/NAME@REVISION/PATH, or hf://buckets/OWNER/NAME/PATH"
        )
    if _COMMIT.fullmatch(found["revision"] or ""):
        return location
    kind = found["kind"] or ""
    commit = _info(location, kind, found["name"], found["revision"]).sha
    return f"{PROTOCOL}{kind}{found['name']}@{commit}{found['path'] or ''}"


def without_commit(location: str) -> str:
    """Return a location without the commit that it is pinned to: the identity of a file in all commits."""
    found = _ADDRESS.fullmatch(location) if location.startswith(PROTOCOL) else None
    if found is None or not _COMMIT.fullmatch(found["revision"] or ""):
        return location
    return f"{PROTOCOL}{found['kind'] or ''}{found['name']}{found['path'] or ''}"


def refuse_to_write(location: str) -> None:
    """Refuse places on the Hub that cannot be written to.

    Raises:
        UsageError: It is in a bucket, a commit, or a whole repository.
    """
    if not location.startswith(PROTOCOL):
        return
    found = _ADDRESS.fullmatch(location.rstrip("/"))
    if location.startswith(_BUCKETS):
        why = "buckets are only read; write to a folder, then type hf sync FOLDER hf://buckets/OWNER/NAME"
    elif found is None:
        why = "is not an address of the Hub; give hf://datasets/OWNER/NAME/PATH"
    elif _COMMIT.fullmatch(found["revision"] or ""):
        why = "a commit never changes; give a branch, or leave out the part from @ on"
    elif not (found["path"] or "").strip("/"):
        why = f"is a whole repository; give a folder or file in it, such as {visible(location.rstrip('/'))}/subset"
    else:
        return
    raise UsageError(f"{visible(location)}: cannot be written to: {why}")


def commit_note(location: str, at: str) -> list[str]:
    """Return a sentence about the commit that is read, none if the location names it itself or has none."""
    found = _ADDRESS.fullmatch(at)
    if at == location or found is None:
        return []
    return [f"read at commit {found['revision']}; for the same files after a later push, give {visible(at)}"]


def parquet_of(location: str, config: str | None, split: str | None) -> list[str]:
    """Return the names of the Parquet files of a split of a dataset, see :func:`split_of`; one request.

    Args:
        location: The dataset, see :func:`is_dataset`.
        config: The configuration, if there are several.
        split: The split, if there are several; ``all`` for all of them.

    Raises:
        UsageError: There is no such configuration or split, or several and none is chosen.
        PoolError: A name of a file is not safe.
    """
    found = _ADDRESS.fullmatch(location.rstrip("/"))
    if found is None or not is_dataset(location):
        raise UsageError(f"{location}: --reader hub reads a whole dataset; give hf://datasets/OWNER/NAME")
    info = _info(location, found["kind"], found["name"], found["revision"])
    names = [str(one.rfilename) for one in info.siblings or ()]
    if unsafe := next(filter(is_unsafe, names), None):
        raise PoolError(f"{location}: has a file with the unsafe name {visible(unsafe)!r}; it is not read")
    card = info.card_data.to_dict() if info.card_data else {}
    return split_of(location, names, card.get("configs"), config, split)[1]


def _info(location: str, kind: str, name: str, revision: str | None) -> Any:
    fs, _ = file_system(location)
    from huggingface_hub import HfApi

    def ask() -> Any:
        wanted = None if revision is None else {"~parquet": "refs/convert/parquet"}.get(revision, unquote(revision))
        return HfApi(endpoint=fs.endpoint, token=fs.token).repo_info(
            name, revision=wanted, repo_type=kind.removesuffix("s/") or "model", timeout=60
        )

    info = requested(location, ask)
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise PoolError(f"{location}: the server names no commit ({visible(str(info.sha), 60)}); check HF_ENDPOINT")
    return info


# --- splits ---------------------------------------------------------------------------------------


def split_of(
    location: str, names: Iterable[str], configs: Any, config: str | None, split: str | None
) -> tuple[str, list[str]]:
    """Return the name and the Parquet files of a split of a dataset.

    Configurations and splits are those that the card of the dataset declares; without any, those that ``datasets``
    takes from the names of files: ``SPLIT-00000-of-00001.parquet``, a word such as ``train`` in the name or the folder,
    or else one split, ``train``.

    Args:
        location: The dataset, for messages.
        names: Its files.
        configs: What its card declares; untrusted.
        config: The configuration; None if there is one, or one named ``default``.
        split: The split; ``all`` for all of them; None if there is one.

    Raises:
        UsageError: There is no such configuration or split, or several and none is chosen.
    """
    tables = [name for name in names if name.lower().endswith(_PARQUET)]
    found = _declared(tables, configs) or _by_names(tables)
    how = "choose one with --reader hub:{}=NAME"
    if config is None and len(found) > 1 and "default" not in found:
        raise UsageError(f"{location}: has the configurations {_listed(found)}; {how.format('config')},split=NAME")
    chosen = config if config is not None else "default" if "default" in found else next(iter(found), "default")
    if chosen not in found:
        raise UsageError(
            f"{location}: has no configuration {visible(chosen)!r} with Parquet files; it has {_listed(found)}."
            f"{suggest(chosen, found)}"
        )
    splits = found[chosen]
    if split == ALL and ALL not in splits:
        return ALL, list(dict.fromkeys(name for some in splits.values() for name in some))
    if split is None and len(splits) > 1:
        also = f"config={visible(chosen)}," if config is not None else ""
        raise UsageError(
            f"{location}: has the splits {_listed(splits)}; choose one with --reader hub:{also}split=NAME, or "
            f"split={ALL}"
        )
    wanted = split if split is not None else next(iter(splits))
    if wanted not in splits:
        raise UsageError(
            f"{location}: has no split {visible(wanted)!r}; it has {_listed(splits)}.{suggest(wanted, splits)}"
        )
    return wanted, list(dict.fromkeys(splits[wanted]))  # a card may name a file twice


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _MOST:,} more" if len(shown) > _MOST else ""
    return ", ".join(visible(name, 60) for name in shown[:_MOST]) + more if shown else "none"


def _by_names(tables: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return the files by configuration and split, by their names alone."""
    converted = [_CONVERTED.fullmatch(name) for name in tables]
    found: dict[str, dict[str, list[str]]] = {}
    if tables and all(converted):
        for match in converted:
            assert match is not None  # noqa: S101 - all matched
            found.setdefault(match["config"], {}).setdefault(match["split"], []).append(match[0])
        return found
    shards = {name: match["split"] for name in tables if (match := _SHARD.fullmatch(name))}
    if not shards:
        shards = {name: SPLITS[words[-1].lower()] for name in tables if (words := SPLIT.findall(name))}
    for name in tables:
        if not shards or name in shards:
            found.setdefault("default", {}).setdefault(shards.get(name, "train"), []).append(name)
    return found


def _declared(tables: Sequence[str], configs: Any) -> dict[str, dict[str, list[str]]]:
    """Return the files by configuration and split, as the card declares them; empty if it declares none of them."""
    found: dict[str, dict[str, list[str]]] = {}
    for one in configs if isinstance(configs, list) else ():
        if not isinstance(one, Mapping):
            continue
        name, below = str(one.get("config_name", "default")), one.get("data_dir")
        folder = f"{below.strip('/')}/".removeprefix("./").lstrip("/") if isinstance(below, str) else ""
        if one.get("data_files") is None:  # those of the folder, whose own name does not count
            inside = [table.removeprefix(folder) for table in tables if table.startswith(folder)]
            for splits in _by_names(inside).values():
                for split, files in splits.items():
                    found.setdefault(name, {}).setdefault(split, []).extend(f"{folder}{path}" for path in files)
        for split, patterns in _data_files(one.get("data_files")):
            inside = [f"{folder}{path}" for path in patterns]
            if files := [table for table in tables if any(_fits(table, path) for path in inside)]:
                found.setdefault(name, {}).setdefault(split, []).extend(files)
    return found


def _data_files(given: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield the splits of ``data_files`` and their patterns; what has another form is passed over."""
    some = given if isinstance(given, list) else [given]
    if some and all(isinstance(one, str) for one in some):
        yield "train", some
        return
    for one in some:
        if isinstance(one, Mapping) and isinstance(one.get("split"), str):
            paths = one.get("path")
            yield one["split"], [path for path in (paths if isinstance(paths, list) else [paths]) if type(path) is str]


def _fits(name: str, pattern: str) -> bool:
    """Return whether a file matches a pattern with ``*``, ``?``, ``[...]`` and ``**`` for folders."""
    parts, wanted = name.split("/"), pattern.removeprefix("./").split("/")
    reached = {0}  # numbers of parts that the pattern so far may have matched
    for one in wanted:
        if one == "**":
            reached = set(range(min(reached, default=len(parts) + 1), len(parts) + 1))
        else:
            reached = {at + 1 for at in reached if at < len(parts) and fnmatchcase(parts[at], one)}
    return len(parts) in reached or (wanted[-1] == "**" and bool(reached))
