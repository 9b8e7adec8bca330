"""Opening local and remote files, and what an error in reading one means.

An error means one of three things, and only the first is about the file itself:

- *damage*: an allow-list of the errors that parsers raise. Reading again does not help;
- *not reached*: the network, the system or a permission. The file may be good, so it is never skipped;
- anything else, such as too little memory or a missing package, is raised unchanged; a full disk, on which a file
  system keeps copies, is an error of writing.
"""

from __future__ import annotations

import csv
import errno
import gzip
import io
import lzma
import os
import re
import socket
import ssl
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from thresher.errors import AccessError, OutputError, PoolError, ThresherError, UnreachedError
from thresher.runtime.memory import is_out_of_memory

_T = TypeVar("_T")
_BUFFER = 1 << 18  # bytes of a remote file that are buffered, for readers that read lines

# ValueError is the base of Arrow's invalid data, JSON, Unicode and NumPy header errors. EOFError: cut off.
_DAMAGE = (
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    tarfile.TarError,
    csv.Error,
)
_DOWN = frozenset(
    getattr(errno, name)
    for name in (
        "EIO EREMOTEIO ESTALE ENODEV ENXIO EAGAIN EBUSY ENETDOWN ENETUNREACH ENETRESET EHOSTDOWN EHOSTUNREACH ENOTCONN "
        "ETIMEDOUT"
    ).split()
    if hasattr(errno, name)
)
_VERSIONS = ("ETag", "etag", "blob_id", "xet_hash", "mtime", "LastModified", "created")
_NO_NAME = frozenset((errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG))
_TOKEN = re.compile(r"\bhf_\w{8,}")  # of the Hugging Face Hub
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
_TOO_MANY = frozenset((errno.EMFILE, errno.ENFILE))
# Names of classes in aiohttp, botocore, requests, httpx, http.client, Azure's and Google's libraries.
_NO_CONNECTION = frozenset(
    "ClientConnectionError ClientPayloadError HTTPClientError EndpointConnectionError ResponseStreamingError "
    "IncompleteReadError ConnectionError Timeout ChunkedEncodingError TransportError IncompleteRead RemoteDisconnected "
    "ServiceRequestError ServiceResponseError ServiceUnavailable".split()
)
_NO_ACCESS = frozenset(
    "NoCredentialsError PartialCredentialsError CredentialRetrievalError TokenRetrievalError UnauthorizedSSOTokenError "
    "SSOTokenLoadError NoAuthTokenError ClientAuthenticationError RefreshError DefaultCredentialsError".split()
)
_NO_ACCESS_CODES = frozenset(("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestExpired", "AccessDenied"))


def protocol_of(fs: Any) -> str:
    """Return the protocol name of a file system, as fsspec accepts it."""
    name = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return "file" if name == "local" else str(name)


def open_file(protocol: str, path: str) -> IO[bytes]:
    """Open a local or remote file for reading.

    Raises:
        PoolError: There is no such file, or it is not a regular file.
        UnreachedError: It was not reached; a network error has been tried again.
        AccessError: Access was denied.
    """
    if protocol != "file":
        from thresher.io.remote import RemoteFile

        return io.BufferedReader(RemoteFile(protocol, path), _BUFFER)

    def opened() -> IO[bytes]:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise PoolError(f"{path}: is a pipe or a device, not a regular file; give a file")
        return open(path, "rb")

    return trusting(path, opened)


def status_of(path: str) -> os.stat_result | None:
    """Return the status of a local path, None if nothing is there. For ``os.path.exists`` an error means nothing.

    Raises:
        UnreachedError: The system does not say whether something is there.
        AccessError: Access was denied.
    """
    try:
        return trusting(path, lambda: os.stat(path))
    except PoolError:  # there is nothing, or the name is not valid
        return None


def regular_file(path: str) -> os.stat_result | None:
    """Return the status of a local file, None if there is no regular file at the path; see :func:`status_of`."""
    status = status_of(path)
    return status if status is not None and stat.S_ISREG(status.st_mode) else None


def file_stamp(protocol: str, path: str) -> list[Any]:
    """Return the size and version of a file, which change with the file."""
    if protocol == "file":
        status = trusting(path, lambda: os.stat(path))
        return [status.st_size, status.st_mtime_ns]
    from thresher.io.remote import info_of

    info = info_of(protocol, path)
    return [info.get("size"), version_in(info)]


def version_in(info: dict[str, Any]) -> str:
    """Return the version of a file (ETag, hash or time) from its fsspec info, "" if it has none."""
    return next((str(info[name]) for name in _VERSIONS if info.get(name)), "")


def trusting(path: str, what: Callable[[], _T]) -> _T:
    """Call ``what``, which reads a file, and raise what its errors mean; see :func:`meaning_of`.

    Raises:
        PoolError: The file is missing or damaged.
        UnreachedError: The network or the file system does not respond.
        AccessError: Access was denied.
    """
    try:
        return what()
    except ThresherError:
        raise
    except Exception as error:
        if (meaning := meaning_of(path, error)) is None:
            raise
        raise meaning from error


