"""Assignment in bfloat16 and on CUDA with torch, only for the iterations of k-means.

Final labels and distances are always computed in float32 by :mod:`thresher.ops.kmeans`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import MissingExtraError
from thresher.ops.vectors import F32

SLACK = 0.01  # maximum error of the angles in radians, see ops.kmeans
_TILE = 4096  # centroids per product


def worthwhile(native: bool) -> bool:
    """Return whether torch is installed, and the processor is ``native`` in bfloat16 or there is a GPU."""
    try:
        import torch
    except ImportError:
        return False
    return native or torch.cuda.is_available()


def nearest_bfloat16(device: str | None = None) -> NearestBfloat16:
    """Return an assignment function on a CUDA device if there is one, else on the CPU.

    Raises:
        MissingExtraError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtraError("bfloat16 k-means", "torch") from None
    return NearestBfloat16(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class NearestBfloat16:
    """Labels and cosines from bfloat16 products with float32 sums."""

    device: str

    def __call__(
        self, rows_BD: F32, centroids_KD: F32, scratch: F32 | None = None, *, second: bool = True
    ) -> tuple[npt.NDArray[np.int32], F32, F32]:
        """Return labels (B,) int32 and products with the nearest and second centroid (B,), accurate to three digits.

        The second is found in any case: it costs little compared with the products.
        """
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(1)  # the workers of the engine run in parallel
        try:
            rows = torch.from_numpy(rows_BD).to(self.device, torch.bfloat16)
            labels = np.zeros(len(rows_BD), np.int32)
            best, others = np.full((2, len(rows_BD)), -np.inf, np.float32)
            for lo in range(0, len(centroids_KD), _TILE):
                tile = torch.from_numpy(centroids_KD[lo : lo + _TILE]).to(self.device, torch.bfloat16)
                label, top, other = self._winners(rows @ tile.T)
                others = np.maximum(np.maximum(others, other), np.minimum(best, top))
                better = top > best
                labels[better], best[better] = label[better] + lo, top[better]
        finally:
            torch.set_num_threads(before)
        return labels, best, others

    def _winners(self, products: Any) -> tuple[npt.NDArray[Any], F32, F32]:
        if self.device == "cpu":  # NumPy's argmax is twice as fast as torch's here
            cosines = products.float().numpy()
            at = np.arange(len(cosines))
            label = cosines.argmax(axis=1)
            top = cosines[at, label]
            cosines[at, label] = -np.inf
            return label, top, cosines.max(axis=1)
        value, index = products.float().topk(min(2, products.shape[1]), dim=1)
        value, index = value.cpu().numpy(), index.cpu().numpy()
        return index[:, 0], value[:, 0], value[:, 1] if value.shape[1] > 1 else np.full(len(value), -np.inf, np.float32)
