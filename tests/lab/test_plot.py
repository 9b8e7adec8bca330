"""The chart of a plan: every row on a line of its own, at the value that was measured, with what it cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from thresher.evaluation.intervals import Mean
from thresher.lab import results
from thresher.lab.results import Run

ROWS = ("full", "full-short", "scan", "sift")
METRIC = "held-out average"


def runs(corpus: str, rows: tuple[str, ...] = ROWS, seeds: int = 3) -> list[Run]:
    made = []
    for place, row in enumerate(rows):
        for seed in range(seeds):
            samples = 1000 if row == "full" else 700
            result = {
                "metrics": {METRIC: 40.0 + place + 0.1 * seed},
                "samples_seen": samples,
                "scored_forwards": samples + 100 * (row == "sift"),
                "seconds": samples / 10.0,
                "share_pruned": 0.0,
                "images_decoded": 10,
            }
            made.append(Run(corpus=corpus, row=row, seed=seed, result=result))
    return made


def panel(draw: Any, rows: tuple[str, ...], some: list[Run]) -> Any:
    axes = Figure().subplots()
    draw(axes, rows, some)
    return axes


def test_points_are_the_means_and_no_two_share_a_line() -> None:
    axes = panel(results._panel, ROWS, runs("a"))
    drawn = [made.lines[0].get_xydata()[0].tolist() for made in axes.containers]
    assert [y for _, y in drawn] == [0, 1, 2, 3]
    means = [Mean.of([40.0 + place + 0.1 * seed for seed in range(3)]).mean for place in range(4)]
    assert [x for x, _ in drawn] == pytest.approx(means)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(ROWS)
    assert "dashed: full-short" in axes.get_xlabel()


def test_costs_are_shares_of_full_training() -> None:
    axes = panel(results._cost_panel, ROWS, runs("a"))
    shown = {(round(text.get_position()[1]), text.get_text()) for text in axes.texts}
    assert {(0, "100%"), (2, "70%"), (3, "80%")} <= shown
    assert "% of full" in axes.get_title(loc="right")
    later = panel(results._cost_panel, ROWS, runs("a", ("full-short", "scan")))
    assert "% of full-short" in later.get_title(loc="right"), "full training has no run yet"


@pytest.mark.parametrize("some", [runs("a"), runs("a")[:1], runs("a") + runs("b", ("scan",), 1)])
def test_any_finished_runs_make_a_chart(some: list[Run]) -> None:
    rows = [SimpleNamespace(name=row) for row in ROWS]
    plan: Any = SimpleNamespace(name="mine", corpora=[SimpleNamespace(name=name) for name in "ab"], rows=rows)
    assert results.plot(plan, some).startswith(b"\x89PNG")
