"""Training runs are compared: groups by seed with intervals, paired differences, agreement; in text and as a page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs import make_run
from thresher.cli.main import main
from thresher.dynamic.run_folder import Training
from thresher.errors import OutputError, PoolError, UsageError
from thresher.evaluation.intervals import Mean
from thresher.pool.store import open_store
from thresher.report.runs import compare_runs, write_runs_report

POOL = Path(__file__).parents[2] / "examples" / "twemoji" / "twemoji-0.parquet"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Training]:
    folder, store = tmp_path_factory.mktemp("runs"), open_store(str(POOL))
    made: dict[str, Training] = {}
    for policy in ("full", "scan"):
        for seed in (0, 1, 2):
            run = make_run(folder / f"{policy}-{seed}", store, policy=policy, prune=0.2 if policy == "scan" else None)
            _set(run, seed, 0.3 + 0.01 * seed + (0.02 + 0.001 * seed if policy == "scan" else 0))
            made[f"{policy}-{seed}"] = Training.load(run.folder)
    return made


def _set(run: Training, seed: int, value: float) -> None:
    path = run.folder / "training.json"
    head = json.loads(path.read_text())
    head["settings"]["seed"] = seed
    path.write_text(json.dumps(head))
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    for at, entry in enumerate(lines):
        if at % 2:
            entry["eval"] = {"held <b>": {"R@1": value * (at + 1) / len(lines), "R@1_chance": 0.01}}
    lines[-1]["eval"] = {"held <b>": {"R@1": value, "R@1_chance": 0.01}}
    (run.folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def test_runs_that_differ_only_in_their_seed_are_a_group(runs: dict[str, Training]) -> None:
    found = compare_runs(runs)
    assert [(one["name"], len(one["runs"])) for one in found["groups"]] == [("full", 3), ("scan, 20%", 3)]
    full, scan = (one["metrics"]["held <b> R@1"] for one in found["groups"])
    mean = Mean.of([0.3, 0.31, 0.32])
    assert (full["mean"], full["half"], full["minus_first"]) == (
        pytest.approx(mean.mean),
        pytest.approx(mean.half),
        None,
    )
    apart = Mean.of([0.02, 0.021, 0.022])
    assert scan["minus_first"]["mean"] == pytest.approx(apart.mean)
    assert (scan["minus_first"]["low"], scan["minus_first"]["high"]) == pytest.approx((apart.low, apart.high))
    assert "held <b> R@1_chance" not in found["groups"][0]["metrics"]
    assert found["groups"][0]["pruned"] == 0
    assert 0.15 < found["groups"][1]["pruned"] < 0.25
    assert found["runs"]["scan-0"]["left_out"] > 0 == found["runs"]["full-0"]["left_out"]


def test_agreement_is_that_of_the_candidates_of_the_last_search(runs: dict[str, Training]) -> None:
    found = compare_runs(runs)["agreement"]
    assert [(pair["a"], pair["b"]) for pair in found] == [
        ("scan-0", "scan-1"), ("scan-0", "scan-2"), ("scan-1", "scan-2"),
    ]  # fmt: skip
    ledgers = [runs[name].ledger() for name in ("scan-0", "scan-1")]
    one, two = (set(np.flatnonzero(ledger.marked_N == ledger.marked_N.max())) for ledger in ledgers)
    assert found[0]["both"] == len(one & two)
    assert found[0]["jaccard"] == pytest.approx(len(one & two) / len(one | two))
    assert found[0]["chance"] == pytest.approx(max(len(one), len(two)) / 988)


def test_a_damaged_ledger_is_not_left_out_in_silence(runs: dict[str, Training], tmp_path: Path) -> None:
    shutil.copytree(runs["scan-0"].folder, tmp_path / "copy")
    copy, ledger = Training.load(tmp_path / "copy"), tmp_path / "copy" / "ledger.npz"
    two = {"a": copy, "b": runs["scan-1"]}
    assert len(compare_runs(two)["agreement"]) == 1
    ledger.write_bytes(ledger.read_bytes()[:100])
    with pytest.raises(PoolError, match=r"ledger\.npz: cannot be read"):
        compare_runs(two)
    ledger.unlink()
    assert compare_runs(two)["agreement"] == []


def test_a_single_seed_has_no_interval(runs: dict[str, Training]) -> None:
    found = compare_runs({name: runs[name] for name in ("full-0", "scan-0")})
    metric = found["groups"][1]["metrics"]["held <b> R@1"]
    assert metric["half"] is None
    assert metric["minus_first"] == {"mean": pytest.approx(0.02), "low": None, "high": None, "seeds": 1}
    json.dumps(found, allow_nan=False)
    with pytest.raises(UsageError, match="0 runs; give 1 to 60"):
        compare_runs({})


def test_a_repeated_seed_is_not_another_seed(
    runs: dict[str, Training], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs with one seed would give an interval of almost nothing."""
    again = {}
    for policy, value in (("full", 0.304), ("scan", 0.328)):
        shutil.copytree(runs[f"{policy}-0"].folder, tmp_path / f"{policy}-0-again")
        _set(Training.load(tmp_path / f"{policy}-0-again"), 0, value)
        again[f"{policy}-0-again"] = Training.load(tmp_path / f"{policy}-0-again")
    only = compare_runs({"full-0": runs["full-0"], "full-0-again": again["full-0-again"]})["groups"][0]
    metric = only["metrics"]["held <b> R@1"]
    assert (metric["mean"], metric["half"]) == (pytest.approx(0.302), None)
    assert only["repeated"] == {"full-0-again": "full-0"}

    both = {**runs, **again}
    full, scan = compare_runs(both)["groups"]
    mean = Mean.of([0.302, 0.31, 0.32])
    assert full["metrics"]["held <b> R@1"]["mean"] == pytest.approx(mean.mean)
    assert full["metrics"]["held <b> R@1"]["half"] == pytest.approx(mean.half)
    apart = Mean.of([0.324 - 0.302, 0.021, 0.022])
    found = scan["metrics"]["held <b> R@1"]["minus_first"]
    assert (found["mean"], found["low"], found["seeds"]) == (pytest.approx(apart.mean), pytest.approx(apart.low), 3)

    folders = [str(run.folder) for run in both.values()]
    assert main(["compare", *folders]) == 0
    said = "full-0-again has the seed and settings of "
    assert capsys.readouterr().out.count("-0-again has the seed and settings of ") == 2
    page = write_runs_report(both, tmp_path / "runs.html").read_text()
    assert f"{said}full-0: both count as one seed, with their mean." in page


