"""The table of a plan says what its rows are means of."""

from __future__ import annotations

import pytest

from tests.lab.test_plot import ROWS, runs
from thresher.lab.plan import Plan, Row, Sources
from thresher.lab.results import Run, table


@pytest.mark.parametrize(
    ("some", "words"),
    [
        (runs("as-is"), "mean over 3 seeds ±"),
        (runs("as-is", seeds=1), "mean over 1 seed ±"),
        (runs("as-is")[:-1], "mean over 2 to 3 seeds ±"),
    ],
)
def test_the_number_of_seeds_is_that_of_every_row(some: list[Run], words: str) -> None:
    plan = Plan(name="p", data=Sources(train="t", evals=("e",)), rows=tuple(Row(name=name) for name in ROWS))
    assert words in table(plan, some, {})
