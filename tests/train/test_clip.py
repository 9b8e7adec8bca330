"""``thresher train clip`` in small: what it leaves, that it resumes, that it learns."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.resharding.common import hashes
from tests.runtime.common import needs_root, small_disk
from tests.train.conftest import POOL, ROWS, Data, emoji
from thresher import build, open_store, run_steps
from thresher.cli.main import main
from thresher.dynamic.cabs import Concepts, choose
from thresher.dynamic.loss import clip_losses
from thresher.dynamic.policies.full import Full
from thresher.dynamic.run_folder import CHECKPOINT, LEDGER, LOG, MARK, Training
from thresher.dynamic.sampler import PruningSampler
from thresher.errors import OutputError, PoolError, UsageError
from thresher.runtime.locks import holding
from thresher.runtime.progress import Silent
from thresher.train.clip import ClipSettings, ClipTask, train_clip
from thresher.train.loop import LOCK, Precision, Schedule, autocast
from thresher.train.models import clip_model

B = 32


def settings(**schedule: Any) -> ClipSettings:
    length = {} if "samples" in schedule else {"epochs": 4}
    return ClipSettings(schedule=Schedule(**{"batch_size": B, "eval_every": 0, **length, **schedule}))


def outcome(run: Path) -> tuple[Any, ...]:
    """What must be the same, to the bit, however a run came about."""
    state = torch.load(run / CHECKPOINT, weights_only=True)
    log = [
        {name: value for name, value in entry.items() if name not in ("seconds", "samples_per_second")}
        for entry in Training.load(run).log()
    ]
    weights = {name: value.numpy().tobytes() for name, value in state["model"].items()}
    with np.load(run / LEDGER) as file:
        ledger = {name: file[name].tobytes() for name in file.files}
    return weights, log, ledger


class Cut(Exception):  # noqa: N818 - stands for a power cut
    """Thrown into a run."""


class Cutting(Silent):
    """Progress that ends a run after some batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Any]:
        def advance(rows: int) -> None:
            if not label.startswith("epoch"):
                return
            self.left -= 1
            if self.left == 0:
                raise Cut

        yield advance


# What a run leaves


def test_a_run_leaves_what_its_page_says(data: Data, tmp_path: Path) -> None:
    run = tmp_path / "run"
    how = replace(settings(policy="scan", prune=0.15, options={"warmup": 0, "cycle": 1}), eval_labels=("group",))
    log = train_clip(data.parquet, run, replace(how, schedule=replace(how.schedule, evals=(str(data.parquet),))))
    assert {path.name for path in run.iterdir()} == {MARK, LOG, LEDGER, CHECKPOINT, "pictures.bin"}
    told = Training.load(run)
    assert (told.task, told.policy, told.rows) == ("clip", "scan", ROWS)
    assert told.log() == log
    assert [entry["epoch"] for entry in log] == [0, 1, 2, 3]
    for entry in log:
        assert {"rows", "total", "loss", "seconds", "pruned_so_far", "lr", "samples_per_second"} <= set(entry)
        assert entry["total"] == ROWS
        assert entry["samples"] == entry["rows"] // B * B
    assert [entry["rows"] < ROWS for entry in log] == [False, True, False, True]
    assert log[-1]["pruned_so_far"] == pytest.approx(1 - sum(e["rows"] for e in log) / (4 * ROWS))
    assert log[-1]["pruned_so_far"] == pytest.approx(0.15, abs=0.06)  # few rows: rho is rounded down
    assert told.ledger().seen_N.max() == 3
    assert told.open_pool().total == ROWS
    assert "eval" not in log[0]
    found = log[-1]["eval"]["pairs"]
    assert {"image_to_text_R@1", "text_to_image_R@5", "zero_shot_group_top1", "zero_shot_group_majority"} <= set(found)
    assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.parametrize("kind", [pytest.param("parquet", marks=pytest.mark.slow), "tars", "csv"])
def test_every_kind_of_data_trains_the_same_model(data: Data, tmp_path: Path, kind: str) -> None:
    train_clip(data.parquet, tmp_path / "parquet", settings(epochs=1))
    train_clip(getattr(data, kind), tmp_path / "other", settings(epochs=1))
    assert outcome(tmp_path / "other") == outcome(tmp_path / "parquet")


@pytest.mark.parametrize(
    "policy", [pytest.param("full", marks=pytest.mark.slow), "infobatch", "dynamic-random", "d-pruning"]
)
def test_every_policy_trains(data: Data, tmp_path: Path, policy: str) -> None:
    log = train_clip(data.parquet, tmp_path / "run", settings(policy=policy))
    pruned = {"full": 0.0, "dynamic-random": 0.3, "d-pruning": 0.3 * 3 / 4}
    if policy in pruned:
        assert log[-1]["pruned_so_far"] == pytest.approx(pruned[policy], abs=0.01)
    else:
        assert 0.05 < log[-1]["pruned_so_far"] < 0.3


