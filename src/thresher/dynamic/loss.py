"""Contrastive losses per sample and direction, for pruning in the training loop.

Shapes: B rows of this rank's batch, N rows over all ranks (N = B without ``gather``), D dimensions, K rows of a queue,
R directions.

Every loss returns (B, R) float32, differentiable; its mean over both axes is the usual training loss. Features may have
any norm and any floating-point dtype: they are converted to float32 and normalized here, which has no effect if the
model already does so. Products and softmax are float32 under autocast too. Very small losses keep their precision
(1e-20 is not rounded to 0), so they can still be ranked.

With ``gather=True`` (CLIP, SigLIP, DRRho, distillation, MoCo v3, SimCLR) the softmax or sum is over the features of all
ranks of the default process group. The losses returned are those of this rank's rows, and gradients flow back to the
ranks that the features came from. Averaging gradients over ranks, as DistributedDataParallel does, gives the gradient
of the mean over all N rows if every rank has the same B. If B differs between ranks (each call gathers the sizes
first), pass the weight ``B * ranks / N`` for every row to :func:`reduce` to get that mean.
"""

from __future__ import annotations

import math
from typing import Any

from thresher.errors import MissingExtraError, UsageError

try:
    import torch  # noqa: TID253
    import torch.distributed as dist  # noqa: TID253
    import torch.nn.functional as F  # noqa: TID253
except ImportError:
    raise MissingExtraError("pruning in the training loop", "torch") from None

_MASKED = torch.finfo(torch.float32).min  # a logit without effect; finite, so that a batch of one has gradients


def clip_losses(
    image_BD: torch.Tensor, text_BD: torch.Tensor, scale: float | torch.Tensor, *, gather: bool = False
) -> torch.Tensor:
    """Return the softmax cross-entropy of each pair, image to text and text to image (Radford et al., 2103.00020).

    Args:
        image_BD: (B, D) features.
        text_BD: (B, D) features; row i belongs to image i.
        scale: The factor of the cosines, one number: ``logit_scale.exp()``, not its logarithm.
        gather: Contrast with the rows of all ranks.

    Returns:
        (B, 2). The mean equals open_clip's ``ClipLoss``.
    """
    (image_BD, text_BD), scale = unit(image=image_BD, text=text_BD), _number("scale", scale)
    (images_ND, texts_ND), start = everywhere(gather, image_BD, text_BD)
    positive_B = scale * (image_BD * text_BD).sum(1)
    to_text_BN, to_image_BN = _both_ways(scale * image_BD, text_BD, scale * images_ND, texts_ND, start)
    return torch.stack([_softmax_loss(positive_B, to_text_BN), _softmax_loss(positive_B, to_image_BN)], dim=1)


def siglip_losses(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    scale: float | torch.Tensor,
    bias: float | torch.Tensor,
    *,
    gather: bool = False,
) -> torch.Tensor:
    """Return the sigmoid losses of each row's pairs, summed over the row (Zhai et al., 2303.15343).

    Direction 0 sums over image i with every text, direction 1 over text i with every image. So every pair is in one
    row of each direction. SigLIP divides the sum over all pairs by the batch size, so the mean here is its loss.

    Args:
        image_BD: (B, D) features.
        text_BD: (B, D) features; row i belongs to image i.
        scale: The factor of the cosines, one number: ``logit_scale.exp()``, not its logarithm.
        bias: A number added to the scaled cosines (-10 at the start of training, as published).
        gather: Contrast with the rows of all ranks.

    Returns:
        (B, 2). The mean equals SigLIP's loss.
    """
    image_BD, text_BD = unit(image=image_BD, text=text_BD)
    scale, bias = _number("scale", scale), _number("bias", bias)
    (images_ND, texts_ND), start = everywhere(gather, image_BD, text_BD)
    positive_B = F.softplus(-scale * (image_BD * text_BD).sum(1) - bias)
    both = _both_ways(scale * image_BD, text_BD, scale * images_ND, texts_ND, start, bias)
    return torch.stack([positive_B + F.softplus(others_BN).sum(1) for others_BN in both], dim=1)


