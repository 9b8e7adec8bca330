"""Pictures as models take them, and what chance does to them first: whole batches at a time, on their device."""

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
    """Pictures less the mean and over the deviation of each colour; what it subtracts stays on the device."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], *, white: float = 1.0) -> None:
        """Take mean and deviation of pixels from 0 to 1, by colour.

        Args:
            mean: Three means.
            std: Three deviations, above 0.
            white: The brightest value of the pictures to come: 255 for uint8, 1 for what augmentations return.
        """
        super().__init__()
        self.register_buffer("shift", torch.tensor(mean).view(3, 1, 1) * white)
        self.register_buffer("scale", torch.tensor(std).view(3, 1, 1) * white)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return (B, 3, H, W) float32."""
        return (image_BCHW.float() - self.shift) / self.scale


class Crop(nn.Module):
    """Cuts a random part of each picture, and makes it (side, side) by bilinear interpolation.

    The parts are drawn on the CPU by torch's generator, and are the same on every device. On a CPU they are cut one by
    one, which takes the least work; on a GPU, where that would be two kernels a picture, all are sampled at once.
    """

    def __init__(self, side: int, smallest: float) -> None:
        """Make it; ``smallest`` is the least share of a picture's area that is cut out, above 0 and at most 1."""
        super().__init__()
        self.side = side
        self.cut = _kornia().RandomResizedCrop((side, side), scale=(smallest, 1.0))

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return (B, C, side, side); takes floating-point pictures of at least 2 x 2 pixels."""
        if image_BCHW.device.type == "cpu":
            cut_BCHW: torch.Tensor = self.cut(image_BCHW)
            return cut_BCHW
        return sampled(image_BCHW, self.cut.forward_parameters(image_BCHW.shape)["src"], self.side)


def sampled(image_BCHW: torch.Tensor, corner_B42: torch.Tensor, side: int) -> torch.Tensor:
    """Return parts of pictures, (B, C, side, side), whose outermost pixels are the corners: bilinear between.

    Args:
        image_BCHW: Floating-point pictures of at least 2 x 2 pixels.
        corner_B42: x and y of the top left, top right, bottom right and bottom left pixel of each part.
        side: Pixels of a side.
    """
    size_2 = torch.tensor([image_BCHW.shape[3] - 1, image_BCHW.shape[2] - 1])
    first_B2, last_B2 = (corner_B42[:, at].cpu().float() * 2 / size_2 - 1 for at in (0, 2))  # -1 to 1 across a picture
    affine_B23 = torch.zeros(len(corner_B42), 2, 3)
    affine_B23[:, [0, 1], [0, 1]], affine_B23[:, :, 2] = (last_B2 - first_B2) / 2, (first_B2 + last_B2) / 2
    affine_B23 = to_device(affine_B23, image_BCHW.device)
    grid_BHW2 = F.affine_grid(affine_B23, [*image_BCHW.shape[:2], side, side], align_corners=True)
    return F.grid_sample(image_BCHW, grid_BHW2.to(image_BCHW.dtype), align_corners=True, padding_mode="border")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the CPU on a device; on a GPU without waiting for what it is still computing."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def crops(side: int, smallest: float = 0.9) -> nn.Module:
    """Return what cuts a random part of each picture, ``smallest`` of its area or more, and makes it (side, side)."""
    return Crop(side, smallest)


def views(side: int, version: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
    """Return the two augmentations of MoCo, for pictures from 0 to 1.

    Of version 2 (2003.04297) both are the same: crop, colours, greyscale, blur, flip. Version 3 (2104.02057) blurs
    one view always and the other hardly, and solarises that one at times. Pictures of fewer than 64 pixels are not
    blurred, as in SimCLR: there is little to blur.
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
        # Ranges, as a lone number is a distance from the middle; kornia's own would change darker pixels as well.
        parts.append(k.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=solarise))
    return nn.Sequential(*parts)


def _kornia() -> Any:
    try:
        import kornia.augmentation as augmentation
    except ImportError:
        raise MissingExtraError("augmentation", "train") from None
    return augmentation
