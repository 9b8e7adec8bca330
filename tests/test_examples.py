"""The examples run as they are, from anywhere, and print what they are to show."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from tests.hub import Repo, at_hand
from tests.loaded import quiet
from thresher.cli.main import main
from thresher.dynamic.run_folder import Training

EXAMPLES = Path(__file__).parents[1] / "examples"

Told = tuple[list[tuple[str, int, int, float]], float, str]

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that examples use


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str], Told]]:
    """Run an example: every epoch's phase, rows, all rows and loss; the share pruned; all that was printed."""
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # which Lightning sets
        monkeypatch.setenv(name, "0")
    random, threads = torch.get_rng_state(), torch.get_num_threads()

    def run(name: str) -> Told:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = capsys.readouterr().out
        lines = re.findall(r"^\d+ (\S+) +([\d,]+) of ([\d,]+) rows, loss ([\d.]+)$", printed, re.MULTILINE)
        epochs = [(a, int(b.replace(",", "")), int(c.replace(",", "")), float(d)) for a, b, c, d in lines]
        pruned = re.search(r"^([\d.]+)% of the samples pruned", printed, re.MULTILINE)
        assert pruned, printed
        return epochs, float(pruned[1]) / 100, printed

    yield run
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
        sys.modules["accelerate.state"].GradientState._reset_state()
    torch.set_rng_state(random)
    torch.set_num_threads(threads)


def check_share(epochs: list[tuple[str, int, int, float]], pruned: float, promised: float) -> None:
    """The share told is that of the epochs, and what was promised."""
    assert pruned == pytest.approx(1 - sum(e[1] for e in epochs) / sum(e[2] for e in epochs), abs=1e-3)
    assert pruned == pytest.approx(promised, abs=0.025)
    assert all((rows < total) == (phase == "mutation") for phase, rows, total, _ in epochs)


@pytest.mark.slow
def test_the_plain_loop_learns_and_prunes(run: Callable[[str], Told]) -> None:
    epochs, pruned, printed = run("plain_loop.py")
    assert len(epochs) == 10
    check_share(epochs, pruned, 0.25)
    whole = [loss for _, rows, total, loss in epochs if rows == total]  # of one make-up: these compare
    assert whole == sorted(whole, reverse=True)
    assert whole[-1] < 0.5 * whole[0]
    found = re.search(r"caption among the best 5 of 3,953: ([\d.]+)%", printed)
    assert found
    assert float(found[1]) > 30


@pytest.mark.slow  # tests/train/test_lightning.py trains it in small
def test_moco_of_lightly_prunes(run: Callable[[str], Told], tmp_path: Path) -> None:
    epochs, pruned, _ = run("lightly_moco.py")
    assert len(epochs) == 6
    check_share(epochs, pruned, 0.2)
    losses = [loss for *_, loss in epochs]
    assert losses[-1] < losses[1]  # the first is against a queue of noise
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # tests/train/test_hf_trainer.py trains in small
def test_the_trainer_of_hugging_face_prunes(run: Callable[[str], Told], tmp_path: Path) -> None:
    epochs, pruned, _ = run("hf_trainer.py")
    assert len(epochs) == 6
    check_share(epochs, pruned, 0.2)
    losses = [loss for *_, loss in epochs]
    assert losses[-1] < losses[0]
    training = Training.load(tmp_path / "hf-run")
    assert [entry["rows"] for entry in training.log()] == [rows for _, rows, *_ in epochs]
    assert len(list((tmp_path / "hf-run").glob("checkpoint-*/pruning.npz"))) == 1


@pytest.mark.early
def test_moco_with_the_loader_of_timm_prunes(run: Callable[[str], Told], tmp_path: Path) -> None:
    epochs, pruned, _ = run("timm_moco.py")
    assert len(epochs) == 6
    check_share(epochs, pruned, 0.2)
    losses = [loss for *_, loss in epochs]
    assert losses[-1] < losses[1]  # the first is against a queue of noise
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # docs/port-a-loop.md has this loop, and its blocks run in every test run
def test_a_loop_of_accelerate_prunes_and_saves_the_sampler(run: Callable[[str], Told], tmp_path: Path) -> None:
    epochs, pruned, _ = run("accelerate_loop.py")
    assert len(epochs) == 8
    check_share(epochs, pruned, 0.25)
    whole = [loss for _, rows, total, loss in epochs if rows == total]
    assert whole == sorted(whole, reverse=True)
    assert (tmp_path / "accelerate-state" / "custom_checkpoint_0.pkl").exists()


@pytest.mark.slow  # tests/train/test_clip.py trains with this loss
def test_a_teacher_of_stored_embeddings_teaches(run: Callable[[str], Told], tmp_path: Path) -> None:
    epochs, pruned, printed = run("distill.py")
    assert len(epochs) == 4
    check_share(epochs, pruned, 0.2)
    assert epochs[-1][3] < epochs[0][3]
    found = re.search(r"caption is the first of all: ([\d.]+)%", printed)
    assert found
    assert float(found[1]) > 2  # by chance 0.1
    assert Training.load(tmp_path / "distilled").settings["loss"] == "distill"


@pytest.mark.slow  # tests/train/test_open_clip.py runs this trainer in every variant
def test_the_trainer_of_open_clip_prunes(run: Callable[[str], Told], tmp_path: Path) -> None:
    with quiet():
        epochs, pruned, _ = run("open_clip_run.py")
    assert len(epochs) == 6
    check_share(epochs, pruned, 0.185)  # of the promised 20%: in small batches more rows are marked on both sides
    assert epochs[-1][3] < epochs[0][3]
    assert Training.load(tmp_path / "open-clip-logs" / "run").policy == "scan"


@pytest.mark.slow
def test_from_a_dataset_of_the_hub_to_a_filtered_loop_in_three_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands are those of the example and of docs/load-time.md, with an encoder that needs no download."""
    files = {f"data/{path.name}": path.read_bytes() for path in (EXAMPLES / "twemoji").glob("*.parquet")}
    small = {}
    for i, name in enumerate(sorted(files)):
        table = parquet.read_table(io.BytesIO(files[name])).slice(0, 40)
        keep = [one for one in table.column_names if "embedding" not in one]
        out = io.BytesIO()
        parquet.write_table(table.select(keep), out)
        small[f"data/train-{i:05d}-of-{len(files):05d}.parquet"] = out.getvalue()
    with at_hand(monkeypatch) as hub:
        hub.datasets["org/emoji"] = Repo()
        hub.datasets["org/emoji"].push(small)
        monkeypatch.chdir(tmp_path)
        words = ["--encoder", "tests.toy:Toy", "--workers", "0", "--quiet"]
        assert main(["embed", "hf://datasets/org/emoji", "-o", "pool", *words]) == 0
        assert main(["select", "density", "pool", "-o", "subset", "--keep", "40%", "--clusters", "4", "--quiet"]) == 0
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "hub_stream.py"), "org/emoji", "subset"],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    total = 40 * len(files)
    assert re.findall(r"^\d: (\d+) samples of (\d+), loss", done.stdout, re.MULTILINE) == 3 * [
        (str(total * 2 // 5), str(total))
    ]
