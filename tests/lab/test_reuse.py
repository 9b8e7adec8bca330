"""Runs that another plan has finished are taken if, and only if, they are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.lab.conftest import PLAN, jobs_in_this_process, plain
from thresher.errors import OutputError
from thresher.lab.plan import Plan
from thresher.lab.runner import run_plan

ROWS = ["full", "full-short", "scan", "random", "coreset"]
# The same runs under other names, after another corpus, with parts of the proxy that no row needs.
OTHER = (
    PLAN.replace('name = "small"', 'name = "second"')
    .replace("[proxy]\nepochs = 1", "[proxy]\nepochs = 4")
    .replace('[[corpus]]\nname = "noisy"', '[[corpus]]\nname = "as-is"\n[[corpus]]\nname = "swapped-30"')
    .replace('name = "scan"', 'name = "scan-20"\nabout = "A remark."')
    .replace('coreset_of = "scan"', 'coreset_of = "scan-20"')
    .replace('name = "random"\n', 'name = "at-random"\nkeep = ["70%"]\n')
    .replace('{ method = "random", keep = "70%" }', '{ method = "random" }')
)
ROWS_OF_OTHER = ["full", "full-short", "scan-20", "at-random-70%", "coreset"]
NAMES = dict(zip(ROWS_OF_OTHER, ["full", "full-short", "scan", "random", "coreset"], strict=True))  # in the first


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reuse-first")
    with jobs_in_this_process():
        run_plan(Plan.parse(PLAN).narrowed(ROWS), folder, data=data, workers=1)
    return folder


@pytest.fixture(scope="module")
def few(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only the runs that most tests look for."""
    folder = tmp_path_factory.mktemp("reuse-few")
    with jobs_in_this_process():
        run_plan(Plan.parse(PLAN).narrowed(ROWS[:2]), folder, data=data, workers=1)
    return folder


def ran(begun: list[str]) -> list[str]:
    """The runs among the jobs that were begun."""
    return [name[name.index("/runs/") + 1 :] for name in begun if "/runs/" in name]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [ROWS_OF_OTHER[:2], ROWS_OF_OTHER], ids=["two rows", "every kind"])
def test_same_runs_are_taken_and_the_results_are_those_of_running_them(
    rows: list[str], data: Path, tmp_path: Path, first: Path, in_process: list[str]
) -> None:
    noisy = [f"runs/swapped-30/{row}/seed-0" for row in rows]
    plan = Plan.parse(OTHER).narrowed(rows)
    run_plan(plan, tmp_path / "second", data=data, workers=1, others=[first])
    assert not set(noisy) & set(ran(in_process))
    assert {f"runs/as-is/{row}/seed-0" for row in rows} <= set(ran(in_process))
    for row, name in zip(rows, noisy, strict=True):
        taken = json.loads((tmp_path / "second" / name / "result.json").read_text())
        assert taken["taken_from"] == str(first / f"runs/noisy/{NAMES[row]}/seed-0")

    in_process.clear()
    run_plan(plan, tmp_path / "alone", data=data, workers=1)
    assert set(noisy) <= set(ran(in_process))
    assert plain(tmp_path / "second") == plain(tmp_path / "alone")

    # The same command continues, and what was taken can be taken again.
    in_process.clear()
    run_plan(plan, tmp_path / "second", data=data, workers=1, others=[first])
    again = Plan.parse(PLAN).narrowed([NAMES[row] for row in rows])
    run_plan(again, tmp_path / "third", data=data, workers=1, others=[tmp_path / "second"])
    assert ran(in_process) == []
    assert plain(tmp_path / "third") == [run for run in plain(first) if run["row"] in {NAMES[row] for row in rows}]


