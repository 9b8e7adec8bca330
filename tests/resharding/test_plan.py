"""Plans: order, copies, memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import UsageError
from thresher.export.keys import KeySet
from thresher.resharding.plan import Matched, ReshardPlan, Scanned, Source, match, planned


def scanned(keys: list[str]) -> Scanned:
    return Scanned(keys, np.arange(len(keys)) * 512, np.full(len(keys), 512))


def sources(count: int) -> list[Source]:
    return [Source(f"{i}.tar", "file", 10**6, None) for i in range(count)]


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), min_size=1, max_size=4), st.data())
def test_every_chosen_sample_as_often_as_it_is_used(files: list[list[str]], data: st.DataObject) -> None:
    keys = [key for file in files for key in file]
    times = Counter({key: data.draw(st.integers(0, 3)) for key in keys})
    wanted = KeySet.from_counts(times.items())
    found = [match(scanned(file), wanted) for file in files]
    if any(often > 1 and times[key] for key, often in Counter(keys).items()):
        with pytest.raises(UsageError, match="the same key as another chosen sample"):
            planned(sources(len(files)), found, wanted)
        return
    plan, seen = planned(sources(len(files)), found, wanted)
    told = [
        (i, at * 512, copy) for i, file in enumerate(files) for at, key in enumerate(file) for copy in range(times[key])
    ]
    assert list(zip(plan.source_M, plan.start_M, plan.copy_M, strict=True)) == told
    assert seen.all()
    mixed = plan.shuffled(1)
    assert sorted(zip(mixed.source_M, mixed.start_M, mixed.copy_M, strict=True)) == told
    again = [position for _, positions in mixed.by_source() for position in positions]
    assert sorted(again) == list(range(len(told)))


@given(st.sets(st.sampled_from(["a", "a-1", "a-2", "a-1-1", "b"])), st.integers(1, 5))
def test_names_of_copies_are_nobodys(keys: set[str], copies: int) -> None:
    plan = ReshardPlan(*(np.empty(0, kind) for kind in ("u4", "i8", "i8", "i4")), KeySet.from_keys(keys))  # type: ignore[arg-type]
    made = [plan.renamed(key, copy) for key in sorted(keys) for copy in range(copies)]
    assert len(set(made)) == len(made)
    assert all(plan.renamed(key, 0) == key for key in keys)


def test_a_plan_takes_some_sixty_bytes_a_sample() -> None:
    rng, count, files = np.random.default_rng(0), 400_000, 40
    step = count // files

    def found() -> Iterator[Matched]:
        for i in range(files):
            numbers = np.arange(i * step, (i + 1) * step)
            names = rng.integers(0, 2**63, step).astype(np.uint64)
            yield Matched(numbers, numbers, np.ones(step, np.int32), names, numbers)

    wanted = KeySet(np.arange(count, dtype=np.uint64))
    tracemalloc.start()
    plan, _ = planned(sources(files), found(), wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(plan) == count
    assert peak < 64 * count
