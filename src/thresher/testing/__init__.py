"""Contracts for plug-ins, as pytest classes to inherit; for this package and for other packages.

    from thresher.testing import MethodContract

    class TestMine(MethodContract):
        plugin = Mine

Each contract is a module and is loaded on first use. Running them needs pytest.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_HOMES: dict[str, str] = {
    "DataReaderContract": "data_reader",
    "EncoderContract": "encoder",
    "EngineContract": "engine",
    "ExportContract": "export",
    "MethodContract": "method",
    "PolicyContract": "policy",
    "PoolReaderContract": "pool_reader",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home = f"thresher.testing.{_HOMES[name]}"
        if home not in sys.modules:
            import pytest

            pytest.register_assert_rewrite(home)  # so that a failed comparison shows both sides
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'thresher.testing' has no attribute {name!r}")
