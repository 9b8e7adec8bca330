from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher import BadRowsError, Selection, UsageError, build, open_store, run_steps
from thresher.cli.main import main
from thresher.export.write import export
from thresher.pruning.methods.scs import sample
from thresher.report import write_report
from thresher.report.compare import compare
from thresher.report.explain import explain


def philox(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def by_the_paper(rng, scores, draws, batch, penalty) -> np.ndarray:
    """The algorithm as it is printed: probabilities anew for every batch, rows of a batch one after the other."""
    scores, counts = np.array(scores, float), np.zeros(len(scores), int)
    while counts.sum() < draws:
        weights = np.exp(scores - scores.max())
        drawn = []
        for _ in range(min(batch, draws - counts.sum())):
            weights[drawn] = 0
            drawn.append(rng.choice(len(scores), p=weights / weights.sum()))
        counts[drawn] += 1
        scores[drawn] -= penalty
    return counts


def chances(scores, draws, batch, penalty, cap=99) -> dict[tuple[int, ...], float]:
    """Exact probability of every outcome, by going through all of them."""
    outcomes = {(0,) * len(scores): 1.0}
    while sum(next(iter(outcomes))) < draws:
        after: dict[tuple[int, ...], float] = {}
        for counts, chance in outcomes.items():
            weights = np.exp(np.array(scores) - penalty * np.array(counts)) * (np.array(counts) < cap)
            able = np.flatnonzero(weights)
            for order in itertools.permutations(able, min(batch, draws - sum(counts), len(able))):
                this, left = chance, weights.sum()
                for row in order:
                    this *= weights[row] / left
                    left -= weights[row]
                reached = tuple(c + (i in order) for i, c in enumerate(counts))
                after[reached] = after.get(reached, 0.0) + this
        outcomes = after
    return outcomes


@pytest.mark.parametrize("turns", [4_000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("scores", "draws", "batch", "penalty", "cap"),
    [
        ([1.0, 0.0, -0.5, 0.3, 2.0], 2, 2, 0.0, None),  # the first batch alone
        ([1.0, 0.0, -0.5], 6, 2, 0.7, None),
        ([1.5, 0.0, -0.5, 0.2], 5, 2, 0.4, None),  # a last batch of one
        ([2.0, 0.0], 4, 1, 0.9, None),
        ([1.5, 0.0, -0.5, 0.2], 5, 1, 0.4, 2),
        ([2.0, 0.0, 0.5], 4, 1, 0.0, 2),
        ([1.0, 0.0, 0.7], 3, 3, 0.2, 1),  # all rows once
    ],
)
def test_outcomes_have_their_exact_probabilities(scores, draws, batch, penalty, cap, turns) -> None:
    rng = philox(3)
    expected = chances(scores, draws, batch, penalty, cap or 99)
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(turns):
        outcome = tuple(sample(rng, np.array(scores), draws, batch, penalty, cap=cap).tolist())
        seen[outcome] = seen.get(outcome, 0) + 1
    assert set(seen) <= set(expected)
    for outcome, chance in expected.items():
        error = 5 * np.sqrt(chance * (1 - chance) / turns) + 1e-9
        assert seen.get(outcome, 0) / turns == pytest.approx(chance, abs=error)


@pytest.mark.parametrize(
    ("draws", "batch", "cap"), [(300, 7, 3), (300, 100, 3), (299, 100, 3), (90, 100, 1), (500, 9, 5)]
)
def test_no_row_is_drawn_more_often_than_the_cap(draws, batch, cap) -> None:
    counts = sample(philox(0), philox(1).normal(0, 3, 100), draws, batch, 0.0, cap=cap)
    assert counts.sum() == draws
    assert counts.max() == cap


def test_a_cap_that_no_row_reaches_changes_nothing() -> None:
    scores = philox(2).normal(0, 1, 200)
    free = sample(philox(5), scores, 300, 10, 0.3)
    assert np.array_equal(sample(philox(5), scores, 300, 10, 0.3, cap=int(free.max()) + 1), free)


def test_a_cap_leaves_enough_draws(pool, rows, select) -> None:
    store = pool(rows(20), table={"similarity": np.linspace(0, 1, 20).tolist()})
    method = {"draws": "300", "column": "similarity", "cap": 10, "temperature": 0.1}
    with pytest.raises(UsageError, match=r"draws = 300: must be at most 200, 10 for each of the 20 rows \(cap\)"):
        select(store, build("scs", method))
    assert select(store, build("scs", method | {"cap": 15})).repeats.tolist() == [15] * 20


def test_repeats_are_those_of_the_paper() -> None:
    """Mean repeats by rank of score, against the algorithm as printed."""
    scores = philox(1).normal(0, 1.5, 60)
    ours = np.mean([sample(philox(i), scores, 90, 6, 0.3) for i in range(600)], axis=0)
    theirs = np.mean([by_the_paper(philox(i), scores, 90, 6, 0.3) for i in range(600)], axis=0)
    np.testing.assert_allclose(ours, theirs, atol=0.25)
    assert np.abs(ours - theirs).mean() < 0.05


@given(
    st.lists(st.floats(-700, 700), min_size=1, max_size=40),
    st.integers(1, 300),
    st.integers(1, 40),
    st.floats(0, 1000),
    st.integers(0, 3),
)
def test_the_draws_are_exact_and_no_row_comes_twice_in_a_batch(scores, draws, batch, penalty, seed) -> None:
    scores, batch = np.array(scores), min(batch, len(scores))
    told: list[int] = []
    counts = sample(philox(seed), scores, draws, batch, penalty, told.append)
    assert counts.dtype == np.int32
    assert counts.sum() == sum(told) == draws
    assert told == [batch] * (draws // batch) + [draws % batch] * (draws % batch > 0)
    assert counts.max() <= len(told)  # once a batch at most


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=50), st.integers(1, 5), st.integers(0, 3))
def test_a_large_penalty_uses_all_rows_alike(scores, times, seed) -> None:
    n = len(scores)
    counts = sample(philox(seed), np.array(scores), times * n + n // 2, 1, 1e6)
    assert set(counts.tolist()) <= {times, times + 1}


def test_scores_far_apart_draw_the_best_again_and_again() -> None:
    counts = sample(philox(0), np.array([0.0, 1e5, -1e5, 2e5]), 500, 1, 0.0)
    assert counts.tolist() == [0, 0, 0, 500]
    counts = sample(philox(0), np.array([0.0, 1e5, -1e5, 2e5]), 500, 2, 0.0)
    assert counts.tolist() == [0, 250, 0, 250]


@pytest.fixture
def store(pool):
    scores = philox(5).normal(0, 2.0, 400)
    table = {
        "uid": [f"{i:032x}" for i in range(400)],
        "text": [f"a caption {i}" for i in range(400)],
        "filepath": [f"{i}.jpg" for i in range(400)],
        "url": [f"http://x/{i}" for i in range(400)],
        "logit": scores,
    }
    return pool(None, None, table)


def draw(**given):
    return build("scs", {"column": "logit", "draws": 1000, **given})


def test_the_selection(store, select) -> None:
    selection = select(store, draw(batch=7), seed=4)
    assert selection.uses == 1000
    assert (selection.repeats > 0).tolist() == selection.mask().tolist()
    step = selection.steps[0]
    logit = store.column("logit")
    np.testing.assert_array_equal(step.rows["score"], logit.astype(np.float32))
    lost = int(np.flatnonzero(~selection.mask())[0])
    assert step.why(lost) == f"never drawn in 1,000 draws; its score is {logit[lost]:.4f}"
    assert np.corrcoef(logit, selection.repeats)[0, 1] > 0.6
    assert not np.array_equal(selection.repeats, select(store, draw(batch=7), seed=5).repeats)
    assert select(store, draw(draws="50%")).uses == 200
    assert select(store, draw(draws=400 * 1280 * 2, batch=400)).repeats.tolist() == [2560] * 400


def test_higher_temperatures_are_more_even(store, select) -> None:
    spread = [np.std(select(store, draw(penalty=0.0, temperature=t)).repeats) for t in (0.5, 1.0, 4.0)]
    assert spread[0] > spread[1] > spread[2]


def test_steps_after_it_carry_the_repeats_and_a_second_draw_is_refused(store, select) -> None:
    drawn = select(store, draw())
    later = select(store, build("filter", {"where": "logit > 0"}), within=drawn)
    assert [step.method for step in later.steps] == ["scs", "filter"]
    np.testing.assert_array_equal(later.repeats, np.where(later.mask(), drawn.repeats, 0))
    assert 0 < later.uses < drawn.uses
    with pytest.raises(UsageError, match="already repeated by an earlier step"):
        select(store, draw(), within=drawn)
    with pytest.raises(UsageError, match="earlier step repeats rows already"):
        drawn.then(drawn.steps[0], np.ones(len(drawn), bool), np.ones(len(drawn), np.int32))
    with pytest.raises(UsageError, match="cannot take the intersection of selections that repeat rows"):
        _ = drawn & later


def test_what_is_told_and_written_counts_repeats(store, select, tmp_path) -> None:
    selection = select(store, draw())
    folder = selection.save(tmp_path / "drawn")
    again = Selection.load(folder)
    np.testing.assert_array_equal(again.repeats, selection.repeats)
    assert json.loads((folder / "selection.json").read_text())["uses"] == 1000
    best = int(np.argmax(selection.repeats))
    found = explain(selection, store, f"{best:032x}")
    assert (found["kept"], found["uses"]) == (True, int(selection.repeats.max()))
    lost = int(np.flatnonzero(~selection.mask())[0])
    assert explain(selection, store, f"row:{lost}")["uses"] == 0
    other = select(store, build("random", {"keep": 10}))
    assert compare({"a": selection, "b": other})["uses"] == {"a": 1000, "b": 10}
    assert "used 1,000 times" in write_report(selection, tmp_path / "r.html", store=store).read_text()

    expected = np.repeat(np.arange(400), selection.repeats).tolist()
    written = {
        kind: export(selection, kind, tmp_path / kind, store=store) for kind in ("datacomp", "keys", "open_clip")
    }
    assert {done.rows for done in written.values()} == {1000}
    uids = np.load(tmp_path / "datacomp")
    assert uids["f1"].tolist() == expected
    assert [int(line, 16) for line in (tmp_path / "keys").read_text().splitlines()] == expected
    lines = (tmp_path / "open_clip").read_text().splitlines()[1:]
    assert [int(line.split(".")[0]) for line in lines] == expected
    assert export(selection, "img2dataset", tmp_path / "urls.parquet", store=store).rows == 1000
    urls = pq.read_table(tmp_path / "urls.parquet").column("url").to_pylist()
    assert [int(url.rpartition("/")[2]) for url in urls] == expected
    export(selection, "parquet", tmp_path / "rows.parquet", store=store)
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.column("repeats").to_pylist() == selection.repeats.tolist()
    assert table.column("kept").to_pylist() == selection.mask().tolist()
    export(other, "parquet", tmp_path / "others.parquet", store=store)
    assert "repeats" not in pq.read_schema(tmp_path / "others.parquet").names


def test_the_command_line_tells_rows_and_draws(store, tmp_path, capsys) -> None:
    words = [
        "select",
        "scs",
        store.layout.location,
        "-o",
        str(tmp_path / "out"),
        "--column",
        "logit",
        "--draws",
        "1000",
    ]
    assert main(words) == 0
    rows = len(Selection.load(tmp_path / "out"))
    out, err = capsys.readouterr()
    assert f"kept {rows:,} of 400 rows ({rows / 400:.1%}), 1,000 with repeats" in out
    assert f"scs: kept {rows:,} of 400 rows ({rows / 400:.1%}), 1,000 with repeats" in err
    best = int(np.argmax(Selection.load(tmp_path / "out").repeats))
    assert main(["explain", str(tmp_path / "out"), f"row:{best}"]) == 0
    assert f"kept, used {Selection.load(tmp_path / 'out').repeats.max()} times" in capsys.readouterr().out
    assert main(["select", "random", store.layout.location, "-o", str(tmp_path / "b"), "--keep", "10"]) == 0
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "b")]) == 0
    assert f"{rows:,} of 400 rows ({rows / 400:.1%}), 1,000 with repeats\n" in capsys.readouterr().out