def drrho_losses(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    reference_image_BE: torch.Tensor,
    reference_text_BE: torch.Tensor,
    temperature: float = 0.01,
    epsilon: float = 1e-4,
    *,
    gather: bool = False,
) -> torch.Tensor:
    """Return the DRRho loss of each pair: a contrast of what the model says beyond a reference (2505.06699).

    With cosines s of the model and r of the reference, direction 0 of pair i is ``temperature * log(epsilon + mean over
    j != i of exp(((s_ij - s_ii) - (r_ij - r_ii)) / temperature))``; direction 1 has ``ji`` for ``ij``. A pair that the
    reference does not match is hardly pulled together, and a caption that the reference finds as fitting is not pushed
    away. No gradient flows to the reference. Losses are at least ``temperature * log(epsilon)``, which is negative.

    Published with a moving average of the mean over the epochs and a learned temperature. For runs of up to 7 epochs
    the published average is the mean of the batch, as here; the temperature here is constant.

    Args:
        image_BD: (B, D) features.
        text_BD: (B, D) features; row i belongs to image i.
        reference_image_BE: (B, E) features of the same images under the reference, of any dimension E.
        reference_text_BE: (B, E) features of the captions.
        temperature: The divisor of the cosines, above 0.
        epsilon: Added to the mean, above 0; limits how far a pair is optimized.
        gather: Contrast with the rows of all ranks.

    Returns:
        (B, 2).
    """
    temperature = _temperature(temperature)
    if not epsilon > 0:
        raise UsageError(f"epsilon must be above 0; got {epsilon}")
    image_BD, text_BD = unit(image=image_BD, text=text_BD)
    known = unit(reference_image=reference_image_BE.detach(), reference_text=reference_text_BE.detach())
    _same_rows("reference", known[0], image_BD)
    # One product gives s - r.
    image_BF, text_BF = torch.cat([image_BD, -known[0]], dim=1), torch.cat([text_BD, known[1]], dim=1)
    (images_NF, texts_NF), start = everywhere(gather, image_BF, text_BF)
    scale = 1 / temperature
    positive_B = scale * (image_BF * text_BF).sum(1)
    both = _both_ways(scale * image_BF, text_BF, scale * images_NF, texts_NF, start)
    others = math.log(max(len(texts_NF) - 1, 1))
    least = torch.full_like(positive_B, math.log(epsilon))
    losses = [torch.logaddexp(each.logsumexp(1) - positive_B - others, least) for each in both]
    return temperature * torch.stack(losses, dim=1)


