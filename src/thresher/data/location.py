"""A location of raw data, which is listed only when a reader needs it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from functools import cached_property

from thresher.errors import OutputError
from thresher.io.listing import Files, folders_below, is_pattern
from thresher.io.open import status_of
from thresher.runtime.places import AnyPath, RemotePath, expanded


@dataclass(frozen=True)
class Location:
    """A location of raw data.

    Attributes:
        text: The location as the user wrote it: a folder, a file, or a pattern of files with ``*``, on any file system
            that fsspec supports.
    """

    text: str

    @property
    def local(self) -> bool:
        """Whether it is on a local file system."""
        return "://" not in self.text

    @property
    def is_folder(self) -> bool:
        """Whether it is a local folder."""
        status = status_of(self.text) if self.local else None
        return status is not None and stat.S_ISDIR(status.st_mode)

    @property
    def is_pattern(self) -> bool:
        """Whether it is a pattern of files."""
        return is_pattern(self.text)

    @property
    def exists(self) -> bool:
        """Whether it exists; always True for remote locations, except patterns that match nothing."""
        if self.is_pattern:
            folder = self.text.partition("*")[0].rpartition("/")[0]
            return (not self.local or status_of(folder or ".") is not None) and bool(self.files.names)
        return not self.local or status_of(self.text) is not None

    @cached_property
    def files(self) -> Files:
        """The files, two levels deep; this is slow for a folder of a million images, so call :meth:`has` first.

        Raises:
            PoolError: There is nothing at the location, or it cannot be listed.
        """
        return Files.at(self.text)

    def has(self, *endings: str) -> bool:
        """Return whether a name two levels deep may end in one of ``endings``; fast, because it only reads names."""
        if not self.exists:
            return False
        if not self.is_folder:
            return any(name.lower().endswith(endings) for name in self.files.names)
        return self._names is None or any(name.lower().endswith(endings) for name in self._names)

    @cached_property
    def _names(self) -> list[str] | None:
        """The names in the folder and its subfolders; None if there are symlinks to folders."""
        result: list[str] = []
        for here, inner, names in folders_below(self.text):
            if any(os.path.islink(os.path.join(here, name)) for name in inner):
                return None
            result += [*inner, *names]
            if here != self.text:
                inner.clear()
        return result


def refuse_inside(data: str | os.PathLike[str], out: AnyPath) -> None:
    """Refuse a result inside a folder of data, before any work: the next command would read it as data.

    Args:
        data: The location of the data.
        out: The folder or file to write.

    Raises:
        OutputError: It is inside the folder.
    """
    where = os.fspath(data)
    if isinstance(out, RemotePath):
        inside = "://" in where and out.url.startswith(f"{where.rstrip('/')}/")
    else:
        here = os.path.realpath(expanded(where))
        inside = os.path.isdir(here) and (os.path.realpath(out) + os.sep).startswith(os.path.join(here, ""))
    if inside:
        raise OutputError(f"{out}: is inside the data folder; choose a folder elsewhere")
