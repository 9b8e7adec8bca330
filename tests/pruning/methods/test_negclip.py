from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher import BadRowsError, Cache, Processes, Serial, Threads, UsageError, build
from thresher.pruning.methods import negclip as module
from thresher.pruning.run import Run


def log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    high = values.max(axis=axis)
    return high + np.log(np.exp(values - np.expand_dims(high, axis)).sum(axis=axis))


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute(image: np.ndarray, text: np.ndarray, temperature: float) -> np.ndarray:
    """The scores of one batch, in float64, with the whole matrix."""
    cosines = unit(image) @ unit(text).T / temperature
    return temperature * (cosines.diagonal() - log_sum_exp(cosines, 1) / 2 - log_sum_exp(cosines, 0) / 2)


def expected(image: np.ndarray, text: np.ndarray, temperature: float, batch: int, repeats: int, seed=0) -> np.ndarray:
    """The definition: random partitions into equal batches, from the generators that runs have."""
    total = np.zeros(len(image))
    for repeat in range(repeats):
        order = Run.rng(type("", (), {"seed": seed})(), "negclip", repeat).permutation(len(image))
        for part in range(batches := -(-len(image) // batch)):
            rows = order[len(image) * part // batches : len(image) * (part + 1) // batches]
            total[rows] += brute(image[rows], text[rows], temperature)
    return total / repeats


def scores(selection) -> np.ndarray:
    return selection.steps[-1].rows["score"]


@pytest.fixture
def small(monkeypatch) -> None:
    """Tiles and tasks so small that a test has many."""
    monkeypatch.setattr(module, "_TILE", 16)
    monkeypatch.setattr(module, "_panel_rows", lambda store: 32)


@pytest.mark.parametrize("batch", [10_000, 101, 64, 2])
@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.07, 1.0])
def test_it_is_the_definition(pool, rows, select, small, temperature, batch) -> None:
    image, text = rows(203, seed=1), rows(203, spread=2.0, seed=2)
    image *= np.random.default_rng(0).uniform(0.1, 20, (203, 1)).astype(np.float32)  # need not be units
    step = {"keep": 60, "temperature": temperature, "batch_size": batch, "repeats": 3}
    selection = select(pool(image, text), build("negclip", step))
    wanted = expected(image, text, temperature, batch, 3 if batch < 203 else 1)
    np.testing.assert_allclose(scores(selection), wanted, atol=3e-7 + 4e-7 * temperature)
    kept = selection.mask()
    assert kept.sum() == 60
    assert wanted[kept].min() > wanted[~kept].max() - 1e-6


def test_a_caption_that_fits_every_picture_loses_what_the_clip_score_gives_it(pool, select) -> None:
    """The property that makes it more than a CLIP score."""
    rng = np.random.default_rng(0)
    image = unit(rng.normal(size=(300, 16)) + [4, *[0] * 15])  # all pictures share a direction
    text = image + 0.3 * rng.normal(size=image.shape)
    text[0] = image.mean(axis=0)  # "a photo"
    store = pool(image.astype(np.float32), text.astype(np.float32))
    kept = {name: select(store, build(name, {"keep": "30%"})).mask() for name in ("clip-score", "negclip")}
    assert kept["clip-score"][0]
    assert not kept["negclip"][0]


@pytest.mark.parametrize("temperature", [0.001, 0.01, 1.0])
@pytest.mark.parametrize("kind", ["same", "opposite", "all alike", "orthogonal", "one of each"])
def test_hard_cases_are_exact(pool, select, kind, temperature) -> None:
    """Cosines of -1 and 1 side by side: their exponentials are e^2000 apart."""
    image = np.eye(12, dtype=np.float32)[np.arange(40) % 12]
    text = {
        "same": image,
        "opposite": -image,
        "all alike": np.ones_like(image),
        "orthogonal": np.roll(image, 1, axis=1),
        "one of each": image * np.where(np.arange(40) % 3 == 0, -1, 1)[:, None],
    }[kind].astype(np.float32)
    found = select(pool(image, text), build("negclip", {"keep": "50%", "temperature": temperature}))
    np.testing.assert_allclose(scores(found), brute(image, text, temperature), atol=2e-7 + 1e-6 * temperature)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    scale=st.sampled_from([0.1, 1.0, 60.0, 69.9, 70.1, 1_000.0, 100_000.0]),
    shift=st.sampled_from([0.0, 1_000.0, -1_000.0]),
    seed=st.integers(0, 2**32),
)
def test_sums_of_a_tile_against_float64(rows, columns, scale, shift, seed) -> None:
    tile = (np.random.default_rng(seed).uniform(-scale, scale, (rows, columns)) + shift).astype(np.float32)
    wide = tile.astype(np.float64)
    across, down = module.log_sums(tile)
    bound = 1e-6 + 2e-7 * np.abs(wide).max()
    np.testing.assert_allclose(across, log_sum_exp(wide, 1), rtol=0, atol=bound)
    np.testing.assert_allclose(down, log_sum_exp(wide, 0), rtol=0, atol=bound)


def test_every_row_of_a_partition_is_compared_with_as_many(pool, rows, select) -> None:
    """70 rows in batches of 64 at most are 35 and 35: against 6 others a row would score far better."""
    image, text = np.ones((70, 4), np.float32), np.ones((70, 4), np.float32)
    found = select(pool(image, text), build("negclip", {"threshold": -1, "batch_size": 64}))
    np.testing.assert_allclose(scores(found), -0.01 * np.log(35), atol=1e-7)
    assert found.steps[0].notes == ("the mean of 5 random partitions into 2 batches of 35 pairs at most",)


