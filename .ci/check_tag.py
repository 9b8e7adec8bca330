"""Check that a tag is the version: python .ci/check_tag.py v0.1.0."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What does not fit the tag: the version of the package, of CITATION.cff, and the changelog."""
    source = (root / "src" / "thresher" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    cited = re.search(r'^version: "?([^"\n]+)"?$', (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    wanted = tag.removeprefix("v")
    found = []
    if not tag.startswith("v") or version is None or version[1] != wanted:
        found.append(f"the tag {tag} is not v{version[1] if version else '?'}, the version in src/thresher/__init__.py")
    if cited is None or cited[1] != wanted:
        found.append(f"CITATION.cff has version {cited[1] if cited else '?'}")
    if f"## [{wanted}]" not in (root / "CHANGELOG.md").read_text(encoding="utf-8"):
        found.append(f"CHANGELOG.md has no section [{wanted}]")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    if wrong := problems(sys.argv[1]):
        raise SystemExit("\n".join(wrong))
