"""The trainer with the main branch of open_clip, which is no release and so not in the test group.

Type: PYTHONPATH=open_clip/src pytest tests/train/test_open_clip.py tests/train/against_open_clip_main.py -m ""
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip as theirs
import pytest

from tests.processes import finished
from tests.train.test_open_clip import (
    SCRIPT,
    STEADY,
    B,
    N,
    Ran,
    Refused,
    Run,
    common,
    pairs,
    pytestmark,
    refused,
    run,
    sample,
    tars,
)
from thresher.errors import UsageError
from thresher.train.open_clip import parse

assert theirs.create_task, "put the main branch of open_clip first on PYTHONPATH"
__all__ = ["pairs", "pytestmark", "refused", "run"]  # fixtures

STEPS = ("--epochs", "4", *STEADY)
SCAN = ("--prune", "scan", "--prune-rho", "0.25", "--prune-full-epochs", "0", *STEPS)
INFOBATCH = ("--prune", "infobatch", "--prune-delta", "1", *STEPS)
ALONE = """
import json, sys
import open_clip_train.data as data
from tests.loaded import quiet
from thresher.train.open_clip import main
assert not hasattr(data, "wds_shuffle_sizes"), "this is not the release"
data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = 1
with quiet():
    sys.exit(main(json.loads(sys.argv[1])))
"""


def same_plans(one: Ran, two: Ran, rtol: float) -> None:
    assert [(e["phase"], e["rows"], e["samples"]) for e in one.log] == [
        (e["phase"], e["rows"], e["samples"]) for e in two.log
    ]
    for name in ("times", "marks", "seen", "epoch_counts"):
        np.testing.assert_array_equal(one.ledger[name], two.ledger[name])
    np.testing.assert_allclose(one.ledger["losses"], two.ledger["losses"], rtol=rtol, atol=rtol / 2)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("csv", SCAN),
        ("csv", (*SCAN, "--siglip")),
        ("csv", (*INFOBATCH, "--accum-freq", "2")),
        ("webdataset", (*SCAN, "--epochs", "3")),
    ],
)
def test_the_rows_are_those_of_the_release(run: Run, pairs: Path, tmp_path: Path, kind: str, given: tuple[str]) -> None:
    """Trained from the same seed: losses differ in the fourth digit, which here changes no plan."""
    main = run(kind, *given, name="main")
    release = [*common(pairs, kind), "--logs", str(tmp_path), "--name", "release", *given]
    path = os.pathsep.join([*os.environ["PYTHONPATH"].split(os.pathsep)[1:], str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", ALONE, json.dumps(release)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-5000:]
    same_plans(main, Ran(tmp_path / "release", []), 0.02)


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("strategy", ["model", "task", "step"])
def test_a_compiled_run_records_the_same(run: Run, strategy: str) -> None:
    compiled = ("--torchcompile", "--torchcompile-backend", "eager", "--torchcompile-strategy", strategy)
    same_plans(run("csv", *SCAN, *compiled, name="compiled"), run("csv", *SCAN, name="plain"), 1e-4)


def test_fsdp(pairs: Path, tmp_path: Path) -> None:
    """By torchrun: the same plans as without; a run that goes on from an earlier checkpoint ends in the same state."""
    given = [*common(pairs, "csv"), "--logs", str(tmp_path), "--batch-size", str(B // 2), "--accum-freq", "2"]
    given += ["--local-loss", "--gather-with-grad", "--name"]
    full, sharded = ("--fsdp", "--fsdp-checkpoint", "full"), ("--fsdp", "--fsdp-checkpoint", "sharded")
    runs = {
        "plain": [*given, "plain", *SCAN],
        "full": [*given, "full", *SCAN, *full],
        "sharded": [*given, "sharded", *SCAN, *sharded],
        "weights": [*given, "weights", *INFOBATCH, *full],
    }
    torchrun(tmp_path, runs)
    plain, weights = (Ran(tmp_path / name, []) for name in ("plain", "weights"))
    assert weights.log[2]["rows"] < N
    states = {}
    for name, last in (("full", "epoch_4.pt"), ("sharded", "epoch_4")):
        ran = Ran(tmp_path / name, [])
        same_plans(plain, ran, 1e-2)
        states[name] = ran.ledger
        checkpoints = tmp_path / name / "checkpoints"
        assert {path.name for path in checkpoints.glob("epoch_4*")} == {last, "epoch_4.pruning.npz"}
        for path in [*checkpoints.glob("epoch_3*"), *checkpoints.glob("epoch_4*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    torchrun(tmp_path, {name: [*runs[name], "--resume", "latest"] for name in states})
    for name, before in states.items():
        after = Ran(tmp_path / name, []).ledger
        assert {field: array.tobytes() for field, array in after.items()} == {
            field: array.tobytes() for field, array in before.items()
        }


def torchrun(folder: Path, runs: dict[str, list[str]]) -> None:
    """Train on two processes."""
    (folder / "script.py").write_text(SCRIPT)
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(folder / "script.py"), str(folder / "runs.json")]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = finished(command, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-8000:]


JSON = ("--json-text-key", "caption")


def test_captions_of_other_members(run: Run, refused: Refused, pairs: Path, tmp_path: Path) -> None:
    """With --json-text-key open_clip takes captions from the json; a sample without one is named."""
    members = [
        (f"{i:04d}.{name}", content)
        for i in range(48)
        for name, content in (
            ("png", sample(pairs, i)["png"]),
            ("json" if i % 3 else "txt", json.dumps({"caption": f"the {i}th"}).encode()),
        )
    ]
    given = ("--train-data", tars(tmp_path / "data", members), "--train-num-samples", "32")
    ran = run("webdataset", *given, *JSON)
    assert [entry["samples"] for entry in ran.log] == [32, 32]
    warnings = [line for line in (ran.folder / "out.log").read_text().splitlines() if "leaves out" in line]
    assert [line.partition("which ")[2] for line in warnings] == ["has no json"]
    error = refused(*given, "--text-key", "caption;cap", "--image-key", "jpg;png")
    assert error.endswith("; a sample needs an image (jpg or png) and a caption (caption or cap)")
    empty = [(name, b"{}" if name.endswith("json") else content) for name, content in members]
    given = ("--train-data", tars(tmp_path / "empty", empty), "--train-num-samples", "32", "--name", "empty")
    error = refused(*given, *JSON)
    assert "none of 32 samples has an image that can be decoded and a caption with text; the warnings" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--use-naflex",), "--use-naflex, or a model with it, cannot be combined with pruning"),
        (("--dataset-type", "webdataset-audio"), "--dataset-type webdataset-audio cannot be combined with pruning"),
        (("--model", "coca_ViT-B-32"), "--model coca... cannot be combined with pruning"),
        (("--distill-model", "RN50"), "--distill-model cannot be combined with pruning"),
    ],
)
def test_what_has_no_losses_of_pairs_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(["--train-data", "x", *words])
