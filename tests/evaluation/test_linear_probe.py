"""The probe against SciPy on the same penalised loss; splits that keep groups together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import logsumexp

from thresher.errors import MissingExtraError, UsageError
from thresher.evaluation import linear_probe as module
from thresher.evaluation.linear_probe import linear_probe
from thresher.evaluation.split import split


def blobs(n: int, classes: int = 4, dim: int = 6, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return (centres[labels] + noise * rng.normal(size=(n, dim))).astype(np.float32), labels


def by_scipy(train: np.ndarray, labels: np.ndarray, test: np.ndarray, strength: float) -> np.ndarray:
    """Scores of the test rows by the classifier that minimises the loss the docstring states."""
    train, test = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train, test))
    mean, deviation = train.mean(0), train.std(0)
    x, classes = (train - mean) / deviation, labels.max() + 1
    right = np.eye(classes)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = flat[:-classes].reshape(-1, classes), flat[-classes:]
        logits = x @ w + b
        norm = logsumexp(logits, axis=1, keepdims=True)
        rest = (np.exp(logits - norm) - right) / len(x)
        slope = np.concatenate([(x.T @ rest + strength * w).ravel(), rest.sum(0)])
        return float((norm[:, 0] - logits[right > 0]).mean() + strength / 2 * (w**2).sum()), slope

    start = np.zeros((x.shape[1] + 1) * classes)
    fitted = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-6}).x
    return ((test - mean) / deviation) @ fitted[:-classes].reshape(-1, classes) + fitted[-classes:]


@pytest.mark.parametrize("strength", [1.0, 0.05, 1e-3])
def test_the_fit_is_that_of_another_optimiser(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    (train, of_train), (test, of_test) = blobs(120), blobs(300, seed=1)
    scores = by_scipy(train.astype(float), of_train, test.astype(float), strength)
    seen: list[np.ndarray] = []
    monkeypatch.setattr(module.Tally, "add", lambda self, s, y, add=module.Tally.add: (seen.append(s), add(self, s, y)))
    found = linear_probe(train, of_train, test, of_test, strengths=(strength,))
    ours, theirs = (s - s.mean(1, keepdims=True) for s in (np.concatenate(seen), scores))  # up to a shift of all
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())
    assert found["top1"] == np.mean(scores.argmax(1) == of_test)
    assert found["converged"] == 1
    assert found["slope"] < 1e-5
    assert found["l2"] == strength
    assert "held_out_top1" not in found


def test_the_strength_is_chosen_on_held_out_training_rows() -> None:
    (train, of_train), (test, of_test) = blobs(60, dim=40, noise=3.0), blobs(400, dim=40, seed=1, noise=3.0)
    found = linear_probe(train, of_train, test, of_test)
    fit = ~split(60, share=0.2)
    alone = {
        s: linear_probe(train[fit], of_train[fit], train[~fit], of_train[~fit], strengths=(s,), ks=(1,))["top1"]
        for s in module.STRENGTHS
    }
    assert found["held_out_top1"] == max(alone.values())
    assert found["l2"] == max(s for s, top in alone.items() if top == max(alone.values()))
    assert found == linear_probe(train, of_train, test, of_test)
    assert found["top1"] > 2 * found["chance"]


def test_it_fits_where_gradients_are_turned_off() -> None:
    (train, labels), (test, of_test) = blobs(60), blobs(60, seed=1)
    expected = linear_probe(train, labels, test, of_test)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert linear_probe(train, labels, test, of_test) == expected


def test_labels_may_be_any_numbers_and_missing() -> None:
    (train, labels), (test, of_test) = blobs(80), blobs(50, seed=1)
    plain = linear_probe(train, labels, test, of_test, strengths=(0.1,))
    more = np.concatenate([train, np.ones((3, 6), np.float32)])
    odd = linear_probe(more, np.append(100 - 7 * labels, [-1, -5, -1]), test, 100 - 7 * of_test, strengths=(0.1,))
    assert odd["top1"] == plain["top1"]
    assert odd["rows"] == plain["rows"] == 50


def test_dimensions_that_never_change_are_no_trouble() -> None:
    labels = np.arange(40) % 2
    train = np.stack([np.where(labels, 1.0, -1.0), np.ones(40)], axis=1)
    constant = linear_probe(train, labels, train, labels, strengths=(0.01,))
    assert constant["top1"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels_N": np.zeros(20, int)}, "fewer than two classes"),
        ({"strengths": ()}, "strengths"),
        ({"strengths": (0.1, 0.0)}, "strengths"),
        ({"test_MD": np.ones((20, 3))}, "of 6 dimensions"),
        ({"train_group_N": np.zeros(3)}, "train_group_N of shape"),
        ({"test_labels_M": np.full(20, -1)}, "no row has a label"),
        ({"train_group_N": np.zeros(20)}, "cannot be split"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    rows, labels = blobs(20)
    values = {"train_ND": rows, "train_labels_N": labels, "test_MD": rows, "test_labels_M": labels, **change}
    order = [values.pop(name) for name in ("train_ND", "train_labels_N", "test_MD", "test_labels_M")]
    with pytest.raises(UsageError, match=message):
        linear_probe(*order, **values)


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed", lambda package: False)
    rows, labels = blobs(20)
    with pytest.raises(MissingExtraError, match=r"\.\[torch\]"):
        linear_probe(rows, labels, rows, labels)


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.floats(0.05, 0.95), st.integers(0, 99))
def test_splits_keep_groups_together_and_come_near_the_share(groups: list[int], share: float, seed: int) -> None:
    if len(set(groups)) < 2:
        with pytest.raises(UsageError, match="cannot be split"):
            split(len(groups), groups_N=groups, share=share, seed=seed)
        return
    first = split(len(groups), groups_N=groups, share=share, seed=seed)
    sides = {(group, bool(side)) for group, side in zip(groups, first, strict=True)}
    assert len(sides) == len(set(groups))
    assert 0 < first.sum() < len(groups)
    largest = max(map(groups.count, groups))
    assert abs(first.sum() - share * len(groups)) <= largest
    moved = np.random.default_rng(0).permutation(len(groups))
    again = split(len(groups), groups_N=np.array(groups)[moved], share=share, seed=seed)
    np.testing.assert_array_equal(again, first[moved])


def test_rows_without_groups_are_split_exactly() -> None:
    assert [split(n, share=0.5).sum() for n in (2, 10, 11)] == [1, 5, 5]
    assert (split(100, seed=0) != split(100, seed=1)).any()
    with pytest.raises(UsageError, match="strictly between"):
        split(10, share=1.0)