@pytest.mark.parametrize("where", ["file", "column"])
def test_reference_losses_are_those_of_the_rows(data: Data, tmp_path: Path, where: str) -> None:
    """From a file by key, in another order and without some rows, or from a column of the data."""
    losses = np.random.default_rng(0).random(ROWS).astype(np.float32)
    losses[[4, 9]] = np.nan
    table = data.table.append_column("hard", pa.array(losses, from_pandas=True))
    pq.write_table(table, tmp_path / "pairs.parquet")
    order = np.random.default_rng(1).permutation(np.delete(np.arange(ROWS), 9))
    pq.write_table(pa.table({"key": table["key"].take(order), "loss": losses[order]}), tmp_path / "ref.parquet")
    options = {"reference": str(tmp_path / "ref.parquet") if where == "file" else "column:hard", "softness": 0.0}
    log = train_clip(tmp_path / "pairs.parquet", tmp_path / "run", settings(policy="rho", options=options))
    assert [entry["phase"] for entry in log] == ["warm-up", "pruned", "pruned", "pruned"]
    ledger = Training.load(tmp_path / "run").ledger()
    np.testing.assert_array_equal(ledger.references_N, losses)
    assert ledger.times_N[4] == ledger.times_N[9] == 0, "rows without a reference loss are kept"


