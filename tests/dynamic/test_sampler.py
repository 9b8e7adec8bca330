"""The sampler in toy loops whose losses are a table: one process, several, cut off and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from tests.dynamic.test_jest import Toy
from tests.dynamic.test_jest import make as make_jest
from tests.ranks import on_ranks
from thresher.dynamic.loop import describe
from thresher.dynamic.loss import clip_losses
from thresher.dynamic.policies.d_pruning import DPruning
from thresher.dynamic.policies.dissect import Dissect
from thresher.dynamic.policies.dynamic_random import DynamicRandom
from thresher.dynamic.policies.full import Full
from thresher.dynamic.policies.infobatch import InfoBatch
from thresher.dynamic.policies.rho import Rho
from thresher.dynamic.policies.scan import Scan
from thresher.dynamic.policies.seta import Seta
from thresher.dynamic.policies.sift import Sift
from thresher.dynamic.policies.static import Static
from thresher.dynamic.policy import Policy, end_epoch
from thresher.dynamic.sampler import PruningSampler, with_rows
from thresher.dynamic.schedule import cosine_by_progress
from thresher.dynamic.stream import StreamPruner
from thresher.errors import UsageError

N, B, EPOCHS = 210, 20, 8
CUT = (3, 2)  # the epoch and step that runs are cut off after: in a pruned one

POLICIES: dict[str, Policy] = {
    "full": Full(),
    "scan": Scan(rho=0.3, cycle=3, warmup=1),
    "scan-epoch": Scan(rho=0.3, cycle=3, warmup=1, scope="epoch"),
    "scan-watching": Scan(rho=0.25, cycle=2),
    "infobatch": InfoBatch(epochs=EPOCHS),
    "d-pruning": DPruning(keep=0.7, rule="epsilon-greedy", epsilon=0.3, period=2),
    "dynamic-random": DynamicRandom(keep=0.6),
    "rho": Rho(keep=0.6, cycle=2),
    "dissect": Dissect(keep=0.7, cycle=2),
    "dissect-momentum": Dissect(keep=0.7, history="momentum", cycle=1),
    "seta": Seta(epochs=EPOCHS, r=0.1),
    "sift": Sift(mismatched=0.2, redundant=0.2, cycle=2),
    "sift-finding": Sift(),
    "static": Static.of_rows(np.repeat(np.arange(0, N, 2), 1 + np.arange(0, N, 2) % 3), N),
    "static-weighed": Static.of_rows(np.repeat(np.arange(0, N, 2), 1 + np.arange(0, N, 2) % 3), N, weigh=True),
}
each = pytest.mark.parametrize("name", POLICIES)
State = dict[str, object]


def references(name: str, rows: int = N) -> np.ndarray | None:
    """(rows,) losses of a reference, some of them unknown; None for a policy that has no use for them."""
    if not POLICIES[name].needs_references:
        return None
    losses = np.random.Generator(np.random.Philox(8)).gamma(2.0, 1.0, rows).astype(np.float32)
    losses[::17] = np.nan
    return losses


def make(name: str, seed: int = 0, batch_size: int = B, drop_last: bool = False, rows: int = N) -> PruningSampler:
    how = {"batch_size": batch_size, "epochs": EPOCHS, "seed": seed, "drop_last": drop_last}
    return PruningSampler(rows, policy=POLICIES[name], references_N=references(name, rows), **how)


def table(rows: int = N) -> torch.Tensor:
    """(EPOCHS, rows, 2) losses, falling, skewed, in two directions that mostly agree."""
    rng = np.random.Generator(np.random.Philox(7))
    own, noise = rng.gamma(2.0, 1.0, (rows, 1)), rng.gamma(2.0, 1.0, (EPOCHS, rows, 2))
    falling = 2.0 ** -np.arange(EPOCHS)[:, None, None] + 0.5
    return torch.from_numpy(falling * (0.9 * own + 0.1 * noise)).float()


def train(sampler: PruningSampler, until: tuple[int, int] | None = None) -> list[tuple[int, list[int], float]]:
    """Go on, to the end or until a step is done; the epoch, rows and mean of every batch."""
    losses, done = table(sampler.rows), []
    for epoch in range(sampler.epoch, sampler.epochs):
        sampler.set_epoch(epoch)
        for rows in sampler:
            mean = sampler.reduce(torch.tensor(rows), losses[epoch, rows])
            done.append((epoch, rows, mean.item()))
            if (sampler.epoch, sampler.step) == until:
                return done
    return done


def data(state: State) -> dict[str, object]:
    """Bits that can be compared."""
    return {k: (v.dtype, v.shape, v.numpy().tobytes()) if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def batches(done: list[tuple[int, list[int], float]]) -> list[tuple[int, list[int]]]:
    return [(epoch, rows) for epoch, rows, _ in done]


# One process


@each
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_epoch_is_its_plan_once_in_batches_of_a_size(name: str, drop_last: bool) -> None:
    sampler, losses = make(name, drop_last=drop_last), table()
    orders = []
    for epoch in range(EPOCHS):
        plan = sampler.plan
        assert plan is not None
        got = list(sampler)
        assert len(got) == len(sampler) == (len(plan) // B if drop_last else -(-len(plan) // B))
        sizes = {len(rows) for rows in got}
        assert sizes == {B} if drop_last else max(sizes) <= min(sizes) + 1
        order = [row for rows in got for row in rows]
        if drop_last:
            times = np.bincount(order, minlength=N)
            assert (times <= np.bincount(plan.rows(), minlength=N)).all()
        else:
            assert sorted(order) == plan.rows().tolist()
        orders.append(order)
        for rows in got:
            sampler.reduce(rows, losses[epoch, rows])
    assert all(a != b for a, b in zip(orders, orders[1:], strict=False))


@each
def test_ledgers_are_those_of_the_loop_written_out(name: str) -> None:
    """Plan, record batch by batch, finish, as the page of the policies has it."""
    sampler, losses = make(name), table()
    policy, ledger = POLICIES[name], POLICIES[name].ledger(N)
    if policy.needs_references:
        ledger.refer(references(name))
    for epoch in range(EPOCHS):
        plan = policy.plan(ledger, epoch, sampler._rng("plan", epoch))
        order = sampler._rng("order", epoch).permutation(plan.rows())
        steps = -(-len(order) // B)
        edges = [step * len(order) // steps for step in range(steps + 1)]
        for step in range(steps):
            rows = order[edges[step] : edges[step + 1]]
            loss = losses[epoch, rows]
            marks = policy.marks(loss.numpy(), sampler._rng("marks", epoch, step)) if plan.collects else None
            ledger.record(rows, loss.numpy(), epoch, marks)
            weights = torch.ones(len(rows)) if plan.weights_N is None else torch.from_numpy(plan.weights_N[rows])
            mean = sampler.reduce(rows, loss)
            torch.testing.assert_close(mean, (loss.mean(1) * weights).mean())
        end_epoch(policy, ledger, plan, sampler._rng("finish", epoch))
    expected = ledger.state()
    found = sampler.ledger.state()
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in expected.items()}


@pytest.mark.parametrize(
    ("policy", "promised", "within"),
    [
        (Full(), 0.0, 0.0),
        (Scan.for_budget(0.2, EPOCHS), 0.2, 0.02),
        (Scan.for_budget(0.25, EPOCHS, warmup=1, scope="epoch"), 0.25, 0.02),
        (InfoBatch.for_budget(0.2, EPOCHS), 0.2, 0.06),
        (DPruning.for_budget(0.3, EPOCHS), 0.3, 0.001),
        (DynamicRandom(keep=0.7), 0.3, 0.001),
        (Static(times_N=np.arange(1000) % 4 > 0), 0.25, 0.0),
    ],
    ids=lambda value: None if isinstance(value, float) else type(value).__name__,
)
def test_policies_prune_the_share_they_promise(policy: Policy, promised: float, within: float) -> None:
    sampler = PruningSampler(1000, policy=policy, batch_size=50, epochs=EPOCHS)
    expected = sampler.total_steps()
    train(sampler)
    log = sampler.log()
    assert [entry["epoch"] for entry in log] == list(range(EPOCHS))
    assert log[-1]["pruned_so_far"] == pytest.approx(promised, abs=within + 1e-9)
    assert sum(entry["steps"] for entry in log) == pytest.approx(expected, rel=within + 0.01)
    assert json.loads(json.dumps(log)) == log


def test_the_log_tells_candidates_and_how_many_come_again() -> None:
    sampler = PruningSampler(400, policy=Scan(rho=0.25, cycle=1, warmup=1), batch_size=400, epochs=6)
    train(sampler)
    log = sampler.log()
    assert [entry["phase"] for entry in log] == ["warm-up", *["preparation", "mutation"] * 2, "preparation"]
    assert [entry["overlap"] is None for entry in log] == [True, True, True, False, True, False]
    assert log[1]["redundant"] == pytest.approx(100, abs=10)
    assert log[1]["candidates"] <= log[1]["redundant"] + log[1]["ill_matched"]
    assert 0.6 < log[3]["overlap"] <= 1
    assert log[2]["rows"] == 400 - log[1]["candidates"]
    assert log[0]["loss"] == pytest.approx(table(400)[0].mean().item(), rel=1e-5)
    for epoch, entry in enumerate(log):
        assert sum(entry["histogram"]["counts"]) == entry["samples"]
        if entry["rows"] == 400:
            means, edges = table(400)[epoch].mean(1).double().numpy(), entry["histogram"]["edges"]
            assert entry["histogram"]["counts"] == np.histogram(means, edges)[0].tolist()


def test_losses_that_are_not_finite_are_told_and_not_recorded() -> None:
    sampler = PruningSampler(6, policy=Scan(rho=0.3, warmup=0), batch_size=6, epochs=2)
    (rows,) = sampler
    losses = torch.arange(12.0).reshape(6, 2)
    losses[2, 1], losses[3, 0] = torch.nan, torch.inf
    sampler.reduce(rows, losses)
    entry = sampler.log()[0]
    assert entry["not_finite"] == 2
    assert entry["loss"] == pytest.approx(np.mean([0, 1, 2, 3, 8, 9, 10, 11]))
    assert sum(entry["histogram"]["counts"]) == 4
    assert (sampler.ledger.seen_N[rows] < 0).tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_shorter_than_a_batch_is_one_batch(drop_last: bool) -> None:
    policy = Static.of_rows([1, 4], N)
    sampler = PruningSampler(N, policy=policy, batch_size=B, epochs=2, drop_last=drop_last)
    assert [sorted(rows) for rows in sampler] == [[1, 4]]


@each
@pytest.mark.parametrize("parts", [1, 3])
def test_a_batch_in_parts_is_the_batch(name: str, parts: int) -> None:
    """What the parts return adds up to what the batch returns, and they are ranked together."""
    whole, divided, losses = make(name), make(name), table()
    for epoch in range(EPOCHS):
        for rows in divided:
            losses_BR = losses[epoch, rows]
            total = whole.reduce(np.array(rows), losses_BR)
            cuts = [len(rows) * part // parts for part in range(parts + 1)]
            of_parts = [divided.reduce_part(rows[a:b], losses_BR[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
            torch.testing.assert_close(torch.stack(of_parts).sum(), total)
    assert data(divided.state_dict()) == data(whole.state_dict())


def test_only_the_part_that_is_next_is_taken() -> None:
    sampler = make("full")
    rows, rest = next(iter(sampler))[:5], next(iter(sampler))[5:]
    sampler.reduce_part(rows, torch.rand(5, 2))
    for wrong in (rows, rest[1:], [*rest, 0]):
        with pytest.raises(UsageError, match="are not those of step 0 of epoch 0"):
            sampler.reduce_part(wrong, torch.rand(len(wrong), 2))
    for shape in ((4, 2), (len(rest), 1), (len(rest),)):
        with pytest.raises(UsageError, match=f"give \\({len(rest)}, 2\\), the same for all parts"):
            sampler.reduce_part(rest, torch.rand(shape))
    begun, batch = make("full"), [*rows, *rest]
    for _ in range(2):  # a batch that was left after its first part starts again
        assert next(iter(begun)) == batch
        begun.reduce_part(rows, torch.rand(5, 2))
    begun.reduce_part(rest, torch.rand(len(rest), 2))
    assert begun.step == 1
    again = make("full")
    again.load_state_dict(sampler.state_dict())  # between the parts: the batch starts again
    assert next(iter(again)) == [*rows, *rest]
    again.reduce_part(rows, torch.rand(5, 2))
    again.reduce_part(rest, torch.rand(len(rest), 2))
    assert again.step == 1
    with pytest.raises(UsageError, match="a JestSampler chooses rows of a batch; call reduce with these"):
        make_jest().reduce_part(rows, torch.rand(5, 2))


def test_ids_above_two_to_the_24_are_exact() -> None:
    """As float32 every second of them would be its neighbour."""
    rows = 2**24 + 10
    kept = [3, *range(2**24 - 1, rows)]
    sampler = PruningSampler(rows, policy=Static.of_rows(kept, rows), batch_size=4, epochs=1)
    seen = []
    for ids, items in DataLoader(with_rows(range(rows)), batch_sampler=sampler):
        assert ids.dtype == torch.int64
        assert ids.tolist() == items.tolist()
        seen += ids.tolist()
        sampler.reduce(ids, torch.ones(len(ids), 2))
    assert sorted(seen) == kept
    assert np.flatnonzero(sampler.ledger.seen_N == 0).tolist() == kept


class Pairs:
    """A dataset that can also be read a batch at a time."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[float, str]:
        return row / 2, f"caption {row}"

    def __getitems__(self, rows: list[int]) -> list[tuple[float, str]]:
        return [self[row] for row in rows]


