"""open_clip's own trainer on a few pictures and a tiny model, with and without pruning.

The installed release is tested; with a checkout of open_clip first on the path, its main branch is:
PYTHONPATH=open_clip/src pytest tests/train/test_open_clip.py tests/train/against_open_clip_main.py -m ""
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip_train.data as their_data
import open_clip_train.main as trainer
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from PIL import Image

from tests.loaded import quiet, tiny_model
from tests.processes import finished
from tests.resharding.common import hashes
from thresher import build, open_store, run_steps
from thresher.cli.main import main as thresher
from thresher.dynamic import loss
from thresher.dynamic.loss import clip_losses
from thresher.dynamic.policies.full import Full
from thresher.dynamic.policies.scan import Scan
from thresher.dynamic.policies.static import Static
from thresher.dynamic.run_folder import Training
from thresher.dynamic.sampler import PruningSampler
from thresher.dynamic.stream import StaticKeys, StreamPruner, ids_of, prune_stream
from thresher.errors import PoolError, UsageError
from thresher.export.keys import key_batches, read_keys
from thresher.train import open_clip
from thresher.train.open_clip import PruneOptions, insert_stage, main, parse, pruning, samples_of_tars

N, B = 208, 16
TASKS = hasattr(trainer, "create_task")  # the main branch: tasks in place of losses, batches that are dictionaries

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # webdataset leaves that to the interpreter
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv, four tars, and the config of a model of a few hundred thousand parameters, nearly all token embeddings."""
    folder = tmp_path_factory.mktemp("pairs")
    rng, colours = np.random.Generator(np.random.Philox(0)), ("red", "green", "blue", "white")
    lines, members = ["filepath\ttitle"], [[] for _ in range(4)]
    for i in range(N):
        picture = np.zeros((32, 32, 3))
        picture[..., i % 4 if i % 4 < 3 else slice(None)] = 180
        picture = np.clip(picture + rng.normal(0, 40, picture.shape), 0, 255).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(picture).save(content, "PNG")
        (folder / f"{i:05d}.png").write_bytes(content.getvalue())
        title = f"a {colours[i % 4]} picture, the {i // 4}th"
        lines.append(f"{folder / f'{i:05d}.png'}\t{title}")
        members[i * 4 // N] += [(f"{i:05d}.png", content.getvalue()), (f"{i:05d}.txt", title.encode())]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    for shard, files in enumerate(members):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for name, content in files:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    sizes = {f"{shard:05d}.tar": N // 4 for shard in range(4)}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    tiny_model(folder)
    return folder


class Ran:
    """What a run did: the losses it trained on, its lines about training, and its folder."""

    def __init__(self, folder: Path, losses: list[float]) -> None:
        self.folder, self.losses = folder, losses
        text = (folder / "out.log").read_text()
        self.lines = re.findall(r"Train Epoch: (\d+ \[.*?\)\]).*?(LR: .*)", text)
        self.rates = [float(rate) for rate in re.findall(r"LR: (\S+)", text)]

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "pruning.jsonl").read_text().splitlines()]

    @property
    def ledger(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "pruning-ledger.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    def state(self, epoch: int) -> dict[str, np.ndarray]:
        with np.load(self.folder / "checkpoints" / f"epoch_{epoch}.pruning.npz", allow_pickle=False) as arrays:
            return dict(arrays)


Run = Callable[..., Ran]


class Interrupted(Exception):
    """As when a machine goes away."""


@pytest.fixture
def run(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Train: run("csv", "--prune", "scan"); ``alone`` by open_clip's own main, ``stop`` after so many steps."""
    # its buffer is shuffled by the clock: a buffer of one, so that two runs can be compared
    monkeypatch.setattr(their_data, "_SAMPLE_SHUFFLE_SIZE", 1)
    monkeypatch.setattr(their_data, "_SAMPLE_SHUFFLE_INITIAL", 1)

    def train(kind: str, *arguments: str, name: str = "run", alone: bool = False, stop: int = 10**9) -> Ran:
        losses: list[float] = []
        own = torch.Tensor.backward

        def backward(total_loss: Any, *more: Any, **how: Any) -> None:
            if len(losses) == stop:
                raise Interrupted
            losses.append(total_loss.item())
            own(total_loss, *more, **how)

        with quiet(), monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", backward)
            if alone and "eof_value" in inspect.signature(their_data.tar_file_expander).parameters:
                patch.setattr(their_data, "tarfile_to_samples_nothrow", samples_of_tars)  # else it stops, see there
            given = [*common(pairs, kind), "--logs", str(tmp_path), "--name", name, *arguments]
            try:
                done = trainer.main(given) if alone else main(given)
            except Interrupted:
                done = None
        assert not done
        return Ran(tmp_path / name, losses)

    return train


def common(pairs: Path, kind: str) -> list[str]:
    data = {
        "csv": ["--train-data", str(pairs / "train.csv")],
        "webdataset": ["--train-data", str(pairs / "{00000..00003}.tar")],
        "synthetic": ["--train-num-samples", str(N)],
    }[kind]
    model = ["--model", f"local-dir:{pairs}", "--device", "cpu", "--precision", "fp32", "--lr", "1e-2"]
    return ["--dataset-type", kind, *data, *model, "--batch-size", str(B), "--workers", "0", "--warmup", "4",
            "--epochs", "2", "--log-every-n-steps", "1"]  # fmt: skip


STEADY = ("--aug-cfg", "scale=(1.0,1.0)")  # no augmentation, as open_clip's own does not resume to the same


# Full training is open_clip's own


@pytest.mark.parametrize(
    ("kind", "more", "samples"),
    [
        ("csv", "", 208),
        # 13 batches: the last is read, and trained on by neither
        pytest.param("csv", "--accum-freq 2 --epochs 3", 192, marks=pytest.mark.slow),
        pytest.param("csv", "--siglip --workers 1", 208, marks=pytest.mark.slow),
        pytest.param(
            "csv", "--lr-scheduler const-cooldown --epochs-cooldown 1 --grad-clip-norm 1", 208, marks=pytest.mark.slow
        ),
        ("webdataset", "", 208),
        pytest.param("webdataset", "--workers 2 --dataset-resampled", 224, marks=pytest.mark.slow),
        pytest.param("webdataset", "--accum-freq 2 --precision amp_bf16 --epochs 3", 192, marks=pytest.mark.slow),
        pytest.param("synthetic", "", 208, marks=pytest.mark.slow),
    ],
)
def test_full_is_open_clips_own_training_step_by_step(run: Run, kind: str, more: str, samples: int) -> None:
    theirs = run(kind, *more.split(), name="theirs", alone=True)
    ours = run(kind, *more.split(), "--prune", "full", name="ours")
    assert len(theirs.losses) >= 24
    assert ours.losses == theirs.losses
    assert ours.lines == theirs.lines
    last = f"checkpoints/epoch_{len(ours.log)}.pt"
    weights = [torch.load(ran.folder / last, weights_only=True)["state_dict"] for ran in (ours, theirs)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert {entry["samples"] for entry in ours.log} == {samples}
    if not more:
        first = theirs.losses[: ours.log[0]["steps"]]
        assert ours.log[0]["loss"] == pytest.approx(np.mean(first), rel=1e-4)


# Pruning


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_a_pruned_run_cut_off_resumes_to_the_same_plans(run: Run, kind: str) -> None:
    scan = ("--prune", "scan", "--prune-share", "25%", "--prune-full-epochs", "1", "--prune-cycle", "3")
    scan = (*scan, "--epochs", "7", *STEADY)
    whole = run(kind, *scan, name="whole")
    log = whole.log
    assert [entry["phase"] for entry in log[:5]] == ["warm-up", "preparation", *["mutation"] * 3]
    assert log[-1]["pruned_so_far"] == pytest.approx(0.25, abs=0.06)
    assert [entry["steps"] for entry in log] == [entry["rows"] // B for entry in log]
    assert len(whole.losses) == sum(entry["steps"] for entry in log) < 0.8 * 7 * 13
    stop = sum(entry["steps"] for entry in log[:3]) + 2  # in the second pruned epoch
    cut = run(kind, *scan, name="cut", stop=stop)
    assert cut.losses == whole.losses[:stop]
    assert len(cut.log) == 3
    rest = run(kind, *scan, "--resume", "latest", name="cut")
    assert rest.losses == whole.losses[stop - 2 :]
    assert rest.log == log
    assert {name: array.tobytes() for name, array in rest.ledger.items()} == {
        name: array.tobytes() for name, array in whole.ledger.items()
    }
    told = (whole.folder / "out.log").read_text()
    assert "Pruning Epoch: 4 mutation" in told
    assert told.count("Pruning Policy: Scan(rho=0.3889, cycle=3, warmup=1, threshold=0.3, mode='both', ") == 1
    # the rate is warm after 4 steps, and falls to nothing with the last one
    assert np.argmax(whole.rates) in (3, 4)
    assert (np.diff(whole.rates[4:]) < 0).all()
    assert whole.rates[-1] < 0.02 * max(whole.rates)


@pytest.mark.slow
def test_checkpoints_have_their_states_and_no_others(run: Run) -> None:
    scan = ("--prune", "scan", "--prune-rho", "0.2", "--prune-full-epochs", "0", "--epochs", "5")
    every_second = run("csv", *scan, "--save-frequency", "2", name="second")
    found = sorted(path.name for path in (every_second.folder / "checkpoints").iterdir())
    assert found == [f"epoch_{n}.{kind}" for n in (2, 4, 5) for kind in ("pruning.npz", "pt")]
    latest = run("csv", *scan, "--save-most-recent", "--delete-previous-checkpoint", name="latest")
    found = sorted(path.name for path in (latest.folder / "checkpoints").iterdir())
    assert found == ["epoch_4.pruning.npz", "epoch_5.pruning.npz", "epoch_5.pt", "epoch_latest.pt"]
    more = run("csv", *scan, "--save-most-recent", "--resume", "latest", "--epochs", "6", name="latest")
    assert [entry["epoch"] for entry in more.log] == list(range(6))


def test_two_runs_never_share_a_folder(run: Run, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    first = run("csv", "--prune", "scan")
    before = hashes(first.folder)
    again = [*common(pairs, "csv"), "--logs", str(first.folder.parent), "--name", "run", "--resume", "latest"]
    with open(first.folder / ".pruning.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with quiet():
            assert main([*again, "--prune", "scan", "--epochs", "3"]) == 2
    told = capsys.readouterr().err
    assert f"Error: the run {first.folder}: another process is using it; wait until it has finished" in told
    after = hashes(first.folder)
    assert {name for name in before if after[name] != before[name]} <= {"out.log", "params.txt"}  # of open_clip
    more = run("csv", "--prune", "scan", "--epochs", "3", "--resume", "latest")
    assert [entry["epoch"] for entry in more.log] == [0, 1, 2]
    assert not (first.folder / ".pruning.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_a_checkpoint_of_an_unpruned_run(run: Run, kind: str, capsys: pytest.CaptureFixture[str], pairs: Path) -> None:
    theirs = run(kind, alone=True)
    scan = ("--prune", "scan", "--prune-rho", "0.25", "--prune-full-epochs", "0", "--epochs", "5", "--resume", "latest")
    with quiet():
        assert main([*common(pairs, kind), "--logs", str(theirs.folder.parent), "--name", "run", *scan]) == 2
    assert "epoch_2.pruning.npz: no such file; the checkpoint was saved without pruning" in capsys.readouterr().err
    fresh = run(kind, *scan, "--prune-fresh")
    assert [entry["epoch"] for entry in fresh.log] == [2, 3, 4]
    assert [entry["phase"] for entry in fresh.log] == ["preparation", "mutation", "mutation"]
    assert fresh.log[2]["rows"] < 0.8 * N
    assert fresh.rates[-1] < 0.01 * max(fresh.rates)  # it ends when the run does
    rates = fresh.rates[26:]
    assert (np.diff(rates) < 0).all()  # and goes on from where the full run had it
    assert rates[0] > 0.6 * max(fresh.rates)
    assert fresh.state(5)["start"] == 2
    again = run(kind, *scan, "--epochs", "6")
    assert [entry["epoch"] for entry in again.log] == [2, 3, 4, 5]


def test_infobatch_weighs_what_it_trains_on(run: Run) -> None:
    ran = run("csv", "--prune", "infobatch", "--epochs", "4", "--accum-freq", "2", "--prune-delta", "1")
    pruned = ran.log[2]
    assert pruned["phase"] == "pruned"
    assert pruned["rows"] < N
    # the mean that is trained on weighs rows twice that have less than the mean loss, so it is below the plain one
    first = 2 * sum(entry["steps"] for entry in ran.log[:2])
    steps = ran.losses[first : first + 2 * pruned["steps"]]
    assert np.mean(steps[1::2]) < 1.6 * pruned["loss"]
    assert np.mean(steps[1::2]) != pytest.approx(pruned["loss"], rel=1e-3)


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("weights", [None, [2.0, 0.5, 1.0, 1.0]])
def test_the_loss_is_open_clips_own_or_the_weighed_mean(accum: int, weights: list[float] | None) -> None:
    rng = torch.Generator().manual_seed(0)
    image, text = (torch.randn(4, 8, generator=rng, requires_grad=True) for _ in range(2))
    scale = torch.tensor(3.0)
    recorded = []

    class OfRun:
        reference = None
        args = type("Arguments", (), {"accum_freq": accum, "world_size": 1, "siglip": False})

        def take(self) -> np.ndarray:
            return np.arange(4)

        def weights(self, ids: np.ndarray) -> torch.Tensor | None:
            return None if weights is None else torch.tensor(weights)

        def record(self, ids: np.ndarray, losses: torch.Tensor) -> None:
            recorded.append((ids.tolist(), losses))

    own = open_clip_loss()
    loss = open_clip._Loss(OfRun(), own)
    outputs = {
        "image_features": torch.nn.functional.normalize(image, dim=1),
        "text_features": torch.nn.functional.normalize(text, dim=1),
        "logit_scale": scale,
    }
    expected = clip_losses(image, text, scale)
    weighed = expected.mean(1) if weights is None else expected.mean(1) * torch.tensor(weights)
    for _ in range(accum):
        found = loss(**outputs, output_dict=True)
        assert list(found) == ["contrastive_loss"]
        torch.testing.assert_close(found["contrastive_loss"], weighed.mean())
        if weights is None:
            assert found["contrastive_loss"].item() == own(**outputs).item()
    assert [ids for ids, _ in recorded] == [[0, 1, 2, 3]]
    torch.testing.assert_close(recorded[0][1], expected.detach())
    assert not recorded[0][1].requires_grad
    found["contrastive_loss"].backward()
    assert image.grad is not None


def open_clip_loss() -> Any:
    import open_clip as theirs

    return theirs.ClipLoss()


@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_a_selection_by_keys(run: Run, kind: str, pairs: Path, tmp_path: Path) -> None:
    chosen = [i for i in range(N) if i % 3]
    keys = [str(pairs / f"{i:05d}.png") if kind == "csv" else f"{i:05d}" for i in chosen]
    (tmp_path / "keys.txt").write_text("\n".join(keys) + "\n")
    ran = run(kind, "--prune", "static", "--prune-selection", str(tmp_path / "keys.txt"))
    assert {entry["rows"] for entry in ran.log} == {len(chosen)}
    assert {entry["samples"] for entry in ran.log} == {len(chosen) // B * B}
    assert ran.log[-1]["pruned_so_far"] == pytest.approx(1 - len(chosen) / N)
    if kind == "csv":
        assert set(np.flatnonzero(ran.ledger["seen"] >= 0)) <= set(chosen)
    else:
        assert len(ran.ledger["hashes"]) <= len(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_reference_losses_are_found_by_key(run: Run, kind: str, pairs: Path, tmp_path: Path) -> None:
    """Rows whose loss is very high under the reference are left out; a run cut off resumes with them."""
    keys = [str(pairs / f"{i:05d}.png") if kind == "csv" else f"{i:05d}" for i in range(N)]
    losses = np.where(np.arange(N) % 4 == 0, 100.0, 0.0)
    pq.write_table(pa.table({"key": keys, "loss": losses}), tmp_path / "ref.parquet")
    rho = ("--prune", "rho", "--prune-reference", str(tmp_path / "ref.parquet"), "--prune-keep", "75%")
    rho = (*rho, "--prune-softness", "0", "--epochs", "3", *STEADY)
    ran = run(kind, *rho, name="whole")
    assert [entry["phase"] for entry in ran.log] == ["warm-up", "pruned", "pruned"]
    left = np.flatnonzero(ran.ledger["times"] == 2)
    assert len(left) == N // 4
    assert (ran.ledger["references"][left] == 100).all()
    run(kind, *rho, name="cut", stop=ran.log[0]["steps"] + 2)
    rest = run(kind, *rho, "--resume", "latest", name="cut")
    assert rest.log == ran.log


def test_accumulated_parts_are_recorded_as_one_batch(run: Run) -> None:
    """open_clip caches the features of the parts: the losses per sample are those of the whole batch."""
    whole = run("csv", "--batch-size", "32", "--epochs", "1", *STEADY, name="whole")
    parts = run("csv", "--batch-size", "16", "--accum-freq", "2", "--epochs", "1", *STEADY, name="parts")
    assert [ran.log[0]["samples"] for ran in (whole, parts)] == [192, 192]
    np.testing.assert_array_equal(parts.ledger["seen"], whole.ledger["seen"])
    np.testing.assert_allclose(parts.ledger["losses"], whole.ledger["losses"], rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("webdataset", "drrho"), *(pytest.param("csv", name, marks=pytest.mark.slow) for name in ("drrho", "distill"))],
)
def test_a_loss_against_a_reference_gets_the_rows_of_its_pool(
    run: Run, kind: str, name: str, pairs: Path, pool: Callable[..., Any], rows: Callable[..., Any],
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    """Each sample gets its own reference, by key, whatever the order; one that is missing stops the run."""
    order = np.random.default_rng(0).permutation(N)
    keys = [str(pairs / f"{i:05d}.png") if kind == "csv" else f"{i:05d}" for i in order]
    known = pool(rows(N, seed=1)[order], rows(N, seed=2)[order], {"uid": keys}, name="known")
    against = ("--prune-loss", name, "--prune-reference", known.layout.location, "--epochs", "2", *STEADY)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    own = getattr(loss, f"{name}_losses")

    def watched(image: Any, text: Any, known_image: Any, known_text: Any, *more: Any, **how: Any) -> Any:
        seen.append((known_image.numpy(), known_text.numpy()))
        return own(image, text, known_image, known_text, *more, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, f"{name}_losses", watched)
        ran = run(kind, *against, name=name)
    assert ran.log[1]["loss"] < ran.log[0]["loss"]
    images, texts = np.concatenate([each[0] for each in seen]), np.concatenate([each[1] for each in seen])
    at = (images @ unit(rows(N, seed=1)).T).argmax(1)
    assert set(at) == set(range(N)) if kind == "csv" else len(set(at)) > N / 2
    np.testing.assert_allclose(texts, unit(rows(N, seed=2))[at], rtol=1e-4, atol=1e-6)
    some = pool(rows(N // 2, seed=1), rows(N // 2, seed=2), {"uid": sorted(keys)[: N // 2]}, name="some")
    with quiet():
        words = ["--prune-loss", name, "--prune-reference", some.layout.location]
        assert main([*common(pairs, kind), "--logs", str(tmp_path), "--name", "less", *words]) == 2
    assert "are not in it" in capsys.readouterr().err


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prune-loss", "drrho"), "--prune-loss drrho needs --prune-reference"),
        (("--prune-loss", "drrho", "--prune-reference", "p", "--prune", "rho"), "need two references"),
        (("--prune-loss", "distill"), "--prune-loss distill needs --prune-reference"),
        (("--prune-loss", "other"), "invalid choice"),
        pytest.param(
            ("--fsdp",),
            "--fsdp: open_clip 3.3.0 has no such option; its main branch has",
            marks=pytest.mark.skipif(TASKS, reason="the main branch has it"),
        ),
        (("--grad-cache=8",), r"--grad-cache: open_clip \S+ has no such option; --accum-freq N"),
        (("--prune", "jest", "--prune-reference", "p"), "chooses every batch by scoring a super-batch"),
    ],
)
def test_references_that_do_not_fit_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(["--train-data", "x", *words])


def test_distillation_is_refused_with_the_sigmoid_loss(pool: Callable[..., Any], rows: Callable[..., Any]) -> None:
    known = pool(rows(4, seed=1), rows(4, seed=2), {"uid": list("abcd")}, name="known")
    words = ["--prune-loss", "distill", "--prune-reference", known.layout.location, "--siglip"]
    with pytest.raises(UsageError, match="distill is of the softmax loss; leave out --siglip"):
        parse(["--train-data", "x", *words])


def test_the_trainer_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "create_task" if TASKS else "create_loss"
    monkeypatch.delattr(trainer, name)
    wanted = r"another trainer \(no create_loss or create_task in open_clip_train.main\), .*\[training\]==3.3.0'"
    with pytest.raises(UsageError, match=wanted), pruning(PruneOptions()):
        pass
    with pytest.raises(UsageError, match=wanted):
        parse(["--train-data", "x", "--fsdp"])
    assert not hasattr(trainer, name)


@pytest.mark.parametrize("kind", [pytest.param("csv", marks=pytest.mark.slow), "webdataset"])
def test_a_run_is_read_like_one_of_the_trainers(
    run: Run, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run(kind, "--prune", "scan", "--prune-full-epochs", "0", "--prune-cycle", "1", "--epochs", "3")
    training = Training.load(ran.folder)
    log = training.log()
    assert [(entry["epoch"], entry["samples"]) for entry in log] == [(e["epoch"], e["samples"]) for e in ran.log]
    assert training.unfinished(log) == ""
    np.testing.assert_array_equal(training.ledger().times_N, ran.ledger["times"])
    page = str(tmp_path / "run.html")
    capsys.readouterr()
    if kind == "csv":
        assert thresher(["coreset", str(ran.folder), "-o", str(tmp_path / "core"), "--keep", "50%"]) == 0
        assert len(read_keys(tmp_path / "core")) == N // 2
        assert thresher(["report", str(ran.folder), "-o", page]) == 0
    else:
        assert thresher(["coreset", str(ran.folder), "-o", str(tmp_path / "core"), "--keep", "50%"]) == 2
        assert "was trained on a stream, whose rows are hashes" in capsys.readouterr().err
        assert thresher(["report", str(ran.folder), "-o", page, "--without-pool"]) == 0
    assert thresher(["compare", str(ran.folder), str(ran.folder)]) == 2  # given twice
    other = run(kind, "--prune", "full", "--epochs", "1", name="other")
    assert thresher(["compare", str(ran.folder), str(other.folder)]) == 0


@pytest.mark.slow  # in small: test_a_run_that_sifts_is_explained of test_clip.py
@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_a_run_sifts(run: Run, kind: str) -> None:
    """The ledger remembers the ranks; the rows with the highest are left out; nothing is found in 208 rows."""
    ran = run(kind, "--prune", "sift", "--prune-mismatched", "25%", "--epochs", "4", name="given")
    assert [entry["ill_matched"] for entry in ran.log] == [0, N // 4, 0, 0]
    assert [entry["rows"] for entry in ran.log] == [N, N, N - N // 4, N - N // 4]
    left = ran.ledger["marks"] == 2
    assert ran.ledger["memory"][left].min() >= ran.ledger["memory"][~left].max()
    assert run(kind, "--prune", "sift", "--epochs", "4", name="found").log[-1]["pruned_so_far"] == 0


@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_reference_losses_of_other_data_stop_the_run(
    kind: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"key": ["x"], "loss": [1.0]}), tmp_path / "ref.parquet")
    rho = ("--prune", "rho", "--prune-reference", str(tmp_path / "ref.parquet"))
    with quiet():
        assert main([*common(pairs, kind), "--logs", str(tmp_path), "--name", "run", *rho]) == 2
    told = capsys.readouterr().err
    assert ("the file has keys such as 'x'" if kind == "csv" else "rows has a reference loss; give") in told


def test_a_selection_folder(run: Run, pool: Callable[..., Any], tmp_path: Path, rows: Callable[..., Any]) -> None:
    keys = {"key": [f"{i:05d}" for i in range(N)]}
    store = pool(rows(N), rows(N, seed=1), keys)
    run_steps(store, [build("clip-score", {"keep": "50%"})]).save(tmp_path / "half")
    given = ("--prune", "static", "--prune-selection", str(tmp_path / "half"))
    by_row, by_key = run("csv", *given, name="rows"), run("webdataset", *given, name="keys")
    assert by_row.log[0]["rows"] == by_key.log[0]["rows"] == N // 2
    kept = np.load(tmp_path / "half" / "mask.npy", allow_pickle=False)
    assert not (by_row.ledger["seen"][~kept] >= 0).any()
    assert open_store(str(store.layout.location)).total == N


def times_of(path: Path, images: list[str], captions: list[str]) -> list[int]:
    """How often a selection has the rows of a csv with these images and captions."""
    found = open_clip._Run(PruneOptions(), {})
    found.args = argparse.Namespace(csv_img_key="filepath", train_data="train.csv", rank=0)
    return found._times_of(path, argparse.Namespace(images=images, captions=captions)).tolist()


def test_a_selection_folder_goes_by_key_whatever_the_order(
    pool: Callable[..., Any], tmp_path: Path, rows: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    names, titles = [f"{i}.png" for i in range(8)], [f"the {i}th" for i in range(8)]
    store = pool(rows(8), rows(8, seed=1), {"key": names, "caption": titles})
    run_steps(store, [build("clip-score", {"keep": "50%"})]).save(tmp_path / "half")
    kept = np.load(tmp_path / "half" / "mask.npy", allow_pickle=False).astype(int).tolist()
    assert times_of(tmp_path / "half", names, titles) == kept
    assert times_of(tmp_path / "half", names[::-1], titles[::-1]) == kept[::-1]
    assert not caplog.text
    gone = kept.index(1)
    shorter = names[:gone] + names[gone + 1 :]
    assert times_of(tmp_path / "half", shorter, titles[1:]) == kept[:gone] + kept[gone + 1 :]
    assert f"1 keys of {tmp_path / 'half'} are not in the column filepath, such as '{gone}.png'" in caplog.text


def test_a_selection_folder_goes_by_row_only_where_rows_are_the_same(
    pool: Callable[..., Any], tmp_path: Path, rows: Callable[..., Any]
) -> None:
    keys = [f"key {i}" for i in range(8)]
    names, titles = [f"{i}.png" for i in range(8)], [f"the {i}th" for i in range(8)]
    store = pool(rows(8), rows(8, seed=1), {"key": keys, "caption": [f" {title}\n" for title in titles]})
    run_steps(store, [build("clip-score", {"keep": "50%"})]).save(tmp_path / "half")
    kept = np.load(tmp_path / "half" / "mask.npy", allow_pickle=False).astype(int).tolist()
    assert times_of(tmp_path / "half", names, titles) == kept
    told = "rows of its pool are not those of the csv by key or caption"
    for other in (titles[::-1], titles[1:], ["the same"] * 8):
        with pytest.raises(UsageError, match=told):
            times_of(tmp_path / "half", names[: len(other)], other)


def test_a_file_of_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names, titles = ["a.png", "b.png", "c.png"], ["one", "two", "three"]
    (tmp_path / "keys.txt").write_text("\ufeffc.png\n\na.png\nc.png\nd.png\ne.png\n", encoding="utf-8")
    assert times_of(tmp_path / "keys.txt", names, titles) == [1, 0, 2]
    assert "2 keys of" in caplog.text
    assert "are not in the column filepath, such as 'd.png'" in caplog.text
    (tmp_path / "others.txt").write_text("x.png\n")
    with pytest.raises(
        UsageError, match=r"none of its keys, such as 'x.png', is in the column filepath of train.csv, such"
    ):
        times_of(tmp_path / "others.txt", names, titles)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UsageError, match="none of its keys is in the column filepath"):
        times_of(tmp_path / "empty.txt", names, titles)
    with pytest.raises(PoolError, match="neither a selection folder nor a file of keys"):
        times_of(tmp_path / "nothing.txt", names, titles)


def test_static_keys_of_a_stream_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def batches(sel: Any) -> Iterator[Any]:
        read.append(os.fspath(sel))
        yield from key_batches(sel)

    monkeypatch.setattr(open_clip, "key_batches", batches)
    (tmp_path / "keys.txt").write_text("c\na\nc\n\nd\n")
    made = open_clip.static_keys(tmp_path / "keys.txt", 10)
    slow = StaticKeys.of_keys(["c", "a", "c", "d"], 10)
    assert (made.ids_M.tolist(), made.times_M.tolist()) == (slow.ids_M.tolist(), slow.times_M.tolist())
    assert open_clip.static_keys(tmp_path / "keys.txt", 10, weigh=True).weigh
    columns = {"row": range(5), "key": ["a", "b", "c", "d", "e"], "kept": [True, False, True, True, True]}
    pq.write_table(pa.table({**columns, "repeats": [1, 0, 3, 1, 2]}), tmp_path / "rows.parquet")
    made = open_clip.static_keys(tmp_path / "rows.parquet", 10)
    slow = StaticKeys.of_keys(["a", *"ccc", "d", *"ee"], 10)
    assert (made.ids_M.tolist(), made.times_M.tolist()) == (slow.ids_M.tolist(), slow.times_M.tolist())
    assert read == [str(tmp_path / name) for name in ("keys.txt", "keys.txt", "rows.parquet")]
    columns["key"][0] = "c"
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match="the key 'c' belongs to several rows"):
        open_clip.static_keys(tmp_path / "rows.parquet", 10)


# Training that would never start


def tars(folder: Path, *of_tars: list[tuple[str, bytes]]) -> str:
    """Write tars with these members, and return their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, members in enumerate(of_tars):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(folder / f"{{00000..{len(of_tars) - 1:05d}}}.tar")


def uid(i: int) -> str:
    return f"{i:05d}" + "ab" * 13 + "c"


def sample(pairs: Path, i: int) -> dict[str, bytes]:
    """A sample of DataComp."""
    image = (pairs / f"{i:05d}.png").read_bytes()
    return {"png": image, "txt": b"the %d" % i, "json": json.dumps({"uid": uid(i)}).encode()}


@pytest.fixture
def datacomp(pairs: Path, tmp_path: Path) -> list[str]:
    """Arguments for two tars of 32 samples as those of DataComp: numbers as keys, the uid in the json."""
    members = [
        [(f"{i:09d}.{kind}", content) for i in range(lo, lo + 32) for kind, content in sample(pairs, i).items()]
        for lo in (0, 32)
    ]
    return ["--train-data", tars(tmp_path / "datacomp", *members), "--train-num-samples", "64"]


def subset(path: Path, rows: Iterable[int]) -> str:
    """A uid subset file of DataComp."""
    halves = [(int(uid(i)[:16], 16), int(uid(i)[16:], 16)) for i in rows]
    np.save(path, np.sort(np.array(halves, np.dtype("u8,u8"))))
    return str(path)


@pytest.mark.parametrize("more", ["", "--prune-key uid", "--dataset-resampled --workers 2"])
def test_a_uid_subset_of_datacomp_shards_trains(run: Run, datacomp: list[str], tmp_path: Path, more: str) -> None:
    """datacomp#92: it was read for ever, as the keys of the shards are numbers."""
    half = subset(tmp_path / "half.npy", range(0, 64, 2))
    ran = run("webdataset", *datacomp, "--prune", "static", "--prune-selection", half, *more.split())
    assert [(entry["rows"], entry["samples"]) for entry in ran.log] == [(32, 32)] * 2
    chosen = {int(hashed) for hashed, _ in ids_of([uid(i) for i in range(0, 64, 2)])}
    assert set(ran.ledger["hashes"].tolist()) <= chosen


def test_a_selection_of_a_pool_with_uids_trains(
    run: Run, datacomp: list[str], tmp_path: Path, pool: Callable[..., Any], rows: Callable[..., Any]
) -> None:
    """The pool that embed makes of these shards has their uids as keys."""
    store = pool(
        rows(64), rows(64, seed=1), {"uid": [uid(i) for i in range(64)], "key": [f"{i:09d}" for i in range(64)]}
    )
    run_steps(store, [build("clip-score", {"keep": "50%"})]).save(tmp_path / "half")
    ran = run("webdataset", *datacomp, "--prune", "static", "--prune-selection", str(tmp_path / "half"))
    assert [(entry["rows"], entry["samples"]) for entry in ran.log] == [(32, 32)] * 2


Refused = Callable[..., str]


@pytest.fixture
def refused(pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run the trainer on webdataset, and return the line with its error."""

    def train(*arguments: str) -> str:
        with quiet():
            given = [*common(pairs, "webdataset"), "--logs", str(tmp_path), "--name", "refused", *arguments]
            assert main(given) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1
        return lines[0]

    return train


@pytest.mark.parametrize(
    ("more", "number"), [("", 64), ("--workers 2", 32), ("--workers 1 --dataset-resampled --prune-patience 100", 100)]
)
def test_a_selection_of_other_data_stops_the_run(
    refused: Refused, datacomp: list[str], tmp_path: Path, more: str, number: int
) -> None:
    (tmp_path / "keys.txt").write_text("x1\nx2\n")
    given = [*datacomp, "--prune", "static", "--prune-selection", str(tmp_path / "keys.txt"), *more.split()]
    error = refused(*given)
    assert error.startswith(
        f"Error: the selection has none of {number} samples (members: json, png, txt; the first has"
    )
    assert "ab" * 13 in error
    assert (
        "looked up by __key__; it has 2 keys, such as 'x1'. Give a selection of these data, or type --prune-key"
        in error
    )
    assert ("fewer --workers" in error) == (more == "--workers 2")


@pytest.mark.slow
def test_a_csv_has_no_uids(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        assert main([*common(pairs, "csv"), "--logs", str(tmp_path), "--prune", "full", "--prune-key", "uid"]) == 2
    assert "--prune-key uid is for webdataset; the key of a csv is its column --csv-img-key" in capsys.readouterr().err


def test_uids_that_are_looked_up_by_key_say_what_to_type(refused: Refused, datacomp: list[str], tmp_path: Path) -> None:
    half = subset(tmp_path / "half.npy", range(32))
    error = refused(*datacomp, "--prune", "static", "--prune-selection", half, "--prune-key", "key")
    assert "none of 64 samples" in error
    assert "type --prune-key uid" in error


@pytest.mark.parametrize(
    ("kinds", "more", "message"),
    [
        (("png", "cls"), "", "can train on none of 16 samples (members: cls, png; the first has the key"),
        (("png", "json"), "--workers 2", "can train on none of 8 samples (members: json, png; the first has the key"),
        (("gif", "txt"), "", "can train on none of 16 samples (members: gif, txt; the first has the key"),
        (
            ("png", "cls"),
            "--dataset-resampled --workers 2 --prune-patience 90",
            "can train on none of 90 samples (members: cls, png; the first has the key",
        ),
    ],
)
def test_samples_that_open_clip_drops_stop_the_run(
    refused: Refused, pairs: Path, tmp_path: Path, kinds: list[str], more: str, message: str
) -> None:
    """open_clip drops samples without an image or a caption, and then reads its shards for ever."""
    contents = {**sample(pairs, 0), "cls": b"3", "gif": b"GIF"}
    members = [[(f"{i:04d}.{kind}", contents[kind]) for i in range(8) for kind in kinds] for _ in range(2)]
    error = refused("--train-data", tars(tmp_path / "data", *members), "--train-num-samples", "16", *more.split())
    assert message in error
    assert "a sample needs an image (jpg, png, jpeg or webp) and a caption (txt); thresher doctor DATA shows" in error


def test_a_sample_that_open_clip_drops_is_named(run: Run, pairs: Path, tmp_path: Path) -> None:
    """Once, while the others are trained on."""
    members = [
        (f"{i:04d}.{kind if i % 3 else 'gif' if kind == 'png' else kind}", sample(pairs, i)[kind])
        for i in range(48)
        for kind in ("png", "txt")
    ]
    ran = run("webdataset", "--train-data", tars(tmp_path / "data", members), "--train-num-samples", "32")
    assert [entry["samples"] for entry in ran.log] == [32, 32]
    warnings = [line for line in (ran.folder / "out.log").read_text().splitlines() if "leaves out" in line]
    assert len(warnings) == 1
    assert "leaves out samples, such as '0000', which has its image as .gif; thresher doctor DATA counts" in warnings[0]


def test_members_that_lie_apart_stop_the_run(refused: Refused, pairs: Path, tmp_path: Path) -> None:
    """webdataset#407: first all images, then all captions."""
    given = sample(pairs, 0)
    members = [(f"{i:04d}.{kind}", given[kind]) for kind in ("png", "txt") for i in range(8)]
    error = refused("--train-data", tars(tmp_path / "data", members), "--train-num-samples", "8")
    assert "can train on none of 16 samples (members: png, txt;" in error
    assert error.endswith("members of a sample must lie next to each other: sort the tars by name")


@pytest.mark.parametrize(
    ("image", "more", "message"),
    [
        (b"no image", "", f"none of 8 samples {'has an image that ' if TASKS else ''}can be decoded"),
        (None, "", "8 of 8 samples in 1 tars can be trained on, which do not fill a batch of 16; give a smaller"),
        (None, "--train-data nothing.tar", "no sample in 1 tars of --train-data; the warnings above say why"),
        (None, "--train-data nothing.tar --dataset-resampled", "no sample in 1,000 tars of --train-data"),
        (None, "--workers 3", "fewer tars than the 3 workers of all processes; give fewer --workers"),
    ],
)
def test_a_run_without_a_batch_stops(
    refused: Refused, pairs: Path, tmp_path: Path, image: bytes | None, more: str, message: str
) -> None:
    given = sample(pairs, 0) | ({} if image is None else {"png": image})
    members = [(f"{i:04d}.{kind}", given[kind]) for i in range(8) for kind in ("png", "txt")]
    error = refused("--train-data", tars(tmp_path / "data", members), "--train-num-samples", "16", *more.split())
    assert message in error


def test_a_selection_that_matches_rarely_trains(run: Run, datacomp: list[str], tmp_path: Path) -> None:
    given = ("--prune", "static", "--prune-selection", subset(tmp_path / "two.npy", [3, 40]), "--batch-size", "2")
    ran = run("webdataset", *datacomp, *given, "--prune-patience", "62")
    assert [(entry["rows"], entry["samples"]) for entry in ran.log] == [(2, 2)] * 2


# Several processes


SCRIPT = """
import json, logging, sys, torch
# open_clip names the device of the model, which is refused on the CPU: its trainer runs in several processes on GPUs
class DDP(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, model, device_ids, **more):
        super().__init__(model, **more)
torch.nn.parallel.DistributedDataParallel = DDP
torch.set_num_threads(1)
import open_clip_train.data as data
import open_clip_train.main as theirs
from thresher.train.open_clip import main
data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = 1
torch.distributed.init_process_group("gloo")
torch.distributed.init_process_group = lambda **more: None  # once for all runs
for name, arguments in json.load(open(sys.argv[1])).items():
    code = (theirs.main if name == "theirs" else main)(arguments)
    assert not code, name
    for handler in list(logging.root.handlers):
        logging.root.removeHandler(handler)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback device")
def test_two_processes(pairs: Path, tmp_path: Path, run: Run) -> None:
    """By torchrun: full is open_clip's own; pruned, the batches are those of one process, twice as large."""
    half = ["--logs", str(tmp_path), "--batch-size", str(B // 2)]
    full = [*common(pairs, "csv"), *half, "--accum-freq", "2"]
    scan = ["--prune", "scan", "--prune-rho", "0.25", "--prune-full-epochs", "0", "--epochs", "3", *STEADY]
    pruned = [*half, *scan, "--local-loss", "--gather-with-grad", "--name"]
    runs = {
        "theirs": [*full, "--name", "theirs"],
        "ours": [*full, "--prune", "full", "--name", "ours"],
        "csv": [*common(pairs, "csv"), *pruned, "csv"],
        "webdataset": [*common(pairs, "webdataset"), *pruned, "webdataset"],
    }
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(tmp_path / "script.py"), str(tmp_path / "runs.json")]
    done = finished(command, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    found = {name: Ran(tmp_path / name, []) for name in runs}
    assert found["ours"].lines == found["theirs"].lines
    assert len(found["ours"].lines) == 2 * (N // (2 * B))
    for kind in ("csv", "webdataset"):
        log, rates = found[kind].log, found[kind].rates
        assert [entry["phase"] for entry in log] == ["preparation", "mutation", "mutation"]
        assert log[0]["samples"] == N
        assert log[2]["rows"] < 0.8 * N
        assert [entry["samples"] for entry in log] == [entry["rows"] // B * B for entry in log]
        assert rates[-1] < 0.2 * max(rates)
    assert len(found["webdataset"].ledger["hashes"]) == N
    one, two = run("csv", *scan, name="one"), found["csv"]
    np.testing.assert_allclose(one.state(1)["ledger.losses"], two.state(1)["ledger.losses"], rtol=1e-2)
    assert one.log[0]["loss"] == pytest.approx(two.log[0]["loss"], rel=1e-4)
    assert one.log[0]["candidates"] == pytest.approx(two.log[0]["candidates"], abs=2)
    assert (one.ledger["seen"] == two.ledger["seen"]).mean() > 0.9


# The seam, and what cannot be carried out


def test_the_names_are_put_back() -> None:
    names = open_clip.seam(trainer)
    before = {name: getattr(trainer, name) for name in names}
    assert len(before) == 5
    with pruning(PruneOptions()) as module:
        assert module is trainer
        assert all(getattr(trainer, name) is not before[name] for name in names)
    assert {name: getattr(trainer, name) for name in names} == before
    with pytest.raises(ZeroDivisionError), pruning(PruneOptions()):
        raise ZeroDivisionError
    assert {name: getattr(trainer, name) for name in names} == before


def test_a_pipeline_of_another_version_is_refused() -> None:
    stage = object()
    for stages in ([], [wds.to_tuple("image", "text")], [their_data.tarfile_to_samples_nothrow]):
        with pytest.raises(UsageError, match="the training pipeline of this version of open_clip is not supported"):
            insert_stage(stages, stage)
    stages = [None, their_data.tarfile_to_samples_nothrow, wds.to_tuple("image", "text"), None]
    insert_stage(stages, stage)
    assert stages[2] is stage
    assert stages[3].args == ("__id__", "image", "text")


# As in the main branch of open_clip, which against_open_clip_main.py runs: tasks, and batches that are dictionaries


class Task(torch.nn.Module):
    """Has its loss as a module, and takes a batch."""

    data_keys = ("image", "text")

    def __init__(self) -> None:
        super().__init__()
        self.loss = open_clip_loss()

    def forward(self, batch: dict[str, torch.Tensor]) -> Any:
        features = {f"{name}_features": batch[name] for name in self.data_keys}
        return self.loss(**features, logit_scale=torch.tensor(3.0), output_dict=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_of_a_task_is_recorded_for_the_rows_of_dictionaries(rows: Callable[..., Any], compiled: bool) -> None:
    image, text = (torch.from_numpy(unit(rows(24, seed=seed))).float() for seed in (1, 2))
    pairs = [{"image": image[row], "text": text[row]} for row in range(24)]
    loader = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True)
    loader.num_batches, loader.num_samples = 6, 24
    args = argparse.Namespace(
        batch_size=4, accum_freq=1, world_size=1, rank=0, workers=0, epochs=1, seed=0, logs="none", siglip=False,
        torchcompile=compiled, save_most_recent=False, save_frequency=1,
    )  # fmt: skip
    of_main = {
        "get_data": lambda args, transforms, epoch, **more: {"train": their_data.DataInfo(loader)},
        "create_task": lambda args, **more: Task(),
    }
    run = open_clip._Run(PruneOptions(), of_main)
    data = run.get_data(args, (None, None), naflex_data_config=None)["train"].dataloader
    task = run.create_task(args, model=None, naflex_data_config=None)
    expected = np.zeros(24, np.float32)
    for batch in data:
        assert list(batch) == ["image", "text"]
        at = (batch["image"] @ image.T).argmax(1).numpy()
        losses = clip_losses(batch["image"], batch["text"], torch.tensor(3.0)).mean(1)
        assert task(batch)["contrastive_loss"].item() == pytest.approx(losses.mean().item(), rel=1e-5)
        expected[at] = losses
    ledger = run.in_force.ledger
    assert ledger is not None
    np.testing.assert_allclose(ledger.state()["losses"][:, 0], expected, rtol=1e-5)
    assert ledger.state()["seen"].tolist() == [0] * 24


def test_a_task_of_other_data_is_refused() -> None:
    run = open_clip._Run(PruneOptions(), {"create_task": lambda args: argparse.Namespace(data_keys=("audio", "text"))})
    with pytest.raises(UsageError, match="--model CLAP is not trained on images with captions"):
        run.create_task(argparse.Namespace(model="CLAP"))


def test_ids_pass_a_pipeline_of_dictionaries() -> None:
    samples = [{"__key__": f"{i:05d}", "txt": b"the %d" % i, "png" if i != 1 else "gif": b"GIF"} for i in range(52)]
    stages = [
        wds.SimpleShardList("00000.tar"),
        their_data.tarfile_to_samples_nothrow,
        wds.select(lambda sample: "png" in sample),
        wds.rename(image="jpg;png", text="txt", keep=False),
        wds.batched(5, partial=False, collation_fn=torch.utils.data.default_collate),
    ]
    pruner = StreamPruner(policy=Full(), batch_size=5, epochs=1, samples=52, seed=0)
    stage = prune_stream(pruner)
    insert_stage(stages, stage)
    watch = open_clip._Watch(stage, 5, 1)
    watch.insert(stages)
    before = stages.index(stage) - 1
    stages[before] = lambda shards: (dict(sample) for _ in shards for sample in samples)
    found = list(open_clip._Parted(wds.DataPipeline(*stages)))
    assert len(found) == 10
    keys = [f"{i:05d}" for i in range(52) if i != 1]
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in found]), ids_of(keys[:50]))
    assert all(list(batch) == ["image", "text"] for _, batch in found)
    assert [batch["text"][0] for _, batch in found[:2]] == [b"the 0", b"the 6"]
    assert (watch.trainable, watch.decoded) == (51, 51)


OWN = ["--train-data", "pairs.csv", "--model", "ViT-B-32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prune", "scna"], "--prune scna: no policy 'scna'; there are d-pruning, .*Did you mean 'scan'"),
        (["--prune", "scan", "--prune-rh", "0.3"], "no option --prune-rh; .*Did you mean '--prune-rho'"),
        (["--prune", "full", "--prune-rho", "0.3"], "policy full has no rho; it has no options"),
        (["--prune", "infobatch", "--prune-full-epochs", "1"], "policy infobatch has no full-epochs; it has delta"),
        (["--prune", "scan", "--prune-full-epochs", "-1"], "full-epochs = -1; give 0 or more"),
        (["--prune", "scan", "--prune-warmup", "1"], "no option --prune-warmup; --help lists"),
        (["--prune", "scan", "--prune-share", "150%"], "argument --prune-share: cannot read '150%' as a share; give"),
        (["--prune", "scan", "--prune-rho", "nan"], "argument --prune-rho: cannot read 'nan' as a share"),
        (["--prune", "scan", "--prune-threshold", "0"], "argument --prune-threshold: cannot read '0' as a share"),
        (["--prune", "infobatch", "--prune-delta", "110%"], "--prune-delta: .* give a share above 0 and up to 1"),
        (["--prune", "scan", "--prune-rho", "0.6"], "rho = 0.6; give a share per side"),
        (["--prune", "scan", "--prune-rho", "0.3", "--prune-share", "30%"], "give one or the other"),
        (["--prune", "scan", "--prune-share", "90%"], "cannot prune 90.0% over 32 epochs"),
        (["--prune", "scan", "--prune-keep", "70%"], "policy scan has no keep; it has rho, "),
        (["--prune", "d-pruning", "--prune-keep", "1.5"], "argument --prune-keep: .* give a share strictly between"),
        (["--prune", "static"], "--prune static and --prune-selection need each other"),
        (["--prune-selection", "keys.txt"], "--prune static and --prune-selection need each other"),
        (["--prune", "scan", "--prune-weigh"], "policy scan has no weigh; it has rho, "),
        (["--distill-model", "RN50"], "--distill-model cannot be combined with pruning"),
        (["--model", "coca_ViT-B-32"], "--model coca... cannot be combined with pruning"),
        (["--prune-patience", "0"], "--prune-patience 0; give 1 or more samples"),
        (["--prune-key", "uuid"], "argument --prune-key: invalid choice: 'uuid'"),
        *([] if TASKS else [(["--horovod"], "--horovod cannot be combined with pruning")]),
    ],
)
def test_what_cannot_be_carried_out_is_said_before_anything_is_made(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OWN, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_arguments_are_shared_out() -> None:
    options, rest = parse(["--prune=scan", *OWN, "--prune-share", "15%", "--epochs", "20", "--prune-mode=redundant"])
    assert rest == [*OWN, "--epochs", "20"]
    assert options.make(20) == Scan.for_budget(0.15, 20, mode="redundant")
    assert options.make(20).expected_pruned(20) == pytest.approx(0.15)
    assert parse(OWN)[0] == PruneOptions()
    assert parse([*OWN, "--prune", "dynamic-random", "--prune-keep", "0.6"])[0].make(5).keep == 0.6
    assert parse([*OWN, "--prune", "d-pruning", "--prune-keep", "60%"])[0].make(5).keep == 0.6


def test_help_lists_what_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "all others are those of open_clip" in re.sub(r"\s+", " ", told)
    page = (Path(__file__).parents[2] / "docs" / "open_clip.md").read_text()
    for flag in set(re.findall(r"--prune[\w-]*", told)):
        assert f"`{flag}" in page, f"docs/open_clip.md does not have {flag}"


def test_an_order_made_elsewhere_is_taken() -> None:
    sampler = PruningSampler(10, policy=Static(times_N=np.arange(10) < 8), batch_size=3, epochs=2)
    sampler.reorder([5, 1, 2, 7, 0, 5, 3])
    assert list(sampler) == [[5, 1, 2], [7, 0, 5]]
    for wrong in ([], [9], [-1], [10], [0.5], [[1]]):
        with pytest.raises(UsageError, match="give rows that the plan keeps"):
            sampler.reorder(wrong)
    other = PruningSampler(10, policy=sampler.policy, batch_size=3, epochs=2)
    sampler.reduce([5, 1, 2], torch.ones(3, 2))
    with pytest.raises(UsageError, match="set its order before the first step"):
        sampler.reorder([1])
    other.load_state_dict(sampler.state_dict())
    assert list(other) == [[7, 0, 5]]


def test_a_trainer_that_lacks_something_says_what(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip_train.main", None)
    monkeypatch.delattr("open_clip_train.main")
    assert main(OWN) == 2
    assert "type: pip install 'open_clip_torch[training]'" in capsys.readouterr().err
    monkeypatch.setattr(open_clip, "installed", lambda package: False)
    assert main(OWN) == 2
    assert "in a checkout of thresher type: pip install '.[train]'" in capsys.readouterr().err
