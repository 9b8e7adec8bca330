"""Zero-shot and nearest neighbours against loops over rows, and what they share."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import UsageError
from thresher.evaluation import accuracy
from thresher.evaluation import knn as of_knn
from thresher.evaluation import zero_shot as of_zero_shot
from thresher.evaluation.knn import knn
from thresher.evaluation.zero_shot import class_embeddings, zero_shot


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def judged(scores: list[list[float]], labels: list[int], ks: tuple[int, ...]) -> dict[str, float]:
    """Sort the classes of every row, the right one last among equals."""
    rows = [(score, label) for score, label in zip(scores, labels, strict=True) if label >= 0]
    places = []
    for score, label in rows:
        order = sorted(range(len(score)), key=lambda c: (-round(score[c], 5), c == label))
        places.append(order.index(label))
    found = {f"top{k}": sum(place < k for place in places) / len(rows) for k in ks}
    own: dict[int, list[bool]] = {}
    for place, (_, label) in zip(places, rows, strict=True):
        own.setdefault(label, []).append(place == 0)
    found["mean_per_class"] = sum(sum(hits) / len(hits) for hits in own.values()) / len(own)
    found["majority"] = max(map(len, own.values())) / len(rows)
    return found | {"chance": 1 / len(scores[0]), "classes": len(scores[0]), "rows": len(rows)}


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 9))
def test_zero_shot_is_that_of_a_sort(seed: int, n: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(1, 4, (n, 2)).astype(np.float32)  # few directions: ties
    names = rng.integers(1, 4, (classes, 2)).astype(np.float16)
    labels = rng.integers(-1, classes, n)
    labels[0] = 0
    scores = (unit(image.astype(float)) @ unit(names.astype(float)).T).tolist()
    assert zero_shot(image, names, labels) == pytest.approx(judged(scores, labels.tolist(), (1, 5)))


def slow_knn(train: np.ndarray, of_train: list[int], test: np.ndarray, k: int, temperature: float) -> list[list[float]]:
    classes = max(of_train) + 1
    found = []
    for row in unit(test):
        near = [(-round(float(row @ other), 6), i) for i, other in enumerate(unit(train))]
        votes = [0.0] * classes
        for cosine, i in sorted(near)[:k]:
            votes[of_train[i]] += math.exp(-cosine / temperature)
        found.append([vote / max(votes) for vote in votes])
    return found


@given(st.integers(0, 2**32), st.integers(1, 25), st.integers(1, 12), st.integers(1, 30))
def test_neighbours_vote_as_in_a_loop(seed: int, n: int, m: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(n, 3)), rng.normal(size=(m, 3))
    of_train, of_test = rng.integers(0, 4, n), rng.integers(0, 4, m)
    of_train[:1], of_test[:1] = 3, 3
    seen = sorted({*of_train.tolist(), *of_test.tolist()})
    scores = slow_knn(train, of_train.tolist(), test, k, 0.5)
    there = [[row[c] for c in seen] for row in scores]
    found = knn(train, of_train, test, of_test, k=k, temperature=0.5)
    assert found == pytest.approx(judged(there, [seen.index(label) for label in of_test], (1, 5)))


def test_of_equally_near_rows_the_lower_ones_vote() -> None:
    train = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    assert knn(train, np.array([0, 0, 1, 1]), train[:1], np.array([0]), k=2)["top1"] == 1
    assert knn(train, np.array([1, 1, 0, 0]), train[:1], np.array([0]), k=2)["top1"] == 0
    assert knn(train, np.array([0, 1, 1, 1]), train[:1], np.array([0]), k=2)["top1"] == 0  # a draw is lost


def test_rows_without_a_label_neither_vote_nor_count() -> None:
    train = np.array([[1.0, 0], [1, 0.01], [0, 1]])
    found = knn(train, np.array([-1, 5, 7]), train, np.array([5, -1, 7]), k=1)
    assert (found["top1"], found["rows"], found["classes"]) == (1, 2, 2)


def test_a_class_that_no_training_row_has_is_never_right() -> None:
    train = np.array([[1.0, 0], [0, 1]])
    found = knn(train, np.array([0, 1]), train, np.array([0, 9]), k=2)
    assert (found["top1"], found["mean_per_class"], found["classes"]) == (0.5, 0.5, 3)


def test_far_rows_under_a_low_temperature_still_vote() -> None:
    found = knn(np.array([[-1.0, 0.0]]), np.array([0]), np.array([[1.0, 0.0]]), np.array([0]), temperature=0.01)
    assert found["top1"] == 1


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    rows, labels = rng.normal(size=(101, 5)), rng.integers(0, 7, 101)
    whole = knn(rows, labels, rows[::2], labels[::2]), zero_shot(rows, rows[:7], labels)
    monkeypatch.setattr(of_knn, "CELLS", 101 * 3)
    monkeypatch.setattr(of_zero_shot, "CELLS", 7 * 3)
    assert (knn(rows, labels, rows[::2], labels[::2]), zero_shot(rows, rows[:7], labels)) == whole


def test_sentences_count_by_direction() -> None:
    prompts = np.random.default_rng(0).normal(size=(3, 4, 6)) * np.array([1, 10, 100, 1000])[:, None]
    expected = unit(unit(prompts).mean(axis=1))
    np.testing.assert_allclose(class_embeddings(prompts), expected, atol=1e-6)


def test_an_untrained_guess_is_the_majority_or_chance() -> None:
    labels = np.array([0] * 70 + [1] * 20 + [2] * 10)
    always = zero_shot(np.ones((100, 2)), np.array([[1.0, 1], [1, 0], [0, 1]]), labels)
    assert always["top1"] == always["majority"] == 0.7
    assert always["mean_per_class"] == pytest.approx(always["chance"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zero_shot(np.ones((2, 3)), np.ones((2, 2)), [0, 1]), "3 dimensions"),
        (lambda: zero_shot(np.ones((2, 2)), np.eye(2), [0, 2]), "a label of 2 for 2 classes"),
        (lambda: zero_shot(np.ones((2, 2)), np.eye(2), [0.0, 1.0]), "give integers"),
        (lambda: zero_shot(np.ones((2, 2)), np.eye(2), [-1, -1]), "no row has a label"),
        (lambda: zero_shot(np.ones((2, 2)), np.eye(2), [0]), r"labels of shape \(1,\)"),
        (lambda: zero_shot(np.ones((2, 2), int), np.eye(2), [0, 1]), "give floats"),
        (lambda: knn(np.eye(2), [0, 1], np.eye(2), [0, 1], k=0), "k = 0"),
        (lambda: knn(np.eye(2), [0, 1], np.eye(2), [0, 1], temperature=0), "temperature = 0"),
        (lambda: knn(np.eye(2), [-1, -1], np.eye(2), [0, 1]), "no training row has a label"),
        (lambda: knn(np.eye(2), [0, 1], np.eye(3), [0, 1, 1]), "of 2 dimensions"),
        (lambda: class_embeddings(np.ones((2, 3))), "prompts of shape"),
        (lambda: class_embeddings(np.array([[[1.0, 0], [-1, 0]]])), "row 0 of the classes is zero"),
        (lambda: accuracy.Tally(3, (0,)), "ks = "),
    ],
)
def test_what_does_not_fit_is_refused(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()  # type: ignore[operator]
