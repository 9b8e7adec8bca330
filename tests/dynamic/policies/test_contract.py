"""Every policy that is found holds the contract: a new file under ``policies`` is tested as it is."""

from __future__ import annotations

from typing import Any

from thresher.dynamic.registry import POLICIES
from thresher.testing import PolicyContract

# What a policy needs beside its file: one that takes no share has no budgets.
OWN: dict[str, dict[str, Any]] = {"full": {"budgets": ()}, "static": {"budgets": ()}}

for _name, _cls in POLICIES.all().items():
    _test = type(f"Test_{_name}", (PolicyContract,), {"plugin": _cls, **OWN.get(_name, {})})
    globals()[_test.__name__] = _test
