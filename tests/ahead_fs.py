"""A file system for tests: memory that is read ahead as S3 is, and counts requests and bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile


class Ahead(MemoryFileSystem):
    """Files of ``memory://`` behind ``ahead://``."""

    protocol = "ahead"
    counts: Counter[str] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("ahead://", "memory://")))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **how: Any) -> bytes:
        content = bytes(super().cat_file(path, start, end))
        Ahead.counts.update(requests=1, bytes=len(content))
        return content

    def _open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, **how)

        class File(AbstractBufferedFile):  # type: ignore[misc]
            def _fetch_range(self, start: int, end: int) -> bytes:
                return bytes(self.fs.cat_file(self.path, start, end))

        return File(self, path, "rb", block_size=50 << 20)


@pytest.fixture
def memory() -> Iterator[None]:
    fsspec.register_implementation("ahead", Ahead, clobber=True)
    Ahead.counts.clear()
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
