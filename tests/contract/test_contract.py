"""What every method promises. Methods are found by the registry: a new file under ``methods`` is tested as it is.

Parameters come from the names of the fields: required ones are filled from ``EXAMPLES``; when that is refused
(one of several is needed), the optional ones of ``EXAMPLES`` are tried, one at a time. A method that cannot be
made so names its own: ``example: ClassVar[dict[str, Any]] = {"shape": "round"}``. Every word a ``Literal`` field
allows is tried as well. The pool has image and text embeddings, captions, sizes and a score.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thresher
from tests.conftest import clustered, write_pool
from thresher import (
    Cache,
    EmbeddingStore,
    Processes,
    Selection,
    Serial,
    Threads,
    UsageError,
    build,
    run_steps,
)
from thresher.runtime.parameters import choices, is_required, parameters_of, type_of
from thresher.select.registry import METHODS

EXAMPLES: dict[str, Any] = {"keep": "30%", "eps": 0.2, "where": "width >= 300 AND words(text) > 1"}
N = 17_000  # more than one block of rows
CUTS = {"3 files": (3, False), "7 files": (7, False), "parquet": (2, True)}
ENGINES = {"threads 1": lambda: Threads(1), "threads 3": lambda: Threads(3), "processes 2": lambda: Processes(2)}


def example(name: str) -> dict[str, Any]:
    """Parameters under which a method can be made."""
    cls = METHODS.all()[name]
    if hasattr(cls, "example"):
        return dict(cls.example)
    fields = {field.name: is_required(field) for field in parameters_of(cls)}
    unknown = [field for field, required in fields.items() if required and field not in EXAMPLES]
    if unknown:
        pytest.fail(f"{name}: give the class  example: ClassVar[dict[str, Any]] = ...  with a value for {unknown}")
    given = {field: EXAMPLES[field] for field, required in fields.items() if required}
    for extra in ({}, *({field: EXAMPLES[field]} for field in EXAMPLES if field in fields and field not in given)):
        try:
            build(name, given | extra)
        except UsageError:
            continue
        return given | extra
    pytest.fail(f"{name}: cannot be made from {EXAMPLES}; give the class  example: ClassVar[dict[str, Any]] = ...")


def variants() -> list[tuple[str, str, str]]:
    """(method, field, word) for every word of a ``Literal`` field that is not its default."""
    return [
        (name, field.name, word)
        for name, cls in METHODS.all().items()
        for field in parameters_of(cls)
        for word in choices(type_of(cls, field.name))
        if word != field.default
    ]


def story(selection: Selection) -> dict[str, Any]:
    """All that a selection says, to the bit, except where the pool lies."""
    found: dict[str, Any] = {"header": json.dumps({**selection.header(), "pool": ""}, sort_keys=True)}
    arrays = {"dropped_by": selection.dropped_by}
    for i, step in enumerate(selection.steps):
        arrays |= {f"{i} {kind} {name}": a for kind in ("rows", "groups") for name, a in getattr(step, kind).items()}
    if selection.repeats is not None:
        arrays["repeats"] = selection.repeats
    return found | {name: (a.dtype.str, a.shape, np.ascontiguousarray(a).tobytes()) for name, a in arrays.items()}


def same(one: Selection, other: Selection) -> None:
    a, b = story(one), story(other)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(scope="module")
def stores(places: Path) -> dict[str, EmbeddingStore]:
    rng = np.random.Generator(np.random.Philox(7))
    image, text = clustered(N, 8, 40, 0.5, seed=1), clustered(N, 8, 40, 0.7, seed=1)
    image[N // 2 : N // 2 + 500] = image[:500]  # exact copies
    table = {
        "uid": [f"{i:08x}" for i in rng.permutation(N)],
        "text": [" ".join(["word"] * int(count)) for count in rng.integers(0, 6, N)],
        "width": rng.integers(100, 900, N),
        "height": rng.integers(100, 900, N),
        "similarity": rng.random(N),
    }
    made = {"one": (1, False), **CUTS}
    return {
        name: write_pool(
            places / name, image.astype(np.float16), text.astype(np.float16), table, files=files, parquet=parquet
        )
        for name, (files, parquet) in made.items()
    }


@pytest.fixture(scope="module")
def engines() -> dict[str, Any]:
    return {name: make() for name, make in ENGINES.items()}


@pytest.fixture(scope="module")
def first(stores: dict[str, EmbeddingStore], places: Path) -> Any:
    """The selection of a method: serial, one file, a cache of its own."""
    done: dict[str, Selection] = {}

    def find(name: str) -> Selection:
        if name not in done:
            steps = [build(name, example(name))]
            done[name] = run_steps(stores["one"], steps, engine=Serial(), cache=Cache.at(places / "first" / name))
        return done[name]

    return find


@pytest.fixture(scope="module")
def earlier(stores: dict[str, EmbeddingStore], places: Path) -> Selection:
    """A random part of the pool."""
    return run_steps(
        stores["one"], [build("random", {"keep": "40%"})], seed=5, engine=Serial(), cache=Cache.at(places / "earlier")
    )


each_method = pytest.mark.parametrize("name", list(METHODS.all()))


@each_method
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_same_bytes(name, engine, stores, engines, first, tmp_path) -> None:
    found = run_steps(
        stores["one"], [build(name, example(name))], engine=engines[engine], cache=Cache.at(tmp_path / "cache")
    )
    same(found, first(name))


@each_method
@pytest.mark.parametrize("cut", CUTS)
def test_however_the_files_are_cut(name, cut, stores, first, tmp_path) -> None:
    found = run_steps(stores[cut], [build(name, example(name))], engine=Serial(), cache=Cache.at(tmp_path / "cache"))
    same(found, first(name))


# Other values of parameters that are neither words nor switches.
OTHERS: dict[str, Any] = {
    "batch_size": 150,
    "clamp": "0.4",
    "clusters": 7,
    "column": "width",
    "columns": "width, height=2",
    "draws": 200,
    "iterations": 2,
    "min_per_cluster": 3,
    "neighbors": 2,
    "proxy": "height",
    "refresh": 4,
    "repeats": 2,
    "rounds": 3,
    "sample": "300",
    "target_share": 0.6,
    "temperature": 0.5,
    "weight_inter": 0.0,
    "weight_label": 3.0,
    "weight_self": 0.1,
}


@pytest.fixture(scope="module")
def little(places: Path) -> EmbeddingStore:
    rng = np.random.default_rng(3)
    table = {"uid": [f"{i:08x}" for i in range(700)], "width": rng.integers(100, 900, 700)}
    table |= {"height": rng.integers(100, 900, 700), "text": ["two words"] * 700, "similarity": rng.random(700)}
    return write_pool(places / "little", clustered(700, 8, 9, 0.9), clustered(700, 8, 9, 1.2), table)


@each_method
def test_what_is_cached_for_other_parameters_seeds_and_rows_is_not_taken_for_this(
    name, little, places, tmp_path
) -> None:
    """Everything in one cache, forth and back, against a cache for each."""
    base = example(name)
    changed = [{field: word} for known, field, word in variants() if known == name]
    changed += [{f.name: OTHERS[f.name]} for f in parameters_of(METHODS.all()[name]) if f.name in OTHERS]
    part = run_steps(little, [build("random", {"keep": "60%"})], engine=Serial(), cache=Cache.at(tmp_path / "part"))
    cases = [(base | change, 0, None) for change in ({}, *changed)] + [(base, 1, None), (base, 0, part)]
    shared = Cache.at(tmp_path / "shared")
    for number, (given, seed, within) in enumerate([*cases, *cases[::-1]]):
        try:
            step = build(name, given)
        except UsageError:
            continue
        own = Cache.at(tmp_path / f"own{min(number, 2 * len(cases) - 1 - number)}")
        alone = run_steps(little, [step], seed=seed, within=within, engine=Serial(), cache=own)
        same(run_steps(little, [step], seed=seed, within=within, engine=Serial(), cache=shared), alone)


@each_method
def test_a_warm_cache_gives_the_same_bytes(name, stores, first, places) -> None:
    first(name)
    cache = Cache.at(places / "first" / name)
    same(run_steps(stores["one"], [build(name, example(name))], engine=Serial(), cache=cache), first(name))


@pytest.mark.parametrize(
    "name", [name for name in METHODS.all() if "keep" in {field.name for field in parameters_of(METHODS.all()[name])}]
)
@pytest.mark.parametrize("keep", [1, 777, "0.5", "12.5%", N])
def test_a_budget_is_met_exactly(name, keep, stores, places) -> None:
    cache = Cache.at(places / "first" / name)
    found = run_steps(stores["one"], [build(name, {**example(name), "keep": keep})], engine=Serial(), cache=cache)
    assert len(found) == {1: 1, 777: 777, "0.5": N // 2, "12.5%": N // 8, N: N}[keep]
    check_chain(found)


def check_chain(selection: Selection) -> None:
    """Steps follow on each other, every dropped row has a reason, and the header is JSON that any program reads."""
    rows = selection.total
    for number, step in enumerate(selection.steps):
        given = selection.given(number)
        assert step.rows_in == len(given) == rows
        dropped = np.flatnonzero(selection.dropped_by[given] == number)
        rows = step.rows_out
        assert rows == step.rows_in - len(dropped)
        for place in dropped[:: max(len(dropped) // 200, 1)]:
            reason = step.why(int(place))
            assert reason.strip()
            assert "{" not in reason or "{" in str(step.parameters)
            assert not {"nan", "inf", "-inf", "-1", "None"} & set(reason.replace(",", " ").replace(":", " ").split())
        assert all(len(array) == step.rows_in for array in step.rows.values())
        if "cluster" in step.rows:
            assert all(len(array) > step.rows["cluster"].max() for array in step.groups.values())
        if "kept" in step.groups:
            kept = selection.dropped_by[given] != number
            clusters = step.rows["cluster"][kept]
            assert np.bincount(clusters, minlength=len(step.groups["kept"])).tolist() == step.groups["kept"].tolist()
        if "duplicate_of" in step.rows:
            twins = step.rows["duplicate_of"][dropped]
            assert np.isin(twins, [-1, *given]).all()  # -1: dropped, though it repeats nothing, for a small budget
    assert rows == len(selection) == selection.mask().sum() == len(selection.rows())
    if selection.repeats is None:
        assert selection.uses == len(selection)
    else:
        assert selection.repeats.dtype == np.int32
        np.testing.assert_array_equal(selection.repeats > 0, selection.mask())
        assert selection.uses == selection.repeats.sum() >= len(selection)
    json.dumps(selection.header(), allow_nan=False)


@each_method
def test_only_the_rows_given_and_a_chain_of_provenance(name, stores, earlier, tmp_path) -> None:
    step = build(name, example(name))
    cold = run_steps(stores["one"], [step], within=earlier, engine=Serial(), cache=Cache.at(tmp_path / "cold"))
    assert not (cold.mask() & ~earlier.mask()).any()
    assert 0 < len(cold) < len(earlier)
    assert [s.method for s in cold.steps] == ["random", name]
    assert cold.dropped_by[~earlier.mask()].tolist() == earlier.dropped_by[~earlier.mask()].tolist()
    check_chain(cold)
    assert len(earlier) == N * 4 // 10  # an earlier selection is never changed


@each_method
def test_what_was_computed_before_changes_nothing(name, stores, earlier, places, tmp_path) -> None:
    """In a part of the pool, with the whole pool's arrays in the cache or with none."""
    step = build(name, example(name))
    cold, warm = Cache.at(tmp_path / "cold"), Cache.at(tmp_path / "warm")
    run_steps(stores["one"], [step], engine=Serial(), cache=warm)
    found = [run_steps(stores["one"], [step], within=earlier, engine=Serial(), cache=c) for c in (cold, warm)]
    same(*found)


