"""The same command again: after a kill at any point it ends with 0 and the same files; another one is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kills import changes, forked
from tests.resharding.common import hashes, keys_file, plain, tar
from tests.runs import make_run
from tests.runtime.common import begin, change_of, end_of, wait_for
from thresher.cli.main import main
from thresher.testing.pools import clustered, write_pool

N = 120
QUICK = ("export", "export-list", "cluster", "coreset")
KINDS = (*QUICK, "report", "classes", "select", "run", "score", "export-plain", "report-run", "reshard")
RECIPE = '[[step]]\nmethod = "clip-score"\nkeep = "50%"\n'


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], list[str]]]:
    """The arguments of each command up to the target, and options of another request."""
    tmp_path = tmp_path_factory.mktemp("inputs")
    image, keys = clustered(N, 4), [f"k{i}\n" if i == 3 else f"k{i}" for i in range(N)]
    store = write_pool(tmp_path / "pool", image, image[::-1].copy(), {"key": keys})
    place, sel = store.layout.location, str(tmp_path / "sel")
    assert main(["select", "clip-score", place, "-o", sel, "--keep", "60%", "--quiet"]) == 0
    assert main(["select", "random", place, "-o", str(tmp_path / "all"), "--keep", "100%", "--quiet"]) == 0
    run = str(make_run(tmp_path / "a-run", store, epochs=4).folder)
    names, recipe = tmp_path / "names.txt", tmp_path / "recipe.toml"
    names.write_text("dog\nblue shirt\n")
    recipe.write_text(RECIPE)
    data = str(tar(tmp_path / "data" / "0.tar", plain(12)).parent)
    chosen = keys_file(tmp_path / "keys", [f"{i:06d}" for i in range(0, 12, 2)])
    encoder = "tests.embedding.test_classes:Hashed"
    return {
        "select": (["select", "random", place, "--keep", "50%", "--quiet"], ["--seed", "3"]),
        "run": (["run", str(recipe), place, "--quiet"], ["--seed", "3"]),
        "score": (["score", "clip-score", place, "--quiet"], ["--name", "fit"]),
        "cluster": (["cluster", place, "--clusters", "4", "--quiet"], ["--seed", "3"]),
        "export": (["export", sel, "--as", "parquet", "--quiet"], []),
        "export-list": (["export", str(tmp_path / "all"), "--as", "keys", "--quiet"], []),
        "export-plain": (["export", sel, "--as", "keys", "--no-manifest", "--quiet"], []),
        "report": (["report", sel, "--quiet"], ["--title", "another"]),
        "report-run": (["report", run, "--quiet"], ["--title", "another"]),
        "coreset": (["coreset", run, "--keep", "70%"], []),
        "classes": (["embed-classes", str(names), "--encoder", encoder], ["--templates", "simple"]),
        "reshard": (["reshard", data, chosen, "--per-shard", "4", "--workers", "1", "--quiet"], ["--shuffle", "1"]),
    }


ENDINGS = {"score": ".parquet", "export": ".parquet", "classes": ".npy", "report": ".html"}


def other_of(kind: str, asked: list[str], more: list[str]) -> list[str]:
    """Another request for the same target."""
    if kind == "coreset":
        return [*asked[:-1], "50%"]
    if kind.startswith("export"):
        return [asked[0], asked[1].replace("/all", "/sel") if "all" in asked[1] else asked[1].replace("/sel", "/all"),
                *asked[2:]]  # fmt: skip
    return [*asked, *more]


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files; nothing temporary is left."""
    found = hashes(folder)
    assert not [name for name in found if Path(name).name.startswith(".")]
    return found


def check(kind: str, commands: Any, tmp_path: Path, points: Callable[[int], range]) -> None:
    asked, more = commands[kind]
    out = tmp_path / "out" / f"result{ENDINGS.get(kind, '')}"
    whole = [*asked, "-o", str(out)]
    assert main(whole) == 0
    wanted = content(out.parent)
    shutil.rmtree(out.parent)
    count = changes(whole)
    assert content(out.parent) == wanted, "not the same twice"
    ended = 0
    for number in points(count):
        shutil.rmtree(out.parent)
        ended += forked(whole, number) != 0
        killed = hashes(out.parent) if out.parent.exists() else {}
        if kind in ("export", "export-list") and out.name in killed:
            assert f"{out.name}.manifest.json" in killed, "an export without a manifest"
        assert main(whole) == 0, number
        assert content(out.parent) == wanted, number
    assert ended == len(points(count))
    before = {path: change_of(path) for path in sorted(out.parent.rglob("*"))}
    assert main([*other_of(kind, asked, more), "-o", str(out)]) == 2
    assert {path: change_of(path) for path in sorted(out.parent.rglob("*"))} == before
    assert main([*other_of(kind, asked, more), "-o", str(out), "--overwrite"]) == 0
    assert content(out.parent) != wanted


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_killed_once_the_result_is_there(commands: Any, tmp_path: Path, kind: str) -> None:
    check(kind, commands, tmp_path, lambda count: range(max(count - 1, 1), count + 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_change_of_a_file(commands: Any, tmp_path: Path, kind: str) -> None:
    check(kind, commands, tmp_path, lambda count: range(1, count + 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "reshard"])
def test_two_at_once_never_mix(commands: Any, tmp_path: Path, kind: str) -> None:
    """Whatever they are asked for: one result is there in the end, and who did not write it says so."""
    asked, more = commands[kind]
    out = tmp_path / "out" / f"result{ENDINGS.get(kind, '')}"
    both = [[*asked, "-o", str(out)], [*other_of(kind, asked, more), "-o", str(out)]]
    alone = []
    for words in both:
        assert main(words) == 0
        alone.append(content(out.parent))
        shutil.rmtree(out.parent)
    for turn in range(4):
        go = tmp_path / f"go-{turn}"

        def at_once(words: list[str], go: Path = go) -> None:
            wait_for(go)
            os._exit(main(words))

        pids = [begin(lambda words=words: at_once(words)) for words in both]  # type: ignore[misc]
        go.touch()
        codes = [end_of(pid) for pid in pids]
        assert sorted(codes) in ([0, 0], [0, 2])
        found = content(out.parent)
        assert found in [one for one, code in zip(alone, codes, strict=True) if code == 0]
        shutil.rmtree(out.parent)
