"""Imports point one way, heavy packages load late, public names are what they say."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import thresher

SOURCE = Path(thresher.__file__).parent
HEAVY = {"torch", "ray", "pyarrow", "duckdb", "matplotlib"}

# A room is a folder or a module at the top of the package. A room may import, at module level, only from rooms on
# lines above its own. docs/nouns.md says what each is for.
ORDER = """
errors
runtime
io ops
selection
pool data
explore
export dynamic evaluation
pruning
embedding
check resharding train
report
lab viewer
api
cli testing
__main__
"""
RANKS = {room: rank for rank, line in enumerate(ORDER.split("\n")) for room in line.split()}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imports(tree: ast.Module, *, everywhere: bool) -> set[str]:
    """Dotted names imported at module level (not below TYPE_CHECKING), or everywhere."""
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    """Modules of this package behind dotted names: ``thresher.ops.cut.top`` -> ``ops.cut``."""
    found = set()
    for name in names:
        if name.startswith("thresher."):
            parts = name.split(".")[1:]
            fits = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in MODULES]
            found |= set(fits[:1])
    return found


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_the_rooms_are_those_on_disk() -> None:
    there = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__"} == set(RANKS)
    loose = [path.stem for path in SOURCE.glob("*.py")]
    assert len(loose) <= 6, f"a module of its own at the top is an exception; there are {loose}"


def test_the_docs_describe_every_room_in_this_order() -> None:
    page = (Path(__file__).parents[1] / "docs" / "nouns.md").read_text(encoding="utf-8")
    tree = page[page.index("src/thresher/\n") :].partition("```")[0]
    rooms = [line.split()[0].rstrip("/") for line in tree.splitlines()[1:]]
    assert sorted(rooms) == sorted(set(RANKS) - {"__main__"})
    assert [RANKS[room] for room in rooms] == sorted(RANKS[room] for room in rooms)


def test_imports_point_one_way() -> None:
    wrong = [
        f"thresher.{module} may not import thresher.{target}"
        for module, tree in MODULES.items()
        for target in (own(imports(tree, everywhere=False)) if module else ())
        if room_of(module) != room_of(target) and RANKS[room_of(target)] >= RANKS[room_of(module)]
    ]
    assert wrong == []


def test_there_are_no_import_circles() -> None:
    arrows = {name: own(imports(tree, everywhere=False)) - {name} for name, tree in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path, name))}"
        if name not in done:
            for target in sorted(arrows[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("pruning.methods.")])
def test_methods_do_not_know_each_other_nor_files_nor_engines(module: str) -> None:
    seen = own(imports(MODULES[module], everywhere=True))
    files = ("pool.layouts", "cli", "report")
    forbidden = ("runtime.engine", "runtime.cache", "pruning.recipe", "pruning.methods", *files)
    assert not {name for name in seen if name.startswith(forbidden)}
    calls = {node.func.id for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call) and _named(node.func)}
    assert not calls & {"open", "open_store"}


def _named(node: ast.expr) -> bool:
    return isinstance(node, ast.Name)


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] == "ops"])
def test_ops_know_only_arrays(module: str) -> None:
    assert {name.split(".")[0] for name in own(imports(MODULES[module], everywhere=True))} <= {"ops", "errors"}


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    wrong = {}
    for module, tree in MODULES.items():
        tops = {name.split(".")[0] for name in imports(tree, everywhere=False)}
        allowed = {"torch"} if room_of(module) in ("dynamic", "train") else set()
        if found := tops & (HEAVY - allowed):
            wrong[module] = found
    assert wrong == {}


@pytest.mark.parametrize("code", ["import thresher", "import thresher; dir(thresher); thresher.__version__"])
def test_importing_loads_nothing_heavy(code: str) -> None:
    told = f"{code}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout.split()
    assert "thresher" in loaded
    assert not set(loaded) & (HEAVY | {"numpy", "click", "rich"})


def test_public_names_are_there_and_described() -> None:
    assert sorted(thresher.__all__) == list(thresher.__all__)
    for name in thresher.__all__:
        found = getattr(thresher, name)
        assert inspect.getdoc(found), f"thresher.{name} has no docstring"
        assert inspect.isclass(found) or callable(found), f"thresher.{name} is {found!r}"
        assert found.__module__.startswith("thresher.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = thresher.nothing


@pytest.mark.slow
def test_public_names_mean_the_same_once_everything_is_loaded() -> None:
    """A submodule must not take the name of a public function."""
    code = (
        "import thresher, importlib\n"
        "before = {name: getattr(thresher, name) for name in thresher.__all__}\n"
        f"[importlib.import_module('thresher.' + name) for name in {[n for n in MODULES if n and n != '__main__']!r}]\n"
        "print([name for name in before if getattr(thresher, name) is not before[name]])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_everything_named_in_all_exists() -> None:
    for module in MODULES.keys() - {"__main__"}:
        found = importlib.import_module(f"thresher.{module}".rstrip("."))
        assert [name for name in getattr(found, "__all__", []) if not hasattr(found, name)] == [], module
        assert inspect.getdoc(found), module


def test_no_printing_and_no_unpickling() -> None:
    """Output goes through the terminal; files of users are never unpickled."""
    for module, tree in MODULES.items():
        pickles_its_own = module in ("runtime.engines.processes", "runtime.ray.packing") or room_of(module) == "testing"
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            called = dotted(call.func)
            assert called != "print", f"thresher.{module} line {call.lineno}"
            assert called not in ("pickle.load", "pickle.loads") or pickles_its_own, f"thresher.{module}"
            if called in ("np.load", "numpy.load"):
                allowed = [ast.unparse(k.value) for k in call.keywords if k.arg == "allow_pickle"]
                assert allowed == ["False"], f"thresher.{module} line {call.lineno}"


def dotted(node: ast.expr) -> str:
    """``numpy.load`` of a chain of names, and nothing of any other expression."""
    if isinstance(node, ast.Attribute):
        return f"{before}.{node.attr}" if (before := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""
