"""What a run with sift says of mismatched pairs: coreset, explain and report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.dynamic.policies.test_sift import planted
from tests.report.test_report import read
from tests.runs import make_run
from thresher import EmbeddingStore, Selection, UsageError
from thresher.cli.main import main
from thresher.dynamic.coreset import coreset
from thresher.dynamic.ledger import Ledger
from thresher.dynamic.mismatch import Mismatch
from thresher.dynamic.run_folder import Training
from thresher.report.epochs import row_groups
from thresher.report.explain import explain, history
from thresher.report.run import write_run_report

N, EPOCHS = 3000, 7


@pytest.fixture(scope="module")
def table() -> tuple[np.ndarray, np.ndarray]:
    return planted(N, 0.3, EPOCHS, seed=1)


@pytest.fixture
def store(pool: Callable[..., EmbeddingStore], rows: Callable[..., np.ndarray]) -> EmbeddingStore:
    names = {"key": [f"k{i}" for i in range(N)], "caption": [f"row {i}" for i in range(N)]}
    return pool(rows(N), rows(N, seed=1), names)


@pytest.fixture
def run(store: EmbeddingStore, table: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> Training:
    return make_run(tmp_path / "run", store, policy="sift", epochs=EPOCHS, losses=table[0])


@pytest.fixture
def clean(store: EmbeddingStore, tmp_path: Path) -> Training:
    return make_run(tmp_path / "clean", store, policy="sift", epochs=4, losses=planted(N, 0.0, 4, seed=2)[0])


def test_a_coreset_drops_what_is_most_probably_mismatched(
    run: Training, table: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    found, ledger = coreset(run, "75%"), run.ledger()
    assert ledger.memory_N is not None
    order = sorted(range(N), key=lambda i: (ledger.memory_N[i], ledger.loss_N[i], i))
    assert np.flatnonzero(found.mask()).tolist() == sorted(order[:2250])
    assert table[1][~found.mask()].mean() > 0.9
    nested = coreset(run, 1000).mask()
    assert not (nested & ~found.mask()).any()
    found.save(tmp_path / "core")
    step = Selection.load(tmp_path / "core").steps[0]
    assert step.score == "mean rank of the loss over epochs on all rows, 0 (lowest) to 1 (highest)"
    np.testing.assert_array_equal(step.rows["score"], ledger.memory_N)
    last = order[-1]
    assert step.why(last).startswith("probably mismatched, 100% sure: the mean rank of its loss is 0.9")
    assert step.why(last).endswith(f"in epoch {ledger.seen_N[last] + 1}")
    assert step.why(order[0]).startswith("not clearly mismatched: the mean rank of its loss is 0.0")
    wrong = int((step.rows["code"] == 1).sum())
    assert step.notes[0] == f"{wrong:,} rows are probably mismatched; dropped 750 of them"
    agree = (step.rows["code"] == 1) == (step.rows["chance"] > 0.5)
    assert agree.mean() > 0.99


def test_a_coreset_of_clean_pairs_says_so(clean: Training) -> None:
    found = coreset(clean, "90%")
    assert len(found) == 2700
    assert found.steps[0].notes == (
        "no rows stand out as mismatched: the ranks of the losses form one hump; the highest are dropped",
    )
    assert not found.steps[0].rows["chance"].any()
    assert set(found.steps[0].rows["code"].tolist()) == {0}


def test_without_a_budget_exactly_the_mismatched_are_dropped(
    run: Training, clean: Training, store: EmbeddingStore, tmp_path: Path
) -> None:
    mismatch = Mismatch.of("sift", run.ledger())
    assert mismatch is not None
    found = coreset(run)
    np.testing.assert_array_equal(found.mask(), ~mismatch.wrong_N)
    assert found.steps[0].rows_out == len(found)
    assert (
        found.steps[0].notes[0]
        == f"{N - len(found):,} rows are probably mismatched; dropped {N - len(found):,} of them"
    )
    assert coreset(clean).mask().all()
    assert coreset(clean).steps[0].notes == ("no rows stand out as mismatched: the ranks of the losses form one hump",)
    assert main(["coreset", str(run.folder), "-o", str(tmp_path / "core")]) == 0
    np.testing.assert_array_equal(Selection.load(tmp_path / "core").mask(), found.mask())
    scan = make_run(tmp_path / "scan", store, policy="scan", epochs=4)
    with pytest.raises(UsageError, match="the policy scan does not look for mismatched pairs; say how many rows"):
        coreset(scan)


def test_rows_without_a_rank_come_last(run: Training, store: EmbeddingStore) -> None:
    ledger = run.ledger()
    assert ledger.memory_N is not None
    ledger.memory_N[[5, 9]] = np.nan
    run.record(run.log(), ledger)
    found = coreset(run, N - 2)
    assert np.flatnonzero(~found.mask()).tolist() == [5, 9]
    assert found.steps[0].why(9) == "never trained on in an epoch on all rows: there is no rank of its loss"
    assert "2 rows have no rank; they rank last" in found.steps[0].notes
    assert history(run, store, "k9")["mismatch"] == {"rank": None, "chance": None}


def test_a_run_that_has_ranked_nothing_is_refused(run: Training) -> None:
    run.record(run.log(), Ledger(N, memory=True))
    with pytest.raises(UsageError, match="no losses are ranked yet; train for an epoch on all rows"):
        coreset(run, "50%")


def test_explain_says_why_a_pair_is_thought_mismatched(
    run: Training, clean: Training, store: EmbeddingStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = run.ledger().memory_N
    assert memory is not None
    for row in (int(np.argmax(memory)), int(np.argmin(memory))):
        told = history(run, store, f"k{row}")
        assert told["mismatch"]["rank"] == memory[row]
        assert (told["mismatch"]["chance"] > 0.99) == (row == np.argmax(memory))
        assert main(["explain", str(run.folder), f"k{row}"]) == 0
        verdict = "probably" if row == np.argmax(memory) else "probably not"
        assert f"  {verdict} mismatched, probability " in capsys.readouterr().out
    assert main(["explain", str(clean.folder), "k3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mismatch"]["chance"] is None
    assert main(["explain", str(clean.folder), "k3"]) == 0
    assert "the losses of this run do not show mismatched pairs" in capsys.readouterr().out
    assert main(["coreset", str(run.folder), "-o", str(tmp_path / "core"), "--keep", "70%"]) == 0
    assert "rows are probably mismatched; dropped" in capsys.readouterr().out
    reason = explain(Selection.load(tmp_path / "core"), store, f"k{np.argmax(memory)}")["steps"][0]["reason"]
    assert reason.startswith("probably mismatched, 100% sure")


def test_the_report_shows_the_pairs_that_look_most_wrong(
    run: Training, clean: Training, store: EmbeddingStore, tmp_path: Path
) -> None:
    ledger = run.ledger()
    mismatch = Mismatch.of("sift", ledger)
    assert mismatch is not None
    group = row_groups(ledger, 5, mismatch)[0]
    assert [row.row for row in group.rows] == np.argsort(-mismatch.ranks_N, kind="stable")[:5].tolist()
    assert group.count == mismatch.wrong_N.sum()
    _, page = read(write_run_report(run, tmp_path / "r.html", store=store))
    text = " ".join(page.text.split())
    assert f"Probably mismatched: the loss ranks high in every epoch on all rows {group.count}" in text
    assert f"row {group.rows[0].row}" in text
    assert re.search(rf"Mismatched pairs\W*probably {group.count}, [\d.]+%", text), re.findall("Mismatched.{60}", text)
    _, page = read(write_run_report(clean, tmp_path / "c.html", store=store))
    text = " ".join(page.text.split())
    assert "none found: the ranks of the losses form one hump" in text
    assert "Highest ranks of the loss; nothing shows that pairs are mismatched" in text


def test_other_policies_say_nothing_of_mismatched_pairs(store: EmbeddingStore, tmp_path: Path) -> None:
    run = make_run(tmp_path / "scan", store, policy="scan", epochs=4)
    assert Mismatch.of("scan", run.ledger()) is None
    assert Mismatch.of("of-another-package", run.ledger()) is None
    assert "mismatch" not in history(run, store, "k1")
