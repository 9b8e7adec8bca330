from __future__ import annotations

import os
import tomllib
from pathlib import Path

import numpy as np
import pytest

from thresher import BudgetError, Cache, PoolError, Recipe, Selection, Serial, UsageError, build, open_store, run_steps
from thresher.pool.store import EmbeddingStore
from thresher.pruning.recipe import as_toml, shipped_recipes
from thresher.runtime.parameters import recorded

RANDOM = '[[step]]\nmethod = "random"\nkeep = "50%"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sed = 1\n" + RANDOM, "unknown key 'sed'.*Did you mean 'seed'"),
        ("keep = 1\n" + RANDOM, "unknown key 'keep'"),
        ("seed = 1.5\n" + RANDOM, "seed = 1.5; expected a whole number"),
        ("seed = true\n" + RANDOM, "seed = True"),
        ("", "no steps"),
        ("step = []", "no steps"),
        ("step = 3", "no steps"),
        ('[step]\nmethod = "random"', "no steps"),
        ("step = [1]", "step 1"),
        ("[[step]]\nkeep = 3", "step 1 names no method"),
        ('[[step]]\nmethod = "radnom"', "step 1: no method 'radnom'.*Did you mean 'random'"),
        ("[[step]]\nmethod = 5", "step 1"),
        ('[[step]]\nmethod = ["random"]', "step 1"),
        ('[[step]]\nmethod = "random"', "step 1: random needs keep"),
        (
            RANDOM + '[[step]]\nmethod = "density"\nkep = 3',
            "step 2: density has no parameter 'kep'.*Did you mean 'keep'",
        ),
        (RANDOM + "name = 3", "no parameter 'name'"),
        (RANDOM.replace('"50%"', "1.0"), "cannot keep 1.0"),
        (RANDOM.replace('"50%"', "true"), "cannot keep True"),
        (RANDOM.replace('"50%"', "[1]"), "cannot read"),
        (RANDOM + '[[step]]\nmethod = "density"\nkeep = 3\norder = "hrad"', "allowed: hard, easy, random.*'hard'"),
        (
            RANDOM + '[[step]]\nmethod = "density"\nkeep = 3\nclusters = "many"',
            "clusters = 'many'; expected a whole",
        ),
        (RANDOM + '[[step]]\nmethod = "density"\nkeep = 3\nclusters = true', "clusters = True"),
        (RANDOM + '[[step]]\nmethod = "density"\nkeep = 3\nreleased = 1', "released = 1; allowed: true, false"),
        (RANDOM + '[[step]]\nmethod = "density"\nkeep = 3\nsample = "some"', "sample = 'some'"),
        (RANDOM + '[[step]]\nmethod = "semdedup"\neps = nan', "eps = nan"),
        ('[[step]]\nmethod = "filter"\nwhere = "w >"', "step 1: .*not an SQL condition"),
        ("[[step]\n", "not valid TOML"),
        ("seed = " + "9" * 5_000, "not valid TOML .an integer has too many digits"),
        ("seed = " + "[" * 100_000, "nested too deeply"),
        ("x" * 100_000 + " = 1\n" + RANDOM, "unknown key 'x{1,60}\\.\\.\\."),
        ('[[step]]\nmethod = "semdedup"\neps = 1' + "0" * 400, "eps = 1000.*the largest number allowed is"),
        (
            '[[step]]\nmethod = "semdedup"\neps = 0.1\norder = "' + "x" * 100_000 + '"',
            "order = 'xxx.*\\.\\.\\. .100,002 characters.; allowed: hard, easy, random",
        ),
    ],
)
def test_what_a_recipe_may_not_say_is_refused_before_any_pool_is_near(text, told) -> None:
    with pytest.raises(UsageError, match=f"(?s)^mine.toml: .*{told}") as error:
        Recipe.parse(text, "mine.toml")
    assert len(str(error.value)) < 1_100