def meaning_of(path: str, error: Exception) -> ThresherError | None:
    """Return what an error in reading a file means for the user.

    Args:
        path: The file, for the message.
        error: Any error.

    Returns:
        A PoolError for a file that is missing or damaged, an UnreachedError for one that was not reached, an
        AccessError if access was denied, an OutputError if a local copy of it does not fit on the disk; None for all
        other errors, which are not about the file.
    """
    for one in _causes(error):  # fsspec reports any failed request as FileNotFoundError
        text = next(iter(str(one).splitlines()), "") or type(one).__name__
        if _denied(one):
            return AccessError(
                f"{path}: not reached: access was denied ({_without_tokens(text)}); {_permission(one)}, then run the "
                "same command again"
            )
        if isinstance(one, OSError) and one.errno in _TOO_MANY:
            return UnreachedError(
                f"{path}: not reached: too many files are open; raise the limit, for example with ulimit -n 4096, then "
                "run the same command again"
            )
        if isinstance(one, OSError) and one.errno in _FULL:
            return OutputError(f"{path}: a copy of it cannot be written ({text}); free some space")
        if _unreached(one):
            return UnreachedError(f"{path}: network or system error ({_without_tokens(text)}); retry later")
    if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
        return PoolError(f"{path}: no such file (or a broken symlink); check the name")
    if isinstance(error, IsADirectoryError):
        return PoolError(f"{path}: is a folder; give a file")
    if isinstance(error, OSError) and error.errno in _NO_NAME:
        return PoolError(f"{path}: no such file ({error.strerror}); check the name")
    if _damaged(error):
        text = _without_tokens(next(iter(str(error).splitlines()), "") or type(error).__name__)
        return PoolError(f"{path}: cannot be read, it may be truncated or damaged ({text}); replace or remove it")
    return None


def _permission(error: BaseException) -> str:
    """Return what to do if access was denied; on the Hub, private and missing repositories get the same answer."""
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("huggingface_hub")}
    if "GatedRepoError" in names:
        return "it is gated: accept its terms on its page on the Hub and type hf auth login"
    if "RepositoryNotFoundError" in names:
        return "there is no such repository, or it is private: check the name, or type hf auth login"
    return "type hf auth login" if names else "get permission or renew the credentials"


def _without_tokens(text: str) -> str:
    return _TOKEN.sub("hf_...", text)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that it was raised from."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__


def _status(error: BaseException) -> int:
    """Return the HTTP status that an error carries, 0 if none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        found = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        found = [getattr(error, name, None) for name in ("status", "status_code", "code")]
        found += [getattr(response, name, None) for name in ("status_code", "status")]
    return next((int(one) for one in found if isinstance(one, int) and 100 <= one < 600), 0)


def _denied(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else ""
    return (
        isinstance(error, PermissionError)
        or _status(error) in (401, 403, 407)
        or code in _NO_ACCESS_CODES
        or not _NO_ACCESS.isdisjoint(kind.__name__ for kind in type(error).__mro__)
    )


def _unreached(error: BaseException) -> bool:
    status = _status(error)
    return (
        isinstance(error, (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError))
        or (isinstance(error, OSError) and error.errno in _DOWN)
        or not _NO_CONNECTION.isdisjoint(kind.__name__ for kind in type(error).__mro__)
        or status in (408, 425, 429)
        or status >= 500
    )


def _damaged(error: BaseException) -> bool:
    """Return whether an error is one that parsers raise for a damaged file."""
    if is_out_of_memory(error):  # also if a library says so in text only, such as Arrow without a new thread
        return False
    if isinstance(error, _DAMAGE):
        return True
    if isinstance(error, OSError) and error.errno == errno.EINVAL:  # a position in the file that cannot be
        return True
    if isinstance(error, (AttributeError, LookupError, TypeError)) and _raised_in(error, "/huggingface_hub/"):
        return True  # the answer of a server that is not the Hub
    if _status(error) == 416:  # the file is shorter than its listing says
        return True
    arrow = sys.modules.get("pyarrow")
    if arrow is None:
        return False
    if isinstance(error, arrow.ArrowException):
        return not isinstance(error, arrow.ArrowCancelled)
    return isinstance(error, OSError) and error.errno is None and _raised_in(error, "pyarrow/", at_start=True)


def _raised_in(error: BaseException, folder: str, *, at_start: bool = False) -> bool:
    """Return whether a package itself raised an error, not the file it reads: for damage, Arrow raises a bare OSError.

    Arrow's compiled files have paths that start with its folder.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    path = "" if trace is None else trace.tb_frame.f_code.co_filename.replace("\\", "/")
    return path.startswith(folder) if at_start else folder in path
