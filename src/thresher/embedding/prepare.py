"""The work of decode workers: stored images to pixels for an encoder, captions to tokens."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.data.samples import Place
from thresher.embedding.quality import measured
from thresher.errors import PoolError, UnreachedError, UsageError
from thresher.io.open import open_file
from thresher.io.pictures import NARROW, open_rgb, thumbnail

Pixels = npt.NDArray[np.uint8]
Tokens = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Slots:
    """A file in shared memory through which workers return pixels: ``count`` slots, each for the images of a task."""

    path: str
    count: int
    shape: tuple[int, ...]

    def open(self) -> Pixels:
        """Map the file: (count, rows, H, W, 3) uint8."""
        return np.memmap(self.path, np.uint8, "r+", shape=(self.count, *self.shape))


@dataclass(frozen=True)
class DecodeOptions:
    """How samples are prepared for an encoder.

    Attributes:
        preprocess: Converts an RGB image to (H, W, 3) uint8; None if images are not embedded.
        tokenize: Converts captions to arrays; None if captions are not embedded.
        limit: Most pixels of an image.
        thumbnail: Pixels of the longer side of a thumbnail; 0 for none.
        slots: Where to write pixels, None to return them.
        quality: Names of the columns to compute from every image.
    """

    preprocess: Callable[[Any], Pixels] | None
    tokenize: Callable[[Sequence[str]], Tokens] | None
    limit: int
    thumbnail: int = 0
    slots: Slots | None = None
    quality: tuple[str, ...] = ()


@dataclass(frozen=True)
class DecodeTask:
    """Samples to prepare together.

    Attributes:
        slot: Number of the slot for their pixels.
        pictures: Stored images, or their places; () if images are not embedded.
        texts: Captions; () if captions are not embedded.
    """

    slot: int
    pictures: tuple[bytes | Place, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Decoded:
    """Prepared samples.

    Attributes:
        pixels: (rows, H, W, 3) uint8, arbitrary for bad images; None if they are in the slot or not wanted.
        tokens: Arrays with one row per caption.
        sizes: Width and height of every image, (rows, 2) int32.
        thumbnails: WebP thumbnails, one per row.
        bad: Rows whose image cannot be used, and why.
        unreached: Why an image was not reached, "" if all were: then the samples must not be used.
        quality: Computed columns by row.
    """

    pixels: Pixels | None
    tokens: Tokens | None
    sizes: npt.NDArray[np.int32]
    thumbnails: list[bytes]
    bad: dict[int, str]
    unreached: str = ""
    quality: dict[int, dict[str, Any]] = field(default_factory=dict)


def prepare(options: DecodeOptions, task: DecodeTask) -> Decoded:
    """Prepare samples for an encoder; ``bad`` of the result lists images that cannot be used.

    Raises:
        ChangedError: An image changed while it was read.
        MemoryError: There is too little memory to decode an image.
    """
    try:
        return _prepared(options, task)
    except UnreachedError as error:
        return Decoded(None, None, np.zeros((0, 2), np.int32), [], {}, str(error))


def _prepared(options: DecodeOptions, task: DecodeTask) -> Decoded:
    sizes = np.zeros((len(task.pictures), 2), np.int32)
    thumbnails: list[bytes] = []
    bad: dict[int, str] = {}
    quality: dict[int, dict[str, Any]] = {}
    pixels: Pixels | None = options.slots.open()[task.slot] if options.slots and task.pictures else None
    for i, data in enumerate(_read(task.pictures)):
        thumbnails += [b""] if options.thumbnail else []
        try:
            if isinstance(data, PoolError):
                raise data
            picture = open_rgb(data, limit=options.limit)
            sizes[i] = picture.size
            if max(picture.size) > NARROW * min(picture.size):
                raise PoolError(f"is an image of {picture.width:,} x {picture.height:,} pixels, too narrow to resize")
            assert options.preprocess is not None  # noqa: S101 - else there are no images in the task
            one = options.preprocess(picture)
            if one.dtype != np.uint8:
                raise UsageError(
                    f"the encoder's preprocess returns {one.dtype} {one.shape}; it must return uint8 (H, W, 3)"
                )
            if pixels is None:
                pixels = np.empty((len(task.pictures), *one.shape), np.uint8)
            pixels[i] = one
            if options.thumbnail:
                thumbnails[i] = thumbnail(picture, options.thumbnail)
            if options.quality:
                quality[i] = measured(options.quality, data, picture)
        except (PoolError, ValueError) as error:  # ValueError: from the encoder's preprocessing
            bad[i] = str(error)
    if multiprocessing.parent_process() is not None:  # a worker: each uses one core. The user's process stays as it is
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokens = options.tokenize(task.texts) if options.tokenize and task.texts else None
    return Decoded(None if options.slots else pixels, tokens, sizes, thumbnails, bad, quality=quality)


def _read(pictures: Sequence[bytes | Place]) -> Iterator[bytes | PoolError]:
    """Yield stored images; consecutive images of one file are read with the file opened once."""
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
