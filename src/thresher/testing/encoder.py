"""The contract of encoders, as tests to inherit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from thresher.embedding.encoders import Encoder, Tokens, as_kind, checked, kind_of
from thresher.runtime.engines.processes import Processes
from thresher.runtime.parameters import build

if TYPE_CHECKING:
    from PIL import Image

ROWS = 7
TEXTS = ("a dog", "", "A photo of TWO cats\non a mat", "日本語 🦊 \x00\u202e", "word " * 300, 'it\'s "quoted"', "a dog")


class EncoderContract:
    """Inherit it to test your own encoder: ``class TestMine(EncoderContract): plugin = Mine``.

    Images and texts are both optional; tests of what an encoder does not encode are skipped.

    Attributes:
        plugin: A frozen dataclass with ``load``, or the class or function that makes the encoder.
        example: Fields to make the dataclass with.
        rest: Or what follows the colon of its name, if that is easier.
        tolerance: How much vectors may depend on the rows that are encoded with them, as 1 - cosine.
    """

    plugin: ClassVar[Any]
    example: ClassVar[dict[str, Any]] = {}
    rest: ClassVar[str] = ""
    tolerance: ClassVar[float] = 1e-4

    @classmethod
    def load(cls) -> Encoder:
        """Load the encoder on the CPU in float32."""
        kind = as_kind("encoder", cls.plugin)
        made = build(kind, kind.name, cls.example) if cls.example else kind_of(kind, cls.rest)
        return made.load("cpu", "float32")

    @pytest.fixture(scope="class")
    @classmethod
    def encoder(cls) -> Encoder:
        """Return the encoder under test."""
        return cls.load()

    @pytest.fixture(scope="class")
    @classmethod
    def process(cls) -> Iterator[Processes]:
        """Return a worker process like those that prepare images and texts."""
        engine = Processes(1)
        yield engine
        engine.close()

    def test_it_has_the_eight_names(self, encoder: Encoder) -> None:
        assert checked(encoder, "encoder") is encoder
        assert isinstance(encoder.name, str)
        assert encoder.name.isprintable()
        for dim in (encoder.image_dim, encoder.text_dim):
            assert isinstance(dim, int)
            assert dim >= 0

    def test_its_weights_have_the_same_text_each_time(self, encoder: Encoder) -> None:
        assert encoder.weights()
        assert encoder.weights() == self.load().weights()

    def test_images_of_any_size_become_pixels_of_one_shape(self, encoder: Encoder, process: Processes) -> None:
        if encoder.preprocess is None:
            pytest.skip("it does not encode images")
        found = [encoder.preprocess(picture) for picture in _pictures()]
        assert len({one.shape for one in found}) == 1
        assert all((one.dtype, one.ndim, one.shape[2]) == (np.dtype(np.uint8), 3, 3) for one in found)
        elsewhere = list(process.map(encoder.preprocess, _pictures()))
        np.testing.assert_array_equal(np.stack(elsewhere), np.stack(found))

    def test_images(self, encoder: Encoder) -> None:
        if encoder.preprocess is None:
            pytest.skip("it does not encode images")
        pixels = np.stack([encoder.preprocess(picture) for picture in _pictures()])
        before = pixels.copy()
        found = np.asarray(encoder.encode_images(pixels))
        self._check(found, encoder.image_dim)
        np.testing.assert_array_equal(pixels, before, "it changes its input pixels")
        np.testing.assert_array_equal(np.asarray(encoder.encode_images(pixels)), found, "a second call differs")
        for rows in _orders():
            self._near(np.asarray(encoder.encode_images(pixels[rows])), found[rows])

    def test_texts_become_arrays_of_integers(self, encoder: Encoder, process: Processes) -> None:
        if encoder.tokenize is None:
            pytest.skip("it does not encode texts")
        found = encoder.tokenize(TEXTS)
        assert found
        for name, array in found.items():
            assert isinstance(name, str)
            assert (len(array), array.ndim, array.dtype.kind in "iu") == (ROWS, 2, True)
        _same(next(iter(process.map(encoder.tokenize, [TEXTS]))), found)
        _same(encoder.tokenize(list(TEXTS)), found)

    def test_texts(self, encoder: Encoder) -> None:
        if encoder.tokenize is None:
            pytest.skip("it does not encode texts")
        found = np.asarray(encoder.encode_texts(encoder.tokenize(TEXTS)))
        self._check(found, encoder.text_dim)
        again = np.asarray(encoder.encode_texts(encoder.tokenize(TEXTS)))
        np.testing.assert_array_equal(again, found, "a second call differs")
        for rows in _orders():
            some = encoder.tokenize([TEXTS[row] for row in rows])
            self._near(np.asarray(encoder.encode_texts(some)), found[rows])

    def _check(self, found: npt.NDArray[Any], dim: int) -> None:
        assert found.shape == (ROWS, dim)
        assert found.dtype == np.float32
        assert np.isfinite(found).all()

    def _near(self, found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> None:
        """Compare rows by cosine and length."""
        assert found.shape == wanted.shape
        scale = np.maximum(np.linalg.norm(wanted, axis=1), 1e-12)
        cosine = (found * wanted).sum(axis=1) / scale / np.maximum(np.linalg.norm(found, axis=1), 1e-12)
        nothing = ~(found.any(axis=1) | wanted.any(axis=1))  # an empty text may have a zero vector
        assert (nothing | (cosine > 1 - self.tolerance)).all(), "rows depend on the rows that are encoded with them"
        assert (np.abs(np.linalg.norm(found, axis=1) / scale - 1) < 0.01)[~nothing].all()


def _orders() -> list[list[int]]:
    """Return which rows to encode together: one by one, in groups, and in another order."""
    return [[row] for row in range(ROWS)] + [[0, 1, 2], [3, 4, 5, 6], list(range(ROWS))[::-1]]


def _pictures() -> list[Image.Image]:
    from PIL import Image

    rng = np.random.default_rng(0)
    sizes = [(40, 30), (30, 40), (64, 64), (300, 200), (1, 1), (9, 200), (333, 77)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def _same(found: Tokens, wanted: Tokens) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