def test_a_recipe_says_what_a_program_would() -> None:
    text = (
        'seed = 7\ndescription = "why"\n[[step]]\nmethod = "random"\nkeep = 0.25\n'
        '[[step]]\nmethod = "density"\nkeep = "30%"\nclusters = 5\ntemperature = 1\nsample = 70_000\n'
    )
    density = build("density", {"keep": "30%", "clusters": 5, "temperature": 1.0, "sample": "70000"})
    assert Recipe.parse(text) == Recipe((build("random", {"keep": "25%"}), density), 7, "why")


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_sound_and_described(name) -> None:
    recipe = Recipe.load(name)
    assert recipe.steps
    assert len(recipe.description) > 30


def test_a_recipe_is_found_by_name_or_file(tmp_path) -> None:
    (tmp_path / "mine.toml").write_text(RANDOM)
    assert Recipe.load(str(tmp_path / "mine.toml")).steps == (build("random", {"keep": "50%"}),)
    (tmp_path / "long.toml").write_text(f"{RANDOM}\n#{'x' * 2**20}\n{RANDOM}")
    with pytest.raises(UsageError, match="neither a readable file .it has more than 1,048,576 bytes"):
        Recipe.load(str(tmp_path / "long.toml"))
    for wrong, told in (("semdedupe", "Did you mean 'semdedup'"), (str(tmp_path), "shipped: ")):
        with pytest.raises(UsageError, match=told):
            Recipe.load(wrong)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="bytes.toml"):
        Recipe.load(str(tmp_path / "bytes.toml"))


# --- running ------------------------------------------------------------------------------------


@pytest.fixture
def store(pool, rows):
    return pool(rows(400), None, {"similarity": np.linspace(0, 1, 400), "uid": [str(i) for i in range(400)]})


def half():
    return build("random", {"keep": "50%"})


def test_percentages_refer_to_what_a_step_was_given(store, select) -> None:
    selection = select(store, half(), build("clip-score", {"keep": "25%", "column": "similarity"}), half())
    assert [(step.rows_in, step.rows_out) for step in selection.steps] == [(400, 200), (200, 50), (50, 25)]
    first = select(store, half()).rows()
    assert set(selection.rows()) <= set(first[-50:])


def test_steps_one_by_one_are_the_steps_at_once(store, select) -> None:
    steps = [half(), build("density", {"keep": "50%", "clusters": 5}), build("semdedup", {"eps": 0.3, "clusters": 3})]
    at_once = select(store, *steps)
    by_one = None
    for step in steps:
        by_one = select(store, step, within=by_one)
    assert by_one.dropped_by.tolist() == at_once.dropped_by.tolist()
    assert [s.header() for s in by_one.steps] == [s.header() for s in at_once.steps]


def test_a_seed_seeds_all_steps_and_steps_do_not_reseed_each_other(store, select) -> None:
    def kept(*steps, seed):
        return select(store, *steps, seed=seed).rows().tolist()

    density = build("density", {"keep": "50%", "clusters": 5, "order": "random"})
    assert kept(half(), seed=1) != kept(half(), seed=2)
    assert kept(density, seed=1) != kept(density, seed=2)
    everything = build("clip-score", {"keep": "100%", "column": "similarity"})
    assert kept(everything, density, seed=1) == kept(density, seed=1)
    assert select(store, half(), seed=3).steps[0].seed == 3


def test_a_step_that_keeps_nothing_or_cannot_meet_its_budget_is_told(store, select) -> None:
    with pytest.raises(UsageError, match="filter keeps none of the 200 rows"):
        select(store, half(), build("filter", {"where": "similarity > 2"}))
    with pytest.raises(UsageError, match="clip-score: threshold = 2.0: no row reaches it; .* from 0.00.* to 1.0000"):
        select(store, half(), build("clip-score", {"threshold": 2.0, "column": "similarity"}))
    with pytest.raises(UsageError, match="as a list"):
        run_steps(store, half())
    with pytest.raises(BudgetError, match="201 rows of the 200"):
        select(store, half(), build("random", {"keep": 201}))
    with pytest.raises(BudgetError, match="less than one row"):
        select(store, build("random", {"keep": 1}), half())


def test_a_selection_of_another_pool_is_refused(store, pool, rows, select) -> None:
    other = pool(rows(400, seed=9), name="other")
    with pytest.raises(UsageError, match="not the pool of this selection"):
        select(store, half(), within=select(other, half()))


