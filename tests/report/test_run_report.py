"""The report on a training run: it shows the log and the ledger, loads nothing and escapes everything."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.report.test_report import ATTACK, ROWS, picture, read, write_pool
from tests.runs import make_run
from thresher import Cache, EmbeddingStore, PoolError, UsageError, build, open_store, run_steps
from thresher.cli.main import main
from thresher.dynamic.histogram import LOSS_EDGES
from thresher.dynamic.run_folder import LEDGER, LOG, Training
from thresher.report.epochs import Epochs, row_groups
from thresher.report.run import write_run_report


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    images = [{"bytes": picture(i), "path": None} for i in range(ROWS)]
    captions = [f"{ATTACK} number {i}" for i in range(ROWS)]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return open_store(str(write_pool(tmp_path_factory.mktemp("pools") / "pool", pa.array(images, struct), captions)))


@pytest.fixture(scope="module")
def run(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("runs") / "my <i>run"
    return make_run(folder, store, epochs=10, prune=0.2, options={"warmup": 1}, note=ATTACK)


def test_the_page_shows_the_log(run: Training, store: EmbeddingStore, tmp_path: Path) -> None:
    page, found = read(write_run_report(run, tmp_path / "r.html", store=store))
    log, ledger = run.log(), run.ledger()
    assert "<script" not in page
    assert ATTACK in found.text
    assert "Training run my <i>run" in found.text
    assert f"{log[-1]['pruned_so_far']:.1%}" in found.text
    assert "target for the run: 20.0%" in found.text
    left_out = sum(e["total"] - e["rows"] for e in log)
    assert f"{left_out:,} samples, {left_out / 3000:.1%}" in found.text
    saved = 20 * left_out / sum(e["samples"] for e in log)
    assert f"20.0 s; about {saved:.1f} s saved" in found.text
    for entry in log:
        cells = [str(entry["epoch"] + 1), entry["phase"], f"{entry['rows']:,}", f"{entry['pruned_so_far']:.1%}"]
        pattern = "".join(rf"<t[hd][^>]*>{re.escape(cell)}</t[hd]>" for cell in [*cells, f"{entry['loss']:.4f}"])
        assert re.search(pattern, page), pattern
    assert re.search(r"<td>0\.1000</td><td>0\.9000</td><td>0\.9000</td><td>epoch 10</td>", page)  # of R@1
    names = ("kept", "pruned", "candidates", "overlap", "loss", "histogram", "seconds", "speed")
    assert [name for name in names if f'id="chart-{name}"' in page] == list(names)
    assert page.count("data:image/") >= 18
    most = int(ledger.times_N.max())
    assert f"{most}\u00d7, loss" in found.text
    assert f"Never a candidate {int((ledger.times_N == 0).sum())} rows" in " ".join(found.text.split())
    assert "Not finished" not in found.text


def test_the_same_run_gives_the_same_bytes(run: Training, store: EmbeddingStore, tmp_path: Path) -> None:
    one, two = (write_run_report(run, tmp_path / f"{i}.html", store=store).read_bytes() for i in (1, 2))
    assert one == two


@pytest.mark.parametrize(
    "policy",
    [
        "full",
        "static",
        "sift",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("infobatch", "dynamic-random", "d-pruning")),
    ],
)
def test_every_policy_has_a_page(policy: str, store: EmbeddingStore, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", store, policy=policy, epochs=4)
    page, found = read(write_run_report(run, tmp_path / "r.html", store=store))
    log = run.log()
    assert f"{log[-1]['pruned_so_far']:.1%}" in found.text
    assert ('id="chart-candidates"' in page) == (policy == "d-pruning")
    assert "target" not in found.text
    assert ("Most often left out" in found.text) == (policy == "d-pruning")


def test_the_selection_of_a_static_run_is_named(store: EmbeddingStore, tmp_path: Path) -> None:
    chosen = run_steps(store, [build("random", {"keep": "40%"})], cache=Cache.at(tmp_path / "cache"))
    folder = str(chosen.save(tmp_path / "a <b>subset"))
    for location, expected in (
        (folder, f"{folder}: 120 of 300 rows; random keep = 40%"),
        (str(tmp_path / "keys.txt"), str(tmp_path / "keys.txt")),
    ):
        run = make_run(tmp_path / Path(location).stem / "run", store, policy="static", epochs=2, selection=location)
        page, found = read(write_run_report(run, tmp_path / "r.html"))
        assert f"<dt>Selection</dt><dd>{html.escape(expected)}</dd>" in page
    (Path(folder) / "selection.json").write_text("{")  # a damaged selection is still named
    run = make_run(tmp_path / "again", store, policy="static", epochs=2, selection=folder)
    assert f"<dt>Selection</dt><dd>{html.escape(folder)}</dd>" in read(write_run_report(run, tmp_path / "r.html"))[0]


def test_runs_that_are_not_done(store: EmbeddingStore, tmp_path: Path) -> None:
    begun = make_run(tmp_path / "a", store, stop=0)
    _, found = read(write_run_report(begun, tmp_path / "a.html", store=store))
    assert "No epoch is finished yet." in found.text
    assert "Not finished: 0 of 7 epochs." in found.text
    one = make_run(tmp_path / "b", store, stop=1)
    _, found = read(write_run_report(one, tmp_path / "b.html", store=store))
    assert "in 1 epoch," in found.text


def test_a_log_of_few_words(run: Training, store: EmbeddingStore, tmp_path: Path) -> None:
    """A log of another tool without our fields: charts without data are omitted."""
    bare = make_run(tmp_path / "run", store, epochs=2)
    kept = ("epoch", "rows", "total", "pruned_so_far")
    entries = [{name: entry[name] for name in kept} for entry in bare.log()]
    (bare.folder / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page, _ = read(write_run_report(bare, tmp_path / "r.html", store=store))
    assert 'id="chart-kept"' in page
    assert not {name for name in ("loss", "histogram", "seconds", "speed") if f'id="chart-{name}"' in page}
    (bare.folder / LOG).write_text('{"epoch": 0, "rows": "many", "total": 3}\n')
    with pytest.raises(PoolError, match="log.jsonl: line 1: rows is .many., but must be a whole number"):
        write_run_report(bare, tmp_path / "r.html")


def test_many_epochs_stay_small(run: Training, tmp_path: Path) -> None:
    log = run.log()
    long = [{**log[i % 10], "epoch": i} for i in range(500)]
    copy = dataclasses.replace(run, folder=tmp_path / "long")
    copy.folder.mkdir()
    copy.record(long, run.ledger())
    page, _ = read(write_run_report(copy, tmp_path / "r.html"))
    assert len(page) < 500_000
    assert "<details>\n<summary><h4>All epochs" in page


def test_the_histogram_of_a_run_is_that_of_its_epochs(run: Training) -> None:
    found, log = Epochs.of(run.log()), run.log()
    assert found.counts_EB.sum(axis=1).tolist() == [entry["samples"] for entry in log]
    lo = LOSS_EDGES.tolist().index(found.edges[0])
    assert LOSS_EDGES[lo : lo + len(found.edges)].tolist() == found.edges.tolist()
    for e, entry in enumerate(log):
        counts = dict(zip(entry["histogram"]["edges"], entry["histogram"]["counts"], strict=False))
        assert [counts.get(edge, 0) for edge in found.edges[:-1].tolist()] == found.counts_EB[e].tolist()


def test_chance_is_the_share_that_the_search_before_marked(run: Training) -> None:
    found, log = Epochs.of(run.log()), run.log()
    before = None
    for e, entry in enumerate(log):
        if entry["candidates"]:
            assert np.isnan(found.chance_E[e]) if before is None else found.chance_E[e] == before
            before = entry["candidates"] / entry["total"]


def test_rows_shown_are_those_marked_most(run: Training) -> None:
    ledger = run.ledger()
    shown = {group.title: group for group in row_groups(ledger, 5)}
    for title, bit, sign in (("redundant", 1, 1), ("ill-matched", 2, -1)):
        group = shown[f"Most often a candidate, last as {title}"]
        rows = [i for i in range(ROWS) if ledger.marks_N[i] == bit]
        rows.sort(key=lambda i: (-int(ledger.times_N[i]), sign * float(ledger.loss_N[i]), i))
        assert [row.row for row in group.rows] == rows[:5]
        assert group.count == len(rows)
    never = [row.row for row in shown["Never a candidate"].rows]
    losses = ledger.loss_N[ledger.times_N == 0]
    assert (ledger.loss_N[never[0]], ledger.loss_N[never[-1]]) == (losses.min(), losses.max())
    assert row_groups(ledger, 0) == ()


def test_the_command(run: Training, store: EmbeddingStore, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, folder = tmp_path / "r.html", str(run.folder)
    assert main(["report", folder, "-o", str(out), "--title", "mine"]) == 0
    assert "report: " in capsys.readouterr().out
    page, found = read(out)
    assert "mine" in found.text
    assert main(["report", folder, "-o", str(out)]) == 2
    assert main(["report", folder, "-o", str(out), "--overwrite", "--without-pool", "--json"]) == 0
    without, _ = read(out)
    assert 'id="rows"' in page
    assert 'id="rows"' not in without
    assert main(["report", folder, "-o", str(run.folder / LOG), "--overwrite"]) == 2
    assert "is a file of the run" in capsys.readouterr().err
    for more in (["--covariance"], ["--clusters", "x"], ["--metadata", "x"]):
        assert main(["report", folder, "-o", str(tmp_path / "x.html"), *more]) == 2
        assert "are for selections, not for a training run" in capsys.readouterr().err


def test_invalid_arguments_and_damaged_runs_raise(run: Training, store: EmbeddingStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="examples = -1"):
        write_run_report(run, tmp_path / "r.html", examples=-1)
    with pytest.raises(UsageError, match="a pool of 300 rows for a run on 301"):
        write_run_report(dataclasses.replace(run, rows=301), tmp_path / "r.html", store=store)
    broken = make_run(tmp_path / "run", store, epochs=2)
    (broken.folder / LEDGER).write_bytes(b"no")
    with pytest.raises(PoolError, match="ledger.npz"):
        write_run_report(broken, tmp_path / "r.html", store=store)
    assert not (tmp_path / "r.html").exists()