@pytest.mark.slow
def test_details_alone_are_enough_and_can_be_passed_on(
    data: Path, tmp_path: Path, few: Path, in_process: list[str]
) -> None:
    """A published ``details.json`` goes on where its plan ended, on any machine: it names none."""
    published = Path(shutil.copy(few / "details.json", tmp_path / "published.json"))
    plan = Plan.parse(OTHER).narrowed(["full-short"], ["swapped-30"])
    run_plan(plan, tmp_path / "second", data=data, workers=1, others=[published])
    assert [name[name.index("/second/") + 8 :] for name in in_process] == ["corpora/swapped-30"]  # and no trial run
    assert plain(tmp_path / "second") == plain(few)
    taken = json.loads((tmp_path / "second/runs/swapped-30/full/seed-0/result.json").read_text())
    assert taken["taken_from"] == f"{published}: runs/noisy/full/seed-0"

    details = (tmp_path / "second/details.json").read_text()
    assert str(tmp_path.parent) not in details
    (tmp_path / "passed-on").mkdir()
    shutil.copy(tmp_path / "second/details.json", tmp_path / "passed-on")
    again = Plan.parse(PLAN).narrowed(ROWS[:2])
    run_plan(again, tmp_path / "third", data=data, workers=1, others=[tmp_path / "passed-on"])
    assert ran(in_process) == []
    assert plain(tmp_path / "third") == plain(few)


def test_details_of_other_data_settings_or_versions_count(
    data: Path, tmp_path: Path, few: Path, in_process: list[str]
) -> None:
    """A setting that an older version did not write has its default; other values are other runs."""
    published, at = json.loads((few / "details.json").read_text()), tmp_path / "published.json"
    older = {**published, "plan": {**published["plan"], "trainer": dict(published["plan"]["trainer"])}}
    assert older["plan"]["trainer"].pop("chunk") is None
    plan = Plan.parse(PLAN).narrowed(ROWS[:2])
    for i, (details, taken) in enumerate(((older, True), ({**published, "data_bytes": [1, 2]}, False))):
        at.write_text(json.dumps(details))
        in_process.clear()
        run_plan(plan, tmp_path / str(i), data=data, workers=1, minutes=None if taken else 0, others=[at])
        assert len(json.loads((tmp_path / str(i) / "results.json").read_text())["runs"]) == (2 if taken else 0)
        assert ran(in_process) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seeds = 1", "seeds = [1]"),
        *(
            pytest.param(old, new, marks=pytest.mark.slow)
            for old, new in (
                ("epochs = 4\nbatch_size", "epochs = 5\nbatch_size"),
                ("batch_size = 20", "batch_size = 10"),
                ("swapped = 0.3", "swapped = 0.2"),
                ('labels = ["kind"]', 'labels = ["kind"]\ntemplates = ["a {}"]'),
            )
        ),
    ],
)
def test_runs_that_differ_are_not_taken(
    old: str, new: str, data: Path, tmp_path: Path, few: Path, in_process: list[str]
) -> None:
    plan = Plan.parse(PLAN.replace(old, new)).narrowed(["full-short"])
    run_plan(plan, tmp_path / "second", data=data, workers=1, others=[few])
    assert len(ran(in_process)) == 2


