"""Recall against a loop over queries that sorts everything, with every tie decided against the query."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import UsageError
from thresher.evaluation import retrieval as module
from thresher.evaluation.retrieval import retrieval


def slow(queries: np.ndarray, items: np.ndarray, of_queries: list, of_items: list, k: int) -> float:
    """Sort the items of every query, wrong ones first among equals; is a right one in the first k?"""
    hits = 0
    for q, query in enumerate(queries):
        near = [round(float(query @ item / np.linalg.norm(query) / np.linalg.norm(item)), 6) for item in items]
        order = sorted(range(len(items)), key=lambda i: (-near[i], of_items[i] == of_queries[q]))
        # Right items are no hindrance to each other: only the first matters.
        first = next(place for place, i in enumerate(order) if of_items[i] == of_queries[q])
        hits += first < k
    return hits / len(queries)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """Few directions, so that there are ties; groups of several images and captions."""
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    groups = draw(st.integers(1, 8))
    of_images = [*range(groups), *rng.integers(0, groups, draw(st.integers(0, 8))).tolist()]
    of_texts = [*range(groups), *rng.integers(0, groups, draw(st.integers(0, 12))).tolist()]
    # Small whole numbers: cosines are equal exactly or differ by far more than the rounding above.
    image = rng.integers(-2, 3, (len(of_images), 2)).astype(np.float64)
    text = rng.integers(-2, 3, (len(of_texts), 2)).astype(np.float64)
    for rows in (image, text):
        rows[~rows.any(axis=1)] = (1, 0)
    return image, text, of_images, of_texts


@given(cases())
def test_recall_is_that_of_a_sort(case: tuple[np.ndarray, np.ndarray, list[int], list[int]]) -> None:
    image, text, of_images, of_texts = case
    found = retrieval(image, text, image_group_N=of_images, text_group_M=of_texts, ks=(1, 2, 5))
    for k in (1, 2, 5):
        assert found[f"image_to_text_R@{k}"] == slow(image, text, of_images, of_texts, k)
        assert found[f"text_to_image_R@{k}"] == slow(text, image, of_texts, of_images, k)
    assert (found["images"], found["texts"]) == (len(image), len(text))


@given(cases())
def test_chance_is_the_share_of_subsets_with_a_right_item(
    case: tuple[np.ndarray, np.ndarray, list[int], list[int]],
) -> None:
    image, text, of_images, of_texts = case
    found = retrieval(image, text, image_group_N=of_images, text_group_M=of_texts, ks=(1, 3))
    for k in (1, 3):
        subsets = list(combinations(of_texts, min(k, len(of_texts))))
        expected = np.mean([np.mean([group in subset for subset in subsets]) for group in of_images])
        assert found[f"image_to_text_R@{k}_chance"] == pytest.approx(expected)


def test_chance_of_one_right_item_is_k_in_n() -> None:
    found = retrieval(np.eye(50), np.eye(50))
    assert found["image_to_text_R@5_chance"] == pytest.approx(1 - math.comb(49, 5) / math.comb(50, 5))
    assert found["text_to_image_R@1_chance"] == pytest.approx(1 / 50)
    assert found["image_to_text_R@1"] == found["text_to_image_R@1"] == 1


def test_a_model_that_maps_all_to_one_point_gets_nothing() -> None:
    found = retrieval(np.ones((20, 3)), np.ones((20, 3)))
    assert {value for name, value in found.items() if "R@" in name and "chance" not in name} == {0}


def test_identical_captions_bring_no_luck_but_a_group_joins_them() -> None:
    image = np.eye(4, dtype=np.float32)
    text = image[[0, 0, 2, 3]] * np.float32([[1], [3.3], [1], [1]])  # of other lengths: equal but for rounding
    image[1] = image[0]
    apart = retrieval(image, text, ks=(1, 2))
    assert apart["image_to_text_R@1"] == apart["text_to_image_R@1"] == 0.5
    assert apart["image_to_text_R@2"] == 1
    joined = retrieval(image, text, image_group_N=["a", "a", "b", "c"], ks=(1,))
    assert joined["image_to_text_R@1"] == joined["text_to_image_R@1"] == 1


def test_several_captions_of_an_image(rows: object) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(30, 8))
    owners = np.repeat(np.arange(30), 5)
    text = image[owners] + rng.normal(size=(150, 8)) * 1.5
    found = retrieval(image, text, image_group_N=np.arange(30), text_group_M=owners, ks=(1,))
    near = (image / np.linalg.norm(image, axis=1)[:, None]) @ (text / np.linalg.norm(text, axis=1)[:, None]).T
    assert found["image_to_text_R@1"] == np.mean(owners[near.argmax(1)] == np.arange(30))
    assert found["text_to_image_R@1"] == np.mean(near.argmax(0) == owners)
    assert found["text_to_image_R@1"] != found["image_to_text_R@1"]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    image, noise, groups = rng.normal(size=(97, 6)), rng.normal(size=(97, 6)), rng.integers(0, 60, 97)
    whole = retrieval(image, image + noise, image_group_N=groups)
    monkeypatch.setattr(module, "CELLS", 97 * 7)
    assert retrieval(image, image + noise, image_group_N=groups) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_MD": np.ones((4, 2))}, "give image_group_N and text_group_M"),
        ({"text_MD": np.ones((3, 5))}, "2 dimensions, texts of 5"),
        ({"text_MD": np.ones(3)}, r"texts of shape \(3,\)"),
        ({"image_ND": np.zeros((3, 2))}, "row 0 of the images is zero"),
        ({"image_ND": np.full((3, 2), np.nan)}, "not finite"),
        ({"image_group_N": [0, 1]}, "image_group_N of shape"),
        (
            {"image_group_N": [0, 1, 2], "text_group_M": [0, 1, 1]},
            "image_to_text: no item on the other side has the group of row 2",
        ),
        ({"image_group_N": [0, 1, 2], "text_group_M": ["0", "1", "2"]}, "give both the same type"),
        ({"ks": ()}, "ks = "),
        ({"ks": (0,)}, "ks = "),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    given_ = {"image_ND": np.eye(3, 2) + 0.1, "text_MD": np.eye(3, 2) + 0.1, **change}
    with pytest.raises(UsageError, match=message):
        retrieval(given_.pop("image_ND"), given_.pop("text_MD"), **given_)
