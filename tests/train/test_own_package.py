"""A policy and an engine of another package: the blocks of the pages that say how, offered by entry points."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.processes import finished
from tests.train.conftest import Data

DOCS = Path(__file__).parents[2] / "docs"

ENTRY_POINTS = """[thresher.policies]
drop-lowest = my_package.drop_lowest:DropLowest
broken = my_package.broken:Broken

[thresher.engines]
polite = my_package.polite:Polite
broken = my_package.broken:Broken
"""

SCRIPT = """
import sys
import pytest
from thresher.cli.main import main
from thresher.dynamic.run_folder import Training
from thresher.train.open_clip import parse

data, out, pool, tests = sys.argv[1:]
run = ["train", "clip", data, "-o", out + "/run", "--epochs", "4", "--batch-size", "50", "--quiet"]
assert main(["train", "clip", "--help"]) == 0
assert main([*run, "--policy", "drop-lowest", "--rest", "0"]) == 2
assert main([*run, "--policy", "drop-lowest", "--rest", "2", "--prune", "10%"]) == 0
rows = [entry["rows"] for entry in Training.load(out + "/run").log()]
assert rows == [150, 150, 90, 150], rows
assert main(["coreset", out + "/run", "-o", out + "/core", "--keep", "50%"]) == 0
given = ["--train-data", "x.csv", "--model", "ViT-B-32", "--epochs", "9", "--prune", "drop-lowest"]
policy = parse([*given, "--prune-rest", "2", "--prune-keep", "60%"])[0].make(9)
assert (policy.name, policy.rest, policy.keep) == ("drop-lowest", 2, 0.6)
select = ["select", "random", pool, "--keep", "10%", "--quiet"]
assert main([*select, "-o", out + "/polite", "--engine", "polite"]) == 0
assert main([*select, "-o", out + "/serial", "--engine", "serial"]) == 0
assert main([*select, "-o", out + "/broken", "--engine", "broken"]) == 2
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", tests, tests]))
"""


def block(page: str, containing: str) -> str:
    """Return the first block of Python of a page that has some words."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return next(text for text in blocks if containing in text)


@pytest.mark.slow
def test_a_policy_and_an_engine_of_another_package(data: Data, tmp_path: Path) -> None:
    site = tmp_path / "site"
    package, about = site / "my_package", site / "my_package-1.2.dist-info"
    package.mkdir(parents=True)
    about.mkdir()
    (package / "__init__.py").write_text("")
    (package / "drop_lowest.py").write_text(block("adding-a-policy.md", "class DropLowest"))
    (package / "polite.py").write_text(block("adding-an-engine.md", "class Polite"))
    (package / "broken.py").write_text("import nothing_that_is_there\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    tests = tmp_path / "contracts"
    tests.mkdir()
    for name, cls, page in (
        ("drop_lowest", "DropLowest", "adding-a-policy.md"),
        ("polite", "Polite", "adding-an-engine.md"),
    ):
        contract = block(page, "Contract")
        (tests / f"test_{name}.py").write_text(f"from my_package.{name} import {cls}\n{contract}")
    out = tmp_path / "out"
    out.mkdir()
    pool = Path(__file__).parents[2] / "examples" / "twemoji"
    done = finished(
        [sys.executable, "-c", SCRIPT, str(data.parquet), str(out), str(pool), str(tests)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.sub(r"\s+", " ", done.stdout)
    assert "--rest N drop-lowest: epochs on all rows between two that prune (default: 1)." in told
    assert "Invalid value for '--rest': 0 is not in the range x>=1" in done.stderr
    why = "ModuleNotFoundError: No module named 'nothing_that_is_there'"
    assert f"my-package offers 'broken', which cannot be used: {why}" in done.stderr
    assert f"the engine 'broken' cannot be loaded: my-package: {why}" in done.stderr
    assert re.search(r"\d+ passed", done.stdout)
