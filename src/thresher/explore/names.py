"""Names of clusters: the words that set the captions of a cluster apart, and a row that represents it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.explore.words import STOP_WORDS, words_in
from thresher.ops.vectors import units_of
from thresher.pool.store import EmbeddingStore

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

CAPTIONS = 200_000  # read in all
_MOST, _LEAST = 500, 8  # captions read per cluster
_VECTORS = 16  # read per cluster to find a row near the centroid
_IN_ALL = 32_768  # vectors read in all
_LIFT = 1.5  # how much more often than elsewhere a word must occur
_VOCABULARY = 1_000_000  # different words; further ones are ignored
_TRIED = 12  # words per cluster, in case some only repeat others


@dataclass(frozen=True, eq=False)
class ClusterNames:
    """Names of K clusters.

    Attributes:
        words: For each cluster the words that set it apart, the best first; () if it has no captions or no such word.
        row_K: (K,) int64, the global id of a row near the centroid, -1 for an empty cluster.
        captions: Number of captions that were read.
    """

    words: tuple[tuple[str, ...], ...]
    row_K: Ints
    captions: int = 0

    def title(self, cluster: int) -> str:
        """Return the words as one text; "cluster 36" if there are none."""
        return ", ".join(self.words[cluster]) or f"cluster {cluster}"


def cluster_names(
    store: EmbeddingStore,
    labels_N: Array,
    *,
    distances_N: Array | None = None,
    clusters: int | None = None,
    count: int = 3,
    captions: int = CAPTIONS,
) -> ClusterNames:
    """Name clusters by the words of their captions, and by the row nearest to their centroid.

    The captions of at most 500 rows of each cluster and of about ``captions`` in all are read, evenly spaced over the
    rows of the cluster. The same pool and labels give the same names.

    Args:
        store: The pool.
        labels_N: (N,) integers, the cluster of each row; negative for rows in no cluster.
        distances_N: (N,) distances to the centroid, if they are known. Else the row is the one nearest to the mean of
            16 rows of the cluster, or fewer if there are more than 2,048 clusters.
        clusters: K, if the last clusters may be empty.
        count: Words in a name.
        captions: Number of captions to read.
    """
    k = clusters or int(labels_N.max(initial=-1)) + 1
    if distances_N is not None:
        row_K = nearest_rows(labels_N, distances_N, k)
    else:
        row_K = _near_mean(store, labels_N, k)
    if store.layout.caption is None or not k:
        return ClusterNames(((),) * k, row_K)
    rows = sampled(labels_N, k, int(np.clip(captions // k, _LEAST, _MOST)))
    clusters_W: list[Ints] = []
    words_W: list[Ints] = []
    number: dict[str, int] = {}
    done = 0
    for part in store.lookup([store.layout.caption], rows):
        found, word, row = words_in(part.column(0))
        for one in found.to_pylist() if len(number) < _VOCABULARY else ():
            number.setdefault(one, len(number))
        own = np.array([number.get(one, -1) for one in found.to_pylist()], np.int64)[word]
        words_W.append(own[own >= 0])
        clusters_W.append(np.asarray(labels_N[rows[done + row[own >= 0]]], np.int64))
        done += len(part)
    sizes_K = np.bincount(labels_N[rows], minlength=k)
    empty = np.empty(0, np.int64)
    chosen = distinctive_words(
        list(number), np.concatenate([empty, *clusters_W]), np.concatenate([empty, *words_W]), sizes_K, count
    )
    return ClusterNames(chosen, row_K, len(rows))


def distinctive_words(
    words: Sequence[str], clusters_W: Ints, words_W: Ints, sizes_K: Ints, count: int = 3
) -> tuple[tuple[str, ...], ...]:
    """Return the words that set each cluster apart, by class-based tf-idf (Grootendorst, arXiv:2203.05794).

    The score of a word is its share among the words of the cluster, times log(1 + A / f) with its number f in all
    clusters and the mean number A of words in a cluster. We differ in counting captions that contain a word, not its
    occurrences, so that one long caption cannot name a cluster, and in what may be a name: not a stop word; a word in
    at least two captions of the cluster, if it has three or more; with several clusters, a word that at least 1.5 times
    as many of its captions contain as of all captions, which excludes frequent words of any language; and not
    the plural or another ending of a better word.

    Args:
        words: The V words.
        clusters_W: (W,) int64, the cluster of each word of each caption.
        words_W: (W,) int64, its index in ``words``.
        sizes_K: (K,) captions read of each cluster.
        count: Words to choose for each.

    Returns:
        For each of the K clusters up to ``count`` words, highest score first; equal scores in the order of the
        alphabet.
    """
    k, v = len(sizes_K), max(len(words), 1)
    pairs, found = np.unique(clusters_W * v + words_W, return_counts=True)
    cluster, word = np.divmod(pairs, v)
    all_V = np.bincount(word, found, minlength=v)
    words_K = np.bincount(cluster, found, minlength=k)
    filled = int(np.count_nonzero(sizes_K))
    order_V = np.empty(v, np.int64)
    order_V[np.argsort(np.array([*words] or [""], object), kind="stable")] = np.arange(v)
    allowed_V = np.array([one not in STOP_WORDS for one in words] or [False], np.bool_)
    score = found / words_K[cluster] * np.log1p(words_K.sum() / max(filled, 1) / all_V[word])
    lift = found / sizes_K[cluster] / (all_V[word] / sizes_K.sum())
    good = allowed_V[word] & (found >= np.where(sizes_K[cluster] >= 3, 2, 1))
    if filled > 1:
        good &= lift >= _LIFT
    cluster, word, score = cluster[good], word[good], score[good]
    order = np.lexsort((order_V[word], -score, cluster))
    cluster, word = cluster[order], word[order]
    starts = np.searchsorted(cluster, np.arange(k + 1))
    return tuple(
        _varied([words[i] for i in word[lo : min(hi, lo + _TRIED * count)]], count)
        for lo, hi in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    )


def _varied(words: Sequence[str], count: int) -> tuple[str, ...]:
    """Return the first words that are not another form of an earlier one."""
    chosen: list[str] = []
    for word in words:
        if not any(_alike(word, other) for other in chosen):
            chosen.append(word)
        if len(chosen) == count:
            break
    return tuple(chosen)


def _alike(a: str, b: str) -> bool:
    short, long = sorted((a, b), key=len)
    # "flag" and "flags"; pairs of Chinese characters overlap instead: the end of one is the start of the next.
    return (len(short) > 2 and long.startswith(short) and len(long) - len(short) <= 2) or (
        len(a) == len(b) == 2 and not a.isascii() and (a[0] == b[1] or a[1] == b[0])
    )


def nearest_rows(labels_N: Array, distances_N: Array, clusters: int) -> Ints:
    """Return the row of each cluster with the smallest distance, (K,) int64: the first of equal ones, -1 for none."""
    rows = np.flatnonzero((labels_N >= 0) & np.isfinite(distances_N))
    labels, distances = labels_N[rows], distances_N[rows]
    best = np.full(clusters, np.inf)
    np.minimum.at(best, labels, distances)
    rows = rows[distances == best[labels]][::-1]  # reversed, so that the first row is written last
    found = np.full(clusters, -1, np.int64)
    found[labels_N[rows]] = rows
    return found


def sampled(labels_N: Array, clusters: int, most: int) -> Ints:
    """Return up to ``most`` rows of each cluster, evenly spaced over its rows, as ascending rows (M,) int64."""
    order = np.argsort(labels_N, kind="stable")
    ends = np.searchsorted(labels_N[order], np.arange(clusters + 1))
    sizes = np.diff(ends)
    take = np.minimum(sizes, most)
    at = np.arange(int(take.sum())) - np.repeat(np.cumsum(take) - take, take)  # 0, 1, 2, ... in each cluster
    size, number = np.repeat(sizes, take), np.repeat(take, take)
    return np.sort(order[np.repeat(ends[:-1], take) + (2 * at + 1) * size // (2 * number)])


def _near_mean(store: EmbeddingStore, labels_N: Array, clusters: int) -> Ints:
    """Return for each cluster the row nearest to the mean of a few of its rows."""
    field = "image" if "image" in store.layout.vectors else next(iter(store.layout.vectors), None)
    if not clusters or field is None:
        return np.full(clusters, -1, np.int64)
    rows = sampled(labels_N, clusters, int(np.clip(_IN_ALL // clusters, 1, _VECTORS)))
    raw = store.raw_at(field, rows)
    units, bad = units_of(raw, np.empty(raw.shape, np.float32))
    units[bad] = 0
    labels = labels_N[rows]
    sums = np.zeros((clusters, units.shape[1]), np.float32)
    np.add.at(sums, labels, units)
    distances = 1 - np.einsum(
        "md,md->m", units, sums[labels] / np.maximum(np.linalg.norm(sums, axis=1), 1e-20)[labels, None]
    )
    distances[bad] = np.nan
    inside = np.full(len(labels_N), np.nan)
    inside[rows] = distances
    return nearest_rows(labels_N, inside, clusters)
