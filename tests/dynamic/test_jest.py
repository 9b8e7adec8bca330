"""JEST: the choice against sums over the whole batch, and the sampler in a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from thresher.dynamic.jest import JestSampler, SigmoidAdded, SoftmaxAdded, choose
from thresher.dynamic.loss import clip_losses, siglip_losses
from thresher.dynamic.policies.full import Full
from thresher.dynamic.policies.jest import Jest
from thresher.dynamic.reference_features import ReferenceFeatures
from thresher.dynamic.sampler import PruningSampler
from thresher.errors import UsageError

B, D = 40, 8


def features(seed: int, rows: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(rows, D))
    image, text = own + rng.normal(size=(rows, D)), own + rng.normal(size=(rows, D))
    return tuple(F.normalize(torch.from_numpy(each).float(), dim=1) for each in (image, text))


def total(kind: str, image: torch.Tensor, text: torch.Tensor, rows: list[int]) -> float:
    """The sum of the losses of a batch, by the losses that training uses."""
    if not rows:
        return 0.0
    if kind == "sigmoid":
        return float(siglip_losses(image[rows], text[rows], 10.0, -3.0)[:, 0].sum())
    return float(clip_losses(image[rows], text[rows], 10.0).mean(1).sum())


def added(kind: str, image: torch.Tensor, text: torch.Tensor) -> SigmoidAdded | SoftmaxAdded:
    return SigmoidAdded(image, text, 10.0, -3.0) if kind == "sigmoid" else SoftmaxAdded(image, text, 10.0)


def slowly(kind: str, score: str, learner, reference, count: int, noise_CB: np.ndarray) -> list[int]:
    """Choose chunk by chunk; what a row adds is the difference of two sums over whole batches."""
    taken: list[int] = []
    for chunk, noise_B in enumerate(noise_CB):
        size = count * (chunk + 1) // len(noise_CB) - count * chunk // len(noise_CB)
        scores = np.full(B, -np.inf)
        for row in set(range(B)) - set(taken):
            gains = []
            for model in (learner, reference):
                if not taken and kind == "softmax":
                    gains.append(float(clip_losses(*model, 10.0).mean(1)[row]))
                else:
                    gains.append(total(kind, *model, [*taken, row]) - total(kind, *model, taken))
            sign = {"learnability": (1, -1), "easy-reference": (0, -1), "hard-learner": (1, 0)}[score]
            scores[row] = sign[0] * gains[0] + sign[1] * gains[1] + noise_B[row]
        taken += np.argsort(-scores, kind="stable")[:size].tolist()
    return sorted(taken)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("score", ["learnability", "easy-reference", "hard-learner"])
@pytest.mark.parametrize(("count", "chunks"), [(8, 4), (10, 3), (5, 1), (3, 8)])
def test_rows_are_chosen_by_what_they_add(kind: str, score: str, count: int, chunks: int) -> None:
    learner, reference = features(1), features(2)
    noise = np.random.default_rng(3).gumbel(size=(chunks, B)).astype(np.float32)
    parts = [added(kind, *learner), added(kind, *reference)]
    given = (None if score == "easy-reference" else parts[0], None if score == "hard-learner" else parts[1])
    found = choose(*given, count, torch.from_numpy(noise)).tolist()
    assert found == slowly(kind, score, learner, reference, count, noise)
    assert len(set(found)) == count


def test_the_sigmoid_choice_is_the_published_formula() -> None:
    """Scores S_ii + sum over the chosen k of S_ik + S_ki, as in the paper's listing."""
    learner, reference = features(1), features(2)
    pairs = []
    for image, text in (learner, reference):
        signs = 2 * np.eye(B) - 1
        logits = (10.0 * image @ text.T - 3.0).numpy()
        pairs.append(np.log1p(np.exp(-signs * logits)))
    scores, taken = pairs[0] - pairs[1], np.zeros(B, bool)
    noise = np.random.default_rng(3).gumbel(size=(4, B)).astype(np.float32)
    for chunk in range(4):
        logits = scores.diagonal() + scores[:, taken].sum(1) + scores[taken].sum(0) + noise[chunk]
        taken[np.argsort(np.where(taken, np.inf, -logits))[:2]] = True
    found = choose(added("sigmoid", *learner), added("sigmoid", *reference), 8, torch.from_numpy(noise))
    assert found.tolist() == np.flatnonzero(taken).tolist()


