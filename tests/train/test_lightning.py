"""Lightly's MoCo v2 and SimCLR under a Lightning Trainer that prunes: tiny nets on random pictures."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as other_pl
import pytest
import pytorch_lightning as pl
import torch
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from thresher.dynamic.loss import moco_v2_losses, simclr_losses
from thresher.dynamic.policies.dynamic_random import DynamicRandom
from thresher.dynamic.policies.full import Full
from thresher.dynamic.policies.scan import Scan
from thresher.dynamic.policy import Policy
from thresher.dynamic.sampler import PruningSampler, with_rows
from thresher.dynamic.schedule import cosine_by_progress
from thresher.errors import UsageError
from thresher.train.lightning import PruningCallback, PruningLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

N, B, EPOCHS = 200, 40, 6
SCAN = Scan(rho=0.25, cycle=2, warmup=1)  # epochs of 5, 5, 3 or 4, 2 or 3, 5, ... batches: they shrink and grow again


class Pictures:
    """Two views of random pictures, always the same: then losses are too."""

    def __init__(self, rows: int = N) -> None:
        rng = torch.Generator().manual_seed(3)
        self.pictures = torch.rand(rows, 1, 3, 8, 8, generator=rng)
        self.views = self.pictures + 0.3 * torch.rand(rows, 2, 3, 8, 8, generator=rng)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, row: int) -> tuple[list[torch.Tensor], int]:
        return list(self.views[row]), row % 7


def pictures(rows: int = N) -> LightlyDataset:
    """Items (views, label, filename)."""
    return LightlyDataset.from_torch_dataset(Pictures(rows))


def backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def make_module(kind: str, lightning: Any = pl, *, manual: bool = False) -> Any:
    """Lightly's example of MoCo v2 or SimCLR, with losses per sample; keeps the batches that it saw."""

    class Base(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.sampler: PruningSampler | None = None
            self.seen: list[Any] = []
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            rows, ((one, two), labels, names) = batch
            assert labels.tolist() == [row % 7 for row in rows]
            assert list(names) == [str(row) for row in rows]
            loss = self.sampler.reduce(rows, self.losses(one, two))
            self.seen.append((self.current_epoch, batch_idx, rows.tolist(), loss.item()))
            if manual:
                self.manual_backward(loss)
                self.optimizers().step()
                self.optimizers().zero_grad()
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(batch_idx))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    class MoCo(Base):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Sequential(backbone(), MoCoProjectionHead(6, 12, 8))
            self.key = copy.deepcopy(self.query)
            deactivate_requires_grad(self.key)
            self.queue = MemoryBankModule(size=(64, 8), feature_dim_first=False)

        def losses(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
            update_momentum(self.query, self.key, m=0.9)
            query, key = self.query(one), self.key(two)
            key, queue = self.queue(nn.functional.normalize(key, dim=1), update=True)
            return moco_v2_losses(query, key, queue, 0.2)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # lightly does not save its queue
            checkpoint["queue"] = {name: buffer.clone() for name, buffer in self.queue.named_buffers()}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            for name, buffer in self.queue.named_buffers():
                buffer.copy_(checkpoint["queue"][name])

    class SimCLR(Base):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(backbone(), SimCLRProjectionHead(6, 12, 8, batch_norm=kind == "simclr"))

        def losses(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
            gather = torch.distributed.is_initialized()
            return simclr_losses(self.encoder(one), self.encoder(two), 0.5, gather=gather)

    torch.manual_seed(5)
    return MoCo() if kind == "moco" else SimCLR()


def make_sampler(policy: Policy = SCAN, epochs: int = EPOCHS, rows: int = N) -> PruningSampler:
    return PruningSampler(rows, policy=policy, batch_size=B, epochs=epochs, seed=1)


def make_trainer(folder: Path, *callbacks: Any, lightning: Any = pl, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "max_epochs": -1}
    needed = {"use_distributed_sampler": False, "reload_dataloaders_every_n_epochs": 1}
    settings = {"accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": False, **quiet, **needed}
    return lightning.Trainer(callbacks=list(callbacks), **{**settings, **options})


def fit(
    folder: Path,
    kind: str = "simclr",
    policy: Policy = SCAN,
    *callbacks: Any,
    lightning: Any = pl,
    manual: bool = False,
    ckpt: Path | None = None,
    val: bool = False,
    loader: dict[str, Any] | None = None,
    epochs: int = EPOCHS,
    **options: Any,
) -> tuple[Any, PruningSampler, Any]:
    """A run in new objects: the module, the sampler, the Trainer."""
    module, sampler = make_module(kind, lightning, manual=manual), make_sampler(policy, epochs)
    module.sampler = sampler
    options["enable_checkpointing"] = any(isinstance(c, lightning.callbacks.Checkpoint) for c in callbacks)
    trainer = make_trainer(folder, PruningCallback(sampler), *callbacks, lightning=lightning, **options)
    val_loader = DataLoader(torch.zeros(4, 1), batch_size=2) if val else None
    trainer.fit(module, PruningLoader(pictures(), sampler, **loader or {}), val_loader, ckpt_path=ckpt)
    return module, sampler, trainer


def bits(state: dict[str, Any]) -> dict[str, Any]:
    return {name: v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for name, v in state.items()}


class Told(pl.Callback):
    """Keeps what was logged when an epoch ended."""

    def __init__(self) -> None:
        self.told: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch:
            self.told.append({k: v.item() for k, v in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.told.append({k: v.item() for k, v in trainer.callback_metrics.items()})


# A run to its end


@pytest.mark.parametrize("kind", ["moco", "simclr"])
def test_a_run_prunes_what_was_promised_and_ends(kind: str, tmp_path: Path) -> None:
    policy, told = Scan.for_budget(0.25, 8, warmup=1), Told()
    module, sampler, trainer = fit(tmp_path, kind, policy, told, epochs=8, max_epochs=99)
    log = sampler.log()
    assert sampler.plan is None
    assert trainer.current_epoch == len(log) == 8
    assert log[-1]["pruned_so_far"] == pytest.approx(0.25, abs=0.03)
    assert len(module.seen) == trainer.global_step == sum(entry["steps"] for entry in log)
    assert [sum(epoch == e for epoch, *_ in module.seen) for e in range(8)] == [entry["rows"] // B for entry in log]
    if kind == "simclr":  # the queue of MoCo begins as noise, which is easily told from pictures
        assert log[-1]["loss"] < log[0]["loss"]
    for name in ("rows", "pruned_so_far", "loss"):
        assert [t[f"pruning/{name}"] for t in told.told] == pytest.approx([e[name] for e in log])


def test_both_lightnings_run_the_same(tmp_path: Path) -> None:
    one, of_one, _ = fit(tmp_path, lightning=pl, epochs=3)
    two, of_two, _ = fit(tmp_path, lightning=other_pl, epochs=3)
    assert one.seen == two.seen
    assert bits(of_one.state_dict()) == bits(of_two.state_dict())


@pytest.mark.parametrize("kind", ["moco", "simclr"])
def test_with_full_the_losses_are_those_of_lightly_with_a_plain_loader(kind: str, tmp_path: Path) -> None:
    module, sampler, _ = fit(tmp_path, kind, Full(), epochs=2)
    plain, order = make_module(kind), make_sampler(Full(), epochs=2)
    criterion = NTXentLoss(0.2, memory_bank_size=(64, 8)) if kind == "moco" else NTXentLoss(0.5)
    if kind == "moco":
        criterion.memory_bank.bank.copy_(plain.queue.bank)
    optimizer = plain.configure_optimizers()
    seen = []
    for epoch in range(2):
        batches = list(order)
        for i, ((one, two), _, _) in enumerate(DataLoader(pictures(), batch_sampler=batches)):
            if kind == "moco":
                update_momentum(plain.query, plain.key, m=0.9)
                loss = criterion(plain.query(one), plain.key(two))
            else:
                loss = criterion(plain.encoder(one), plain.encoder(two))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append((epoch, i, batches[i], loss.item()))
        order.end_epoch()
    assert [s[:3] for s in module.seen] == [s[:3] for s in seen]
    losses, expected = ([s[3] for s in each] for each in (module.seen, seen))
    assert losses[:3] == pytest.approx(expected[:3], rel=1e-5)
    assert losses == pytest.approx(expected, rel=1e-2)  # batch normalisation enlarges rounding


@pytest.mark.parametrize("lightning", [pl, other_pl], ids=["pytorch_lightning", "lightning"])
def test_loaders_of_the_module_workers_and_collate_functions(lightning: Any, tmp_path: Path) -> None:
    expected, _, _ = fit(tmp_path, epochs=4)

    module, sampler = make_module("simclr", lightning), make_sampler(epochs=4)
    module.sampler, asked = sampler, []

    def train_dataloader() -> PruningLoader:
        asked.append(module.current_epoch)
        return PruningLoader(pictures(), sampler, num_workers=1, collate_fn=MultiViewCollate())

    module.train_dataloader = train_dataloader
    make_trainer(tmp_path, PruningCallback(sampler), lightning=lightning).fit(module)
    assert module.seen == expected.seen
    assert asked == [0, 1, 2, 3]


def test_workers_that_stay_are_started_once_and_rows_stay_apart(tmp_path: Path) -> None:
    expected, _, _ = fit(tmp_path, epochs=4)
    module, _, trainer = fit(tmp_path, epochs=4, loader={"num_workers": 1, "persistent_workers": True})
    assert module.seen == expected.seen
    loader = PruningLoader(pictures(), make_sampler())
    rows, ((one, _), labels, names) = next(iter(loader))
    assert (type(rows).__name__, rows.dtype, one.shape) == ("ndarray", "int64", (B, 3, 8, 8))
    assert labels.tolist() == [row % 7 for row in rows]
    assert list(names) == [str(row) for row in rows]
    assert trainer.train_dataloader.num_workers == 1


def test_manual_optimisation_is_the_same(tmp_path: Path) -> None:
    automatic, _, _ = fit(tmp_path, epochs=3)
    manual, _, _ = fit(tmp_path, epochs=3, manual=True)
    assert manual.seen == automatic.seen


# Checkpoints


def every_step(folder: Path) -> Any:
    """A checkpoint after each step of the optimizer."""
    return pl.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
    )


def every_epoch(folder: Path) -> Any:
    return pl.callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, auto_insert_metric_name=False)


Run = tuple[Any, PruningSampler, Any]


def same_run(whole: Run, rest: Run, done: int, *, failed: bool = False) -> None:
    """The same batches at the same places, losses, ledgers, logs and weights."""
    assert rest[0].seen == whole[0].seen[done:]
    assert bits(rest[1].state_dict()) == bits(whole[1].state_dict())
    assert bits(rest[0].state_dict()) == bits(whole[0].state_dict())
    assert rest[2].current_epoch == whole[2].current_epoch == EPOCHS
    assert rest[2].global_step == whole[2].global_step
    if not failed:  # or Lightning itself counts one too many, for its loggers
        assert len({of[2].fit_loop.epoch_loop._batches_that_stepped for of in (whole, rest)}) == 1


@pytest.mark.parametrize("kind", ["moco", "simclr"])
@pytest.mark.parametrize(
    ("when", "options"),
    [
        (every_step, {}),
        pytest.param(every_epoch, {}, marks=pytest.mark.slow),
        pytest.param(every_step, {"accumulate_grad_batches": 2}, marks=pytest.mark.slow),
        pytest.param(every_step, {"val": True, "num_sanity_val_steps": 1}, marks=pytest.mark.slow),
        (every_epoch, {"val": True}),
        pytest.param(every_epoch, {"val": True, "val_check_interval": 0.5}, marks=pytest.mark.slow),
        pytest.param(every_epoch, {"precision": "bf16-mixed"}, marks=pytest.mark.slow),
    ],
    ids=["steps", "epochs", "steps-accumulated", "steps-val", "epochs-val", "half-epochs-val", "bf16"],
)
def test_resumed_from_any_checkpoint_it_goes_on_as_if_nothing_was(
    kind: str, when: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    whole = fit(tmp_path, kind, SCAN, when(tmp_path / "saved"), **options)
    saved = sorted((tmp_path / "saved").glob("*.ckpt"), key=lambda path: int(path.stem.partition("-")[0]))
    assert len(saved) >= EPOCHS
    for path in saved[:: 1 if kind == "simclr" else 5]:
        place = make_sampler()
        place.load_state_dict(torch.load(path, weights_only=True)["callbacks"]["PruningCallback"])
        done = place.total_steps() - place.steps_left()
        if done < len(whole[0].seen):
            same_run(whole, fit(tmp_path, kind, SCAN, ckpt=path, **options), done)


class StopAt(pl.Callback):
    """Stops the Trainer in the middle of an epoch, as a Timer does, or fails in the middle of a step."""

    def __init__(self, step: int, fails: str = "") -> None:
        self.step, self.fails = step, fails

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if self.fails == "before" and trainer.global_step == self.step - 1:
            raise KeyError("out of memory, say")

    def on_before_backward(self, trainer: Any, *args: Any) -> None:
        if self.fails == "after" and trainer.global_step == self.step - 1:
            raise KeyError("out of memory, say")


@pytest.mark.parametrize("step", [4, 7, 12])
def test_stopped_in_mid_epoch_it_resumes_there(step: int, tmp_path: Path) -> None:
    """Lightning counts such an epoch as done."""
    whole = fit(tmp_path)
    _, first, trainer = fit(tmp_path, "simclr", SCAN, StopAt(step), every_epoch(tmp_path / "saved"))
    assert first.step > 0
    same_run(whole, fit(tmp_path, ckpt=tmp_path / "saved" / f"{step}.ckpt"), step)
    trainer.save_checkpoint(tmp_path / "after.ckpt")  # by then it has counted to the end
    same_run(whole, fit(tmp_path, ckpt=tmp_path / "after.ckpt"), step)


@pytest.mark.parametrize("step", [4, 5, 6])
def test_a_step_that_failed_before_its_losses_is_done_again(step: int, tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True, every_n_epochs=99)
    with pytest.raises(KeyError, match="out of memory"):
        fit(tmp_path, "simclr", SCAN, StopAt(step, "before"), saving)
    same_run(fit(tmp_path), fit(tmp_path, ckpt=tmp_path / "failed.ckpt"), step - 1, failed=True)


@pytest.mark.parametrize("step", [4, 5, 7])
def test_a_step_that_failed_after_its_losses_is_not_done_again(step: int, tmp_path: Path) -> None:
    """Its gradient is lost, its rows are not trained on twice: the sampler's plan goes on."""
    whole, _, _ = fit(tmp_path)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True, every_n_epochs=99)
    with pytest.raises(KeyError, match="out of memory"):
        fit(tmp_path, "simclr", SCAN, StopAt(step, "after"), saving)
    module, sampler, trainer = fit(tmp_path, ckpt=tmp_path / "failed.ckpt")
    through_first_cycle = len([s for s in whole.seen if s[0] < 2])  # later plans depend on the lost step
    same = whole.seen[step:through_first_cycle]
    assert [s[:3] for s in module.seen[: len(same)]] == [s[:3] for s in same]
    assert trainer.current_epoch == len(sampler.log()) == EPOCHS
    epochs = [epoch for epoch, *_ in module.seen]
    per_epoch = [len(list(group)) for _, group in itertools.groupby(epochs)]
    assert per_epoch[1:] == [entry["steps"] for entry in sampler.log()][-len(per_epoch[1:]) :]


@pytest.mark.filterwarnings("ignore:Total length of `.*Loader` across ranks is zero")
def test_a_finished_run_has_nothing_to_resume_and_can_be_made_longer(tmp_path: Path) -> None:
    _, done, _ = fit(tmp_path, "simclr", SCAN, every_epoch(tmp_path / "saved"))
    (path,) = (p for p in (tmp_path / "saved").glob("*.ckpt") if int(p.stem) == done.total_steps())
    module, again, _ = fit(tmp_path, ckpt=path)
    assert module.seen == []
    assert bits(again.state_dict()) == bits(done.state_dict())
    module, longer, trainer = fit(tmp_path, ckpt=path, epochs=EPOCHS + 2)
    assert {epoch for epoch, *_ in module.seen} == {EPOCHS, EPOCHS + 1}
    assert trainer.current_epoch == len(longer.log()) == EPOCHS + 2


def test_rates_by_progress_fall_to_the_end_and_resume(tmp_path: Path) -> None:
    """The schedule is torch's own, so Lightning steps it, saves it and resumes it."""

    def run(ckpt: Path | None, *callbacks: Any) -> list[float]:
        module, sampler, rates = make_module("simclr"), make_sampler(), []
        module.sampler = sampler
        plain = module.configure_optimizers

        def configure_optimizers() -> Any:
            schedule = LambdaLR(optimizer := plain(), cosine_by_progress(sampler, warmup=0.2))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def on_train_batch_start(batch: Any, batch_idx: int) -> None:
            rates.append(module.optimizers().param_groups[0]["lr"])

        module.configure_optimizers, module.on_train_batch_start = configure_optimizers, on_train_batch_start
        trainer = make_trainer(tmp_path, PruningCallback(sampler), *callbacks, enable_checkpointing=bool(callbacks))
        trainer.fit(module, PruningLoader(pictures(), sampler), ckpt_path=ckpt)
        return rates

    whole = run(None, every_step(tmp_path / "saved"))
    assert 0 < whole[0] < 0.3 * max(whole)
    assert max(whole) == pytest.approx(0.1, rel=0.1)
    assert 0 < whole[-1] < 0.1 * max(whole)
    assert run(tmp_path / "saved" / "9.ckpt") == whole[9:]


def test_validating_leaves_the_sampler_alone(tmp_path: Path) -> None:
    module, sampler, _ = fit(tmp_path, "simclr", SCAN, every_step(tmp_path / "saved"))
    before = bits(sampler.state_dict())
    trainer = make_trainer(tmp_path, PruningCallback(sampler))
    trainer.validate(module, DataLoader(torch.zeros(4, 1)), ckpt_path=tmp_path / "saved" / "7.ckpt", verbose=False)
    assert bits(sampler.state_dict()) == before


def test_a_dev_run_is_a_few_steps(tmp_path: Path) -> None:
    module, sampler, _ = fit(tmp_path, fast_dev_run=2)
    assert len(module.seen) == sampler.step == 2


def test_a_callback_can_be_sent_to_other_processes() -> None:
    callback = PruningCallback(make_sampler())
    for again in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert isinstance(again, PruningCallback)
        assert isinstance(again, pl.Callback)
        assert isinstance(again, other_pl.Callback)
        assert bits(again.state_dict()) == bits(callback.state_dict())


@pytest.mark.slow
def test_without_a_lightning_in_use_it_takes_an_installed_one() -> None:
    code = (
        "import sys; from thresher.train.lightning import PruningCallback\n"
        "print({'lightning', 'pytorch_lightning'} & set(sys.modules))\n"
        "from thresher.dynamic.policies.full import Full\n"
        "from thresher.dynamic.sampler import PruningSampler as S\n"
        "kind = type(PruningCallback(S(4, policy=Full(), batch_size=2, epochs=1)))\n"
        "print(*(base.__module__ for base in kind.__mro__), 'pytorch_lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == "set()"
    own = "thresher.train.lightning"
    assert second == f"{own} {own} lightning.pytorch.callbacks.callback builtins False"


# Several processes


SCRIPT = """
import sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from tests.train.test_lightning import SPREAD, bits, every_step, fit
folder = Path(sys.argv[2])
module, sampler, trainer = fit(folder, "spread", SPREAD, every_step(folder / "saved"), strategy="ddp", devices=2)
state = sampler.state_dict()
torch.save([module.seen, state], folder / f"{trainer.global_rank}.pt")
"""
SPREAD = DynamicRandom(keep=0.7)  # plans that do not depend on the last digits of losses


@pytest.mark.slow
@pytest.mark.early
def test_two_processes_are_one_and_resume_on_one(tmp_path: Path) -> None:
    whole, sampler, _ = fit(tmp_path, "spread", SPREAD)
    root = str(Path(__file__).parents[2])
    script = tmp_path / "script.py"  # Lightning starts the second process by running it again
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, root, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (seen0, state0), (seen1, state1) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert bits(state0) == bits(state1)
    assert [a[2] + b[2] for a, b in zip(seen0, seen1, strict=True)] == [s[2] for s in whole.seen]
    assert [(a[3] + b[3]) / 2 for a, b in zip(seen0, seen1, strict=True)] == pytest.approx(
        [s[3] for s in whole.seen], rel=1e-4
    )
    recorded = sampler.state_dict()["ledger.losses"]
    torch.testing.assert_close(state0["ledger.losses"], recorded, rtol=1e-4, atol=0, equal_nan=True)  # nan: never drawn
    rest, _, _ = fit(tmp_path, "spread", SPREAD, ckpt=tmp_path / "saved" / "7.ckpt")
    assert [s[:3] for s in rest.seen] == [s[:3] for s in whole.seen[7:]]


# What cannot be carried out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_distributed_sampler": True}, "give use_distributed_sampler=False"),
        ({"reload_dataloaders_every_n_epochs": 0}, "give reload_dataloaders_every_n_epochs=1"),
        ({"limit_train_batches": 3}, r"Trainer with limit_train_batches=3; .* give limit_train_batches=1\.0"),
        ({"overfit_batches": 2}, "overfit_batches=0, limit_train_batches=1.0"),
        ({"max_steps": 7}, "give max_steps=-1"),
        ({"max_epochs": 5}, "a Trainer with max_epochs=5; to run all epochs of the sampler, give max_epochs=-1"),
        ({"val_check_interval": 3}, r"interval=3, but the shortest epoch .* has 2 batches: .* give .*=0\.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_change_batches_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        fit(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 2},
        {"val_check_interval": 9, "check_val_every_n_epoch": None},
        {"val_check_interval": 9, "limit_val_batches": 0},
        {"val_check_interval": "00:00:00:30"},
        {"max_epochs": EPOCHS},
    ],
)
def test_settings_that_let_the_run_end_are_not_refused(options: dict[str, Any], tmp_path: Path) -> None:
    _, sampler, _ = fit(tmp_path, val=True, **options)
    assert len(sampler.log()) == EPOCHS


def test_a_run_by_samples_has_a_trainer_without_a_last_epoch(tmp_path: Path) -> None:
    module = make_module("simclr")
    for max_epochs in (99, -1):
        module.sampler = sampler = PruningSampler(N, policy=SCAN, batch_size=B, samples=3 * N, seed=1)
        trainer = make_trainer(tmp_path, PruningCallback(sampler), max_epochs=max_epochs)
        if max_epochs == 99:
            with pytest.raises(UsageError, match="a Trainer with max_epochs=99; .* give max_epochs=-1"):
                trainer.fit(module, PruningLoader(pictures(), sampler))
        else:
            trainer.fit(module, PruningLoader(pictures(), sampler))
            assert len(module.seen) == 15


def test_other_loaders_and_samplers_are_refused(tmp_path: Path) -> None:
    sampler, other = make_sampler(), make_sampler()
    module = make_module("simclr")
    module.sampler = sampler
    for loader, message in (
        (DataLoader(with_rows(pictures()), batch_sampler=sampler), "trains on a DataLoader; give it one PruningLoader"),
        ([PruningLoader(pictures(), sampler)], "trains on a list"),
        (PruningLoader(pictures(), other), "the loader and the callback have different samplers"),
    ):
        with pytest.raises(UsageError, match=message):
            make_trainer(tmp_path, PruningCallback(sampler)).fit(module, loader)
    with pytest.raises(UsageError, match=r"a dataset of 199 rows for a sampler of 200; give both the same number"):
        PruningLoader(pictures(199), sampler)
    assert sampler.step == 0


def test_a_step_that_records_nothing_is_refused(tmp_path: Path) -> None:
    module, sampler = make_module("simclr"), make_sampler()
    module.sampler = make_sampler()
    with pytest.raises(UsageError, match=r"did not record the losses of batch 0; return sampler.reduce"):
        make_trainer(tmp_path, PruningCallback(sampler)).fit(module, PruningLoader(pictures(), sampler))


@pytest.mark.filterwarnings("ignore:Total length of `.*Loader` across ranks is zero")
def test_an_epoch_that_is_left_must_be_ended(tmp_path: Path) -> None:
    class Leave(pl.Callback):
        ends = False

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx == 3 else None

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if self.ends and pl_module.sampler.step:
                pl_module.sampler.end_epoch()

    leave = Leave()
    with pytest.raises(UsageError, match=r"epoch 0 of the sampler is at step 3 of 5; .* call sampler.end_epoch\(\)"):
        fit(tmp_path, "simclr", Full(), leave)
    leave.ends = True
    _, sampler, _ = fit(tmp_path, "simclr", Full(), leave)
    assert [entry["steps"] for entry in sampler.log()] == [3] * EPOCHS


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    fit(tmp_path, "simclr", SCAN, every_step(tmp_path / "saved"), epochs=1)
    path = tmp_path / "saved" / "3.ckpt"
    with pytest.raises(UsageError, match=r"the state of a sampler with policy = Scan"):
        fit(tmp_path, "simclr", Full(), ckpt=path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"] = {}
    torch.save(checkpoint, path)
    with pytest.raises(UsageError, match="saved without a PruningCallback; .* load_from_checkpoint"):
        fit(tmp_path, ckpt=path)


def test_a_stream_is_refused_with_what_to_do() -> None:
    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(4))

    with pytest.raises(UsageError, match="prune it as a stream"):
        PruningLoader(Stream(), PruningSampler(4, policy=Full(), batch_size=2, epochs=1))
