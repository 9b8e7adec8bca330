"""Opening local and remote files; which errors mean a damaged file, and which one that cannot be reached."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import IO, Any, TypeVar

from thresher.errors import PoolError, ThresherError, UnreachedError

_T = TypeVar("_T")
_DOWN = frozenset(
    getattr(errno, name)
    for name in ("ESTALE", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN", "EMFILE", "ENFILE")
    if hasattr(errno, name)
)
_NO_CONNECTION = ("ClientConnectionError", "HTTPClientError", "EndpointConnectionError")  # of aiohttp and botocore


def protocol_of(fs: Any) -> str:
    """Return the protocol name of a file system, as fsspec accepts it."""
    name = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return "file" if name == "local" else str(name)


def open_file(protocol: str, path: str) -> IO[bytes]:
    """Open a local or remote file for reading; raises a PoolError that names the file if it cannot be opened."""

    def opened() -> IO[bytes]:
        if protocol == "file":
            if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
                raise PoolError(f"{path}: is a pipe or a device, not a regular file; give a file")
            return open(path, "rb")
        import fsspec

        return fsspec.filesystem(protocol).open(path, "rb")  # type: ignore[no-any-return]

    return trusting(path, opened)


def file_stamp(protocol: str, path: str) -> list[Any]:
    """Return the size and version of a file, which change with the file."""
    if protocol == "file":
        stat = trusting(path, lambda: os.stat(path))
        return [stat.st_size, stat.st_mtime_ns]
    import fsspec

    info = trusting(path, lambda: fsspec.filesystem(protocol).info(path))
    return [info.get("size"), version_in(info)]


def version_in(info: dict[str, Any]) -> str:
    """Return the version of a file (ETag or time) from its fsspec info, "" if it has none."""
    return next((str(info[k]) for k in ("ETag", "etag", "mtime", "LastModified", "created") if k in info), "")


def trusting(path: str, what: Callable[[], _T]) -> _T:
    """Call ``what`` and turn any error that a damaged file causes into a PoolError that names the file.

    Raises:
        PoolError: The file is missing or damaged.
        UnreachedError: The network or the file system does not respond.
    """
    try:
        return what()
    except ThresherError:
        raise
    except FileNotFoundError:
        raise PoolError(f"{path}: no such file (or a broken symlink); check the name") from None
    except IsADirectoryError:
        raise PoolError(f"{path}: is a folder; give a file") from None
    except Exception as error:
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        if _unreached(error):
            raise UnreachedError(f"{path}: network or system error ({text}); retry later") from None
        raise PoolError(
            f"{path}: cannot be read, it may be truncated or damaged ({text}); replace or remove it"
        ) from None


def _unreached(error: Exception) -> bool:
    """Return whether an error is about the access to a file rather than the file itself."""
    status = getattr(error, "status", 0)  # of HTTP
    return (
        isinstance(error, (ConnectionError, TimeoutError))
        or (isinstance(error, OSError) and error.errno in _DOWN)
        or any(kind.__name__ in _NO_CONNECTION for kind in type(error).__mro__)
        or (isinstance(status, int) and (status in (408, 429) or 500 <= status < 600))
    )
