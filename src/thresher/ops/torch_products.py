"""Products with torch, on GPUs: nearest centroids, nearest rows, and sums of similarities.

What decides about rows is computed in float32, without TF32, so that it differs from the CPU's only by rounding, as
between two processors. The iterations of k-means may use bfloat16. Products are reduced on the device, panel by panel:
only maxima, matches and sums come back.

Every call takes the next of the devices, with a stream of its own: while one thread of an engine computes, another one
copies. Rows are copied from pinned memory; centroids stay on the devices.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import MissingExtraError, UsageError, installed
from thresher.ops.kmeans import STRIPE, Labels, Nearest
from thresher.ops.products import ON_CPU, Floats, Ints, Products
from thresher.ops.vectors import F32

SLACK = 0.01  # maximum error of the angles in radians of bfloat16, see ops.kmeans
_PANEL = 4096  # rows of a product, both ways: 64 MB
_ROWS = 16_384  # rows that are compared with centroids at a time
_TILE = 4096  # centroids per product
_SMALL = 2**20  # products that the CPU computes sooner than a device is reached
_NAMES = re.compile(r"cuda|cuda:\d+(,cuda:\d+)*|torch-cpu")


def is_device(text: str) -> bool:
    """Return whether this names devices for torch: ``cuda``, ``cuda:0,cuda:1``, or ``torch-cpu`` for tests."""
    return _NAMES.fullmatch(text) is not None


def products_on(text: str) -> Products:
    """Return the products of the devices that :func:`is_device` accepts; of NumPy for another text."""
    return TorchProducts(Devices.named(text)) if is_device(text) else ON_CPU


def check_devices(text: str, *, here: bool = True) -> None:
    """Check the name of a device and, if it is ``here``, that this process can use it.

    Raises:
        MissingExtraError: torch is not installed.
        UsageError: There is no such device, or torch is set to round float32 products.
    """
    if text not in ("auto", "cpu") and not is_device(text):
        raise UsageError(f"device {text[:100]!r}: give cpu, cuda (all GPUs), or some of them, such as cuda:0,cuda:1")
    if not here or not is_device(text):
        return
    if not installed("torch"):
        raise MissingExtraError(f"--device {text}", "torch")
    import torch

    if text.startswith("cuda"):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found <= max((int(number) for number in re.findall(r"\d+", text)), default=0):
            raise UsageError(
                f"--device {text}: torch {torch.__version__} finds {found or 'no'} GPU{'s' if found > 1 else ''} here; "
                "pass --device cpu"
            )
    if torch.get_float32_matmul_precision() != "highest":
        raise UsageError(
            f"--device {text}: torch is set to round float32 products; call "
            "torch.set_float32_matmul_precision('highest')"
        )


def worthwhile(native: bool, device: str = "auto") -> bool:
    """Return whether torch is installed, and bfloat16 is fast: on the processor (``native``) or on a GPU in use."""
    try:
        import torch
    except ImportError:
        return False
    return native or device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def nearest_bfloat16(device: str = "auto") -> TorchNearest:
    """Return an assignment function in bfloat16; "auto" is a GPU if there is one, else the CPU.

    Raises:
        MissingExtraError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtraError("bfloat16 k-means", "torch") from None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchNearest(Devices.named(device), "bfloat16")


@dataclass(frozen=True)
class Devices:
    """Devices of torch that are used in turn. A copy in another process begins with the first one.

    Attributes:
        names: Names of torch: "cpu", or GPUs; "cuda" alone is all that the process can use.
    """

    names: tuple[str, ...]
    _turns: count[int] = field(default_factory=count, init=False, repr=False, compare=False)

    @classmethod
    def named(cls, text: str) -> Devices:
        """Return the devices of a list separated by commas."""
        return cls(tuple(text.removeprefix("torch-").split(",")))

    def __reduce__(self) -> Any:
        """Pickle the names."""
        return Devices, (self.names,)

    @property
    def on_cpu(self) -> bool:
        """Whether this is the CPU."""
        return self.names == ("cpu",)

    @contextmanager
    def next(self) -> Iterator[str]:
        """Use the next device in this block; yields its name."""
        import torch

        name = self._all[next(self._turns) % len(self._all)]
        if name != "cpu":
            with torch.cuda.device(name), torch.cuda.stream(torch.cuda.Stream(name)):
                yield name
            return
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # the workers of the engine run in parallel
        try:
            yield name
        finally:
            torch.set_num_threads(before)

    @cached_property
    def _all(self) -> tuple[str, ...]:
        import torch

        if self.names != ("cuda",):
            return self.names
        count = torch.cuda.device_count()
        if not count:
            raise UsageError("device cuda: a worker has no GPU; with the engine ray, omit num_gpus or give at least 1")
        return tuple(f"cuda:{i}" for i in range(count))


