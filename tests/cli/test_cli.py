"""The command line as scripts use it: contracts, exit codes, messages."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from thresher import Selection
from thresher.cli.main import main

POOL = str(Path(__file__).parents[2] / "examples" / "twemoji")
ROWS = 3953


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], cache: str) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str, cached: bool = True) -> tuple[int, str, str]:
        code = main([*words, *(["--cache", cache] if cached else [])])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_the_whole_way(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    first, second, third = (str(tmp_path / name) for name in "abc")
    assert run("select", "semdedup", POOL, "-o", first, "--eps", "0.15", "--clusters", "40")[0] == 0
    assert run("select", "clip-score", POOL, "-o", second, "--keep", "80%", "--within", first)[0] == 0
    code, out, err = run(
        "select", "density", POOL, "-o", third, "--keep", "50%", "--clusters", "40", "--within", second
    )
    assert code == 0
    chain = Selection.load(third)
    assert [step.method for step in chain.steps] == ["semdedup", "clip-score", "density"]
    assert [step.rows_in for step in chain.steps[1:]] == [step.rows_out for step in chain.steps[:-1]]
    assert chain.steps[2].rows_out == chain.steps[1].rows_out // 2
    assert f"kept {len(chain):,} of {ROWS:,} rows" in out

    code, out, _ = run("compare", first, third, "--json", cached=False)
    found = json.loads(out)
    assert found["pairs"][0]["both"] == len(chain)
    assert found["pairs"][0]["jaccard"] == pytest.approx(len(chain) / len(Selection.load(first)))
    assert found["clusters"]

    dropped = int(np.flatnonzero(chain.dropped_by == 0)[0])
    code, out, _ = run("explain", third, f"row:{dropped}", cached=False)
    assert code == 0
    assert re.search(r"semdedup: dropped - duplicate of row \d+: cosine 0\.\d{4} > 0\.8500", out)
    code, out, _ = run("explain", third, "1f44b-1f3fd", "--json", cached=False)
    assert json.loads(out)["caption"] == "waving hand: medium skin tone"
    code, _, err = run("explain", third, "1f44b-1f3f", cached=False)
    assert code == 2
    assert "no row '1f44b-1f3f'" in err

    code, out, _ = run("report", third, "-o", str(tmp_path / "page.html"), "--points", "500", cached=False)
    assert code == 0
    assert (tmp_path / "page.html").read_text().count("data:image/") > 20

    recipe = tmp_path / "same.toml"
    recipe.write_text(
        '[[step]]\nmethod = "semdedup"\neps = 0.15\nclusters = 40\n'
        '[[step]]\nmethod = "clip-score"\nkeep = "80%"\n'
        '[[step]]\nmethod = "density"\nkeep = "50%"\nclusters = 40\n'
    )
    assert run("run", str(recipe), POOL, "-o", str(tmp_path / "d"))[0] == 0
    np.testing.assert_array_equal(Selection.load(tmp_path / "d").mask(), chain.mask())


def test_cluster_contract(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    out = tmp_path / "clusters"
    code, printed, _ = run(
        "cluster", POOL, "--clusters", "20", "-o", str(out), "--iterations", "5", "--sample", "all", "--json"
    )
    assert code == 0
    centroids, labels, distances = (np.load(out / f"{name}.npy") for name in ("centroids", "labels", "distances"))
    assert (centroids.shape, centroids.dtype) == ((20, 256), np.float32)
    assert (labels.shape, labels.dtype) == ((ROWS,), np.int32)
    assert (distances.shape, distances.dtype) == ((ROWS,), np.float32)
    assert json.loads(printed)["mean_cosine"] == pytest.approx(1 - distances.mean(), abs=1e-5)
    code, _, _ = run(
        "select", "density", POOL, "-o", str(tmp_path / "sel"), "--keep", "20%", "--clusters", "20",
        "--centroids", str(out / "centroids.npy"), "--temperature", "0.1", "--neighbors", "20", "--order", "hard",
        "--seed", "0", "--engine", "serial", "--workers", "1",
    )  # fmt: skip
    assert code == 0
    chosen = Selection.load(tmp_path / "sel")
    assert len(chosen) == ROWS // 5
    np.testing.assert_array_equal(chosen.steps[0].rows["cluster"], labels)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["select", "densty", POOL, "-o", "x"], "Did you mean 'density'"),
        (["select", "density", POOL, "-o", "x", "--kep", "3"], "--keep"),
        (["select", "density", POOL, "-o", "x"], "density needs keep"),
        (["select", "density", POOL, "-o", "x", "--keep", "1.0"], "100%"),
        (["select", "density", POOL, "-o", "x", "--keep", "0"], "cannot keep 0"),
        (["select", "random", POOL, "-o", "x", "--keep", "5000"], "cannot keep 5,000 rows of the 3,953"),
        (["select", "clip-score", POOL, "-o", "x"], "either keep"),
        (["select", "clip-score", POOL, "-o", "x", "--keep", "30%", "--threshold", "0.3"], "either keep"),
        (["select", "clip-score", POOL, "-o", "x", "--threshold", "2"], "no row reaches it; scores range from -0.2"),
        (["select", "filter", POOL, "-o", "x", "--where", "width < 0"], "keeps none"),
        (["select", "random", POOL, "-o", "x", "--keep", "1", "--within", "a", "--within", "b"], "more than once"),
        (["compare", "a", "b", "--worst", "-1"], "x>=0"),
        (["select", "semdedup", POOL, "-o", "x", "--eps", "5"], "between 0"),
        (
            ["select", "semdedup", POOL, "-o", "x", "--eps", "0.1", "--clusters", "9999"],
            "9,999 clusters from 3,953 rows",
        ),
        (["select", "filter", POOL, "-o", "x", "--where", "widht > 3"], "Did you mean 'width'"),
        (["select", "filter", POOL, "-o", "x", "--where", "width >"], "not an SQL condition"),
        (["select", "random", "/nowhere/at/all", "-o", "x", "--keep", "1%"], "/nowhere/at/all: nothing is there"),
        (["run", "dbp-laio", POOL, "-o", "x"], "Did you mean 'dbp-laion'"),
        (["select", "random", POOL, "-o", "x", "--keep", "1%", "--image", "embeding"], "no column 'embeding'"),
        (["select", "random", POOL, "-o", "x", "--keep", "1%", "--workers", "0"], "0 is not in the range 1<=x<=4096"),
        (["cluster", POOL, "-o", "x", "--clusters", "0"], "at least 1"),
        (["wash"], "there are"),
    ],
)
def test_bad_input_gives_one_message_and_exit_code_2(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words, cached="x" in words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert err.count("Error:") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["explain", "sel", "-dash"], "explain sel -- -dash"),
        (["explain", "sel", "-dash", "--pool", "p"], "explain sel --pool p -- -dash"),
        (["explain", "--pool", "a b", "-sel", "key"], "explain --pool 'a b' -- -sel key"),
        (["explain", "sel", "-5"], "explain sel -- -5"),
        (["explain", "sel", "-hello"], "explain sel -- -hello"),
        (["explain", "sel", "--two-dashes"], "explain sel -- --two-dashes"),
        (["explain", "-sel", "--", "-key"], "explain -- -sel -key"),
        (["inspect", "-pool"], "inspect -- -pool"),
        (["methods", "-x"], "methods -- -x"),
        (["run", "-recipe", "pool", "-o", "x"], "run -o x -- -recipe pool"),
        (["config", "set", "-x", "1"], "config set -- -x 1"),
        (["export", "-sel", "--as", "uids", "-o", "x"], "export --as uids -o x -- -sel"),
    ],
)
def test_an_argument_that_begins_with_a_dash(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    typed: str,
) -> None:
    """The message says what to type, and that is then read as arguments."""
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*words, cached=False)
    assert code == 2
    assert err.splitlines()[-1].endswith(f" is not an option, put -- before it: thresher {typed}")
    code, _, err = run(*shlex.split(typed), cached=False)
    assert code == 2, "there are no such files or names"
    assert "o such option" not in err


def test_an_option_that_is_typed_wrong_is_no_argument(run: Callable[..., tuple[int, str, str]]) -> None:
    for words in (
        ["explain", "sel", "key", "--jsn"],
        ["-x"],
        ["select", "-x"],
        ["select", "random", "a", "--kep", "3"],
    ):
        code, _, err = run(*words, cached=False)
        assert code == 2
        assert "o such option" in err
        assert "put --" not in err


def test_an_earlier_result_is_kept(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    words = ["select", "random", POOL, "-o", out]
    assert run(*words, "--keep", "10%")[0] == 0
    before = Selection.load(out).mask()
    code, _, err = run(*words, "--keep", "20%")
    assert code == 2
    assert "--overwrite" in err
    np.testing.assert_array_equal(Selection.load(out).mask(), before)
    assert run(*words, "--keep", "10%")[0] == 0, "the same command again must be harmless"
    assert run(*words, "--keep", "20%", "--overwrite")[0] == 0
    assert len(Selection.load(out)) == ROWS // 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    code, _, err = run("select", "random", POOL, "-o", str(tmp_path / "mine"), "--keep", "10%", "--overwrite")
    assert code == 2
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_what_commands_print(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = run("select", "random", POOL, "-o", str(tmp_path / "a"), "--keep", "10%", "--json")
    header = json.loads(out)
    assert (header["kept"], header["rows"]) == (ROWS // 10, ROWS)
    assert err == ""
    code, out, err = run("select", "random", POOL, "-o", str(tmp_path / "b"), "--keep", "10%", "--quiet")
    assert err == ""
    code, out, err = run("select", "random", POOL, "-o", str(tmp_path / "c"), "--keep", "10%")
    assert "random: kept 395 of 3,953 rows" in err

    code, out, _ = run("inspect", POOL, "--json")
    found = json.loads(out)
    assert found["rows"] == ROWS
    assert found["fields"]["image"]["dim"] == 256
    assert found["keys"]["repeated"] == 0
    assert found["cost"]["seconds"]["density"] > 0
    code, out, _ = run("inspect", POOL)
    assert "3,953 rows, layout parquet" in out

    assert "density" in run("methods", cached=False)[1]
    assert "temperature" in run("methods", "density", cached=False)[1]
    assert 'method = "density"' in run("recipes", "dbp-laion", cached=False)[1]
    assert "datacomp-basic" in run("recipes", cached=False)[1]


def test_cache_command(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    assert main(["select", "semdedup", POOL, "-o", str(tmp_path / "a"), "--eps", "0.1", "--cache", folder]) == 0
    code, out, _ = run("cache", "--cache", folder, cached=False)
    assert " of at most 20.0 GB" in out
    code, out, _ = run("cache", "clear", "--cache", folder, cached=False)
    assert "removed" in out
    assert not list(Path(folder).rglob("*.npy"))


def test_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "thresher", "select", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-m", "thresher", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("thresher, version")


def test_outputs_never_replace_inputs(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    np.save(pool / "image.npy", np.eye(20, 8, dtype=np.float32) + 0.1)
    before = (pool / "image.npy").read_bytes()
    sel = str(pool / "sel")  # results may lie in the pool's folder without becoming part of it
    assert run("select", "random", str(pool), "-o", sel, "--keep", "50%")[0] == 0
    assert run("select", "random", str(pool), "-o", str(pool / "again"), "--keep", "50%")[0] == 0
    np.testing.assert_array_equal(Selection.load(sel).mask(), Selection.load(pool / "again").mask())
    for words in (
        ["export", sel, "--as", "keys", "-o", str(pool / "image.npy"), "--overwrite"],
        ["report", sel, "-o", str(pool / "image.npy"), "--overwrite"],
        ["export", sel, "--as", "keys", "-o", f"{sel}/selection.json", "--overwrite"],
        ["report", sel, "-o", f"{sel}/steps/page.html"],
    ):
        code, _, err = run(*words, cached=False)
        assert code == 2, words
        assert "pool" in err or "selection folder" in err
    assert (pool / "image.npy").read_bytes() == before
    assert len(Selection.load(sel)) == 10


def test_where_a_result_cannot_be_written_no_work_is_done(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert run("select", "random", POOL, "-o", str(tmp_path / "empty"), "--keep", "10%")[0] == 0
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "sub", Path("/proc/nothing/here"), tmp_path / "file"):
        code, _, err = run("select", "random", POOL, "-o", str(out), "--keep", "10%")
        assert code == 2
        assert "kept" not in err
        assert "Error" in err


def test_a_selection_is_found_out_when_it_is_damaged_or_its_pool_is_gone(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    np.save(pool / "image.npy", np.eye(20, 8, dtype=np.float32) + 0.1)
    monkeypatch.chdir(tmp_path)
    assert run("select", "semdedup", "pool", "-o", "sel", "--eps", "0.5", "--clusters", "1")[0] == 0
    monkeypatch.chdir("/")
    assert run("explain", str(tmp_path / "sel"), "3", cached=False)[0] == 0, "the pool's path depends on the folder"
    pool.rename(tmp_path / "moved")
    code, _, err = run("explain", str(tmp_path / "sel"), "3", cached=False)
    assert code == 2
    assert "--pool" in err
    assert run("explain", str(tmp_path / "sel"), "3", "--pool", str(tmp_path / "moved"), cached=False)[0] == 0
    header = (tmp_path / "sel" / "selection.json").read_text()
    (tmp_path / "sel" / "selection.json").write_text(header.replace("{score:.4f}", "{score.__class__}"))
    code, _, err = run("explain", str(tmp_path / "sel"), "3", "--pool", str(tmp_path / "moved"), cached=False)
    assert code == 2
    assert "reason" in err
    (tmp_path / "sel" / "selection.json").write_text(header)
    np.save(tmp_path / "sel" / "mask.npy", np.ones(20, np.bool_))
    code, _, err = run("compare", str(tmp_path / "sel"), str(tmp_path / "sel") + "/", cached=False)
    assert code == 2
    assert "damaged" in err


@pytest.mark.parametrize("sign", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_worker_processes_end_with_the_command(tmp_path: Path, sign: signal.Signals) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "image.npy", rng.standard_normal((200_000, 64)).astype(np.float16))
    words = ["cluster", str(tmp_path / "image.npy"), "-o", str(tmp_path / "out"), "--clusters", "400"]
    words += ["--sample", "all", "--iterations", "500", "--engine", "processes", "--workers", "2"]
    command = [sys.executable, "-m", "thresher", *words, "--cache", str(tmp_path / "cache"), "--quiet"]
    deadline = time.monotonic() + 30
    workers: list[str] = []
    with subprocess.Popen(command) as process:
        try:
            while len(workers) < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
                listed = subprocess.run(
                    ["ps", "-eww", "-o", "pid,ppid,args"], capture_output=True, text=True, check=True
                )
                lines = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
                workers = [pid for pid, parent, line in lines if parent == str(process.pid) and "spawn_main" in line]
            assert len(workers) == 2, "no workers ever started"
            time.sleep(1)
        finally:
            process.send_signal(sign)
    while any(Path("/proc", pid).exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in workers if Path("/proc", pid).exists()], "workers outlive the command"


def test_a_folder_that_holds_more_than_a_result_is_not_replaced(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["select", "random", POOL, "-o", str(out), "--keep", "10%"]
    assert run(*words)[0] == 0
    (out / "notes.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        code, _, err = run(*words, *more)
        assert code == 2
        assert "notes.txt" in err
    assert (out / "notes.txt").read_text() == "mine"


def test_cluster_sets_bad_rows_aside_too(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    rows[17] = np.nan
    np.save(tmp_path / "image.npy", rows)
    words = ["cluster", str(tmp_path / "image.npy"), "-o", str(tmp_path / "out"), "--clusters", "5"]
    code, _, err = run(*words)
    assert code == 2
    assert "--skip-bad" in err
    assert run(*words, "--skip-bad")[0] == 0
    labels, distances = np.load(tmp_path / "out" / "labels.npy"), np.load(tmp_path / "out" / "distances.npy")
    assert (len(labels), labels[17], np.isnan(distances).sum()) == (300, -1, 1)
    assert (np.delete(labels, 17) >= 0).all()
    words = ["select", "density", str(tmp_path / "image.npy"), "-o", str(tmp_path / "sel"), "--keep", "20%"]
    assert run(*words, "--clusters", "5", "--fit", "pool", "--skip-bad")[0] == 0
    assert not Selection.load(tmp_path / "sel").mask()[17]
