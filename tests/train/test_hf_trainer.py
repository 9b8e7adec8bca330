"""The Trainer of transformers with a sampler: tiny models on random pairs, on one process and on two."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.nn import functional as F
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipModel,
    Trainer,
    TrainingArguments,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from tests.ranks import free_port, on_ranks
from thresher.cli.main import main
from thresher.dynamic.policies.dynamic_random import DynamicRandom
from thresher.dynamic.policies.full import Full
from thresher.dynamic.policies.infobatch import InfoBatch
from thresher.dynamic.policies.jest import Jest
from thresher.dynamic.policies.scan import Scan
from thresher.dynamic.policy import Policy
from thresher.dynamic.run_folder import Training
from thresher.dynamic.sampler import PruningSampler, with_rows
from thresher.errors import OutputError, PoolError, UsageError
from thresher.testing.pools import write_pool
from thresher.train.hf_trainer import STATE, PruningTrainer, sample_losses

N, B, PARTS, EPOCHS = 60, 12, 2, 5
SCAN = Scan(rho=0.25, cycle=2, warmup=1)  # epochs that shrink and grow again
ON = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES, TOKENS = {**ON, "image_size": 8, "patch_size": 4}, {**ON, "vocab_size": 30, "max_position_embeddings": 8}


@pytest.fixture(autouse=True)
def _accelerate_starts_anew() -> Any:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@functools.cache
def pairs() -> list[dict[str, Any]]:
    rng = torch.Generator().manual_seed(0)
    pixels, ids = torch.rand(N, 3, 8, 8, generator=rng), torch.randint(3, 29, (N, 6), generator=rng)
    ids[:, -1] = 29  # the end of the text
    return [
        {"pixel_values": p, "input_ids": i, "attention_mask": torch.ones_like(i)}
        for p, i in zip(pixels, ids, strict=True)
    ]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {**{name: torch.stack([item[name] for item in items]) for name in items[0]}, "return_loss": True}


def clip(dropout: float = 0.0) -> CLIPModel:
    text = {**TOKENS, "eos_token_id": 29, "attention_dropout": dropout}
    torch.manual_seed(1)
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config={**EYES, "attention_dropout": dropout}, projection_dim=8)
    )


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    given = {
        "num_train_epochs": EPOCHS, "per_device_train_batch_size": B // PARTS, "gradient_accumulation_steps": PARTS,
        "learning_rate": 2e-3, "warmup_steps": 2, "lr_scheduler_type": "cosine", "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**given, **more})


class Watched(PruningTrainer):
    """Keeps the rows and the losses of every part, and raises an exception after ``until`` of them."""

    until = 10**9

    def losses_per_sample(self, model: Any, inputs: dict[str, Any]) -> Any:
        self.seen = getattr(self, "seen", [])
        if len(self.seen) == self.until:
            raise InterruptedError
        losses, outputs = super().losses_per_sample(model, inputs)
        self.seen.append((self.sampler.epoch, losses.detach().clone()))
        return losses, outputs


def make(
    folder: Path, policy: Policy = SCAN, model: Any = None, sampler: PruningSampler | None = None, data: Any = None,
    *, args: dict[str, Any] | None = None, **more: Any,
) -> Watched:  # fmt: skip
    sampler = sampler or PruningSampler(N, policy=policy, batch_size=B, epochs=EPOCHS, seed=3)
    data = pairs() if data is None else data
    how = {"model": model or clip(), "args": arguments(folder, **args or {}), "data_collator": collate, **more}
    return Watched(train_dataset=data, sampler=sampler, **how)


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def bits(state: dict[str, Any]) -> dict[str, Any]:
    return {name: v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for name, v in state.items()}


# A run to its end


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(SCAN, id="scan"),
        pytest.param(InfoBatch(epochs=EPOCHS), id="infobatch", marks=pytest.mark.slow),
        pytest.param(DynamicRandom(keep=0.6), id="dynamic-random", marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_on_the_plans_of_the_policy_and_ends(policy: Policy, tmp_path: Path) -> None:
    trainer = make(tmp_path, policy)
    done = trainer.train()
    log = trainer.sampler.log()
    assert trainer.sampler.plan is None
    assert len(log) == EPOCHS
    assert done.global_step == trainer.state.max_steps == sum(entry["steps"] for entry in log)
    assert [sum(at == e for at, _ in trainer.seen) for e in range(EPOCHS)] == [entry["steps"] * PARTS for entry in log]
    assert trainer.state.epoch == EPOCHS
    assert log[-1]["pruned_so_far"] > 0
    for name in ("rows", "pruned_so_far", "loss"):
        assert logged(trainer, f"pruning_{name}") == [entry[name] for entry in log]
    rates = logged(trainer, "learning_rate")  # of the steps before: the schedule ends at 0 with the run
    assert len(rates) == done.global_step
    assert max(rates) == pytest.approx(2e-3, rel=0.1)
    assert rates[-1] < 4e-4
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([0.0, 0.0], abs=1e-9)


def assert_same_as_a_trainer(ours: PruningTrainer, model: Any, data: list[Any], folder: Path, **more: Any) -> None:
    """On the same batches, which it is given as one epoch in this order. Both have optimizer sgd and no pruning."""
    order = PruningSampler(N, policy=Full(), batch_size=B, epochs=EPOCHS, seed=3)
    rows = []
    for _ in range(EPOCHS):
        for batch in order:
            rows += batch
            order.reduce(np.array(batch), torch.zeros(len(batch), 2))
    args = arguments(folder, optim="sgd", num_train_epochs=1, train_sampling_strategy="sequential")
    theirs = Trainer(model=model, args=args, train_dataset=[data[row] for row in rows], **more)
    theirs.train()
    assert logged(ours, "learning_rate") == logged(theirs, "learning_rate")
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)
    for (name, a), b in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_with_full_weights_and_losses_are_those_of_the_trainer(tmp_path: Path) -> None:
    ours = make(tmp_path / "ours", Full(), args={"optim": "sgd"})
    ours.train()
    assert_same_as_a_trainer(ours, clip(), pairs(), tmp_path / "theirs", data_collator=collate)


def test_the_parts_of_a_step_are_ranked_together(tmp_path: Path) -> None:
    """With gradient accumulation, as one batch: the ledger is that of a loop without a Trainer."""
    trainer = make(tmp_path, Scan(rho=0.25, cycle=2, warmup=0))
    trainer.train()
    like = PruningSampler(N, policy=Scan(rho=0.25, cycle=2, warmup=0), batch_size=B, epochs=EPOCHS, seed=3)
    parts = iter(losses for _, losses in trainer.seen)
    for _ in range(EPOCHS):
        for rows in like:
            like.reduce(np.array(rows), torch.cat([next(parts) for _ in range(PARTS)]))
    assert bits(trainer.sampler.state_dict()) == bits(like.state_dict())


def test_max_steps_is_exact_under_any_policy(tmp_path: Path) -> None:
    sampler = PruningSampler(N, policy=SCAN, batch_size=B, samples=17 * B, seed=3)
    trainer = make(tmp_path, sampler=sampler, args={"max_steps": 17})
    assert trainer.train().global_step == 17
    assert sampler.plan is None
    assert sum(entry["steps"] for entry in sampler.log()) == 17


def test_evaluation_is_that_of_the_trainer(tmp_path: Path) -> None:
    args = {"eval_strategy": "epoch", "per_device_eval_batch_size": 15, "label_names": []}
    trainer = make(tmp_path, args=args, eval_dataset=pairs()[:30])
    trainer.train()
    found = logged(trainer, "eval_loss")
    assert len(found) == EPOCHS
    args = arguments(tmp_path / "b", per_device_eval_batch_size=15, label_names=[])
    plain = Trainer(model=trainer.model, args=args, data_collator=collate)
    assert plain.evaluate(pairs()[:30])["eval_loss"] == pytest.approx(found[-1])
    assert [entry["epoch"] for entry in trainer.state.log_history if "eval_loss" in entry] == [1, 2, 3, 4, 5]


def test_datasets_and_unused_columns(tmp_path: Path) -> None:
    """A dataset of ``datasets`` loses the columns that the model does not take, as in a Trainer."""
    from datasets import Dataset

    columns = {name: [item[name].numpy() for item in pairs()] for name in pairs()[0]}
    data = Dataset.from_dict({**columns, "unused": ["a"] * N}).with_format("torch")
    trainer = make(tmp_path, data=data, args={"num_train_epochs": EPOCHS})
    trainer.train()
    same = make(tmp_path / "list")
    same.train()
    assert logged(trainer, "loss") == logged(same, "loss")


def test_a_dataset_that_is_wrapped_already_is_not_wrapped_again(tmp_path: Path) -> None:
    assert with_rows(with_rows("ab"))[1] == (1, "b")
    loader = make(tmp_path, data=with_rows(pairs())).get_train_dataloader()
    assert set(next(iter(loader))) == {*pairs()[0], "return_loss", "row_ids"}


# Resume


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(3, id="in an epoch", marks=pytest.mark.slow),
        pytest.param(7, id="in a later epoch"),
        pytest.param(5, id="between epochs", marks=pytest.mark.slow),
    ],
)
def test_a_run_cut_off_resumes_bit_for_bit(steps: int, tmp_path: Path) -> None:
    """With dropout, whose draws must be the same; in new objects, from the last checkpoint."""
    how = {"save_strategy": "steps", "save_steps": steps, "save_total_limit": 1}
    whole = make(tmp_path / "whole", model=clip(0.2), args=how)
    whole.train()
    cut = make(tmp_path / "cut", model=clip(0.2), args=how)
    cut.until = (steps + 1) * PARTS + 1
    with pytest.raises(InterruptedError):
        cut.train()
    torch.manual_seed(99)
    again = make(tmp_path / "cut", model=clip(0.2), args=how)
    again.train(resume_from_checkpoint=True)
    assert bits(again.model.state_dict()) == bits(whole.model.state_dict())
    assert bits(again.sampler.state_dict()) == bits(whole.sampler.state_dict())
    assert again.state.global_step == whole.state.global_step
    for name in ("loss", "learning_rate", "pruning_rows", "pruning_loss"):
        assert logged(again, name) == logged(whole, name)
    for name in ("log.jsonl", "ledger.npz"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    how = {"save_strategy": "steps", "save_steps": 6, "save_total_limit": 1}
    make(tmp_path, args=how).train()
    folder = next(tmp_path.glob("checkpoint-*"))
    with pytest.raises(OutputError, match="has a training run already; pass resume_from_checkpoint=True"):
        make(tmp_path).train()
    with pytest.raises(UsageError, match="policy = "):
        make(tmp_path, Full()).train(str(folder))
    with pytest.raises(UsageError, match="has no checkpoint to resume from"):
        make(tmp_path / "none").train(True)
    (folder / STATE).write_bytes(b"PK damaged")
    with pytest.raises(PoolError, match="cannot be read, it may be damaged"):
        make(tmp_path).train(str(folder))
    (folder / STATE).unlink()
    with pytest.raises(UsageError, match="the checkpoint was saved without pruning"):
        make(tmp_path).train(str(folder))


def test_a_sampler_is_for_one_run(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    shutil.rmtree(tmp_path)
    with pytest.raises(UsageError, match="the sampler is in epoch 5; for a new run create a sampler"):
        trainer.train()


# What the run leaves


def test_the_folder_is_read_like_one_of_the_trainers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "rows.parquet").write_bytes(b"of a run that was killed")
    make(folder, keys=[f"key-{row}" for row in range(N)]).train()
    training = Training.load(folder)
    assert (training.task, training.policy, training.rows) == ("trainer", "scan", N)
    assert len(training.log()) == EPOCHS
    assert training.ledger().seen_N.max() == EPOCHS - 1
    shutil.copytree(folder, tmp_path / "other")
    for words in (
        ["report", str(folder), "-o", str(tmp_path / "page.html")],
        ["explain", str(folder), "key-7"],
        ["compare", str(folder), str(tmp_path / "other")],
        ["coreset", str(folder), "-o", str(tmp_path / "core"), "--keep", "50%"],
        ["export", str(tmp_path / "core"), "--as", "keys", "-o", str(tmp_path / "keys.txt")],
    ):
        assert main(words) == 0, capsys.readouterr().err
    kept = (tmp_path / "keys.txt").read_text().split()
    assert len(kept) == N // 2
    assert set(kept) <= {f"key-{row}" for row in range(N)}


def test_a_run_on_the_rows_of_a_pool_names_it(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((N, 4)).astype(np.float32)
    write_pool(tmp_path / "pool", vectors, vectors)
    trainer = make(tmp_path / "run", DynamicRandom(keep=0.5), pool=tmp_path / "pool")
    trainer.train()
    assert Training.load(tmp_path / "run").open_pool().total == N
    with pytest.raises(UsageError, match="give one for each row, or a pool"):
        make(tmp_path / "b", keys=["a"])


# Losses


def test_losses_of_models_of_transformers() -> None:
    """In the mean they are the losses that the models return, and row by row those of a loop."""
    batch = collate(pairs()[:7])
    torch.manual_seed(2)
    siglip = SiglipModel(SiglipConfig(text_config={**TOKENS, "projection_size": 8}, vision_config=EYES))
    both = VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig.from_vision_text_configs(
            CLIPVisionConfig(**EYES), BertConfig(**TOKENS), projection_dim=8
        )
    )
    for model in (clip(), siglip, both):
        outputs = model.eval()(**batch)
        losses = sample_losses(model, outputs)
        assert losses.shape == (7, 2)
        torch.testing.assert_close(losses.mean(), outputs.loss)
    logits = outputs.logits_per_image
    for row in range(7):
        torch.testing.assert_close(losses[row, 0], -logits[row].log_softmax(0)[row])


class Classifier(torch.nn.Module):
    """With a loss that has more terms than the cross-entropy, if ``more`` is not 0."""

    accepts_loss_kwargs = False  # else a Trainer expects it to divide by the number of labels of all parts

    def __init__(self, more: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.more = torch.nn.Linear(4, 3), more

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        logits, term = self.layer(x), self.more * self.layer.weight.pow(2).sum()
        return {"loss": F.cross_entropy(logits, labels) + term, "logits": logits, "term": term}


def labelled() -> list[dict[str, Any]]:
    rng = torch.Generator().manual_seed(0)
    return [{"x": x, "labels": int(x[0] > 0)} for x in torch.randn(N, 4, generator=rng)]


def test_a_classifier_prunes_too(tmp_path: Path) -> None:
    """With labels, which a Trainer counts to scale the loss: here the loss is the mean of the batch."""

    trainer = make(tmp_path, model=Classifier(), data=labelled(), data_collator=None)
    trainer.train()
    assert trainer.seen[0][1].shape == (B // PARTS, 1)
    losses = torch.cat([losses for _, losses in trainer.seen[:PARTS]])
    assert logged(trainer, "loss")[0] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_a_term_that_the_model_adds_is_not_lost(tmp_path: Path) -> None:
    """It is refused, unless compute_loss adds it: then the run is that of a Trainer."""

    class Both(Watched):
        def losses_per_sample(self, model: Any, inputs: dict[str, Any]) -> Any:
            outputs = model(**inputs)
            return sample_losses(model, outputs, inputs["labels"]), outputs

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, True, **more)
            loss = loss + outputs["term"]
            return (loss, outputs) if return_outputs else loss

    with pytest.raises(UsageError, match="Classifier returns a loss of .*: the difference would not be trained"):
        make(tmp_path / "refused", model=Classifier(0.1), data=labelled(), data_collator=None).train()
    sampler = PruningSampler(N, policy=Full(), batch_size=B, epochs=EPOCHS, seed=3)
    args, data = arguments(tmp_path / "ours", optim="sgd"), labelled()
    ours = Both(model=Classifier(0.1), args=args, sampler=sampler, train_dataset=data)
    ours.train()
    assert_same_as_a_trainer(ours, Classifier(0.1), data, tmp_path / "theirs")
    plain = make(tmp_path / "plain", Full(), Classifier(), data=data, data_collator=None, args={"optim": "sgd"})
    plain.train()
    assert not torch.allclose(ours.model.layer.weight, plain.model.layer.weight, rtol=1e-2)


class Learned(torch.nn.Module):
    """A model of images and texts with the small losses and the scale of one that is trained; adds a term."""

    def __init__(self, term: float, sigmoid: bool) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(2)
        self.texts = torch.nn.Embedding(30, 64, _weight=torch.randn(30, 64, generator=rng))
        self.images = torch.nn.Linear(192, 64)
        self.logit_scale, self.term = torch.nn.Parameter(torch.tensor(100.0).log()), term
        if sigmoid:
            self.logit_bias = torch.nn.Parameter(torch.tensor(-90.0))

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, **_: Any) -> dict[str, Any]:
        text = F.normalize(0.3 * self.texts(input_ids).mean(1) + self.texts.weight[0], dim=1)  # cosines above 0.9
        image = F.normalize(text + 0.3 * F.normalize(self.images(pixel_values.flatten(1)), dim=1), dim=1)
        logits = image @ text.T * self.logit_scale.exp()
        if hasattr(self, "logit_bias"):
            logits = logits + self.logit_bias
            loss = -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum(1).mean()
        else:
            target = torch.arange(len(logits))
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        embeds = {"image_embeds": image, "text_embeds": text}
        return {"loss": loss * (1 + self.term), "logits_per_image": logits, **embeds}


@pytest.mark.parametrize("sigmoid", [False, True])
def test_rounded_logits_are_not_taken_for_a_term_of_the_loss(sigmoid: bool, tmp_path: Path) -> None:
    def run(folder: str, term: float) -> None:
        sampler = PruningSampler(N, policy=Full(), batch_size=B, samples=B, seed=3)
        args = {"bf16": True, "max_steps": 1}
        make(tmp_path / folder, model=Learned(term, sigmoid), sampler=sampler, args=args).train()

    run("rounded", 0.0)
    with pytest.raises(UsageError, match="Learned returns a loss of .*: the difference would not be trained"):
        run("added", 0.5)


def test_other_outputs_are_refused() -> None:
    with pytest.raises(UsageError, match="Linear returns loss, of which .*; override losses_per_sample"):
        sample_losses(torch.nn.Linear(1, 1), {"loss": torch.ones(())})


# Refusals


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length': .* give train_"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True: .* give auto_find_batch_size=False"),
        ({"label_smoothing_factor": 0.1}, "give label_smoothing_factor=0.0"),
        ({"accelerator_config": {"split_batches": True}}, "give split_batches=False"),
        ({"accelerator_config": {"dispatch_batches": True}}, "give dispatch_batches=False"),
        ({"per_device_train_batch_size": 4}, "is 4 x 2 x 1: give batch_size=8"),
        ({"num_train_epochs": 3}, "num_train_epochs=3 for a sampler of 5 epochs"),
        ({"max_steps": 10}, r"max_steps=10; create the sampler with samples=120, drop_last=True"),
    ],
)
def test_settings_that_would_train_on_something_else_are_refused(
    args: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        make(tmp_path, args=args)


def test_steps_that_epochs_shorter_than_a_batch_would_exceed_are_refused(tmp_path: Path) -> None:
    sampler = PruningSampler(N, policy=DynamicRandom(keep=0.1), batch_size=B, samples=4 * B)
    with pytest.raises(UsageError, match="max_steps=4, but the 48 samples .* are 8 steps, .* a batch of 12"):
        make(tmp_path, sampler=sampler, args={"max_steps": 4})


def test_what_has_no_losses_or_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="compute_loss_func returns a mean"):
        make(tmp_path, compute_loss_func=lambda *a, **k: None)
    with pytest.raises(UsageError, match="a dataset of 59 rows for a sampler of 60"):
        make(tmp_path, data=pairs()[:59])
    with pytest.raises(UsageError, match="policy jest chooses every batch"):
        make(tmp_path, Jest(keep=0.5))


def test_a_stream_is_refused_before_the_trainer_asks_for_its_length(tmp_path: Path) -> None:
    from datasets import Dataset

    stream = Dataset.from_dict({"labels": [0] * N}).to_iterable_dataset()
    with pytest.raises(UsageError, match="IterableDataset has no row numbers: .*; prune it as a stream"):
        make(tmp_path, data=stream)
    sampler = PruningSampler(N, policy=SCAN, batch_size=B, epochs=EPOCHS)
    with pytest.raises(UsageError, match="IterableDataset has no row numbers"):
        PruningTrainer(clip(), arguments(tmp_path), collate, stream, sampler=sampler)


# Two processes: gloo, on this machine only.


def on_rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    os.environ.update({**here, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"})
    both = {"ddp_backend": "gloo", "optim": "sgd"}
    whole = {**both, "per_device_train_batch_size": B // 2, "gradient_accumulation_steps": 1}
    trainer = make(Path(folder) / "whole", args=whole, gather=True)
    trainer.train()
    found = [(trainer.sampler.state_dict(), trainer.model.state_dict())]
    parts = {**both, "per_device_train_batch_size": B // PARTS // 2, "save_strategy": "steps", "save_steps": 8}
    for name, until in (("uncut", 10**9), ("cut", 9 * PARTS), ("cut", 10**9)):
        trainer = make(Path(folder) / name, args=parts, gather=True)
        trainer.until = until
        try:
            trainer.train(resume_from_checkpoint=bool(found[1:]) and until == 10**9)
            found.append((trainer.sampler.state_dict(), trainer.model.state_dict()))
        except InterruptedError:
            torch.distributed.barrier()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_on_the_batches_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With losses over both the run is that of one process; accumulated, cut off and resumed, that of one not cut."""
    on_ranks(monkeypatch, 2, on_rank, str(tmp_path), free_port())
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one, other in zip(*ranks, strict=True):
        assert bits(one[0]) == bits(other[0])
        assert bits(one[1]) == bits(other[1])
    whole, uncut, cut = ranks[0]
    assert bits(uncut[0]) == bits(cut[0])
    assert bits(uncut[1]) == bits(cut[1])
    alone = make(
        tmp_path / "alone",
        args={"optim": "sgd", "per_device_train_batch_size": B, "gradient_accumulation_steps": 1},
    )
    alone.train()
    assert json.loads(whole[0]["log"])[-1]["rows"] == alone.sampler.log()[-1]["rows"]
    np.testing.assert_allclose(whole[0]["ledger.losses"].numpy(), alone.sampler.ledger.losses_NR, rtol=1e-4)
    np.testing.assert_array_equal(whole[0]["ledger.seen"].numpy(), alone.sampler.ledger.seen_N)
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(whole[1][name], tensor, rtol=1e-4, atol=1e-6)
