"""A small package that offers a plug-in, made of the blocks of a page of the documentation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page: str, kind: str) -> list[str]:
    """Return the fenced blocks of one kind of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def install(folder: Path, module: str, source: str, toml: str) -> None:
    """Put a package into a folder, with entry points as an installer writes them."""
    path = folder / (module.replace(".", "/") + ".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    about = folder / "small_package-1.2.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: small-package\nVersion: 1.2\n")
    group = re.search(r'entry-points\."(.*?)"', toml)
    assert group
    lines = [line.replace('"', "") for line in toml.splitlines()[1:]]
    (about / "entry_points.txt").write_text(f"[{group[1]}]\n" + "\n".join(lines) + "\n")


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m ...`` in a folder where the package lies on PYTHONPATH."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