def _sent(rows_ND: F32, device: str) -> Any:
    """Return rows as a tensor on a device; the copy to a GPU overlaps with what other streams compute."""
    import torch

    tensor = torch.from_numpy(np.require(rows_ND, np.float32, ("C", "W")))  # torch warns of read-only memory
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Held:
    """Rows that stay on the devices: each gets them at the first use. A copy in another process starts without."""

    def __init__(self, rows_KD: F32, dtype: str) -> None:
        """Take (K, D) float32 rows, and the name of the type in which they are kept."""
        self.rows_KD, self.dtype = rows_KD, dtype
        self._tensors: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        """Pickle the rows."""
        return Held, (self.rows_KD, self.dtype)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows_KD)

    def on(self, device: str) -> Any:
        """Return the rows on a device."""
        import torch

        with self._lock:
            if device not in self._tensors:
                self._tensors[device] = _sent(self.rows_KD, device).to(getattr(torch, self.dtype))
                if device != "cpu":
                    torch.cuda.synchronize(device)  # other streams may read it
            return self._tensors[device]


@dataclass(frozen=True)
class TorchNearest:
    """Finds the nearest centroids, see :class:`~thresher.ops.kmeans.Nearest`.

    Attributes:
        devices: Where the products are computed.
        dtype: "float32", or "bfloat16" with float32 sums, whose products are accurate to three digits.
    """

    devices: Devices
    dtype: Literal["float32", "bfloat16"]

    @property
    def stripe(self) -> int:
        """Rows at a time: on the CPU, few enough for its cache."""
        return STRIPE if self.devices.on_cpu else _ROWS

    def prepared(self, centroids_KD: F32) -> Held:
        """Return centroids that stay on the devices."""
        return Held(centroids_KD, self.dtype)

    def __call__(
        self, rows_BD: F32, centroids_KD: F32 | Held, scratch: F32 | None = None, *, second: bool = True
    ) -> tuple[Labels, F32, F32]:
        """Return labels (B,) int32 and products with the nearest and second centroid (B,) float32.

        The second is found in any case: it costs little compared with the products.
        """
        import torch

        held = centroids_KD if isinstance(centroids_KD, Held) else self.prepared(centroids_KD)
        with self.devices.next() as device:
            rows = _sent(rows_BD, device).to(getattr(torch, self.dtype))
            winners: Callable[[Any], tuple[Any, Any, Any]] = _winners_numpy if device == "cpu" else _winners
            labels = best = others = None
            for lo in range(0, len(held), _TILE):
                label, top, other = winners(rows @ held.on(device)[lo : lo + _TILE].T)
                if best is None:
                    labels, best, others = label, top, other
                    continue
                others = torch.maximum(torch.maximum(others, other), torch.minimum(best, top))
                better = top > best
                labels, best = torch.where(better, label + lo, labels), torch.where(better, top, best)
            found = (labels.to(torch.int32), best, others)  # type: ignore[union-attr]
            label, top, other = (part.cpu().numpy() for part in found)  # type: ignore[union-attr]
            return label, top, other


def _winners(products: Any) -> tuple[Any, Any, Any]:
    """Return the first column with the largest product of each row, that product, and the second largest."""
    import torch

    top, label = products.max(dim=1)
    if products.shape[1] == 1:
        return label, top.float(), torch.full_like(top, -torch.inf, dtype=torch.float32)
    products.scatter_(1, label[:, None], -torch.inf)
    return label, top.float(), products.max(dim=1).values.float()


