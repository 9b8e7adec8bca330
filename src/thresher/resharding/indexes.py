"""Indexes next to new tars, for programs that need them; every tar is read once, however many programs that are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from thresher.data.layouts.webdataset import TarPart
from thresher.data.parts import Ints
from thresher.errors import PoolError
from thresher.io.tar import TAR_BLOCK, Row
from thresher.runtime.engine import Engine


class WrittenTar(NamedTuple):
    """A tar that was written.

    Attributes:
        path: Its file.
        samples: The headers of each of N samples.
        edges_n: Where each sample begins, and where the last one ends; (N + 1,).
    """

    path: Path
    samples: Sequence[Sequence[Row]]
    edges_n: Ints


class Reader(Protocol):
    """What a program that reads tars needs besides them: a module of this package."""

    def is_ready(self, out: Path) -> str:
        """Return that all is there already, as a sentence; "" if it is not, or is to be checked."""
        ...

    def index(self, tar: WrittenTar) -> Any:
        """Write the index of a tar, and return what :meth:`finish` needs of it."""
        ...

    def finish(self, out: Path, found: Mapping[str, Any]) -> str:
        """Write what is there once, and return what was written, as a sentence; ``found`` is by name of the tar."""
        ...


def prepare(out: Path, names: Sequence[str], readers: Sequence[Reader], engine: Engine) -> list[str]:
    """Write what some programs need, unless it is there: the same again changes nothing.

    Args:
        out: The folder of the tars.
        names: The tars, in order.
        readers: The programs.
        engine: Where the tars are read.

    Returns:
        A sentence for each program.

    Raises:
        PoolError: A tar is damaged.
        OutputError: A name cannot be in an index.
    """
    ready = [reader.is_ready(out) for reader in readers]
    missing = [reader for reader, said in zip(readers, ready, strict=True) if not said]
    task = partial(_indexed, out, [reader.index for reader in missing])
    found = dict(zip(names, engine.map(task, names), strict=True)) if missing else {}
    done = (reader.finish(out, {name: of[i] for name, of in found.items()}) for i, reader in enumerate(missing))
    return [said or next(done) for said in ready]


def _indexed(out: Path, indexes: Sequence[Callable[[WrittenTar], Any]], name: str) -> list[Any]:
    tar = _read(out / name)
    return [index(tar) for index in indexes]


def _read(path: Path) -> WrittenTar:
    scanned = TarPart(str(path)).scan()
    if scanned.damage or scanned.skipped:
        raise PoolError(f"{path}: {scanned.damage or scanned.skipped[0][1]}; write it again with --overwrite")
    assert scanned.headers is not None  # noqa: S101 - it is a tar
    headers = scanned.headers(np.arange(len(scanned.keys)))
    ends_n = scanned.start_n + -(-np.abs(scanned.length_n) // TAR_BLOCK) * TAR_BLOCK
    edges_n = np.append(scanned.start_n, ends_n[-1] if len(ends_n) else 0)
    return WrittenTar(path, [headers.rows(i) for i in range(len(headers))], edges_n)
