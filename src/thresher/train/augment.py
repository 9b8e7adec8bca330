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


def normalised(pixels_BHWC: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Return (B, 3, H, W) float32 of (B, H, W, 3) uint8, less the mean and over the deviation of each colour."""
    scale = torch.tensor(std, device=pixels_BHWC.device) * 255
    shift = torch.tensor(mean, device=pixels_BHWC.device) * 255
    return ((pixels_BHWC.float() - shift) / scale).permute(0, 3, 1, 2)


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
        parts.append(k.RandomSolarize(p=solarise))
    return nn.Sequential(*parts)


def _kornia() -> Any:
    try:
        import kornia.augmentation as found
    except ImportError:
        raise MissingExtraError("augmentation", "train") from None
    return found
