"""What NVIDIA DALI reads of tars with ``index_paths``, as its ``wds2idx`` writes it: an index next to each tar."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from thresher.errors import OutputError
from thresher.io.tar_index import ENDING, IndexProblem, index_of
from thresher.resharding.tars import scan
from thresher.runtime.engine import Engine
from thresher.runtime.files import writing
from thresher.runtime.format import counted


def prepare(out: Path, names: Sequence[str], engine: Engine) -> str:
    """Write the index of each tar. A tar without samples gets none: DALI refuses empty ones.

    Args:
        out: The folder of the tars.
        names: The tars, in order.
        engine: Where they are read.

    Returns:
        What was written, as a sentence.

    Raises:
        PoolError: A tar is damaged.
        OutputError: A name has white space.
    """
    written = sum(engine.map(partial(_indexed, out), names))
    empty = len(names) - written
    left = f"; there is none for {counted(empty, 'tar')} without samples, which DALI refuses" if empty else ""
    return f"DALI reads {out} by {counted(written, 'index', 'indexes')} next to the tars{left}"


def _indexed(out: Path, name: str) -> bool:
    """Write the index of a tar, unless it is there; return whether the tar has samples."""
    path, index = out / name, (out / name).with_suffix(ENDING)
    scanned = scan(path)
    if not len(scanned.keys):
        return False
    assert scanned.headers is not None  # noqa: S101 - it is a tar
    headers = scanned.headers(np.arange(len(scanned.keys)))
    try:
        content = index_of(map(headers.rows, range(len(headers))))
    except IndexProblem as problem:
        raise OutputError(
            f"{path}: an index of DALI {problem}; rename these samples, or write without --for-dali"
        ) from None
    if not index.is_file() or index.read_bytes() != content:
        with writing(index) as scratch:
            Path(scratch).write_bytes(content)
    return True