def test_a_loader_that_reads_ahead_in_other_processes_changes_nothing() -> None:
    expected = train(make("scan"), until=(3, 1))
    sampler, losses, done = make("scan"), table(), []
    loader = DataLoader(with_rows(Pairs()), batch_sampler=sampler, num_workers=2, persistent_workers=True)
    assert len(loader) == len(sampler)
    for epoch in range(4):
        for rows, (image, text) in loader:
            assert image.tolist() == [row / 2 for row in rows.tolist()]
            assert list(text) == [f"caption {row}" for row in rows.tolist()]
            done.append((epoch, rows.tolist(), sampler.reduce(rows, losses[epoch, rows]).item()))
            if epoch == 3:
                assert sampler.step == 1  # though the loader is further
                break
    assert done == expected


@pytest.mark.slow  # loads the compiler of torch
def test_a_compiled_step_records_too() -> None:
    """As Lightning compiles the training step of a module."""
    expected, compiled = make("infobatch"), make("infobatch")
    losses = table()

    @torch.compile(backend="eager")
    def step(rows: np.ndarray, losses_BR: torch.Tensor) -> torch.Tensor:
        return compiled.reduce(rows, 2 * losses_BR) / 2

    for epoch in range(3):
        for batch in expected:
            rows = np.array(batch)
            mean = expected.reduce(rows, 2 * losses[epoch, rows]) / 2
            assert step(rows, losses[epoch, rows]).item() == mean.item()
    assert data(compiled.state_dict()) == data(expected.state_dict())