def test_the_same_pool_elsewhere_is_the_same_pool(pool, rows, select) -> None:
    one, moved = pool(rows(400), name="one"), pool(rows(400), name="moved", files=3)
    within = select(one, half())
    assert len(select(moved, half(), within=within)) == 100


def test_a_selection_read_back_goes_on_like_the_original(store, select, tmp_path) -> None:
    first = select(store, half())
    again = Selection.load(first.save(tmp_path / "first"))
    step = build("semdedup", {"keep": "50%", "clusters": 4})
    assert select(store, step, within=again).mask().tolist() == select(store, half(), step).mask().tolist()


def test_the_cache_of_the_user_is_the_default(store, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    run_steps(store, [half()], engine=Serial())
    assert (tmp_path / "xdg" / "thresher" / "arrays").is_dir()


def test_the_cache_is_trimmed_to_its_limit_before_a_run(store, tmp_path) -> None:
    cache = Cache.at(tmp_path / "c", limit=1)
    step = build("density", {"keep": "50%", "clusters": 3})
    run_steps(store, [step], engine=Serial(), cache=cache)
    before = cache.size()
    run_steps(store, [half()], engine=Serial(), cache=cache)
    assert cache.size() < before


def test_keys_are_checked_once(pool, rows, select, monkeypatch) -> None:
    store = pool(rows(10), None, {"uid": [str(i) for i in range(10)]})
    seen = []
    scan = EmbeddingStore.scan
    monkeypatch.setattr(EmbeddingStore, "scan", lambda self, columns: seen.append(list(columns)) or scan(self, columns))
    select(store, half(), half())
    assert seen == [["uid"]]
    select(store, half())
    assert seen == [["uid"]]  # cached


def test_an_earlier_selection_of_no_rows_is_not_taken_for_none(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.eye(40, 8, dtype=np.float32) + 0.1)
    store, cache = open_store(str(tmp_path / "image.npy")), Cache.at(tmp_path / "cache")
    some = run_steps(store, [build("random", {"keep": "50%"})], cache=cache)
    with pytest.raises(UsageError, match="no row"):
        run_steps(store, [build("random", {"keep": "50%"})], within=some - some, cache=cache)


def test_a_pool_that_changes_under_a_run_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "image.npy"
    np.save(path, np.eye(40, 8, dtype=np.float32) + 0.1)

    class Meddling(Serial):
        def map(self, fn, tasks):  # type: ignore[no-untyped-def]
            yield from super().map(fn, tasks)
            os.utime(path, (1, 1))

    with pytest.raises(PoolError, match="changed while semdedup ran"):
        run_steps(
            open_store(str(path)),
            [build("semdedup", {"eps": 0.1, "clusters": 2}), build("random", {"keep": "50%"})],
            engine=Meddling(),
            cache=Cache.at(tmp_path / "cache"),
        )


def test_a_view_is_not_taken_for_its_pool(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.eye(40, 8, dtype=np.float32) + 0.1)
    view = open_store(str(tmp_path / "image.npy")).where(np.arange(40) < 7)
    with pytest.raises(UsageError, match="not a view"):
        run_steps(view, [build("random", {"keep": "50%"})], cache=Cache.at(tmp_path / "cache"))


def test_the_text_of_steps_is_read_as_the_same_steps() -> None:
    steps = [
        build("semdedup", {"eps": 0.1, "clusters": 40, "embedding": "joint"}),
        build("filter", {"where": "caption != 'a \"b\" \\ \x7f \U0001f600' AND x > 1e-7"}),
        build("density", {"keep": "33.3%", "released": False, "temperature": 1e-5}),
    ]
    text = as_toml([(step.name, recorded(step)) for step in steps], seed=7)
    again = Recipe.parse(text)
    assert again.seed == 7
    assert [recorded(step) for step in again.steps] == [recorded(step) for step in steps]
    listed = tomllib.loads(as_toml([("m", {"a": [1, "x"], "b": {"c d": 2.5}, "inf": float("inf"), "none": None})]))
    assert listed == {"seed": 0, "step": [{"method": "m", "a": [1, "x"], "b": {"c d": 2.5}, "inf": float("inf")}]}
