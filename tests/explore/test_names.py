"""Clusters are named by the words that set them apart, as a slow class-based tf-idf finds them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher import EmbeddingStore, from_arrays, open_store
from thresher.explore.names import ClusterNames, cluster_names, distinctive_words, nearest_rows, sampled
from thresher.explore.words import STOP_WORDS
from thresher.io import parquet


def slow_names(captions: list[list[str]], count: int) -> list[list[str]]:
    """BERTopic's formula with dictionaries; ``captions`` are the texts of each cluster."""
    documents = [[set(text.split()) for text in own] for own in captions]
    everywhere: dict[str, int] = {}
    for own in documents:
        for words in own:
            for word in words:
                everywhere[word] = everywhere.get(word, 0) + 1
    average = sum(everywhere.values()) / sum(1 for own in documents if own)
    total = sum(map(len, documents))
    names = []
    for own in documents:
        here = {word: sum(word in words for words in own) for word in everywhere}
        size = sum(here.values())
        scored = {
            word: n / size * math.log(1 + average / everywhere[word])
            for word, n in here.items()
            if n >= (2 if len(own) >= 3 else 1)
            and word not in STOP_WORDS
            and n / len(own) >= 1.5 * everywhere[word] / total - 1e-12
        }
        names.append(sorted(scored, key=lambda word: (-round(scored[word], 12), word))[:count])
    return names


def pool(captions: list[str | None], dim: int = 4, **more: object) -> EmbeddingStore:
    vectors = np.random.default_rng(0).standard_normal((len(captions), dim)).astype("f4")
    return from_arrays(vectors, captions=captions, **more)


def test_names_are_those_of_the_slow_reference() -> None:
    rng = np.random.default_rng(1)
    vocabulary = np.array([f"{a}{b}x" for a in "bcdfghjk" for b in "bcdfghjk"] + ["the", "of"])
    labels, captions = [], []
    for cluster in range(7):
        weights = rng.dirichlet(np.full(len(vocabulary), 0.15)) + 0.002
        for _ in range(int(rng.integers(1, 40))):
            labels.append(cluster)
            captions.append(" ".join(rng.choice(vocabulary, 6, p=weights / weights.sum())))
    order = rng.permutation(len(labels))
    labels_N, captions = np.array(labels)[order], [captions[i] for i in order]
    names = cluster_names(pool(captions), labels_N)
    by_cluster = [[captions[i] for i in np.flatnonzero(labels_N == k)] for k in range(7)]
    assert [list(words) for words in names.words] == slow_names(by_cluster, 3)
    assert names.captions == len(captions)


def test_words_that_are_everywhere_in_any_language_and_other_endings_are_not_names() -> None:
    captions = [f"ang larawan ng {word}" for word in ("pusa", "aso") for _ in range(5)]
    names = cluster_names(pool(captions), np.repeat([0, 1], 5))
    assert names.words == (("pusa",), ("aso",))
    captions = ["two cats and one cat", "cats cat", "cat cats sleeping", "a dog", "dogs dog", "dog"]
    assert cluster_names(pool(captions), np.repeat([0, 1], 3)).words[0] in {("cat",), ("cats",)}


def test_a_caption_that_repeats_a_word_does_not_name_the_cluster() -> None:
    captions = ["spam " * 500, "red kite", "red kite", "red kite", "blue sea", "blue sea", "blue sea"]
    names = cluster_names(pool(captions), np.array([0, 0, 0, 0, 1, 1, 1]))
    assert names.words == (("kite", "red"), ("blue", "sea"))


def test_empty_clusters_rows_without_a_cluster_and_pools_without_captions() -> None:
    labels = np.array([2, 2, -1, 0])
    names = cluster_names(pool(["red kite", "red kite", "lost", None]), labels, clusters=4)
    assert names.words == ((), (), ("kite", "red"), ())
    assert names.row_K.tolist()[1::2] == [-1, -1]
    assert names.title(0) == "cluster 0"
    assert names.title(2) == "kite, red"
    nothing = cluster_names(from_arrays(np.eye(4, dtype="f4")), labels)
    assert nothing.words == ((), (), ())
    assert nothing.row_K.tolist()[::2] == [3, 0]
    assert cluster_names(pool(["a"]), np.array([-1])).words == ()


