"""Pruning with the loader of timm, ``timm.data.create_loader``, in your own loop.

timm makes its loader from a batch size and its own sampler, and normalizes images on the device as it prefetches them.
:func:`pruning_loader` makes the same loader with the batches of a sampler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.dynamic.sampler import PruningSampler, collated_with_rows, with_rows
from thresher.errors import MissingExtraError, UsageError

try:
    import torch
    from timm.data import FastCollateMixup, create_loader
    from torch.utils.data import DataLoader
except ImportError:
    raise MissingExtraError("pruning with the loader of timm", "train") from None

_SAMPLERS = ("distributed", "num_aug_repeats", "input_size_choices", "use_multi_epochs_loader", "batch_size")


class TwoViews:
    """Two random views of an image, for MoCo and SimCLR: a transform that applies another one twice.

    The loader of timm puts the first views of a batch before the second ones: ``one, two = images.chunk(2)``.
    """

    def __init__(self, transform: Any) -> None:
        """Apply ``transform``, such as one of ``timm.data.create_transform``."""
        self.transform = transform

    def __call__(self, image: Any) -> tuple[Any, Any]:
        """Return two views of an image."""
        return self.transform(image), self.transform(image)


def pruning_loader(
    dataset: Any, sampler: PruningSampler, input_size: Any, *, views: int = 1, **options: Any
) -> PruningTimmLoader:
    """Return a loader of timm that yields ``(rows, (images, targets))`` of the rows that the sampler keeps.

    Args:
        dataset: A dataset of timm (``timm.data.create_dataset``, ``ImageDataset``), or any with ``len``, integer
            indices and an attribute ``transform``, whose items are ``(image, target)``.
        sampler: The sampler. It makes the batches, on every process its own rows.
        input_size: Height and width of the images, or (C, H, W).
        views: 1, or 2 for two random views of every image: then images are (2B, C, H, W), the first views before the
            second; with ``use_prefetcher=False`` a list of two, (B, C, H, W) each.
        **options: Other arguments of ``timm.data.create_loader``: augmentation, ``num_workers``, ``mean``, ``std``,
            ``device`` and so on. Defaults here: ``is_training=True``, and the GPU if there is one.

    Raises:
        UsageError: The dataset has another number of rows or no transform, or an option would make other batches.
    """
    if wrong := [f"{name}={options[name]!r}" for name in _SAMPLERS if options.get(name)]:
        raise UsageError(f"{', '.join(wrong)}: the sampler makes the batches of each process; leave it out")
    if isinstance(options.get("collate_fn"), FastCollateMixup):
        raise UsageError("FastCollateMixup mixes the images of two rows, which then have no losses of their own")
    if views not in (1, 2):
        raise UsageError(f"views = {views}; give 1 or 2")
    rows = len(with_rows(dataset))
    if rows != sampler.rows:
        raise UsageError(f"a dataset of {rows:,} rows for a sampler of {sampler.rows:,}; give both the same number")
    if not hasattr(dataset, "transform"):
        raise UsageError(
            f"a {type(dataset).__name__} has no attribute transform, which timm sets; give a dataset that applies its "
            "own, such as one of timm.data.create_dataset"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"is_training": True, "device": device, **options}
    loader = create_loader(dataset, input_size, sampler.batch_size, **options)
    if views == 2:
        dataset.transform = TwoViews(dataset.transform)
    if hasattr(dataset, "_max_retries"):
        dataset._max_retries = 1  # else timm returns the next image for one that cannot be read, under its row id
    return PruningTimmLoader(loader, sampler)


class PruningTimmLoader:
    """A loader of timm over the rows of a sampler; see :func:`pruning_loader`.

    Attributes:
        loader: The loader of timm, for its attributes such as ``mixup_enabled``.
    """

    def __init__(self, loader: Any, sampler: PruningSampler) -> None:
        """Replace the batches of ``loader``, a loader of ``timm.data.create_loader``, by those of ``sampler``."""
        self.loader, self._rows = loader, deque[npt.NDArray[np.int64]]()
        prefetches = hasattr(loader, "loader")
        plain = loader.loader if prefetches else loader
        self._batches = DataLoader(
            with_rows(plain.dataset),
            batch_sampler=sampler,
            collate_fn=collated_with_rows(plain.collate_fn),
            num_workers=plain.num_workers,
            pin_memory=plain.pin_memory,
            worker_init_fn=plain.worker_init_fn,
            persistent_workers=plain.persistent_workers,
        )
        if prefetches:
            loader.loader = _WithoutRows(self._batches, self._rows)
        self._prefetches, self._sampler = prefetches, sampler

    def __len__(self) -> int:
        """Return the number of batches left in the epoch."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.int64], Any]]:
        """Yield row ids (B,) int64 on the CPU, and ``(images, targets)``, of the batches left in the epoch."""
        if not self._prefetches:
            yield from self._batches
            return
        self._rows.clear()
        for images, targets in self.loader:  # which reads a batch ahead
            yield self._rows.popleft(), (images, targets)


class _WithoutRows:
    """The batches for the prefetching loader of timm, which takes pairs; their row ids are kept in order."""

    def __init__(self, batches: DataLoader[Any], rows: deque[npt.NDArray[np.int64]]) -> None:
        self.batches, self.rows = batches, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for rows, batch in self.batches:
            self.rows.append(rows)
            yield batch