def test_runs_on_other_selections_with_one_seed_are_not_repeated(runs: dict[str, Training], tmp_path: Path) -> None:
    made = {}
    for number in range(2):
        folder = tmp_path / f"{number}"
        shutil.copytree(runs["full-0"].folder, folder)
        head = json.loads((folder / "training.json").read_text())
        head["settings"]["selection"] = f"random-{number}"
        (folder / "training.json").write_text(json.dumps(head))
        _set(Training.load(folder), 0, 0.3 + number / 100)
        made[str(number)] = Training.load(folder)
    (group,) = compare_runs(made)["groups"]
    assert group["repeated"] == {}
    assert group["metrics"]["held <b> R@1"]["half"] == pytest.approx(Mean.of([0.3, 0.31]).half)


def test_the_page_is_self_contained_and_escapes_names(runs: dict[str, Training], tmp_path: Path) -> None:
    path = write_runs_report(runs, tmp_path / "runs.html", title="<i>all</i>")
    page = path.read_text()
    assert "<b>" not in page.replace("</b>", "")
    assert "&lt;i&gt;all&lt;/i&gt;" in page
    assert page.count("<svg") == 3
    assert "minus full" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert write_runs_report(runs, tmp_path / "again.html", title="<i>all</i>").read_bytes() == path.read_bytes()
    with pytest.raises(OutputError, match="is a file of the run"):
        write_runs_report(runs, runs["full-0"].folder / "log.jsonl")


def test_the_commands_take_runs(runs: dict[str, Training], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(run.folder) for run in runs.values()]
    assert main(["compare", *folders, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [len(one["runs"]) for one in found["groups"]] == [3, 3]
    assert main(["compare", *folders]) == 0
    out = capsys.readouterr().out
    assert "full: 3 runs" in out
    assert "+2.1 [+1.9, +2.3]" in out
    assert main(["report", *folders, "-o", str(tmp_path / "runs.html")]) == 0
    capsys.readouterr()
    (tmp_path / "other").mkdir()
    assert main(["compare", folders[0], str(tmp_path / "other")]) == 2
    assert "compare runs with runs, selections with selections" in capsys.readouterr().err
    assert main(["compare", folders[0], folders[1], "--covariance"]) == 2
    assert "are for selections, not for training runs" in capsys.readouterr().err


def test_an_unfinished_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(str(POOL))
    make_run(tmp_path / "a", store, policy="full", stop=2)
    make_run(tmp_path / "b", store, policy="full", stop=0)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "not finished: 2 of 7 epochs" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "runs.html")]) == 0
    assert "2 runs are not finished: these numbers may still change" in (tmp_path / "runs.html").read_text()
