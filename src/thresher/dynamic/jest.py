"""JEST: batches chosen out of super-batches (arXiv 2406.17711); the choice, and the sampler that makes it.

What a row adds to a batch is the sum of the batch's losses with the row, minus the sum without it. A batch is drawn in
chunks without replacement, with probabilities proportional to the exponential of what a row adds under the model in
training minus what it adds under the reference. For the sigmoid loss, a sum over pairs, this is the published formula:
``S_ii + sum over the chosen k of (S_ik + S_ki)``. For the softmax loss it is computed from the logsumexp of each row
and column over the chosen rows. The first softmax chunk, before any row is chosen, is drawn by the losses in the whole
super-batch. The paper describes the sigmoid loss.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from thresher.dynamic.ledger import Ints, Losses
from thresher.dynamic.loop import as_array, rank_and_world_size, refuse_fractions, untraced
from thresher.dynamic.loss import everywhere, unit
from thresher.dynamic.policies.jest import Jest
from thresher.dynamic.policy import Plan
from thresher.dynamic.reference_features import ReferenceFeatures
from thresher.dynamic.sampler import PruningSampler
from thresher.errors import MissingExtraError, UsageError

try:
    import torch  # noqa: TID253
    import torch.nn.functional as F  # noqa: TID253
except ImportError:
    raise MissingExtraError("pruning in the training loop", "torch") from None


class Added(Protocol):
    """What each row of a super-batch adds to the loss of the rows chosen so far."""

    def first(self) -> torch.Tensor:
        """Return the score of each row before any is chosen, (B,)."""
        ...

    def then(self, new_M: torch.Tensor) -> torch.Tensor:
        """Add rows (M,) to those chosen; return what each row would add to them, (B,)."""
        ...


class SigmoidAdded:
    """For the sigmoid loss, a sum over pairs."""

    def __init__(self, image_BD: torch.Tensor, text_BD: torch.Tensor, scale: Any, bias: Any) -> None:
        """Compute the losses of all pairs; features are (B, D) with unit rows."""
        logits_BB = scale * image_BD @ text_BD.T + bias
        logits_BB.diagonal().neg_()
        self._pairs_BB = F.softplus(logits_BB)
        self._sums_B = self._pairs_BB.diagonal().clone()

    def first(self) -> torch.Tensor:
        """Return the losses of the rows' own pairs."""
        return self._sums_B

    def then(self, new_M: torch.Tensor) -> torch.Tensor:
        """Return the losses of the row's own pair and its pairs with the chosen rows."""
        self._sums_B = self._sums_B + self._pairs_BB[:, new_M].sum(1) + self._pairs_BB[new_M].sum(0)
        return self._sums_B


class SoftmaxAdded:
    """For the softmax loss: the mean of both directions."""

    def __init__(self, image_BD: torch.Tensor, text_BD: torch.Tensor, scale: Any) -> None:
        """Compute the logits of all pairs; features are (B, D) with unit rows."""
        self._logits_BB = scale * image_BD @ text_BD.T
        self._own_B = self._logits_BB.diagonal().clone()
        self._chosen = torch.empty(0, dtype=torch.long, device=image_BD.device)

    def first(self) -> torch.Tensor:
        """Return the loss of each row in the whole super-batch."""
        return (self._logits_BB.logsumexp(1) + self._logits_BB.logsumexp(0)) / 2 - self._own_B

    def then(self, new_M: torch.Tensor) -> torch.Tensor:
        """Return the row's own loss among the chosen, and how much it raises theirs."""
        self._chosen = torch.cat([self._chosen, new_M])
        added_B = torch.zeros_like(self._own_B)
        for logits_BB in (self._logits_BB, self._logits_BB.T):
            to_BM, from_MB = logits_BB[:, self._chosen], logits_BB[self._chosen]
            added_B += F.softplus(to_BM.logsumexp(1) - self._own_B)
            added_B += F.softplus(from_MB - to_BM[self._chosen].logsumexp(1)[:, None]).sum(0)
        return added_B / 2


class _Alone:
    """Losses that do not depend on the other rows: a reference with one number per row."""

    def __init__(self, losses_B: torch.Tensor) -> None:
        self._losses_B = losses_B

    def first(self) -> torch.Tensor:
        return self._losses_B

    def then(self, new_M: torch.Tensor) -> torch.Tensor:
        return self._losses_B


