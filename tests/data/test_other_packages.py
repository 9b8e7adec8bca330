"""A reader of raw data in a package of its own, as its page has it: found, used, checked by the contract."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.plugin_package import ROOT, blocks, call, install

PAGE = "adding-a-data-reader.md"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package installed, with 12 pictures in two files."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]))
    install(tmp_path, "my_package.pixels", blocks(PAGE, "python")[0], blocks(PAGE, "toml")[0])
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        np.save(tmp_path / "pictures" / f"{i}.npy", rng.integers(0, 256, (6, 16, 16, 3), np.uint8))
        lines = [json.dumps({"key": f"{i}-{n}", "caption": f"picture {i} {n}", "title": "other"}) for n in range(6)]
        (tmp_path / "pictures" / f"{i}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_all_commands_read_it(place: Path) -> None:
    done = call(place, "thresher", "doctor", "pictures", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["kind"], found["samples"], found["files"], found["unit"]) == ("pixels", 12, 2, "file")
    assert (found["captions"]["repeated"], found["pictures"]["broken"]) == (0, 0)
    asked = ["doctor", "pictures", "--json", "--reader", "pixels:caption=title"]
    assert json.loads(call(place, "thresher", *asked).stdout)["captions"]["repeated"] == 11
    done = call(place, "thresher", "doctor", "pictures", "--reader", "pixels:captoin=title")
    assert "has no parameter 'captoin'; it has caption. Did you mean 'caption'?" in done.stderr
    done = call(place, "thresher", "embed", "pictures", "-o", "pool", "--encoder", "tests.toy:Toy", "--quiet")
    assert done.returncode == 0, done.stderr
    done = call(place, "thresher", "select", "random", "pool", "-o", "subset", "--keep", "5", "--quiet")
    assert done.returncode == 0, done.stderr
    for form in ("webdataset", "parquet"):
        done = call(place, "thresher", "reshard", "pictures", "subset", "-o", form, "--as", form, "--quiet", "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (told["samples"], told["missing"], told["by"]) == (5, 0, "place")
    (place / "pictures" / "1.npy").unlink()
    (place / "pictures" / "0.npy").write_bytes(b"x")
    done = call(place, "thresher", "doctor", "pictures")
    assert done.returncode == 2
    assert "0.npy: cannot be read" in done.stderr


def test_training_reads_it(place: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from thresher.runtime.progress import Silent\n"
        "from thresher.train.data import open_pairs\n"
        "Path('run').mkdir()\n"
        "found = open_pairs('pictures', Path('run'), side=8, resize='squash', captions=True, progress=Silent())\n"
        "print(len(found), found.pixels_NHWC.shape)"
    )
    (place / "script.py").write_text(code)
    done = call(place, "script")
    assert (done.stdout.split("\n")[0], done.returncode) == ("12 (12, 8, 8, 3)", 0), done.stderr


def test_a_reader_that_raises_breaks_nothing(place: Path) -> None:
    source = blocks(PAGE, "python")[0].replace("return where.has", "raise KeyError('x')\n        return where.has")
    (place / "my_package" / "pixels.py").write_text(source, encoding="utf-8")
    done = call(place, "thresher", "doctor", str(ROOT / "examples" / "twemoji"))
    assert done.returncode == 0, done.stderr
    assert (
        "the data reader 'pixels' of small-package failed to check whether it reads this: KeyError('x')" in done.stderr
    )


@pytest.mark.slow
def test_its_contract(place: Path) -> None:
    (place / "test_pixels.py").write_text(blocks(PAGE, "py")[0], encoding="utf-8")
    done = call(place, "pytest", "-q", "-p", "no:cacheprovider", "test_pixels.py")
    assert done.returncode == 0, done.stdout
