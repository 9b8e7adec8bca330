"""Remote places to write to and to read small results from, anywhere fsspec reaches."""

from __future__ import annotations

import atexit
import os
import posixpath
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from thresher.errors import OutputError, PoolError, ThresherError, UsageError
from thresher.io.hub import pinned, refuse_to_write
from thresher.io.open import meaning_of, open_file, protocol_of
from thresher.io.paths import is_unsafe
from thresher.io.remote import file_system, requested
from thresher.runtime.locks import scratch_folder
from thresher.runtime.places import UPLOADING, AnyPath, RemotePath, Status, files_below, local_path

_T = TypeVar("_T")

_CHUNK = 1 << 22  # bytes read at a time
# Where a file appears as a whole once it is written. Elsewhere it is written under another name and moved.
_OBJECTS = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2", "hf", "memory"))
_EXISTS = ("PreconditionFailed", "ConditionalRequestConflict", "conditionNotMet")  # what servers answer
_READ_ONLY = frozenset(("http", "https"))
_CHANGED = ("LastModified", "last_modified", "updated", "mtime", "created", "ctime")


def place(location: AnyPath | str | os.PathLike[str], *, reads: bool = False) -> AnyPath:
    """Return where a result is to be written: a local path, or a remote one for an address such as ``s3://bucket/out``.

    Args:
        location: The path or address.
        reads: Whether it is only read.

    Raises:
        UsageError: The address names no file or folder, or nothing can be written there.
        MissingExtraError: Its file system needs an extra that is not installed.
    """
    if isinstance(location, RemotePath):
        return location
    text = os.fspath(location)
    protocol, mark, rest = text.partition("://")
    if not mark or protocol in ("file", "local"):
        return Path(rest) if mark else local_path(text)
    if protocol in _READ_ONLY:
        raise UsageError(f"{text}: cannot be written to; give a folder, or an address such as s3://bucket/folder")
    if not rest.strip("/"):
        raise UsageError(f"{text}: names no file or folder; give an address such as {protocol}://bucket/folder")
    file_system(text)  # unknown protocols, missing packages
    if not reads:
        refuse_to_write(text)
    return FsspecPath(f"{protocol}://{rest.rstrip('/')}")


