"""``thresher mismatched``: from raw data to a selection, resumed where it was killed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.train.conftest import ROWS, Data
from tests.train.test_clip import Cut, Cutting, outcome
from thresher import Selection
from thresher.cli.main import main
from thresher.dynamic.run_folder import Training
from thresher.ops.humps import Humps

FOUND = Humps(means=(0.4, 0.9), deviations=(0.2, 0.05), share=0.2, cut=0.75, valley=0.7)


@pytest.mark.parametrize(
    ("words", "out"),
    [
        (["train", "clip"], "run"),
        (["train", "moco"], "run"),
        (["mismatched"], "sel"),
        (["reference"], "ref.parquet"),
        (["prove"], "proof"),
        (["embed", "--encoder", "tests.toy:Toy", "--workers", "0"], "pool"),
    ],
)
def test_results_inside_the_data_are_refused(
    data: Data, tmp_path: Path, words: list[str], out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have tables of their own, which every later command would read as data."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "0.parquet").symlink_to(data.parquet)
    assert main([*words, str(folder), "-o", str(folder / out)]) == 2
    assert "is inside the data folder; choose a folder elsewhere" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["0.parquet"]


@pytest.mark.parametrize("kind", ["parquet", pytest.param("tars", marks=pytest.mark.slow)])
def test_a_selection_without_the_pairs_that_are_learned_last(
    data: Data, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 rows are too few to show two humps, so what is found in them is given."""
    monkeypatch.setattr("thresher.dynamic.mismatch.mismatched_humps", lambda ranks_N: FOUND)
    command = ["mismatched", str(getattr(data, kind)), "-o", str(tmp_path / "sel"), "--epochs", "2"]
    assert main([*command, "--batch-size", "32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    training, chosen = Training.load(tmp_path / "sel-run"), Selection.load(tmp_path / "sel")
    ranks = training.ledger().memory_N
    assert ranks is not None
    assert [entry["rows"] for entry in training.log()] == [ROWS, ROWS], "nothing is left out while it looks"
    np.testing.assert_array_equal(chosen.mask(), ~(ranks >= 0.75))
    assert told["run"] == str(tmp_path / "sel-run")
    assert told["kept"] == len(chosen) < ROWS
    wrong = int(np.nanargmax(ranks))
    assert chosen.steps[0].why(wrong).startswith("probably mismatched, 96% sure: the mean rank of its loss is 0.9")
    assert main(["report", str(tmp_path / "sel-run"), "-o", str(tmp_path / "pairs.html"), "--quiet"]) == 0
    assert "Probably mismatched" in (tmp_path / "pairs.html").read_text()
    assert main(["report", str(tmp_path / "sel"), "-o", str(tmp_path / "sel.html"), "--quiet"]) == 0


def test_the_same_command_resumes(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(name: str) -> list[str]:
        return ["mismatched", str(data.parquet), "-o", str(tmp_path / name), "--epochs", "2", "--batch-size", "32"]

    assert main(command("whole")) == 0
    assert "no rows stand out as mismatched" in (out := capsys.readouterr().out)
    assert f"kept {ROWS} of {ROWS} rows (100.0%)" in out
    assert f"thresher report {tmp_path / 'whole-run'} -o pairs.html" in out
    with monkeypatch.context() as patch:
        patch.setattr("thresher.cli.output.Output.progress", lambda *_: Cutting(6))
        with pytest.raises(Cut):
            main(command("cut"))
    assert not (tmp_path / "cut").exists()
    assert main(command("cut")) == 0
    assert outcome(tmp_path / "cut-run") == outcome(tmp_path / "whole-run")
    assert main(command("whole")) == 0, "the same result again is accepted"


def test_the_run_and_the_selection_are_two_folders(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "sel")
    assert main(["mismatched", str(data.parquet), "-o", out, "--run", f"{out}/."]) == 2
    assert "give two folders" in capsys.readouterr().err
    assert not (tmp_path / "sel").exists()
