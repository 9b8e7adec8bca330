"""Retrieval: is the caption of a picture among the nearest texts, and the picture of a caption among the pictures?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.evaluate.accuracy import CELLS, TIE, check_ks, units
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

    Any item of the query's group is right: give a group to what is duplicated, and the captions of an image its
    group. The rank of a query is the number of wrong items that are as near as the nearest right one, or nearer:
    a wrong item that ties, within 1e-6 of the cosine, counts against. So captions that are written alike but belong
    to different groups bring no luck, and models that map everything to one point get 0. Right items never count
    against each other.

    Args:
        image_ND: (N, D) image embeddings, any float type and length.
        text_MD: (M, D) text embeddings.
        image_group_N: (N,) group of each image, integers or text; by default every image is its own.
        text_group_M: (M,) group of each text; by default those of the images, where M = N.
        ks: How many nearest items to look among.

    Returns:
        For each k "image_to_text_R@k" and "text_to_image_R@k", shares from 0 to 1, and the same with "_chance"
        behind it: what an order drawn at random would get. "images" and "texts", their numbers.

    Raises:
        UsageError: Shapes that do not fit, rows without direction, or a query for which nothing is right.
    """
    ks = check_ks(ks)
    image, text = units(image_ND, "images"), units(text_MD, "texts")
    if image.shape[1] != text.shape[1]:
        raise UsageError(f"images of {image.shape[1]} dimensions, texts of {text.shape[1]}; give those of one space")
    group_N, group_M = _groups(len(image), len(text), image_group_N, text_group_M)
    recalls: dict[str, float] = {}
    for name, queries, items, of_queries, of_items in (
        ("image_to_text", image, text, group_N, group_M),
        ("text_to_image", text, image, group_M, group_N),
    ):
        right_Q = np.bincount(of_items, minlength=int(max(group_N.max(), group_M.max())) + 1)[of_queries]
        if not right_Q.all():
            row = int(np.argmin(right_Q))
            raise UsageError(f"{name}: nothing is right for row {row:,}: no item on the other side has its group")
        ranks_Q = _ranks(queries, items, of_queries, of_items)
        for k in ks:
            recalls[f"{name}_R@{k}"] = float(np.mean(ranks_Q < k))
        for k in ks:
            recalls[f"{name}_R@{k}_chance"] = _chance(right_Q, len(items), k)
    return {**recalls, "images": len(image), "texts": len(text)}


def _groups(n: int, m: int, image: npt.ArrayLike | None, text: npt.ArrayLike | None) -> tuple[Ints, Ints]:
    """Return the groups of both sides as numbers from 0 on."""
    of_images = np.arange(n) if image is None else np.asarray(image)
    of_texts = of_images if text is None else np.asarray(text)
    if text is None and m != n:
        raise UsageError(f"{n:,} images and {m:,} texts; say which belong together: image_group_N, text_group_M")
    for name, groups, rows in (("image_group_N", of_images, n), ("text_group_M", of_texts, m)):
        if groups.shape != (rows,) or groups.dtype.kind not in "iuUSO":
            raise UsageError(
                f"{name} of shape {groups.shape} and type {groups.dtype}; give integers or text, ({rows},)"
            )
    # Compared as they are: 1 and "1" would be one group in an array of both.
    if (of_images.dtype.kind in "iu") != (of_texts.dtype.kind in "iu"):
        raise UsageError(f"groups of images are {of_images.dtype}, of texts {of_texts.dtype}; give both alike")
    codes = np.asarray(np.unique(np.concatenate([of_images, of_texts]), return_inverse=True)[1], np.int64)
    return codes[:n], codes[n:]


def _ranks(queries: F32, items: F32, of_queries: Ints, of_items: Ints) -> Ints:
    """Count for each query the wrong items as near as the nearest right one; a block of queries at a time."""
    # The items of a group stand together in this order: right ones are looked up, not searched for.
    order, sizes_G = np.argsort(of_items, kind="stable"), np.bincount(of_items)
    starts_G = np.cumsum(sizes_G) - sizes_G
    # Positions of right items take several times the room of a cosine.
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
    """Return the mean probability that k of the items, drawn at random, hold a right one."""
    if k >= items:
        return 1.0
    missed_Q = np.ones(len(right_Q))
    for i in range(k):
        missed_Q *= np.maximum(items - right_Q - i, 0) / (items - i)
    return float(np.mean(1 - missed_Q))