def located(location: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the protocol and the path of a file to read, as the readers of files take them."""
    text = os.fspath(location)
    if "://" not in text:
        return "file", text
    fs, path = file_system(text)
    return protocol_of(fs), path


@dataclass(frozen=True)
class FsspecPath(RemotePath):
    """A file or folder on a file system of fsspec; every request is tried again while the network fails."""

    def _asked(self, what: Callable[[Any, str], _T]) -> _T:
        fs, path = file_system(self.url)
        return requested(self.url, lambda: what(fs, path))

    def _info(self) -> dict[str, Any] | None:
        def info(fs: Any, path: str) -> dict[str, Any] | None:
            fs.invalidate_cache(posixpath.dirname(path))  # other processes write there too
            with _IfThere(self.url):
                return dict(fs.info(path))
            return None

        return self._asked(info)

    def status(self) -> Status | None:
        """Return the status of a file, None if there is no file."""
        info = self._info()
        if info is None or info.get("type") == "directory":
            return None
        changed = next((info[name] for name in _CHANGED if info.get(name) is not None), 0.0)
        return Status(int(info.get("size") or 0), _seconds(changed))

    def entries(self) -> dict[str, int | None]:
        """Return the names in a folder and the size of each, None for a folder; empty if there is none."""

        def listed(fs: Any, path: str) -> dict[str, int | None]:
            fs.invalidate_cache(path)
            entries: list[dict[str, Any]] = []
            with _IfThere(self.url):
                entries = fs.ls(path, detail=True)
            own = path.strip("/")
            return {
                entry["name"].rstrip("/").rpartition("/")[2]: None
                if entry["type"] == "directory"
                else int(entry.get("size") or 0)
                for entry in entries
                if entry["name"].strip("/") != own
            }

        return self._asked(listed)

    def read_bytes(self) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: There is no such file.
        """

        def read(fs: Any, path: str) -> bytes | None:
            with _IfThere(self.url):
                return bytes(fs.cat_file(path))
            return None

        content = self._asked(read)
        if content is None:
            raise FileNotFoundError(f"{self.url}: no such file")
        return content

    def chunks(self) -> Iterator[bytes]:
        """Yield the content of a file in pieces."""
        with open_file(*located(self.url)) as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def download(self, target: Path) -> None:
        """Copy the file to a local one."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._asked(lambda fs, path: fs.get_file(path, str(target)))

    def upload(self, scratch: Path) -> None:
        """Replace the file by a local one; large files are sent in several parts at the same time.

        Raises:
            OutputError: It cannot be written.
        """
        with _writes(self.url):
            if self._is_object():
                self._asked(lambda fs, path: fs.put_file(str(scratch), path))
                return
            other = self.with_name(f".{self.name}.{secrets.token_hex(4)}.tmp")
            for name in self.parent.entries():  # of killed uploads of the same file: its writer holds a lock
                if (match := UPLOADING.fullmatch(name)) and match[1] == self.name:
                    self.with_name(name).unlink(missing_ok=True)

            def put(fs: Any, path: str) -> None:
                away = posixpath.join(posixpath.dirname(path), other.name)
                fs.makedirs(posixpath.dirname(path), exist_ok=True)
                fs.put_file(str(scratch), away)
                fs.mv(away, path)

            self._asked(put)

    def create(self, content: bytes) -> bool:
        """Create a file; return False if it exists."""

        def made(fs: Any, path: str) -> bool:
            try:
                if not self._is_object():
                    fs.makedirs(posixpath.dirname(path), exist_ok=True)
                fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if any(word in str(error) for word in _EXISTS):
                    return False
                raise
            return True

        with _writes(self.url):
            return self._asked(made)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""

        def remove(fs: Any, path: str) -> None:
            with _IfThere(self.url, missing_ok):
                fs.rm_file(path)

        with _writes(self.url):
            self._asked(remove)

    def now(self) -> float:
        """Return the time of the server in seconds since 1970."""
        written = self.with_name(f".{secrets.token_hex(8)}.tmp")
        written.create(b"")
        try:
            return written.stat().st_mtime
        finally:
            written.unlink(missing_ok=True)

    def _is_object(self) -> bool:
        return self.url.partition("://")[0] in _OBJECTS


class _IfThere:
    """Suppresses the error for a file that is not there; fsspec reports failed requests as that, too."""

    def __init__(self, url: str, suppresses: bool = True) -> None:
        self._url, self._suppresses = url, suppresses

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not self._suppresses or not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return False
        return isinstance(meaning_of(self._url, error), PoolError)


def _seconds(changed: Any) -> float:
    if isinstance(changed, datetime):
        return changed.timestamp()
    if isinstance(changed, str):
        try:
            return datetime.fromisoformat(changed).timestamp()
        except ValueError:
            return 0.0
    return float(changed)


@contextmanager
def _writes(url: str) -> Iterator[None]:
    """Say that a missing bucket is one of writing."""
    try:
        yield
    except PoolError as error:
        raise OutputError(f"{url}: cannot be written (no such bucket or folder); make it, or choose another") from error
    except NotImplementedError as error:
        raise OutputError(f"{url}: this file system cannot be written to; choose another place") from error


# --- copies of small results ----------------------------------------------------------------------


@contextmanager
def local_copy(location: str | os.PathLike[str] | RemotePath, holds: str = "") -> Iterator[Path]:
    """Yield a local path of a small result, such as a selection: a remote one is copied first.

    The copy stays until the process ends, so that its arrays can be mapped. Errors name the original.

    Args:
        location: The file or folder.
        holds: A file that the folder must have; without it, nothing is copied.

    Raises:
        PoolError: There is nothing at the location, or a folder without that file.
        UnreachedError: It was not reached.
    """
    remote = place(location, reads=True) if not isinstance(location, RemotePath) else location
    if not isinstance(remote, FsspecPath):
        yield Path(remote)  # type: ignore[arg-type]
        return
    copy = _copied(FsspecPath(pinned(remote.url)), holds)
    try:
        yield copy
    except ThresherError as error:
        if str(copy) not in str(error):
            raise
        raise type(error)(str(error).replace(str(copy), remote.url)) from error


def _copied(remote: FsspecPath, holds: str) -> Path:
    if holds and not (remote / holds).is_file():  # it may be anything, of any size
        raise PoolError(f"{remote}: has no {holds}; check the address")
    names = files_below(remote)
    if not names and not remote.is_file():
        raise PoolError(f"{remote}: nothing is there; check the address")
    top = _copies(os.getpid()) / secrets.token_hex(4)
    target = top / ("copy" if is_unsafe(remote.name) else remote.name)
    for name in names:
        (remote / name).download(_inside(target, name))
    if not names:
        remote.download(target)
    return target


def _inside(folder: Path, name: str) -> Path:
    if is_unsafe(name):
        raise PoolError(f"{name}: is not a safe name of a file")
    return folder / name


@lru_cache(maxsize=1)
def _copies(_process: int) -> Path:
    """Return the folder of copies of this process, which is removed at its end; also removes those of killed ones."""
    made = scratch_folder(tempfile.gettempdir(), "thresher-copies-", ".tmp", mode=0o700)
    atexit.register(made.remove)
    return made.path
