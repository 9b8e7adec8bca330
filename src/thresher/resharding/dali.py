"""What NVIDIA DALI reads of tars with ``index_paths``, as its ``wds2idx`` writes it: an index next to each tar."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from thresher.errors import OutputError
from thresher.io.tar_index import ENDING, IndexProblem, index_of
from thresher.resharding.indexes import WrittenTar
from thresher.runtime.files import writing
from thresher.runtime.format import counted


def is_ready(_: Path) -> str:
    """Return "": indexes may be of other tars, so they are compared."""
    return ""


def index(tar: WrittenTar) -> bool:
    """Write the index of a tar, unless it is there, and return whether the tar has samples; without any it gets none.

    Raises:
        OutputError: A name has white space.
    """
    if not tar.samples:
        return False
    path = tar.path.with_suffix(ENDING)
    try:
        content = index_of(tar.samples)
    except IndexProblem as problem:
        raise OutputError(
            f"{tar.path}: an index of DALI {problem}; rename these samples, or write without --for-dali"
        ) from None
    if not path.is_file() or path.read_bytes() != content:
        with writing(path) as scratch:
            Path(scratch).write_bytes(content)
    return True


def finish(out: Path, found: Mapping[str, bool]) -> str:
    """Return what was written, as a sentence."""
    written = sum(found.values())
    empty = len(found) - written
    left = f"; there is none for {counted(empty, 'tar')} without samples, which DALI refuses" if empty else ""
    return f"DALI reads {out} by {counted(written, 'index', 'indexes')} next to the tars{left}"
