"""Puts the man pages into the wheel, if ``make man`` has written them; ``make dist`` does so first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ManPages(BuildHookInterface):  # type: ignore[type-arg]
    """Adds ``man/man1`` as ``share/man/man1``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name the pages to add."""
        for page in sorted(Path(self.root, "man", "man1").glob("*.1")):
            if self.target_name == "wheel" and version == "standard":
                build_data["shared_data"][str(page)] = f"share/man/man1/{page.name}"
