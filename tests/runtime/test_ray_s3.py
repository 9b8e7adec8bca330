"""Ray and object storage together: several raylets, an S3 server, the bytes of ``serial`` on disk."""

from __future__ import annotations

import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.embedding import raw
from tests.objects import put, s3_server
from tests.processes import finished
from tests.resharding.common import keys_file
from thresher.cli.main import main
from thresher.testing.pools import clustered, write_pool

from .test_ray import RECIPE

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.early
def test_ray_on_s3_gives_the_bytes_of_serial_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pool(tmp_path / "pool", clustered(40_000, 32, 12), clustered(40_000, 32, 9, seed=1), files=4)
    raw.tars(tmp_path / "tars", 120)
    keys_file(tmp_path / "keys", [f"{i:06d}" for i in range(0, 120, 2)])
    np.save(tmp_path / "classes.npy", clustered(6, 32, 6, seed=9))
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        top = "s3://bucket/top"
        for name in ("pool", "tars"):
            put(tmp_path / name, f"{top}/{name}")
        fsspec.filesystem("s3").pipe_file("bucket/top/classes.npy", (tmp_path / "classes.npy").read_bytes())
        (tmp_path / "recipe.toml").write_text(RECIPE.replace("CLASSES", f"{top}/classes.npy"))
        here = ["--engine", "serial", "--quiet"]
        tars = f"{top}/tars/{{00000..00011}}.tar"
        run = ["run", str(tmp_path / "recipe.toml"), f"{top}/pool", "--cache", str(tmp_path / "own")]
        embed = ["embed", tars, "--encoder", "tests.toy:Slow", "--batch-size", "4"]
        assert main([*run, "-o", str(tmp_path / "out"), *here]) == 0
        assert main([*embed, "-o", str(tmp_path / "embedded"), *here]) == 0
        sel = str(tmp_path / "keys")
        assert main(["reshard", tars, sel, "--per-shard", "6", "-o", str(tmp_path / "shards"), *here]) == 0
        program = [sys.executable, "-m", "tests.runtime.ray_s3", str(tmp_path), top]
        done = finished(program, cwd=ROOT, timeout=400)
        assert done.stdout.endswith("good\n"), f"{done.stdout}\n{done.stderr}"
        fsspec.filesystem("s3").clear_instance_cache()
