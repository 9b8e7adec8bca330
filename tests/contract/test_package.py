"""Methods of other packages: found by an entry point, tested by the contract, and harmless where they are broken."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.contract.test_contract import TOY
from tests.processes import finished
from thresher import Selection

TEST = """
from thresher.testing import MethodContract

from every_other import EveryOther


class TestEveryOther(MethodContract):
    plugin = EveryOther
"""

# One process for all: what commands print and return, and the suite of the package.
DRIVER = """
import contextlib, io, json, sys
import pytest
from thresher.cli.main import main

def call(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

pool, out, tests = sys.argv[1:]
found = {
    "select": call("select", "every-other", pool, "-o", out, "--shape", "round"),
    "explain": call("explain", out, "row:1"),
    "broken": call("select", "broken-one", pool, "-o", out + "-2"),
    "unknown": call("select", "every-othr", pool, "-o", out + "-2"),
}
with contextlib.redirect_stdout(io.StringIO()) as told:
    found["suite"] = {"code": int(pytest.main(["-q", "-p", "no:cacheprovider", tests])), "out": told.getvalue()}
print(json.dumps(found))
"""


def package(folder: Path, name: str, version: str, module: str, text: str, point: str) -> None:
    """Write a package as it lies in an environment once it is installed."""
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[thresher.methods]\n{point}\n")


@pytest.mark.slow
def test_a_method_of_another_package(tmp_path) -> None:
    site, pool = tmp_path / "site", tmp_path / "pool"
    site.mkdir()
    pool.mkdir()
    package(site, "every-other-rows", "1.2.3", "every_other", TOY, "every-other = every_other:EveryOther")
    text = "raise RuntimeError('no such device\\nsecond line')\n"
    package(site, "broken-package", "0.1", "broken", text, "broken-one = broken:Broken")
    (tmp_path / "test_it.py").write_text(TEST)
    np.save(pool / "image.npy", np.eye(8, 4, dtype=np.float32) + 1)
    paths = [str(site), str(Path(__file__).parents[2] / "src")]
    done = finished(
        [sys.executable, "-c", DRIVER, str(pool), str(tmp_path / "out"), str(tmp_path / "test_it.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        cwd=tmp_path,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    chosen = found["select"]
    assert chosen["code"] == 0, chosen["err"]
    (line,) = [line for line in chosen["err"].splitlines() if "broken-package" in line]
    assert "'broken-one'" in line
    assert "RuntimeError: no such device" in line
    assert "Traceback" not in chosen["err"]
    (step,) = Selection.load(tmp_path / "out").steps
    assert step.package == {"name": "every-other-rows", "version": "1.2.3"}
    assert (step.method, step.rows_out) == ("every-other", 4)
    assert "1. every-other (every-other-rows 1.2.3): dropped" in found["explain"]["out"]

    assert found["broken"]["code"] == found["unknown"]["code"] == 2
    error = "Error: the method 'broken-one' cannot be loaded: broken-package: RuntimeError: no such device"
    assert [line for line in found["broken"]["err"].splitlines() if line.startswith("Error")] == [error]
    assert "every-other" in found["unknown"]["err"]

    assert found["suite"]["code"] == 0, found["suite"]["out"]
    assert "passed" in found["suite"]["out"]
