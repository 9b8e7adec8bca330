"""Encoders of another package, as the documentation writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.plugin_package import blocks, call, install


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.mark.slow
def test_encoders_of_another_package(tmp_path: Path, data: Path) -> None:
    code = [
        block for block in blocks("encoders.md", "python") if "make_encoder" not in block and "checked(" not in block
    ]
    toml = blocks("encoders.md", "toml")[0]
    install(tmp_path / "site", "colours", "\n\n".join(code[1:]), toml + 'gone = "no_such_module:Gone"\n')
    (tmp_path / "site" / "test_mine.py").write_text(
        blocks("encoders.md", "py")[0]
        + "\n\nfrom colours import ColoursOf\n\n\nclass TestOf(EncoderContract):\n"
        + '    plugin = ColoursOf\n    rest = "both/16"\n'
    )
    for name, encoder in (("one", "histogram"), ("two", "histogram-of:both/16"), ("three", "colours:Colours")):
        done = call(tmp_path / "site", "thresher", "embed", str(data), "-o", name, "--encoder", encoder, "--quiet")
        assert done.returncode == 0, done.stderr
        meta = json.loads((tmp_path / "site" / name / "pool.json").read_text())
        assert (meta["encoder"]["name"], meta["encoder"]["image_dim"]) == ("colours", 64)
    done = call(tmp_path / "site", "thresher", "embed", str(data), "-o", "x", "--encoder", "gone")
    assert done.returncode == 2
    assert "the encoder 'gone' cannot be loaded: small-package: ModuleNotFoundError" in done.stderr

    done = call(tmp_path / "site", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py")
    assert done.returncode == 0, done.stdout
