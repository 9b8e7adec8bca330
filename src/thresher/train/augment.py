"""Normalization and random augmentation of images, for whole batches on their device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from thresher.errors import MissingExtraError

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    raise MissingExtraError("training", "train") from None


class Normalise(nn.Module):
    """Subtracts the mean and divides by the standard deviation of each channel; both are buffers of the module."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], *, white: float = 1.0) -> None:
        """Create the module from the statistics of pixels in the range 0 to 1.

        Args:
            mean: Mean of each of the three channels.
            std: Standard deviation of each channel, above 0.
            white: The largest value of the input: 255 for uint8, 1 for the output of augmentations.
        """
        super().__init__()
        self.register_buffer("shift", torch.tensor(mean).view(3, 1, 1) * white)
        self.register_buffer("scale", torch.tensor(std).view(3, 1, 1) * white)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return (B, 3, H, W) float32."""
        return (image_BCHW.float() - self.shift) / self.scale


class Crop(nn.Module):
    """Crops a random part of each image, and resizes it to (side, side) by bilinear interpolation.

    The parts are drawn on the CPU by torch's generator, so they are the same on every device. On a CPU images are
    cropped one by one, which is fastest; on a GPU this would take two kernels per image, so all are sampled at once.
    """

    def __init__(self, side: int, smallest: float) -> None:
        """Create the module; ``smallest`` is the smallest crop as a share of the area, above 0 and at most 1."""
        super().__init__()
        self.side = side
        self.cut = _kornia().RandomResizedCrop((side, side), scale=(smallest, 1.0))

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return (B, C, side, side); the images are floating-point, of at least 2 x 2 pixels."""
        if image_BCHW.device.type == "cpu":
            cut_BCHW: torch.Tensor = self.cut(image_BCHW)
            return cut_BCHW
        return sampled(image_BCHW, self.cut.forward_parameters(image_BCHW.shape)["src"], self.side)


def sampled(image_BCHW: torch.Tensor, corner_B42: torch.Tensor, side: int) -> torch.Tensor:
    """Return crops of images, (B, C, side, side), sampled bilinearly from corner pixel to corner pixel.

    Args:
        image_BCHW: Floating-point images of at least 2 x 2 pixels.
        corner_B42: x and y of the top left, top right, bottom right and bottom left pixel of each crop.
        side: Height and width of the result in pixels.
    """
    size_2 = torch.tensor([image_BCHW.shape[3] - 1, image_BCHW.shape[2] - 1])
    first_B2, last_B2 = (corner_B42[:, at].cpu().float() * 2 / size_2 - 1 for at in (0, 2))  # -1 to 1 across an image
    affine_B23 = torch.zeros(len(corner_B42), 2, 3)
    affine_B23[:, [0, 1], [0, 1]], affine_B23[:, :, 2] = (last_B2 - first_B2) / 2, (first_B2 + last_B2) / 2
    affine_B23 = to_device(affine_B23, image_BCHW.device)
    grid_BHW2 = F.affine_grid(affine_B23, [*image_BCHW.shape[:2], side, side], align_corners=True)
    return F.grid_sample(image_BCHW, grid_BHW2.to(image_BCHW.dtype), align_corners=True, padding_mode="border")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device; to a GPU asynchronously."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def crops(side: int, smallest: float = 0.9) -> nn.Module:
    """Return a module that crops a random part of each image, at least ``smallest`` of its area, to (side, side)."""
    return Crop(side, smallest)


def views(side: int, version: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
    """Return the two augmentations of MoCo, for images in the range 0 to 1.

    Both views of version 2 (2003.04297) have the same: crop, color jitter, grayscale, blur, flip. Version 3
    (2104.02057) always blurs the first view, blurs the second with probability 0.1, and solarizes it with probability
    0.2. Images smaller than 64 pixels are not blurred, as in SimCLR.
    """
    blurs, solarised = ((0.5, 0.5), (0.0, 0.0)) if version == 2 else ((1.0, 0.1), (0.0, 0.2))
    return tuple(_view(side, blur, solarise, version) for blur, solarise in zip(blurs, solarised, strict=True))


def _view(side: int, blur: float, solarise: float, version: int) -> nn.Module:
    k = _kornia()
    smallest, jitter = (0.2, (0.4, 0.4, 0.4, 0.1)) if version == 2 else (0.08, (0.4, 0.4, 0.2, 0.1))
    parts = [
        Crop(side, smallest),
        k.ColorJitter(*jitter, p=0.8),
        k.RandomGrayscale(p=0.2),
        k.RandomHorizontalFlip(p=0.5),
    ]
    if side >= 64:
        size = side // 20 * 2 + 1  # a tenth of the side
        parts.append(k.RandomGaussianBlur((size, size), (0.1, 2.0), p=blur))
    if solarise:
        # Given as ranges: kornia reads a single number as a distance from 0.5 and would also change darker pixels.
        parts.append(k.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=solarise))
    return nn.Sequential(*parts)


def _kornia() -> Any:
    try:
        import kornia.augmentation as augmentation
    except ImportError:
        raise MissingExtraError("augmentation", "train") from None
    return augmentation