def test_an_epoch_can_be_cut_short() -> None:
    sampler = make("full")
    rows = next(iter(sampler))
    sampler.reduce(rows, torch.ones(len(rows), 1))
    before = sampler.progress
    sampler.end_epoch()
    assert (sampler.epoch, sampler.step, sampler.progress) == (1, 0, before)
    assert sampler.log()[0]["samples"] == len(rows)
    sampler.end_epoch()
    assert sampler.log()[1]["loss"] is None


# Schedules


@each
def test_progress_is_steady_and_ends_at_one(name: str) -> None:
    sampler, losses = make(name), table()
    seen, steps = [sampler.progress], 0
    for epoch in range(EPOCHS):
        for rows in sampler:
            sampler.reduce(rows, losses[epoch, rows])
            seen.append(sampler.progress)
            steps += 1
            assert sampler.total_steps() == steps + sampler.steps_left()
    assert seen[0] == 0
    assert seen[-1] == 1
    assert (np.diff(seen) > 0).all()
    assert np.diff(seen).max() < 2 / steps
    assert sampler.steps_left() == 0


def test_steps_are_exact_where_forecasts_are() -> None:
    for name in ("full", "dynamic-random", "static", "d-pruning"):
        sampler = make(name)
        promised = sampler.total_steps()
        assert len(train(sampler)) == promised == sampler.total_steps()