@pytest.mark.parametrize(
    "recorded", ["float32", *(pytest.param(other, marks=pytest.mark.slow) for other in ("bfloat16", None))]
)
def test_the_precision_of_a_run_counts(
    recorded: str | None,
    data: Path,
    tmp_path: Path,
    few: Path,
    in_process: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That which "auto" is on this machine; that of results of older versions is not known."""
    monkeypatch.setattr("thresher.train.loop.has_bfloat16", lambda: False)
    result = tmp_path / "other/runs/noisy/full/seed-0/result.json"
    shutil.copytree(few, tmp_path / "other")
    known = json.loads(result.read_text())
    assert known.pop("precision") in ("bfloat16", "float32")
    result.write_text(json.dumps(known | ({"precision": recorded} if recorded else {})))
    run_plan(
        Plan.parse(PLAN).narrowed(["full-short"]),
        tmp_path / "second",
        data=data,
        workers=1,
        others=[tmp_path / "other"],
    )
    assert ("runs/noisy/full/seed-0" in ran(in_process)) == (recorded != "float32")


@pytest.mark.slow
def test_only_rows_that_differ_are_run(data: Path, tmp_path: Path, first: Path, in_process: list[str]) -> None:
    """With another share ``full`` is the same run, and only ``full``."""
    plan = Plan.parse(PLAN.replace("batch_size = 20", "batch_size = 20\nshare = 0.5")).narrowed(["random"])
    run_plan(plan, tmp_path / "second", data=data, workers=1, others=[first])
    names = ("full-short", "random")
    assert ran(in_process) == [f"runs/noisy/{name}/seed-0" for name in names]


@pytest.mark.slow
def test_a_run_whose_files_are_needed_is_not_taken(
    data: Path, tmp_path: Path, first: Path, in_process: list[str]
) -> None:
    plan = Plan.parse(PLAN.replace('coreset_of = "scan"\nkeep = "70%"', 'coreset_of = "scan"\nkeep = "60%"'))
    run_plan(plan.narrowed(["coreset"]), tmp_path / "second", data=data, workers=1, others=[first])
    names = ("scan", "coreset")
    assert ran(in_process) == [f"runs/noisy/{name}/seed-0" for name in names]


@pytest.mark.slow
def test_other_data_of_the_same_name_are_other_runs(
    data: Path, tmp_path: Path, first: Path, in_process: list[str]
) -> None:
    for name, first_row in (("train.parquet", 1), ("held.parquet", 0)):
        pq.write_table(pq.read_table(data / name).slice(first_row), tmp_path / name)
    plan = Plan.parse(PLAN).narrowed(["full"])
    run_plan(plan, tmp_path / "second", data=tmp_path, workers=1, others=[first])
    assert ran(in_process) == ["runs/noisy/full/seed-0", "runs/noisy/full-short/seed-0"]


def test_a_folder_without_runs_or_with_damaged_ones_is_refused(data: Path, tmp_path: Path, few: Path) -> None:
    plan, second, text = Plan.parse(PLAN).narrowed(ROWS[:2]), tmp_path / "second", (few / "details.json").read_text()
    with pytest.raises(OutputError, match="has no runs of a plan; give a folder that thresher lab wrote, or the det"):
        run_plan(plan, second, data=data, others=[data])
    published = tmp_path / "published.json"
    damages: list[str | tuple[str, str]] = ["{", "[]", "{}", ("noisy", "../x"), ('"row": "full"', '"row": "none"')]
    damages += [('"seed": 0', '"seed": "0"'), ('"epochs": 4', '"epochs": "a"'), ('"data_bytes"', '"data"')]
    for damage in [*damages, ('"samples_seen": ', '"samples_seen": -')]:
        published.write_text(damage if isinstance(damage, str) else text.replace(*damage))
        assert published.read_text() != text
        with pytest.raises(OutputError, match=r"published.json: (cannot be read|not the details.json of a plan|is )"):
            run_plan(plan, second, data=data, others=[published])
    check_damage(ROWS[:2], ["{", "{}", '{"what": {}}', ('"noisy"', '"none"')], few, data, tmp_path)


@pytest.mark.slow
def test_a_coreset_of_a_row_that_is_not_before_it_is_damage(data: Path, tmp_path: Path, first: Path) -> None:
    check_damage(ROWS, [('"scan"', '"coreset"')], first, data, tmp_path)


def check_damage(rows: list[str], damages: list[str | tuple[str, str]], done: Path, data: Path, tmp_path: Path) -> None:
    """A folder with a damaged job of its last row is refused."""
    shutil.copytree(done, tmp_path / "damaged")
    job = tmp_path / f"damaged/runs/noisy/{rows[-1]}/seed-0/job.json"
    text = job.read_text()
    for damage in damages:
        job.write_text(damage if isinstance(damage, str) else text.replace(*damage))
        assert job.read_text() != text
        with pytest.raises(OutputError, match=r"cannot be read, it may be damaged"):
            run_plan(Plan.parse(PLAN).narrowed(rows), tmp_path / "second", data=data, others=[tmp_path / "damaged"])
