"""The files below a location, by sorted name; any fsspec location."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass

from thresher.errors import PoolError
from thresher.io.open import protocol_of


@dataclass(frozen=True)
class Files:
    """The files below a location, by sorted relative name; any fsspec location."""

    location: str
    protocol: str
    root: str
    names: tuple[str, ...]

    @classmethod
    def at(cls, location: str) -> Files:
        """List a folder (two levels down) or a single file.

        Raises:
            PoolError: Nothing is there.
        """
        import fsspec

        if not location:
            raise PoolError("no pool is named; give a folder or file of embeddings")
        try:
            fs, root = fsspec.core.url_to_fs(location)
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
        return cls(location, protocol_of(fs), root, tuple(sorted(visible, key=natural)))

    def path(self, name: str) -> str:
        """Return the full path of a listed name."""
        return posixpath.join(self.root, name)

    def matching(self, pattern: str) -> list[str]:
        """Return the names that match a regular expression entirely, in natural order."""
        return [name for name in self.names if re.fullmatch(pattern, name)]


_RESULTS = ("/selection.json", "/cluster.json")


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key under which ``a2`` comes before ``a10``; no two names have the same."""
    parts = ((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part)
    return (*parts, (-2, name))