def choose(learner: Added | None, reference: Added | None, count: int, noise_CB: torch.Tensor) -> torch.Tensor:
    """Choose rows of a super-batch in chunks, each by what the rows add to those chosen before.

    Args:
        learner: What rows add under the model in training; None to leave it out.
        reference: What they add under the reference, which is subtracted; None to leave it out.
        count: Number of rows to choose, at most B.
        noise_CB: (C, B) Gumbel noise for C chunks; zeros choose the highest scores. Chunks differ by at most one row.

    Returns:
        (count,) positions in the super-batch, ascending.
    """
    chunks, rows = noise_CB.shape
    parts = [part for part in ((1.0, learner), (-1.0, reference)) if part[1] is not None]
    taken_B = torch.zeros(rows, dtype=torch.bool, device=noise_CB.device)
    new_M: torch.Tensor | None = None
    for chunk in range(chunks):
        size = count * (chunk + 1) // chunks - count * chunk // chunks
        if not size:
            continue
        scores_B = torch.zeros(rows, device=noise_CB.device)
        for sign, added in parts:
            scores_B = scores_B + sign * (added.first() if new_M is None else added.then(new_M))  # type: ignore[union-attr]
        scores_B = torch.nan_to_num(scores_B + noise_CB[chunk]).masked_fill(taken_B, -torch.inf)
        new_M = scores_B.topk(size).indices
        taken_B[new_M] = True
    return torch.nonzero(taken_B).ravel()


