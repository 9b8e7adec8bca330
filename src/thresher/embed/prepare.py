"""What decode workers do: stored pictures to pixels as an encoder wants them, captions to tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.data.samples import Place
from thresher.errors import PoolError, UsageError
from thresher.io.open import open_file
from thresher.io.pictures import NARROW, open_rgb, thumbnail

Pixels = npt.NDArray[np.uint8]
Tokens = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Slots:
    """A file in memory by which workers hand pixels over: ``count`` places for a task's pictures."""

    path: str
    count: int
    shape: tuple[int, ...]

    def open(self) -> Pixels:
        """Map the file: (count, rows, H, W, 3) uint8."""
        return np.memmap(self.path, np.uint8, "r+", shape=(self.count, *self.shape))


@dataclass(frozen=True)
class Preparing:
    """How samples are made ready for an encoder.

    Attributes:
        preprocess: RGB picture to (H, W, 3) uint8; None where pictures are not wanted.
        tokenize: Captions to arrays; None where they are not wanted.
        limit: Pixels that a picture may have.
        thumbnail: Pixels of the longer side of a small copy; 0 for none.
        slots: Where pixels go, None to hand them over as they are.
    """

    preprocess: Callable[[Any], Pixels] | None
    tokenize: Callable[[Sequence[str]], Tokens] | None
    limit: int
    thumbnail: int = 0
    slots: Slots | None = None


@dataclass(frozen=True)
class Task:
    """Samples to make ready together.

    Attributes:
        slot: Which of the slots their pixels go to.
        pictures: Stored pictures, or where they are; () where they are not wanted.
        texts: Captions; () where they are not wanted.
    """

    slot: int
    pictures: tuple[bytes | Place, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Ready:
    """Samples made ready.

    Attributes:
        pixels: (rows, H, W, 3) uint8, of bad pictures arbitrary; None where they are in the slot or not wanted.
        tokens: Arrays of a row a caption.
        sizes: Width and height of every picture, (rows, 2) int32.
        thumbnails: Small WebP copies, one a row.
        bad: Rows whose picture cannot be used, and why.
    """

    pixels: Pixels | None
    tokens: Tokens | None
    sizes: npt.NDArray[np.int32]
    thumbnails: list[bytes]
    bad: dict[int, str]


def prepare(how: Preparing, task: Task) -> Ready:
    """Make samples ready; a picture that cannot be used says why."""
    found = np.zeros((len(task.pictures), 2), np.int32)
    thumbnails: list[bytes] = []
    bad: dict[int, str] = {}
    pixels: Pixels | None = how.slots.open()[task.slot] if how.slots and task.pictures else None
    for i, data in enumerate(_read(task.pictures)):
        thumbnails += [b""] if how.thumbnail else []
        try:
            if isinstance(data, PoolError):
                raise data
            picture = open_rgb(data, limit=how.limit)
            found[i] = picture.size
            if max(picture.size) > NARROW * min(picture.size):
                raise PoolError(f"is a picture of {picture.width:,} x {picture.height:,} pixels, too narrow to scale")
            assert how.preprocess is not None  # noqa: S101 - else there are no pictures in the task
            one = how.preprocess(picture)
            if one.dtype != np.uint8:
                raise UsageError(
                    f"the encoder's preprocess gives {one.dtype} {one.shape}; it is to give uint8 (H, W, 3)"
                )
            if pixels is None:
                pixels = np.empty((len(task.pictures), *one.shape), np.uint8)
            pixels[i] = one
            if how.thumbnail:
                thumbnails[i] = thumbnail(picture, how.thumbnail)
        except (PoolError, ValueError) as error:  # ValueError: of the encoder's own preprocessing
            bad[i] = str(error)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this process has one core to itself
    tokens = how.tokenize(task.texts) if how.tokenize and task.texts else None
    return Ready(None if how.slots else pixels, tokens, found, thumbnails, bad)


def _read(pictures: Sequence[bytes | Place]) -> Iterator[bytes | PoolError]:
    """Yield stored pictures, opening each file once as long as they follow each other in it."""
    with ExitStack() as held:
        at, file = "", None
        for one in pictures:
            if isinstance(one, bytes):
                yield one
                continue
            try:
                if file is None or at != one.path:
                    held.close()
                    at, file = one.path, held.enter_context(open_file(one.protocol, one.path))
                yield one.read_from(file)
            except PoolError as error:
                at, file = "", None
                yield PoolError(str(error).removeprefix(f"{one.path}: "))
