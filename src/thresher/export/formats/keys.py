"""A list of keys, as training tools and scripts read it line by line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thresher.export.registry import Written, kept_rows
from thresher.pool.store import EmbeddingStore
from thresher.selection import Selection


@dataclass(frozen=True)
class Keys:
    """A text file with a key a line, each as often as its row is to be used."""

    name: ClassVar[str] = "keys"

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write the lines, UTF-8; a key that no line can hold is missing."""
        written = 0
        missing: list[tuple[int, str]] = []
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            for ids, keys, counts in kept_rows(selection, store):
                for row, key, count in zip(ids, keys, counts, strict=True):
                    if not key or "\n" in key or "\r" in key:  # would read back as none, or as two
                        missing.append((int(row), key))
                        continue
                    file.write(f"{key}\n" * int(count))
                    written += int(count)
        return Written(written, tuple(missing))
