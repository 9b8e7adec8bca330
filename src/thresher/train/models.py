"""The models of the trainers: small ones defined here, open_clip models by configuration, timm models by name."""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import MissingExtraError, UsageError, suggest
from thresher.io.pictures import Resize

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    raise MissingExtraError("training", "train") from None

Loss = Literal["clip", "siglip"]
Tokens = npt.NDArray[np.int32]

_OWN = ("tiny", "small")
_MEAN, _STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_JOINED = re.compile(r"(?<=\w)[-'’](?=\w)")  # t-shirt equals tshirt, men's equals mens
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model and the format of its inputs.

    Attributes:
        model: Has ``encode_image``, ``encode_text``, ``logit_scale`` and ``logit_bias``, like open_clip models.
        tokenize: Converts texts to (N, T) int32.
        side: Height and width of its images in pixels.
        resize: How images are made square.
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel, for pixels from 0 to 1.
    """

    model: nn.Module
    tokenize: Callable[[Sequence[str]], Tokens]
    side: int
    resize: Resize
    mean: tuple[float, ...]
    std: tuple[float, ...]


def clip_model(name: str, loss: Loss = "clip") -> Clip:
    """Create an untrained CLIP model; uses torch's global random generator.

    Args:
        name: "tiny" (a convolutional net at 32 pixels, captions as bags of words, for the CPU; does not need
            open_clip), "small" (ViT-S/8 at 64 pixels), the name of an open_clip configuration, or the path of a .json
            file with one.
        loss: With "siglip" scale and bias start as in SigLIP (2303.15343).

    Raises:
        UsageError: The name is not a model, or the file is missing.
        MissingExtraError: open_clip is needed but not installed.
    """
    clip = _tiny() if name == "tiny" else _of_open_clip(name)
    if loss == "siglip":
        clip.model.logit_bias = nn.Parameter(torch.tensor(-10.0))
        clip.model.logit_scale.data.fill_(math.log(10))
    return clip


# --- tiny -----------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """A residual net of ten 3 x 3 convolutions with batch norm, for small images.

    It maps images (B, 3, H, W) to features (B, 8 * width).
    """

    def __init__(self, width: int = 32) -> None:
        """Create the net; ``width`` is the number of channels of its first stage."""
        super().__init__()
        self.num_features = 8 * width
        stages: list[nn.Module] = []
        channels = 3
        for wider in (width, 2 * width, 4 * width):
            stages += [_conv(channels, wider, 2), _Residual(wider)]
            channels = wider
        self.stages = nn.Sequential(*stages, _conv(channels, self.num_features, 2))

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the features, (B, 8 * width)."""
        return self.stages(image_BCHW.contiguous(memory_format=torch.channels_last)).mean((2, 3))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels, 1)
        self.second = _conv(channels, channels, 1)[:2]

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return F.relu(x_BCHW + self.second(self.first(x_BCHW)))


def _conv(channels: int, wider: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, wider, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(wider), nn.ReLU(inplace=True))


