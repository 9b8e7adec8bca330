"""The files below a location, sorted by name; any fsspec location."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thresher.errors import PoolError
from thresher.io.hub import pinned
from thresher.io.open import file_stamp, meaning_of, protocol_of, status_of, trusting, version_in
from thresher.io.paths import visible
from thresher.io.remote import file_system, requested

_NAMED = 3  # files that a message names


@dataclass(frozen=True)
class Files:
    """The files below a location, sorted by relative name; any fsspec location.

    Attributes:
        location: The location as the user wrote it.
        protocol: Protocol of the file system.
        root: Path of the folder.
        names: Names of the files, relative to the root.
        stamps: Path -> size and version, as :func:`stamp_of` returns them, if the listing contains both; this avoids
            one request per file.
        version: What follows the ``@`` in the location ``PATH@VERSION`` of a Lance dataset, which may have no such
            version; "" for another location.
    """

    location: str
    protocol: str
    root: str
    names: tuple[str, ...]
    stamps: Mapping[str, list[Any]] = field(default_factory=dict, repr=False, compare=False)
    version: str = ""

    @classmethod
    def at(cls, location: str, *, again: bool = False) -> Files:
        """List a folder (two levels deep), a single file, or the files of a pattern.

        Args:
            location: A location on any file system that fsspec supports; see :func:`is_pattern`. One on the Hub is
                pinned to a commit, see :func:`thresher.io.hub.pinned`.
            again: List again instead of using a cached listing.

        Raises:
            PoolError: There is nothing at the location.
            UsageError: The protocol of the location is unknown.
            UnreachedError: The location, or a folder in it, was not reached.
        """
        if not location:
            raise PoolError("no pool was given; give a folder or file of embeddings")
        location = pinned(location)
        if is_pattern(location):
            folder, slash, _ = location.partition("*")[0].rpartition("/")
            wanted = re.compile("[^/]*".join(map(re.escape, location[len(folder + slash) :].split("*"))))
            files = cls.at(folder or slash or ".", again=again)
            return replace(files, location=location, names=tuple(filter(wanted.fullmatch, files.names)))
        fs, root = file_system(location)
        if again:
            fs.invalidate_cache()
        listed = _found(fs, root, location)
        root = root.rstrip("/") or root
        # A folder with the name of a data file counts as an unreadable file, unless it contains such files.
        paths = [
            path
            for path, info in listed.items()
            if info["type"] != "directory"
            or (ending := re.search(r"\.(np[yz]|parquet|pq)$", path.lower()))
            and path != root
            and not any(other.startswith(f"{path}/") and other.lower().endswith(ending[0]) for other in listed)
        ]
        if not paths and (named := re.fullmatch(r"(.+[^/:])@([^/@]+)", location)):
            dataset = f"{root.rpartition('@')[0]}/_versions"  # of Lance; others have none
            if "/" in root and requested(location, lambda: fs.exists(dataset)):
                return replace(cls.at(named[1], again=again), location=location, version=named[2])
        if not paths:
            reason = "it is an empty folder" if fs.exists(root) else "nothing is there"
            raise PoolError(f"{location}: {reason}; give a folder or file of embeddings")
        if paths == [root]:
            root, names = posixpath.dirname(root), [posixpath.basename(root)]
        else:
            names = [posixpath.relpath(path, root) for path in paths]
        # The pool's folder may contain results of earlier commands; their arrays are not part of the pool.
        exports = {name.removesuffix(".manifest.json") for name in names if name.endswith(".manifest.json")}
        results = {posixpath.dirname(name) for name in names if name.endswith(_RESULTS)} - {""}
        visible = [
            name
            for name in names
            if posixpath.dirname(name) not in results
            and name not in exports
            and not any(part.startswith(".") for part in name.split("/"))
        ]
        protocol = protocol_of(fs)
        stamps = {path: stamp for path, info in listed.items() if (stamp := _listed(info, protocol))}
        return cls(location, protocol, root, tuple(sorted(visible, key=natural)), stamps)

    def path(self, name: str) -> str:
        """Return the full path of a listed name."""
        return posixpath.join(self.root, name)

    def matching(self, pattern: str) -> list[str]:
        """Return the names that match a regular expression entirely, in natural order; ``.NPY`` matches ``.npy``."""
        return [name for name in self.names if re.fullmatch(pattern, name, re.IGNORECASE)]


def is_pattern(location: str) -> bool:
    """Return whether a location is a pattern of files: it has a ``*``, and there is no local file of this name.

    Its files are two levels below the folder before its first ``*``, which does not match ``/``.
    """
    return "*" in location and ("://" in location or status_of(location) is None)


def folders_below(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield a local folder and the folders below it like :func:`os.walk`, symlinks are not followed.

    Raises:
        UnreachedError: A folder was not reached. Without this it would count as empty.
        AccessError: A folder cannot be listed for lack of permission.
    """

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise meaning_of(str(error.filename), error) or error from error

    return os.walk(top, onerror=failed)


def _found(fs: Any, root: str, location: str) -> dict[str, Any]:
    """Return the files and folders below a location by path, with what the file system knows about each."""
    if (protocol := protocol_of(fs)) != "file":
        folders = protocol != "hf"  # there they would be a second listing, of the folder above
        return dict(requested(location, lambda: fs.find(root, maxdepth=2, withdirs=folders, detail=True)))

    def find() -> dict[str, Any]:  # unlike find() of fsspec, for which a folder that cannot be read is empty
        if not os.path.lexists(root):
            return {}
        listed = {root: fs.info(root)}
        for info in fs.ls(root, detail=True):
            listed[info["name"]] = info
            if info["type"] == "directory":
                listed |= {inner["name"]: inner for inner in fs.ls(info["name"], detail=True)}
        return listed

    return trusting(location, find)


def stamp_of(protocol: str, path: str) -> list[Any]:
    """Return the size and version of a file, which change with the file, in the form that a listing has."""
    if protocol != "file":
        return file_stamp(protocol, path)
    stat = trusting(path, lambda: os.stat(path))
    return [stat.st_size, stat.st_mtime]


def _listed(info: Mapping[str, Any], protocol: str) -> list[Any]:
    """Return the stamp of a file from its entry in a listing, [] if the entry is incomplete."""
    if protocol == "file":  # for a symlink, a listing has the time of the link itself
        return [] if info.get("islink", True) else [info["size"], info["mtime"]]
    version = version_in(dict(info))
    return [info["size"], version] if version and info.get("size") is not None else []


_RESULTS = ("/selection.json", "/cluster.json")


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key under which ``a2`` comes before ``a10``; it is unique for each name."""
    parts = ((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part)
    return (*parts, (-2, name))


def named(paths: Sequence[str]) -> str:
    """Return the first paths as text, and how many more there are, for a message."""
    more = f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else ""
    return ", ".join(map(visible, sorted(paths, key=natural)[:_NAMED])) + more