class JestSampler(PruningSampler):
    """A batch sampler of super-batches, which chooses the rows of each to train on; for the policy ``Jest``.

        for rows, (image, text) in loader:  # a super-batch
            with torch.no_grad():
                features = model(image, text)
            at = sampler.choose(rows, *features, scale)
            losses = clip_losses(*model(image[at], text[at]), scale)
            sampler.reduce(rows[at], losses).backward()

    A step is one super-batch; an epoch is all rows once in super-batches. The log counts ``samples`` trained on and
    ``scored`` forward passes. Rows that are scored and not trained on leave no record in the ledger. Checkpoints,
    schedules and lengths are as for :class:`~thresher.dynamic.sampler.PruningSampler`. On several ranks the rows are
    chosen from the whole super-batch, so the choice does not depend on the number of ranks; each rank trains on those
    that it holds, which may be a few more or less than on the others.

    Attributes:
        batch_size: Rows of a super-batch over all ranks.
        chosen: Rows of a batch that is trained on, over all ranks.
    """

    chosen: int
    _chooses = True
    policy: Jest
    _count: int  # rows chosen from the super-batch over all ranks
    _at: Ints | None  # positions of the chosen rows in this rank's slice of the super-batch

    def __init__(
        self,
        rows: int,
        *,
        policy: Jest,
        batch_size: int,
        epochs: int | None = None,
        samples: int | None = None,
        seed: int = 0,
        reference: ReferenceFeatures | npt.ArrayLike | None = None,
    ) -> None:
        """Plan epoch 0.

        Args:
            rows: N, the number of rows of the dataset.
            policy: The policy.
            batch_size: Rows to train on in a step; a super-batch has ``batch_size / policy.keep`` rows, or N.
            epochs: Length of the run in passes over the data, or None.
            samples: Length of the run in samples trained on, or None. Give exactly one of the two.
            seed: Seed of orders and draws.
            reference: Embeddings of the reference; or losses (N,), NaN if unknown, by which rows are chosen one by one
                instead of jointly (unknown ones count as the mean).

        Raises:
            UsageError: A value is not allowed, or the reference has another number of rows.
        """
        if not isinstance(policy, Jest):
            raise UsageError(f"policy {policy.name} plans epochs; give it to PruningSampler, and Jest to JestSampler")
        refuse_fractions(rows=rows, batch_size=batch_size, samples=samples)
        if batch_size >= rows:
            raise UsageError(
                f"a batch of {batch_size:,} of {rows:,} rows leaves nothing to choose; give a batch of "
                f"{max(1, round(policy.keep * rows)):,} or less"
            )
        wide = min(round(batch_size / policy.keep), rows)
        self.chosen, self._at = min(batch_size, wide), None
        self._reference: ReferenceFeatures | Losses | None = None
        if isinstance(reference, ReferenceFeatures):
            self._reference = reference
        elif reference is not None:
            losses_N = np.asarray(reference, np.float32)
            if losses_N.ndim != 1 or not np.isfinite(losses_N).any():
                raise UsageError(f"reference losses of shape {losses_N.shape}; give (N,) numbers, some of them finite")
            finite_N = np.isfinite(losses_N)
            self._reference = np.where(finite_N, losses_N, losses_N[finite_N].mean()).astype(np.float32)
        elif policy.score != "hard-learner":
            raise UsageError("Jest needs a reference: embeddings or losses; or score='hard-learner'")
        if self._reference is not None:
            known = self._reference.rows if isinstance(self._reference, ReferenceFeatures) else len(self._reference)
            if known != rows:
                raise UsageError(f"a reference of {known:,} rows for {rows:,} rows of data; give one of these data")
        passes = None if samples is None else max(1, samples // self.chosen) * wide  # the run in rows scored
        super().__init__(rows, policy=policy, batch_size=wide, epochs=epochs, samples=passes, seed=seed)

    @untraced
    def choose(self, rows_B: Any, image_BD: Any, text_BD: Any, scale: Any, bias: Any = None) -> torch.Tensor:
        """Choose the rows of this rank's super-batch to train on.

        Args:
            rows_B: (B,) row ids, as the loader returned them.
            image_BD: (B, D) features of the model in training, without gradients, of any norm.
            text_BD: (B, D) features of the captions.
            scale: The factor of the cosines.
            bias: The number added to them, for the sigmoid loss; None for the softmax loss.

        Returns:
            The positions of the chosen rows in ``rows_B``, ascending, on the CPU. Pass these rows to :meth:`reduce`.

        Raises:
            UsageError: The rows are not those of the next super-batch, or shapes do not fit.
        """
        self._in_force()
        rank, ranks = rank_and_world_size()
        lo, hi = self._span(self.step, rank, ranks)
        self._check_rows(as_array(rows_B), self._order[lo:hi])
        start, end = self._bound(self.step), self._bound(self.step + 1)
        rows = self._order[start:end]
        with torch.no_grad():
            (image, text), _ = everywhere(ranks > 1, *unit(image=image_BD, text=text_BD))
            if len(image) != len(rows):
                raise UsageError(f"features of {len(image):,} rows for a super-batch of {len(rows):,}")
            learner = reference = None
            if self.policy.score != "easy-reference":
                learner = _added(image, text, scale, bias)
            if isinstance(self._reference, ReferenceFeatures):
                known = self._reference.gather(rows)
                there = [torch.from_numpy(each).to(image.device) for each in known]
                known_image, known_text = unit(image=there[0], text=there[1])
                reference = _added(known_image, known_text, scale, bias)
            elif self._reference is not None:
                reference = _Alone(torch.from_numpy(self._reference[rows]).to(image.device))
                learner = None if learner is None else _Alone(learner.first())
            if self.policy.score == "hard-learner":
                reference = None
            draws = self._rng("choose", self.epoch, self.step).gumbel(size=(self.policy.chunks, len(rows)))
            noise_CB = torch.from_numpy(draws.astype(np.float32)).to(image.device)
            count = max(1, round(self.chosen * len(rows) / self.batch_size))
            at_M = choose(learner, reference, count, noise_CB).cpu().numpy()
        self._count = count
        self._at = at_M[(at_M >= lo - start) & (at_M < hi - start)] - (lo - start)
        return torch.from_numpy(self._at)

    @untraced
    def reduce(self, rows_B: Any, losses_BR: torch.Tensor) -> torch.Tensor:
        """Record the losses of the chosen rows, and return their mean, to call ``backward`` on.

        Args:
            rows_B: The chosen rows of this rank: ``rows[at]``.
            losses_BR: Their losses, (B, R), R = 1 or 2.

        Raises:
            UsageError: The rows are not those that :meth:`choose` has returned, or the losses have another shape.
        """
        if self._at is None:
            raise UsageError("no rows are chosen; call choose(rows, ...) before reduce(rows[at], losses)")
        at, self._at = self._at, None
        return self._recorded(rows_B, losses_BR, at, self._count)

    def _trained(self, rows_B: Ints, losses_BR: Losses) -> tuple[Ints, Losses]:
        chosen_B = ~np.isnan(losses_BR[:, 0])  # losses of chosen rows that are not finite are stored as infinity
        return rows_B[chosen_B], losses_BR[chosen_B]

    def _entry(self, plan: Plan, recorded: dict[str, Any], passed: int) -> tuple[int, dict[str, Any]]:
        return int(recorded["samples"]), {**recorded, "scored": passed}


def _added(image_BD: torch.Tensor, text_BD: torch.Tensor, scale: Any, bias: Any) -> Added:
    scale = scale.float() if isinstance(scale, torch.Tensor) else scale
    if bias is None:
        return SoftmaxAdded(image_BD, text_BD, scale)
    return SigmoidAdded(image_BD, text_BD, scale, bias.float() if isinstance(bias, torch.Tensor) else bias)
