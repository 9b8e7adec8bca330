"""The models that trainers train: small ones made here, open_clip's by their configuration, timm's by name."""

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
_JOINED = re.compile(r"(?<=\w)[-'’](?=\w)")  # t-shirt and tshirt, men's and mens are one word
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model and what its inputs look like.

    Attributes:
        model: Has ``encode_image``, ``encode_text``, ``logit_scale`` and ``logit_bias``, as open_clip's do.
        tokenize: Texts to (N, T) int32.
        side: Pixels of a side of its pictures.
        resize: How pictures are made square.
        mean: Of its pixels, 0 to 1, by colour.
        std: Likewise.
    """

    model: nn.Module
    tokenize: Callable[[Sequence[str]], Tokens]
    side: int
    resize: Resize
    mean: tuple[float, ...]
    std: tuple[float, ...]


def clip_model(name: str, loss: Loss = "clip") -> Clip:
    """Make an untrained CLIP model; draws from torch's generator.

    Args:
        name: "tiny" (a convolutional net at 32 pixels, captions as bags of words, for the CPU; needs no open_clip),
            "small" (ViT-S/8 at 64 pixels), the name of an open_clip configuration, or the path of a .json with one.
        loss: With "siglip" scale and bias start as in SigLIP (2303.15343).

    Raises:
        UsageError: open_clip does not know the name.
    """
    clip = _tiny() if name == "tiny" else _of_open_clip(name)
    if loss == "siglip":
        clip.model.logit_bias = nn.Parameter(torch.tensor(-10.0))
        clip.model.logit_scale.data.fill_(math.log(10))
    return clip


# --- tiny -----------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """A residual net of ten 3 x 3 convolutions with batch norm, for small pictures.

    Pictures (B, 3, H, W) become features (B, 8 width).
    """

    def __init__(self, width: int = 32) -> None:
        """Make the net; ``width`` is the channels of its first stage."""
        super().__init__()
        self.num_features = 8 * width
        stages: list[nn.Module] = []
        channels = 3
        for wider in (width, 2 * width, 4 * width):
            stages += [_conv(channels, wider, 2), _Residual(wider)]
            channels = wider
        self.stages = nn.Sequential(*stages, _conv(channels, self.num_features, 2))

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the features."""
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
    """Captions as the mean of embeddings of their words and of the words' runs of three letters.

    Both are hashed, so that no vocabulary is needed, and words never seen are like those that are written alike
    (Bojanowski et al., 1607.04606).
    """

    hashes = 2**14
    longest = 96

    def __init__(self, width: int) -> None:
        """Make the embeddings; hash 0 fills up."""
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
        """Return the hashes of each text, (N, longest) int32, filled up with 0."""
        tokens = np.zeros((len(texts), cls.longest), np.int32)
        for i, text in enumerate(texts):
            words = [f"<{word}>" for word in _WORD.findall(_JOINED.sub("", text.lower()))]
            pieces = [piece for word in words for piece in (word, *(word[j : j + 3] for j in range(len(word) - 2)))]
            hashed = [1 + zlib.crc32(piece.encode()) % (cls.hashes - 1) for piece in pieces[: cls.longest]]
            tokens[i, : len(hashed)] = hashed
        return tokens


class TinyClip(nn.Module):
    """:class:`ConvNet` and :class:`BagOfWords`, side by side, with the names that open_clip's models have."""

    def __init__(self, width: int = 32, dim: int = 128) -> None:
        """Make both towers, ``dim`` wide where they meet."""
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


# --- others' --------------------------------------------------------------------------------------


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
            raise UsageError(f"{name}: there is no such configuration")
        open_clip.add_model_config(name)
        name = os.path.basename(name).removesuffix(".json")
    known = open_clip.list_models()
    if name not in known:
        raise UsageError(
            f"no model {name!r}; give tiny, small, a configuration of open_clip such as ViT-B-32, or the path of a "
            f".json with one.{suggest(name, (*_OWN, *known))}"
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
    """Make an untrained picture encoder for MoCo, and tell the width of its features; draws from torch's generator.

    Args:
        name: "tiny", or a ResNet, ViT or other model of timm.
        side: Pixels of a side. ResNets for up to 64 of them begin with a 3 x 3 convolution and no pooling, as is
            usual for small pictures: else little would be left of these.

    Raises:
        UsageError: timm does not know the name.
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
            f"no model {name!r}; give tiny or a model of timm such as resnet50 or vit_small_patch16_224."
            f"{suggest(name, ('tiny', *timm.list_models()))}"
        )
    sized: dict[str, Any] = {"img_size": side} if name.startswith(("vit_", "deit", "swin")) else {}
    model: Any = timm.create_model(name, num_classes=0, **sized)
    if side <= 64 and name.startswith("resnet") and isinstance(getattr(model, "conv1", None), nn.Conv2d):
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    return model, int(model.num_features)
