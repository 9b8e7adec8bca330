"""Code that the contracts of pool readers and data readers share."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from thresher.io.readers import Reader, readers
from thresher.runtime.plugins import PluginPoint

T = TypeVar("T")
_IO = Path("/proc/self/io")


def check_plugin(point: PluginPoint[Any], plugin: type[Reader]) -> None:
    """Check that a reader is a frozen dataclass, is found by its name, says what it reads, and needs no options."""
    assert point.all().get(plugin.name) is plugin, f"is not an entry point of {point.group}, or its name is taken"
    assert isinstance(plugin.rank, int)
    assert plugin.looks_like.strip()
    assert is_dataclass(plugin)
    assert plugin.__dataclass_params__.frozen, "is not frozen"  # type: ignore[attr-defined]
    assert inspect.getdoc(plugin), "has no docstring"
    made = next((one for one in readers(point) if type(one) is plugin), None)
    assert made is not None, "has an option without a default, so it is never used"
    assert pickle.loads(pickle.dumps(made)) == made  # noqa: S301 - pickled above
    assert all(item.metadata.get("help") for item in fields(plugin)), "an option has no metadata['help']"


def bytes_read(what: Callable[[], T]) -> tuple[T, int]:
    """Call a function twice; return its result, and how many bytes the second call read from files."""
    if not _IO.exists():
        pytest.skip("the operating system does not count the bytes that a process reads")

    def count() -> int:
        return int(_IO.read_text().split()[1])

    what()
    begin = count()
    result = what()
    return result, count() - begin


def damaged(folder: Path) -> Iterator[tuple[Path, str]]:
    """Damage each file in several ways; yield the file and what was done, and restore the file afterwards."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        good = path.read_bytes()
        size = len(good)
        ways = {f"cut to {n:,} bytes": good[:n] for n in sorted({0, 1, size // 3, size // 2, size - 1}) if n < size}
        for at in sorted({0, 5, size // 4, size // 2, 3 * size // 4, max(0, size - 6)}):
            ways[f"byte {at:,} is changed"] = good[:at] + bytes([good[at] ^ 0xA5]) + good[at + 1 :] if size else b"x"
        try:
            for what, content in ways.items():
                path.write_bytes(content)
                yield path, what
        finally:
            path.write_bytes(good)