class BagOfWords(nn.Module):
    """Embeds a caption as the mean over its words and their character trigrams.

    Both are hashed, so there is no vocabulary, and unknown words are similar to words with similar spelling
    (Bojanowski et al., 1607.04606).
    """

    hashes = 2**14
    longest = 96

    def __init__(self, width: int) -> None:
        """Create the embeddings; hash 0 is padding."""
        super().__init__()
        self.embedding = nn.Embedding(self.hashes, width, padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.norm = nn.LayerNorm(width)

    def forward(self, token_BT: torch.Tensor) -> torch.Tensor:
        """Return (B, width)."""
        there_BT = token_BT != 0
        held_B1T = there_BT.to(self.embedding.weight.dtype)[:, None]
        mean_BD = (held_B1T @ self.embedding(token_BT))[:, 0] / there_BT.sum(1, keepdim=True).clamp(min=1)
        return self.norm(mean_BD)

    @classmethod
    def tokenize(cls, texts: Sequence[str]) -> Tokens:
        """Return the hashes of each text, (N, longest) int32, padded with 0."""
        tokens = np.zeros((len(texts), cls.longest), np.int32)
        for i, text in enumerate(texts):
            words = [f"<{word}>" for word in _WORD.findall(_JOINED.sub("", text.lower()))]
            pieces = [piece for word in words for piece in (word, *(word[j : j + 3] for j in range(len(word) - 2)))]
            hashed = [1 + zlib.crc32(piece.encode()) % (cls.hashes - 1) for piece in pieces[: cls.longest]]
            tokens[i, : len(hashed)] = hashed
        return tokens


class TinyClip(nn.Module):
    """A two-tower model of :class:`ConvNet` and :class:`BagOfWords`, with the interface of open_clip models."""

    def __init__(self, width: int = 32, dim: int = 128) -> None:
        """Create both towers; ``dim`` is the dimension of the joint embedding space."""
        super().__init__()
        self.visual, self.text = ConvNet(width), BagOfWords(dim)
        self.image_projection = nn.Linear(self.visual.num_features, dim)
        self.text_projection = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias: nn.Parameter | None = None

    def encode_image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return (B, dim)."""
        return self.image_projection(self.visual(image_BCHW))

    def encode_text(self, token_BT: torch.Tensor) -> torch.Tensor:
        """Return (B, dim)."""
        return self.text_projection(self.text(token_BT))


def _tiny() -> Clip:
    return Clip(TinyClip(), BagOfWords.tokenize, 32, "squash", _MEAN, _STD)


# --- open_clip and timm ---------------------------------------------------------------------------


def _of_open_clip(name: str) -> Clip:
    try:
        import open_clip
    except ImportError:
        raise MissingExtraError(f"the model {name}", "train") from None
    if name == "small":
        model: Any = open_clip.CLIP(
            embed_dim=384,
            vision_cfg={"image_size": 64, "patch_size": 8, "width": 384, "layers": 12, "head_width": 64},
            text_cfg={"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
        )
        return Clip(model, _tokens(open_clip.SimpleTokenizer(context_length=32)), 64, "squash", _MEAN, _STD)
    if name.endswith(".json"):
        if not os.path.isfile(name):
            raise UsageError(f"{name}: no such file; give the path of an open_clip configuration")
        open_clip.add_model_config(name)
        name = os.path.basename(name).removesuffix(".json")
    known = open_clip.list_models()
    if name not in known:
        raise UsageError(
            f"no model {name!r}; give tiny, small, an open_clip configuration such as ViT-B-32, or the path of a "
            f".json file with one.{suggest(name, (*_OWN, *known))}"
        )
    model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
    size = model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    pixels = open_clip.get_model_preprocess_cfg(model)
    return Clip(
        model, _tokens(open_clip.get_tokenizer(name)), side, "shortest", tuple(pixels["mean"]), tuple(pixels["std"])
    )


def _tokens(tokenizer: Any) -> Callable[[Sequence[str]], Tokens]:
    def tokenize(texts: Sequence[str]) -> Tokens:
        tokens: Tokens = tokenizer(list(texts)).numpy().astype(np.int32)
        return tokens

    return tokenize


def backbone(name: str, side: int) -> tuple[nn.Module, int]:
    """Create an untrained image encoder for MoCo; uses torch's global random generator.

    Args:
        name: "tiny", or the name of a timm model such as a ResNet or ViT.
        side: Height and width of the images in pixels. For up to 64 pixels a ResNet starts with a 3 x 3 convolution
            without pooling, as usual for small images, so that it does not shrink them too much.

    Returns:
        The encoder, and the dimension of its features.

    Raises:
        UsageError: The name is not a model.
        MissingExtraError: timm is needed but not installed.
    """
    if name == "tiny":
        net = ConvNet()
        return net, net.num_features
    try:
        import timm
    except ImportError:
        raise MissingExtraError(f"the model {name}", "train") from None
    if not timm.is_model(name):
        raise UsageError(
            f"no model {name!r}; give tiny or a timm model such as resnet50 or vit_small_patch16_224."
            f"{suggest(name, ('tiny', *timm.list_models()))}"
        )
    sized: dict[str, Any] = {"img_size": side} if name.startswith(("vit_", "deit", "swin")) else {}
    model: Any = timm.create_model(name, num_classes=0, **sized)
    if side <= 64 and name.startswith("resnet") and isinstance(getattr(model, "conv1", None), nn.Conv2d):
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    return model, int(model.num_features)
