"""Pictures as models take them, and what chance does to them first: whole batches at a time, on their device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from thresher.errors import MissingExtraError

try:
    import torch
    from torch import nn
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


def crops(side: int, smallest: float = 0.9) -> nn.Module:
    """Return what cuts a random part of each picture, ``smallest`` of its area or more, and makes it (side, side)."""
    k = _kornia()
    return k.RandomResizedCrop((side, side), scale=(smallest, 1.0))


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
        k.RandomResizedCrop((side, side), scale=(smallest, 1.0)),
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
        import kornia.augmentation as found
    except ImportError:
        raise MissingExtraError("augmentation", "train") from None
    return found