def test_a_damaged_count_is_noticed(store, select, tmp_path) -> None:
    folder = select(store, draw()).save(tmp_path / "drawn")
    np.save(folder / "repeats.npy", np.ones(400, np.int32))
    with pytest.raises(Exception, match=r"repeats.npy does not match the kept rows"):
        Selection.load(folder)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": 1e-310}, "infinite"),
        ({"penalty": -0.1}, "must be from 0 to 1,000,000"),
        ({"batch": 0}, "at least 1"),
        ({"batch": 401}, "batch = 401: must be at most 400"),
        ({"draws": "0.1%"}, "less than one row"),
        ({"draws": 0}, "cannot keep 0"),
        ({"column": "nothing"}, "column = 'nothing'"),
    ],
)
def test_what_cannot_be_drawn_is_told(store, select, wrong, message) -> None:
    with pytest.raises(UsageError, match=message):
        select(store, draw(**wrong))


def test_infinite_scores_are_refused(pool, select) -> None:
    store = pool(None, None, {"logit": [0.0, float("-inf"), 1.0]})
    with pytest.raises(BadRowsError, match="logit is infinite in row 1"):
        select(store, draw(draws=2))


def test_from_python(store, tmp_path) -> None:
    from thresher import Keep
    from thresher.pruning.methods.scs import SoftCapSampling

    by_hand = SoftCapSampling(draws=Keep.parse(1000), column="logit")
    assert run_steps(open_store(store.layout.location), [by_hand]).uses == 1000
