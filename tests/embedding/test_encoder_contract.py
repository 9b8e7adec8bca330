"""The contract of encoders, for those that can be loaded without a network; and that it notices what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.toy import Toy
from thresher.embedding.encoders import ENCODERS, make_encoder
from thresher.embedding.encoders.joined import joined
from thresher.errors import UsageError
from thresher.testing import EncoderContract
from thresher.testing.encoder import _pictures


class TestToy(EncoderContract):
    plugin = Toy


class TestConse(EncoderContract):
    plugin = ENCODERS.find("conse")


def two(device: str, precision: str) -> Any:
    return joined(Toy(), Toy(seed=3))


class TestJoined(EncoderContract):
    plugin = two


class OnlyPictures(Toy):
    text_dim = 0
    tokenize = encode_texts = None


class TestOnlyPictures(EncoderContract):
    plugin = OnlyPictures


class Wrong(Toy):
    """Does one thing wrong."""

    def __init__(self, what: str = "", device: str = "", precision: str = "") -> None:
        super().__init__()
        self.what, self.calls = what, 0

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        found = super().encode_images(pixels)
        self.calls += 1
        if self.what == "batch":
            return found - found.mean(axis=0)
        if self.what == "order":
            return found[np.argsort(pixels.reshape(len(pixels), -1).sum(axis=1))]
        if self.what == "random":
            return found + self.calls
        if self.what == "nan":
            return np.where(np.arange(len(found))[:, None] == 2, np.nan, found).astype(np.float32)
        if self.what == "double":
            return found.astype(np.float64)
        if self.what == "changes":
            pixels[:] = 0
        return found


@pytest.mark.parametrize("what", ["batch", "order", "random", "nan", "double", "changes"])
def test_the_contract_notices(what: str) -> None:
    EncoderContract().test_images(Wrong())
    with pytest.raises(AssertionError):
        EncoderContract().test_images(Wrong(what))


def test_pixels_of_several_shapes_are_noticed() -> None:
    class Shapes(Toy):
        preprocess = staticmethod(np.asarray)

    with pytest.raises(AssertionError):
        EncoderContract().test_images_of_any_size_become_pixels_of_one_shape(Shapes(), None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="returns float32"):
        EncoderContract().test_it_has_the_eight_names(type("Narrow", (Toy,), {"image_dim": 3})())
    assert len({picture.size for picture in _pictures()}) == 7
    assert make_encoder("tests.toy:Toy").weights() == "toy"
