"""Where results are written: a path on this machine, or a remote place with the same methods.

Functions that write take either. A file is written on this machine first and moved into place, or uploaded: an object
in object storage is there as a whole or not at all. A result of several files has its marker last.
"""

from __future__ import annotations

import fnmatch
import os
import posixpath
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from thresher.errors import UsageError

_R = TypeVar("_R", bound="RemotePath")

# Where a file does not appear as a whole, an upload writes a file of this name and moves it. A killed one leaves it.
UPLOADING = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class Status:
    """What is known about a remote file.

    Attributes:
        st_size: Bytes.
        st_mtime: Time of the last change in seconds since 1970, by the clock of the server; 0 if it is unknown.
    """

    st_size: int
    st_mtime: float


@dataclass(frozen=True)
class RemotePath(ABC):
    """A remote file or folder, with the methods of :class:`pathlib.Path` that results need.

    Folders of object storage are only prefixes: they are there if something is in them.

    Attributes:
        url: The address, without a slash at the end.
    """

    url: str

    # --- to be implemented: each is one request or a few, tried again while the network fails ---

    @abstractmethod
    def status(self) -> Status | None:
        """Return the status of a file, None if there is no file."""

    @abstractmethod
    def entries(self) -> dict[str, int | None]:
        """Return the names in a folder and the size of each, None for a folder; empty if there is none."""

    @abstractmethod
    def read_bytes(self) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: There is no such file.
        """

    @abstractmethod
    def chunks(self) -> Iterator[bytes]:
        """Yield the content of a file in pieces."""

    @abstractmethod
    def upload(self, scratch: Path) -> None:
        """Replace the file by a local one, as a whole or not at all.

        Raises:
            OutputError: It cannot be written.
        """

    @abstractmethod
    def create(self, content: bytes) -> bool:
        """Create a file; return False if it exists. Of several processes one creates it, if the server can do that."""

    @abstractmethod
    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""

    @abstractmethod
    def now(self) -> float:
        """Return the time of the server in seconds since 1970, next to this file."""

    # --- paths ---

    def _at(self: _R, url: str) -> _R:
        return type(self)(url)

    def __truediv__(self: _R, name: str | Path) -> _R:
        """Return the path of a name in this folder."""
        return self._at(posixpath.join(self.url, str(name)))

    def __str__(self) -> str:
        """Return the address."""
        return self.url

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self: _R) -> _R:
        """The folder that this is in."""
        return self._at(self.url.rpartition("/")[0])

    def with_name(self: _R, name: str) -> _R:
        """Return the path of another name in the same folder."""
        return self.parent / name

    def with_suffix(self: _R, suffix: str) -> _R:
        """Return the path with another ending."""
        return self.with_name(posixpath.splitext(self.name)[0] + suffix)

    def relative_to(self, folder: RemotePath) -> str:
        """Return the part of the address below a folder."""
        return self.url.removeprefix(f"{folder.url}/")

    # --- files and folders ---

    def exists(self) -> bool:
        """Return whether there is a file or a folder with something in it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Return whether there is a file."""
        return self.status() is not None

    def is_dir(self) -> bool:
        """Return whether there is a folder with something in it."""
        return bool(self.entries())

    def is_symlink(self) -> bool:
        """Return False."""
        return False

    def stat(self) -> Status:
        """Return the status of a file.

        Raises:
            FileNotFoundError: There is no such file.
        """
        status = self.status()
        if status is None:
            raise FileNotFoundError(f"{self.url}: no such file")
        return status

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: writing a file makes its folders."""
        return

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the content of a file as text."""
        return self.read_bytes().decode(encoding, errors)

    def iterdir(self: _R) -> Iterator[_R]:
        """Yield what is in a folder; nothing if there is no folder."""
        for name in sorted(self.entries()):
            yield self / name

    def files(self: _R) -> Iterator[_R]:
        """Yield the files below a folder."""
        for name, size in sorted(self.entries().items()):
            if size is None:
                yield from (self / name).files()
            else:
                yield self / name

    def glob(self: _R, pattern: str) -> Iterator[_R]:
        """Yield the paths below a folder that match a pattern such as ``*/*.npy``."""
        first, _, rest = pattern.partition("/")
        for name, size in sorted(self.entries().items()):
            if fnmatch.fnmatchcase(name, first):
                if not rest:
                    yield self / name
                elif size is None:
                    yield from (self / name).glob(rest)


AnyPath: TypeAlias = Path | RemotePath


def as_path(path: AnyPath | str | os.PathLike[str]) -> AnyPath:
    """Return a remote path as it is, and anything else as a local path.

    Raises:
        UsageError: It is the text of an address, where only a local path can be used.
    """
    return path if isinstance(path, RemotePath) else local_path(path)


def expanded(location: str | os.PathLike[str]) -> str:
    """Return a location with the home folder in place of a first ``~``, unless a file here has that very name.

    A shell does so only at the start of a word, not in ``--out=~/sel``, and Python never does.
    """
    text = os.fspath(location)
    return text if "://" in text or os.path.lexists(text) else os.path.expanduser(text)


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a local path, :func:`expanded`.

    Raises:
        UsageError: It is an address: a folder of that name would be made here.
    """
    if "://" in os.fspath(path):
        raise UsageError(f"{os.fspath(path)}: is an address; here only a folder or file on this machine can be used")
    return Path(expanded(path))


def files_below(folder: AnyPath) -> list[str]:
    """Return the names of all files below a folder, relative to it, sorted."""
    if isinstance(folder, RemotePath):
        return sorted(path.relative_to(folder) for path in folder.files())
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def sizes_in(folder: AnyPath) -> dict[str, int]:
    """Return the files in a folder and their sizes: one listing."""
    if isinstance(folder, RemotePath):
        return {name: size for name, size in folder.entries().items() if size is not None}
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def remove_tree(folder: AnyPath) -> None:
    """Remove a folder with everything in it, as far as possible.

    Lock files are the last: a process that waits for one does not take files that are about to go for its own.
    """
    if isinstance(folder, RemotePath):
        for path in sorted(folder.files(), key=lambda path: path.name == "lock"):
            path.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
