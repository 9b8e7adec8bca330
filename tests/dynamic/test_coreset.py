"""The coreset of a run: a selection as any other, whose rows tell their history."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runs import make_run
from thresher import BudgetError, EmbeddingStore, PoolError, Selection, UsageError, build, open_store
from thresher.cli.main import main
from thresher.dynamic.coreset import coreset
from thresher.dynamic.ledger import Ledger
from thresher.dynamic.run_folder import Training
from thresher.export.write import export
from thresher.pool.store import reopen
from thresher.report.compare import compare
from thresher.report.explain import explain, history

N = 300


@pytest.fixture
def store(pool: Callable[..., EmbeddingStore], rows: Callable[..., np.ndarray]) -> EmbeddingStore:
    table = {"key": [f"k{i}" for i in range(N)], "caption": [f"row {i}" for i in range(N)]}
    return pool(rows(N), rows(N, seed=1), table)


@pytest.fixture
def run(store: EmbeddingStore, tmp_path: Path) -> Training:
    return make_run(tmp_path / "run", store, epochs=10, options={"warmup": 1, "rho": 0.3, "cycle": 2})


def slow_order(ledger: Ledger) -> list[int]:
    """Rows from the first to keep to the last, by comparing plain tuples."""
    loss = [float(value) for value in ledger.loss_N]
    return sorted(
        range(len(ledger)),
        key=lambda i: (
            ledger.seen_N[i] < 0,
            int(ledger.times_N[i]),
            int(ledger.marked_N[i]),
            np.inf if np.isnan(loss[i]) else loss[i],
            i,
        ),
    )


@pytest.mark.parametrize("keep", ["70%", "1", "299", "100%", 150, 0.35])
def test_the_rows_that_were_candidates_least_are_kept(run: Training, keep: str) -> None:
    found = coreset(run, keep)
    order = slow_order(run.ledger())
    count = len(found)
    assert count == {"70%": 210, "1": 1, "299": 299, "100%": 300, 150: 150, 0.35: 105}[keep]
    assert found.rows().tolist() == sorted(order[:count])
    assert run.ledger().times_N.max() == 3


@given(st.integers(1, N), st.integers(1, N))
def test_budgets_are_nested(run_once: Training, few: int, many: int) -> None:
    few, many = sorted((few, many))
    small, large = coreset(run_once, few).mask(), coreset(run_once, many).mask()
    assert (small.sum(), large.sum()) == (few, many)
    assert not (small & ~large).any()


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("nested")
    np.save(folder / "image.npy", np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32))
    return make_run(folder / "run", open_store(str(folder)), epochs=6, options={"warmup": 1, "cycle": 1})


def test_it_is_a_selection_for_every_command(run: Training, store: EmbeddingStore, tmp_path: Path) -> None:
    path = coreset(run, "60%").save(tmp_path / "sel")
    found = Selection.load(path)
    step = found.steps[0]
    assert (step.method, step.seed, found.store, found.total) == ("coreset", 3, store.fingerprint(), N)
    assert step.parameters == {"keep": "60%", "run": str(run.folder), "policy": "scan", "epochs": 10}
    assert reopen(found).total == N
    assert compare({"a": found, "b": coreset(run, "30%")})["pairs"][0]["both"] == 90
    assert export(found, "keys", tmp_path / "keys.txt").rows == 180
    assert (
        main(["select", "random", str(run.pool), "-o", str(tmp_path / "r"), "--keep", "50%", "--within", str(path)])
        == 0
    )
    assert len(Selection.load(tmp_path / "r")) == 90
    assert main(["report", str(path), "-o", str(tmp_path / "sel.html")]) == 0
    page = (tmp_path / "sel.html").read_text(encoding="utf-8")
    assert "Keep the rows that were least redundant in a training run." in page
    assert "Dropped \u00b7 redundant" in page


def expected_history(ledger: Ledger, row: int) -> dict:
    """For people epochs count from 1; the ledger counts from 0."""
    bits = int(ledger.marks_N[row])
    kinds = [name for i, name in enumerate(("redundant", "ill-matched", "left out")) if bits >> i & 1]
    times, marked, seen = int(ledger.times_N[row]), int(ledger.marked_N[row]), int(ledger.seen_N[row])
    return {
        "candidate": times,
        "last": marked + 1 if times else None,
        "kinds": kinds,
        "loss": float(ledger.loss_N[row]),
        "seen": seen + 1,
    }


def test_explain_knows_the_history_of_every_row(run: Training, store: EmbeddingStore) -> None:
    found, ledger = coreset(run, "50%"), run.ledger()
    for row in range(0, N, 7):
        told = explain(found, store, f"k{row}")
        assert told["steps"][0]["history"] == expected_history(ledger, row)
        of_run = history(run, store, f"k{row}")
        assert of_run["history"] == expected_history(ledger, row)
        assert (of_run["policy"], of_run["epochs"], of_run["searches"]) == ("scan", 10, 3)
        assert told["kept"] == bool(found.mask()[row])
        reason = told["steps"][0]["reason"]
        assert bool(reason) != told["kept"]
        if reason and ledger.times_N[row]:
            kinds = told["steps"][0]["history"]["kinds"]
            assert reason.startswith(kinds[0])
            assert f"a candidate {ledger.times_N[row]}\u00d7, last in epoch {ledger.marked_N[row] + 1};" in reason


def test_reasons_of_rows_that_were_never_candidates(run: Training) -> None:
    ledger = run.ledger()
    never = int((ledger.times_N == 0).sum())
    assert never > 2
    found = coreset(run, never - 1)
    last = slow_order(ledger)[never - 1]
    assert found.steps[0].why(last).startswith("never a candidate, but its last loss is high")
    told = f"1 of the {never} rows that were a candidate 0 times, and all {N - never} that were a candidate more often"
    assert told in found.steps[0].notes[0]


def test_rows_never_trained_on_come_last_and_are_told(run: Training, store: EmbeddingStore) -> None:
    state = run.ledger().state()
    for name, value in (("seen", -1), ("marked", -1), ("marks", 0), ("times", 0), ("losses", np.nan)):
        state[name][[5, 9]] = value
    run.record(run.log(), Ledger.from_state(state))
    found = coreset(run, N - 2)
    assert np.flatnonzero(~found.mask()).tolist() == [5, 9]
    assert found.steps[0].why(5) == "never trained on: there is no loss to rank it by"
    assert "2 rows were never trained on; they rank last" in found.steps[0].notes
    told = explain(found, store, "k9")["steps"][0]["history"]
    assert told == {"candidate": 0, "last": None, "kinds": [], "loss": None, "seen": None}
    json.dumps(told, allow_nan=False)


def test_d_pruning_ranks_by_how_often_rows_were_left_out(store: EmbeddingStore, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", store, policy="d-pruning", prune=0.3)
    found = coreset(run, "50%")
    assert set(np.unique(found.steps[0].rows["code"]).tolist()) <= {0, 4}
    gone = int(np.flatnonzero(~found.mask())[0])
    assert found.steps[0].why(gone).startswith("left out: a candidate")


@pytest.mark.parametrize("policy", ["full", "infobatch", "dynamic-random", "seta", "static"])
def test_policies_that_mark_nothing_rank_nothing(policy: str, store: EmbeddingStore, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", store, policy=policy, epochs=4)
    with pytest.raises(UsageError, match=f"the policy {policy} marks no candidates.*--policy d-pruning, .* or sift"):
        coreset(run, "50%")


def test_a_run_that_has_not_come_to_candidates(store: EmbeddingStore, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", store, stop=1, options={"warmup": 2})
    with pytest.raises(UsageError, match="in 1 epoch no row was a candidate for pruning yet"):
        coreset(run, "50%")
    with pytest.raises(PoolError, match="has not finished an epoch"):
        coreset(make_run(tmp_path / "b", store, stop=0), "50%")


def test_a_run_that_goes_on_is_told(store: EmbeddingStore, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", store, stop=4, options={"warmup": 1})
    assert coreset(run, "50%").steps[0].notes[-1] == "the run has finished 4 of 7 epochs; the ranking may still change"


@pytest.mark.parametrize(("keep", "error"), [("301", BudgetError), ("0.1%", BudgetError), ("1.0", UsageError)])
def test_budgets_that_cannot_be_met(run: Training, keep: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="keep"):
        coreset(run, keep)


def test_a_pool_that_was_moved(run: Training, store: EmbeddingStore, tmp_path: Path) -> None:
    moved = shutil.move(run.pool, tmp_path / "elsewhere")
    with pytest.raises(PoolError, match="if the pool was moved, .* --pool"):
        reopen(coreset(run, "50%"))
    found = coreset(run, "50%", pool=str(moved))
    assert reopen(found).total == N
    np.save(tmp_path / "other.npy", np.ones((N, 8), np.float32))
    with pytest.raises(PoolError, match="is not the pool of 300 rows.*--pool"):
        coreset(run, "50%", pool=str(tmp_path / "other.npy"))


def test_a_pool_of_the_run_s_own_goes_with_its_folder(store: EmbeddingStore, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", store, options={"warmup": 1})
    table = pq.read_table(Path(store.layout.location) / "part_0.parquet")
    pq.write_table(table, run.folder / "rows.parquet")
    own = open_store(str(run.folder / "rows.parquet"))
    dataclasses.replace(run, pool=own.layout.location, store=own.fingerprint()).save()
    moved = Training.load(shutil.move(run.folder, tmp_path / "moved"))
    found = coreset(moved, "50%")
    assert found.pool == str(tmp_path / "moved" / "rows.parquet")
    assert explain(found, reopen(found), "k3")["caption"] == "row 3"


def test_the_command(run: Training, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "sel")
    assert main(["coreset", str(run.folder), "-o", out, "--keep", "70%"]) == 0
    assert "kept 210 of 300 rows (70.0%)" in capsys.readouterr().out
    assert main(["coreset", str(run.folder), "-o", out, "--keep", "60%"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["coreset", str(run.folder), "-o", out, "--keep", "60%", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 180
    assert main(["coreset", str(tmp_path), "-o", out, "--keep", "60%", "--overwrite"]) == 2
    assert "not the folder of a training run (training.json is missing)" in capsys.readouterr().err


def test_explain_commands(run: Training, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ledger = run.ledger()
    row = int(np.argmax(ledger.times_N))
    out = str(tmp_path / "sel")
    assert main(["coreset", str(run.folder), "-o", out, "--keep", "50%"]) == 0
    capsys.readouterr()
    line = f"a candidate for pruning 3 times, last in epoch {ledger.marked_N[row] + 1} as "
    assert main(["explain", str(run.folder), f"k{row}"]) == 0
    told = capsys.readouterr().out
    assert line in told
    assert f"last trained on in epoch {ledger.seen_N[row] + 1}, with a loss of {ledger.loss_N[row]:.4f}" in told
    assert "10 epochs of training, scan" in told
    assert main(["explain", out, f"k{row}"]) == 0
    why = "redundant" if ledger.marks_N[row] == 1 else "ill-matched"
    when = f"last in epoch {ledger.marked_N[row] + 1}; last loss {ledger.loss_N[row]:.4f}, in epoch"
    assert f"dropped - {why}: a candidate 3\u00d7, {when} {ledger.seen_N[row] + 1}" in capsys.readouterr().out
    kept = int(np.flatnonzero(Selection.load(out).mask() & (ledger.times_N == 1))[0])
    assert main(["explain", out, f"k{kept}"]) == 0
    told = capsys.readouterr().out
    assert "coreset: kept - passes" in told
    assert f"a candidate for pruning once, last in epoch {ledger.marked_N[kept] + 1} as " in told
    assert main(["explain", str(run.folder), f"row:{row}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["history"]["candidate"] == 3
    assert main(["explain", str(run.folder), "nothing"]) == 2
    assert "no row 'nothing'" in capsys.readouterr().err
    assert main(["explain", str(run.folder), "k1", "--metadata", "x"]) == 2
    never = int(np.flatnonzero(ledger.times_N == 0)[0])
    capsys.readouterr()
    assert main(["explain", str(run.folder), f"k{never}"]) == 0
    assert "never a candidate for pruning; last trained on" in capsys.readouterr().out


def test_steps_before_and_after_are_no_trouble(run: Training, store: EmbeddingStore, select: Callable) -> None:
    found = coreset(run, "80%")
    chain = select(store, build("clip-score", {"keep": "50%"}), within=found)
    assert len(chain) == 120
    kept = int(chain.rows()[0])
    assert [step["method"] for step in explain(chain, store, f"k{kept}")["steps"]] == ["coreset", "clip-score"]
