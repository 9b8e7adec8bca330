"""Streams in toy loops whose losses are a table: no row numbers, any order, any number of readers and of ranks."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import tarfile
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tests.ranks import on_ranks
from tests.runtime.common import begin, end_of
from thresher.dynamic import stream
from thresher.dynamic.loop import describe
from thresher.dynamic.policies.d_pruning import DPruning
from thresher.dynamic.policies.dissect import Dissect
from thresher.dynamic.policies.dynamic_random import DynamicRandom
from thresher.dynamic.policies.full import Full
from thresher.dynamic.policies.infobatch import InfoBatch
from thresher.dynamic.policies.scan import Scan
from thresher.dynamic.policies.seta import Seta
from thresher.dynamic.policies.sift import Sift
from thresher.dynamic.policies.static import Static
from thresher.dynamic.policy import Policy, end_epoch
from thresher.dynamic.schedule import cosine_by_progress
from thresher.dynamic.stream import ID, StaticKeys, StreamPruner, id_of, ids_of, prune_stream
from thresher.errors import UsageError
from thresher.ops import key_hash
from thresher.runtime.locks import Scratch
from thresher.runtime.process import end_with_parent

N, B, EPOCHS = 200, 20, 8
KEYS = [f"shard/{i:06d}" for i in range(N)]

POLICIES: dict[str, Policy] = {
    "full": Full(),
    "scan": Scan(rho=0.3, cycle=3, warmup=1),
    "scan-at-once": Scan(rho=0.3, cycle=3, warmup=0),
    "scan-epoch": Scan(rho=0.3, cycle=3, warmup=1, scope="epoch"),
    "infobatch": InfoBatch(epochs=EPOCHS),
    "d-pruning": DPruning(keep=0.7, rule="epsilon-greedy", epsilon=0.3, period=2),
    "dynamic-random": DynamicRandom(keep=0.6),
    "dissect": Dissect(keep=0.7, cycle=2, warmup=1),
    "seta": Seta(epochs=EPOCHS, r=0.1),
    "sift": Sift(mismatched=0.2, redundant=0.2, cycle=2),
}
each = pytest.mark.parametrize("name", POLICIES)


def make(name: str, seed: int = 0, **options: Any) -> StreamPruner:
    given = {"policy": POLICIES.get(name), "batch_size": B, "epochs": EPOCHS, "samples": N, "seed": seed, **options}
    return StreamPruner(**given)


def table(rows: int = N) -> torch.Tensor:
    """(EPOCHS, rows, 2) losses, falling, skewed, in two directions that mostly agree."""
    rng = np.random.Generator(np.random.Philox(7))
    own, noise = rng.gamma(2.0, 1.0, (rows, 1)), rng.gamma(2.0, 1.0, (EPOCHS, rows, 2))
    falling = 2.0 ** -np.arange(EPOCHS)[:, None, None] + 0.5
    return torch.from_numpy(falling * (0.9 * own + 0.1 * noise)).float()


def samples(rows: Iterable[int]) -> Iterator[dict[str, Any]]:
    return ({"__key__": KEYS[row], "row": row} for row in rows)


def shuffled(epoch: int, rows: int = N) -> list[int]:
    return np.random.Generator(np.random.Philox([3, epoch])).permutation(rows).tolist()


def batched(stage: prune_stream, rows: Iterable[int]) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Batches of B of what the stage lets through; what fills none is left."""
    passed = stage(samples(rows))
    while len(batch := list(itertools.islice(passed, B))) == B:
        yield np.stack([sample[ID] for sample in batch]), [sample["row"] for sample in batch]


def train(pruner: StreamPruner, until: int = EPOCHS) -> list[list[list[int]]]:
    """Go on to the end of an epoch; the rows of every batch of every epoch."""
    losses, stage, done = table(), prune_stream(pruner), []
    for epoch in range(pruner.epoch, until):
        done.append([])
        for ids, rows in pruner.batches(batched(stage, shuffled(epoch))):
            pruner.reduce(torch.from_numpy(ids), losses[epoch, rows])
            done[-1].append(rows)
    return done


def data(state: dict[str, object]) -> dict[str, object]:
    """Bits that can be compared."""
    return {k: (v.dtype, v.shape, v.numpy().tobytes()) if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def kept(pruner: StreamPruner) -> list[int]:
    """The numbers of the samples that the plan in force keeps."""
    plan, rows = pruner.plan, pruner.rows_of(KEYS)
    assert plan is not None
    return [i for i, row in enumerate(rows) if row < 0 or plan.kept_N is None or plan.kept_N[row]]


# One process


@each
def test_ledgers_are_those_of_the_loop_written_out(name: str) -> None:
    """Rows by hash; plan, record batch by batch, finish."""
    pruner, losses, policy = make(name), table(), POLICIES[name]
    done = train(pruner)
    order = np.argsort(ids_of(KEYS)[:, 0])
    row_of = np.argsort(order)
    ledger = policy.ledger(N)
    for epoch in range(EPOCHS):
        plan = policy.plan(ledger, epoch, pruner._rng("plan", epoch))
        everything = epoch == 0 or plan.kept_N is None  # what was never seen is kept
        expected = [i for i in shuffled(epoch) if everything or plan.kept_N[row_of[i]]]
        steps = len(expected) // B
        assert [i for rows in done[epoch] for i in rows] == expected[: steps * B]
        for step, rows in enumerate(done[epoch]):
            loss = losses[epoch, rows].numpy()
            marks = policy.marks(loss, pruner._rng("marks", epoch, step)) if plan.collects else None
            ledger.record(row_of[rows], loss, epoch, marks)
        if epoch == 0:
            plan = Full().plan(ledger, 0, pruner._rng())
        end_epoch(policy, ledger, plan, pruner._rng("finish", epoch))
    assert pruner.ledger is not None
    found = pruner.ledger.state()
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in ledger.state().items()}
    assert pruner.hashes_N.tolist() == sorted(ids_of(KEYS)[:, 0].tolist())


