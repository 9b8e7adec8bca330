"""Folders that someone else made: one line names the file and what is wrong, or the result is right; nothing hangs."""

from __future__ import annotations

import json
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.crafted import CLUSTERS, FINE, RUNS, SELECTIONS, Change, N, array, put
from tests.report.test_report import SCRIPT
from tests.runs import make_run
from thresher import PoolError, Selection, open_store
from thresher.cli.main import main
from thresher.dynamic.run_folder import Training
from thresher.pruning.clusters import read_groups, read_labels
from thresher.testing.pools import clustered, write_pool

Made = Callable[[str, Change], Path]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool, and in the same folder a selection, clusters and a training run of it."""
    place = tmp_path_factory.mktemp("good")
    rows = clustered(N, 8, 4, seed=1)
    write_pool(place / "pool", rows, rows[::-1].copy())
    quiet = ["--cache", str(place / "cache"), "--quiet"]
    words = ["select", "semdedup", str(place / "pool"), "--eps", "0.5", "--clusters", "3"]
    assert main([*words, "-o", str(place / "selection"), *quiet]) == 0
    assert main(["cluster", str(place / "pool"), "-o", str(place / "clusters"), "--clusters", "4", *quiet]) == 0
    wide = clustered(120, 8, 4, seed=1)
    make_run(place / "run", write_pool(place / "pool of the run", wide, wide), epochs=7, prune=0.2)
    return place


@pytest.fixture
def made(good: Path, tmp_path: Path) -> Made:
    """Copy a good folder and change it."""

    def make(kind: str, change: Change) -> Path:
        folder = shutil.copytree(good / kind, tmp_path / kind)
        change(folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A test that waits, as for a pipe that nobody writes to, fails."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("still waiting after a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def lines_of(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str]]:
    """Run a command; return its code and the lines of its errors."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    return code, capsys.readouterr().err.splitlines()


def only(cases: list[tuple[str, Change, str]], *, fine: bool, slow: Collection[str] = ()) -> pytest.MarkDecorator:
    chosen = [
        pytest.param(change, said, id=name, marks=pytest.mark.slow if name in slow else ())
        for name, change, said in cases
        if (said == FINE) == fine
    ]
    return pytest.mark.parametrize(("change", "said"), chosen)


def test_the_folders_are_good_as_they_are(good: Path) -> None:
    selection = Selection.load(good / "selection")
    assert 0 < len(selection) < N
    assert set(selection.steps[0].rows) == {"score", "duplicate_of", "cluster", "code"}
    assert (selection.steps[0].cut, read_groups(good / "clusters").centroids_KD.shape) == (0.5, (4, 8))
    assert (len(Training.load(good / "run").log()), len(Training.load(good / "run").ledger())) == (7, 120)


# --- selections -----------------------------------------------------------------------------------


@only(SELECTIONS, fine=False)
def test_a_selection_is_refused_in_one_line(made: Made, change, said: str, capsys) -> None:
    folder = made("selection", change)
    code, lines = lines_of(capsys, "explain", folder, "row:3")
    assert code == 2
    assert len(lines) == 1, lines
    assert said in lines[0]
    assert str(folder) in lines[0]
    assert len(lines[0]) < 1_000


@only(SELECTIONS, fine=True)
def test_a_selection_is_used_as_it_is(good: Path, made: Made, change, said: str, capsys) -> None:
    folder, pool = made("selection", change), good / "pool"
    kept = np.load(good / "selection" / "mask.npy")
    assert Selection.load(folder).mask().tolist() == kept.tolist()
    dropped = np.flatnonzero(~kept)[0]
    cache = ("--cache", good / "cache", "--quiet")
    for words in (
        ("explain", folder, "row:3"),
        ("explain", folder, f"row:{dropped}", "--json"),
        ("compare", folder, good / "selection"),
        ("export", folder, "--as", "keys", "-o", folder.parent / "keys.txt", "--overwrite"),
        ("select", "random", pool, "-o", folder.parent / "within", "--keep", "2", "--within", folder, *cache),
    ):
        code, lines = lines_of(capsys, *words)
        # Rows with repeats are no set, and some texts cannot be written again: one line each.
        assert (code, lines) == (0, []) or (code == 2 and len(lines) == 1), (words, lines)
        assert code == 0 or words[0] in ("select", "compare"), (words, lines)
    uses = (json.loads((folder / "selection.json").read_text("utf-8-sig"))["repeats"] and 3) or 1
    assert len((folder.parent / "keys.txt").read_text().splitlines()) == uses * kept.sum()


