"""Zero-shot classification: predict the class whose prompts (its name in sentences) are nearest to the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.evaluation.accuracy import CELLS, KS, TIE, Tally, labels_for, units
from thresher.ops.vectors import F32


def class_embeddings(prompt_CTD: npt.ArrayLike) -> F32:
    """Average the prompts of each class, as in "Learning Transferable Visual Models" (arXiv 2103.00020).

    Args:
        prompt_CTD: (C, T, D) text embeddings of T sentences ("a photo of a {}.", ...) for each of C classes.

    Returns:
        (C, D) float32: normalized, averaged over the sentences, normalized again.

    Raises:
        UsageError: The array has another shape, or an embedding or an average is zero or not finite.
    """
    prompts = np.asarray(prompt_CTD)
    if prompts.ndim != 3 or not prompts.size:
        raise UsageError(f"prompts of shape {prompts.shape}; give (classes, sentences, dimensions)")
    single = units(prompts.reshape(-1, prompts.shape[2]), "prompts")
    return units(single.reshape(prompts.shape).mean(axis=1), "classes")


def zero_shot(
    image_ND: npt.ArrayLike, class_CD: npt.ArrayLike, labels_N: npt.ArrayLike, *, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return the accuracy of predicting the nearest class by cosine similarity.

    A right class that ties with others, within 1e-6, ranks behind them. Rows with a negative label are left out.

    Args:
        image_ND: (N, D) image embeddings, any float type and norm.
        class_CD: (C, D) class embeddings, see :func:`class_embeddings`.
        labels_N: (N,) number of each image's class, below C.
        ks: The values of k for top-k accuracy.

    Returns:
        "top1", "top5" (one for each k), "mean_per_class" (top-1 of each class, averaged over classes), "majority"
        (share of the largest class), "chance" (1 / C), "classes" and "rows".

    Raises:
        UsageError: Shapes do not fit, a label has no class, there is no labelled row, or a row is zero or not finite.
    """
    image, classes = units(image_ND, "images"), units(class_CD, "classes")
    if image.shape[1] != classes.shape[1]:
        raise UsageError(
            f"images of {image.shape[1]} dimensions, classes of {classes.shape[1]}; give embeddings of the same model"
        )
    labels = labels_for(labels_N, len(image), "images")
    if labels.max() >= len(classes):
        raise UsageError(
            f"a label of {labels.max():,} for {len(classes):,} classes; labels are 0 to {len(classes) - 1:,}"
        )
    rows = np.flatnonzero(labels >= 0)
    tally = Tally(len(classes), ks, tie=TIE)
    step = max(1, min(4096, CELLS // len(classes)))
    for lo in range(0, len(rows), step):
        here = rows[lo : lo + step]
        tally.add(image[here] @ classes.T, labels[here])
    return tally.shares()
