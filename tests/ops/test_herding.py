from __future__ import annotations

import numpy as np
import pytest

from thresher.ops.herding import herd


def unit(n: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def by_definition(image: np.ndarray, text: np.ndarray, count: int) -> list[int]:
    """Try every row at every step, with the matrices themselves."""
    each = [np.outer(v, t) for v, t in zip(image.astype(np.float64), text.astype(np.float64), strict=True)]
    goal, taken = sum(each) / len(each), []
    for _ in range(count):
        left = [i for i in range(len(each)) if i not in taken]
        taken.append(
            min(left, key=lambda i: np.linalg.norm(goal - sum(each[j] for j in [*taken, i]) / (len(taken) + 1)))
        )
    return taken


@pytest.mark.parametrize(("n", "count"), [(1, 1), (20, 0), (20, 20), (40, 13), (60, 25)])
@pytest.mark.parametrize("seed", range(3))
def test_each_step_is_the_best_of_all_rows(n: int, count: int, seed: int) -> None:
    image, text = unit(n, 4, seed), unit(n, 6, seed + 100)
    assert herd(image, text, count).tolist() == by_definition(image, text, count)


def test_of_equal_rows_the_lowest_is_taken() -> None:
    image = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
    assert herd(image, image, 4).tolist() == [0, 2, 1, 3]
