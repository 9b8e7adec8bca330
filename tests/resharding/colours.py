"""An encoder that needs no model: the mean colour of a picture."""

from __future__ import annotations

from typing import Any

import numpy as np


def small(picture: Any) -> np.ndarray:
    return np.asarray(picture.resize((8, 8)))


class Colours:
    name, image_dim, text_dim = "colours", 4, 0
    tokenize = encode_texts = None

    def __init__(self, device: str = "auto", precision: str = "auto") -> None:
        self.preprocess = small

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        means = pixels.reshape(len(pixels), -1, 3).mean(axis=1)
        return np.concatenate([means, np.ones((len(pixels), 1))], axis=1).astype(np.float32)

    def weights(self) -> str:
        return "1"
