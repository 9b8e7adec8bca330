"""Files written whole or not at all, and what may stand in the way."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import tempfile
import tokenize
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from thresher.errors import OutputError
from thresher.runtime.locks import alive

# What NumPy raises for a damaged array.
DAMAGED = (ValueError, EOFError, TypeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile)


class writing:  # noqa: N801 - reads as a verb: with writing(path) as scratch
    """Give a scratch file beside ``path`` that takes its place when the block ends well, else vanishes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Remember the target; nothing is touched before the block begins."""
        self.path = Path(path)
        self.scratch = ""

    def __enter__(self) -> str:
        """Create the scratch file; raises OutputError where that cannot be."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, self.scratch = tempfile.mkstemp(
                dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".tmp" + self.path.suffix
            )
            os.close(handle)
            os.chmod(self.scratch, 0o666 & ~_umask())
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        return self.scratch

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Move into place, or remove; an operating system's refusal becomes an OutputError."""
        try:
            if kind is None:
                os.replace(self.scratch, self.path)
        except OSError as refused:
            raise _cannot_write(self.path, refused) from None
        finally:
            if os.path.exists(self.scratch):
                os.unlink(self.scratch)
        if isinstance(error, OSError):
            raise _cannot_write(self.path, error) from None


@contextmanager
def writing_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a scratch folder beside ``folder`` that takes its place when the block ends well, else vanishes."""
    target = Path(folder)
    if target.is_symlink():
        target = target.resolve()  # what it points to is replaced, not the link
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.{os.getpid()}.", suffix=".tmp"))
        try:
            yield scratch
            for path in scratch.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            scratch.chmod(0o777 & ~_umask())
            if not target.exists():
                scratch.rename(target)
            elif not _exchange(scratch, target):
                # Where the system cannot swap two folders there is a moment without the target.
                was = scratch.with_suffix(".old")
                target.rename(was)
                try:
                    scratch.rename(target)
                except OSError:
                    was.rename(target)
                    raise
                shutil.rmtree(was, ignore_errors=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step, where Linux and the file system can; says whether it was done."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here = -100  # AT_FDCWD; the last argument is RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(a.absolute()), here, os.fsencode(b.absolute()), 2) == 0)


def _sweep(target: Path) -> None:
    """Remove scratch folders of the same target whose writer was killed."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        writer = path.name.removeprefix(f".{target.name}.").split(".")[0]
        if writer.isdecimal() and not alive(int(writer)):
            shutil.rmtree(path, ignore_errors=True)


def only(folder: Path, names: Iterable[str]) -> None:
    """Refuse to replace a folder that holds anything but the results named: it would be lost.

    Raises:
        OutputError: Names what is in the way.
    """
    others = sorted(path.name for path in folder.iterdir() if path.name not in names) if folder.is_dir() else []
    if others:
        raise OutputError(f"{folder}: also holds {', '.join(others[:3])}; move that elsewhere, or choose another name")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def probe(folder: str | os.PathLike[str]) -> None:
    """Raise an OutputError now if a folder could not be written later; leaves nothing behind."""
    target = Path(folder)
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        if target.is_symlink() and not target.exists():
            raise FileNotFoundError(errno.ENOENT, "is a link to nothing")


def _cannot_write(path: Path, error: OSError) -> OutputError:
    hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "choose another place"
    return OutputError(f"{path}: cannot be written ({error.strerror or error}); {hint}")


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write (a full disk, a missing right) into an OutputError."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from None
