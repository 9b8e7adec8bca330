"""Zero-shot classification: the class whose name, put into sentences, is nearest to the picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.evaluate.accuracy import CELLS, KS, TIE, Tally, labels_for, units
from thresher.ops.vectors import F32


def class_embeddings(prompt_CTD: npt.ArrayLike) -> F32:
    """Average the sentences about each class, as "Learning Transferable Visual Models" (arXiv 2103.00020) does.

    Args:
        prompt_CTD: (C, T, D) text embeddings of T sentences ("a photo of a {}.", ...) for each of C classes.

    Returns:
        (C, D) float32: normalised, averaged over the sentences, normalised again.

    Raises:
        UsageError: Another shape, or sentences without a direction, alone or on average.
    """
    prompts = np.asarray(prompt_CTD)
    if prompts.ndim != 3 or not prompts.size:
        raise UsageError(f"prompts of shape {prompts.shape}; give (classes, sentences, dimensions)")
    single = units(prompts.reshape(-1, prompts.shape[2]), "prompts")
    return units(single.reshape(prompts.shape).mean(axis=1), "classes")


def zero_shot(
    image_ND: npt.ArrayLike, class_CD: npt.ArrayLike, labels_N: npt.ArrayLike, *, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return how often the right class is nearest by cosine.

    A right class that ties with others, within 1e-6, counts as behind them. Rows with a negative label are left out.

    Args:
        image_ND: (N, D) image embeddings, any float type and length.
        class_CD: (C, D) class embeddings, see :func:`class_embeddings`.
        labels_N: (N,) number of each image's class, below C.
        ks: How many nearest classes to look among.

    Returns:
        "top1", "top5" (one for each k), "mean_per_class" (mean of the classes' own top-1), "majority" (share of the
        largest class), "chance" (1 / C), "classes" and "rows".

    Raises:
        UsageError: Shapes that do not fit, labels of no class, no labelled row, rows without direction.
    """
    image, classes = units(image_ND, "images"), units(class_CD, "classes")
    if image.shape[1] != classes.shape[1]:
        raise UsageError(f"images of {image.shape[1]} dimensions, classes of {classes.shape[1]}; give those of a space")
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
