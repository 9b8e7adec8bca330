"""timm's own loader with a sampler: its transforms, its prefetching, the rows of the plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset, create_loader
from torch.utils.data import Subset

from thresher.dynamic.policies.dynamic_random import DynamicRandom
from thresher.dynamic.policies.full import Full
from thresher.dynamic.sampler import PruningSampler, with_rows
from thresher.errors import UsageError
from thresher.train.timm_loader import pruning_loader

N, B = 20, 4


class Pictures:
    """Grey pictures whose brightness is their row; the target is ten times the row."""

    def __init__(self) -> None:
        self.transform: Any = None

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[Any, int]:
        picture = Image.fromarray(np.full((12, 12, 3), 10 * row, np.uint8))
        return (self.transform(picture) if self.transform else picture), 10 * row


def make(policy: Any, epochs: int = 3) -> PruningSampler:
    return PruningSampler(N, policy=policy, batch_size=B, epochs=epochs, seed=2)


PLAIN: dict[str, Any] = {"no_aug": True, "mean": (0.0,) * 3, "std": (1.0,) * 3, "num_workers": 0}


@pytest.mark.parametrize(
    ("how", "views"),
    [({}, 1), ({}, 2), ({"use_prefetcher": False}, 1), ({"num_workers": 2}, 1), ({"num_workers": 2}, 2)],
)
def test_every_image_comes_with_its_row_in_the_order_of_the_plan(how: dict[str, Any], views: int) -> None:
    sampler, like = make(DynamicRandom(keep=0.6)), make(DynamicRandom(keep=0.6))
    loader = pruning_loader(Pictures(), sampler, 8, views=views, **{**PLAIN, **how})
    for epoch in range(3):
        assert sampler.epoch == epoch
        assert len(loader) == len(like) == 3
        for (rows, (images, targets)), expected in zip(loader, like, strict=True):
            assert rows.dtype == np.int64
            assert rows.tolist() == expected
            assert images.shape == (views * B, 3, 8, 8)
            assert targets.tolist() == [10 * row for row in expected] * views
            for part in images.chunk(views):
                torch.testing.assert_close(part[:, 0, 4, 4] * 255, torch.tensor(expected) * 10.0, rtol=0, atol=0.01)
            sampler.reduce(rows, torch.rand(B, 2))
            like.reduce(np.array(expected), torch.rand(B, 2))
    assert sampler.plan is None


def test_two_views_without_prefetching_are_a_list() -> None:
    loader = pruning_loader(Pictures(), make(Full()), 8, views=2, **PLAIN, use_prefetcher=False)
    rows, ((one, two), _) = next(iter(loader))
    assert one.shape == two.shape == (B, 3, 8, 8)
    assert torch.equal(one, two)


def test_the_two_views_are_drawn_apart() -> None:
    torch.manual_seed(0)
    loader = pruning_loader(Pictures(), make(Full()), 8, views=2, num_workers=0, color_jitter=0.9)
    _, (images, _) = next(iter(loader))
    one, two = images.chunk(2)
    assert not torch.equal(one, two)


def test_images_are_those_of_the_loader_of_timm() -> None:
    """The same batches, one after another."""
    theirs = create_loader(Pictures(), 8, B, device=torch.device("cpu"), **PLAIN)
    sampler = make(Full())
    sampler.reorder(np.arange(N))
    ours = pruning_loader(Pictures(), sampler, 8, **{**PLAIN, "is_training": False})
    for (rows, (images, targets)), (expected, labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(targets, labels)
        sampler.reduce(rows, torch.rand(B, 1))


def test_it_goes_on_where_a_state_was_saved() -> None:
    sampler = make(Full())
    first = next(iter(pruning_loader(Pictures(), sampler, 8, **PLAIN)))
    sampler.reduce(first[0], torch.rand(B, 1))
    again = make(Full())
    again.load_state_dict(sampler.state_dict())
    rest = pruning_loader(Pictures(), again, 8, **PLAIN)
    assert len(rest) == N // B - 1
    assert next(iter(rest))[0].tolist() == next(iter(sampler))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves that to the interpreter
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO")
def test_an_image_that_cannot_be_read_is_not_replaced_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for row in range(N):
        Image.new("RGB", (12, 12)).save(tmp_path / "a" / f"{row:02d}.png")
    (tmp_path / "a" / "07.png").write_bytes(b"damaged")
    dataset = ImageDataset(str(tmp_path))
    loader = pruning_loader(dataset, make(Full()), 8, **PLAIN)
    with pytest.raises(RuntimeError, match="Failed to load 1 consecutive samples"):
        list(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distributed": True}, "distributed=True: the sampler makes the batches"),
        ({"num_aug_repeats": 3}, "num_aug_repeats=3: the sampler makes the batches"),
        ({"batch_size": 3}, "batch_size=3: the sampler makes the batches"),
        ({"views": 3}, "views = 3; give 1 or 2"),
        ({"collate_fn": FastCollateMixup()}, "mixes the images of two rows"),
    ],
)
def test_what_would_make_other_batches_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pruning_loader(Pictures(), make(Full()), 8, **options)


def test_a_dataset_whose_transform_timm_cannot_set_is_refused() -> None:
    for dataset, name in ((with_rows(Pictures()), "with_rows"), (Subset(Pictures(), range(N)), "Subset")):
        with pytest.raises(UsageError, match=f"a {name} has no attribute transform, which timm sets; give a dataset"):
            pruning_loader(dataset, make(Full()), 8)


def test_another_number_of_rows_is_refused() -> None:
    sampler = PruningSampler(N + 1, policy=Full(), batch_size=B, epochs=1)
    with pytest.raises(UsageError, match="a dataset of 20 rows for a sampler of 21"):
        pruning_loader(Pictures(), sampler, 8)