def test_cosine_by_progress_fits_shrinking_epochs() -> None:
    sampler, losses = make("scan"), table()
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.2}], lr=1.0)
    schedule = LambdaLR(optimizer, cosine_by_progress(sampler, warmup=0.1, final=0.01))
    rates, before = [optimizer.param_groups[0]["lr"]], 0.0
    for epoch in range(EPOCHS):
        for rows in sampler:
            sampler.reduce(rows, losses[epoch, rows])
            p = sampler.progress
            if before < 0.1:  # the rate of the step that this was counted it as done
                assert rates[-1] == pytest.approx(0.2 * min(1, p / 0.1), rel=0.1)
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
            if p >= 0.1:
                cosine = 0.01 + 0.99 * (1 + np.cos(np.pi * (p - 0.1) / 0.9)) / 2
                assert rates[-1] == pytest.approx(0.2 * cosine)
            before = p
    assert 0 < rates[0] < 0.2 * max(rates)
    assert max(rates) <= 0.2
    assert np.diff(rates).max() < 1.2 * rates[0]  # it rises as steadily as it begins
    assert rates[-1] == pytest.approx(0.002)
    peak = int(np.argmax(rates))
    assert (np.diff(rates[peak:]) < 0).all()
    resumed = torch.optim.SGD([{"params": [weight], "lr": 0.2}], lr=1.0)
    after = LambdaLR(resumed, cosine_by_progress(sampler, warmup=0.1, final=0.01))
    resumed.load_state_dict(optimizer.state_dict())  # before or after, it keeps the rates that are scaled
    resumed.step()
    after.step()
    assert resumed.param_groups[0]["lr"] == rates[-1]
    assert after.state_dict()["lr_lambdas"] == [None]  # nothing of the sampler is saved with it


def test_every_step_changes_something() -> None:
    """Warm-up counts as open_clip's does: (step + 1) / warmup; only what comes after the last step is 0."""
    sampler = PruningSampler(100, policy=Full(), batch_size=10, epochs=4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = LambdaLR(optimizer, cosine_by_progress(sampler, warmup=0.125)), []
    for _ in range(4):
        for rows in sampler:
            rates.append(optimizer.param_groups[0]["lr"])
            sampler.reduce(rows, torch.ones(10, 1))
            optimizer.step()
            schedule.step()
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, *(0.5 * (1 + np.cos(np.pi * np.arange(35) / 35)))]
    np.testing.assert_allclose(rates, expected, rtol=1e-9)
    assert min(rates) > 0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


# Checkpoints


def by_torch(state: State, folder: Path) -> State:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def by_numpy(state: State, folder: Path) -> State:
    np.savez(folder / "state.npz", **state)
    return np.load(folder / "state.npz", allow_pickle=False)


@each
@pytest.mark.parametrize("carry", [pytest.param(by_torch, marks=pytest.mark.slow), by_numpy])
@pytest.mark.parametrize("cut", [CUT, (4, 0), (0, 1)])
def test_resumed_in_mid_epoch_it_goes_on_as_if_nothing_was(name: str, carry, cut, tmp_path: Path) -> None:
    whole = make(name)
    expected = train(whole)
    first = make(name)
    done = train(first, until=cut)
    second = make(name)
    second.load_state_dict(carry(first.state_dict(), tmp_path))
    assert (second.epoch, second.step, second.progress) == (*cut, first.progress)
    assert second.total_steps() == first.total_steps()
    assert data(second.state_dict()) == data(first.state_dict())
    assert done + train(second) == expected
    assert data(second.state_dict()) == data(whole.state_dict())
    third = make(name)
    third.load_state_dict(carry(second.state_dict(), tmp_path))
    assert third.log() == whole.log()
    assert third.progress == 1