@pytest.mark.parametrize(("name", "promised"), [("full", 0), ("scan", 0.22), ("d-pruning", 0.2625)])
def test_the_log_says_what_the_sampler_says(name: str, promised: float) -> None:
    pruner = make(name)
    expected = pruner.total_steps()
    done = train(pruner)
    log = pruner.log()
    assert json.loads(json.dumps(log)) == log
    assert [entry["epoch"] for entry in log] == list(range(EPOCHS))
    assert [entry["steps"] for entry in log] == [len(batches) for batches in done]
    assert log[-1]["pruned_so_far"] == pytest.approx(promised, abs=0.04)
    assert sum(entry["steps"] for entry in log) == pytest.approx(expected, rel=0.1)
    assert [entry["new"] for entry in log] == [N] + [0] * (EPOCHS - 1)
    assert {entry["again"] for entry in log} == {entry["collisions"] for entry in log} == {0}
    assert log[0]["loss"] == pytest.approx(table()[0].mean().item(), rel=1e-5)
    assert all(entry["rows"] <= entry["total"] == N for entry in log)
    if name == "scan":
        assert log[1]["redundant"] == pytest.approx(60, abs=3)
        assert log[5]["overlap"] > 0.6


class Samples(IterableDataset):
    def __init__(self, pruner: StreamPruner) -> None:
        self.stage = prune_stream(pruner)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return self.stage(samples(range(worker, N, workers)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_plan_reaches_readers_in_other_processes(workers: int) -> None:
    pruner, losses = make("scan", samples=2 * N), table()  # twice too long: the loader ends epochs
    loader = DataLoader(Samples(pruner), batch_size=B, num_workers=workers, persistent_workers=workers > 0)
    for epoch in range(5):
        expected, rows = kept(pruner), []
        for batch in pruner.batches(loader):
            rows += batch["row"].tolist()
            pruner.reduce(batch[ID], losses[epoch, batch["row"]])
        assert sorted(rows) == expected
        assert pruner.epoch == epoch + 1
    assert [entry["rows"] for entry in pruner.log()[:2]] == [400, 200]  # what was said, then what is known
    assert pruner.log()[4]["rows"] < 120


def test_a_stream_that_never_ends_takes_on_the_new_plan_as_it_goes() -> None:
    pruner, losses, stage = make("scan"), table(), None
    stage = prune_stream(pruner)
    endless = batched(stage, itertools.cycle(range(N)))
    seen: list[list[int]] = [[] for _ in range(EPOCHS)]
    plans: list[list[int]] = []
    while pruner.plan is not None:
        if not pruner.step:
            plans.append(kept(pruner))
        ids, rows = next(endless)
        seen[pruner.epoch] += rows
        pruner.reduce(ids, losses[pruner.epoch, rows])
    for epoch, rows in enumerate(seen):
        assert set(rows) <= set(plans[epoch])
        assert len(rows) == len(plans[epoch]) // B * B


def test_a_stage_behind_a_pickle_reads_the_same_plan() -> None:
    pruner = make("scan")
    train(pruner, until=4)
    stage = pickle.loads(pickle.dumps(prune_stream(pruner)))
    assert [sample["row"] for sample in stage(samples(range(N)))] == kept(pruner) != list(range(N))


def test_unknown_samples_are_kept_and_get_rows() -> None:
    pruner, losses = make("scan", samples=100), table()
    stage = prune_stream(pruner)
    for epoch in range(4):
        some = range(100) if epoch < 3 else range(N)
        before = (
            None if epoch < 3 else dict(zip(KEYS[:100], pruner.ledger.loss_N[pruner.rows_of(KEYS[:100])], strict=True))
        )
        left = set(range(100)) - set(kept(pruner))
        rows = []
        for sample in stage(samples(some)):
            rows.append(sample["row"])
            if pruner.epoch == epoch and len(rows) == B:
                ids = ids_of(KEYS[row] for row in rows)
                if epoch == 3:
                    pruner._own.append((ids, losses[epoch, rows]))  # beyond the steps of the epoch, too
                    pruner.step += 1
                else:
                    pruner.reduce(ids, losses[epoch, rows])
                rows = []
        if pruner.epoch == epoch:
            pruner.end_epoch()
    entry = pruner.log()[3]
    assert entry["new"] == 100 - (100 + 100 - len(left)) % B
    assert len(pruner.ledger) == len(pruner.hashes_N) == 100 + entry["new"]
    after = pruner.ledger.loss_N[pruner.rows_of(KEYS[:100])]
    for i, key in enumerate(KEYS[:100]):
        assert after[i] == (before[key] if i in left else losses[3, i].mean())
    assert (np.diff(pruner.hashes_N) > 0).all()
    assert (pruner.rows_of(["never", *KEYS[195:]]) == -1).any()


def test_samples_that_come_again_count_once_and_the_last_loss_stands() -> None:
    pruner = make("full", samples=2 * B, epochs=2)
    rows = [*range(15), *range(5)]
    ids = ids_of(KEYS[row] for row in rows)
    pruner.reduce(ids, torch.arange(20.0)[:, None])
    pruner.reduce(ids, torch.arange(20.0)[:, None] + 100)
    entry = pruner.log()[0]
    assert (entry["samples"], entry["new"], entry["again"]) == (40, 15, 25)
    at = pruner.rows_of(KEYS[:15])
    assert pruner.ledger.loss_N[at].tolist() == [115, 116, 117, 118, 119, *range(105, 115)]


def test_two_keys_with_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is trained on, never recorded, and kept when the first is pruned."""

    def alike(key: str) -> np.ndarray:
        found = id_of(key)
        return np.array([id_of(KEYS[7])[0], found[1]]) if key == KEYS[8] else found

    monkeypatch.setattr(stream, "id_of", alike)
    pruner, losses = make("scan"), table().clone()
    losses[:, 7], losses[:, 8] = 1e3, 2e3  # the highest: candidates
    stage = prune_stream(pruner)
    for epoch in range(4):
        for ids, rows in pruner.batches(batched(stage, range(N))):
            pruner.reduce(ids, losses[epoch, rows])
    assert len(pruner.hashes_N) == N - 1
    assert [entry["collisions"] for entry in pruner.log()] == [1] * 4
    assert pruner.rows_of(KEYS[7:9])[1] == -1
    assert pruner.ledger.loss_N[pruner.rows_of(KEYS[7:8])] == 1e3
    while pruner.plan.kept_N is None or pruner.plan.kept_N[pruner.rows_of(KEYS[7:8])[0]]:
        pruner.end_epoch()
    passed = [sample["row"] for sample in stage(samples(range(N)))]
    assert 8 in passed
    assert 7 not in passed


def test_weights_reach_the_loss() -> None:
    pruner, losses, policy = make("infobatch"), table(), POLICIES["infobatch"]
    stage = prune_stream(pruner)
    for epoch in range(2):
        for ids, rows in pruner.batches(batched(stage, range(N))):
            mean, below = losses[0].mean(1).mean(), losses[0, rows].mean(1)
            weights = torch.where(below < mean, 1 / (1 - policy.r), 1.0) if epoch else torch.ones(B)
            expected = (losses[epoch, rows].mean(1) * weights).mean()
            torch.testing.assert_close(pruner.reduce(ids, losses[epoch, rows]), expected, rtol=0.01, atol=0)
    unknown = ids_of(["never seen"])
    assert pruner.weights(np.concatenate([unknown, ids_of(KEYS)])).tolist()[0] == 1


# Selections by key


def test_a_selection_by_key_lets_only_its_keys_through_as_often_as_chosen() -> None:
    chosen = [KEYS[i] for i in (3, 5, 5, 5, 9)] + KEYS[40:75]
    policy = StaticKeys.of_keys(chosen, N)
    pruner = make("", policy=policy)
    assert (len(pruner), pruner.total_steps()) == (2, 2 * EPOCHS)
    passed = sorted(sample["row"] for sample in prune_stream(pruner)(samples(range(N))))
    assert passed == [3, 5, 5, 5, 9, *range(40, 75)]
    train(pruner)
    assert pruner.log()[-1]["pruned_so_far"] == pytest.approx(1 - 40 / N) == policy.expected_pruned(EPOCHS)
    assert pruner.progress == 1


def test_a_selection_by_key_can_weigh() -> None:
    pruner = make("", policy=StaticKeys.of_keys([KEYS[3], KEYS[5], KEYS[5]], N, weigh=True), batch_size=2)
    passed = list(prune_stream(pruner)(samples(range(N))))
    assert [sample["row"] for sample in passed] == [3, 5]
    loss = pruner.reduce(np.stack([sample[ID] for sample in passed]), torch.tensor([[1.0], [10.0]]))
    assert loss == pytest.approx((1 + 2 * 10) / 2)


def uid(i: int) -> str:
    return f"{i:05d}" + "ab" * 13 + "c"


def with_uids(rows: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Samples as those of DataComp shards: numbers as keys, uids in the json, some in upper case."""
    for i in rows:
        about = json.dumps({"uid": uid(i).upper() if i % 2 else uid(i)}).encode()
        yield {"__key__": f"{i:09d}", "__url__": "0.tar", "jpg": b"no image", "json": about, "row": i}


@pytest.mark.parametrize("key", ["auto", "uid"])
def test_a_selection_of_uids_is_looked_up_in_the_json(key: str) -> None:
    pruner = make("", policy=StaticKeys.of_keys([uid(i) for i in (3, 5, 5, 8)] + [uid(9).upper()], N))
    stage = prune_stream(pruner, key)
    passed = list(stage(with_uids(range(12))))
    assert [sample["row"] for sample in passed] == [3, 5, 5, 8, 9]
    assert [tuple(sample[ID]) for sample in passed] == [
        tuple(id_of(name)) for name in (uid(3), uid(5), uid(5), uid(8), uid(9).upper())
    ]
    assert (stage.seen, stage.passed, stage.without_uid) == (12, 5, 0)


def test_a_selection_of_uids_may_name_samples_without_one_by_key() -> None:
    """As that of a pool of tars in which a json is damaged; the sample is counted, and others are not lost."""
    given = list(with_uids(range(4)))
    given[1]["json"], given[2]["json"] = b"{", b"[]"
    pruner = make("", policy=StaticKeys.of_keys([uid(0), "000000002"], N))
    stage = prune_stream(pruner)
    with pytest.warns(UserWarning, match="2 of 4 samples had no uid in their json; they are left out unless"):
        assert [sample["row"] for sample in stage(given)] == [0, 2]
    assert stage.without_uid == 2
    with pytest.warns(UserWarning, match="2 of 3 samples had no uid"):  # not read to its end
        assert [sample["row"] for sample in itertools.islice(stage(given), 2)] == [0, 2]


def test_a_ledger_may_go_by_uid() -> None:
    pruner = make("full", samples=20, epochs=1)
    stage = prune_stream(pruner, "uid")
    given = list(with_uids(range(20)))
    given[7]["json"] = b"\xff"
    with pytest.warns(UserWarning, match="1 of 20 samples had no uid in their json; their __key__ is used"):
        ids = np.stack([sample[ID] for sample in stage(given)])
    pruner.reduce(ids, torch.ones(20, 1))
    assert (pruner.rows_of([uid(0), uid(1).upper(), "000000007"]) >= 0).all()
    with pytest.raises(
        UsageError, match=r"no uid in the json of 30 samples \(members: txt; the first has the key '0'\)"
    ):
        list(
            prune_stream(pruner, "uid", patience=30)({"__key__": str(i), "__url__": "", "txt": b""} for i in range(99))
        )


def endless(rows: int = 50, shards: int = 1) -> Iterator[dict[str, Any]]:
    """Samples of shards that are drawn for ever."""
    for i in itertools.count():
        shard, row = i // rows % shards, i % rows
        yield {"__key__": f"{shard}/{row:04d}", "__url__": f"{shard}.tar", "jpg": b"", "txt": b""}


def test_an_endless_stream_of_other_data_is_refused() -> None:
    """It was read for ever, without a word."""
    pruner = make("", policy=StaticKeys.of_keys(["a/x", "a/y"], 4))
    stage = prune_stream(pruner)
    with pytest.raises(UsageError) as caught:
        next(stage(endless()))
    assert str(caught.value) == (
        "the selection has none of 10,000 samples (members: jpg, txt; the first has the key '0/0000'), looked up by "
        "__key__; it has 2 keys, such as 'a/x'. Give a selection of these data. If its samples come later, raise "
        "--prune-patience (in Python: patience=)"
    )
    pruner = make("", policy=StaticKeys.of_keys([uid(1)], 4))
    stage = prune_stream(pruner, "__key__", patience=5)
    with pytest.raises(UsageError, match=r"none of 5 samples .* type --prune-key uid \(in Python: key="):
        next(stage(endless()))
    assert stage.seen == 5
    stage = prune_stream(pruner, ("__url__", "__key__"), patience=1)
    with pytest.raises(UsageError, match="the key '0.tar/0/0000'.*looked up by __url__/__key__"):
        next(stage(endless()))
    with pytest.raises(UsageError, match="patience=0; give 1 or more samples"):
        prune_stream(pruner, patience=0)


def test_the_samples_of_all_passes_count() -> None:
    """webdataset's ``with_epoch`` reads a finite stream again and again."""
    pruner = make("", policy=StaticKeys.of_keys(["x"], 4))
    stage = prune_stream(pruner, patience=10)
    given = [{"__key__": str(i)} for i in range(4)]
    assert [list(stage(given)) for _ in range(2)] == [[], []]
    with pytest.raises(UsageError, match="none of 10 samples"):
        list(stage(given))


@pytest.mark.parametrize(
    ("rows", "shards", "chosen"), [(25_000, 1, ["0/24999"]), (1000, 30, [f"29/{i:04d}" for i in range(1000)])]
)
def test_a_selection_that_matches_rarely_is_not_refused(rows: int, shards: int, chosen: list[str]) -> None:
    """One sample of 25,000, or one shard of 30: not even if it comes last."""
    pruner = make("", policy=StaticKeys.of_keys(chosen, rows * shards))
    stage = prune_stream(pruner)
    assert next(stage(endless(rows, shards)))["__key__"] == chosen[0]
    pruner = make("", policy=StaticKeys.of_keys(["0/0001"], 25_000))
    one = prune_stream(pruner, patience=30)
    assert len(list(one(itertools.islice(endless(5_000), 15_000)))) == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "0 keys to keep of 200"),
        (map(str, range(201)), "201 keys to keep of 200"),
        (["a"] * 70000, "repeated 70,000"),
    ],
)
def test_selections_that_cannot_be(keys: Iterable[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StaticKeys.of_keys(keys, N)


WORDS = st.text(max_size=6) | st.sampled_from(["00000/000000001", "f" * 32, "F" * 32, "", "ü", "\ud800"])


@given(st.lists(WORDS, max_size=40))
def test_ids_are_those_of_single_keys(keys: list[str]) -> None:
    """Saved in ledgers and checkpoints, so they must never change."""
    found = ids_of(iter(keys))
    assert (found.dtype, found.shape) == (np.int64, (len(keys), 2))
    assert found.tolist() == [id_of(key).tolist() for key in keys]


@given(st.lists(st.lists(st.tuples(WORDS, st.integers(0, 300)), max_size=9), max_size=5), st.booleans())
def test_a_selection_by_key_in_batches_is_a_count_of_ids(batches: list[list[tuple[str, int]]], counted: bool) -> None:
    counts: Counter[tuple[int, int]] = Counter()
    parts = []
    for batch in batches:
        counts.update({tuple(id_of(key).tolist()): 0 for key, _ in batch})
        for key, times in batch:
            counts[tuple(id_of(key).tolist())] += times if counted else 1
        times_M = np.array([times for _, times in batch], np.int64) if counted else None
        parts.append(([key for key, _ in batch], times_M))
    expected = sorted((key, times) for key, times in counts.items() if times)
    if not expected:
        with pytest.raises(UsageError, match="0 keys to keep"):
            StaticKeys.of_batches(parts, 100)
        return
    made = StaticKeys.of_batches(parts, 100)
    assert (made.ids_M.dtype, made.times_M.dtype) == (np.int64, np.uint16)
    assert list(zip(map(tuple, made.ids_M.tolist()), made.times_M.tolist(), strict=True)) == expected
    flat = [key for batch in batches for key, times in batch for _ in range(times if counted else 1)]
    again = StaticKeys.of_keys(iter(flat), 100)
    assert (again.ids_M.tobytes(), again.times_M.tobytes()) == (made.ids_M.tobytes(), made.times_M.tobytes())


def test_the_table_of_a_selection_by_key_is_that_of_earlier_versions() -> None:
    made = StaticKeys.of_keys([f"{i // 100:05d}/{i:09d}" for i in range(1000)] + ["f" * 32], 2000)
    digest = hashlib.sha256(made.ids_M.tobytes() + made.times_M.tobytes()).hexdigest()
    assert digest == "fae8a9f95b37a0d631bd48780b19f85956e1a8173182367126a7c71c3547d647"
    assert (
        describe(made)
        == "StaticKeys(ids_M=int64(1001, 2):8c2a5a7e20bc0677, times_M=uint16(1001,):4b170658adcda1cc, total=2000)"
    )


def test_two_keys_of_a_selection_with_one_hash_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order their ids come, and however often."""

    def alike(keys: list[str]) -> np.ndarray:
        records = key_hash.records_of(keys).copy()
        records["hash"][[key[0] == "a" for key in keys]] = 7
        return records

    monkeypatch.setattr(stream, "records_of", alike)
    with pytest.raises(UsageError, match="2 pairs of keys have the same 64-bit hash"):
        StaticKeys.of_keys(["a1", "b", "a2", "a1", "a3", "a2", "c"], N)


def test_a_selection_by_key_takes_few_bytes_per_key() -> None:
    count = 50_000
    tracemalloc.start()
    made = StaticKeys.of_batches(((list(map(str, range(lo, lo + 5000))), None) for lo in range(0, count, 5000)), count)
    stays, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(made) == count
    assert stays / count < 20
    assert most / count < 75


# Schedules


@each
def test_progress_is_steady_and_ends_at_one(name: str) -> None:
    pruner, losses, stage = make(name), table(), None
    stage = prune_stream(pruner)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LambdaLR(optimizer, cosine_by_progress(pruner, warmup=0.1))
    seen, steps = [pruner.progress], 0
    for epoch in range(EPOCHS):
        for ids, rows in pruner.batches(batched(stage, shuffled(epoch))):
            pruner.reduce(ids, losses[epoch, rows])
            optimizer.step()
            schedule.step()
            seen.append(pruner.progress)
            steps += 1
            assert pruner.total_steps() == steps + pruner.steps_left()
    assert (seen[0], seen[-1], pruner.steps_left()) == (0, 1, 0)
    assert (np.diff(seen) > 0).all()
    assert np.diff(seen).max() < 3 / steps
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_a_stream_shorter_than_said_leaves_its_share_to_later_epochs() -> None:
    pruner, stage = make("full", samples=2 * N), None
    stage = prune_stream(pruner)
    seen = []
    for epoch in range(EPOCHS):
        for ids, _ in pruner.batches(batched(stage, shuffled(epoch))):
            seen.append(pruner.progress)
            pruner.reduce(ids, torch.ones(B, 1))
    assert (np.diff(seen) > 0).all()
    assert np.diff(seen).max() < 0.06
    assert pruner.progress == 1


# Checkpoints


def by_torch(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def by_numpy(state: dict[str, Any], folder: Path) -> Any:
    np.savez(folder / "state.npz", **state)
    return np.load(folder / "state.npz", allow_pickle=False)


@each
@pytest.mark.parametrize("carry", [pytest.param(by_torch, marks=pytest.mark.slow), by_numpy])
@pytest.mark.parametrize("cut", [0, 3, EPOCHS])
def test_resumed_between_epochs_it_goes_on_as_if_nothing_was(
    name: str, cut: int, carry: Callable[..., Any], tmp_path: Path
) -> None:
    whole = make(name)
    expected = train(whole)
    first = make(name)
    done = train(first, until=cut)
    second = make(name)
    second.load_state_dict(carry(first.state_dict(), tmp_path))
    assert (second.epoch, second.step, second.progress) == (cut, 0, first.progress)
    assert data(second.state_dict()) == data(first.state_dict())
    assert done + train(second) == expected
    assert data(second.state_dict()) == data(whole.state_dict())


@pytest.mark.parametrize("name", ["scan", "infobatch", "full"])
def test_resumed_in_mid_epoch_it_passes_over_what_was_trained_on(name: str, tmp_path: Path) -> None:
    first, losses = make(name, samples=2 * N), table()
    train(first, until=3)
    expected, seen = kept(first), []
    for ids, rows in itertools.islice(batched(prune_stream(first), shuffled(3)), 2):
        first.reduce(ids, losses[3, rows])
        seen += rows
    second = make(name, samples=2 * N)
    second.load_state_dict(by_torch(first.state_dict(), tmp_path))
    assert (second.epoch, second.step) == (3, 2)
    assert kept(second) == expected
    rest = [sample["row"] for sample in prune_stream(second)(samples(range(N)))]
    assert sorted(seen + rest) == expected
    for ids, rows in second.batches(batched(prune_stream(second), shuffled(3))):
        second.reduce(ids, losses[3, rows])
        seen += rows
    assert second.log()[3]["samples"] == len(seen) == len(set(seen))
    at = second.rows_of(KEYS[row] for row in seen)
    np.testing.assert_array_equal(second.ledger.loss_N[at], losses[3, seen].mean(1))
    nothing_left_out = [sample["row"] for sample in prune_stream(second)(samples(range(N)))]
    assert nothing_left_out == kept(second)  # in the next epoch all come again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed = 0; this one has 1"),
        ({"batch_size": 21}, "batch_size = 20; this one has 21"),
        ({"samples": 300}, "samples = 200; this one has 300"),
        ({"policy": Full()}, r"policy = Scan\(warmup=1\); this one has Full\(\)"),
    ],
)
def test_the_state_of_another_run_is_refused(options: dict[str, Any], message: str) -> None:
    other = make("scan", **options)
    with pytest.raises(UsageError, match="the state of a pruner with " + message):
        other.load_state_dict(make("scan").state_dict())
    with pytest.raises(UsageError, match="not the state of a StreamPruner"):
        other.load_state_dict({"model": torch.ones(1)})


def test_the_length_may_differ_but_not_end_before_the_epoch_in_progress() -> None:
    first, losses = make("scan"), table()
    train(first, until=1)
    for ids, rows in itertools.islice(batched(prune_stream(first), shuffled(1)), 2):
        first.reduce(ids, losses[1, rows])
    assert (first.epoch, first.step) == (1, 2)
    state = first.state_dict()
    short = make("scan", epochs=1)
    before = data(short.state_dict())
    with pytest.raises(
        UsageError, match="of a run of 2 epochs, including its current epoch, but this run ends after 1; give"
    ):
        short.load_state_dict(state)
    assert data(short.state_dict()) == before
    for epochs in (2, EPOCHS - 1):
        other = make("scan", epochs=epochs)
        other.load_state_dict(state)
        assert (other.epoch, other.step, len(other)) == (1, 2, len(first))
        train(other, until=epochs)
        assert (other.plan, other.progress) == (None, 1.0)
        assert len(other.log()) == epochs
    at_the_end = make("scan", epochs=2)
    at_the_end.load_state_dict(other_state(2))
    assert at_the_end.plan is None
    with pytest.raises(UsageError, match="give epochs=3 or more"):
        at_the_end.load_state_dict(other_state(3))


def other_state(epochs: int) -> dict[str, Any]:
    """The state of a longer run after so many epochs."""
    pruner = make("scan")
    train(pruner, until=epochs)
    return pruner.state_dict()


def test_a_row_takes_less_than_32_bytes_beside_its_hash() -> None:
    for name in ("scan", "scan-epoch", "d-pruning", "infobatch", "sift"):
        pruner = make(name)
        train(pruner, until=3)
        plan, parts = pruner.plan, [*pruner.ledger.state().values(), pruner.checks_N]
        parts += [part for part in (plan.kept_N, plan.weights_N) if part is not None]
        assert sum(part.nbytes for part in parts if len(part.shape) and len(part) == N) / N < 32


# The folder


def test_the_folder_has_two_versions_and_goes_with_its_pruner(tmp_path: Path) -> None:
    pruner = make("scan", scratch=tmp_path)
    train(pruner, until=5)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["5", "6", "lock", "now.npy"]
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            stream._remove(Scratch(folder, os.open(folder / "lock", os.O_RDWR)), os.getppid())
            os._exit(0)
        os.waitpid(child, 0)
        assert folder.exists()
    other = make("scan", scratch=tmp_path)
    assert folder.exists(), "what another pruner uses was swept"
    del pruner, other
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="is killed as a child process")
def test_the_folder_of_a_killed_run_goes_with_the_next(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        pruner = make("scan", scratch=tmp_path)
        os._exit(0 if pruner.folder.exists() else 1)
    assert os.waitpid(child, 0)[1] == 0
    (left,) = tmp_path.iterdir()
    pruner = make("scan", scratch=tmp_path)
    assert not left.exists()
    assert pruner.folder.exists()


def killed_with_its_workers(scratch: Path, sign: Path) -> None:
    pruner = make("scan", scratch=scratch, samples=2 * N)
    loader = DataLoader(Samples(pruner), batch_size=B, num_workers=2, worker_init_fn=end_with_parent)
    batches = iter(loader)
    next(batches)
    sign.touch()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="is killed as a child process")
@pytest.mark.parametrize("place", ["disk", pytest.param("memory", marks=pytest.mark.slow)])
def test_the_folders_of_killed_ranks_and_their_workers_go_with_the_next(tmp_path: Path, place: str) -> None:
    """The processes of a loader inherit the lock, and end with the one that started them."""
    if place == "memory" and not os.access("/dev/shm", os.W_OK):  # noqa: S108
        pytest.skip("no file system in memory")
    scratch = tmp_path if place == "disk" else Path(tempfile.mkdtemp(dir="/dev/shm"))  # noqa: S108
    try:
        living = make("scan", scratch=scratch)
        signs = [tmp_path / f"rank-{rank}.sign" for rank in range(2)]
        ranks = [begin(lambda sign=sign: killed_with_its_workers(scratch, sign)) for sign in signs]
        assert [end_of(rank) for rank in ranks] == [-signal.SIGKILL] * 2
        assert all(sign.exists() for sign in signs)
        assert len(list(scratch.glob("thresher-stream-*"))) == 3
        deadline = time.monotonic() + 20
        while len(list(scratch.glob("thresher-stream-*"))) > 1 and time.monotonic() < deadline:
            gone = make("scan", scratch=scratch)
            del gone
            gc.collect()
        assert list(scratch.glob("thresher-stream-*")) == [living.folder]
    finally:
        if place == "memory":
            shutil.rmtree(scratch)


# webdataset


def shards(folder: Path) -> list[str]:
    """Four tars of 50 samples whose keys are the same in each."""
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(50):
                content = str(50 * shard + i).encode()
                info = tarfile.TarInfo(f"{i:04d}.cls")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return [str(folder / f"{shard}.tar") for shard in range(4)]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_webdataset_pipeline_with_buffers_workers_and_keys_that_repeat(tmp_path: Path, workers: int) -> None:
    import webdataset as wds

    pruner, losses, urls = make("scan"), table(), shards(tmp_path)
    dataset = wds.DataPipeline(
        wds.SimpleShardList(urls),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        prune_stream(pruner, key=("__url__", "__key__")),
        wds.shuffle(100),
        wds.decode(),
        wds.to_tuple(ID, "cls"),
        wds.batched(B),
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    keys = [f"{urls[i // 50]}/{i % 50:04d}" for i in range(N)]
    for epoch in range(5):
        plan, rows = pruner.plan, []
        for ids, numbers in pruner.batches(loader):
            rows += numbers.tolist()
            pruner.reduce(ids, losses[epoch, numbers])
        where = pruner.rows_of(keys)
        assert (where >= 0).all()
        assert len(set(rows)) == len(rows)
        most = len(plan) if epoch else N
        assert len(rows) == most // B * B if not workers else most - 4 * B < len(rows) <= most  # a part of a batch each
        assert plan.kept_N is None or plan.kept_N[where[rows]].all()
    assert len(pruner.hashes_N) == N


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_shards_drawn_with_replacement(tmp_path: Path) -> None:
    import webdataset as wds

    pruner, losses, urls = make("scan", epochs=5), table(), shards(tmp_path)
    drawn = np.random.Generator(np.random.Philox(1))
    dataset = wds.DataPipeline(
        lambda: ({"url": str(drawn.choice(urls))} for _ in itertools.count()),
        wds.tarfile_to_samples(),
        prune_stream(pruner, key=lambda sample: f"{sample['__url__']}/{sample['__key__']}"),
        wds.decode(),
        wds.to_tuple(ID, "cls"),
        wds.batched(B),
    )
    endless = iter(dataset)
    while pruner.plan is not None:
        ids, numbers = next(endless)
        pruner.reduce(ids, losses[pruner.epoch, numbers])
    log = pruner.log()
    assert sum(entry["new"] for entry in log) == len(pruner.hashes_N) <= N
    assert any(entry["again"] for entry in log)
    assert [entry["steps"] for entry in log[:2]] == [10, 10]
    assert log[4]["steps"] < 9  # rows that did not come in the preparation epoch are no candidates


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resampled", [False, True])
def test_no_handler_of_webdataset_hides_that_a_stream_is_refused(tmp_path: Path, workers: int, resampled: bool) -> None:
    import webdataset as wds

    pruner, urls = make("", policy=StaticKeys.of_keys(["x"], N)), shards(tmp_path)
    first = [wds.ResampledShards(urls)] if resampled else [wds.SimpleShardList(urls), wds.split_by_worker]
    dataset = wds.DataPipeline(
        *first,
        wds.tarfile_to_samples(handler=wds.warn_and_continue),
        prune_stream(pruner, patience=300),
        wds.shuffle(100),
        wds.decode(handler=wds.warn_and_continue),
        wds.to_tuple(ID, "cls", handler=wds.warn_and_continue),
        wds.batched(B),
    ).with_epoch(10)
    with pytest.raises(
        UsageError, match=r"the selection has none of 300 samples \(members: cls; the first has the key"
    ):
        next(iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers)))


# Several processes: gloo, on this machine only.

TOGETHER = ("scan", "scan-epoch", "infobatch", "d-pruning", "sift")


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for ranks in (2, 3):
        if rank >= ranks:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{ranks}", rank=rank, world_size=ranks)
        found, losses = {}, table()
        for name in TOGETHER:
            pruner = make(name)
            stage, middle = prune_stream(pruner), None
            for epoch in range(EPOCHS):
                for ids, rows in pruner.batches(batched(stage, shuffled(epoch))):
                    mine = slice(rank * B // ranks, (rank + 1) * B // ranks)  # of the same global batches
                    pruner.reduce(ids[mine], losses[epoch, rows[mine]])
                    if (pruner.epoch, pruner.step) == (3, 2):
                        middle = pruner.state_dict()
            found[name] = middle, pruner.state_dict()
        torch.save(found, f"{folder}/{rank}-of-{ranks}.pt")
        dist.barrier()
        if ranks == 2:
            pruner = make("full")
            for _ in range(1 + rank):
                pruner.reduce(ids_of(KEYS[:B]), torch.ones(B, 1))
            with pytest.raises(UsageError, match=r"the ranks are at epoch, step \[\[0, 1\], \[0, 2\]\]"):
                pruner.end_epoch()
        dist.destroy_process_group()


@pytest.mark.slow
def test_several_processes_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same plans, ledgers and logs as one process with the same global batches, to the bit."""
    alone, losses = {}, table()
    for name in TOGETHER:
        pruner = make(name)
        stage, middle = prune_stream(pruner), None
        for epoch in range(EPOCHS):
            for ids, rows in pruner.batches(batched(stage, shuffled(epoch))):
                pruner.reduce(ids, losses[epoch, rows])
                if (pruner.epoch, pruner.step) == (3, 2):
                    middle = pruner.state_dict()
        alone[name] = middle, pruner.state_dict()
    on_ranks(monkeypatch, 3, on_rank, str(tmp_path))
    for ranks in (2, 3):
        for rank in range(ranks):
            found = torch.load(tmp_path / f"{rank}-of-{ranks}.pt", weights_only=True)
            for name in TOGETHER:
                for there, here in zip(found[name], alone[name], strict=True):
                    assert here is not None
                    assert data(there) == data(here)


# What cannot be carried out


def test_what_cannot_be_carried_out_says_why() -> None:
    with pytest.raises(UsageError, match=r"Static uses row numbers.*StaticKeys.of_keys"):
        make("", policy=Static.of_rows([1], N))
    for wrong in ({"batch_size": 0}, {"samples": 0}, {"seed": -1}):
        with pytest.raises(UsageError, match="give 1 or more, and a seed below"):
            make("full", **wrong)
    for epochs in (0, 40_000):
        with pytest.raises(UsageError, match=f"a run of {epochs:,} epochs; give 1 to 32,768"):
            make("full", epochs=epochs)
    pruner = make("full", epochs=1)
    with pytest.raises(UsageError, match=r"without uid; it has __key__, row. Give the field with key="):
        next(prune_stream(pruner, key="uid")(samples([0])))
    with pytest.raises(UsageError, match="it has no fields"):
        next(prune_stream(pruner)(iter(["text"])))
    found, sample = next(prune_stream(pruner, key=str)(iter([5])))
    assert (found.tolist(), sample) == (id_of("5").tolist(), 5)
    for ids in (np.zeros((B, 2)), np.zeros(B, np.int64), np.zeros((0, 2), np.int64)):
        with pytest.raises(UsageError, match=r"give \(B, 2\) int64, __id__ of the samples"):
            pruner.reduce(ids, torch.ones(B, 1))
    ids = ids_of(KEYS[:B])
    for losses in (torch.ones(B), torch.ones(B - 1, 2), torch.ones(B, 3)):
        with pytest.raises(UsageError, match=r"give \(20, 1\) or \(20, 2\)"):
            pruner.reduce(ids, losses)
    with pytest.raises(UsageError, match="no batch of epoch 0 was trained on"):
        list(pruner.batches([]))
    pruner.reduce(ids, torch.ones(B, 2))
    with pytest.raises(UsageError, match="the same for the whole epoch"):
        pruner.reduce(ids, torch.ones(B, 1))
    pruner.end_epoch()
    for call in (pruner.end_epoch, lambda: pruner.reduce(ids, torch.ones(B, 2)), lambda: next(pruner.batches([1]))):
        with pytest.raises(UsageError, match="all 1 epochs are done"):
            call()
