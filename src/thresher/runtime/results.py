"""Results that exist already: the same command again finds its own result, and a different result is refused.

A command that is given again, for example because it was killed after its result was complete, makes the result as
before in a temporary place and compares. Nothing has to be recorded in a result for that, and a comparison of bytes
also notices inputs that changed.
"""

from __future__ import annotations

import filecmp
import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from thresher.errors import OutputError
from thresher.runtime.files import UNFINISHED, check_writable, refuse_foreign_files, writing, writing_folder
from thresher.runtime.locks import sweep
from thresher.runtime.places import AnyPath, RemotePath, as_path, files_below
from thresher.runtime.untrusted import read_json

Name = str | os.PathLike[str] | RemotePath
Say = Callable[[str], None]


class _Done(Exception):
    """The result is there already."""


@contextmanager
def result_file(path: Name, *, overwrite: bool, say: Say | None = None) -> Iterator[str]:
    """Yield a temporary file that becomes the result at ``path``, unless the same file is there already.

    Args:
        path: The target.
        overwrite: Whether to replace a different file.
        say: Called with one line if the file is there already.

    Raises:
        OutputError: A different file is there and ``overwrite`` is false, or the file cannot be written.
    """
    with result_files(overwrite=overwrite, say=say) as new:
        yield str(new(path))


@contextmanager
def result_files(
    *, overwrite: bool, say: Say | None = None, replaces: Iterable[Name] = ()
) -> Iterator[Callable[[Name], Path]]:
    """Yield a function that makes a temporary file for a target; at the end of the block all become one result.

    They are moved into place in the opposite order: the last one first. Files that exist already and are the same are
    accepted; if all are, nothing is changed.

    Args:
        overwrite: Whether to replace different files.
        say: Called with one line if all files are there already.
        replaces: Files of an earlier result, which are removed if they are not part of the new one.

    Raises:
        OutputError: A different file is there and ``overwrite`` is false, or a file cannot be written.
    """
    made: dict[AnyPath, Path] = {}
    with suppress(_Done), ExitStack() as stack:

        def new(path: Name) -> Path:
            target = as_path(path)
            # Left by a killed process; of folders, :func:`writing_folder` removes them.
            if not isinstance(target, RemotePath):
                sweep(target.parent.glob(f".{glob.escape(target.name)}.????????.tmp{glob.escape(target.suffix)}"))
            made[target] = Path(stack.enter_context(writing(target)))
            return made[target]

        yield new
        _settle(made, overwrite, say)
        for old in {as_path(path) for path in replaces} - made.keys():
            old.unlink(missing_ok=True)


@contextmanager
def result_folder(folder: Name, *, overwrite: bool, marker: str = "", say: Say | None = None) -> Iterator[Path]:
    """Yield a temporary folder that becomes the result at ``folder``, as :func:`result_file` does for a file.

    ``marker`` is the file that says what the folder is; in a remote folder it is written last.
    """
    with suppress(_Done), writing_folder(folder, marker=marker) as scratch:
        yield scratch
        if not is_unfinished(as_path(folder)):
            _settle({as_path(folder): scratch}, overwrite, say)


def is_unfinished(folder: AnyPath) -> bool:
    """Return whether the upload of a result to a remote folder was interrupted."""
    return isinstance(folder, RemotePath) and (folder / UNFINISHED).exists()


def _settle(new: Mapping[AnyPath, Path], overwrite: bool, say: Say | None) -> None:
    """Compare new files or folders with their targets; raise _Done if all targets exist and are the same."""
    if overwrite:
        return
    there = [target for target in new if _is_there(target) and not _is_empty(target)]
    for target in there:
        if not _same(new[target], target):
            raise exists_already(target)
    if len(there) == len(new):
        if say is not None:
            say(f"{there[0]}: already done; nothing was changed")
        raise _Done


def _is_there(path: AnyPath) -> bool:
    return path.exists() if isinstance(path, RemotePath) else os.path.lexists(path)


def _is_empty(path: AnyPath) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _same(new: Path, old: AnyPath) -> bool:
    """Return whether two files, or two folders with all their files, have the same content."""
    try:
        if not new.is_dir():
            return _same_file(new, old)
        names = files_below(new)
        return names == files_below(old) and all(_same_file(new / name, old / name) for name in names)
    except OSError:  # it cannot be read
        return False


def _same_file(new: Path, old: AnyPath) -> bool:
    if not isinstance(old, RemotePath):
        return filecmp.cmp(new, old, shallow=False)
    if new.stat().st_size != old.stat().st_size:
        return False
    with open(new, "rb") as file:
        return all(file.read(len(chunk)) == chunk for chunk in old.chunks())


# --- before the work ------------------------------------------------------------------------------


def free_folder(out: Name, overwrite: bool, names: Sequence[str], *, compared: bool = False) -> AnyPath:
    """Return the folder of a result after checking, before any work, that it may be written.

    Args:
        out: The folder.
        overwrite: Whether an existing result may be replaced.
        names: File names of a result. The first one marks a folder as a result.
        compared: Whether an existing result is compared with the new one when that is saved, and accepted if it is the
            same.

    Raises:
        OutputError: It cannot be written, or contains files that must not be replaced.
    """
    target = as_path(out)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; give a folder")
    if target.exists() and any(target.iterdir()):
        if not (target / names[0]).exists() and not is_unfinished(target):
            raise OutputError(f"{target}: exists and is not a result of thresher; choose another name")
        if not overwrite and not compared and not is_unfinished(target):
            raise exists_already(target)
        refuse_foreign_files(target, names)
    check_writable(target)
    return target


def refuse_other(path: Name, known: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Refuse an existing result of another request before any work is done.

    Args:
        path: The result.
        known: What the result says about its request, by name.
        requested: The request, by name.

    Raises:
        OutputError: A value of ``requested`` is missing in ``known`` or is another.
    """
    if any(name not in known or known[name] != value for name, value in requested.items()):
        raise exists_already(path)


def record_in(path: Name) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is none."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def exists_already(path: Name) -> OutputError:
    """Return the error for a result that must not be replaced."""
    return OutputError(f"{as_path(path)}: exists already; choose another name or pass --overwrite")
