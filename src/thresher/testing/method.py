"""The contract of selection methods, as a test class to inherit.

    from thresher.testing import MethodContract

    class TestAtypical(MethodContract):
        plugin = Atypical

The pool has image and text embeddings, captions, sizes and a score, and spans several blocks.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from thresher.errors import PoolError, UsageError
from thresher.pool.store import EmbeddingStore
from thresher.pruning.recipe import run_steps
from thresher.pruning.registry import build as method_named
from thresher.runtime.cache import Cache
from thresher.runtime.engine import Engine
from thresher.runtime.engines.processes import Processes
from thresher.runtime.engines.serial import Serial
from thresher.runtime.engines.threads import Threads
from thresher.runtime.parameters import build, choices, is_required, parameters_of, type_of, without_none
from thresher.selection import Keep, Selection
from thresher.testing.pools import clustered, write_pool

N = 3_000  # rows of the pool
FEW = 400  # rows of the smaller pool, on which every parameter is changed
BLOCK = 1_280  # rows of a block; more than a stripe, so that there are several of both
CUTS = {"3 files": (3, False), "7 files": (7, False), "parquet": (2, True)}
ENGINES: dict[str, Engine] = {"threads 1": Threads(1), "threads 3": Threads(3), "processes 2": Processes(2)}

# Values of parameters by name: for required ones, and for others if a method needs one of several.
EXAMPLES: dict[str, Any] = {"keep": "30%", "eps": 0.2, "where": "width >= 300 AND words(text) > 1"}

Values = dict[str, Any]
Table = dict[str, Sequence[Any]]


def example_of(cls: type[Any]) -> Values:
    """Return parameters that a method can be made with: its ``example``, else values by the names of its fields."""
    if hasattr(cls, "example"):
        return dict(cls.example)
    required = {item.name: is_required(item) for item in parameters_of(cls)}
    if unknown := [name for name, needed in required.items() if needed and name not in EXAMPLES]:
        pytest.fail(f"{cls.name}: give the class  example: ClassVar[dict[str, Any]] = ...  with a value for {unknown}")
    values = {name: EXAMPLES[name] for name, needed in required.items() if needed}
    for extra in ({}, *({name: EXAMPLES[name]} for name in EXAMPLES if name in required and name not in values)):
        try:
            build(cls, cls.name, values | extra)
        except UsageError:
            continue
        return values | extra
    pytest.fail(f"{cls.name}: cannot be made from {EXAMPLES}; give the class  example: ClassVar[dict[str, Any]] = ...")


class MethodContract:
    """The contract of a method, as tests.

    Attributes:
        plugin: The method's class.
        example: Parameters to make it with. By default its class variable ``example``, else values for fields named
            ``keep``, ``eps`` and ``where``.
        other: Field -> a value other than in the example, or several parameters to change together. By default its
            class variable ``other``; for other fields a value is derived from the type.
    """

    plugin: ClassVar[type[Any]]
    example: ClassVar[Mapping[str, Any] | None] = None
    other: ClassVar[Mapping[str, Any]] = {}

    @staticmethod
    def pool(rows: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], Table]:
        """Return image and text embeddings, (rows, D), and a table to test with; override it for other columns."""
        rng = np.random.Generator(np.random.Philox(7))
        image, text = clustered(rows, 8, 40, 0.5, seed=1), clustered(rows, 8, 40, 0.7, seed=1)
        copies = rows // 30
        image[rows // 2 : rows // 2 + copies] = image[:copies]  # exact
        table: Table = {
            "uid": [f"{i:08x}" for i in rng.permutation(rows)],
            "text": [" ".join(["word"] * int(count)) for count in rng.integers(0, 6, rows)],
            "width": rng.integers(100, 900, rows).tolist(),
            "height": rng.integers(100, 900, rows).tolist(),
            "similarity": rng.random(rows).tolist(),
        }
        return image.astype(np.float16), text.astype(np.float16), table

    @classmethod
    def parameters(cls) -> Values:
        """Return the parameters to make the method with."""
        return dict(cls.example) if cls.example is not None else example_of(cls.plugin)

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Any:
        """Make the method."""
        return build(cls.plugin, cls.plugin.name, values)

    @classmethod
    def others(cls, folder: Path) -> Mapping[str, Any]:
        """Return other values of fields, see ``other``; files they need can be written into ``folder``."""
        return {**getattr(cls.plugin, "other", {}), **cls.other}

    @pytest.fixture
    def bench(self, tmp_path_factory: pytest.TempPathFactory) -> Bench:
        """Return pools and selections that several tests use, made once per session."""
        contract: Any = type(self)
        return _bench(contract, tmp_path_factory.getbasetemp() / "contract")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize ``word`` with every word that a field allows."""
        if "word" in metafunc.fixturenames:
            words = [(item.name, word) for item in parameters_of(self.plugin) for word in _words(self.plugin, item)]
            metafunc.parametrize(("name", "word"), words)

    # --- the same bytes -----------------------------------------------------------------------------

    @pytest.mark.parametrize("engine", ENGINES)
    def test_every_engine_gives_the_same_bytes(self, engine: str, bench: Bench, tmp_path: Path) -> None:
        """For any number of workers."""
        selection = run_steps(bench.store("one"), [bench.step], engine=ENGINES[engine], cache=Cache.at(tmp_path))
        same(selection, bench.first)

    @pytest.mark.parametrize("cut", CUTS)
    def test_the_split_into_files_does_not_matter(self, cut: str, bench: Bench, tmp_path: Path) -> None:
        """For .npy files and for parquet."""
        same(run(bench.store(cut), bench.step, tmp_path), bench.first)

    def test_a_warm_cache_gives_the_same_bytes(self, bench: Bench) -> None:
        """Everything is in the cache."""
        same(bench.first, run(bench.store("one"), bench.step, bench.folder / "first"))

    def test_a_cache_of_the_whole_pool_gives_the_same_bytes(self, bench: Bench, tmp_path: Path) -> None:
        """A part of the pool gives the same result with the arrays of the whole pool in the cache, and without."""
        run(bench.store("one"), bench.step, tmp_path)
        same(bench.part, run(bench.store("one"), bench.step, tmp_path, within=bench.earlier))

    def test_cached_results_of_other_parameters_seeds_and_rows_are_not_used(self, bench: Bench, tmp_path: Path) -> None:
        """Every parameter is changed: one shared cache, in both orders, gives the same results as a cache for each."""
        cases: list[tuple[Any, int, Selection | None]] = []
        alone: list[Selection] = []
        base, others, part = self.parameters(), self.others(tmp_path), None
        store = bench.few

        def add(values: Values, seed: int = 0, within: Selection | None = None) -> bool:
            try:
                step = self.build(values)
                selection = run(store, step, tmp_path / f"own {len(cases)}", seed=seed, within=within)
            except (UsageError, PoolError):
                return False
            cases.append((step, seed, within))
            alone.append(selection)
            return True

        assert add(base), f"{self.plugin.name} cannot run with {base}"
        for item in parameters_of(self.plugin):
            changes = _changes(self.plugin, item, base, others)
            instead = [change | {name: None} for change in changes for name in base if name not in change]
            if not [change for change in changes if add(base | change)] and not any(add(base | one) for one in instead):
                pytest.fail(
                    f"{self.plugin.name}: no other value of {item.name} works ({changes}); give the class  "
                    f"other: ClassVar[dict[str, Any]] = {{{item.name!r}: ...}}"
                )
        part = run(store, method_named("random", {"keep": "60%"}), tmp_path / "part")
        add(base, seed=1)
        add(base, within=part)
        known = list(zip(cases, alone, strict=True))
        for (step, seed, within), wanted in (*known, *known[::-1]):
            selection = run(store, step, tmp_path / "shared", seed=seed, within=within)
            same(selection, wanted, f"after other parameters, {step} is answered with what the cache holds for them")

    def test_every_word_a_field_allows(self, name: str, word: str, bench: Bench, tmp_path: Path) -> None:
        """Serial on one file and threads on three files agree on a part of the pool, with a cold and a warm cache."""
        base, others = self.parameters(), self.others(tmp_path)
        more = [dict(one) if isinstance(one, Mapping) else {key: one} for key, one in others.items()]
        for values in (base, *({extra: value} for extra, value in EXAMPLES.items()), *(base | one for one in more)):
            try:
                step = self.build({**values, name: word})
                break
            except UsageError:
                continue
        else:
            pytest.fail(f"{self.plugin.name} cannot be made with {name} = {word!r}, whatever the other parameters")
        one = run(bench.store("one"), step, tmp_path / "here", within=bench.earlier)
        there = Cache.at(tmp_path / "there")
        several = bench.store("3 files")
        same(one, run_steps(several, [step], within=bench.earlier, engine=Threads(3), cache=there))
        check_chain(one)
        run_steps(bench.store("one"), [step], engine=Serial(), cache=there)
        same(one, run_steps(several, [step], within=bench.earlier, engine=Serial(), cache=there))

    # --- what it keeps ------------------------------------------------------------------------------

    @pytest.mark.parametrize("keep", [1, 777, "0.5", "12.5%", N])
    def test_a_budget_is_met_exactly(self, keep: Any, bench: Bench) -> None:
        """For budgets from one row to all rows."""
        if "keep" not in {item.name for item in parameters_of(self.plugin)}:
            pytest.skip("has no budget")
        method = self.build({**self.parameters(), "keep": keep})
        selection = run(bench.store("one"), method, bench.folder / "first")
        assert len(selection) == {1: 1, 777: 777, "0.5": N // 2, "12.5%": N // 8, N: N}[keep]
        check_chain(selection)

    def test_only_given_rows_are_kept_and_steps_form_a_chain(self, bench: Bench) -> None:
        """Rows that an earlier step dropped stay dropped, and the earlier selection is not changed."""
        earlier, selection = bench.earlier, bench.part
        assert not (selection.mask() & ~earlier.mask()).any()
        assert 0 < len(selection) < len(earlier)
        assert [step.method for step in selection.steps] == ["random", self.plugin.name]
        assert selection.dropped_by[~earlier.mask()].tolist() == earlier.dropped_by[~earlier.mask()].tolist()
        check_chain(selection)
        assert len(earlier) == N * 4 // 10

    def test_repeats_of_rows_are_preserved(self, bench: Bench, tmp_path: Path) -> None:
        """After a step that repeats rows, the method keeps the repeats of the rows it keeps, or raises an error."""
        drawn = bench.drawn
        try:
            selection = run(bench.store("one"), bench.step, tmp_path, within=drawn)
        except UsageError as error:
            assert "repeated" in str(error)  # noqa: PT017
            assert bench.first.repeats is not None
            return
        check_chain(selection)
        assert selection.repeats is not None
        assert drawn.repeats is not None
        np.testing.assert_array_equal(selection.repeats, np.where(selection.mask(), drawn.repeats, 0))

    def test_methods_and_selections_survive_pickling_and_the_disk(self, bench: Bench, tmp_path: Path) -> None:
        """Bit for bit."""
        again = pickle.loads(pickle.dumps(bench.step))
        assert again == bench.step
        assert type(again) is type(bench.step)
        same(pickle.loads(pickle.dumps(bench.first)), bench.first)
        bench.first.save(tmp_path / "selection")
        same(Selection.load(tmp_path / "selection"), bench.first)
        check_chain(Selection.load(tmp_path / "selection"))


# --- the bench ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bench:
    """Pools and selections that the tests of a method share.

    Attributes:
        contract: The contract class of the method.
        folder: Folder of its caches.
        pools: Folder of the pools, shared by all methods.
    """

    contract: type[MethodContract]
    folder: Path
    pools: Path

    def store(self, cut: str) -> EmbeddingStore:
        """Return the pool as "one" file, or split as in ``CUTS``."""
        return _store(self.contract.pool, self.pools, N, *CUTS.get(cut, (1, False)))

    @property
    def few(self) -> EmbeddingStore:
        """The smaller pool, as one file."""
        return _store(self.contract.pool, self.pools, FEW, 1, False)

    @cached_property
    def step(self) -> Any:
        """The method."""
        return self.contract.build(self.contract.parameters())

    @cached_property
    def first(self) -> Selection:
        """The method's selection: serial, one file, its own cache."""
        return run(self.store("one"), self.step, self.folder / "first")

    @cached_property
    def part(self) -> Selection:
        """The method's selection of a part of the pool, with its own cache."""
        return run(self.store("one"), self.step, self.folder / "part", within=self.earlier)

    @property
    def earlier(self) -> Selection:
        """A random part of the pool."""
        return _chosen(self.contract.pool, self.pools, "random", 5, ("keep", "40%"))

    @property
    def drawn(self) -> Selection:
        """Some rows of the pool, drawn with repeats."""
        return _chosen(self.contract.pool, self.pools, "scs", 0, ("draws", N // 2), ("temperature", 0.1))


@cache
def _bench(contract: type[MethodContract], folder: Path) -> Bench:
    pool = contract.pool
    own = folder / f"{contract.__module__}.{contract.__qualname__}"
    return Bench(contract, own, folder / "pools" / f"{pool.__module__}.{pool.__qualname__}")


@cache
def _store(pool: Any, folder: Path, rows: int, files: int, parquet: bool) -> EmbeddingStore:
    made = write_pool(folder / f"{rows} {files} {parquet}", *pool(rows), files=files, parquet=parquet)
    return replace(made, block=BLOCK)


@cache
def _chosen(pool: Any, folder: Path, name: str, seed: int, *values: tuple[str, Any]) -> Selection:
    store = _store(pool, folder, N, 1, False)
    return run(store, method_named(name, dict(values)), folder / name, seed=seed)


def run(store: EmbeddingStore, step: Any, cache: Path, *, seed: int = 0, within: Selection | None = None) -> Selection:
    """Run a step serially."""
    return run_steps(store, [step], seed=seed, within=within, engine=Serial(), cache=Cache.at(cache))


# --- parameters -----------------------------------------------------------------------------------------


def _words(cls: type[Any], item: Field[Any]) -> list[str]:
    return [word for word in choices(without_none(type_of(cls, item.name))) if word != item.default]


def _changes(cls: type[Any], item: Field[Any], base: Values, others: Mapping[str, Any]) -> list[Values]:
    """Return changes of the base's parameters that give a field another value; some may not be allowed."""
    if item.name in others:
        other = others[item.name]
        return [dict(other) if isinstance(other, Mapping) else {item.name: other}]
    default = None if item.default is MISSING else item.default
    value, kind = base.get(item.name, default), without_none(type_of(cls, item.name))
    return [{item.name: other} for other in _others(kind, value) if other != value]


def _others(kind: Any, value: Any) -> Iterator[Any]:
    if words := choices(kind):
        yield from words
    elif kind is bool:
        yield not value
    elif kind is int:
        yield from (value + 1, value - 1) if isinstance(value, int) else (7, 1)
    elif kind is float:
        yield from (value / 2, value + 0.25, value - 0.25) if isinstance(value, (int, float)) else (0.5, 0.25)
    elif kind is Keep:
        yield from ("20%", 77)
    else:
        yield f"{value or 'other'}x"


# --- selections -----------------------------------------------------------------------------------------


def bytes_of(selection: Selection) -> dict[str, Any]:
    """Return the content of a selection, bit for bit, except the location of the pool."""
    content: dict[str, Any] = {"header": json.dumps({**selection.header(), "pool": ""}, sort_keys=True)}
    arrays: dict[str, npt.NDArray[Any]] = {"dropped_by": selection.dropped_by}
    for i, step in enumerate(selection.steps):
        for kind in ("rows", "groups", "reference"):
            arrays |= {f"{i} {kind} {name}": array for name, array in getattr(step, kind).items()}
    if selection.repeats is not None:
        arrays["repeats"] = selection.repeats
    return content | {name: (a.dtype.str, a.shape, np.ascontiguousarray(a).tobytes()) for name, a in arrays.items()}


def same(one: Selection, other: Selection, why: str = "") -> None:
    """Assert that two selections are equal, bit for bit."""
    a, b = bytes_of(one), bytes_of(other)
    assert a.keys() == b.keys(), why
    assert [name for name in a if a[name] != b[name]] == [], why


def check_chain(selection: Selection) -> None:
    """Assert that steps form a chain, dropped rows have a reason, and the header is valid JSON."""
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
            assert np.isin(twins, [-1, *given]).all()  # -1: no duplicate, but dropped to meet the budget
    assert rows == len(selection) == selection.mask().sum() == len(selection.rows())
    if selection.repeats is None:
        assert selection.uses == len(selection)
    else:
        assert selection.repeats.dtype == np.int32
        np.testing.assert_array_equal(selection.repeats > 0, selection.mask())
        assert selection.uses == selection.repeats.sum() >= len(selection)
    json.dumps(selection.header(), allow_nan=False)
