"""The files below a location, by sorted name; any fsspec location."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thresher.errors import PoolError
from thresher.io.open import file_stamp, protocol_of, trusting, version_in


@dataclass(frozen=True)
class Files:
    """The files below a location, by sorted relative name; any fsspec location.

    Attributes:
        location: As given.
        protocol: Of the file system.
        root: Path of the folder.
        names: Of the files, below the root.
        stamps: Path -> size and version, as :func:`stamp_of` returns them, where the listing says both: to ask file
            by file would be a request each.
    """

    location: str
    protocol: str
    root: str
    names: tuple[str, ...]
    stamps: Mapping[str, list[Any]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def at(cls, location: str, *, again: bool = False) -> Files:
        """List a folder (two levels down) or a single file.

        Args:
            location: Of any file system that fsspec knows.
            again: Ask for what is there now, not for what an earlier listing found.

        Raises:
            PoolError: Nothing is there.
        """
        import fsspec

        if not location:
            raise PoolError("no pool is named; give a folder or file of embeddings")
        try:
            fs, root = fsspec.core.url_to_fs(location)
            if again:
                fs.invalidate_cache()
            listed = fs.find(root, maxdepth=2, withdirs=True, detail=True)
        except (OSError, ValueError, ImportError) as error:
            raise PoolError(f"{location}: cannot be listed ({error})") from None
        root = root.rstrip("/") or root
        # A folder named like a file of data stands for one that cannot be read, unless it holds such files.
        found = [
            path
            for path, info in listed.items()
            if info["type"] != "directory"
            or (ending := re.search(r"\.(np[yz]|parquet|pq)$", path))
            and path != root
            and not any(other.startswith(f"{path}/") and other.endswith(ending[0]) for other in listed)
        ]
        if not found:
            there = "it is an empty folder" if fs.exists(root) else "nothing is there"
            raise PoolError(f"{location}: {there}; give a folder or file of embeddings")
        if found == [root]:
            root, names = posixpath.dirname(root), [posixpath.basename(root)]
        else:
            names = [posixpath.relpath(path, root) for path in found]
        # Results of earlier commands may lie in the pool's folder; their arrays are not the pool's.
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
        """Return the names that match a regular expression entirely, in natural order."""
        return [name for name in self.names if re.fullmatch(pattern, name)]


def stamp_of(protocol: str, path: str) -> list[Any]:
    """Return size and version of a file, what changes whenever it does, as a listing has them."""
    if protocol != "file":
        return file_stamp(protocol, path)
    stat = trusting(path, lambda: os.stat(path))
    return [stat.st_size, stat.st_mtime]


def _listed(info: Mapping[str, Any], protocol: str) -> list[Any]:
    """Return the stamp of a file from its entry in a listing, [] where that does not say it."""
    if protocol == "file":  # of a link, a listing has the time of the link itself
        return [] if info.get("islink", True) else [info["size"], info["mtime"]]
    version = version_in(dict(info))
    return [info["size"], version] if version and info.get("size") is not None else []


_RESULTS = ("/selection.json", "/cluster.json")


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key under which ``a2`` comes before ``a10``; no two names have the same."""
    parts = ((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part)
    return (*parts, (-2, name))
