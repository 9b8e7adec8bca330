"""Pictures by one encoder, texts by another."""

from __future__ import annotations

from typing import Any

from thresher.embed.encoders import Encoder, Tokens
from thresher.embed.preprocess import Pixels
from thresher.errors import UsageError
from thresher.ops.vectors import F32


def joined(pictures: Encoder, texts: Encoder) -> Joined:
    """Return an encoder with the pictures of one and the texts of the other; their spaces are not made one.

    Raises:
        UsageError: One cannot do what it is there for.
    """
    if not pictures.image_dim:
        raise UsageError(
            f"{pictures.name} encodes no pictures; name the encoder of pictures first, that of texts second"
        )
    if not texts.text_dim:
        raise UsageError(f"{texts.name} encodes no texts; name the encoder of pictures first, that of texts second")
    return Joined(pictures, texts)


class Joined:
    """Two encoders as one."""

    def __init__(self, pictures: Encoder, texts: Encoder) -> None:
        """Take both."""
        self._pictures, self._texts = pictures, texts
        self.name = f"{pictures.name}+{texts.name}"
        self.image_dim, self.text_dim = pictures.image_dim, texts.text_dim
        self.preprocess, self.tokenize = pictures.preprocess, texts.tokenize
        self.device = getattr(pictures, "device", getattr(texts, "device", "cpu"))
        precisions = (str(getattr(one, "precision", "auto")) for one in (pictures, texts))
        self.precision = "+".join(dict.fromkeys(precisions))

    def encode_images(self, pixels_BHWC: Pixels) -> F32:
        """Return what the first encoder makes of pictures."""
        return self._pictures.encode_images(pixels_BHWC)

    def encode_texts(self, tokens: Tokens) -> F32:
        """Return what the second encoder makes of texts."""
        return self._texts.encode_texts(tokens)

    def images(self, pixels_BHWC: Pixels) -> Any:
        """Return likewise, on the device where the encoder has one."""
        return getattr(self._pictures, "images", self._pictures.encode_images)(pixels_BHWC)

    def texts(self, tokens: Tokens) -> Any:
        """Return likewise, on the device where the encoder has one."""
        return getattr(self._texts, "texts", self._texts.encode_texts)(tokens)

    def weights(self) -> str:
        """Return both hashes."""
        return f"{self._pictures.weights()}+{self._texts.weights()}"
