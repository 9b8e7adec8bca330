"""Shared by all tests: a cache of their own, strict arithmetic, small pools."""

from __future__ import annotations

import os
import signal

# Before NumPy and torch load, and for every process a test starts: test processes with a thread a core each would
# wait for each other at every product.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell ignores Ctrl-C for what it runs in the background, and programs inherit that: tests send it to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# isort: split
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from hypothesis import HealthCheck, settings

from thresher import Cache, EmbeddingStore, Selection, Serial, run_steps
from thresher.runtime.config import SETTINGS
from thresher.testing.pools import clustered, write_pool

settings.register_profile(
    "full",
    deadline=None,
    max_examples=60,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("quick", settings.get_profile("full"), max_examples=15)
settings.load_profile("quick")  # --hypothesis-profile full: make test-all


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays to the end: the garbage collector never looks through it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``early`` come first; the others keep their order."""
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """One thread for products, as in every engine, also of libraries that do not read ``OMP_NUM_THREADS``."""
    with threadpoolctl.threadpool_limits(1):
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test does may land in the user's cache, and no setting of the user may reach a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "xdg"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))
    for setting in SETTINGS.values():
        monkeypatch.delenv(setting.variable, raising=False)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users can enter; pytest makes its own folders private."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(autouse=True)
def _strict_arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the tests of pure functions and methods, arithmetic that goes wrong raises."""
    if request.path.parent.name not in ("ops", "methods"):
        yield
        return
    with np.errstate(all="raise", under="ignore"):
        yield


@pytest.fixture
def pool(tmp_path: Path) -> Callable[..., EmbeddingStore]:
    """Write a pool (see :func:`write_pool`) under a name, by default "pool"."""

    def write(image: np.ndarray | None, *args: Any, name: str = "pool", **options: Any) -> EmbeddingStore:
        return write_pool(tmp_path / name, image, *args, **options)

    return write


@pytest.fixture
def rows() -> Callable[..., np.ndarray]:
    """:func:`clustered`, for tests."""
    return clustered


@pytest.fixture
def centroid_file(tmp_path: Path) -> Callable[[np.ndarray], str]:
    """Write centroids to a .npy file and return its path."""

    def write(centroids: np.ndarray, name: str = "centroids.npy") -> str:
        np.save(tmp_path / name, centroids)
        return str(tmp_path / name)

    return write


@pytest.fixture
def select(tmp_path: Path) -> Callable[..., Selection]:
    """Run steps serially with a cache of the test's own."""

    def run(store: EmbeddingStore, *steps: Any, **options: Any) -> Selection:
        options = {"engine": Serial(), "cache": Cache.at(tmp_path / "cache"), **options}
        return run_steps(store, steps, **options)

    return run
