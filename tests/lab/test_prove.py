"""The sentence says what the intervals show, in every case; the command runs on a stranger's parquet."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import thresher as th
from tests.train.conftest import emoji
from thresher.errors import OutputError, UsageError
from thresher.evaluation.intervals import Mean
from thresher.lab.prove import Question, cut_data, outcome, say

DENSITY = Question(method="density")
OUTCOMES = {
    "better": Mean.of([2.0, 2.1, 2.2]),
    "worse": Mean.of([-2.0, -2.1, -2.2]),
    "equal": Mean.of([0.3, -0.2, 0.05]),
    "unknown": Mean.of([9.0, -8.0, 1.0]),
}


def test_outcomes_are_read_from_intervals() -> None:
    assert {name: outcome(mean) for name, mean in OUTCOMES.items()} == {name: name for name in OUTCOMES}
    assert outcome(Mean.of([4.0])) == outcome(None) == "unknown"


def sentence(first: str, second: str, third: str) -> str:
    return say(DENSITY, "R@1", OUTCOMES[first], OUTCOMES[second], OUTCOMES[third])


def test_the_sentence_of_the_readme() -> None:
    assert sentence("equal", "equal", "equal") == (
        "on your data 70% by density is within ±0.7 R@1 of everything at equal samples; random 70% is too: pruning is "
        "free here, selection adds nothing"
    )


CASES = {
    ("better", "equal", "better"): "is better than everything at equal samples by 2.1 R@1 (1.9 to 2.3); random 70% is "
    "within ±0.7 R@1: pruning pays here, and so does the selection",
    ("better", "better", "equal"): "random 70% is too: pruning pays here, but random rows do as well, so it is not the "
    "selection",
    ("better", "better", "worse"): "pruning pays here, but random rows are better than this selection",
    ("better", "equal", "unknown"): "pruning pays here; whether the selection matters is open",
    (
        "equal",
        "worse",
        "better",
    ): "random 70% is worse by 2.1 R@1 (1.9 to 2.3): pruning is free here, and the selection "
    "is better than random rows",
    (
        "equal",
        "worse",
        "equal",
    ): "pruning with this selection is free here; whether it is better than random rows is open",
    ("equal", "worse", "unknown"): "whether it is better than random rows is open",
    ("equal", "equal", "better"): "pruning is free here, and the selection is better than random rows",
    ("equal", "equal", "worse"): "pruning is free here, but random rows are better than this selection",
    ("equal", "better", "worse"): "pruning is free here, but random rows are better than this selection",
    ("equal", "equal", "unknown"): "pruning is free here; whether the selection adds anything is open",
    (
        "equal",
        "unknown",
        "equal",
    ): "random 70% is not clearly better, worse or equal: pruning is free here; whether the "
    "selection adds anything is open",
    ("worse", "worse", "better"): "random 70% is too: pruning costs accuracy here, less with this selection than with "
    "random rows",
    ("worse", "worse", "equal"): "pruning costs accuracy here, and selection does not help",
    ("worse", "worse", "worse"): "this selection costs accuracy here, more than random rows do",
    ("worse", "worse", "unknown"): "pruning costs accuracy here; whether the selection matters is open",
    ("worse", "equal", "worse"): "this selection costs accuracy here, more than random rows do",
    ("worse", "equal", "unknown"): "this selection costs accuracy here, random rows do not",
    ("worse", "better", "worse"): "this selection costs accuracy here, more than random rows do",
    (
        "unknown",
        "equal",
        "equal",
    ): "is neither clearly different from everything at equal samples nor clearly equal: +0.7 "
    "R@1 with an interval from -20.5 to +21.8: run more seeds, such as --seeds 5",
}


@pytest.mark.parametrize("case", CASES, ids=map("-".join, CASES))
def test_every_branch_of_the_sentence(case: tuple[str, str, str]) -> None:
    text = sentence(*case)
    assert text.endswith(CASES[case])
    assert text.startswith("on your data 70% by density ")


EVERY = list(itertools.product(OUTCOMES, repeat=3))


@pytest.mark.parametrize("case", EVERY, ids=map("-".join, EVERY))
def test_no_combination_claims_more_than_it_shows(case: tuple[str, str, str]) -> None:
    text, (first, second, third) = sentence(*case), case
    assert ("selection adds nothing" in text) == (first == third == "equal" and second in ("equal", "better"))
    assert ("so does the selection" in text) == (first == third == "better")
    assert ("pruning is free here" in text) <= (first == "equal")
    assert ("pays here" in text) == (first == "better")
    assert ("costs accuracy" in text) == (first == "worse")
    assert text.count("\n") == 0


def test_one_seed_is_not_enough_and_names_are_those_of_the_question() -> None:
    one = Mean.of([1.0])
    policy = Question(policy="scan", keep=0.65, seeds=1)
    assert say(policy, "R@1", one, one, one) == (
        "on your data 65% of the samples by scan cannot be compared with everything at equal samples by one seed, "
        "which has no interval: run more seeds, such as --seeds 5"
    )
    same = Mean.of([-6.7, -6.7])  # on few rows seeds often tie
    assert say(Question(method="density", seeds=2), "R@1", same, same, same) == (
        "on your data 70% by density differs from everything at equal samples by -6.7 R@1 with each of 2 seeds: "
        "without any spread there is no interval: run more seeds, such as --seeds 5"
    )
    chosen = Question(selection="kept")
    assert say(chosen, "R@1", *(OUTCOMES["equal"],) * 3).startswith("on your data the selection (70%) is within")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "density", "policy": "scan"}, "give one of a method, a policy and a selection"),
        ({"method": "density", "keep": 1.0}, "keep = 1.0"),
        ({"method": "density", "rows": 3}, "200 rows or more"),
    ],
)
def test_questions_that_cannot_be_asked(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Question(**given)


def test_the_data_are_cut_without_a_caption_in_both_parts_and_the_same_every_time(tmp_path: Path) -> None:
    table = emoji(400).drop_columns(["group"])
    pq.write_table(table, tmp_path / "data.parquet")
    data = str(tmp_path / "data.parquet")
    train, evals = cut_data(Question(method="density", rows=300), data, tmp_path / "a")
    kept, held = pq.read_table(train), pq.read_table(evals[0])
    assert len(kept) + len(held) == 300
    assert 40 <= len(held) <= 50
    assert not set(kept["text"].to_pylist()) & set(held["text"].to_pylist())
    texts, groups = held["text"].to_pylist(), held["group"].to_pylist()
    assert len(set(zip(texts, groups, strict=True))) == len(set(texts)) == len(set(groups))
    again = cut_data(Question(method="density", rows=300), data, tmp_path / "b")
    assert pq.read_table(again[0]).equals(kept)
    given = Question(method="density", evals=(data,))
    assert cut_data(given, data, tmp_path / "c") == (data, (data,))
    assert cut_data(given, data, tmp_path / "c") == (data, (data,))
    pq.write_table(table.slice(0, 60), tmp_path / "few.parquet")
    with pytest.raises(UsageError, match="has 60 usable rows; give 100 or more, or an evaluation set with --eval"):
        cut_data(DENSITY, str(tmp_path / "few.parquet"), tmp_path / "d")


def test_what_cannot_work_is_known_before_anything_is_trained(tmp_path: Path) -> None:
    table = emoji(200).drop_columns(["group"])
    pq.write_table(table, tmp_path / "data.parquet")
    data, missing = str(tmp_path / "data.parquet"), str(tmp_path / "nothing")
    with pytest.raises(UsageError, match=f"{missing} does not exist; give a selection folder or a file of keys"):
        th.prove(data, tmp_path / "a", selection=missing, progress=False)
    assert not (tmp_path / "a").exists()
    same = table.set_column(table.column_names.index("text"), "text", [["a cat"] * len(table)])
    pq.write_table(same, tmp_path / "same.parquet")
    with pytest.raises(UsageError, match=r"same.parquet: all 200 usable rows have the same caption, .*--eval"):
        th.prove(tmp_path / "same.parquet", tmp_path / "b", progress=False)
    with pytest.raises(OutputError, match=r"data.parquet: is a file; give a folder"):
        th.prove(data, data, progress=False)
    assert pq.read_table(data).equals(table)


def test_a_folder_is_not_continued_with_other_data(tmp_path: Path) -> None:
    for name, start in (("one", 0), ("two", 200)):
        pq.write_table(emoji(400).slice(start, 200), tmp_path / f"{name}.parquet")
    one, two = (str(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    made = cut_data(DENSITY, one, tmp_path / "out/data")
    assert cut_data(DENSITY, one, tmp_path / "out/data") == made
    others = [(DENSITY, two, "data"), (Question(method="density", rows=300), one, "rows")]
    others.append((Question(method="density", evals=(two,)), one, "evals"))
    for question, data, what in others:
        with pytest.raises(OutputError, match=f"out: was begun with other {what}; choose another folder"):
            cut_data(question, data, tmp_path / "out/data")


@pytest.mark.parametrize(
    "how",
    [
        {"selection": "keys.txt", "keep": 0.5, "seeds": 1, "epochs": 2},
        pytest.param({"seeds": 2}, marks=pytest.mark.slow),
        pytest.param({"policy": "dissect", "seeds": 2}, marks=pytest.mark.slow),
    ],
    ids=["selection", "density", "dissect"],
)
def test_prove_ends_with_the_sentence(how: dict[str, Any], tmp_path: Path, in_process: list[str]) -> None:
    pq.write_table(emoji(220), tmp_path / "data.parquet")
    same = {"epochs": 4, "batch_size": 32, "workers": 1, "progress": False, **how}
    if "selection" in how:
        (tmp_path / "keys.txt").write_text("".join(f"{key}\n" for key in emoji(220)["key"].to_pylist()[::2]))
        same["selection"] = tmp_path / "keys.txt"
    result = th.prove(tmp_path / "data.parquet", tmp_path / "out", **same)
    assert {run["row"] for run in result["runs"]} == {"full", "full-short", "chosen", "random"}
    assert result["sentence"].startswith("on your data ")
    assert (tmp_path / "out/sentence.txt").read_text() == result["sentence"] + "\n"
    seen = {run["row"]: run["samples_seen"] for run in result["runs"]}
    assert seen["chosen"] == seen["random"] == seen["full-short"] < seen["full"]
    begun = len(in_process)
    assert th.prove(tmp_path / "data.parquet", tmp_path / "out", **same)["sentence"] == result["sentence"]
    assert len(in_process) == begun
