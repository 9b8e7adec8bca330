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
from torch import nn

from tests.train.conftest import ROWS, Data
from tests.train.test_clip import Cut, Cutting, outcome
from thresher.cli.main import main
from thresher.dynamic.run_folder import CHECKPOINT, Training
from thresher.errors import UsageError
from thresher.io.pictures import decode
from thresher.train import moco
from thresher.train.augment import Normalise, views
from thresher.train.loop import Schedule
from thresher.train.moco import MocoSettings, MocoV2, MocoV3, train_moco
from thresher.train.models import ConvNet, backbone


def settings(version: Any = 2, model: str = "tiny", **schedule: Any) -> MocoSettings:
    how = Schedule(**{"epochs": 3, "batch_size": 32, "eval_every": 0, **schedule})
    return MocoSettings(model=model, version=version, side=32, schedule=how)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def plain() -> nn.Module:
    """A net without batch norm, 32 features wide."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def check_losses(losses: torch.Tensor, query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor) -> None:
    """InfoNCE, row by row: its own key against the queue."""
    for row in range(len(query)):
        logits = torch.cat([(query[row] * key[row]).sum()[None], queue @ query[row]]) / 0.2
        assert losses[row, 0].item() == pytest.approx(-logits.log_softmax(0)[0].item(), rel=1e-4)


def test_version_2_is_the_published_loop() -> None:
    """Keys by the follower, contrasted with the queue as it was before; then they take the oldest places."""
    torch.manual_seed(0)
    model = MocoV2(plain(), 32, replace(settings(), momentum=0.9), 10)
    before = {name: value.clone() for name, value in model.follower.state_dict().items()}
    queue = model.queue_KD.clone()
    for step in range(4):
        view1, view2 = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
        losses = model.losses(view1, view2)
        query, key = unit(model.encoder(view1)), unit(model.follower(view2))
        check_losses(losses, query, key, queue)
        for row in range(4):
            queue[(4 * step + row) % 10] = key[row].detach()
        torch.testing.assert_close(model.queue_KD, queue)
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
    """With batch norm queries go through in parts, and keys in parts of another order."""
    torch.manual_seed(0)
    model = MocoV2(ConvNet(8), 64, settings(), 16)
    queue = model.queue_KD.clone()
    view1, view2 = torch.randn(10, 3, 32, 32), torch.randn(10, 3, 32, 32)
    torch.manual_seed(7)
    losses = model.losses(view1, view2)
    torch.manual_seed(7)
    order = torch.randperm(10)
    key = torch.empty(10, 128)
    parts = [slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 10)]
    with torch.no_grad():
        query = unit(torch.cat([model.encoder(view1[part]) for part in parts]))
        for part in parts:
            key[order[part]] = unit(model.follower(view2[order[part]]))
        whole = unit(model.encoder(view1))
    check_losses(losses, query, key, queue)
    torch.testing.assert_close(model.queue_KD[:10], key)
    assert (whole - query).abs().max() > 0.01  # the parts do matter
    assert all(set(range(10)[part]) != set(order[part].tolist()) for part in parts)


@pytest.mark.parametrize(("rows", "parts"), [(16, [4] * 4), (9, [3, 2, 2, 2]), (5, [3, 2]), (3, [3]), (2, [2])])
def test_no_part_of_a_batch_is_a_single_row(rows: int, parts: list[int]) -> None:
    model = MocoV2(ConvNet(8), 64, settings(), 64)
    sizes: list[int] = []
    for net in (model.encoder, model.follower):
        net.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    picture = torch.randn(rows, 3, 32, 32)
    assert torch.isfinite(model.losses(picture, picture)).all()
    assert sizes == 2 * parts


def test_models_without_batch_norm_take_batches_whole() -> None:
    model = MocoV2(plain(), 32, settings(), 64)
    sizes: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    model.losses(torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32))
    assert sizes == [16]


@pytest.mark.parametrize("version", [2, 3])
def test_a_batch_of_one_row_is_refused(data: Data, tmp_path: Path, version: int) -> None:
    (tmp_path / "one.txt").write_text(data.table["key"][3].as_py() + "\n")
    how = settings(version, policy="static", selection=str(tmp_path / "one.txt"))
    with pytest.raises(UsageError, match="a batch of 1 row: .* give batches of 2 rows or more"):
        train_moco(data.parquet, tmp_path / "run", how)
    pq.write_table(data.table.slice(0, 1), tmp_path / "one.parquet")
    with pytest.raises(UsageError, match="has one row that can be used"):
        train_moco(tmp_path / "one.parquet", tmp_path / "other", settings(version))


def test_a_queue_smaller_than_a_batch_holds_the_last_keys() -> None:
    model = MocoV2(plain(), 32, settings(), 3)
    view = torch.randn(8, 3, 32, 32)
    model.losses(view, view)
    keys = unit(model.follower(view)).detach()
    # Eight keys went into three places in turn: row 7 is in place 1, row 6 in place 0, row 5 in place 2.
    torch.testing.assert_close(model.queue_KD, keys[[6, 7, 5]])


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


def test_solarising_inverts_what_is_bright_and_nothing_else() -> None:
    picture = torch.rand(64, 3, 8, 8)
    solarise = views(32, 3)[1][-1]
    torch.manual_seed(0)
    found, given = solarise(picture).numpy(), picture.numpy()
    expected = np.where(given > 0.5, 1 - given, given)
    changed = [row for row in range(64) if not np.array_equal(found[row], given[row])]
    assert 4 < len(changed) < 24  # a fifth of 64
    np.testing.assert_allclose(found[changed], expected[changed], atol=1e-6)


def test_pictures_are_normalised_by_colour() -> None:
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    mean, std = (0.1, 0.5, 0.9), (0.5, 0.25, 0.2)
    expected = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
    given = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    np.testing.assert_allclose(Normalise(mean, std, white=255)(given), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(Normalise(mean, std)(given / 255), expected, rtol=1e-5, atol=1e-5)


def told_apart(model: MocoV2 | MocoV3, pixels: torch.Tensor) -> float:
    """The loss of finding the key of each picture among those of a fixed batch of views."""
    image = pixels.permute(0, 3, 1, 2).float() / 255
    torch.manual_seed(11)
    with torch.no_grad():
        one, two = (view(image) - 0.5 for view in views(32, model.settings.version))
        query, key = model.encoder(one), unit(model.follower(two))
        query = unit(model.predictor(query) if isinstance(model, MocoV3) else query)
        return float(nn.functional.cross_entropy(query @ key.T / 0.2, torch.arange(len(image))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "model", "epochs"),
    [
        (2, "tiny", 12),
        (3, "tiny", 10),
        (2, "resnet10t", 8),
        (3, "vit_tiny_patch16_224", 5),
    ],
)
def test_both_versions_train_and_learn(data: Data, tmp_path: Path, version: int, model: str, epochs: int) -> None:
    how = settings(version, model, epochs=epochs)
    log = train_moco(data.parquet, tmp_path / "run", how)
    assert len(log) == epochs
    assert all(np.isfinite(entry["loss"]) for entry in log)
    told = Training.load(tmp_path / "run")
    assert told.task == "moco"
    directions = told.ledger().losses_NR
    assert np.isfinite(directions[:, 0]).sum() == ROWS
    assert [entry["samples"] for entry in log] == [ROWS // 32 * 32] * epochs
    torch.manual_seed(how.schedule.seed)
    encoder, width = backbone(model, 32)
    net = MocoV2(encoder, width, how, ROWS // 4) if version == 2 else MocoV3(encoder, width, how)
    pixels = np.stack([decode(cell["bytes"], 36) for cell in data.table["image"].to_pylist()[:64]])
    before = told_apart(net, torch.from_numpy(pixels))
    net.load_state_dict(torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["model"])
    after = told_apart(net, torch.from_numpy(pixels))
    assert after < min(before, np.log(64)) - 0.05  # ln 64: all keys alike
    assert before > after + 0.1


METRICS = ("top1", "top5", "mean_per_class")


def striped(rows: int, seed: int) -> list[Image.Image]:
    """Stripes, lying and standing by turns, of random widths and colours."""
    rng = np.random.Generator(np.random.Philox(seed))
    found = []
    for row in range(rows):
        stripes = np.where(np.arange(36) // rng.integers(2, 5) % 2, 60, 200)[:, None, None] + rng.integers(0, 50, 3)
        pixels = np.broadcast_to(stripes, (36, 36, 3)).astype(np.uint8)
        found.append(Image.fromarray(np.ascontiguousarray(pixels if row % 2 else pixels.transpose(1, 0, 2))))
    return found


def stored(path: Path, pictures: list[Image.Image], kind: str = "PNG", **columns: Any) -> str:
    cells = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, kind)
        cells.append({"bytes": file.getvalue(), "path": None})
    keys = [f"{path.stem}-{row}" for row in range(len(pictures))]
    pq.write_table(pa.table({"key": keys, "image": pa.array(cells), **columns}), path)
    return str(path)


def kinds(rows: int) -> list[str]:
    return [["standing", "lying"][row % 2] for row in range(rows)]


def sizes(found: dict[str, float], column: str) -> list[float]:
    return [found[f"probe_{column}_{name}"] for name in ("rows_learnt", "rows_tested", "halves")]


def test_pictures_alone_are_enough_and_labels_are_learnt_from(tmp_path: Path) -> None:
    pictures = striped(150, 5)
    train = stored(tmp_path / "train.parquet", pictures[:90], label_name=kinds(90))
    new = stored(tmp_path / "new.parquet", pictures[90:], label_name=kinds(60), kind_of=kinds(60))
    how = settings(policy="scan", prune=0.1, options={"warmup": 0}, evals=(new,))
    how = replace(how, eval_labels=("label_name", "kind_of"))
    found = train_moco(train, tmp_path / "run", how)[-1]["eval"]["new"]
    assert set(found) == {
        *(f"{by}_{of}_{name}" for by in ("knn", "linear") for of in ("label_name", "kind_of") for name in METRICS),
        *(f"probe_{of}_{n}" for of in ("label_name", "kind_of") for n in ("rows_learnt", "rows_tested", "halves")),
    }
    assert sizes(found, "label_name") == [90, 60, 0]
    assert sizes(found, "kind_of") == [30, 30, 1]  # the training data do not have it
    assert found["knn_label_name_top1"] > 0.9
    assert found["linear_label_name_top1"] > 0.9
    assert found["linear_kind_of_top1"] > 0.8
    other = stored(tmp_path / "other.parquet", pictures[90:], kind_of=kinds(60))
    with pytest.raises(UsageError, match="has no column of labels"):
        train_moco(train, tmp_path / "x", settings(evals=(other,)))


def test_nothing_that_is_tested_is_learnt_from(tmp_path: Path) -> None:
    pictures = striped(120, 1)
    labels = [*kinds(118), None, "of another class"]
    groups = [row // 2 for row in range(120)]
    train = stored(tmp_path / "train.parquet", pictures, label_name=labels, group=groups)
    some, alone = pictures[:30], kinds(30)
    evals = (
        stored(tmp_path / "same.parquet", some, label_name=alone),
        stored(tmp_path / "anew.parquet", some, "WEBP", label_name=alone),
        stored(tmp_path / "anew-groups.parquet", some, "WEBP", label_name=alone, group=[str(row) for row in range(30)]),
        train,
    )
    found = train_moco(train, tmp_path / "run", settings(epochs=1, evals=evals))[-1]["eval"]
    assert sizes(found["same"], "label_name") == [118 - 30, 30, 0]  # by the bytes of the pictures
    assert sizes(found["anew"], "label_name") == [118, 30, 0]  # nothing tells
    assert sizes(found["anew-groups"], "label_name") == [118 - 60, 30, 0]  # groups 0 to 29 of the data, two rows each
    learnt, tested, halves = sizes(found["train"], "label_name")
    assert (learnt + tested, halves) == (119, 1)
    assert 50 <= learnt <= 60


def test_a_set_that_cannot_be_learnt_from_is_refused_before_training(tmp_path: Path) -> None:
    pictures = striped(20, 1)
    train = stored(tmp_path / "train.parquet", pictures)
    one = stored(tmp_path / "one.parquet", pictures, label_name=["all"] * 20)
    joined = stored(tmp_path / "joined.parquet", pictures, label_name=kinds(20), group=["g"] * 20)
    for path in (one, joined):
        with pytest.raises(UsageError, match="two classes of 'label_name' in two groups to learn from; give a larger"):
            train_moco(train, tmp_path / "run", settings(evals=(path,)))


def test_what_is_learnt_from_and_tested_is_seen_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same picture has the same features in the data and in the set; the probe is told groups."""
    given: list[tuple[Any, ...]] = []
    groups: list[Any] = []
    knn, linear_probe = moco.knn, moco.linear_probe

    def neighbours(*what: Any) -> dict[str, float]:
        given.append(what)
        return knn(*what)

    def probe(*what: Any, train_group_N: Any, **how: Any) -> dict[str, float]:  # noqa: N803 - a name of ours
        groups.append(train_group_N.tolist())
        return linear_probe(*what, train_group_N=train_group_N, **how)

    monkeypatch.setattr(moco, "knn", neighbours)
    monkeypatch.setattr(moco, "linear_probe", probe)
    rng = np.random.Generator(np.random.Philox(2))
    pictures = [Image.fromarray(rng.integers(0, 256, (90, 70, 3)).astype(np.uint8)) for _ in range(40)]
    named = [f"g{row // 4}" if row < 32 else None for row in range(40)]
    train = stored(tmp_path / "train.parquet", pictures, label_name=kinds(40), group=named)
    anew = stored(tmp_path / "anew.parquet", pictures, "BMP", label_name=kinds(40))
    train_moco(train, tmp_path / "run", settings(epochs=1, evals=(anew,)))
    ((learnt, _, tested, _),) = given
    assert learnt.shape == (40, 256)
    np.testing.assert_allclose(learnt, tested, rtol=1e-5, atol=1e-6)
    assert groups == [[*(row // 4 for row in range(32)), *range(8, 16)]]


@pytest.mark.slow
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
    assert "no model 'resnet1'; give tiny or a timm model" in capsys.readouterr().err