def test_one_batch_is_done_once_and_any_seed_gives_the_same(pool, rows, select) -> None:
    store = pool(rows(50), rows(50, seed=1))
    one, five = (select(store, build("negclip", {"keep": 20, "repeats": r}), seed=r) for r in (1, 5))
    assert scores(one).tobytes() == scores(five).tobytes()
    assert five.steps[0].notes == ("one batch of all 50 pairs, so that repeats would change nothing",)


def test_a_single_row_and_rows_that_repeat(pool, rows, select) -> None:
    alone = select(pool(rows(1), rows(1, seed=1), name="alone"), build("negclip", {"keep": 1}))
    assert scores(alone) == pytest.approx([0], abs=1e-7)
    image, text = np.tile(rows(30), (2, 1)), np.tile(rows(30, seed=1), (2, 1))
    twice = scores(select(pool(image, text), build("negclip", {"keep": 9})))
    np.testing.assert_allclose(twice[:30], twice[30:], atol=1e-7)
    np.testing.assert_allclose(twice, brute(image, text, 0.01), atol=3e-7)


def test_after_an_earlier_step_only_its_rows_are_compared(pool, rows, select) -> None:
    image, text = rows(200), rows(200, seed=1)
    steps = [build("random", {"keep": "40%"}), build("negclip", {"keep": "50%", "batch_size": 30, "repeats": 2})]
    found = select(pool(image, text), *steps)
    given = found.given(1)
    assert len(given) == 80
    np.testing.assert_allclose(scores(found), expected(image[given], text[given], 0.01, 30, 2), atol=3e-7)


@pytest.mark.parametrize("parquet", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_engine_gives_the_same_bytes_with_many_batches(pool, rows, select, tmp_path, parquet) -> None:
    image, text = rows(2_500, dim=16), rows(2_500, dim=16, seed=1)
    step = build("negclip", {"keep": "30%", "batch_size": 600, "repeats": 2})
    found = []
    for i, (engine, files) in enumerate([(Serial(), 1), (Threads(3), 3), (Processes(2), 2)]):
        store = pool(image, text, name=f"pool{i}", files=files, parquet=parquet and files > 1)
        found.append(scores(select(store, step, engine=engine, cache=Cache.at(tmp_path / str(i)))).tobytes())
    assert found[0] == found[1] == found[2]


def counting(monkeypatch) -> list[Any]:
    """What is compared from now on, task by task."""
    tasks: list[Any] = []
    inner = module._panel

    def panel(store: Any, temperature: float, task: Any) -> Any:
        tasks.append(task)
        return inner(store, temperature, task)

    monkeypatch.setattr(module, "_panel", panel)
    return tasks


def test_more_repeats_take_over_those_there_are(pool, rows, select, monkeypatch) -> None:
    image, text = rows(120), rows(120, seed=1)
    store, tasks = pool(image, text), counting(monkeypatch)
    for repeats, more in ((2, 8), (5, 12), (4, 0)):
        before = len(tasks)
        found = select(store, build("negclip", {"keep": 9, "batch_size": 30, "repeats": repeats}))
        assert len(tasks) - before == more
        np.testing.assert_allclose(scores(found), expected(image, text, 0.01, 30, repeats), atol=3e-7)


def test_a_killed_run_goes_on_with_the_batch_it_had_come_to(pool, rows, select, monkeypatch, tmp_path) -> None:
    store = pool(rows(120), rows(120, seed=1))
    step = build("negclip", {"keep": 9, "batch_size": 30, "repeats": 2})
    whole = select(store, step, cache=Cache.at(tmp_path / "whole"))
    inner, calls = module._panel, []

    def killed(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 7:  # in the third batch of the second repeat
            raise KeyboardInterrupt
        return inner(*given)

    cache = Cache(tmp_path / "resumed", flush_seconds=-1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_panel", killed)
        with pytest.raises(KeyboardInterrupt):
            select(store, step, cache=cache)
    tasks = counting(monkeypatch)
    assert scores(select(store, step, cache=cache)).tobytes() == scores(whole).tobytes()
    assert len(tasks) == 2


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"temperature": 0.0}, "temperature = 0.0: must be from"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"batch_size": 1}, "batch_size = 1: must be at least 2"),
        ({"repeats": 0}, "repeats = 0: must be from 1 to 10,000"),
        ({"threshold": 0.1}, "either keep"),
    ],
)
def test_parameters_that_make_no_sense(given, text) -> None:
    with pytest.raises(UsageError, match=text):
        build("negclip", {"keep": "50%", **given})


def test_pools_it_cannot_judge_are_refused_before_any_work(pool, rows, select) -> None:
    step = build("negclip", {"keep": "50%"})
    with pytest.raises(UsageError, match="has no text embeddings; it has image"):
        select(pool(rows(4), name="image"), step)
    with pytest.raises(UsageError, match="image embeddings have 4 dimensions, text embeddings 8"):
        select(pool(rows(4, dim=4), rows(4), name="widths"), step)
    broken = rows(4)
    broken[2] = 0
    with pytest.raises(BadRowsError, match=r"text_0.npy row 2: the text embedding is all zeros"):
        select(pool(rows(4), broken, name="zero"), step)
