"""An encoder that needs no packages: fixed random projections of pixels and of words."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SIDE, WORDS, DIM = 12, 997, 24


def preprocess(picture: Any) -> np.ndarray:
    return np.asarray(picture.resize((SIDE, SIDE)))


def tokenize(texts: Sequence[str]) -> dict[str, np.ndarray]:
    rows = [[1 + zlib.crc32(word.encode()) % WORDS for word in text.split()][:9] or [1] for text in texts]
    width = max(map(len, rows))
    return {"ids": np.array([row + [0] * (width - len(row)) for row in rows], np.int64)}


class Toy:
    """Whole numbers in, so that sums do not depend on their order."""

    name, image_dim, text_dim = "tests.toy:Toy", DIM, DIM

    def __init__(self, device: str = "auto", precision: str = "auto", seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.pixels_WD = rng.integers(-3, 4, (SIDE * SIDE * 3, DIM)).astype(np.float32)
        self.words_WD = rng.integers(-9, 10, (1 + WORDS, DIM)).astype(np.float32)
        self.words_WD[0] = 0

    preprocess = staticmethod(preprocess)
    tokenize = staticmethod(tokenize)

    def encode_images(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        return pixels_BHWC.reshape(len(pixels_BHWC), -1).astype(np.float32) @ self.pixels_WD / 4096

    def encode_texts(self, tokens: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.words_WD[tokens["ids"]].sum(axis=1)

    def weights(self) -> str:
        return "toy"


class Slow(Toy):
    """The same, but a batch takes a while, so that something can happen meanwhile."""

    name = "tests.toy:Slow"

    def encode_images(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        time.sleep(0.15)
        return super().encode_images(pixels_BHWC)


class Other(Toy):
    """The same with other weights."""

    name = "tests.toy:Other"

    def __init__(self, **asked: str) -> None:
        super().__init__(seed=1)

    def weights(self) -> str:
        return "other"


class Words(Toy):
    """Of texts alone."""

    name, image_dim = "tests.toy:Words", 0
    preprocess = None  # type: ignore[assignment]


class Pictures(Toy):
    """Of pictures alone."""

    name, text_dim = "tests.toy:Pictures", 0
    tokenize = None  # type: ignore[assignment]


class Broken(Toy):
    """Gives NaN for dark pictures and more than float16 holds for very light ones."""

    name = "tests.toy:Broken"

    def encode_images(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        found = super().encode_images(pixels_BHWC)
        mean_B = pixels_BHWC.mean(axis=(1, 2, 3))
        found[mean_B < 40] = np.nan
        found[mean_B > 240] = 1e6
        return found


class Wide(Toy):
    """Gives twice the dimensions that it promises."""

    def encode_images(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        return np.repeat(super().encode_images(pixels_BHWC), 2, axis=1)


def scaled(picture: Any) -> np.ndarray:
    return preprocess(picture).astype(np.float32) / 255


class Scaled(Toy):
    """Prepares pictures as floats from 0 to 1, which as whole numbers are black."""

    preprocess = staticmethod(scaled)


class Sleepy(Toy):
    """Takes its time."""

    def encode_images(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        time.sleep(0.2)
        return super().encode_images(pixels_BHWC)
