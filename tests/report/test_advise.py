"""``thresher advise``: the law written as a loop, laws that are planted, and what is not known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thresher as th
from thresher.cli.main import main
from thresher.report.advise import LabRun, Law, advise, passes, read_runs

POOL = str(Path(__file__).parents[2] / "examples" / "twemoji")
ROWS = 100_000


def slowly(rows: float, samples: float, tau: float) -> float:
    """One pass after the other."""
    total, done, k = math.log(min(rows, samples)), min(rows, samples), 1
    while done < samples:
        k += 1
        after = min(samples, k * rows)
        total += 0.5 ** ((k - 1) / tau) * math.log(after / done)
        done = after
    return total


@pytest.mark.parametrize("tau", [0.25, 3.0, 64.0])
@pytest.mark.parametrize("samples", [5, 100, 150, 1000, 1234])
def test_repeated_samples_are_discounted(tau: float, samples: float) -> None:
    assert passes(np.array([100.0]), np.array([samples]), tau)[0] == pytest.approx(slowly(100, samples, tau))
    assert passes(np.array([100.0]), np.array([samples]), 1e9)[0] == pytest.approx(math.log(samples))


def planted(law: Law, noise: float = 0.0) -> list[LabRun]:
    rng = np.random.default_rng(0)
    runs = []
    for share in (0.1, 0.3, 1.0):
        for samples in (50_000, 200_000, 800_000):
            for seed in range(3):
                metric = float(law.metric(np.array([share]), samples, ROWS)[0]) + noise * rng.normal()
                runs.append(LabRun(f"keep-{share}", seed, share, samples, float(np.clip(metric, 0, 100))))
    return runs


# A ranking so good that a small share wins while it is not repeated often.
GOOD = Law(log_a=0.0, b0=-0.05, b1=0.004, tau=1.0)


def test_a_planted_law_is_found_again() -> None:
    found = Law.fit(planted(GOOD), ROWS)
    for name in ("log_a", "b0", "b1", "tau"):
        assert getattr(found, name) == pytest.approx(getattr(GOOD, name), rel=0.02, abs=1e-3), name


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_short_runs_want_less_and_long_runs_more(noise: float) -> None:
    keeps = []
    for samples in (20_000, 3_000_000):
        found = advise(ROWS, samples, planted(GOOD, noise), "R@1")
        truth = GOOD.metric(np.array([line["keep"] for line in found["table"]]), samples, ROWS)
        best = found["table"][int(truth.argmax())]["keep"]
        assert found["keep_low"] <= best <= found["keep_high"]
        assert found["keep_low"] <= found["keep"] <= found["keep_high"]
        assert sum(line["best"] for line in found["table"]) == pytest.approx(1)
        keeps.append(found["keep"])
    assert keeps[0] == pytest.approx(0.1)
    assert keeps[1] > 0.5


def test_runs_that_say_nothing_are_said_to_say_nothing() -> None:
    runs = [
        LabRun("x", i, share, samples, 50 + noise)
        for share in (0.2, 1.0)
        for samples in (1000, 2000)
        for i, noise in enumerate((-5.0, 5.0, 0.0))
    ]
    found = advise(ROWS, 10_000, runs, "R@1")
    assert any("cannot decide" in note for note in found["notes"])
    assert any("extrapolated 5.0 times" in note for note in found["notes"])
    assert advise(ROWS, 10_000, runs, "R@1") == found


def results(path: Path, runs: list[LabRun], **more: Any) -> Path:
    listed = [
        {
            "row": run.row, "seed": run.seed, "metrics": {"R@1": run.metric, "other": 1.0}, "samples_seen": run.samples,
            "scored_forwards": 0, "seconds": 1.5, "share_pruned": 1 - run.share, **more,
        }
        for run in runs
    ]  # fmt: skip
    (path / "results.json").write_text(json.dumps({"plan": "shares", "runs": listed}))
    return path


def test_the_command_reads_a_lab(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = results(tmp_path, planted(GOOD, 0.2))
    command = ["advise", POOL, "--samples-seen", "10000", "--runs", str(lab)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    name, runs = read_runs(lab, None)
    assert (name, len(runs)) == ("R@1", 27)
    assert found["keep"] == th.advise(POOL, 10_000, lab)["keep"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"keep {100 * found['keep']:.3g}% (from " in out
    assert "fitted on 27 runs that kept 10% to 100%" in out


def test_without_runs_it_says_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", POOL, "--samples-seen", "7906"]) == 0
    out = capsys.readouterr().out
    assert "2 passes over all 3,953 rows" in out
    assert "neither is known without runs on this pool" in out
    assert "(0.25 passes over that pool)" in out
    assert "(3.5 passes)" in out
    assert "keep " not in out.splitlines()[-1]
    assert th.advise(POOL, 7906)["known"] is False
    assert th.advise(POOL, 7_906_000)["notes"][0] == "7,906,000 samples are 2,000 passes over all 3,953 rows"


@pytest.mark.parametrize(
    ("runs", "more", "words", "message"),
    [
        (planted(GOOD)[:9], {}, (), "9 runs with 1 share kept, 3 lengths; the law needs"),
        (
            planted(GOOD),
            {},
            ("--metric", "zero_shot"),
            "the metric 'zero_shot'; they all have R@1, other",
        ),
        (planted(GOOD), {}, ("--row", "none"), "has no row 'none'; it has keep-0.1"),
        (planted(GOOD), {"share_pruned": 1}, (), "a number up to 0.999999"),
        (planted(GOOD), {"share_pruned": 1 - 1e-12}, (), "a number up to 0.999999"),
        (planted(GOOD), {"share_pruned": "x"}, (), "share_pruned"),
        (planted(GOOD), {"samples_seen": None}, (), "samples_seen"),
        (planted(GOOD), {"metrics": {"R@1": 170}}, (), "R@1"),
        ([], {}, (), "has no list of 1 to"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    runs: list[LabRun],
    more: dict[str, Any],
    words: tuple[str, ...],
    message: str,
) -> None:
    lab = results(tmp_path, runs, **more)
    assert main(["advise", POOL, "--samples-seen", "100", "--runs", str(lab), *words]) == 2
    assert message in capsys.readouterr().err
    assert main(["advise", POOL, "--samples-seen", "100", "--metric", "R@1"]) == 2
    (tmp_path / "results.json").write_text("{")
    assert main(["advise", POOL, "--samples-seen", "100", "--runs", str(lab)]) == 2
    assert main(["advise", POOL, "--samples-seen", "100", "--runs", str(tmp_path / "nowhere")]) == 2
    with pytest.raises(th.UsageError, match="the largest number allowed is"):
        th.advise(POOL, 10**400)


def test_budgets_that_differ_by_a_few_rows_are_one_share() -> None:
    """Two methods with one budget keep 27.70% and 27.69%: the table has one line for both, not two alike."""
    runs = [replace(run, share=run.share * (1 + 1e-4 * (i % 3 - 1))) for i, run in enumerate(planted(GOOD, 0.2))]
    runs = [replace(run, share=min(run.share, 1.0)) for run in runs]
    found = advise(ROWS, 10_000, runs, "R@1")
    shown = [f"{100 * line['keep']:.3g}" for line in found["table"]]
    assert len(shown) == len(set(shown))