def test_a_run_that_sifts_is_explained(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From training to the coreset, from the command line."""
    command = ["train", "clip", str(data.parquet), "-o", str(tmp_path / "run"), "--policy", "sift", "--epochs", "4"]
    assert main([*command, "--batch-size", str(B), "--mismatched", "20%", "--redundant", "10%", "--cycle", "1"]) == 0
    log = Training.load(tmp_path / "run").log()
    assert [entry["ill_matched"] for entry in log] == [0, 30, 0, 30]
    assert [entry["redundant"] for entry in log] == [0, 15, 0, 15]
    assert [entry["rows"] for entry in log] == [ROWS, ROWS, ROWS - 45, ROWS]
    assert main(["explain", str(tmp_path / "run"), "row:3"]) == 0
    assert "the mean rank of its loss is 0." in capsys.readouterr().out
    assert main(["coreset", str(tmp_path / "run"), "-o", str(tmp_path / "core"), "--keep", "70%"]) == 0
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]) == 0
    assert "Mismatched pairs" in (tmp_path / "r.html").read_text()


def test_a_selection_is_trained_on(data: Data, tmp_path: Path) -> None:
    chosen = run_steps(open_store(str(data.parquet)), [build("random", {"keep": 64})], seed=1)
    chosen.save(tmp_path / "sel")
    log = train_clip(data.parquet, tmp_path / "run", settings(policy="static", selection=str(tmp_path / "sel")))
    assert [entry["rows"] for entry in log] == [64] * 4
    assert np.array_equal(Training.load(tmp_path / "run").ledger().seen_N >= 0, chosen.mask())


@pytest.mark.parametrize(
    "policy", ["scan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "dynamic-random"))]
)
def test_runs_of_as_many_samples_are_as_long(data: Data, tmp_path: Path, policy: str) -> None:
    prune = {} if policy == "full" else {"prune": 0.1}
    how = settings(policy=policy, samples=500, options={"warmup": 1} if policy == "scan" else None, **prune)
    log = train_clip(data.parquet, tmp_path / "run", how)
    assert sum(entry["samples"] for entry in log) == 500 // B * B
    assert log[-1]["lr"] < 0.05 * 2e-3  # the schedule came to its end


def test_siglip_and_configurations_of_open_clip_train(data: Data, tmp_path: Path) -> None:
    (tmp_path / "mini.json").write_text(json.dumps(MINI))
    how = replace(settings(epochs=2), model=str(tmp_path / "mini.json"), loss="siglip")
    log = train_clip(data.parquet, tmp_path / "run", how)
    assert log[1]["loss"] < log[0]["loss"]


# The same run, however it came about


@pytest.mark.slow
def test_the_same_arguments_give_the_same_run(data: Data, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_clip(data.parquet, tmp_path / name, settings(policy="infobatch", epochs=3))
    train_clip(data.parquet, tmp_path / "c", settings(policy="infobatch", epochs=3, seed=1))
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert outcome(tmp_path / "a")[0] != outcome(tmp_path / "c")[0]


@pytest.mark.parametrize("last", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_killed_before_it_wrote_its_log_writes_it_when_it_goes_on(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    how = settings(epochs=2, evals=(str(data.parquet),))
    train_clip(data.parquet, tmp_path / "whole", how)
    with monkeypatch.context() as patch:
        own = Training.record

        def record(self: Training, log: Sequence[Any], ledger: Any) -> None:
            if len(log) == 1 + last:
                raise Cut
            own(self, log, ledger)

        patch.setattr(Training, "record", record)
        with pytest.raises(Cut):
            train_clip(data.parquet, tmp_path / "cut", how)
    train_clip(data.parquet, tmp_path / "cut", how, resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_run_killed_while_it_read_the_data_begins_anew(data: Data, tmp_path: Path) -> None:
    for resume in (False, True):
        run = tmp_path / f"run-{resume}"
        run.mkdir()
        (run / ".pictures.bin.x7.tmp.bin").write_bytes(b"half")
        (run / "pictures.bin").write_bytes(b"of another day")
        train_clip(data.parquet, run, settings(epochs=1), resume=resume)
        assert {path.name for path in run.iterdir()} == {MARK, LOG, LEDGER, CHECKPOINT, "pictures.bin"}


def test_an_evaluation_that_fails_costs_no_training(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: ClipTask) -> None:
        raise UsageError("row 0 of the images is zero or not finite")

    monkeypatch.setattr(ClipTask, "evaluate", fails)
    how = settings(epochs=2, evals=(str(data.parquet),))
    log = train_clip(data.parquet, tmp_path / "run", how)
    assert log[-1]["eval_failed"] == "row 0 of the images is zero or not finite"
    assert Training.load(tmp_path / "run").log() == train_clip(data.parquet, tmp_path / "run", how, resume=True) == log


@pytest.mark.parametrize("batches", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 10, 13))])
def test_a_run_that_is_cut_off_goes_on_to_the_identical_result(data: Data, tmp_path: Path, batches: int) -> None:
    how = settings(policy="scan", prune=0.15, options={"warmup": 0, "cycle": 1}, checkpoint_minutes=0.0)
    train_clip(data.parquet, tmp_path / "whole", how)
    with pytest.raises(Cut):
        train_clip(data.parquet, tmp_path / "cut", how, progress=Cutting(batches))
    train_clip(data.parquet, tmp_path / "cut", how, resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    again = train_clip(data.parquet, tmp_path / "cut", how, resume=True)  # it is over: nothing is done again
    assert again == Training.load(tmp_path / "cut").log()


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_identical_result(data: Data, tmp_path: Path) -> None:
    usual = ["train", "clip", str(data.parquet), "--epochs", "8", "--batch-size", "32", "--policy", "scan"]
    usual += ["--prune", "15%", "--quiet", "-o"]
    assert main([*usual, str(tmp_path / "whole")]) == 0
    cut = tmp_path / "cut"
    often = [*usual, str(cut), "--checkpoint-minutes", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "thresher", *often]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while not (cut / LOG).exists() or len((cut / LOG).read_text().splitlines()) < 3:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert len((cut / LOG).read_text().splitlines()) < 8
    assert main([*often, "--resume"]) == 0
    assert outcome(cut) == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["clip", "moco"])
def test_two_runs_never_share_a_folder(data: Data, tmp_path: Path, task: str, capsys: pytest.CaptureFixture) -> None:
    """The second stops at once; a killed run does not stand in the way of the next."""
    usual = ["train", task, str(data.parquet), "--epochs", "2", "--batch-size", "32", "--quiet", "-o"]
    assert main([*usual, str(tmp_path / "whole")]) == 0
    out = tmp_path / "run"
    command = [sys.executable, "-c", FIRST, *usual, str(out), "--seed", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.read(1) == b"."  # it waits in the middle of its first epoch
        before = hashes(out)
        capsys.readouterr()
        for more in (["--seed", "1"], ["--seed", "1", "--resume"], ["--resume"]):
            assert main([*usual, str(out), *more]) == 2
            told = capsys.readouterr().err.splitlines()[-1]
            assert re.search(rf"the run {out}: process {first.pid} on \S+ is using it; wait until", told), told
        assert hashes(out) == before
        first.kill()
    assert main([*usual, str(out), "--resume"]) == 0
    assert outcome(out) == outcome(tmp_path / "whole")
    assert not (out / LOCK).exists()


# Stops after some steps and waits.
FIRST = """
import sys
from thresher.cli.main import main
from thresher.train import loop

ours = loop._reduce
def reduce(sampler, rows):
    if sampler.step == 2:
        print(".", end="", flush=True)
        sys.stdin.read()
    return ours(sampler, rows)
loop._reduce = reduce
main(sys.argv[1:])
"""


def test_a_folder_in_use_is_refused_at_once(data: Data, tmp_path: Path) -> None:
    with holding(tmp_path / "run" / LOCK, "it"), pytest.raises(OutputError, match=rf"the run {tmp_path}/run: process"):
        train_clip(data.parquet, tmp_path / "run", settings())
    train_clip(data.parquet, tmp_path / "run", settings(epochs=1))
    with holding(tmp_path / "run" / LOCK, "it"), pytest.raises(OutputError, match="is using it; wait until it has"):
        train_clip(data.parquet, tmp_path / "run", settings(epochs=1), resume=True)


def test_a_run_that_does_not_start_leaves_no_folder(data: Data, tmp_path: Path) -> None:
    for place in (tmp_path / "run", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        assert main(["train", "clip", str(tmp_path / "no-data"), "-o", str(place), "--epochs", "1"]) == 2
    assert os.listdir(tmp_path) == ["there"]
    assert os.listdir(tmp_path / "there") == []


def test_the_content_of_the_data_has_the_hash_that_earlier_runs_recorded(data: Data, tmp_path: Path) -> None:
    train_clip(data.parquet, tmp_path / "run", settings(epochs=1))
    table = data.table.to_pylist()
    sha = hashlib.sha256(np.array([len(row["image"]["bytes"]) for row in table], np.int64).tobytes())
    sha.update("".join(row["text"] + "\0" for row in table).encode())
    assert Training.load(tmp_path / "run").settings["content"] == sha.hexdigest()[:32]


MINI = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 16,
        "width": 32,
        "layers": 2,
        "head_width": 16,
        "patch_dropout": 0.5,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_chunks_give_the_gradients_of_the_whole_batch(tmp_path: Path, chunk: int) -> None:
    (tmp_path / "mini.json").write_text(
        json.dumps({**MINI, "vision_cfg": {**MINI["vision_cfg"], "patch_dropout": 0.0}})
    )
    rng = np.random.Generator(np.random.Philox(0))
    pixels = torch.from_numpy(rng.integers(0, 256, (20, 36, 36, 3)).astype(np.uint8))
    texts = [f"word{row} and {row % 3}" for row in range(20)]
    gradients = []
    for size in (None, chunk):
        torch.manual_seed(0)
        clip = clip_model(str(tmp_path / "mini.json"))
        task = ClipTask(
            clip, clip.tokenize(texts), torch.device("cpu"), replace(settings(precision="float32"), chunk=size)
        )
        torch.manual_seed(1)
        task.step(np.arange(20), pixels, lambda losses_BR: losses_BR.mean())
        gradients.append(torch.cat([p.grad.flatten() for p in clip.model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("native", [False, True])
def test_automatic_precision_is_bfloat16_where_the_processor_has_it(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thresher.train.loop.has_bfloat16", lambda: native)
    rows = torch.ones(2, 2)
    kinds: dict[Precision, torch.dtype] = {
        "auto": torch.bfloat16 if native else torch.float32,
        "float32": torch.float32,
    }
    for precision, kind in kinds.items():
        with autocast(torch.device("cpu"), precision)():
            assert (rows @ rows).dtype == kind


def test_a_run_keeps_its_precision_on_another_machine(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thresher.train.loop.has_bfloat16", lambda: False)
    log = train_clip(data.parquet, tmp_path / "run", settings(epochs=1))
    monkeypatch.setattr("thresher.train.loop.has_bfloat16", lambda: True)
    with pytest.raises(UsageError, match="was started with precision float32, not bfloat16; give the same value"):
        train_clip(data.parquet, tmp_path / "run", settings(epochs=1), resume=True)
    assert train_clip(data.parquet, tmp_path / "run", settings(epochs=1, precision="float32"), resume=True) == log


def test_what_chance_left_out_of_a_chunk_is_left_out_again(tmp_path: Path) -> None:
    """The features whose gradients are taken are those the loss was computed of."""
    (tmp_path / "drops.json").write_text(json.dumps(MINI))
    clip = clip_model(str(tmp_path / "drops.json"))
    task = ClipTask(clip, clip.tokenize(["a", "b", "c"] * 4), torch.device("cpu"), replace(settings(), chunk=5))
    seen: list[torch.Tensor] = []
    clip.model.visual.register_forward_hook(lambda *given: seen.append(given[2].detach().clone()))
    task.step(np.arange(12), torch.randint(0, 256, (12, 36, 36, 3), dtype=torch.uint8), lambda losses: losses.mean())
    assert [len(features) for features in seen] == [5, 5, 2] * 2
    for first, second in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(first, second)
    picture = torch.rand(5, 3, 32, 32)
    assert not torch.equal(clip.model.visual(picture), clip.model.visual(picture))  # chance does play a part


# What is refused


def test_what_is_in_the_way_is_not_touched(data: Data, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_clip(data.parquet, run, settings(epochs=1))
    before = (run / CHECKPOINT).read_bytes()
    with pytest.raises(OutputError, match="has a training run already; pass --resume"):
        train_clip(data.parquet, run, settings(epochs=1))
    with pytest.raises(UsageError, match="was started with lr 0.002, not 0.001; give the same value"):
        train_clip(data.parquet, run, settings(epochs=1, lr=1e-3), resume=True)
    with pytest.raises(UsageError, match="was started with data"):
        train_clip(data.csv, run, settings(epochs=1), resume=True)
    for damaged in (before[:1000], b"no checkpoint", b"", pickle.dumps({"model": 1})):
        (run / CHECKPOINT).write_bytes(damaged)
        with pytest.raises(PoolError, match="checkpoint.pt: cannot be read, it may be damaged"):
            train_clip(data.parquet, run, settings(epochs=1), resume=True)
    torch.save({"model": 1}, run / CHECKPOINT)
    with pytest.raises(PoolError, match="checkpoint.pt: cannot be read, it may be damaged"):
        train_clip(data.parquet, run, settings(epochs=1), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputError, match="is not a training run"):
            train_clip(data.parquet, tmp_path / "other", settings(), resume=resume)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]


def test_data_that_changed_are_another_run(data: Data, tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    pq.write_table(data.table, path)
    train_clip(path, tmp_path / "run", settings(epochs=1))
    texts = data.table["text"].to_pylist()
    swapped = data.table.set_column(1, "text", pa.array([texts[1], texts[0], *texts[2:]]))
    for other in (data.table.slice(1), swapped):
        pq.write_table(other, path)
        with pytest.raises(UsageError, match="has changed since"):
            train_clip(path, tmp_path / "run", settings(epochs=1), resume=True)


def test_several_processes_are_sent_to_open_clip(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="run on one process; for several, use python -m thresher.train.open_clip"):
        train_clip(data.parquet, tmp_path / "run", settings())


@needs_root
@pytest.mark.parametrize("size", ["16k", "100k"])
def test_a_full_disk_is_said_also_by_a_checkpoint(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    with small_disk(tmp_path / "disk", size) as disk:
        words = ["train", "clip", str(data.parquet), "-o", str(disk / "run"), "--epochs", "1", "--quiet"]
        assert main(words) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert "cannot be written (No space left on device); free some space" in said[0]


def test_an_interrupted_run_says_how_to_go_on(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ClipTask, "step", interrupted)
    assert main(["train", "clip", str(data.parquet), "-o", str(tmp_path / "run"), "--quiet"]) == 130
    assert "the same command with --resume starts over: there is no checkpoint yet" in capsys.readouterr().err


REFUSED = [
    (
        ["--policy", "scna"],
        "d-pruning, dissect, dynamic-random, full, infobatch, jest, rho, scan, seta, sift, static",
    ),
    (["--prune", "30%"], "policy full does not prune; to leave out a share use a policy such as scan"),
    (["--policy", "scan", "--prune", "1.5"], "give a share strictly between 0 and 1, like 30% or 0.3"),
    (["--policy", "scan", "--prune", "60%", "--epochs", "4"], "cannot prune 60.0% over 4 epochs"),
    (["--policy", "scan", "--prune", "20%", "--rho", "0.2"], "rho cannot be combined"),
    (["--policy", "infobatch", "--rho", "0.2"], "policy infobatch has no rho; it has delta"),
    (["--policy", "infobatch", "--full-epochs", "1"], "policy infobatch has no full-epochs; it has delta"),
    (["--policy", "scan", "--keep", "50%"], "policy scan has no keep; it has rho, cycle, full-epochs, threshold"),
    (["--policy", "d-pruning", "--full-epochs", "0"], "full-epochs = 0; give 1 or more"),
    (["--policy", "scan", "--mode", "both-sides"], "Invalid value for '--mode': 'both-sides' is not one of"),
    (["--policy", "scan", "--rho", "nan"], "Invalid value for '--rho': cannot read 'nan' as a share"),
    (["--policy", "static"], "policy static needs a selection"),
    (["--epochs", "2", "--samples-seen", "100"], "give one"),
    (["--model", "ViT-B-33"], "no model 'ViT-B-33'"),
    (["--device", "tpu"], "device 'tpu' cannot be used"),
    (["--eval", "nothing.parquet"], "nothing.parquet"),
    (["--eval-label", "group"], "need --eval FILE, which is not given"),
    (["--template", "a photo"], "each with {} for the name of a class"),
    (["--samples-seen", "10"], "give 1 batch or more"),
    (["--seed", "-1"], "seed = -1"),
    (["--warmup", "1.0"], "warmup = 1.0"),
    (["--lr", "inf"], "'--lr': 'inf'; give a finite number"),
    (["--policy", "static", "--selection", "nothing"], "nothing: is neither a selection folder nor a file of keys"),
    (["--selection", "nothing"], "policy static needs a selection; the other policies do not accept one"),
]


@pytest.mark.parametrize(("arguments", "told"), REFUSED)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], told: str
) -> None:
    assert main(["train", "clip", str(data.parquet), "-o", str(tmp_path / "run"), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / MARK).exists()


@pytest.mark.parametrize(
    "arguments", [REFUSED[4][0], *(pytest.param(words, marks=pytest.mark.slow) for words, _ in REFUSED)]
)
def test_a_folder_for_which_a_command_was_refused_takes_the_next(
    data: Data, tmp_path: Path, arguments: Sequence[str]
) -> None:
    assert main(["train", "clip", str(data.parquet), "-o", str(tmp_path / "run"), *arguments]) == 2
    assert main(["train", "clip", str(data.parquet), "-o", str(tmp_path / "run"), "--epochs", "1", "--quiet"]) == 0


def test_evaluation_sets_have_names_and_something_to_evaluate(data: Data, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    few = data.table.slice(0, 30)
    pq.write_table(few, tmp_path / "val.parquet")
    pq.write_table(few.append_column("label", pa.array(range(30))), tmp_path / "other" / "val.parquet")
    evals = (str(tmp_path / "val.parquet"), str(tmp_path / "other" / "val.parquet"))
    log = train_clip(data.parquet, tmp_path / "run", settings(epochs=1, evals=evals))
    assert list(log[-1]["eval"]) == ["val", "val-2"]
    assert not any(name.startswith("zero_shot") for name in log[-1]["eval"]["val-2"])  # numbers are no names
    pq.write_table(few.drop_columns(["text"]), tmp_path / "bare.parquet")
    with pytest.raises(UsageError, match="bare.parquet: has neither captions nor class names"):
        train_clip(data.parquet, tmp_path / "x", settings(evals=(str(tmp_path / "bare.parquet"),)))
    cells = few["image"].to_pylist()
    cells[7] = {"bytes": b"no picture", "path": None}
    pq.write_table(few.set_column(2, "image", pa.array(cells)), tmp_path / "bad.parquet")
    with pytest.raises(PoolError, match="bad.parquet: row 7 is not a readable image"):
        train_clip(data.parquet, tmp_path / "x", settings(evals=(str(tmp_path / "bad.parquet"),)))


# It learns


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji pool but for every tenth group (train.parquet), a quarter of that (some.parquet), and the tenth."""
    folder = tmp_path_factory.mktemp("folds")
    table = emoji()
    groups = {name: i for i, name in enumerate(dict.fromkeys(table["group"].to_pylist()))}
    group_N = np.array([groups[name] for name in table["group"].to_pylist()])
    held = group_N % 10 == 0
    pq.write_table(table.filter(~held), folder / "train.parquet")
    pq.write_table(table.filter(~held & (group_N % 4 == 1)), folder / "some.parquet")
    pq.write_table(table.filter(held), folder / "held.parquet")
    return folder


def test_few_epochs_teach_what_pictures_are_called(data: Data, tmp_path: Path) -> None:
    how = settings(epochs=6, evals=(str(data.parquet),), policy="scan", prune=0.15)
    log = train_clip(data.parquet, tmp_path / "run", how)
    everything = [entry["loss"] for entry in log if entry["rows"] == entry["total"]]
    assert everything[-1] < 0.8 * everything[0]
    found = log[-1]["eval"]["pairs"]
    ways = ("image_to_text", "text_to_image")
    assert sum(found[f"{way}_R@5"] for way in ways) >= 3 * sum(found[f"{way}_R@5_chance"] for way in ways)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "scan"])
