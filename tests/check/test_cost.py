"""The model of what a run costs: what it depends on, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.pools import make, write_npy
from thresher import Serial, build, open_store
from thresher.check.calibration import calibrated
from thresher.check.cost import Cluster, Constants, Rows, estimate, rows_of
from thresher.cli.main import main
from thresher.errors import UsageError

ROWS = Rows(10**9, 768, files=1_000, remote=True)
LARGE = Cluster(16, 32, 2e9, 0.03)
DENSITY = build("density", {"keep": "30%"})
SEMDEDUP = build("semdedup", {"eps": 0.1})
CLIP_SCORE = build("clip-score", {"keep": "50%"})


def test_by_hand() -> None:
    """One pass of a given clustering, computed here in another way."""
    known = Constants(products=1e9, pairs=1e9, prepared=1e12, sums=1e12, row=0, task=0, step=0, start=0)
    step = build("density", {"keep": "30%", "clusters": 1_000, "centroids": "c.npy"})
    rows = Rows(16_384 * 100, 64, fields=("image",))
    found = estimate([step], rows, Cluster(1, 4, 1e15, 0), known).steps[-1]
    products = 16_384 * 100 * 1_000 * 64
    assert found.seconds == pytest.approx(products / 1e9 / 4, rel=0.01)
    assert found.read == 16_384 * 100 * 64 * 2
    assert (found.rows_out, found.requests, found.bottleneck) == (int(0.3 * 16_384 * 100), 0, "compute")
    waiting = estimate([step], replace(rows, remote=True), Cluster(1, 4, 1e15, 1.0), known).steps[-1]
    assert waiting.requests == 100
    assert waiting.seconds - found.seconds == pytest.approx(100 / 4, rel=0.01)
    slow = estimate([step], rows, Cluster(1, 4, 1e6, 0), known).steps[-1]
    assert slow.bottleneck == "read"
    assert slow.seconds - found.seconds == pytest.approx(found.read / 1e6, rel=0.01)


def test_more_of_anything_that_helps_is_not_slower() -> None:
    steps = [CLIP_SCORE, DENSITY, SEMDEDUP]
    base = estimate(steps, ROWS, LARGE)
    assert [step.name for step in base.steps] == ["check", "clip-score", "density", "semdedup"]
    assert [step.rows_in for step in base.steps] == [10**9, 10**9, 5 * 10**8, 15 * 10**7]
    assert base.seconds > sum(step.seconds for step in base.steps) > base.seconds / 2
    for better in (
        replace(LARGE, nodes=32),
        replace(LARGE, cores=64),
        replace(LARGE, bandwidth=4e9),
        replace(LARGE, latency=0),
    ):
        assert estimate(steps, ROWS, better).seconds <= base.seconds
    assert base.doubled == pytest.approx(estimate(steps, ROWS, replace(LARGE, nodes=32)).seconds)
    assert base.doubled >= base.seconds / 2  # the driver does not get faster
    for worse in (replace(ROWS, count=2 * 10**9), replace(ROWS, dim=1024), replace(ROWS, bytes=4)):
        assert estimate(steps, worse, LARGE).seconds > base.seconds


def test_rows_are_written_in_cluster_order_where_single_rows_are_slow() -> None:
    """Remote ones, on several nodes, and in large files: as runs and merged, or as one run if they are few."""
    found = estimate([SEMDEDUP, SEMDEDUP], ROWS, LARGE)
    assert [step.written > 0 for step in found.steps] == [False, True, True]
    assert found.steps[1].written == 2 * 10**9 * 768 * 2
    few = estimate([SEMDEDUP], replace(ROWS, count=10**4), LARGE)
    assert few.steps[1].written == 10**4 * 768 * 2
    local = replace(ROWS, remote=False)
    assert estimate([SEMDEDUP], local, LARGE).steps[1].written > 0
    written = {}
    for n in (10**9, 2_800_000, 2_700_000):  # from 4 GiB on
        alone = estimate([SEMDEDUP], replace(local, count=n), replace(LARGE, nodes=1)).steps[1]
        written[n], requests = alone.written, alone.requests
        assert requests == 0
        pages = alone.driver_mapped - 48 * n
        assert pages == (0 if alone.written else n * 768 * 2)  # read in place, a page of the file for each row
    assert written == {10**9: found.steps[1].written, 2_800_000: 2 * 2_800_000 * 768 * 2, 2_700_000: 0}
    assert found.steps[0].requests >= 3 * 1_000 + 2 * 10**9 / 16_384


def test_the_time_of_a_row_of_semdedup_does_not_grow() -> None:
    """From 10^6 to 10^8 rows by at most a third; with clusters for the square root of the rows it grew five times."""
    known = Constants(task=0, step=0, row=0)
    each = {}
    for n in (10**6, 2 * 10**6, 10**7, 7 * 10**7, 10**8):
        rows = Rows(n, 64)
        each[n] = estimate([SEMDEDUP], rows, Cluster(1, 2, 1e12), known).steps[-1].parts["compute"] / n
    assert all(each[n] < 1.3 * each[10**6] for n in each)
    given = [
        estimate([replace(SEMDEDUP, clusters=round((n / 2) ** 0.5))], Rows(n, 64), Cluster(1, 2, 1e12), known)
        for n in (10**6, 10**8)
    ]
    fixed = [run.steps[-1].parts["compute"] for run in given]
    assert fixed[1] > 3 * 100 * fixed[0]
    assert fixed[0] == pytest.approx(each[10**6] * 10**6, rel=0.01)


def test_memory_of_the_driver_is_what_was_measured() -> None:
    """In benchmarks/scale.py, N x 64: the growth of own memory for a row, in docs/performance.md."""
    for step, least, most in ((CLIP_SCORE, 6.4, 10.3), (replace(DENSITY, clusters=500), 4.3, 6.1), (SEMDEDUP, 7.9, 10)):
        small, large = (estimate([step], Rows(n, 64), Cluster()).steps[-1] for n in (10**8, 10**9))
        assert least <= (large.driver_memory - small.driver_memory) / 9e8 <= most
        assert large.driver_mapped >= 8 * 10**9
    whole, part = (estimate([CLIP_SCORE] * 2, ROWS, LARGE).steps[i].driver_memory for i in (1, 2))
    assert part - whole == 8 * 5 * 10**8  # ids of the rows that are left
    held, streamed = (estimate([replace(DENSITY, sample=s)], ROWS, LARGE).steps[-1] for s in ("500000", "all"))
    assert held.driver_memory - streamed.driver_memory == 4 * 500_000 * 768


def test_several_nodes_add_up_the_sums_of_k_means() -> None:
    """The driver receives one an iteration, and 12 bytes for each training row; alone it adds up those of each task."""
    step, rows = replace(DENSITY, clusters=1_000, sample="1000000"), Rows(10**8, 512)
    one, several = (estimate([step], rows, Cluster(nodes)).steps[-1].received for nodes in (1, 16))
    assert several == 20 * (8 * 1_000 * 512 + 12 * 10**6) + 8 * 10**8
    assert one > 2 * several


def test_clipcov_compares_the_rows_of_classes_unless_nothing_is_clamped() -> None:
    """Images with texts once, and with those of the rows that are kept both ways; more classes are less work."""
    known = Constants(products=1e15, pairs=1e9, prepared=1e15, sums=1e15, row=0, task=0, step=0)
    one = Cluster(1, 1, 1e15)
    step, rows = build("clipcov", {"keep": "25%", "clusters": 100}), Rows(10**6, 64)

    def seconds(**changes: Any) -> float:
        return estimate([replace(step, **changes)], rows, one, known).steps[-1].seconds

    products = 10**6 * 10**6 / 100 * 64 / 1e9
    assert seconds() == pytest.approx(1.5 * products, rel=0.01)
    assert seconds(keep="50%") == pytest.approx(2 * products, rel=0.01)
    assert seconds(clusters=1_000) == pytest.approx(0.15 * products, rel=0.02)
    assert seconds(clamp="none") < 0.01 * products
    local, remote = (estimate([step], replace(rows, remote=remote), LARGE).steps[-1] for remote in (False, True))
    assert remote.written == local.written == 2 * 10**6 * 2 * 64 * 2  # several nodes: images and texts, then merged
    assert estimate([step], rows, one).steps[-1].written == 0


def test_methods_that_it_does_not_know_are_named() -> None:
    found = estimate([build("hkmeans", {"keep": "50%", "levels": "10"}), DENSITY], ROWS, LARGE)
    assert found.missing == ("hkmeans",)
    assert [step.name for step in found.steps] == ["check", "density"]


@pytest.mark.parametrize("wrong", [{"count": 0}, {"dim": 0}, {"bytes": 0}])
def test_rows_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        replace(ROWS, **wrong)
    with pytest.raises(UsageError, match="nodes and cores must be at least 1"):
        Cluster(0)


@pytest.mark.parametrize("name", ["count", "dim", "bytes", "files", "nodes", "cores"])
def test_numbers_that_no_float_holds(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} = a whole number of .*; the largest number allowed is"):
        replace(LARGE if name in ("nodes", "cores") else ROWS, **{name: 10**5000})


def test_speeds_are_measured(tmp_path: Path) -> None:
    found = calibrated(Serial(), 32, seconds=0.05)
    assert 1e8 < found.products < 1e12
    assert 1e8 < found.pairs < 1e12
    assert 1e6 < found.prepared < 1e11
    assert 0 < found.task < 0.01
    store = open_store(write_npy(tmp_path / "pool", make(300, 16), cuts=[100]))
    assert rows_of(store) == Rows(300, 16, 2, ("image", "text"), 2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = write_npy(tmp_path / "pool", make(300, 16))
    assert main(["plan", "density", pool, "--nodes", "2", "--cores", "4", "--bandwidth", "2GB/s", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["dim"], found["cluster"]["bandwidth"]) == (300, 16, 2e9)
    assert [step["name"] for step in found["steps"]] == ["check", "density"]
    assert main(["plan", "semdedup", "--rows", "10_000_000_000", "--dim", "768", "--nodes", "16", "--remote"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("10,000,000,000 rows on 16 nodes: about ")
    assert "with 32 nodes: about" in out
    assert "--calibrate measures those of this machine" in out
    (tmp_path / "r.toml").write_text('[[step]]\nmethod = "clip-score"\nkeep = "50%"\n')
    assert main(["plan", str(tmp_path / "r.toml"), pool]) == 0
    for words, why in (
        (["density"], "give either a pool or --rows and --dim"),
        (["density", pool, "--rows", "5"], "give either a pool or --rows and --dim"),
        (["density", "--rows", "5"], "--rows 5: give the dimensions of the embeddings too, such as --dim 768"),
        (["density", "--rows", "0", "--dim", "4"], "--rows 0: give a whole number from 1 to 1,000,000,000,000,000"),
        (["density", "--rows", "9" * 30, "--dim", "4"], "give a whole number from 1 to 1,000,000,000,000,000"),
        (["density", "--rows", "1e10", "--dim", "4"], "type --rows 10000000000"),
        (["density", "--rows", "many", "--dim", "4"], "--rows many: give a whole number"),
        (["density", pool, "--bandwidth", "2"], "write a number and a unit, such as 2GB/s"),
        (["density", pool, "--bandwidth", "0GB/s"], "bandwidth above 0"),
        (["nonsense", pool], "nonsense"),
    ):
        capsys.readouterr()
        assert main(["plan", *words]) == 2, words
        assert why in capsys.readouterr().err
