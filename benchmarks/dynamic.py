"""Pruning in the training loop without a model: the cost of planning an epoch and of recording a step.

Losses are random; everything else is as in a training loop: plans, orders, marks, ledgers, tables of streams. A step of
512 pairs at 10,000 pairs per second takes 51,200 microseconds. "Sets of keys" is the released SCAN code, fixed so that
it runs: ids in Python sets, sampled for every plan.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator

from common import table  # chooses the kernels before NumPy loads

# isort: split
import numpy as np
import torch

from thresher.dynamic.policies.d_pruning import DPruning
from thresher.dynamic.policies.dynamic_random import DynamicRandom
from thresher.dynamic.policies.infobatch import InfoBatch
from thresher.dynamic.policies.scan import Scan
from thresher.dynamic.policy import Policy
from thresher.dynamic.sampler import PruningSampler
from thresher.dynamic.stream import StreamPruner, prune_stream

EPOCHS, BATCH, STEP = 8, 512, 51_200
POLICIES: dict[str, Policy] = {
    "scan": Scan(rho=0.3, warmup=1),
    "scan, scope epoch": Scan(rho=0.3, warmup=1, scope="epoch"),
    "infobatch": InfoBatch(epochs=100),
    "d-pruning": DPruning(keep=0.7),
    "dynamic random": DynamicRandom(keep=0.7),
}


def planning(name: str, rows: int) -> list[str]:
    """Time the plan and the order of a pruned epoch, with a ledger that has a loss for every row."""
    policy, rng = POLICIES[name], np.random.default_rng(0)
    ledger = policy.ledger(rows)
    for epoch in range(2):
        for lo in range(0, rows, 1 << 16):
            ids = np.arange(lo, min(lo + (1 << 16), rows))
            losses_B2 = rng.gamma(2.0, 1.0, (len(ids), 2)).astype(np.float32)
            ledger.record(ids, losses_B2, epoch, policy.marks(losses_B2, rng) if epoch else None)
    plans, orders = [], []
    for epoch in range(2, 5):
        begin = time.perf_counter()
        plan = policy.plan(ledger, epoch, rng)
        middle = time.perf_counter()
        rng.permutation(plan.rows())
        plans.append(middle - begin)
        orders.append(time.perf_counter() - middle)
    held = sum(array.nbytes for array in ledger.state().values()) + 8 * rows
    return [name, f"{rows:,}", f"{min(plans):.3f}", f"{min(orders):.3f}", f"{held / rows:.0f}"]


def released_sets(rows: int) -> list[str]:
    """Time the same in the released code: take a sample of a set of keys, and keep the rows that are not in it."""
    keys = [(f"{row:012d}", row % 977, row % 31) for row in range(rows)]
    candidates = set(random.Random(0).sample(keys, int(0.6 * rows)))
    begin = time.perf_counter()
    left_out = set(random.Random(1).sample(list(candidates), int(0.75 * len(candidates))))
    kept = [row for row, key in enumerate(keys) if key not in left_out]
    middle = time.perf_counter()
    random.Random(2).shuffle(kept)
    each = 64 + 56 + 8  # bytes of a set entry, a tuple and a reference; without the text
    return ["sets of keys", f"{rows:,}", f"{middle - begin:.3f}", f"{time.perf_counter() - middle:.3f}", f"{each}"]


def per_step(name: str, rows: int) -> list[str]:
    """Time all work of a run other than the model, including planning and marking between epochs."""
    sampler = PruningSampler(rows, policy=POLICIES[name], batch_size=BATCH, epochs=EPOCHS, seed=0)
    losses_B2 = torch.from_numpy(np.random.default_rng(0).gamma(2.0, 1.0, (BATCH, 2)).astype(np.float32))
    spent, most, steps = 0.0, 0.0, 0
    while sampler.plan is not None:
        begin, before = time.perf_counter(), steps
        for batch in sampler:
            sampler.reduce(np.array(batch), losses_B2)
            steps += 1
        taken = time.perf_counter() - begin
        spent, most = spent + taken, max(most, taken / (steps - before))
    return _line(f"sampler, {name}", rows, spent / steps, most)


def per_step_of_streams(name: str, rows: int) -> list[str]:
    """Time the same for a stream, without the stage that looks up samples, which runs in the reader."""
    pruner = StreamPruner(policy=POLICIES[name], batch_size=BATCH, epochs=4, samples=rows, seed=0)
    stage = prune_stream(pruner)
    losses_B2 = torch.from_numpy(np.random.default_rng(0).gamma(2.0, 1.0, (BATCH, 2)).astype(np.float32))
    spent, most, steps = 0.0, 0.0, 0

    def batches() -> Iterator[np.ndarray]:
        held = []
        for sample in stage({"__key__": f"{row:09d}"} for row in range(rows)):
            held.append(sample["__id__"])
            if len(held) == BATCH:
                yield np.stack(held)
                held = []

    while pruner.plan is not None:
        epoch, before, taken = pruner.epoch, steps, 0.0
        for ids in batches():
            begin = time.perf_counter()
            pruner.reduce(ids, losses_B2)
            taken += time.perf_counter() - begin
            steps += 1
            if pruner.epoch != epoch:
                break
        else:
            begin = time.perf_counter()
            pruner.end_epoch()
            taken += time.perf_counter() - begin
        spent, most = spent + taken, max(most, taken / (steps - before))
    return _line(f"stream, {name}", rows, spent / steps, most)


def _line(name: str, rows: int, mean: float, most: float) -> list[str]:
    return [name, f"{rows:,}", f"{mean * 1e6:.0f}", f"{mean * 1e8 / STEP:.2f}%", f"{most * 1e8 / STEP:.2f}%"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000], help="Rows of the plans.")
    parser.add_argument("--run", type=int, default=1_000_000, help="Rows of the runs.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plans = [planning(name, rows) for rows in args.rows for name in POLICIES]
    plans.insert(len(POLICIES), released_sets(args.rows[0]))
    print("Planning an epoch, seconds; the best of 3\n")
    print(table(["policy", "rows", "plan", "order", "bytes per row"], plans))
    steps = [per_step(name, args.run) for name in POLICIES]
    steps += [per_step_of_streams(name, args.run // 2) for name in ("scan", "infobatch")]
    print(f"\nBookkeeping, batches of {BATCH}; share of a step at 10,000 pairs per second\n")
    print(table(["", "rows", "microseconds per step", "share", "in the most expensive epoch"], steps))


if __name__ == "__main__":
    main()
