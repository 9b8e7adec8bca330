"""The front door: three lines for each task, every name documented, arguments checked, one implementation."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thresher as th
from thresher.cli.main import main
from thresher.dynamic.registry import POLICIES
from thresher.pruning.registry import METHODS
from thresher.runtime.plugins import origin_of

ROOT = Path(__file__).parents[1]
POOL = str(ROOT / "examples" / "twemoji")
ROOMS = {"select": "pruning", "embed": "embedding", "reshard": "resharding", "evaluate": "evaluation"}
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture
def vectors(rows: Callable[..., np.ndarray]) -> np.ndarray:
    made = rows(400, 8)
    made[200:] = made[:200] + 0.01
    return made


# --- three lines for each task ----------------------------------------------------------------------


def test_an_array_becomes_30_percent_of_it_by_density(vectors: np.ndarray) -> None:
    kept = th.select(vectors, th.Density(keep="30%"))
    subset = kept.filter(vectors)
    assert subset.shape == (120, 8)
    np.testing.assert_array_equal(subset, vectors[kept.rows()])


def test_a_frame_loses_its_near_duplicates_and_says_why(vectors: np.ndarray) -> None:
    import pandas as pd

    df = pd.DataFrame({"name": [f"row {i}" for i in range(len(vectors))], "embedding": list(vectors)})
    kept = th.select(df, th.SemDeDup(eps=0.05))
    unique = kept.filter(df)
    df["reason"] = kept.to_pandas()["reason"]
    assert isinstance(unique, pd.DataFrame)
    assert unique["name"].tolist() == df["name"][kept.mask()].tolist()
    assert 150 < len(unique) <= 200
    assert df["reason"][~kept.mask()].str.match(r"duplicate of row \d+: cosine 0\.\d+ > 0\.95").all()
    assert (df["reason"][kept.mask()] == "kept").all()


def test_a_hugging_face_dataset_is_filtered(vectors: np.ndarray) -> None:
    import datasets as hf

    dataset = hf.Dataset.from_dict({"n": list(range(len(vectors))), "image_embedding": list(vectors)})
    kept = th.select(dataset, th.SemDeDup(eps=0.05), th.Density(keep="40%"))
    train = kept.filter(dataset)
    assert isinstance(train, hf.Dataset)
    assert train["n"][:] == kept.rows().tolist()


def test_another_budget_reads_no_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = th.select(POOL, th.Density(keep="40%", clusters=20))

    def refused(*args: Any) -> Any:
        raise AssertionError("a vector is read")

    from thresher.io.parquet import ParquetPiece

    for name in ("take", "stream"):
        monkeypatch.setattr(ParquetPiece, name, refused)
    less = kept.recut(keep="30%")
    monkeypatch.undo()
    anew = th.select(POOL, th.Density(keep="30%", clusters=20))
    np.testing.assert_array_equal(less.dropped_by, anew.dropped_by)
    assert less.header() == anew.header()


# --- names ------------------------------------------------------------------------------------------


def test_every_public_name_is_on_the_page() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    missing = [name for name in th.__all__ if not re.search(rf"\b{name}\b", page)]
    assert missing == []


def test_methods_and_policies_are_public_by_the_name_of_their_class() -> None:
    for point in (METHODS, POLICIES):
        for cls in point.all().values():
            if origin_of(cls).package == "thresher":
                assert getattr(th, cls.__name__, None) is cls, f"add {cls.__name__} to src/thresher/__init__.py"


def test_completion_lists_only_public_names() -> None:
    assert dir(th) == sorted([*th.__all__, "__version__"])
    assert not [name for name in th.__all__ if name.startswith("_")]


@pytest.mark.parametrize("name", ["select", "embed", "reshard", "evaluate"])
def test_functions_and_rooms_have_names_of_their_own(name: str) -> None:
    code = f"import thresher.{ROOMS[name]} as room; import thresher; print(thresher.{name}.__module__, room.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"thresher.api thresher.{ROOMS[name]}\n"


def test_static_and_lazy_names_are_the_same() -> None:
    """Type checkers read the imports, and the program reads the tables."""
    tree = ast.parse((ROOT / "src" / "thresher" / "__init__.py").read_text(encoding="utf-8"))
    found = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("thresher")
        for alias in node.names
    }
    assert {name for _, name in found} == set(th.__all__)
    for module, name in found:
        assert getattr(th, name) is getattr(__import__(str(module), fromlist=[name]), name)


@pytest.mark.slow
def test_a_program_of_a_user_has_no_type_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mypy.api as api

    program = tmp_path / "program.py"
    program.write_text(
        "import numpy as np\n"
        "import thresher as th\n"
        "X = np.zeros((3, 4), np.float32)\n"
        'kept = th.select("pool", th.SemDeDup(eps=0.1), th.Density(keep="40%"), "demo", seed=1)\n'
        "same: list[int] = kept.filter([1, 2])\n"
        'less: th.Selection = kept.recut(keep="30%")\n'
        "store: th.EmbeddingStore = th.from_arrays(X, keys=[1, 2, 3])\n"
        'log: list[dict[str, object]] = th.train_clip("data", "run", policy=th.Scan(), epochs=3)\n'
        "import polars as pl\n"
        "from torch.utils.data import Dataset, Subset\n"
        "class Numbers(Dataset[int]):\n"
        "    def __getitem__(self, row: int) -> int:\n"
        "        return row\n"
        "part: Subset[int] = kept.filter(Numbers())\n"
        "frame: pl.DataFrame = kept.filter(pl.DataFrame())\n"
        "pair: tuple[int, ...] = kept.filter((1, 2))\n"
        "budget: str = th.Density(keep=[1]).keep  # type: ignore[arg-type, assignment]\n"
        "reveal_type(kept.filter(X))\n"
    )
    monkeypatch.setenv("MYPYPATH", str(ROOT / "src"))
    words = ["--config-file=", "--strict", "--ignore-missing-imports", "--follow-imports=silent", str(program)]
    said, _, _ = api.run([*words, "--cache-dir", str(tmp_path / "cache")])
    lines = [line for line in said.splitlines() if line.startswith(str(program)) or "program.py" in line]
    assert len(lines) == 1, said
    assert 'note: Revealed type is "numpy.ndarray[' in lines[0]


FUNCTIONS = [name for name in th.__all__ if inspect.isfunction(getattr(th, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_describes_every_argument(name: str) -> None:
    function = getattr(th, name)
    text = inspect.getdoc(function) or ""
    names = list(inspect.signature(function).parameters)
    if "Args:" in text or len(names) > 2:
        for parameter in names:
            assert re.search(rf"^    \*{{0,2}}{parameter}: ", text, re.MULTILINE), f"{name}: {parameter}"


# --- methods check their parameters -----------------------------------------------------------------


@pytest.mark.parametrize("value", ["30%", "0.3", 0.3, np.float32(0.3), np.float64(0.3), th.Keep.parse("30%")])
def test_budgets_are_read_when_a_method_is_made(value: Any) -> None:
    assert th.Density(keep=value) == th.build("density", {"keep": "30%"})
    assert th.Density(keep=value).keep.of(1000) == 300


@pytest.mark.parametrize("value", [1000, "1000", "1_000", np.int32(1000), np.uint64(1000)])
def test_numbers_of_rows_are_read_too(value: Any) -> None:
    assert th.Random(keep=value).keep == th.Keep(count=1000)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: th.Density(keep="30%%"), r"density: keep: cannot read '30%%' as an amount to keep; give a share like"),
        (lambda: th.Density(keep=1.0), r"density: keep: cannot keep 1\.0: for all rows write 100%"),
        (lambda: th.Density(keep=[1]), r"density: keep: cannot read '\[1\]'"),
        (lambda: th.Density(keep=None), r"density: keep: cannot read 'None'"),
        (lambda: th.Density(), r"density needs keep \(share or number of rows to keep\)"),
        (lambda: th.Density(kep=1), r"density has no parameter 'kep'; .*Did you mean 'keep'"),
        (lambda: th.Density(keep=1, order=3), "density: order = 3; allowed: hard, easy, random"),
        (lambda: th.Density(keep=1, order=np.ones(3)), "density: order = .*; allowed: hard, easy, random"),
        (lambda: th.Density(keep=1, clusters="many"), "density: clusters = 'many'; expected a whole number"),
        (lambda: th.Density(keep=1, clusters=2.5), "density: clusters = 2.5; expected a whole number"),
        (lambda: th.Density(keep=1, released="yes"), "density: released = 'yes'; allowed: true, false"),
        (lambda: th.SemDeDup(eps="small"), "semdedup: eps = 'small'; expected a finite number"),
        (lambda: th.SemDeDup(eps=np.ones(2)), r"semdedup: eps = array.*; expected a finite number"),
        (lambda: th.ClipScore(threshold=float("nan")), "clip-score: threshold = nan; expected a finite number"),
        (lambda: th.Filter(where=3.5j), "filter: where = 3.5j; expected text"),
        (lambda: th.Random("30%"), "random: give each parameter once, by name; it has keep"),
    ],
)  # fmt: skip
def test_wrong_values_say_what_is_allowed(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(th.UsageError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name, cls in METHODS.all().items() if "keep" in cls.__dataclass_fields__])  # type: ignore[attr-defined]
def test_every_method_reads_its_budget(name: str) -> None:
    from thresher.testing.method import example_of

    cls: Any = METHODS.find(name)
    values = {k: v for k, v in example_of(cls).items() if k not in ("keep", "threshold", "eps")}
    made = cls(**values, keep="30%")
    assert made.keep == th.Keep.parse("30%")
    assert dataclasses.replace(made, keep=12).keep == th.Keep(count=12)
    assert made == th.build(name, {**values, "keep": 0.3})
    shown = set(inspect.signature(cls).parameters)
    assert shown == {item.name for item in dataclasses.fields(cls)}, "help shows the parameters"


def test_methods_of_other_packages_check_theirs_too() -> None:
    @th.method("mine")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine:
        keep: th.Keep
        times: float = 1.0
        path: str = ""

        def __post_init__(self) -> None:
            if self.times < 0:
                raise th.UsageError(f"times = {self.times}: must be at least 0")

        def select(self, run: th.Run) -> th.Selection:
            keep_n = np.arange(len(run.store)) < self.keep.of(len(run.store))
            return run.selection(self, keep_n, reasons=("late",))

    assert Mine(keep="30%", times=2, path=Path("a")) == Mine(keep=0.3, times=2.0, path="a")  # type: ignore[arg-type]
    with pytest.raises(th.UsageError, match=r"mine: times = '2'; expected a finite number"):
        Mine(keep="30%", times="2")  # type: ignore[arg-type]
    with pytest.raises(th.UsageError, match="must be at least 0"):
        Mine(keep="30%", times=-1)  # type: ignore[arg-type]
    kept = th.select(np.eye(8, dtype=np.float32), Mine(keep="50%"), **QUIET)  # type: ignore[arg-type]
    assert kept.rows().tolist() == [0, 1, 2, 3]
    assert kept.recut(keep=2).rows().tolist() == [0, 1], "a method that is in no registry"


# --- policies check theirs ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["30%", "0.3", 0.3, np.float32(0.3), np.float64(0.3)])
def test_shares_are_read_when_a_policy_is_made(value: Any) -> None:
    assert th.Scan(rho=value) == th.Scan(rho=0.3)
    assert th.DynamicRandom(keep=value).keep == 0.3
    assert isinstance(th.Scan(rho=value).rho, float)
    assert th.InfoBatch(epochs=np.int64(9), delta="100%").delta == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: th.Scan(rho="30%%"), "policy scan: rho: cannot read '30%%' as a share; give a share strictly"),
        (lambda: th.Scan(rho="0%"), "policy scan: rho: cannot read '0%' as a share"),
        (lambda: th.Scan(rho=None), "policy scan: rho = None; expected a finite number"),
        (lambda: th.Scan(rho=[0.3]), r"policy scan: rho = \[0\.3\]; expected a finite number"),
        (lambda: th.Scan(rho=True), "policy scan: rho = True; expected a finite number"),
        (lambda: th.Scan(rho=float("nan")), "policy scan: rho = nan; expected a finite number"),
        (lambda: th.Scan(cycle="3"), "policy scan: cycle = '3'; expected a whole number"),
        (lambda: th.Scan(cycle=2.5), "policy scan: cycle = 2.5; expected a whole number"),
        (lambda: th.Scan(mode="bth"), "policy scan: mode = 'bth'; allowed: both, .*Did you mean 'both'"),
        (lambda: th.Scan(roh=0.3), "policy scan has no parameter 'roh'; it has .*Did you mean 'rho'"),
        (lambda: th.Scan(0.3), "policy scan: give each parameter once, by name"),
        (lambda: th.DynamicRandom(), r"policy dynamic-random needs keep \(share of an epoch to keep\)"),
        (lambda: th.Static(times_N=[1, 2]), r"policy static: times_N = \[1, 2\]; expected ndarray"),
    ],
)  # fmt: skip
def test_wrong_options_say_what_is_allowed(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(th.UsageError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


# --- select -----------------------------------------------------------------------------------------


def test_methods_recipes_and_dictionaries_are_steps(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('seed = 5\n[[step]]\nmethod = "random"\nkeep = "50%"\n')
    expected = th.select(POOL, th.Random(keep="50%"), seed=5, **QUIET)
    for steps in (
        [recipe],
        [str(recipe)],
        [th.Recipe.load(str(recipe))],
        [[recipe]],
    ):
        np.testing.assert_array_equal(th.select(POOL, *steps, **QUIET).dropped_by, expected.dropped_by)
    for step in ({"method": "random", "keep": "50%"}, [th.Random(keep="50%")], (th.Random(keep=0.5),)):
        made = th.select(th.open(POOL), step, seed=5, engine="serial", cache=tmp_path / "cache", **QUIET)
        np.testing.assert_array_equal(made.dropped_by, expected.dropped_by)
    again = th.select(POOL, recipe, th.ClipScore(keep=10), within=expected, seed=1, **QUIET)
    assert [step.method for step in again.steps] == ["random", "random", "clip-score"]
    expected.save(tmp_path / "kept")
    within = th.select(POOL, th.ClipScore(keep=10), within=tmp_path / "kept", **QUIET)
    assert len(within) == 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((POOL,), "give one method or more"),
        ((POOL, "density"), r"density is a method with parameters: give thresher.Density\(...\)"),
        ((POOL, "basik"), "basik: neither a readable file .* nor a shipped recipe"),
        ((POOL, th.Density), "not the class Density; give its parameters"),
        ((POOL, 3), "a method is an object such as .*; not int"),
        ((POOL, {"keep": 3}), 'names no method; write {"method": "density"'),
        ((POOL, {"method": "densty", "keep": 3}), "no method 'densty'.*Did you mean 'density'"),
        ((3, th.Random(keep=1)), "image: int of int64"),
        ((POOL, th.Random(keep=10**6)), "random: cannot keep 1,000,000 rows of the 3,953"),
    ],
)  # fmt: skip
def test_what_cannot_be_selected_is_named(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(th.UsageError, match=said) as error:
        th.select(*arguments, **QUIET)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda: th.doctor(np.ones((3, 4))), "data: ndarray; give a path or URL; thresher.inspect takes embeddings in"),
        (lambda: th.reshard([1], "kept.txt", "out"), "data: list; give a path or URL"),
        (lambda: th.reshard("data", "kept.txt", 3), "out: int; give a path or URL"),
        (lambda: th.train_clip([1], "run"), "data: list; give a path or URL"),
        (lambda: th.select(POOL, th.Random(keep=3), within=np.ones(3)), "within: ndarray; give a path or URL of a sel"),
        (lambda: th.score(POOL, "clip-score", within=3), "within: int; give a path or URL of a selection, or the sel"),
        (lambda: th.sweep(POOL, "random", keep=[3, 4], within=3), "within: int; give a path or URL of a selection, or"),
        (lambda: th.compare({"a": 3}), "compare: int; give a path or URL of a selection, or the selection"),
    ],
)
def test_what_must_be_a_path_is_named(use: Callable[[], Any], said: str) -> None:
    with pytest.raises(th.UsageError, match=said):
        use()


def test_progress_is_shown_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    th.select(POOL, th.Random(keep="10%"), **QUIET)
    assert capsys.readouterr() == ("", "")
    th.select(POOL, th.Random(keep="10%"))
    assert "random: kept 395 of 3,953 rows" in capsys.readouterr().err


def test_short_reprs() -> None:
    kept = th.select(POOL, th.SemDeDup(eps=0.15, clusters=20), th.Random(keep="50%"), **QUIET)
    lines = repr(kept).split("\n")
    assert re.fullmatch(r"Selection\(1,\d{3} of 3,953 rows \(\d\d\.\d%\) of .*examples/twemoji", lines[0])
    assert re.fullmatch(r"  3,953 -> semdedup 2,\d{3} -> random 1,\d{3}\)", lines[1])
    assert re.fullmatch(r"Step\(semdedup: kept 2,\d{3} of 3,953 rows\)", repr(kept.steps[0]))
    assert re.fullmatch(r"EmbeddingStore\(.*twemoji: 3,953 rows, image 256, text 256, key 'key'\)", repr(th.open(POOL)))
    groups = th.cluster(POOL, 20, **QUIET)
    assert re.fullmatch(r"Groups\(20 clusters of 3,953 rows, \d+ to \d+ each\)", repr(groups))
    assert repr(th.Keep.parse("30%")) == "Keep.parse('30%')"
    hostile = dataclasses.replace(kept, pool="\x1b[31m" + "x" * 500)
    assert "\x1b" not in repr(hostile)
    assert len(repr(hostile)) < 400


# --- the command line gives the same ----------------------------------------------------------------


def test_the_command_line_gives_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    def run(*words: str) -> Any:
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    store = th.open(POOL)
    kept = th.select(store, th.Density(keep="30%", clusters=20), **QUIET)
    run("select", "density", POOL, "-o", str(tmp_path / "a"), "--keep", "30%", "--clusters", "20", "--quiet")
    loaded = th.Selection.load(tmp_path / "a")
    np.testing.assert_array_equal(loaded.dropped_by, kept.dropped_by)
    assert loaded.header()["steps"] == kept.header()["steps"]
    other = kept.recut(keep="10%")
    other.save(tmp_path / "b")
    said = run("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    found = th.compare(tmp_path / "a", tmp_path / "b")
    assert {name: said[name] for name in found} == json.loads(json.dumps(found))
    assert kept.compare(other)["pairs"][0]["both"] == found["pairs"][0]["both"] == len(other)
    key = next(keys[0] for _, keys in store.keys())
    explained = kept.explain(key)
    said = run("explain", str(tmp_path / "a"), key)
    assert {name: said[name] for name in explained} == json.loads(json.dumps(explained))
    kept.export("keys", tmp_path / "python.txt", manifest=False)
    assert main(["export", str(tmp_path / "a"), "--as", "keys", "-o", str(tmp_path / "cli.txt"), "--no-manifest"]) == 0
    assert (tmp_path / "python.txt").read_bytes() == (tmp_path / "cli.txt").read_bytes()
    table = th.score(store, "clip-score", **QUIET)
    scored = th.score(store, th.ClipScore, out=tmp_path / "scores.parquet", **QUIET)
    np.testing.assert_array_equal(table.values_n, scored.values_n)
    assert (tmp_path / "scores.parquet").exists()


COMMANDS = {
    "select": "select random POOL -o OUT --keep 10%",
    "score": "score clip-score POOL -o OUT.parquet",
    "cluster": "cluster POOL -o OUT --clusters 3",
    "advise": "advise POOL --samples-seen 100",
    "inspect": "inspect POOL",
    "doctor": "doctor POOL",
    "embed": "embed POOL -o OUT --encoder tests.toy:Toy",
    "reshard": "reshard POOL keys.txt -o OUT",
    "coreset": "coreset POOL -o OUT --keep 10%",
    "reference": "reference POOL -o OUT.parquet",
    "sweep": "sweep random POOL --keep 10%,20%",
    "train_clip": "train clip POOL -o OUT",
    "train_moco": "train moco POOL -o OUT",
    "compare": "compare SEL SEL2",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_call_the_functions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One implementation: the function gets the first argument, and only arguments that it has."""
    from thresher import api

    signature = inspect.signature(getattr(api, name))

    def called(*args: Any, **options: Any) -> None:
        signature.bind(*args, **options)
        raise th.UsageError(f"called with {args[0]}")

    monkeypatch.setattr(api, name, called)
    for sel in ("sel", "sel2"):
        th.select(POOL, th.Random(keep=2), **QUIET).save(tmp_path / sel)
    words = COMMANDS[name].replace("OUT", str(tmp_path / "out")).replace("SEL", str(tmp_path / "sel"))
    assert main([POOL if word == "POOL" else word for word in words.split()]) != 0
    assert "called with" in capsys.readouterr().err


