"""bfloat16 iterations through torch: nearly the float32 labels, an objective within a part in a thousand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from thresher import Cache, Clustered, Run, Selection, make_engine, open_store
from thresher.ops.kmeans import nearest_two
from thresher.ops.torch_products import nearest_bfloat16, worthwhile


def planted(rows: int, dim: int, groups: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    centers = rng.standard_normal((groups, dim))
    found = centers[rng.integers(0, groups, rows)] + 0.8 * rng.standard_normal((rows, dim))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def test_labels_and_cosines_are_nearly_those_of_float32() -> None:
    rows = planted(3000, 64, 30)
    centroids = rows[:200]
    labels, cosines, seconds = nearest_two(rows, centroids)
    found, values, others = nearest_bfloat16("cpu")(rows, centroids)
    assert (found == labels).mean() > 0.95
    assert found.dtype == np.int32
    np.testing.assert_allclose(values, cosines, atol=0.01)  # where labels differ, another centroid is as near
    np.testing.assert_allclose(others, seconds, atol=0.01)
    np.testing.assert_allclose(values, np.sum(rows * centroids[found], axis=1), atol=0.01)


def test_objective_and_final_distances(tmp_path: Path) -> None:
    rows = planted(6000, 64, 30)
    np.save(tmp_path / "image.npy", rows)
    store = open_store(str(tmp_path / "image.npy"))
    start = Selection.everything("", "", {}, len(store))
    run = Run(store, start, make_engine("threads", 2), Cache.at(tmp_path / "cache"))
    mean = {}
    for precision in ("float32", "bfloat16"):
        groups = Clustered(clusters=30, precision=precision).groups(run)
        cosines = rows @ groups.centroids_KD.T
        np.testing.assert_array_equal(groups.labels_N, cosines.argmax(axis=1))
        np.testing.assert_allclose(1 - groups.distances_N, cosines.max(axis=1), atol=2e-6)
        mean[precision] = cosines.max(axis=1).mean()
    assert mean["bfloat16"] > 0.999 * mean["float32"]


def test_it_is_worthwhile_if_the_processor_or_a_gpu_is_fast() -> None:
    assert worthwhile(True)
    assert worthwhile(False) == torch.cuda.is_available()
