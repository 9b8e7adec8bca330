"""``thresher sweep``: every row of the table is that of a selection made on its own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import thresher as th
from tests.golden.update import golden_store
from thresher.cli.main import main
from thresher.errors import UsageError
from thresher.pruning.covariance import covariance_errors
from thresher.pruning.run import Run
from thresher.report.sweep import values_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> th.EmbeddingStore:
    return golden_store(tmp_path_factory.mktemp("sweep") / "pool")


@pytest.mark.parametrize(
    ("method", "parameter", "values", "others"),
    [
        ("semdedup", "eps", [0.05, 0.2, 0.4], {"clusters": 5}),
        ("density", "keep", ["20%", "50%"], {"clusters": 5}),
        ("clip-score", "threshold", [0.1, 0.3], {}),
        ("random", "keep", ["10%", 50], {}),
        ("herd", "keep", ["20%", "40%"], {"clusters": 5}),
    ],
)
def test_rows_are_those_of_selections(
    store: th.EmbeddingStore, tmp_path, method: str, parameter: str, values: list[Any], others: dict[str, Any]
) -> None:
    cache = th.Cache.at(tmp_path)
    table = th.sweep(store, method, **{parameter: values}, **others, cache=cache, progress=False)
    assert len(table) == len(values)
    for i, row in enumerate(table):
        alone = th.select(store, {"method": method, parameter: values[i], **others}, cache=cache, progress=False)
        np.testing.assert_array_equal(table.selections[i].mask(), alone.mask())
        step, mask = alone.steps[-1], alone.mask()
        given = alone.given(len(alone.steps) - 1)
        assert (row[parameter], row["rows"], row["share"]) == (values[i], mask.sum(), mask.sum() / len(mask))
        twins = step.rows.get("duplicate_of")
        assert row["duplicates"] == (None if twins is None else sum(int(twin) >= 0 for twin in twins))
        if "score" in step.rows:
            scores = step.rows["score"][mask[given]].astype(float)
            assert row["score"] == pytest.approx(scores[np.isfinite(scores)].mean())
        if "cluster" in step.rows:
            labels = step.rows["cluster"]
            shares = [mask[given][labels == k].mean() for k in np.unique(labels[labels >= 0])]
            assert row["coverage"] == pytest.approx(np.mean([share > 0 for share in shares]))
            assert row["least_kept"] == pytest.approx(min(shares))
        else:
            assert row["coverage"] is None
        error = covariance_errors(Run(store, alone, th.Serial(), cache), {"it": alone})["it"]
        assert row["covariance"] == pytest.approx(error.overall.error, rel=1e-5)  # products are float32
    assert bool(table.notes) == (method == "herd")
    frame = table.to_pandas()
    assert frame["rows"].tolist() == table["rows"]
    assert list(frame) == list(table.rows[0])


def test_the_command_prints_the_table(store: th.EmbeddingStore, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "random", store.layout.location, "--keep", "10%..90%", "--no-covariance", "--quiet"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["keep"] for row in found["rows"]] == [f"{i}0%" for i in range(1, 10)]
    assert [row["rows"] for row in found["rows"]] == [store.total * i // 10 for i in range(1, 10)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["keep", "rows", "share"]
    assert len(lines) == 10


def test_the_command_reads_numbers(store: th.EmbeddingStore, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "semdedup", store.layout.location, "--eps", "0.1..0.5", "--clusters", "5", "--quiet", "--json"]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["eps"] for row in rows] == pytest.approx(np.linspace(0.1, 0.5, 9))
    assert [row["rows"] for row in rows] == sorted((row["rows"] for row in rows), reverse=True)
    assert main([*command[:3], "--eps", "0.1,x"]) == 2
    assert "eps" in (message := capsys.readouterr().err) or "number" in message


def test_values() -> None:
    assert values_of("0.005, 0.01,0.02") == ["0.005", "0.01", "0.02"]
    assert values_of("10%..90%") == [f"{i}0%" for i in range(1, 10)]
    assert values_of("0.1..0.5") == ["0.1", "0.15", "0.2", "0.25", "0.3", "0.35", "0.4", "0.45", "0.5"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("random",), "give one list of values: --keep"),
        (("clip-score", "--keep", "10%,20%", "--threshold", "0.1"), "give one list of values: --keep or --threshold"),
        (("random", "--keep", "90%..10%"), "not a range from a lower to a higher number"),
        (("random", "--keep", "10%,,20%"), "an empty value"),
        (("random", "--keep", "10%,120%"), "120%"),
        (("random", "--keep", "a..b"), "not a range"),
        (("filter",), "no 'filter'"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    store: th.EmbeddingStore, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(["sweep", words[0], store.layout.location, *words[1:]]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(UsageError, match="0 parameters are lists"):
        th.sweep(store, "random", keep="10%", progress=False)