@pytest.mark.slow
@only(SELECTIONS, fine=True)
def test_a_selection_has_a_report(made: Made, change, said: str, capsys) -> None:
    folder = made("selection", change)
    page = folder.parent / "page.html"
    assert lines_of(capsys, "report", folder, "-o", page) == (0, [])
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text.replace(SCRIPT, "").replace("<script></script>", "")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert len(text) < 2_000_000


# --- clusters and training runs -------------------------------------------------------------------


@only(CLUSTERS, fine=False)
def test_clusters_are_refused_in_one_line(good: Path, made: Made, change, said: str, capsys) -> None:
    folder = made("clusters", change)
    with pytest.raises(PoolError) as error:
        read_groups(folder)
    assert said in str(error.value)
    code, lines = lines_of(
        capsys, "cluster", good / "pool", "-o", folder.parent / "new", "--grow", folder, "--cache", good / "cache"
    )
    assert (code, len(lines)) == (2, 1)
    assert str(folder) in lines[0]
    assert len(lines[0]) < 1_000


@only(RUNS, fine=False, slow=("a ledger that unfolds", "log.jsonl is 10 GB of zeros"))
def test_a_run_is_refused_in_one_line(made: Made, change, said: str, capsys) -> None:
    folder = made("run", change)
    code, lines = lines_of(capsys, "report", folder, "-o", folder.parent / "page.html")
    if code == 0:  # without a ledger that can be read there is a page only if no example needs it
        pytest.fail("a page was made")
    assert code == 2
    assert len(lines) == 1, lines
    assert said in lines[0]
    assert str(folder) in lines[0]
    assert len(lines[0]) < 1_000
    for words in (("coreset", folder, "-o", folder.parent / "core", "--keep", "50%"), ("explain", folder, "row:3")):
        code, lines = lines_of(capsys, *words)
        assert (code, len(lines)) == (2, 1), (words, lines)


# A report takes seconds.
@only(RUNS, fine=True, slow={name for name, _, said in RUNS if said == FINE} - {"a phase of codes", "no loss"})
def test_a_run_is_used_as_it_is(made: Made, change, said: str, capsys) -> None:
    folder = made("run", change)
    page = folder.parent / "page.html"
    for words in (
        ("report", folder, "-o", page),
        ("coreset", folder, "-o", folder.parent / "core", "--keep", "50%"),
        ("explain", folder, "row:3"),
    ):
        assert lines_of(capsys, *words) == (0, []), words
    assert "\x1b" not in page.read_text(encoding="utf-8")


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_lies_take_no_memory(good: Path, tmp_path: Path, every: int) -> None:
    """What a header says, or what a small file unfolds to, is not allocated before it is checked."""
    kinds = {"selection": (SELECTIONS, Selection.load), "clusters": (CLUSTERS, read_groups)}
    for kind, (cases, load) in kinds.items():
        for name, change, said in cases[::every]:
            if said == FINE or "many values" in name:
                continue
            folder = shutil.copytree(good / kind, tmp_path / kind)
            change(folder)
            tracemalloc.start()
            with pytest.raises(PoolError):
                load(folder)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            shutil.rmtree(folder)
            assert peak < 200 * 2**20, (name, peak)


def test_labels_alone_are_read(made: Made) -> None:
    """Another tool may write labels and nothing else."""
    folder = made("clusters", array("labels.npy", np.arange(N, dtype="i8")))
    (folder / "centroids.npy").unlink()
    assert read_labels(folder).tolist() == list(range(N))
    np.save(folder / "labels.npy", np.full(N, 2**31 - 1, "i4"))
    with pytest.raises(PoolError, match=r"labels.npy: has values from 2,147,483,647 .* must be from -1 to 1,048,575"):
        read_labels(folder)


def test_a_name_of_the_environment_is_not_printed(made: Made, capsys, monkeypatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    text = "{score:{score.__format__.__globals__[os].environ}}"
    folder = made("selection", put("selection.json", "steps", 0, "reasons", to=[text] * 2))
    for row in range(N):
        assert main(["explain", str(folder), f"row:{row}"]) == 2
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err


def test_the_pool_of_a_run_is_open(good: Path) -> None:
    assert open_store(str(good / "pool of the run")).total == 120