def test_hostile_captions_become_plain_words() -> None:
    captions = ["<img src=x onerror=alert(1)>\u202e" * 9, "<img src=x onerror=alert(1)>\x00", "x" * 100_000]
    names = cluster_names(pool(captions), np.zeros(3, int))
    assert names.words == (("alert", "img", "onerror"),)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 1], [1, 1, 1, -1, 1]])
def test_the_nearest_row_of_each_cluster(labels: list[int]) -> None:
    distances = np.array([0.3, 0.2, 0.3, 0.1, 0.1], "f4")
    slow = [-1, -1]
    for row, (label, distance) in enumerate(zip(labels, distances, strict=True)):
        if label >= 0 and (slow[label] < 0 or distance < distances[slow[label]]):
            slow[label] = row
    assert nearest_rows(np.array(labels), distances, 2).tolist() == slow


def test_without_distances_the_row_is_near_the_mean() -> None:
    vectors = np.array([[1, 0], [0.9, 0.1], [0.6, 0.6], [0, 1], [np.nan, 1], [0.02, 1]], "f4")
    store = from_arrays(vectors)
    names = cluster_names(store, np.array([0, 0, 0, 1, 1, 1]))
    assert names.row_K[0] == 1
    assert names.row_K[1] in (3, 5)


def test_sampled_rows_are_evenly_spaced_over_each_cluster() -> None:
    labels = np.random.default_rng(0).integers(-1, 5, 1_000)
    rows = sampled(labels, 6, 10)
    assert (np.diff(rows) > 0).all()
    for k in range(6):
        own = np.flatnonzero(labels == k)
        taken = rows[labels[rows] == k]
        assert len(taken) == min(len(own), 10)
        if len(own):
            assert np.diff(np.searchsorted(own, taken)).max() <= len(own) / 10 + 1
    assert (sampled(labels, 6, 1_000) == np.flatnonzero(labels >= 0)).all()


def test_names_do_not_depend_on_how_files_are_cut(tmp_path: Path) -> None:
    from tests.pools import make, write_parquet

    one = make(40)
    labels = np.arange(40) % 3
    named = []
    for i, cuts in enumerate(([], [7, 30])):
        from thresher import open_store

        store = open_store(write_parquet(tmp_path / str(i), one, cuts))
        named.append(cluster_names(store, labels))
    assert named[0].words == named[1].words
    assert (named[0].row_K == named[1].row_K).all()


def test_many_clusters_are_named_in_seconds() -> None:
    rng = np.random.default_rng(0)
    words = pa.array([f"word{i}" for i in range(5_000)])
    n, k = 20_000, 1_000
    captions = [" ".join(words.take(pa.array(some)).to_pylist()) for some in rng.integers(0, 5_000, (n, 4))]
    names = cluster_names(pool(captions), rng.integers(0, k, n))
    assert isinstance(names, ClusterNames)
    assert len(names.words) == k
    assert all(len(own) <= 3 for own in names.words)


def test_scores_are_independent_of_the_order_of_words() -> None:
    words, sizes = ["zebra", "apple", "mango"], np.array([3, 3])
    clusters, numbers = np.repeat([0, 1], 6), np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 1, 0])
    first = distinctive_words(words, clusters, numbers, sizes)
    again = distinctive_words(words[::-1], clusters, 2 - numbers, sizes)
    assert first == again


def test_long_captions_are_not_all_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 24
    columns = {
        "key": [f"k{i}" for i in range(rows)],
        "image_embedding": pa.array(np.eye(rows, 8, dtype=np.float32).tolist(), pa.list_(pa.float32(), 8)),
        "caption": [f"w{i % 3} " * 500_000 for i in range(rows)],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=1)
    del columns
    store, used = open_store(str(tmp_path)), list[int]()
    before, lookup = pa.total_allocated_bytes(), EmbeddingStore.lookup

    def watched(self: EmbeddingStore, *which: Any) -> Iterator[Any]:
        for part in lookup(self, *which):
            used.append(pa.total_allocated_bytes() - before)
            yield part

    monkeypatch.setattr(EmbeddingStore, "lookup", watched)
    monkeypatch.setattr(parquet, "_TABLE", 2_000_000)
    assert cluster_names(store, np.arange(rows) % 3).words == (("w0",), ("w1",), ("w2",))
    assert len(used) == rows
    assert max(used) < 10_000_000  # all have 36 MB