def test_clusters_are_written_and_grown(tmp_path: Path) -> None:
    groups = th.cluster(POOL, 5, out=tmp_path / "clusters", **QUIET)
    np.testing.assert_array_equal(np.load(tmp_path / "clusters" / "labels.npy"), groups.labels_N)
    grown = th.cluster(POOL, grow=tmp_path / "clusters", **QUIET)
    np.testing.assert_array_equal(grown.labels_N, groups.labels_N)
    assert any("labels of 3,953 rows, kept" in note for note in grown.notes)
    with pytest.raises(th.OutputError, match="exists already"):
        th.cluster(POOL, 6, out=tmp_path / "clusters", **QUIET)
    with pytest.raises(th.UsageError, match="grow keeps the clusters of .*; leave out clusters, iterations"):
        th.cluster(POOL, 6, grow=tmp_path / "clusters", iterations=3)


def test_comparisons_are_named() -> None:
    kept = th.select(POOL, th.Random(keep="30%"), **QUIET)
    other = kept.recut(keep="10%")
    assert list(th.compare({"a": kept, "b": other})["kept"]) == ["a", "b"]
    assert list(th.compare(kept, other)["kept"]) == ["1", "2"]
    groups = th.cluster(POOL, 5, **QUIET)
    assert len(th.compare(kept, other, clusters=groups)["clusters"]) == 5
    with pytest.raises(th.UsageError, match="a selection is given twice: a"):
        th.compare({"a": kept}, {"a": other})
    with pytest.raises(th.UsageError, match="nothing to compare"):
        th.compare()