def distill_losses(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    teacher_image_BE: torch.Tensor,
    teacher_text_BE: torch.Tensor,
    scale: float | torch.Tensor,
    temperature: float = 0.01,
    weight: float = 1.0,
    *,
    gather: bool = False,
) -> torch.Tensor:
    """Return the losses of MobileCLIP: how far the model's matching of a batch is from a teacher's (2311.17049).

    With p the softmax of a row of the teacher's cosines divided by ``temperature``, and q that of the model's cosines
    times ``scale``, the loss is ``weight * KL(p || q) + (1 - weight) * clip``, where clip is that of
    :func:`clip_losses`. Direction 0 is image i against all texts, direction 1 text i against all images. No gradient
    flows to the teacher.

    MobileCLIP and open_clip's ``DistillClipLoss`` have the cross-entropy of p and q in place of KL. It has the same
    gradient, but also contains the entropy of p: a row would count as hard because its teacher is undecided. Published
    with the mean of the softmax of two teachers; here there is one.

    Args:
        image_BD: (B, D) features.
        text_BD: (B, D) features; row i belongs to image i.
        teacher_image_BE: (B, E) features of the same images under the teacher, of any dimension E.
        teacher_text_BE: (B, E) features of the captions.
        scale: The factor of the cosines of the model, one number: ``logit_scale.exp()``, not its logarithm.
        temperature: The divisor of the teacher's cosines, above 0 (0.01 as published).
        weight: Share of the distillation, above 0 and up to 1 (1 as published: distillation alone).
        gather: Match with the rows of all ranks.

    Returns:
        (B, 2), 0 or more.
    """
    scale, temperature = _number("scale", scale), _temperature(temperature)
    if not 0 < weight <= 1:
        raise UsageError(f"weight = {weight}; give a number above 0 and up to 1")
    image_BD, text_BD = unit(image=image_BD, text=text_BD)
    known = unit(teacher_image=teacher_image_BE.detach(), teacher_text=teacher_text_BE.detach())
    _same_rows("teacher", known[0], image_BD)
    dims = [image_BD.shape[1], known[0].shape[1]]
    joined = (torch.cat([image_BD, known[0]], dim=1), torch.cat([text_BD, known[1]], dim=1))
    together, _ = everywhere(gather, *joined)
    (images_ND, teacher_images_NE), (texts_ND, teacher_texts_NE) = (each.split(dims, dim=1) for each in together)
    losses = []
    for rows_BD, columns_ND, rows_BE, columns_NE in (
        (image_BD, texts_ND, known[0], teacher_texts_NE),
        (text_BD, images_ND, known[1], teacher_images_NE),
    ):
        model_BN = _products(scale * rows_BD, columns_ND).log_softmax(1)
        teacher_BN = _products(rows_BE / temperature, columns_NE).log_softmax(1)
        losses.append(F.kl_div(model_BN, teacher_BN, reduction="none", log_target=True).sum(1))
    losses_BR = weight * torch.stack(losses, dim=1).clamp(min=0)  # rounding may leave a little less than 0
    if weight < 1:
        losses_BR = losses_BR + (1 - weight) * clip_losses(image_BD, text_BD, scale, gather=gather)
    return losses_BR


