"""``thresher train moco`` in small: the published rules, and that it learns and resumes."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.train.conftest import ROWS, Data
from tests.train.test_clip import Cut, Cutting, outcome
from thresher.cli import main
from thresher.errors import UsageError
from thresher.train.augment import views
from thresher.train.loop import Schedule
from thresher.train.moco import MocoSettings, MocoV2, MocoV3, train_moco
from thresher.train.models import ConvNet, backbone
from thresher.training import Training


def settings(version: Any = 2, model: str = "tiny", **schedule: Any) -> MocoSettings:
    how = Schedule(**{"epochs": 3, "batch_size": 32, "eval_every": 0, **schedule})
    return MocoSettings(model=model, version=version, side=32, schedule=how)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def test_version_2_is_the_published_loop() -> None:
    """Keys by the follower, contrasted with the queue as it was before; then they take the oldest places."""
    torch.manual_seed(0)
    model = MocoV2(ConvNet(8), 64, replace(settings(), momentum=0.9), 10)
    before = {name: value.clone() for name, value in model.follower.state_dict().items()}
    queue = model.queue_KD.clone()
    order = []
    for step in range(4):
        view1, view2 = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
        losses = model.losses(view1, view2)
        query, key = unit(model.encoder(view1)), unit(model.follower(view2))
        for row in range(4):
            logits = torch.cat([(query[row] * key[row]).sum()[None], queue @ query[row]]) / 0.2
            assert losses[row, 0].item() == pytest.approx(-logits.log_softmax(0)[0].item(), rel=1e-4)
        for row in range(4):
            queue[(4 * step + row) % 10] = key[row].detach()
        torch.testing.assert_close(model.queue_KD, queue)
        order.append(losses.mean().item())
    for parameter in model.encoder.parameters():
        parameter.data += 1
    model.after_step(0.5)
    for name, value in model.follower.named_parameters():
        expected = 0.9 * before[name] + 0.1 * dict(model.encoder.named_parameters())[name]
        torch.testing.assert_close(value, expected)


def test_version_3_raises_its_momentum_to_1_and_has_no_gradients_in_keys() -> None:
    torch.manual_seed(0)
    model = MocoV3(ConvNet(8), 64, replace(settings(3), momentum=0.9))
    model.losses(torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)).mean().backward()
    assert all(parameter.grad is None for parameter in model.follower.parameters())
    assert all(parameter.grad is not None for parameter in model.predictor.parameters())
    before = next(model.follower.parameters()).clone()
    for parameter in model.encoder.parameters():
        parameter.data += 1
    model.after_step(1.0)
    assert torch.equal(next(model.follower.parameters()), before)
    model.after_step(0.5)
    leader = next(model.encoder.parameters())
    torch.testing.assert_close(next(model.follower.parameters()), 0.95 * before + 0.05 * leader)


def test_batch_norm_never_sees_a_query_beside_its_key() -> None:
    """With batch norm queries and keys go through in parts, and keys are shuffled among them."""
    encoder, width = backbone("resnet18", 32)
    model = MocoV2(encoder, width, settings(), 64)
    assert model.groups == 4
    assert MocoV2(ConvNet(8), 64, settings(), 64).groups == 1
    sizes: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    picture = torch.randn(16, 3, 32, 32)
    model.losses(picture, picture)
    assert sizes == [4] * 4


def test_a_queue_smaller_than_a_batch_holds_the_last_keys() -> None:
    model = MocoV2(ConvNet(8), 64, settings(), 3)
    view = torch.randn(8, 3, 32, 32)
    model.losses(view, view)
    keys = unit(model.follower(view)).detach()
    assert {tuple(row) for row in model.queue_KD.round(decimals=4).tolist()} == {
        tuple(row) for row in keys[-3:].round(decimals=4).tolist()
    }


@pytest.mark.parametrize("version", [2, 3])
def test_views_are_random_pictures_of_the_size(version: int) -> None:
    picture = torch.rand(6, 3, 36, 36)
    one, two = (view(picture) for view in views(32, version))
    assert one.shape == two.shape == (6, 3, 32, 32)
    assert not torch.equal(one, two)
    torch.manual_seed(3)
    again = views(32, version)[0](picture)
    torch.manual_seed(3)
    assert torch.equal(views(32, version)[0](picture), again)


@pytest.mark.parametrize(
    ("version", "model"), [(2, "tiny"), (3, "tiny"), (2, "resnet10t"), (3, "vit_tiny_patch16_224")]
)
def test_both_versions_train_and_learn(data: Data, tmp_path: Path, version: int, model: str) -> None:
    epochs = 6 if model == "tiny" else 1
    log = train_moco(data.parquet, tmp_path / "run", settings(version, model, epochs=epochs))
    assert len(log) == epochs
    assert all(np.isfinite(entry["loss"]) for entry in log)
    if version == 3 and model == "tiny":
        assert log[-1]["loss"] < log[0]["loss"]
    assert Training.load(tmp_path / "run").task == "moco"
    directions = Training.load(tmp_path / "run").ledger().losses_NR
    assert np.isfinite(directions[:, 0]).sum() == ROWS or ROWS % 32


def test_pictures_alone_are_enough_and_labels_are_learnt_from(data: Data, tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.Philox(5))
    cells, kinds = [], []
    for row in range(ROWS):  # stripes, lying or standing
        stripes = np.where(np.arange(36) // rng.integers(2, 5) % 2, 60, 200)[:, None, None] + rng.integers(0, 50, 3)
        pixels = np.broadcast_to(stripes, (36, 36, 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels if row % 2 else pixels.transpose(1, 0, 2)).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
        kinds.append(["standing", "lying"][row % 2])
    table = data.table.drop_columns(["text", "image"])
    table = table.append_column("image", pa.array(cells)).append_column("label_name", pa.array(kinds))
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(table.slice(0, 60), tmp_path / "eval.parquet")
    pq.write_table(table.slice(0, 60).rename_columns(["key", "group", "image", "kind"]), tmp_path / "other.parquet")
    how = settings(policy="scan", prune=0.1, options={"warmup": 0}, evals=(str(tmp_path / "eval.parquet"),))
    log = train_moco(tmp_path / "train.parquet", tmp_path / "run", replace(how, model="tiny"))
    found = log[-1]["eval"]["eval"]
    assert found["knn_label_name_top1"] > 0.9
    assert found["linear_label_name_top1"] > 0.9
    assert set(found) == {
        f"{how}_label_name_{metric}" for how in ("knn", "linear") for metric in ("top1", "top5", "mean_per_class")
    }
    how = replace(how, eval_labels=("kind",), schedule=replace(how.schedule, evals=(str(tmp_path / "other.parquet"),)))
    log = train_moco(tmp_path / "train.parquet", tmp_path / "halves", how)
    assert log[-1]["eval"]["other"]["linear_kind_top1"] > 0.8  # learnt from one half, tested on the other
    with pytest.raises(UsageError, match="has no column of labels"):
        train_moco(tmp_path / "train.parquet", tmp_path / "x", settings(evals=(str(tmp_path / "other.parquet"),)))


@pytest.mark.parametrize("version", [2, 3])
def test_a_run_that_is_cut_off_goes_on_to_the_identical_result(data: Data, tmp_path: Path, version: int) -> None:
    how = settings(version, policy="infobatch", checkpoint_minutes=0.0)
    train_moco(data.parquet, tmp_path / "whole", how)
    with pytest.raises(Cut):
        train_moco(data.parquet, tmp_path / "cut", how, progress=Cutting(6))
    train_moco(data.parquet, tmp_path / "cut", how, resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_from_the_command_line(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "tiny", "--epochs", "1", "--batch-size", "32", "--image-size", "32", "--version", "3"]
    assert main(["train", "moco", data.tars, "-o", str(tmp_path / "run"), *arguments, "--json", "--queue", "7"]) == 0
    assert '"phase": "everything"' in capsys.readouterr().out
    assert main(["train", "moco", data.tars, "-o", str(tmp_path / "b"), "--model", "resnet1"]) == 2
    assert "no model 'resnet1'; give tiny or a model of timm" in capsys.readouterr().err
