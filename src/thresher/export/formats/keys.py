"""A list of keys, one per line, for training tools and scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thresher.export.registry import Written, kept_rows
from thresher.pool.store import EmbeddingStore
from thresher.selection import Selection


@dataclass(frozen=True)
class Keys:
    """A text file with one key per line, each as often as the selection uses its row."""

    name: ClassVar[str] = "keys"

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write UTF-8 lines; empty keys and keys with line breaks are missing."""
        written = 0
        missing: list[tuple[int, str]] = []
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            for ids, keys, counts in kept_rows(selection, store):
                for row, key, count in zip(ids, keys, counts, strict=True):
                    if not key or "\n" in key or "\r" in key:  # would be read back as no key, or as two
                        missing.append((int(row), key))
                        continue
                    file.write(f"{key}\n" * int(count))
                    written += int(count)
        return Written(written, tuple(missing), "a key without line breaks")
