"""CABS against the greedy choice written as a loop; in the sampler; as a stage of a stream."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.dynamic.cabs import Cabs, Concepts, cabs_stream, choose
from thresher.dynamic.policies.d_pruning import DPruning
from thresher.dynamic.policies.dissect import Dissect
from thresher.dynamic.policies.dynamic_random import DynamicRandom
from thresher.dynamic.policies.full import Full
from thresher.dynamic.policies.sift import Sift
from thresher.dynamic.sampler import PruningSampler
from thresher.errors import UsageError


def naive(rows: list[set[int]], count: int, cap: int = 10) -> list[int]:
    """Compute every gain again before each choice, by the formula of the paper; rounded as ours are."""
    present, count = set().union(*rows), min(count, len(rows))
    target = float(np.clip(count / max(1, len(present)), 1, cap))
    holders = {c: sum(c in row for row in rows) for c in present}
    taken, chosen = dict.fromkeys(present, 0), []
    while len(chosen) < count:
        best, best_gain = -1, None
        for i, row in enumerate(rows):
            if i in chosen:
                continue
            gain = -np.inf
            if row:
                parts = [
                    (target - taken[c]) / max(1, target) + 1 / holders[c] if taken[c] < target else -0.5 for c in row
                ]
                gain = sum(Fraction(round(part * 2**32)) for part in parts) / len(row)
            if best_gain is None or gain > best_gain:
                best, best_gain = i, gain
        chosen.append(best)
        for c in rows[best]:
            taken[c] += 1
    return chosen


@given(
    st.lists(st.sets(st.integers(0, 8), max_size=4), min_size=1, max_size=40).filter(any),
    st.integers(1, 40),
    st.integers(1, 12),
)
def test_rows_are_those_of_the_greedy_choice(rows: list[set[int]], count: int, cap: int) -> None:
    assert choose(Concepts.of_lists(rows), count, cap=cap).tolist() == naive(rows, count, cap)


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=60).filter(lambda x: max(x) >= 0), st.integers(1, 60))
def test_labels_are_sorted_with_the_same_result(labels: list[int], count: int) -> None:
    rows = [{label} if label >= 0 else set() for label in labels]
    assert choose(Concepts.of_labels(labels), count).tolist() == naive(rows, count)


def test_the_rows_with_the_most_concepts_come_first() -> None:
    concepts = Concepts.of_lists([["a"], ["a", "b"], None, ["b", "c", "a"], ["c", "c"], ["a", "c"]])
    assert choose(concepts, 3, "frequency").tolist() == [3, 1, 5]
    assert concepts.counts().tolist() == [1, 2, 0, 3, 1, 2]
    assert concepts.of(np.array([5, 2, 3])).counts().tolist() == [2, 0, 3]


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan")])
def test_what_is_missing_in_a_list_is_no_concept(missing: object) -> None:
    """Else rows without tags would be balanced as if they had one in common, or each one of its own."""
    rows = [["a", missing], [missing, missing], [], None, [missing, "b", "a"], ["b"]]
    concepts, plain = Concepts.of_lists(rows), Concepts.of_lists([["a"], [], [], None, ["b", "a"], ["b"]])
    np.testing.assert_array_equal(concepts.ends_N, plain.ends_N)
    np.testing.assert_array_equal(concepts.ids_M, plain.ids_M)
    assert choose(concepts, 3, "frequency").tolist() == [4, 0, 5]
    assert set(choose(concepts, 3).tolist()) == {0, 4, 5}
    with pytest.raises(UsageError, match="none of 2 rows has a concept"):
        Cabs(concepts=Concepts.of_lists([[missing], None]))


def test_rare_concepts_get_their_share() -> None:
    labels = np.repeat(np.arange(10), [910, *[10] * 9])
    order = np.random.default_rng(0).permutation(1000)
    chosen = choose(Concepts.of_labels(labels[order]), 100)
    assert np.bincount(labels[order][chosen]).tolist() == [10] * 10


# The sampler

N, B = 330, 8
LABELS = np.minimum(np.random.default_rng(0).geometric(0.3, N), 9)


def make(kind: str = "diversity", policy=None, **how) -> PruningSampler:
    composition = Cabs(concepts=Concepts.of_labels(LABELS), kind=kind, super_batch=4)
    given = {"policy": policy or Full(), "batch_size": B, "seed": 3, "composition": composition}
    return PruningSampler(N, **{**given, **({} if "samples" in how else {"epochs": 3}), **how})


def run(sampler: PruningSampler, steps: int | None = None) -> list[list[int]]:
    done: list[list[int]] = []
    while sampler.plan is not None:
        for rows in sampler:
            sampler.reduce(rows, torch.from_numpy(LABELS[rows].astype(np.float32))[:, None])
            done.append(rows)
            if len(done) == steps:
                return done
    return done


@pytest.mark.parametrize("policy", [None, DynamicRandom(keep=0.5)])
def test_every_batch_is_chosen_from_a_super_batch(policy) -> None:
    sampler = make(policy=policy)
    plain = PruningSampler(N, policy=policy or Full(), batch_size=4 * B, epochs=3, seed=3)
    supers, done = list(plain), list(sampler)
    assert len(done) == len(supers)
    for batch, wide in zip(done, supers, strict=True):
        picked = choose(Concepts.of_labels(LABELS).of(np.array(wide)), B)
        assert batch == [wide[at] for at in sorted(picked)]
    batches = run(sampler)
    assert {len(batch) for batch in batches} == {B}
    assert [entry["rows"] for entry in sampler.log()] == [len(supers) * B] * 3
    assert sampler.log()[-1]["pruned_so_far"] == pytest.approx(1 - len(supers) * B / N)


def test_a_composed_run_resumes_and_knows_its_length() -> None:
    whole, cut, again = make(samples=500), make(samples=500), make(samples=500)
    assert whole.total_steps() == 500 // B
    done = run(whole)
    assert sum(map(len, done)) == 500 // B * B
    assert whole.progress == 1
    first = run(cut, steps=13)
    again.load_state_dict(cut.state_dict())
    assert first + run(again) == done
    for other in (make("frequency", samples=500), PruningSampler(N, policy=Full(), batch_size=B, samples=500, seed=3)):
        with pytest.raises(UsageError, match="policy = "):
            other.load_state_dict(cut.state_dict())


@pytest.mark.parametrize(
    ("policy", "candidates"),
    [
        (DPruning(keep=0.7, period=2), [0, 0.3, 0, 0.3, 0]),
        (Dissect(keep=0.7, warmup=1, cycle=1), [0, 0.3, 0, 0.3, 0]),
        (Sift(mismatched=0.2, warmup=2, cycle=1), [0, 0.2, 0, 0.2, 0]),
    ],
)
def test_rows_that_a_composition_leaves_out_are_not_the_choice_of_the_policy(policy, candidates) -> None:
    whole, cut, again = (make(policy=policy, epochs=5) for _ in range(3))
    done = run(whole)
    assert [entry["candidates"] for entry in whole.log()] == [round(share * N) for share in candidates]
    assert whole.log()[-1]["rows"] < whole.log()[0]["rows"]  # composed of the rows that the policy keeps
    if isinstance(policy, Dissect):
        assert np.flatnonzero(whole.ledger.marks_N).min() < 0.5 * N  # by their losses, not the last rows
    first = run(cut, steps=len(done) // 2)
    assert cut.step
    again.load_state_dict(cut.state_dict())
    assert first + run(again) == done
    assert again.log() == whole.log()
    states = again.ledger.state(), whole.ledger.state()
    assert all(np.array_equal(states[0][name], states[1][name], equal_nan=True) for name in states[1])


def test_misuse_is_refused() -> None:
    some = Concepts.of_labels(LABELS[:5])
    with pytest.raises(UsageError, match="concepts of 5 rows for 330 rows"):
        make(composition=Cabs(concepts=some))
    for how, message in (
        ({"super_batch": 1}, "super_batch = 1"),
        ({"cap": 0}, "cap = 0"),
        ({"kind": "other"}, "give diversity or frequency"),
    ):
        with pytest.raises(UsageError, match=message):
            Cabs(concepts=some, **how)
    with pytest.raises(UsageError, match="none of 3 rows has a concept"):
        Cabs(concepts=Concepts.of_labels([-1, -1, -1]))
    with pytest.raises(UsageError, match="give integers"):
        Concepts.of_labels([0.5])
    with pytest.raises(UsageError, match="type float64; give integers, .* negative for none"):
        Concepts.of_labels([1, np.nan])


# Streams


def test_a_stream_is_composed_before_it_is_decoded() -> None:
    keys = [f"k{i}" for i in range(N)]
    stage = cabs_stream(keys, Concepts.of_labels(LABELS), B, super_batch=4)
    order = np.random.default_rng(5).permutation(N)
    samples = [{"__key__": keys[row], "jpg": object()} for row in order] + [{"__key__": "other"}]
    passed = list(stage(samples))
    expected: list[int] = []
    for lo in range(0, N + 1, 4 * B):
        wide = order[lo : lo + 4 * B]
        rows = [{int(LABELS[row])} for row in wide] + [set()] * (lo + 4 * B > N)
        expected += [lo + at for at in sorted(naive(rows, min(B, max(1, len(rows) // 4))))]
    assert all(one is samples[at] for one, at in zip(passed, expected, strict=True))
    assert (stage.seen, stage.passed, stage.unknown) == (N + 1, len(passed), 1)
    with pytest.raises(UsageError, match="a sample has no '__key__'"):
        next(stage([{"key": 1}]))
    with pytest.raises(UsageError, match="2 keys for concepts of 330 rows"):
        cabs_stream(["a", "b"], Concepts.of_labels(LABELS), B)