@each_method
def test_rows_that_are_repeated_stay_so(name, stores, tmp_path) -> None:
    """Whatever comes after a step that repeats rows carries the repeats of those it keeps."""
    cache = Cache.at(tmp_path / "cache")
    drawn = run_steps(stores["one"], [build("scs", {"draws": 9_000, "temperature": 0.1})], engine=Serial(), cache=cache)
    step = build(name, example(name))
    if name == drawn.steps[0].method:
        with pytest.raises(UsageError, match="repeated"):
            run_steps(stores["one"], [step], within=drawn, engine=Serial(), cache=cache)
        return
    found = run_steps(stores["one"], [step], within=drawn, engine=Serial(), cache=cache)
    check_chain(found)
    np.testing.assert_array_equal(found.repeats, np.where(found.mask(), drawn.repeats, 0))


@each_method
def test_methods_and_selections_survive_pickling_and_the_disk(name, first, tmp_path) -> None:
    step = build(name, example(name))
    again = pickle.loads(pickle.dumps(step))
    assert again == step
    assert type(again) is type(step)
    selection = first(name)
    same(pickle.loads(pickle.dumps(selection)), selection)
    selection.save(tmp_path / "selection")
    same(Selection.load(tmp_path / "selection"), selection)
    check_chain(Selection.load(tmp_path / "selection"))