def test_embeddings_are_evaluated(rows: Callable[..., np.ndarray]) -> None:
    image = rows(50, 8)
    found = th.evaluate(image, image, classes=rows(5, 8, spread=0.0), labels=np.arange(50) % 5)
    assert found["retrieval"]["image_to_text_R@1"] == 1
    assert found["zero_shot"]["rows"] == 50
    assert th.evaluate(th.from_arrays(image, image)) == {"retrieval": found["retrieval"]}
    with pytest.raises(th.UsageError, match="give embeddings of images, and either"):
        th.evaluate(image)
    with pytest.raises(th.UsageError, match="needs classes and labels; give both"):
        th.evaluate(image, classes=image)


def test_options_are_checked() -> None:
    for use, said in (
        (lambda: th.open(POOL, ky="key"), r"open has no option 'ky'; it has .*Did you mean 'key'"),
        (lambda: th.cluster(POOL, cluster=3), "Did you mean 'clusters'"),
        (lambda: th.doctor(POOL, captoin="x"), "Did you mean 'caption'"),
        (lambda: th.reshard("a", "b", "c", imge="x"), "Did you mean 'image'"),
        (lambda: th.select(POOL, th.Random(keep=1), engine="thread"), "Did you mean 'threads'"),
    ):
        with pytest.raises(th.UsageError, match=said):
            use()


