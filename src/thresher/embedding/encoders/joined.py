"""Images encoded by one encoder, texts by another."""

from __future__ import annotations

from typing import Any

from thresher.embedding.encoders import Encoder, Tokens
from thresher.embedding.preprocess import Pixels
from thresher.errors import UsageError
from thresher.ops.vectors import F32


def joined(pictures: Encoder, texts: Encoder) -> Joined:
    """Return an encoder that encodes images with one encoder and texts with another; this makes no joint space.

    Raises:
        UsageError: The first does not encode images, or the second does not encode texts.
    """
    if not pictures.image_dim:
        raise UsageError(
            f"{pictures.name} does not encode images; name the encoder for images first, the one for texts second"
        )
    if not texts.text_dim:
        raise UsageError(
            f"{texts.name} does not encode texts; name the encoder for images first, the one for texts second"
        )
    return Joined(pictures, texts)


class Joined:
    """Two encoders as one."""

    def __init__(self, pictures: Encoder, texts: Encoder) -> None:
        """Combine an encoder for images and an encoder for texts."""
        self._pictures, self._texts = pictures, texts
        self.name = f"{pictures.name}+{texts.name}"
        self.image_dim, self.text_dim = pictures.image_dim, texts.text_dim
        self.preprocess, self.tokenize = pictures.preprocess, texts.tokenize
        self.device = getattr(pictures, "device", getattr(texts, "device", "cpu"))
        precisions = (str(getattr(one, "precision", "auto")) for one in (pictures, texts))
        self.precision = "+".join(dict.fromkeys(precisions))

    def encode_images(self, pixels_BHWC: Pixels) -> F32:
        """Return (B, image_dim) float32 from the first encoder."""
        return self._pictures.encode_images(pixels_BHWC)

    def encode_texts(self, tokens: Tokens) -> F32:
        """Return (B, text_dim) float32 from the second encoder."""
        return self._texts.encode_texts(tokens)

    def images(self, pixels_BHWC: Pixels) -> Any:
        """Return (B, image_dim) float32, left on the device if the encoder can."""
        return getattr(self._pictures, "images", self._pictures.encode_images)(pixels_BHWC)

    def texts(self, tokens: Tokens) -> Any:
        """Return (B, text_dim) float32, left on the device if the encoder can."""
        return getattr(self._texts, "texts", self._texts.encode_texts)(tokens)

    def weights(self) -> str:
        """Return both hashes, joined by +."""
        return f"{self._pictures.weights()}+{self._texts.weights()}"
