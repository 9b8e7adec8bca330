"""Plans run: everything once, resumably, at equal samples, with the results that the contract names."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.lab.conftest import PLAN, plain, results
from tests.train.conftest import POOL, emoji
from thresher.errors import OutputError, PoolError, UsageError
from thresher.lab import jobs, work
from thresher.lab.plan import Plan
from thresher.lab.runner import described, run_plan
from thresher.lab.work import read_result
from thresher.runtime.engine import make_engine

ROWS = ["full", "full-short", "scan", "rho", "coreset", "c-rho", "drrho", "cabs", "random"]


@pytest.mark.parametrize(
    "rows", [["random"], pytest.param(ROWS, marks=pytest.mark.slow)], ids=["one row", "every kind"]
)
def test_a_plan_runs_once_and_every_row_has_its_cost(
    rows: list[str], data: Path, tmp_path: Path, in_process: list[str]
) -> None:
    plan, out = Plan.parse(PLAN).narrowed(rows), tmp_path / "out"
    run_plan(plan, out, data=data, workers=1)
    found = {run["row"]: run for run in results(out)["runs"]}
    assert results(out)["plan"] == "small"
    assert list(found) == [row.name for row in plan.rows]
    keys = {"row", "seed", "metrics", "samples_seen", "scored_forwards", "seconds", "share_pruned"}
    assert all(run.keys() == keys for run in found.values())
    # E1: all but full saw as many samples; 4 epochs of 5 batches of 20, and 70% of that.
    assert found["full"]["samples_seen"] == 400
    assert {run["samples_seen"] for name, run in found.items() if name != "full"} == {280}
    # E2: with the forwards of everything that a row needed.
    forwards = {
        "full": 400,
        "full-short": 280,
        "scan": 280,
        "random": 280,
        "coreset": 280 + 280,
        "c-rho": 280 + 2 * (100 + 100),  # two proxies of an epoch, each embeds all rows
        "drrho": 280 + 2 * (100 + 100),
        "cabs": 280 + 2 * (100 + 100),
        "rho": 280 + 2 * 40 + 100,  # two models on half of the rows in batches of 20; each row is scored once
    }
    assert {name: run["scored_forwards"] for name, run in found.items()} == {name: forwards[name] for name in found}
    assert found["random"]["share_pruned"] == pytest.approx(0.3)
    assert found["full"]["share_pruned"] == found["full-short"]["share_pruned"] == 0
    for run in found.values():
        assert all(0 <= value <= 100 for value in run["metrics"].values())
        assert {"held-out R@1", "selection zero-shot", "held-out average"} <= run["metrics"].keys()
    text = (out / "table.md").read_text()
    assert "100 rows, 30 swapped" in text
    assert "| full-short | 1 | 280 | 280 |" in text
    assert re.search(r"\| row \| seeds \| as it is \| swapped \|\n.*\n(\|.*\n)*\| random \| 1 \| \d+\.\d% \|", text)
    assert re.search(r"batches of 20, in (float32|bfloat16); all runs", text)
    assert "seconds of all these; 1 run ran at a time. full-short is" in text
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    details = json.loads((out / "details.json").read_text())
    assert details["runs"][0]["images_decoded"] == 100
    assert str(tmp_path) not in json.dumps(details["plan"])
    dropped = {run["row"]: run.get("kept") for run in details["runs"]}["random"]
    assert dropped["swapped"]["rows"] == 30
    assert dropped["swapped"]["left_out"] + dropped["as it is"]["left_out"] == 30

    # Nothing is done again; a further seed runs only that seed.
    before, begun = plain(out), len(in_process)
    run_plan(plan, out, data=data, workers=1)
    assert plain(out) == before
    assert len(in_process) == begun
    if len(rows) > 1:
        run_plan(plan.narrowed(["random"], seeds=2), out, data=data, workers=1)
        assert in_process[begun:] == [f"runs/noisy/{row}/seed-1" for row in ("full", "full-short", "random")]

    # A job that was killed before its end is done again, with the same result.
    (out / f"runs/noisy/{rows[-1]}/seed-0/result.json").unlink()
    run_plan(plan, out, data=data, workers=1)
    assert plain(out) == before

    # A job begun before a setting existed had its default.
    job = out / "runs/noisy/random/seed-0/job.json"
    older = json.loads(job.read_text())
    assert older["what"]["row"].pop("compose") == ""
    job.write_text(json.dumps(older))
    run_plan(plan, out, data=data, workers=1)
    older["what"]["row"]["compose"] = "diversity"
    job.write_text(json.dumps(older))
    with pytest.raises(OutputError, match=r"was begun with other settings \(compose\)"):
        run_plan(plan, out, data=data)
    (out / "runs/noisy/random/seed-0/job.json").unlink()

    # Other settings in the same folder are refused, and name what differs.
    other = Plan.parse(PLAN.replace("epochs = 4", "epochs = 5"))
    with pytest.raises(OutputError, match=r"was begun with other settings \(epochs\)"):
        run_plan(other, out, data=data)

    # So are other data of the same name.
    shutil.copytree(data, tmp_path / "data", dirs_exist_ok=True)
    train = tmp_path / "data" / plan.data.train
    pq.write_table(pq.read_table(train).slice(1), train)
    with pytest.raises(OutputError, match=r"was begun with other settings \(data_bytes\)"):
        run_plan(plan, out, data=tmp_path / "data")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [["random"], ROWS], ids=["one row", "every kind"])
def test_training_data_need_no_key_column(data: Path, tmp_path: Path, in_process: list[str], rows: list[str]) -> None:
    pq.write_table(pq.read_table(data / "train.parquet").drop_columns(["key"]), tmp_path / "train.parquet")
    shutil.copy(data / "held.parquet", tmp_path)
    plan = Plan.parse(PLAN.replace('[[corpus]]\nname = "noisy"\nswapped = 0.3\n', "")).narrowed(rows)
    run_plan(plan, tmp_path / "out", data=tmp_path, workers=1)
    shares = {run["row"]: run["share_pruned"] for run in results(tmp_path / "out")["runs"]}
    assert shares.keys() == {"full", "full-short", *rows}
    for row in {"random", "c-rho", "coreset"} & set(rows):
        assert shares[row] == pytest.approx(0.3)


def test_a_corpus_made_before_the_bytes_of_its_data_were_written_is_continued(tmp_path: Path) -> None:
    (job, *_) = jobs.jobs_of(Plan.parse(PLAN))
    older = {name: value for name, value in job.what.items() if name != "data_bytes"}
    path = tmp_path / job.name / "job.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"what": older}))
    jobs.check(tmp_path, job)
    path.write_text(json.dumps({"what": {**older, "data_bytes": [1]}}))
    (path.parent / "result.json").write_text("{}")
    with pytest.raises(OutputError, match=r"was begun with other settings \(data_bytes\)"):
        jobs.check(tmp_path, job)


def test_a_share_that_so_few_rows_do_not_allow_is_refused_before_the_first_run(
    data: Path, tmp_path: Path, in_process: list[str]
) -> None:
    """Of 100 rows a batch of 60 leaves 40 out in each epoch, so that the run has an epoch and not four."""
    plan = Plan.parse(PLAN.replace("batch_size = 20", "batch_size = 60")).narrowed(["scan"])
    with pytest.raises(UsageError, match=r"row scan: cannot prune 20.0% over 2 epochs"):
        run_plan(plan, tmp_path / "out", data=data, workers=1)
    assert in_process == ["corpora/noisy"]


def test_a_remark_on_a_row_is_not_a_setting(tmp_path: Path) -> None:
    old, new, other = (
        next(job for job in jobs.jobs_of(Plan.parse(text)) if job.name == "runs/noisy/scan/seed-0")
        for text in (PLAN, PLAN.replace("prune = 0.2", 'prune = 0.2\nabout = "new"'), PLAN.replace("0.2", "0.1"))
    )
    path = tmp_path / old.name / "job.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"what": old.what}))
    jobs.check(tmp_path, new)
    (path.parent / "result.json").write_text("{}")
    with pytest.raises(OutputError, match=r"was begun with other settings \(prune\)"):
        jobs.check(tmp_path, other)


def test_a_changed_run_is_begun_again_if_it_has_nothing_to_lose(tmp_path: Path) -> None:
    """One that failed at once may be mended in the plan; a checkpoint or a result is never removed."""
    old, new = (
        next(job for job in jobs.jobs_of(Plan.parse(text)) if job.name == "runs/noisy/scan/seed-0")
        for text in (PLAN, PLAN.replace("0.2", "0.1"))
    )
    own = tmp_path / old.name
    for kept in ("run/checkpoint.pt", "result.json", None):
        (own / "run").mkdir(parents=True)
        (own / "job.json").write_text(json.dumps({"what": old.what}))
        (own / "output.txt").write_text("error: no\n")
        if kept:
            (own / kept).write_text("{}")
            with pytest.raises(OutputError, match=r"was begun with other settings \(prune\)"):
                jobs.check(tmp_path, new)
            (own / kept).unlink()
            (own / "run").rmdir()
        else:
            jobs.check(tmp_path, old)
            assert (own / "output.txt").exists()
            jobs.check(tmp_path, new)
            assert not own.exists()


@pytest.mark.parametrize("kept", ["pool/img_emb/img_emb_0000.npy", "pool.cost.json", "early-run/checkpoint.pt"])
def test_a_changed_proxy_keeps_the_models_and_embeddings_that_are_done(tmp_path: Path, kept: str) -> None:
    old, new = (
        next(job for job in jobs.jobs_of(Plan.parse(text)) if job.kind == "proxy")
        for text in (PLAN, PLAN.replace("early = 1", "early = 2"))
    )
    path = tmp_path / old.name / kept
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    (tmp_path / old.name / "job.json").write_text(json.dumps({"what": old.what}))
    with pytest.raises(OutputError, match=r"was begun with other settings \(early\)"):
        jobs.check(tmp_path, new)
    assert path.exists()


@pytest.mark.slow
def test_a_job_that_was_killed_does_not_repeat_its_parts_that_are_done(
    data: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = Plan.parse(PLAN).narrowed(["c-rho"]), tmp_path / "out"
    embedded, train, trained = work._embedded, work._train, []

    def killed(task: Any, encoder: str, cost: Any, name: str) -> Any:
        if name == "early":
            raise UsageError("killed")
        return embedded(task, encoder, cost, name)

    def noted(task: Any, folder: Path, **how: Any) -> Any:
        trained.append(folder.name)
        return train(task, folder, **how)

    with monkeypatch.context() as patched:
        patched.setattr(work, "_embedded", killed)
        with pytest.raises(UsageError, match=r"proxies/noisy: killed"):
            run_plan(plan, out, data=data, workers=1)
    (out / "trial/result.json").unlink()
    (out / "trial/run").mkdir()
    (out / "trial/run/checkpoint.pt").write_text("what is left of a run that was being removed")
    monkeypatch.setattr(work, "_train", noted)
    run_plan(plan, out, data=data, workers=1)
    assert trained == ["run", "early-run", "run"]
    found = {run["row"]: run["scored_forwards"] for run in results(out)["runs"]}
    assert found["c-rho"] == 280 + 2 * (100 + 100)
    assert not list(out.rglob("checkpoint.pt"))


def test_another_corpus_in_the_same_folder_has_a_trial_run_of_its_own(tmp_path: Path) -> None:
    text = PLAN + '[[corpus]]\nname = "clean"\n'
    noisy, clean = (
        next(job for job in jobs.jobs_of(Plan.parse(text).narrowed([], [name])) if job.kind == "trial")
        for name in ("noisy", "clean")
    )
    path = tmp_path / "trial/job.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"what": noisy.what}))
    (path.parent / "result.json").write_text("{}")
    jobs.check(tmp_path, noisy)
    assert (path.parent / "result.json").exists()
    jobs.check(tmp_path, clean)
    assert not path.parent.exists()


@pytest.mark.slow
def test_a_job_that_fails_is_named_and_the_others_are_done(data: Path, tmp_path: Path, in_process: list[str]) -> None:
    text = PLAN.replace(
        '[[row]]\nname = "rho"\npolicy = "rho"',
        '[[row]]\nname = "bad"\npolicy = "rho"\noptions = { reference = "column:nothing" }',
    )
    plan = Plan.parse(text).narrowed(["bad"])
    with pytest.raises(UsageError, match=r"1 job failed: runs/noisy/bad/seed-0: .*'nothing'.*output.txt"):
        run_plan(plan, tmp_path / "out", data=data, workers=1)
    assert [run["row"] for run in results(tmp_path / "out")["runs"]] == ["full", "full-short"]


@pytest.mark.slow
def test_a_plan_runs_on_an_engine_and_in_a_folder_that_was_moved(
    data: Path, tmp_path: Path, in_process: list[str]
) -> None:
    plan, out = Plan.parse(PLAN).narrowed(["random"]), tmp_path / "first/out"
    bad = Plan.parse(PLAN.replace('method = "random", keep = "70%"', 'method = "filter", where = "text > 0"'))
    with pytest.raises(UsageError, match=r"1 job failed: runs/noisy/random/seed-0: .*text"):
        run_plan(bad.narrowed(["random"]), out, data=data, engine=make_engine("serial"))
    assert in_process[:2] == ["corpora/noisy", "trial"]
    assert [run["row"] for run in results(out)["runs"]] == ["full", "full-short"]
    moved = tmp_path / "second/out"
    shutil.copytree(out, moved)
    shutil.rmtree(out)
    shutil.rmtree(moved / "runs/noisy/random")
    run_plan(plan, moved, data=data, engine=make_engine("serial"))
    assert [run["row"] for run in results(moved)["runs"]] == ["full", "full-short", "random"]
    with pytest.raises(UsageError, match="minutes is for runs on this machine"):
        run_plan(plan, moved, data=data, engine=make_engine("serial"), minutes=1)


@pytest.mark.slow
def test_a_run_that_was_begun_continues_in_a_folder_that_was_moved(
    data: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, moved = Plan.parse(PLAN).narrowed(["random"]), tmp_path / "first/out", tmp_path / "second/out"

    def ended(*_: Any) -> None:
        raise UsageError("ended before its result was written")

    with monkeypatch.context() as patched:
        patched.setattr(work, "metrics_of", ended)
        with pytest.raises(UsageError, match="ended before"):
            run_plan(plan, out, data=data, workers=1)
    moved.parent.mkdir()
    out.rename(moved)
    run_plan(plan, moved, data=data, workers=1)
    assert [run["row"] for run in results(moved)["runs"]] == ["full", "full-short", "random"]


def test_missing_data_are_named_before_anything_is_done(data: Path, tmp_path: Path) -> None:
    plan = Plan.parse(PLAN.replace("held.parquet", "nothing.parquet"))
    with pytest.raises(PoolError, match=r"nothing\.parquet: does not exist; give the folder of the data with --data"):
        run_plan(plan, tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; name a folder"):
        run_plan(Plan.parse(PLAN), tmp_path / "file", data=data)


def test_time_is_up_and_the_same_command_continues(data: Path, tmp_path: Path, in_process: list[str]) -> None:
    plan = Plan.parse(PLAN).narrowed(["random"])
    assert run_plan(plan, tmp_path / "out", data=data, workers=1, minutes=0) == []
    assert "No run is finished yet" in (tmp_path / "out/table.md").read_text()
    assert in_process == []
    for odd in (-1.0, float("nan")):
        with pytest.raises(UsageError, match=f"minutes = {odd}; give 0 or more"):
            run_plan(plan, tmp_path / "out", data=data, minutes=odd)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("trial/job.json", '{"what": 5}'),
        ("trial/job.json", '{"what": {"sources": {"train": 5}}}'),
        ("trial/result.json", '{"samples'),
        ("trial/result.json", "[]"),
        ("runs/noisy/full/seed-0/result.json", "[" * 100_000),
    ],
)
def test_a_damaged_file_of_a_plan_is_named(
    file: str, content: str, data: Path, tmp_path: Path, in_process: list[str]
) -> None:
    path = tmp_path / "out" / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(OutputError, match=f"{file}: cannot be read, it may be damaged .*; remove its folder"):
        run_plan(Plan.parse(PLAN), tmp_path / "out", data=data, minutes=0)


_RUN = {
    "metrics": {"held-out average": 50.0}, "samples_seen": 10, "share_pruned": 0.5, "scored_forwards": 10,
    "seconds": 1.0, "images_decoded": 10, "kept": {"swapped": {"rows": 4, "left_out": 1}},
}  # fmt: skip
_TRIAL = {"samples_per_second": 100.0, "other_seconds": 1.0}
_CORPUS = {"rows": 100, "evals": ["held-selection.parquet"], "swapped": 3}
_WRONG: list[tuple[str, dict[str, Any], str, list[Any]]] = [
    *[
        ("runs/noisy/full/seed-0", _RUN, name, [None, "x", [], {}, True, -1, 10**400, "\x1b[31m"])
        for name in ("samples_seen", "scored_forwards", "seconds", "images_decoded")
    ],
    ("runs/noisy/full/seed-0", _RUN, "share_pruned", [None, "x", 1.5, []]),
    ("runs/noisy/full/seed-0", _RUN, "metrics", [None, 5, [1], {"held-out average": "x"}, {"a": None}, {"a": 101}]),
    ("runs/noisy/full/seed-0", _RUN, "kept", [5, "x", {"swapped": 1}, {"swapped": {"rows": 0, "left_out": 0}}]),
    ("runs/noisy/full/seed-0", _RUN, "left_out", [{"swapped": {"rows": 1, "left_out": 2}}]),
    ("trial", _TRIAL, "samples_per_second", [None, 0, -1, "x", 1e308]),
    ("trial", _TRIAL, "other_seconds", [None, "x", []]),
    ("corpora/noisy", _CORPUS, "rows", [None, 0, "x", 10**30, [], 1.5]),
    ("corpora/noisy", _CORPUS, "swapped", [None, "x", -1]),
    ("corpora/noisy", _CORPUS, "evals", [None, 5, "x", [5], ["../a.parquet"], ["/etc/passwd"], ["a/b"], ["a\0b"]]),
]


def test_a_result_of_someone_else_is_refused_in_one_line_that_names_the_value(
    data: Path, tmp_path: Path, in_process: list[str]
) -> None:
    out, plan = tmp_path / "out", Plan.parse(PLAN)
    for folder, good, name, values in _WRONG:
        path = out / folder / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        missing = {key: value for key, value in good.items() if key != name}
        wrong = [{**good, name: value} for value in values]
        for content in (*wrong, *([missing] if name not in ("swapped", "kept", "left_out") else [])):
            path.write_text(json.dumps(content))
            with pytest.raises(OutputError, match=f"result.json(: \\w+)*: .*{name}.*; remove its folder") as caught:
                run_plan(plan, out, data=data, minutes=0)
            assert len(str(caught.value)) < 400 + len(str(path))
        path.write_text(json.dumps(good))
    assert [run.row for run in run_plan(plan, out, data=data, minutes=0)] == ["full"]
    assert in_process == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("Unable to allocate 3 GiB"), "out of memory"),
        (OSError(28, "No space left on device", "run"), "No space left on device"),
        (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"), "not valid UTF-8; rename it"),
    ],
)
def test_a_job_says_in_one_line_why_it_failed(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def do(folder: Path) -> None:
        raise error

    (tmp_path / "job.json").write_text('{"what": {"trainer": {"threads": 1}}}')
    monkeypatch.setattr(work, "do", do)
    monkeypatch.setattr(work, "_end_with_parent", lambda: None)
    assert work.main([str(tmp_path)]) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert said in line
    assert line.count("\n") == 1


def test_a_dry_run_says_what_would_run(data: Path) -> None:
    found = described(Plan.parse(PLAN), data)
    assert (found["runs"], found["rows"], found["kind"]) == (9, 100, "parquet")
    shares = {job["name"]: job["of_a_full_run"] for job in found["jobs"]}
    assert shares["runs/noisy/full/seed-0"] == 1.0
    assert shares["runs/noisy/random/seed-0"] == 0.7
    assert set(shares) >= {"corpora/noisy", "proxies/noisy", "references/noisy", "trial"}
    with pytest.raises(UsageError, match=r"held.parquet: has no column 'sort'; it has"):
        described(Plan.parse(PLAN.replace('labels = ["kind"]', 'labels = ["sort"]')), data)


def test_cc3m_as_img2dataset_writes_it_is_one_path_away(tmp_path: Path, data: Path) -> None:
    """The dry run of a plan on tars of img2dataset, as docs/lab.md writes it down."""
    import io
    import tarfile

    (tmp_path / "cc3m").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / f"cc3m/{shard:05d}.tar", "w") as tar:
            for row in range(shard * 4, shard * 4 + 4):
                cells = emoji(8)
                members = {"webp": cells["image"][row].as_py()["bytes"], "txt": cells["text"][row].as_py().encode()}
                for ending, content in {**members, "json": b"{}"}.items():
                    info = tarfile.TarInfo(f"{row:09d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    from thresher import api

    found = api.run_plan(
        "scan-clip", dry_run=True, profile="gpu", train=str(tmp_path / "cc3m/{00000..00001}.tar"),
        evals=[data / "held.parquet"], labels=["kind"], seeds=3,
    )  # fmt: skip
    assert found["kind"] == "webdataset"
    assert found["runs"] % 3 == 0


@pytest.mark.slow
def test_a_killed_plan_continues_to_the_same_results(data: Path, tmp_path: Path) -> None:
    """Real processes: the command is killed twice, its children end with it, and the results are the same."""
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    command = [sys.executable, "-m", "thresher", "lab", str(path), "--data", str(data), "--row", "scan", "--quiet"]
    outs = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "-o", str(outs[0]), "--workers", "1"], check=True, timeout=300)
    for seconds in (20, 25):
        with subprocess.Popen([*command, "-o", str(outs[1]), "--workers", "2"]) as process:
            time.sleep(seconds)
            os.kill(process.pid, signal.SIGKILL)
    subprocess.run([*command, "-o", str(outs[1]), "--workers", "2"], check=True, timeout=300)
    assert plain(outs[0]) == plain(outs[1])
    for one in outs:
        assert not list(one.glob("runs/*/*/*/run/checkpoint.pt"))


def _seconds() -> float:
    """CPU time of all processes that have ended: the wall clock depends on what else the machine does."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@pytest.mark.slow
def test_a_plan_runs_end_to_end_on_the_emoji_pool(tmp_path: Path) -> None:
    """What CI runs: a whole plan, with real processes; under three minutes of one core, five if others share it."""
    out, before = tmp_path / "out", _seconds()
    command = [sys.executable, "-m", "thresher", "lab", "scan-clip", "--profile", "emoji", "--data", str(POOL)]
    subprocess.run([*command, "-o", str(out), "--quiet"], check=True, timeout=900)
    assert _seconds() - before < 300
    found = results(out)
    assert {run["row"] for run in found["runs"]} == {row.name for row in Plan.load("scan-clip", "emoji").rows}
    assert read_result(out / "trial", "trial")["samples_per_second"] > 0
    shutil.rmtree(out)
