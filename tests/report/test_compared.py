"""The page that compares selections shows what the arrays say, and nothing of a caption but its text."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.report.test_report import ATTACK, ROWS, picture, read, write_pool
from thresher import Cache, EmbeddingStore, Selection, UsageError, build, open_store, run_steps
from thresher.cli.main import main
from thresher.report.compared import write_comparison
from thresher.runtime.format import counted


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    import pyarrow as pa

    images = [{"bytes": picture(i), "path": None} for i in range(ROWS)]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    captions = [f"{ATTACK} topic{i % 10} \u202e" for i in range(ROWS)]
    return open_store(str(write_pool(tmp_path_factory.mktemp("pools") / "pool", pa.array(images, struct), captions)))


@pytest.fixture(scope="module")
def chosen(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Selection]:
    cache = Cache.at(tmp_path_factory.mktemp("cache"))
    steps = {
        "a": build("density", {"keep": "40%", "clusters": 6}),
        "b": build("clip-score", {"keep": "30%"}),
        "c": build("filter", {"where": "width < 150"}),
    }
    return {name: run_steps(store, [step], cache=cache) for name, step in steps.items()}


def test_counts_are_those_of_the_masks(chosen: dict[str, Selection], store: EmbeddingStore, tmp_path: Path) -> None:
    page, found = read(write_comparison(chosen, tmp_path / "c.html", store=store))
    masks = [selection.mask() for selection in chosen.values()]
    text = " ".join(found.text.split())
    for a in masks:
        for b in masks:
            both = int((a & b).sum())
            assert f"{counted(both, 'row')}<br><b>{both / a.sum():.1%}</b>" in page
    for letter, i in (("A", 0), ("B", 1), ("C", 2)):
        others = np.any([mask for j, mask in enumerate(masks) if j != i], axis=0)
        only = int((masks[i] & ~others).sum())
        assert re.search(rf"{letter} {'abc'[i]} {only} rows, {only / masks[i].sum():.1%} of its rows", text)
    assert f"{int(np.all(masks, axis=0).sum())} rows are in all 3 selections" in text
    assert f"{int((~np.any(masks, axis=0)).sum())} rows are in none" in text
    assert page.count("data:image/webp") >= 3 * 6
    assert ATTACK in found.text
    assert "<script" not in page
    assert "\u202e" not in page


def test_repeats_have_a_column_if_there_are_any(
    chosen: dict[str, Selection], store: EmbeddingStore, tmp_path: Path
) -> None:
    plain, _ = read(write_comparison(chosen, tmp_path / "plain.html", store=store))
    drawn = run_steps(store, [build("scs", {"column": "width", "draws": 200, "temperature": 100.0})])
    assert drawn.uses > len(drawn)
    page, _ = read(write_comparison({"a": chosen["a"], "d": drawn}, tmp_path / "repeats.html", store=store))
    assert ("rows with repeats" in plain, "rows with repeats" in page) == (False, True)
    assert f"<td>{drawn.uses:,}</td>" in page


def test_clusters_and_values_that_differ_are_listed(
    chosen: dict[str, Selection], store: EmbeddingStore, tmp_path: Path
) -> None:
    page, found = read(write_comparison(chosen, tmp_path / "c.html", store=store, cells=4))
    assert re.search(r"topic\d", found.text)
    step = chosen["a"].steps[0]
    labels = np.asarray(step.rows["cluster"])
    table = page[page.index('id="clusters"') : page.index('id="columns"')]
    numbers = re.findall(r'<small class="muted">(\d+)</small>|<span><span>(\d+)</span></span></th>', table)
    assert len([n for n in numbers if any(n)]) == 4
    for number in (int(a or b) for a, b in numbers):
        for selection in chosen.values():
            kept = int((selection.mask() & (labels == number)).sum())
            assert f"</span> {kept:,} <span" in table
    assert "width" in page[page.index('id="columns"') :]  # c was cut by it


def test_one_row_is_no_rows_and_no_sure_difference(store: EmbeddingStore, tmp_path: Path) -> None:
    whole = {name: run_steps(store, [build("random", {"keep": keep})]) for name, keep in (("all", "100%"), ("one", 1))}
    page, _ = read(write_comparison(whole, tmp_path / "c.html", store=store))
    assert "1 row<br>" in page
    assert "1 rows" not in page
    assert 'id="columns"' not in page, "one row that was kept by chance is no difference"


def test_same_bytes_and_without_a_pool(chosen: dict[str, Selection], store: EmbeddingStore, tmp_path: Path) -> None:
    one, two = (write_comparison(chosen, tmp_path / f"{i}.html", store=store).read_bytes() for i in (1, 2))
    assert one == two
    page, found = read(write_comparison(chosen, tmp_path / "n.html"))
    assert "<img" not in page
    assert "alert(1)" not in page
    assert "Clusters that differ most" in " ".join(found.text.split())


def test_requests_that_cannot_be_met(chosen: dict[str, Selection], store: EmbeddingStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 selection to compare; give 2 to 5"):
        write_comparison({"a": chosen["a"]}, tmp_path / "c.html")
    with pytest.raises(UsageError, match="6 selections to compare"):
        write_comparison({str(i): chosen["a"] for i in range(6)}, tmp_path / "c.html")
    with pytest.raises(UsageError, match="must be 0 or more"):
        write_comparison(chosen, tmp_path / "c.html", examples=-1)
    assert not list(tmp_path.iterdir())


def test_the_command_compares(chosen: dict[str, Selection], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(selection.save(tmp_path / name)) for name, selection in chosen.items()]
    target = tmp_path / "c.html"
    assert main(["report", *folders, "-o", str(target), "--covariance", "--quiet"]) == 0
    page, found = read(target)
    text = " ".join(found.text.split())
    assert "times random" in text
    assert "does not say that the selection is worse than a random one" in text
    capsys.readouterr()
    for wrong, message in (
        ([folders[0], folders[0]], "a selection is given twice"),
        ([*folders, "x", "y", "z"], "6 selections; one page compares at most 5"),
    ):
        assert main(["report", *wrong, "-o", str(target)]) != 0
        assert message in capsys.readouterr().err
