"""Shared by all tests: a cache of their own, strict arithmetic, small pools."""

from __future__ import annotations

import os

# Before NumPy and torch load, and for every process a test starts: test processes with a thread a core each would
# wait for each other at every product.
os.environ["OMP_NUM_THREADS"] = "1"

# isort: split
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from hypothesis import HealthCheck, settings

from thresher import Cache, EmbeddingStore, Selection, Serial, open_store, run_steps

settings.register_profile(
    "full",
    deadline=None,
    max_examples=60,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("quick", settings.get_profile("full"), max_examples=25)
settings.load_profile("quick")  # --hypothesis-profile full: make test-all


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
    """Nothing a test does may land in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "xdg"))


@pytest.fixture(autouse=True)
def _strict_arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the tests of pure functions and methods, arithmetic that goes wrong raises."""
    if request.path.parent.name not in ("ops", "methods"):
        yield
        return
    with np.errstate(all="raise", under="ignore"):
        yield


def clustered(n: int, dim: int = 8, groups: int = 5, spread: float = 0.6, seed: int = 0) -> np.ndarray:
    """Unit rows around random centres, float32; row i belongs to centre i % groups."""
    rng = np.random.Generator(np.random.Philox(seed))
    centres = rng.normal(size=(groups, dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rows = centres[np.arange(n) % groups] + spread / np.sqrt(dim) * rng.normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write_pool(
    folder: Path,
    image: np.ndarray | None,
    text: np.ndarray | None = None,
    table: Mapping[str, Sequence[Any]] | None = None,
    *,
    files: int = 1,
    parquet: bool = False,
) -> EmbeddingStore:
    """Write a pool of .npy files, or of parquet files with list columns, cut into ``files``, and open it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    arrays = {name: array for name, array in (("image", image), ("text", text)) if array is not None}
    n = len(next(iter(arrays.values()))) if arrays else len(next(iter((table or {}).values())))
    cuts = np.linspace(0, n, files + 1).astype(int)
    for i, (lo, hi) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        columns = {name: values[lo:hi] for name, values in (table or {}).items()}
        if parquet:
            columns |= {f"{name}_embedding": list(array[lo:hi]) for name, array in arrays.items()}
        else:
            for name, array in arrays.items():
                np.save(folder / f"{name}_{i}.npy", array[lo:hi])
        if columns:
            pq.write_table(pa.table(columns), folder / f"part_{i}.parquet")
    return open_store(str(folder))


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