def test_from_raw_data_to_training(tmp_path: Path) -> None:
    """Doctor, embed, select, reshard, train with a policy, and the coreset of the run."""
    import io

    import PIL.Image as image
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    files = []
    for _ in range(64):
        image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())
    data = tmp_path / "data.parquet"
    columns = {"key": [f"k{i}" for i in range(64)], "image": files, "text": [f"caption {i}" for i in range(64)]}
    pq.write_table(pa.table(columns), data)
    assert th.doctor(data, sample=8, **QUIET)["samples"] == 64
    counts: list[Any] = []
    store = th.embed(data, tmp_path / "pool", encoder="tests.toy:Toy", workers=0, report=counts.append, **QUIET)
    assert (counts[0].rows, counts[0].new, counts[0].skipped) == (len(store), 64, 0)
    kept = th.select(store, th.Random(keep="50%"), **QUIET)
    done = th.reshard(data, kept, tmp_path / "shards", workers=1, **QUIET)
    assert (done.samples, done.form) == (32, "parquet")
    how: dict[str, Any] = {"epochs": 3, "batch_size": 16, "workers": 0, "device": "cpu", **QUIET}
    log = th.train_clip(data, tmp_path / "run", policy=th.Scan(warmup=1), **how)
    assert [entry["epoch"] for entry in log] == [0, 1, 2]
    assert log[-1]["pruned_so_far"] > 0
    assert len(th.coreset(tmp_path / "run", "50%")) == 32
    with pytest.raises(th.UsageError, match=r"train_clip has no option 'epoch'.*Did you mean 'epochs'"):
        th.train_clip(data, tmp_path / "run2", epoch=3)
