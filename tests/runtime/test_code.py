"""Cached results and the code that made them."""

from __future__ import annotations

import ast
import importlib
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import thresher
from thresher import Cache, Serial, build, open_store, run_steps
from thresher.pruning.clusters import _assign
from thresher.pruning.methods.semdedup import _judge
from thresher.runtime.code import code_version, imported

METHOD = """
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from scaling.helper import FACTOR
from thresher.pruning.scores import Score, Scored


@dataclass(frozen=True, kw_only=True)
class Scaled(Scored):
    name: ClassVar[str] = "scaled"
    meaning: ClassVar[str] = "a number"

    def score(self, run):
        found = run.column("scaled", "image", partial(numbers, FACTOR), {"score": "float32"})
        return Score(np.asarray(found["score"]))


def numbers(factor, store, block):
    COUNT.append(len(block))
    return (factor * store.vectors("image", block)[:, 0],)


COUNT = []
"""


@pytest.fixture
def scaling(tmp_path, monkeypatch):
    """A package of its own, with a module beside that of its method."""
    folder = tmp_path / "site" / "scaling"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "method.py").write_text(METHOD)
    (folder / "helper.py").write_text("FACTOR = 1\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "scaling"]:
        del sys.modules[name]


def load(folder: Path, names=("scaling.helper", "scaling.method")):
    """Import the package, again where it was imported already."""
    importlib.invalidate_caches()
    for path in folder.rglob("*.pyc"):
        path.unlink()
    return [importlib.reload(importlib.import_module(name)) for name in names][-1]


def test_a_method_whose_code_changed_is_not_answered_from_the_cache(scaling, tmp_path) -> None:
    np.save(tmp_path / "image.npy", np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32))
    store, cache = open_store(str(tmp_path / "image.npy")), Cache.at(tmp_path / "cache")

    def scores() -> tuple[np.ndarray, int]:
        module = load(scaling)
        step = run_steps(store, [module.Scaled(threshold=-9.0)], engine=Serial(), cache=cache).steps[0]
        return step.rows["score"], len(module.COUNT)

    first, computed = scores()
    assert computed
    again, computed = scores()
    assert not computed  # the same source, loaded again
    np.testing.assert_array_equal(again, first)
    (scaling / "method.py").write_text(METHOD.replace("factor *", "2 * factor *"))
    double, computed = scores()
    assert computed
    np.testing.assert_array_equal(double, 2 * first)
    (scaling / "helper.py").write_text("FACTOR = 3\n")  # a parameter of the function that no keyword tells of
    many, computed = scores()
    assert computed
    np.testing.assert_array_equal(many, 6 * first)
    (scaling / "method.py").write_text(METHOD)
    (scaling / "helper.py").write_text("FACTOR = 1\n")
    again, computed = scores()
    assert not computed  # as it was
    np.testing.assert_array_equal(again, first)


def test_the_version_is_that_of_the_text_wherever_it_lies(scaling, tmp_path, monkeypatch) -> None:
    here = code_version(load(scaling).numbers)
    with zipfile.ZipFile(tmp_path / "elsewhere.zip", "w") as archive:
        for path in scaling.glob("*.py"):
            archive.write(path, f"scaling/{path.name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "scaling"]:
        del sys.modules[name]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere.zip"), *sys.path])
    module = importlib.import_module("scaling.method")
    assert "elsewhere.zip" in module.__file__
    assert code_version(module.numbers) == here == code_version("scaling.method")


def test_code_without_a_file_is_known_by_what_it_does() -> None:
    """As in a notebook."""

    def version(helper: str, constant: int = 3, comment: str = "") -> str:
        text = f"FACTOR = {constant}\n{comment}\ndef helper(x):\n    return {helper}\n"
        text += "def number(store, block):\n    return [helper(FACTOR) for _ in range(2)]\n"
        module = type(sys)("a_notebook")
        exec(text, vars(module))
        sys.modules["a_notebook"] = module
        try:
            return code_version(vars(module)["number"])
        finally:
            del sys.modules["a_notebook"]

    one = version("x + 1")
    assert one == version("x + 1", comment="# nothing new")
    assert len({one, version("x + 2"), version("x - 1"), version("x + 1", constant=4)}) == 4


def test_imports_are_found_as_the_parser_finds_them() -> None:
    for path in sorted(Path(thresher.__file__).parent.rglob("*.py")):
        text, names = path.read_text(encoding="utf-8"), set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        assert names <= set(imported(text, "")), path
    text = (
        "from . import (a,  # (one)\n    b as c)\nfrom ..d import e, \\\n    f\nimport g.h as i, j\n  import k; x = 1\n"
    )
    assert imported(text, "p.q") == ["g.h", "j", "k", "p.d", "p.d.e", "p.d.f", "p.q", "p.q.a", "p.q.b"]


def test_methods_share_a_clustering_and_not_each_others_code(pool, rows, tmp_path) -> None:
    cache, store = Cache.at(tmp_path / "cache"), pool(rows(300))
    for name, given in (("semdedup", {"eps": 0.1}), ("density", {"keep": "50%"}), ("ssp", {"keep": "50%"})):
        run_steps(store, [build(name, {**given, "clusters": 3})], engine=Serial(), cache=cache)
    assert len(list((tmp_path / "cache" / "arrays").glob("kmeans-*.npy"))) == 1
    assert len(list((tmp_path / "cache" / "arrays").glob("assign.labels-*.npy"))) == 1
    assert code_version(_assign) == code_version("thresher.pruning.clusters") != code_version(_judge)
