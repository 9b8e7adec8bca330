"""The sampler with the real accelerate of Hugging Face: prepared loaders, checkpoints, two processes, FSDP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from tests.ranks import free_port, on_ranks
from thresher.dynamic.ledger import Ledger
from thresher.dynamic.loss import clip_losses
from thresher.dynamic.policies.scan import Scan
from thresher.dynamic.sampler import PruningSampler, with_rows
from thresher.errors import UsageError

N, B, EPOCHS = 60, 12, 5


@pytest.fixture(autouse=True)
def _accelerate_starts_anew() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make() -> PruningSampler:
    return PruningSampler(
        N, policy=Scan(rho=0.3, cycle=2, warmup=1), batch_size=B, epochs=EPOCHS, seed=3, drop_last=False
    )


def pairs() -> TensorDataset:
    rng = np.random.Generator(np.random.Philox(0))
    image = rng.standard_normal((N, 8))
    return TensorDataset(torch.tensor(image).float(), torch.tensor(image + rng.standard_normal((N, 8))).float())


def towers() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"image": torch.nn.Linear(8, 4), "text": torch.nn.Linear(8, 4)})


class Both(torch.nn.Module):
    """Two towers in one module, as DDP and FSDP need it."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = towers()

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.towers["image"](image), self.towers["text"](text)


def train(
    sampler: PruningSampler,
    loader: Any,
    model: torch.nn.Module,
    optimizer: Any,
    *,
    gather: bool = False,
    until: int = -1,
) -> list[tuple[int, list[int]]]:
    """Go on to the end, or until a number of steps; the epoch and the rows of every batch."""
    done: list[tuple[int, list[int]]] = []
    for epoch in range(sampler.epoch, sampler.epochs):
        sampler.set_epoch(epoch)
        for rows, (image, text) in loader:
            losses = clip_losses(*model(image, text), 5.0, gather=gather)
            optimizer.zero_grad()
            sampler.reduce(rows, losses).backward()
            optimizer.step()
            done.append((epoch, rows.tolist()))
            if len(done) == until:
                return done
    return done


def alone() -> tuple[list[tuple[int, list[int]]], Ledger, torch.nn.Module]:
    """The run without accelerate."""
    sampler, model = make(), Both()
    loader = DataLoader(with_rows(pairs()), batch_sampler=sampler)
    done = train(sampler, loader, model, torch.optim.SGD(model.parameters(), lr=0.1))
    return done, sampler.ledger, model


def same(one: Ledger, other: Ledger) -> bool:
    a, b = one.state(), other.state()
    return {name: array.tobytes() for name, array in a.items()} == {name: array.tobytes() for name, array in b.items()}


@pytest.mark.parametrize("dispatch", [None, True])
def test_a_prepared_loader_on_one_process_trains_the_same(dispatch: bool | None) -> None:
    expected, ledger, _ = alone()
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    sampler, model = make(), Both()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(with_rows(pairs()), batch_sampler=sampler)
    )
    assert train(sampler, loader, model, optimizer) == expected
    assert same(sampler.ledger, ledger)


def test_a_run_resumes_from_a_checkpoint_of_accelerate(tmp_path: Path) -> None:
    """With new objects, in the middle of a later epoch: prepared loaders count epochs from 0 again."""
    expected, ledger, _ = alone()
    cut = next(i for i, (epoch, _) in enumerate(expected) if epoch == 2) + 2

    def prepared() -> tuple[Any, ...]:
        accelerator = Accelerator(cpu=True)
        sampler, model = make(), Both()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loader = accelerator.prepare(DataLoader(with_rows(pairs()), batch_sampler=sampler))
        accelerator.register_for_checkpointing(sampler)
        return accelerator, (sampler, loader, model, optimizer)

    accelerator, run = prepared()
    assert train(*run, until=cut) == expected[:cut]
    accelerator.save_state(str(tmp_path / "state"))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator, run = prepared()
    accelerator.load_state(str(tmp_path / "state"))
    assert train(*run) == expected[cut:]
    assert same(run[0].ledger, ledger)


def test_an_epoch_of_a_prepared_loader_can_end_early() -> None:
    accelerator, sampler = Accelerator(cpu=True), make()
    loader = accelerator.prepare(DataLoader(with_rows(pairs()), batch_sampler=sampler))
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for rows, _ in loader:
            sampler.reduce(rows, torch.rand(len(rows), 2))
            sampler.end_epoch()
            break
    assert sampler.epoch == 2
    assert [entry["samples"] for entry in sampler.log()] == [B, B]


def test_set_epoch_is_checked_as_before_where_the_loader_is_not_of_accelerate() -> None:
    accelerator, sampler = Accelerator(cpu=True), make()
    with pytest.raises(UsageError, match=r"set_epoch\(3\), but epoch 0 is at step 0"):
        sampler.set_epoch(3)
    for _ in accelerator.prepare(DataLoader(TensorDataset(torch.arange(3)))):  # another loader is in use
        with pytest.raises(UsageError, match=r"set_epoch\(3\), but epoch 0 is at step 0"):
            sampler.set_epoch(3)


