"""A reader of pools in a package of its own, as its page has it: found, used, checked by the contract."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.plugin_package import blocks, call, install

PAGE = "adding-a-pool-reader.md"


@pytest.mark.slow
def test_a_reader_of_another_package(tmp_path: Path) -> None:
    install(tmp_path, "my_package.bare", blocks(PAGE, "python")[0], blocks(PAGE, "toml")[0])
    vectors = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float16)
    (tmp_path / "vectors").mkdir()
    for role in ("image", "text"):
        (tmp_path / "vectors" / f"a.{role}.bin").write_bytes(vectors.tobytes())
    (tmp_path / "vectors" / "a.vectors.json").write_text(json.dumps({"rows": 40, "dim": 4}))
    pq.write_table(pa.table({"key": [f"k{i}" for i in range(40)]}), tmp_path / "vectors" / "a.parquet")
    done = call(tmp_path, "thresher", "inspect", "vectors", "--json")
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["layout"], json.loads(done.stdout)["rows"]) == ("bare", 40)
    named = ["select", "random", "vectors", "-o", "subset", "--keep", "25%", "--quiet", "--reader", "bare"]
    done = call(tmp_path, "thresher", *named)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "subset" / "selection.json").read_text())["options"]["reader"] == "bare"
    done = call(tmp_path, "thresher", "explain", "subset", "k3")
    assert done.returncode == 0, done.stderr
    for asked, says in (
        ("bear", "no pool reader 'bear'; there are arrow, bare,"),
        ("npy:dim=3", "the pool reader 'npy' has no parameter 'dim'"),
        ("npy:dim", "write options as OPTION=VALUE"),
    ):
        done = call(tmp_path, "thresher", "inspect", "vectors", "--reader", asked)
        assert done.returncode == 2
        assert says in done.stderr
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "readme").write_text("x")
    assert "bare (*.vectors.json with" in call(tmp_path, "thresher", "inspect", "nothing").stderr


@pytest.mark.slow
def test_its_contract(tmp_path: Path) -> None:
    install(tmp_path, "my_package.bare", blocks(PAGE, "python")[0], blocks(PAGE, "toml")[0])
    (tmp_path / "test_bare.py").write_text(blocks(PAGE, "py")[0], encoding="utf-8")
    done = call(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "test_bare.py")
    assert done.returncode == 0, done.stdout
