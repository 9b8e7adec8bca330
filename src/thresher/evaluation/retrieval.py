"""Retrieval: whether an image is among the nearest images of its caption, and a caption among those of its image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.evaluation.accuracy import CELLS, TIE, check_ks, units
from thresher.ops.vectors import F32

Ints = npt.NDArray[np.int64]


def retrieval(
    image_ND: npt.ArrayLike,
    text_MD: npt.ArrayLike,
    *,
    image_group_N: npt.ArrayLike | None = None,
    text_group_M: npt.ArrayLike | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Return recall at k, images to texts and texts to images.

    Every item of the query's group is right: give duplicates the same group, and the captions of an image the group of
    the image. The rank of a query is the number of wrong items that are at least as near as the nearest right one. A
    wrong item that ties, within 1e-6 of the cosine, counts as nearer. So equal captions of different groups are not
    counted as right by chance, and a model that maps everything to one point gets 0. Right items do not compete with
    each other.

    Args:
        image_ND: (N, D) image embeddings, any float type and norm.
        text_MD: (M, D) text embeddings, any float type and norm.
        image_group_N: (N,) group of each image, integers or text; by default every image has its own group.
        text_group_M: (M,) group of each text; by default those of the images, if M = N.
        ks: The values of k.

    Returns:
        For each k "image_to_text_R@k" and "text_to_image_R@k", shares from 0 to 1, and the same names with the suffix
        "_chance", the recall of a random order. "images" and "texts", their numbers.

    Raises:
        UsageError: Shapes do not fit, a row is zero or not finite, or a query has no right item.
    """
    ks = check_ks(ks)
    image, text = units(image_ND, "images"), units(text_MD, "texts")
    if image.shape[1] != text.shape[1]:
        raise UsageError(
            f"images of {image.shape[1]} dimensions, texts of {text.shape[1]}; give embeddings of the same model"
        )
    group_N, group_M = _groups(len(image), len(text), image_group_N, text_group_M)
    recalls: dict[str, float] = {}
    for name, queries, items, of_queries, of_items in (
        ("image_to_text", image, text, group_N, group_M),
        ("text_to_image", text, image, group_M, group_N),
    ):
        right_Q = np.bincount(of_items, minlength=int(max(group_N.max(), group_M.max())) + 1)[of_queries]
        if not right_Q.all():
            row = int(np.argmin(right_Q))
            raise UsageError(
                f"{name}: no item on the other side has the group of row {row:,}; give every query a match"
            )
        ranks_Q = _ranks(queries, items, of_queries, of_items)
        for k in ks:
            recalls[f"{name}_R@{k}"] = float(np.mean(ranks_Q < k))
        for k in ks:
            recalls[f"{name}_R@{k}_chance"] = _chance(right_Q, len(items), k)
    return {**recalls, "images": len(image), "texts": len(text)}


def _groups(n: int, m: int, image: npt.ArrayLike | None, text: npt.ArrayLike | None) -> tuple[Ints, Ints]:
    """Return the groups of both sides as numbers from 0."""
    of_images = np.arange(n) if image is None else np.asarray(image)
    of_texts = of_images if text is None else np.asarray(text)
    if text is None and m != n:
        raise UsageError(f"{n:,} images and {m:,} texts; give image_group_N and text_group_M to match them")
    for name, groups, rows in (("image_group_N", of_images, n), ("text_group_M", of_texts, m)):
        if groups.shape != (rows,) or groups.dtype.kind not in "iuUSO":
            raise UsageError(
                f"{name} of shape {groups.shape} and type {groups.dtype}; give integers or text, ({rows},)"
            )
    # NumPy would convert mixed types to text, so that 1 and "1" became one group.
    if (of_images.dtype.kind in "iu") != (of_texts.dtype.kind in "iu"):
        raise UsageError(f"groups of images are {of_images.dtype}, of texts {of_texts.dtype}; give both the same type")
    codes = np.asarray(np.unique(np.concatenate([of_images, of_texts]), return_inverse=True)[1], np.int64)
    return codes[:n], codes[n:]


def _ranks(queries: F32, items: F32, of_queries: Ints, of_items: Ints) -> Ints:
    """Count for each query the wrong items at least as near as the nearest right one, in blocks of queries."""
    # In this order the items of a group are contiguous, so right items are looked up, not searched for.
    order, sizes_G = np.argsort(of_items, kind="stable"), np.bincount(of_items)
    starts_G = np.cumsum(sizes_G) - sizes_G
    # Positions of right items take several times the memory of a cosine.
    step = max(1, min(1024, CELLS // len(items), CELLS // 8 // int(sizes_G.max())))
    ranks = np.empty(len(queries), np.int64)
    for lo in range(0, len(queries), step):
        near: npt.NDArray[Any] = queries[lo : lo + step] @ items.T
        of_B = of_queries[lo : lo + step]
        first_B = np.cumsum(sizes_G[of_B]) - sizes_G[of_B]
        query = np.repeat(np.arange(len(of_B)), sizes_G[of_B])
        item = order[np.arange(len(query)) + (starts_G[of_B] - first_B)[query]]
        right = near[query, item]
        enough_B = np.maximum.reduceat(right, first_B) - np.float32(TIE)
        counted = np.bincount(query[right >= enough_B[query]], minlength=len(of_B))
        ranks[lo : lo + step] = np.count_nonzero(near >= enough_B[:, None], axis=1) - counted
    return ranks


def _chance(right_Q: Ints, items: int, k: int) -> float:
    """Return the mean probability that k items drawn at random include a right one."""
    if k >= items:
        return 1.0
    missed_Q = np.ones(len(right_Q))
    for i in range(k):
        missed_Q *= np.maximum(items - right_Q - i, 0) / (items - i)
    return float(np.mean(1 - missed_Q))