# What cannot work


class Lines(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield from range(10)


class Counted(Lines):
    def __len__(self) -> int:
        return 10


class Numbered(Counted):
    """Iterable, but it can also be read by number, as the StreamingDataset of MosaicML can."""

    def __getitem__(self, row: int) -> int:
        return row


def generated() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"caption": ["a", "b"]}).to_iterable_dataset()


@pytest.mark.parametrize(
    "dataset", [Lines, Counted, generated, lambda: iter([1, 2]), lambda: {1, 2}, lambda: (x for x in [1])]
)
def test_a_dataset_without_row_numbers_is_refused_at_once(dataset: Any) -> None:
    with pytest.raises(UsageError, match="has no row numbers: .*; prune it as a stream, with StreamPruner"):
        with_rows(dataset())


def test_a_dictionary_of_splits_is_refused_at_once() -> None:
    from datasets import Dataset, DatasetDict

    splits = DatasetDict({"train": Dataset.from_dict({"a": [1]}), "test": Dataset.from_dict({"a": [1]})})
    with pytest.raises(UsageError, match="a DatasetDict of 'train', 'test'; give one of its datasets"):
        with_rows(splits)
    assert with_rows(splits["train"])[0] == (0, {"a": 1})


def test_what_can_be_read_by_number_is_taken() -> None:
    assert with_rows(Numbered())[3] == (3, 3)
    assert with_rows([5, 6])[1] == (1, 6)
    assert len(with_rows(np.zeros((4, 2)))) == 4


def test_a_sampler_that_a_framework_injects_is_refused() -> None:
    """As Lightning makes a batch sampler anew: ``type(batch_sampler)(sampler, batch_size=..., drop_last=...)``."""
    from lightning.fabric.utilities.data import _dataloader_init_kwargs_resolve_sampler

    loader = DataLoader(with_rows(pairs()), batch_sampler=make())
    with pytest.raises(UsageError, match="a DistributedSampler instead of .*, set use_distributed_sampler=False"):
        _dataloader_init_kwargs_resolve_sampler(loader, DistributedSampler(range(N), 2, 0))


# Several processes: gloo, on this machine only.


def on_rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    os.environ.update({**here, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"})
    found: dict[str, Any] = {}
    for how in ({}, {"split_batches": True}, {"even_batches": False}, {"dispatch_batches": True}):
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**how))
        loader = accelerator.prepare(DataLoader(with_rows(pairs()), batch_sampler=make()))
        with pytest.raises(UsageError, match="prepared by accelerate, .* 2 processes again; leave it out of"):
            next(iter(loader))
        AcceleratorState._reset_state()
        GradientState._reset_state()
    accelerator, sampler = Accelerator(cpu=True), make()
    model = Both()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.register_for_checkpointing(sampler)
    loader = DataLoader(with_rows(pairs()), batch_sampler=sampler)
    done = train(sampler, loader, model, optimizer, gather=True, until=12)
    accelerator.save_state(f"{folder}/state")
    accelerator.wait_for_everyone()
    sampler.load_state_dict(make().state_dict())  # what load_state must replace
    accelerator.load_state(f"{folder}/state")
    done += train(sampler, loader, model, optimizer, gather=True)
    found["accelerate"] = done, sampler.state_dict(), accelerator.unwrap_model(model).state_dict()

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sampler, sharded = make(), Both()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    loader = DataLoader(with_rows(pairs()), batch_sampler=sampler)
    done = train(sampler, loader, sharded, torch.optim.SGD(sharded.parameters(), lr=0.1), gather=True)
    weights = {name: tensor.full_tensor() for name, tensor in sharded.state_dict().items()}
    found["fsdp"] = done, sampler.state_dict(), weights
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_on_two_processes_every_row_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and optimizer prepared by accelerate or sharded by FSDP, the loader not: the run is that of one process."""
    on_ranks(monkeypatch, 2, on_rank, str(tmp_path), free_port())
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    expected, ledger, model = alone()
    for how in ("accelerate", "fsdp"):
        parts = [found[how] for found in ranks]
        together = [(a[0], a[1] + b[1]) for a, b in zip(parts[0][0], parts[1][0], strict=True)]
        assert together == expected
        for epoch in range(EPOCHS):
            rows = [row for at, batch in together if at == epoch for row in batch]
            assert len(rows) == len(set(rows)) > 0
        for _, state, weights in parts:
            losses = state["ledger.losses"].numpy()
            np.testing.assert_allclose(losses, ledger.losses_NR, rtol=1e-4)
            np.testing.assert_array_equal(state["ledger.seen"].numpy(), ledger.seen_N)
            np.testing.assert_array_equal(state["ledger.marks"].numpy(), ledger.marks_N)
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)
