"""One file per layout. A reader turns a location into a :class:`Layout` by reading headers only.

A reader module has ``NAME``, ``recognise(files) -> bool`` (cheap: names and a header or two) and
``read(files, options) -> Layout``; the folder is scanned, so there is no list to edit. ``RANK`` breaks
ties: the lowest recognising reader wins.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from types import ModuleType

from thresher.errors import PoolError
from thresher.io.listing import Files, stamp_of
from thresher.pool.layout import Layout, Options

__all__ = ["Files", "Layout", "Options", "read_layout", "readers"]


def readers() -> list[ModuleType]:
    """Return every reader module, most specific first."""
    found = [
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
        if info.name not in ("join", "layout", "pieces", "verify")
    ]
    return sorted(found, key=lambda module: (module.RANK, module.NAME))


def read_layout(location: str, options: Options) -> Layout:
    """Recognise the layout at ``location`` and read its headers.

    Raises:
        PoolError: Nothing there, no layout recognised, or a file that cannot be trusted.
    """
    files = Files.at(location)
    for module in readers():
        if module.recognise(files):
            layout: Layout = module.read(files, options)
            break
    else:
        seen = ", ".join(files.names[:5]) + (", ..." if len(files.names) > 5 else "")
        raise PoolError(
            f"{location}: no known layout of embeddings (found: {seen or 'nothing'}). Known: "
            + "; ".join(f"{module.NAME} ({module.LOOKS_LIKE})" for module in readers())
        )
    layout.check()
    stamps = {path: files.stamps.get(path) or stamp_of(protocol, path) for protocol, path in layout.files()}
    return replace(layout, stamps=stamps)