# The sampler

N, BATCH = 210, 8


class Toy:
    """Two linear towers and their data."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.image, self.text = features(5, N)
        self.model = torch.nn.ModuleList([torch.nn.Linear(D, D), torch.nn.Linear(D, D)])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def encode(self, rows) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model[0](self.image[rows]), self.model[1](self.text[rows])


REFERENCE = ReferenceFeatures.of(*(each.numpy() for each in features(6, N)))


def make(**how) -> JestSampler:
    given = {"policy": Jest(keep=0.2, chunks=4), "batch_size": BATCH, "epochs": 2, "seed": 1, "reference": REFERENCE}
    return JestSampler(N, **{**given, **how})


def train(sampler: JestSampler, toy: Toy, steps: int | None = None, bias: float | None = None) -> list[list[int]]:
    done: list[list[int]] = []
    while sampler.plan is not None:
        for rows in list(sampler):
            with torch.no_grad():
                scored = toy.encode(rows)
            at = sampler.choose(rows, *scored, 10.0, bias)
            chosen = torch.tensor(rows)[at]
            image, text = toy.encode(chosen)
            losses = clip_losses(image, text, 10.0) if bias is None else siglip_losses(image, text, 10.0, bias)
            toy.optimizer.zero_grad()
            mean = sampler.reduce(chosen, losses)
            torch.testing.assert_close(mean, losses.mean())
            mean.backward()
            toy.optimizer.step()
            done.append(chosen.tolist())
            if len(done) == steps:
                return done
    return done


@pytest.mark.parametrize("bias", [None, -3.0])
def test_an_epoch_scores_all_rows_and_trains_on_a_share(bias: float | None) -> None:
    sampler = make()
    assert (sampler.batch_size, sampler.chosen) == (40, BATCH)
    done = train(sampler, Toy(), bias=bias)
    assert [len(batch) for batch in done] == [BATCH] * 2 * (N // 40)
    for entry in sampler.log():
        assert (entry["samples"], entry["scored"], entry["not_finite"]) == (40, 200, 0)
        assert (entry["rows"], entry["total"]) == (40, N)
    assert sampler.log()[-1]["pruned_so_far"] == pytest.approx(1 - 40 / N)
    trained = {row for batch in done for row in batch}
    assert set(np.flatnonzero(sampler.ledger.seen_N >= 0)) == trained
    assert np.isfinite(sampler.ledger.loss_N[sorted(trained)]).all()


def test_a_run_of_samples_is_as_long_in_samples_trained_on() -> None:
    sampler = make(epochs=None, samples=100)
    assert sum(map(len, train(sampler, Toy()))) == 96
    assert sampler.progress == 1


def test_a_run_resumes_in_the_middle_of_an_epoch() -> None:
    whole = make()
    all_done = train(whole, Toy())
    toy, cut = Toy(), make()
    done = train(cut, toy, steps=3)
    again = make()
    again.load_state_dict(cut.state_dict())
    assert done + train(again, toy) == all_done
    for name, array in whole.ledger.state().items():
        np.testing.assert_array_equal(array, again.ledger.state()[name])
    assert again.log() == whole.log()


def test_losses_of_a_reference_choose_row_by_row() -> None:
    losses = np.linspace(0, 30, N)[np.random.default_rng(0).permutation(N)]
    losses[5] = np.nan
    sampler = make(policy=Jest(keep=0.2, score="easy-reference", chunks=1), reference=losses)
    filled = np.where(np.isnan(losses), np.nanmean(losses), losses).astype(np.float32)
    rows = next(iter(sampler))
    at = sampler.choose(rows, *Toy().encode(rows), 10.0)
    noise = sampler._rng("choose", 0, 0).gumbel(size=(1, 40)).astype(np.float32)
    assert at.tolist() == sorted(np.argsort(-(noise[0] - filled[rows]), kind="stable")[:8].tolist())


def test_steps_without_a_finite_loss_are_counted() -> None:
    sampler, toy = make(epochs=1), Toy()
    for rows in sampler:
        at = sampler.choose(rows, *toy.encode(rows), 10.0)
        losses = torch.ones(len(at), 2)
        losses[0] = torch.nan
        sampler.reduce(torch.tensor(rows)[at], losses)
    assert (sampler.log()[0]["samples"], sampler.log()[0]["not_finite"]) == (40, 5)


def test_misuse_is_refused() -> None:
    sampler, toy = make(), Toy()
    rows = next(iter(sampler))
    with pytest.raises(UsageError, match="call choose"):
        sampler.reduce(rows[:8], torch.ones(8, 2))
    with pytest.raises(UsageError, match="are not those of step 0"):
        sampler.choose(rows[::-1], *toy.encode(rows), 10.0)
    with pytest.raises(UsageError, match="features of 39 rows for a super-batch of 40"):
        sampler.choose(rows, *toy.encode(rows[:39]), 10.0)
    at = sampler.choose(rows, *toy.encode(rows), 10.0)
    with pytest.raises(UsageError, match="are not those of step 0 of epoch 0, 8 ids"):
        sampler.reduce(rows[:8] if at.tolist() != list(range(8)) else rows[1:9], torch.ones(8, 2))
    with pytest.raises(UsageError, match="a batch of 210 of 210 rows leaves nothing to choose; give a batch of 42 or"):
        make(batch_size=N)
    with pytest.raises(UsageError, match="Jest needs a reference"):
        make(reference=None)
    with pytest.raises(UsageError, match="a reference of 3 rows for 210"):
        make(reference=np.ones(3))
    with pytest.raises(UsageError, match="give it to PruningSampler"):
        make(policy=Full())
    with pytest.raises(UsageError, match="chooses every batch by scoring a super-batch, which PruningSampler does not"):
        PruningSampler(N, policy=Jest(), batch_size=8, epochs=1)


# Reference features


def test_features_of_a_pool_are_found_by_key(pool, rows, tmp_path) -> None:
    image, text = rows(90, seed=1), rows(90, seed=2)
    order = np.random.default_rng(0).permutation(90)
    keys = [f"k{row}" for row in order[:60]]
    for kind in ("npy", "parquet"):
        where = pool(image, text, {"uid": [f"k{row}" for row in range(90)]}, name=kind)
        if kind == "parquet":
            where = in_parquet(where, tmp_path)
        found = ReferenceFeatures.of_pool(where, keys, tmp_path)
        at = np.array([3, 59, 0])
        for got, given in zip(found.gather(at), (image, text), strict=True):
            unit = given / np.linalg.norm(given, axis=1, keepdims=True)
            np.testing.assert_allclose(got, unit[order[at]], rtol=1e-5)
        with pytest.raises(UsageError, match="rows 3 to 60; the reference has rows 0 to 59"):
            found.gather([3, 60])
        with pytest.raises(UsageError, match="1 of 2 rows of the data are not in it, the first 'other'"):
            ReferenceFeatures.of_pool(where, ["k3", "other"], tmp_path)
        with pytest.raises(UsageError, match="several of the data have the key 'k3'; give every row a key of its own"):
            ReferenceFeatures.of_pool(where, ["k3", "k4", "k3"], tmp_path)


def in_parquet(store, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from thresher import open_store

    columns = {"uid": [key for _, keys in store.keys() for key in keys]}
    for name in ("image", "text"):
        columns[f"{name}_embedding"] = list(store.vectors_at(name, np.arange(store.total)))
    (tmp_path / "in-parquet").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), tmp_path / "in-parquet" / "pool.parquet", row_group_size=32)
    return open_store(str(tmp_path / "in-parquet"))