def moco_v2_losses(
    query_BD: torch.Tensor, key_BD: torch.Tensor, queue_KD: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the InfoNCE loss of each query: its key against a queue (He et al., 1911.05722; Chen et al., 2003.04297).

    As published, no gradient flows to keys and queue. The queue may be overwritten before ``backward``.

    Args:
        query_BD: (B, D) features.
        key_BD: (B, D) features of the other view from the momentum encoder.
        queue_KD: (K, D) earlier keys, one per row.
        temperature: The divisor of the cosines, above 0 (0.2 in MoCo v2, 0.07 in MoCo).

    Returns:
        (B, 1). The mean equals MoCo's loss.
    """
    query_BD, key_BD = unit(query=query_BD, key=key_BD.detach())
    if queue_KD.ndim != 2 or queue_KD.shape[1] != query_BD.shape[1]:
        hint = "; MoCo's own buffer is (D, K): pass queue.T" if queue_KD.shape[:1] == query_BD.shape[1:] else ""
        expected = f"(K, {query_BD.shape[1]}), one key per row"
        raise UsageError(f"queue must be {expected}; got {tuple(queue_KD.shape)}{hint}")
    query_BD = query_BD / _temperature(temperature)
    (queue_KD,) = unit(queue=queue_KD.detach())
    losses_B = _softmax_loss((query_BD * key_BD).sum(1), _products(query_BD, queue_KD))
    return losses_B[:, None]


def moco_v3_losses(
    q1_BD: torch.Tensor,
    q2_BD: torch.Tensor,
    k1_BD: torch.Tensor,
    k2_BD: torch.Tensor,
    temperature: float,
    *,
    gather: bool = False,
) -> torch.Tensor:
    """Return the InfoNCE loss of each query against the other view's keys of the batch (Chen et al., 2104.02057).

    The published loss is a sum over directions, ctr(q1, k2) + ctr(q2, k1), of cross-entropies scaled by
    2 * temperature. An entry here is twice its term, so that the mean equals that sum. As published, no gradient flows
    to the keys.

    Args:
        q1_BD: (B, D) predictions for view 1.
        q2_BD: (B, D) predictions for view 2.
        k1_BD: (B, D) features of view 1 from the momentum encoder.
        k2_BD: (B, D) features of view 2 from the momentum encoder.
        temperature: The divisor of the cosines, above 0 (0.2 for ViT-B, 1.0 for ResNet-50).
        gather: Contrast with the keys of all ranks.

    Returns:
        (B, 2): q1 with k2, q2 with k1. The mean equals MoCo v3's loss.
    """
    temperature = _temperature(temperature)
    q1_BD, q2_BD, k1_BD, k2_BD = unit(q1=q1_BD, q2=q2_BD, k1=k1_BD.detach(), k2=k2_BD.detach())
    (keys1_ND, keys2_ND), start = everywhere(gather, k1_BD, k2_BD)
    losses = []
    for query_BD, key_BD, keys_ND in ((q1_BD, k2_BD, keys2_ND), (q2_BD, k1_BD, keys1_ND)):
        query_BD = query_BD / temperature
        losses.append(_softmax_loss((query_BD * key_BD).sum(1), _others(query_BD, keys_ND, start)))
    return 4 * temperature * torch.stack(losses, dim=1)


def simclr_losses(
    z1_BD: torch.Tensor, z2_BD: torch.Tensor, temperature: float, *, gather: bool = False
) -> torch.Tensor:
    """Return the NT-Xent loss of each view: its other view against all other rows of both (Chen et al., 2002.05709).

    Args:
        z1_BD: (B, D) projections of view 1.
        z2_BD: (B, D) projections of view 2.
        temperature: The divisor of the cosines, above 0 (0.1 to 0.5 as published).
        gather: Contrast with the rows of all ranks.

    Returns:
        (B, 2). The mean equals SimCLR's loss.
    """
    scale = 1 / _temperature(temperature)
    z1_BD, z2_BD = unit(z1=z1_BD, z2=z2_BD)
    (views1_ND, views2_ND), start = everywhere(gather, z1_BD, z2_BD)
    positive_B = scale * (z1_BD * z2_BD).sum(1)
    across1_BN, across2_BN = _both_ways(scale * z1_BD, z2_BD, scale * views1_ND, views2_ND, start)
    within1_BN, within2_BN = _others(scale * z1_BD, views1_ND, start), _others(scale * z2_BD, views2_ND, start)
    losses = [_softmax_loss(positive_B, across1_BN, within1_BN), _softmax_loss(positive_B, across2_BN, within2_BN)]
    return torch.stack(losses, dim=1)


def reduce(losses_BR: torch.Tensor, weights_B: torch.Tensor | None = None) -> torch.Tensor:
    """Return a scalar to call ``backward`` on: sum(weight * loss) / B, where the loss is the mean over directions.

    The divisor is the number of rows, not the sum of weights: a row with weight 1 / (1 - r) also represents rows that
    were left out with probability r (InfoBatch, 2303.04947). This is unbiased for losses that do not depend on each
    other. In a contrastive batch it is only approximately unbiased: a loss depends on the negatives in the batch, and
    pruning changes those too.

    Args:
        losses_BR: (B, R) losses, from any function of this module.
        weights_B: (B,) weights; None for 1.

    Returns:
        A scalar, float32 if the losses are narrower, differentiable in the losses; 0 for no rows.

    Raises:
        UsageError: The shapes do not fit.
    """
    if losses_BR.ndim != 2 or not losses_BR.shape[1]:
        raise UsageError(f"losses must be (B, directions); got {tuple(losses_BR.shape)}")
    wide = torch.promote_types(losses_BR.dtype, torch.float32)  # a sum of float16 losses may be infinite
    losses_B = losses_BR.to(wide).mean(1)
    if weights_B is not None:
        if weights_B.shape != losses_B.shape:
            raise UsageError(f"weights must be ({len(losses_B)},), one per row; got {tuple(weights_B.shape)}")
        losses_B = losses_B * weights_B.detach().to(losses_B)
    return losses_B.sum() / max(len(losses_B), 1)


def unit(**rows: torch.Tensor) -> list[torch.Tensor]:
    """Return matrices of the same shape with unit rows in float32.

    Raises:
        UsageError: They are not matrices of the same shape; names them.
    """
    shapes = {name: tuple(row.shape) for name, row in rows.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UsageError(f"{', '.join(rows)} must be (B, D), the same B and D; got {got}")
    return [F.normalize(row.float(), dim=1) for row in rows.values()]


def _same_rows(name: str, known_BE: torch.Tensor, image_BD: torch.Tensor) -> None:
    if len(known_BE) != len(image_BD):
        raise UsageError(f"{name} features of {len(known_BE)} rows, features of {len(image_BD)}; give the same rows")


def _number(name: str, value: float | torch.Tensor) -> float | torch.Tensor:
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1:
        raise UsageError(f"{name} must be one number; got a tensor of shape {tuple(value.shape)}")
    return value.float().reshape(())


def _temperature(value: float) -> float:
    if not value > 0:
        raise UsageError(f"temperature must be above 0; got {value}")
    return value


def _softmax_loss(positive_B: torch.Tensor, *others_BN: torch.Tensor) -> torch.Tensor:
    """Return -log(softmax) of the positive (B,) among itself and the others.

    Computed as log(1 + exp(others - positive)), which unlike log_softmax does not round small losses to 0.
    """
    total_B = others_BN[0].logsumexp(1)
    for more_BN in others_BN[1:]:
        total_B = torch.logaddexp(total_B, more_BN.logsumexp(1))
    return F.softplus(total_B - positive_B)


def _products(rows_BD: torch.Tensor, columns_ND: torch.Tensor) -> torch.Tensor:
    with torch.autocast(rows_BD.device.type, enabled=False):
        return rows_BD @ columns_ND.T


def _others(
    rows_BD: torch.Tensor, columns_ND: torch.Tensor, start: int, bias: float | torch.Tensor = 0.0
) -> torch.Tensor:
    """Return the products (B, N) plus bias, with row i's own column, start + i, masked."""
    products_BN = _products(rows_BD, columns_ND)
    products_BN += bias  # in place, like the next line, so that backward does not keep a second (B, N) tensor
    products_BN.diagonal(start).fill_(_MASKED)
    return products_BN


def _both_ways(
    a_BD: torch.Tensor,
    b_BD: torch.Tensor,
    all_a_ND: torch.Tensor,
    all_b_ND: torch.Tensor,
    start: int,
    bias: float | torch.Tensor = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return :func:`_others` of a with all b and of b with all a; one matrix and its transpose on a single rank."""
    a_BN = _others(a_BD, all_b_ND, start, bias)
    return a_BN, a_BN.T if all_b_ND is b_BD else _others(b_BD, all_a_ND, start, bias)


def everywhere(gather: bool, *rows_BD: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int]:
    """Return the rows of all ranks, in rank order, and the position of this rank's first row.

    Gradients flow back to the ranks that the rows came from. Ranks may have different numbers of rows.

    Raises:
        UsageError: There is no process group.
    """
    if not gather:
        return rows_BD, 0
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError("gather=True needs a process group: call torch.distributed.init_process_group first")
    if dist.get_world_size() == 1:
        return rows_BD, 0
    size = torch.tensor([len(rows_BD[0])], device=rows_BD[0].device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = torch.cat(sizes).tolist()
    gathered = _Gather.apply(torch.cat(rows_BD, dim=1), counts)  # joined: one all_gather forward, one backward
    return gathered.chunk(len(rows_BD), dim=1), sum(counts[: dist.get_rank()])


class _Gather(torch.autograd.Function):  # type: ignore[misc]
    """Rows of all ranks; a row's gradient is the sum over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, rows_BD: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.start, ctx.size = sum(counts[: dist.get_rank()]), len(rows_BD)
        padded = F.pad(rows_BD, (0, 0, 0, max(counts) - len(rows_BD)))  # all_gather needs equal shapes
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        total_ND = gradient_ND.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total_ND)
        return total_ND[ctx.start : ctx.start + ctx.size], None