@pytest.mark.parametrize(
    ("train", "epochs", "batch"),
    [("some", "8", "64"), ("train", "10", "128")],
    ids=["some rows", "all rows"],
)
def test_real_training_learns_what_held_out_pictures_are_called(
    folds: Path,
    tmp_path: Path,
    train: str,
    epochs: str,
    batch: str,
    policy: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prune = ["--prune", "25%"] if policy == "scan" else []
    arguments = ["--epochs", epochs, "--batch-size", batch, "--eval", str(folds / "held.parquet")]
    arguments += ["--eval-every", "0", "--quiet", "--policy", policy, *prune]
    assert main(["train", "clip", str(folds / f"{train}.parquet"), "-o", str(tmp_path / "r"), *arguments]) == 0
    log = Training.load(tmp_path / "r").log()
    seen, whole = sum(entry["samples"] for entry in log), sum(entry["total"] for entry in log)
    assert 1 - seen / whole == pytest.approx(0.25 if prune else 0.0, abs=0.04)  # less what fills no batch
    assert log[-1]["pruned_so_far"] == pytest.approx(0.25 if prune else 0.0, abs=0.015)
    everything = [entry["loss"] for entry in log if entry["rows"] == entry["total"]]
    assert everything[-1] < 0.6 * everything[0]
    found = log[-1]["eval"]["held"]
    for way in ("image_to_text", "text_to_image"):
        assert found[f"{way}_R@1"] >= 10 * found[f"{way}_R@1_chance"]
    assert f"{log[-1]['pruned_so_far']:.1%} of the rows pruned" in capsys.readouterr().out


def test_losses_are_those_of_clip() -> None:
    """The task's losses of features are the published ones; open_clip's mean is theirs."""
    clip = clip_model("tiny")
    task = ClipTask(clip, clip.tokenize(["a"]), torch.device("cpu"), settings())
    image, text = torch.randn(6, 128), torch.randn(6, 128)
    expected = clip_losses(image, text, clip.model.logit_scale.exp())
    assert torch.equal(task.losses([0, 1, 2, 3, 4, 5], image, text), expected)
    clip.model.logit_scale.data.fill_(7.0)
    task.after_step(0.5)
    assert clip.model.logit_scale.exp().item() == pytest.approx(100)


@pytest.mark.parametrize("task", ["clip", "moco"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--policy", "full", "--prune", "30%"], "policy full"),
        (["--policy", "scan", "--prune", "99%"], "cannot prune 99.0%"),
        (["--policy", "scan", "--prune", "99%", "--samples-seen", "200"], "cannot prune 99.0%"),
        (["--policy", "static", "--selection", "KEYS", "--prune", "30%"], "policy static leaves out what the"),
        (["--policy", "static", "--selection", "nowhere.txt"], "nowhere.txt"),
        (["--policy", "rho"], "policy rho needs the loss of every row under a reference model; give its option ref"),
        (["--policy", "rho", "--reference", "nowhere.parquet"], "nowhere.parquet"),
        (["--model", "no-such-model"], "no model 'no-such-model'"),
        (["KORNIA"], "augmentation needs an extra that is not installed"),
    ],
)
def test_what_is_wrong_with_a_command_is_found_before_images_are_decoded(
    task: str, arguments: list[str], told: str, data: Data, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    keys = tmp_path / "keys.txt"
    keys.write_text("a\n", encoding="ascii")
    if arguments == ["KORNIA"]:
        monkeypatch.setitem(sys.modules, "kornia", None)
        arguments = []
    monkeypatch.setattr("thresher.train.data.decode", lambda *_: pytest.fail("an image was decoded"))
    words = [str(keys) if word == "KEYS" else word for word in arguments]
    assert main(["train", task, str(data.parquet), "-o", str(tmp_path / "run"), *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("FILE", "the file has keys such as 'a'"),
        ("column:no", "needs the metadata column 'no'"),
        ("column:text", "column 'text' of"),
    ],
)
def test_a_run_whose_reference_losses_are_of_other_data_leaves_no_folder(
    data: Data, tmp_path: Path, reference: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"key": ["a"], "loss": [1.0]}), tmp_path / "ref.parquet")
    reference = str(tmp_path / "ref.parquet") if reference == "FILE" else reference
    command = ["train", "clip", str(data.parquet), "-o", str(tmp_path / "run"), "--policy", "rho"]
    assert main([*command, "--reference", reference]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_whose_selection_is_of_other_data_leaves_no_folder(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("a\n", encoding="ascii")
    command = ["train", "clip", str(data.parquet), "--policy", "static", "--selection", str(keys), "-o"]
    assert main([*command, str(tmp_path / "run")]) == 2
    assert "none of its keys is in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    own = tmp_path / "own"
    own.mkdir()
    for name in ("rows.parquet", "notes.txt"):
        (own / name).write_text("mine")
    assert main([*command, str(own)]) == 2
    assert sorted(path.name for path in own.iterdir()) == ["notes.txt", "rows.parquet"]


@pytest.mark.parametrize("loss", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_jest_trains_on_rows_chosen_from_super_batches(data: Data, tmp_path: Path, loss: Any) -> None:
    """With the embeddings of the emoji pool as the reference; cut off and resumed, it is the same run."""
    options = {"reference": str(POOL), "keep": 0.25, "chunks": 4}
    how = replace(settings(policy="jest", options=options, batch_size=8, epochs=2, checkpoint_minutes=0.0), loss=loss)
    log = train_clip(data.parquet, tmp_path / "whole", how)
    assert [(entry["samples"], entry["scored"]) for entry in log] == [(ROWS // B * 8, ROWS // B * B)] * 2
    assert log[-1]["pruned_so_far"] == pytest.approx(1 - 32 / ROWS)
    with pytest.raises(Cut):
        train_clip(data.parquet, tmp_path / "cut", how, progress=Cutting(6))
    train_clip(data.parquet, tmp_path / "cut", how, resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_jest_takes_losses_too_and_needs_one_of_them(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = data.table["key"]
    pq.write_table(pa.table({"key": keys, "loss": np.arange(ROWS, dtype=np.float32)}), tmp_path / "ref.parquet")
    command = ["train", "clip", str(data.parquet), "--epochs", "1", "--policy", "jest", "--batch-size", "8"]
    assert main([*command, "-o", str(tmp_path / "a"), "--reference", str(tmp_path / "ref.parquet")]) == 0
    assert main([*command, "-o", str(tmp_path / "b")]) == 2
    assert "policy jest needs a reference" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "b"), "--reference", str(tmp_path / "none")]) == 2
    assert main(["train", "moco", *command[2:], "-o", str(tmp_path / "b"), "--reference", "x"]) == 2
    assert "which the trainer of MoCo does not" in capsys.readouterr().err
    pq.write_table(data.table.slice(0, 50), tmp_path / "some.parquet")
    assert main([*command, "-o", str(tmp_path / "b"), "--reference", str(tmp_path / "some.parquet")]) == 2
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("drrho", None),
        ("drrho", 10),
        ("distill", 10),
    ],
)
def test_a_loss_trains_against_the_embeddings_of_a_pool(
    data: Data, tmp_path: Path, name: str, chunk: int | None
) -> None:
    """The reference has the rows in another order and is parquet, so that its rows are copied once."""
    order = np.random.default_rng(0).permutation(ROWS)
    table = open_table(str(POOL))
    keys = data.table["key"].take(order)
    at = [table["key"].to_pylist().index(key) for key in keys.to_pylist()]
    names = ("key", "image_embedding", "text_embedding")
    pq.write_table(table.take(at).select(names), tmp_path / "ref.parquet")
    how = replace(
        settings(epochs=2, checkpoint_minutes=0.0), loss=name, reference=str(tmp_path / "ref.parquet"), chunk=chunk
    )
    log = train_clip(data.parquet, tmp_path / "whole", how)
    assert log[-1]["loss"] < log[0]["loss"]
    copy = np.load(tmp_path / "whole" / "reference-image.npy")
    ours = np.stack(table["image_embedding"].to_pylist()[:ROWS]).astype(np.float32)
    np.testing.assert_allclose(copy, ours / np.linalg.norm(ours, axis=1, keepdims=True), rtol=1e-3, atol=1e-5)
    with pytest.raises(Cut):
        train_clip(data.parquet, tmp_path / "cut", how, progress=Cutting(6))
    train_clip(data.parquet, tmp_path / "cut", how, resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def open_table(folder: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(Path(folder).glob("*.parquet")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--loss", "drrho"), "--loss drrho needs --reference POOL"),
        (("--loss", "drrho", "--reference", "POOL", "--policy", "rho"), "need two references"),
        (("--reference", "POOL"), "policy full has no reference"),
        (("--temperature", "0.1"), "only with loss drrho or distill"),
        (("--loss", "distill"), "--loss distill needs --reference POOL"),
        (("--distill-weight", "0.5"), "only with loss distill"),
        (("--loss", "distill", "--reference", "POOL", "--distill-weight", "0"), "above 0 and up to 1"),
        (("--loss", "distill", "--reference", "POOL", "--policy", "rho"), "need two references"),
        (("--loss", "drrho", "--reference", "POOL", "--temperature", "0"), "give a number above 0"),
        (("--loss", "drrho", "--reference", "no-such-pool"), "no-such-pool"),
    ],
)
def test_references_that_do_not_fit_are_refused(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    given = [str(POOL) if word == "POOL" else word for word in words]
    assert main(["train", "clip", str(data.parquet), "-o", str(tmp_path / "run"), "--epochs", "1", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_drrho_and_jest_share_a_reference(data: Data, tmp_path: Path) -> None:
    command = ["train", "clip", str(data.parquet), "-o", str(tmp_path / "run"), "--epochs", "1", "--batch-size", "16"]
    command += ["--loss", "drrho", "--reference", str(POOL), "--policy", "jest", "--keep", "50%", "--quiet"]
    assert main(command) == 0
    assert Training.load(tmp_path / "run").log()[0]["samples"] == ROWS // B * 16


@pytest.mark.parametrize(
    "source",
    [
        "clusters",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("clusters of others", "column")),
        "tags",
        "entries",
    ],
)
def test_batches_are_composed_by_concepts(data: Data, tmp_path: Path, source: str) -> None:
    """Clusters of the same pool, or of one with more rows, in another order; a value or a list; words of captions."""
    table = data.table.append_column("tags", pa.array([text.split() for text in data.table["text"].to_pylist()]))
    path = tmp_path / "pairs.parquet"
    pq.write_table(table, path)
    (tmp_path / "entries.txt").write_text("red\nheart\nface\nhand\nblue\n")
    where = {"column": "column:group", "tags": "column:tags", "entries": f"entries:{tmp_path / 'entries.txt'}"}
    if source.startswith("clusters"):
        pool = open_table(str(POOL)) if source == "clusters of others" else open_table(str(POOL)).slice(0, ROWS)
        pq.write_table(pool.take(np.random.default_rng(0).permutation(len(pool))), tmp_path / "pool.parquet")
        assert main(["cluster", str(tmp_path / "pool.parquet"), "-o", str(tmp_path / "c"), "--clusters", "5"]) == 0
        labels = dict(
            zip(
                pq.read_table(tmp_path / "pool.parquet")["key"].to_pylist(),
                np.load(tmp_path / "c" / "labels.npy").tolist(),
                strict=True,
            )
        )
    concepts = where.get(source, str(tmp_path / "c"))
    how = settings(compose="diversity", concepts=concepts, super_batch=2, batch_size=16, epochs=2)
    log = train_clip(path, tmp_path / "run", how)
    assert [entry["samples"] for entry in log] == [ROWS // B * 16] * 2
    if source.startswith("clusters"):
        plain = PruningSampler(ROWS, policy=Full(), batch_size=B, epochs=4, seed=0)
        chosen = Concepts.of_labels([labels[key] for key in table["key"].to_pylist()])
        wide = [choose(chosen.of(np.array(rows)), 16) for rows in plain]
        seen = {rows[at] for rows, picked in zip(plain, wide, strict=True) for at in picked}
        first = train_clip(path, tmp_path / "one", replace(how, schedule=replace(how.schedule, epochs=1)))
        assert set(np.flatnonzero(Training.load(tmp_path / "one").ledger().seen_N >= 0)) == seen
        assert len(first) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--compose", "diversity"), "compose and concepts need each other"),
        (("--concepts", "column:key"), "compose and concepts need each other"),
        (("--super-batch", "4"), "super_batch needs both"),
        (("--compose", "diversity", "--concepts", "column:none"), "none"),
        (("--compose", "frequency", "--concepts", "nowhere"), "nowhere"),
        (
            ("--compose", "diversity", "--concepts", "column:key", "--policy", "jest", "--reference", "x"),
            "jest chooses",
        ),
    ],
)
def test_concepts_that_do_not_fit_are_refused(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(["train", "clip", str(data.parquet), "-o", str(tmp_path / "run"), "--epochs", "1", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