@pytest.mark.parametrize(("name", "field", "word"), variants())
def test_every_word_a_field_allows(name, field, word, stores, earlier, tmp_path) -> None:
    """Serial and one file against threads and three files, within a part of the pool; cold and warm."""
    base = example(name)
    for given in (base, *({extra: value} for extra, value in EXAMPLES.items())):
        try:
            step = build(name, {**given, field: word})
            break
        except UsageError:
            continue
    else:
        pytest.fail(f"{name} cannot be made with {field} = {word!r} from {EXAMPLES}")
    here, there = Cache.at(tmp_path / "here"), Cache.at(tmp_path / "there")
    one = run_steps(stores["one"], [step], within=earlier, engine=Serial(), cache=here)
    same(one, run_steps(stores["3 files"], [step], within=earlier, engine=Threads(3), cache=there))
    check_chain(one)
    run_steps(stores["one"], [step], engine=Serial(), cache=there)
    same(one, run_steps(stores["3 files"], [step], within=earlier, engine=Serial(), cache=there))


TOY = '''
"""Every other row."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from thresher.select.registry import method
from thresher.select.run import Run
from thresher.selection import Selection


@method("every-other")
@dataclass(frozen=True, kw_only=True)
class EveryOther:
    """Keep every other row."""

    example: ClassVar[dict[str, Any]] = {"shape": "round"}
    shape: str = field(metadata={"help": "nobody could guess it"})
    first: Literal["even", "odd"] = "even"

    def select(self, run: Run) -> Selection:
        """Keep it."""
        odd = self.first == "odd"
        return run.selection(self, run.store.ids % 2 == odd, reasons=("its number is {cluster}",), rows=ROWS)
'''


@pytest.mark.skipif("THRESHER_TOY" in os.environ, reason="the toy does not test itself")
@pytest.mark.parametrize(("kind", "fails"), [("sound", False), ("mute", True)])
def test_a_new_file_is_all_a_new_method_takes(kind, fails, tmp_path) -> None:
    """A method dropped into a copy of the package is found and tested; one without reasons fails."""
    package = Path(thresher.__file__).parent
    shutil.copytree(package, tmp_path / "thresher", ignore=shutil.ignore_patterns("__pycache__"))
    evidence = {"sound": '{"cluster": run.store.ids.astype(np.int32)}', "mute": "None"}[kind]
    text = TOY.replace("ROWS", evidence)
    if kind == "mute":
        text = text.replace("its number is {cluster}", "")
    (tmp_path / "thresher" / "select" / "methods" / "toy.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "every-other"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "THRESHER_TOY": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "every-other-first-odd" in done.stdout or not fails, done.stdout
    assert (done.returncode, "failed" in done.stdout) == ((1, True) if fails else (0, False)), done.stdout + done.stderr
    assert "passed" in done.stdout
