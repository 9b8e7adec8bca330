"""A format of another package, as the documentation writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.plugin_package import ROOT, blocks, call, install


@pytest.mark.slow
def test_a_format_of_another_package(tmp_path: Path) -> None:
    source = blocks("adding-an-export.md", "python")[0]
    toml = blocks("adding-an-export.md", "toml")[0]
    install(tmp_path, "my_package.jsonl", source, toml + 'gone = "my_package.gone:Gone"\n')
    (tmp_path / "test_mine.py").write_text(blocks("adding-an-export.md", "py")[0])

    pool = str(ROOT / "examples" / "twemoji")
    done = call(tmp_path, "thresher", "select", "random", pool, "-o", "subset", "--keep", "10", "--quiet")
    assert done.returncode == 0, done.stderr
    done = call(tmp_path, "thresher", "export", "subset", *"--as key-lines --prefix emoji/ -o subset.jsonl".split())
    assert done.returncode == 0, done.stderr
    assert "small-package offers 'gone', which cannot be used: ModuleNotFoundError" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "subset.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    assert all(line["key"].startswith("emoji/") for line in lines)
    manifest = json.loads((tmp_path / "subset.jsonl.manifest.json").read_text())
    assert manifest["format_from"] == {"package": "small-package", "version": "1.2"}
    assert manifest["format_options"] == {"prefix": "emoji/"}

    done = call(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py")
    assert done.returncode == 0, done.stdout