def _winners_numpy(products: Any) -> tuple[Any, Any, Any]:
    """Return the same as :func:`_winners`: on the CPU, the argmax of NumPy is twice as fast."""
    import torch

    cosines = products.float().numpy()
    at = np.arange(len(cosines))
    label = cosines.argmax(axis=1)
    top = cosines[at, label]
    cosines[at, label] = -np.inf
    return torch.from_numpy(label), torch.from_numpy(top), torch.from_numpy(cosines.max(axis=1))


@dataclass(frozen=True)
class TorchProducts:
    """Products on devices of torch, see :class:`~thresher.ops.products.Products`.

    Few products are computed by NumPy: to send their rows would take longer.

    Attributes:
        devices: Where the products are computed.
        small: Number of products below which NumPy computes them.
    """

    panel: ClassVar[int] = _PANEL

    devices: Devices
    small: int = _SMALL

    @property
    def nearest(self) -> Nearest:
        """Finds the nearest centroids in float32."""
        return TorchNearest(self.devices, "float32")

    def scratch(self) -> F32:
        """Return memory for the products that NumPy computes."""
        return np.empty(self.small, np.float32)

    def best(
        self, rows_RD: F32, others_MD: F32, lag: int | None = None, scratch: F32 | None = None
    ) -> tuple[F32, Ints]:
        """Return the largest product of each row and its first column."""
        if len(rows_RD) * len(others_MD) < self.small:
            return ON_CPU.best(rows_RD, others_MD, lag, scratch)
        return self._reduced(rows_RD, others_MD, lag, lambda products: tuple(products.max(dim=1)))

    def above(
        self, rows_RD: F32, others_MD: F32, threshold: float, lag: int | None = None, scratch: F32 | None = None
    ) -> tuple[Ints, Ints]:
        """Return the rows and the columns of all products above a threshold."""
        if len(rows_RD) * len(others_MD) < self.small:
            return ON_CPU.above(rows_RD, others_MD, threshold, lag, scratch)
        return self._reduced(
            rows_RD, others_MD, lag, lambda products: (products > np.float32(threshold)).nonzero(as_tuple=True)
        )

    def sums(self, rows_RD: F32, others_MD: F32, clamp: float | None) -> tuple[Floats, Floats]:
        """Return the sums by row and by column: float32 within a panel, float64 across panels."""
        if len(rows_RD) * len(others_MD) < self.small:
            return ON_CPU.sums(rows_RD, others_MD, clamp)
        by_row, by_column = np.zeros(len(rows_RD)), np.zeros(len(others_MD))
        reduce = partial(_sums, clamp)
        for lo in range(0, len(rows_RD), _PANEL):
            for at in range(0, len(others_MD), _PANEL):
                here, there = slice(lo, lo + _PANEL), slice(at, at + _PANEL)
                rows, columns = self._reduced(rows_RD[here], others_MD[there], None, reduce)
                by_row[here] += rows
                by_column[there] += columns
        return by_row, by_column

    def _reduced(
        self, rows_RD: F32, others_MD: F32, lag: int | None, reduce: Callable[[Any], tuple[Any, ...]]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Multiply on the next device, and return two arrays that are made of the products."""
        import torch

        with self.devices.next() as device:
            products = _sent(rows_RD, device) @ _sent(others_MD, device).T
            if lag is not None and lag < len(others_MD):
                at = lag + torch.arange(len(rows_RD), device=device)
                products.masked_fill_(torch.arange(len(others_MD), device=device)[None, :] >= at[:, None], -torch.inf)
            one, two = reduce(products)
            return one.cpu().numpy(), two.cpu().numpy()


def _sums(clamp: float | None, products: Any) -> tuple[Any, Any]:
    if clamp is not None:
        products.masked_fill_(products < clamp, 0)
    return products.sum(dim=1), products.sum(dim=0)
