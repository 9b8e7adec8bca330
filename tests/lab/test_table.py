"""The table of a plan says what its rows are means of."""

from __future__ import annotations

import pytest

from tests.lab.test_plot import ROWS, runs
from thresher.lab.plan import Corpus, Plan, Row, Sources
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


def test_a_difference_that_is_the_same_with_every_seed_is_not_called_significant() -> None:
    found = {"full": (20.0, 13.3333), "other": (13.3333, 6.6667)}  # one of 15 rows, rounded in two ways
    nothing = {"samples_seen": 1, "scored_forwards": 1, "seconds": 1.0, "share_pruned": 0.0, "images_decoded": 1}
    tied = [
        Run(corpus="as-is", row=row, seed=seed, result={**nothing, "metrics": {"held-out R@1": value}})
        for row, values in found.items()
        for seed, value in enumerate(values)
    ]
    plan = Plan(name="p", data=Sources(train="t", evals=("e",)), rows=tuple(Row(name=name) for name in found))
    text = table(plan, tied, {})
    assert "| -6.7 |" in text
    assert "Where all seeds gave the same, there is no interval" in text


def test_what_was_left_out_is_shown_by_kind_only_where_something_is_planted() -> None:
    clean = {"as it is": {"rows": 10, "left_out": 3}}
    mixed = {**clean, "swapped": {"rows": 4, "left_out": 2}}
    made = [
        Run(corpus=corpus, row="other", seed=0, result={**runs(corpus, seeds=1)[0].result, "kept": kept})
        for corpus, kept in (("clean", clean), ("mixed", mixed))
    ]
    plan = Plan(
        name="p",
        data=Sources(train="t", evals=("e",)),
        rows=(Row(name="other"),),
        corpora=(Corpus(name="clean"), Corpus(name="mixed", swapped=0.3)),
    )
    assert "| mixed/other | 1 | 30.0% | 50.0% |" in (text := table(plan, made, {}))
    assert "| clean/other | 1 |" not in text
    assert "Share of each kind" not in table(plan, made[:1], {})