def test_a_checkpoint_has_the_plan_not_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make("scan")
    train(sampler, until=CUT)
    state, expected = sampler.state_dict(), list(sampler)
    other = make("scan")
    monkeypatch.setattr(Scan, "plan", None)
    monkeypatch.setattr(PruningSampler, "_rng", None)
    other.load_state_dict(state)
    assert list(other) == expected


def test_taking_a_checkpoint_changes_nothing() -> None:
    expected, sampler, losses, done = train(make("scan")), make("scan"), table(), []
    for epoch in range(EPOCHS):
        for rows in sampler:
            done.append((epoch, rows, sampler.reduce(rows, losses[epoch, rows]).item()))
            sampler.state_dict()
    assert done == expected


def test_a_finished_run_can_be_made_longer() -> None:
    first = make("scan")
    train(first)
    longer = PruningSampler(N, policy=POLICIES["scan"], batch_size=B, epochs=EPOCHS + 2, drop_last=False)
    longer.load_state_dict(first.state_dict())
    assert longer.epoch == EPOCHS
    assert sorted(row for rows in longer for row in rows) == longer.plan.rows().tolist()


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from tests.dynamic.test_sampler import CUT, Pairs, make, table
from torch.utils.data import DataLoader
from thresher.dynamic.sampler import with_rows
torch.set_num_threads(1)
sampler, losses = make("scan"), table()
loader = DataLoader(with_rows(Pairs()), batch_sampler=sampler)
while True:
    epoch = sampler.epoch
    for rows, _ in loader:
        sampler.reduce(rows, losses[epoch, rows])
        if (sampler.epoch, sampler.step) == CUT:
            torch.save(sampler.state_dict(), sys.argv[2])
        if (sampler.epoch, sampler.step) == (CUT[0], CUT[1] + 2):  # beyond the checkpoint: lost, and done again
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_in_mid_epoch_and_resumed_it_sees_the_same_batches(tmp_path: Path) -> None:
    here, saved = str(Path(__file__).parents[2]), tmp_path / "state.pt"
    done = subprocess.run([sys.executable, "-c", SCRIPT, here, str(saved)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    undisturbed = make("scan")
    train(undisturbed, until=CUT)
    rest = train(undisturbed)
    sampler = make("scan")
    sampler.load_state_dict(torch.load(saved, weights_only=True))
    assert train(sampler) == rest
    assert data(sampler.state_dict()) == data(undisturbed.state_dict())


# Several processes: gloo, on this machine only.

TOGETHER = (
    "scan", "scan-epoch", "infobatch", "d-pruning", "static", "sift", "rho", "dissect", "dissect-momentum", "seta"
)  # fmt: skip


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for ranks in (2, 3):
        if rank >= ranks:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{ranks}", rank=rank, world_size=ranks)
        found = {}
        for name in TOGETHER:
            sampler = make(name)
            done = train(sampler, until=CUT)
            middle = sampler.state_dict()
            done += train(sampler)
            found[name] = done, middle, sampler.state_dict()
        if ranks == 3:  # what two ranks, and one, left off
            for left, path in ((2, f"{folder}/0-of-2.pt"), (1, f"{folder}/alone.pt")):
                sampler = make("scan")
                states = torch.load(path, weights_only=True)
                sampler.load_state_dict(states["scan"][1])
                found[f"after {left}"] = train(sampler), None, sampler.state_dict()
        torch.save(found, f"{folder}/{rank}-of-{ranks}.pt")
        torch.save(jest_alone(ranks), f"{folder}/jest-{rank}-of-{ranks}.pt")
        dist.barrier()
        if ranks == 2:
            sampler = make("full", seed=rank)
            with pytest.raises(UsageError, match="the ranks use different orders; give all of them the same"):
                train(sampler)
            with pytest.raises(UsageError, match="batches of 1 rows for 2 ranks; give 2 rows or more"):
                iter(make("full", batch_size=1))
        dist.destroy_process_group()


@pytest.mark.slow  # in one process: test_a_batch_in_parts_is_the_batch
def test_several_processes_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same global batches, plans, ledgers and logs, gradients of the same mean, at every point and to the bit."""
    alone = {}
    for name in TOGETHER:
        sampler = make(name)
        done = train(sampler, until=CUT)
        middle = sampler.state_dict()
        alone[name] = done + train(sampler), middle, sampler.state_dict()
    torch.save(alone, tmp_path / "alone.pt")
    on_ranks(monkeypatch, 3, on_rank, str(tmp_path))
    same_on_ranks(tmp_path)
    for ranks in (2, 3):
        found = [torch.load(tmp_path / f"{rank}-of-{ranks}.pt", weights_only=True) for rank in range(ranks)]
        for name in found[0]:
            expected, middle, end = alone[name if name in alone else "scan"]
            expected = expected[-len(found[0][name][0]) :]
            for of_rank in found:
                assert data(of_rank[name][2]) == data(end)
                assert of_rank[name][1] is None or data(of_rank[name][1]) == data(middle)
            for (epoch, rows, mean), *parts in zip(expected, *(of_rank[name][0] for of_rank in found), strict=True):
                assert [row for part in parts for row in part[1]] == rows
                assert {part[0] for part in parts} == {epoch}
                assert len({len(part[1]) for part in parts}) <= 2
                assert np.mean([part[2] for part in parts]) == pytest.approx(mean, rel=1e-5)
        for name in TOGETHER:  # and back on one process
            sampler = make(name)
            sampler.load_state_dict(found[-1][name][1])
            rest = train(sampler)
            assert rest == alone[name][0][-len(rest) :]
            assert data(sampler.state_dict()) == data(alone[name][2])


def jest_alone(ranks: int) -> tuple[list[tuple[list[int], float]], State]:
    """The rows, the mean and the state of a JEST run without learning, on this rank."""
    toy, sampler = Toy(), make_jest()
    done = []
    while sampler.plan is not None:
        for rows in sampler:
            with torch.no_grad():
                at = sampler.choose(rows, *toy.encode(rows), 10.0)
                chosen = torch.tensor(rows)[at]
                losses = clip_losses(*toy.encode(chosen), 10.0, gather=ranks > 1)
            done.append((chosen.tolist(), sampler.reduce(chosen, losses).item()))
    return done, sampler.state_dict()


def same_on_ranks(folder: Path) -> None:
    """Joint choices are those of one process, divided among the ranks that hold the rows."""
    expected, end = jest_alone(1)
    for ranks in (2, 3):
        found = [torch.load(folder / f"jest-{rank}-of-{ranks}.pt", weights_only=True) for rank in range(ranks)]
        for (rows, mean), *parts in zip(expected, *(done for done, _ in found), strict=True):
            assert [row for part, _ in parts for row in part] == rows
            assert np.mean([each for _, each in parts]) == pytest.approx(mean, rel=1e-4)
        for _, state in found:
            assert [row["samples"] for row in json.loads(state["log"])] == [40, 40]
            for name in ("ledger.seen", "ledger.times"):
                assert data(state)[name] == data(end)[name]


# What cannot be carried out


def test_epochs_follow_one_another() -> None:
    sampler = make("full")
    with pytest.raises(UsageError, match=r"set_epoch\(1\), but epoch 0 is at step 0 of 11; loop over range"):
        sampler.set_epoch(1)
    train(sampler, until=(2, 1))
    sampler.set_epoch(2)
    for epoch in (1, 3):
        with pytest.raises(UsageError, match=r"epoch 2 is at step 1 of 11.*end_epoch\(\) to end"):
            sampler.set_epoch(epoch)
    train(sampler)
    rows = torch.arange(3)
    for call in (sampler.end_epoch, lambda: iter(sampler), lambda: sampler.set_epoch(8)):
        with pytest.raises(UsageError, match="all 8 epochs are done; to continue, create the sampler"):
            call()
    with pytest.raises(UsageError, match="all 8 epochs are done"):
        sampler.reduce(rows, torch.ones(3, 2))


def test_only_the_batch_that_is_next_is_taken() -> None:
    sampler = make("full")
    one, two = list(sampler)[:2]
    losses = torch.ones(len(one), 2)
    for rows in (two, one[:-1], one[::-1], torch.tensor(one).float(), [N] * len(one)):
        with pytest.raises(UsageError, match="not those of step 0 of epoch 0, 19 ids"):
            sampler.reduce(rows, losses)
    for wrong in (losses[:-1], losses[:, 0], torch.ones(len(one), 3), torch.ones(len(one), 0)):
        with pytest.raises(UsageError, match=r"losses of shape .*; give \(19, 1\) or \(19, 2\)"):
            sampler.reduce(one, wrong)
    assert sampler.step == 0
    sampler.reduce(one, losses)
    with pytest.raises(UsageError, match="not those of step 1"):
        sampler.reduce(one, losses)
    with pytest.raises(UsageError, match="the same for the whole epoch"):
        sampler.reduce(two, torch.ones(len(two), 1))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make("scan", seed=1), "seed = 0; this one has 1"),
        (make("scan", batch_size=21), "batch_size = 20; this one has 21"),
        (make("scan", drop_last=True), "drop_last = 0; this one has 1"),
        (make("scan", rows=N + 1), "rows = 210; this one has 211"),
        (make("full"), r"policy = Scan\(warmup=1\); this one has Full\(\)"),
        (make("scan-epoch"), r"this one has Scan\(warmup=1, scope='epoch'\)"),
    ],
    ids=["seed", "batch_size", "drop_last", "rows", "policy", "parameter"],
)
def test_the_state_of_another_run_is_refused(other: PruningSampler, message: str) -> None:
    before = data(other.state_dict())
    with pytest.raises(UsageError, match="the state of a sampler with .*" + message):
        other.load_state_dict(make("scan").state_dict())
    with pytest.raises(UsageError, match="not the state of a PruningSampler"):
        other.load_state_dict({"model": torch.ones(1)})
    with pytest.raises(UsageError, match="not the state of a ledger"):
        other.load_state_dict({k: v for k, v in other.state_dict().items() if k != "ledger.seen"})
    assert data(other.state_dict()) == before


@each
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_run_by_samples_sees_these_and_no_more(name: str, drop_last: bool) -> None:
    """Whatever the policy, the run is as long as it was asked to be, and schedules know its end."""
    samples = 3 * N + 4 * B + 7
    how = {"policy": POLICIES[name], "batch_size": B, "drop_last": drop_last, "references_N": references(name)}
    sampler, whole = PruningSampler(N, samples=samples, **how), PruningSampler(N, epochs=EPOCHS, **how)
    losses, progress, seen, first = table(), [0.0], 0, list(whole)
    assert list(sampler) == first  # the same run as by epochs, but for its end
    while sampler.plan is not None:
        assert sampler.epochs > sampler.epoch
        for rows in sampler:
            sampler.reduce(rows, losses[min(sampler.epoch, EPOCHS - 1), rows])
            seen += len(rows)
            progress.append(sampler.progress)
    assert samples - B < seen <= samples if drop_last else seen == samples
    assert seen == sum(entry["samples"] for entry in sampler.log())
    assert sampler.epochs == sampler.epoch == len(sampler.log())
    assert sampler.total_steps() == sum(entry["steps"] for entry in sampler.log())
    assert progress[-1] == 1
    assert (np.diff(progress) > 0).all()


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("policy", "rows", "samples", "sizes"),
    [
        (Full(), 10, 50, [10] * 5),  # fewer rows than a batch
        (DynamicRandom(keep=0.5), 20, 60, [10] * 6),  # or fewer rows that a plan keeps
        (Static.of_rows([1, 2, 3], 40), 40, 18, [3] * 6),
    ],
)
def test_a_run_by_samples_in_epochs_shorter_than_a_batch_ends_with_the_last_that_fits(
    policy: Policy, rows: int, samples: int, sizes: list[int], drop_last: bool
) -> None:
    for more in (0, sizes[0] - 1):
        sampler = PruningSampler(rows, policy=policy, batch_size=16, samples=samples + more, drop_last=drop_last)
        promised, seen = sampler.total_steps(), []
        while sampler.plan is not None:
            for batch in sampler:
                sampler.reduce(batch, torch.rand(len(batch), 1))
                seen.append(len(batch))
        assert seen == (sizes if drop_last or not more else [*sizes, more])
        assert len(seen) == promised == sampler.total_steps()
        assert sampler.progress == 1


def test_a_run_by_samples_resumes_and_may_be_made_longer() -> None:
    def made(samples: int) -> PruningSampler:
        return PruningSampler(N, policy=POLICIES["scan"], batch_size=B, samples=samples, seed=0)

    def go(sampler: PruningSampler, steps: int | None = None) -> list[list[int]]:
        done: list[list[int]] = []
        while sampler.plan is not None and len(done) != steps:
            rows = next(iter(sampler))
            sampler.reduce(rows, table()[min(sampler.epoch, EPOCHS - 1), rows])
            done.append(rows)
        return done

    undisturbed = go(made(5 * N))
    sampler = made(5 * N)
    start = go(sampler, 27)
    again = made(5 * N)
    again.load_state_dict(sampler.state_dict())
    assert again.total_steps() == sampler.total_steps()
    assert start + go(again) == undisturbed
    short = made(2 * N)
    go(short)
    longer = made(3 * N)
    longer.load_state_dict(short.state_dict())
    assert longer.plan is not None
    assert sum(map(len, go(longer))) == (3 * N // B - 2 * N // B) * B


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_state_in_mid_epoch_fits_runs_that_last_as_long(drop_last: bool) -> None:
    """What an epoch in progress has is what it had; a run that ends before is refused, and left as it was."""

    def made(**length: int) -> PruningSampler:
        return PruningSampler(N, policy=POLICIES["scan"], batch_size=B, drop_last=drop_last, **length)

    def go(sampler: PruningSampler, steps: int | None = None) -> list[list[int]]:
        done: list[list[int]] = []
        while sampler.plan is not None and len(done) != steps:
            rows = next(iter(sampler))
            sampler.reduce(rows, table()[min(sampler.epoch, EPOCHS - 1), rows])
            done.append(rows)
        return done

    whole = made(samples=500)
    go(whole, 13)
    assert (whole.epoch, whole.step) == (1, 3 if drop_last else 2)
    state, rest = whole.state_dict(), [list(batch) for batch in whole]
    ends = whole.log()[0]["samples"] + whole._bound(whole.step) + sum(map(len, rest))
    for samples in (300, ends - 1):
        short = made(samples=samples)
        before = data(short.state_dict())
        with pytest.raises(
            UsageError, match=f"of a run of {ends} samples, .* ends after {samples}; give samples={ends}"
        ):
            short.load_state_dict(state)
        assert data(short.state_dict()) == before
    for length in ({"samples": ends}, {"samples": 10 * N}, {"epochs": 2}, {"epochs": 9}):
        other = made(**length)
        other.load_state_dict(state)
        assert [list(batch) for batch in other] == rest
        seen = other.log()[0]["samples"] + other._bound(other.step) + sum(map(len, go(other)))
        assert seen == sum(entry["samples"] for entry in other.log())
        assert seen <= length.get("samples", 10 * N)
        assert other.progress == 1
    with pytest.raises(
        UsageError, match="of a run of 2 epochs, including its current epoch, but this run ends after 1; give"
    ):
        made(epochs=1).load_state_dict(state)


def test_a_state_that_is_further_than_the_run_is_refused() -> None:
    by_epochs = make("full")
    train(by_epochs, until=(3, 0))
    done = PruningSampler(N, policy=Full(), batch_size=B, epochs=3, drop_last=False)
    done.load_state_dict(by_epochs.state_dict())
    assert (done.plan, done.progress, len(done)) == (None, 1.0, 0)
    with pytest.raises(UsageError, match="give epochs=3 or more"):
        PruningSampler(N, policy=Full(), batch_size=B, epochs=2, drop_last=False).load_state_dict(
            by_epochs.state_dict()
        )
    with pytest.raises(UsageError, match="give samples=630 or more"):
        PruningSampler(N, policy=Full(), batch_size=B, samples=629, drop_last=False).load_state_dict(
            by_epochs.state_dict()
        )


def test_policies_are_told_with_all_their_parameters() -> None:
    policy = Scan.for_budget(0.3, 30)
    assert describe(policy, defaults=True) == (
        "Scan(rho=0.3214, cycle=3, warmup=2, threshold=0.3, mode='both', scope='batch', top_up=1)"
    )
    assert describe(policy) == f"Scan(rho={policy.rho!r}, warmup=2, top_up=1.0)"
    assert describe(Full(), defaults=True) == "Full()"
    of_rows = Static.of_rows([0], 4)
    assert describe(of_rows, defaults=True).startswith("Static(times_N=int32(4,):")


def test_selections_are_told_apart_by_their_rows() -> None:
    one, two = (PruningSampler(4, policy=Static.of_rows(rows, 4), batch_size=1, epochs=1) for rows in ([0], [1]))
    with pytest.raises(UsageError, match=r"policy = Static\(times_N=int32\(4,\):"):
        one.load_state_dict(two.state_dict())


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"epochs": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"epochs": None},
        {"samples": N},
        {"epochs": None, "samples": B - 1},
        {"epochs": 40_000},
        {"epochs": None, "samples": 40_000 * N},
        {"epochs": None, "samples": 10**18},
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="give (1|exactly one|fewer)"):
        PruningSampler(N, **{"policy": Full(), "batch_size": B, "epochs": 1, **wrong})


@pytest.mark.parametrize("name", ["infobatch", "seta"])
def test_a_policy_for_a_run_of_another_length_is_told(name: str) -> None:
    """Its last epochs, which are on all rows, would come in mid-run or not at all."""
    told = f"policy {name} was made for 8 epochs, but the run has 20: .* give {type(POLICIES[name]).__name__}"
    with pytest.warns(UserWarning, match=told + r"\(epochs=20\)"):
        PruningSampler(N, policy=POLICIES[name], batch_size=B, epochs=20)
    with pytest.warns(UserWarning, match=told):
        StreamPruner(policy=POLICIES[name], batch_size=B, epochs=20, samples=N)
    PruningSampler(N, policy=POLICIES[name], batch_size=B, samples=5 * N)


def test_the_longest_run_has_all_its_epochs() -> None:
    """The ledger counts epochs in 16 bits."""
    sampler = PruningSampler(2, policy=Full(), batch_size=2, epochs=32_768)
    sampler._begin(32_767)
    (rows,) = sampler
    sampler.reduce(rows, torch.ones(2, 1))
    assert sampler.plan is None
    assert sampler.ledger.seen_N.tolist() == [32_767, 32_767]


@pytest.mark.parametrize("wrong", [{"warmup": 1.0}, {"warmup": -0.1}, {"final": 2.0}])
def test_schedules_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="give shares from 0 to 1, the warm-up below 1"):
        cosine_by_progress(make("full"), **wrong)


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 7.9}, {"epochs": 1.5}, {"rows": 9.5}, {"epochs": None, "samples": 33.5}, {"seed": 0.5}]
)
def test_fractions_are_refused_not_rounded(wrong: dict[str, Any]) -> None:
    given = {"rows": 16, "policy": Full(), "batch_size": 8.0, "epochs": 2.0, **wrong}
    named = "{}={}; give whole numbers"
    with pytest.raises(UsageError, match=named.format(*list(wrong.items())[-1])):
        PruningSampler(**given)
    if "rows" not in wrong and "samples" not in wrong:
        with pytest.raises(UsageError, match=named.format(*list(wrong.items())[-1])):
            StreamPruner(samples=given.pop("rows"), **given)
    if "batch_size" in wrong:
        with pytest.raises(UsageError, match="batch_size=7.9; give whole numbers"):
            make_jest(batch_size=7.9)
    sampler = PruningSampler(16, policy=Full(), batch_size=8.0, epochs=2.0)
    assert [type(number) for number in (sampler.epochs, sampler.batch_size)] == [int, int]


def test_numbers_of_numpy_can_be_saved() -> None:
    sampler = PruningSampler(np.int64(4), policy=Full(), batch_size=np.int64(2), epochs=np.int64(2), seed=np.int64(1))
    for rows in sampler:
        sampler.reduce(rows, torch.ones(len(rows), 1))
    assert sampler.state_dict()["log"]
