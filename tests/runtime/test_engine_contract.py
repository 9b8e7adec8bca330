"""Every engine that is found holds the contract: a new file under ``engines`` is tested as it is."""

from __future__ import annotations

from thresher.runtime.engine import ENGINES
from thresher.testing import EngineContract

for _name, _cls in ENGINES.all().items():
    if _name == "ray":  # in test_ray.py, where Ray starts once for all tests
        continue
    _test = type(f"Test_{_name}", (EngineContract,), {"plugin": _cls})
    globals()[_test.__name__] = _test
