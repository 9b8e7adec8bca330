"""Losses of single samples: those of the papers, written as loops in float64, on one process and on several."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.ranks import on_ranks
from thresher.dynamic.loss import (
    clip_losses,
    distill_losses,
    drrho_losses,
    moco_v2_losses,
    moco_v3_losses,
    reduce,
    siglip_losses,
    simclr_losses,
)
from thresher.errors import UsageError

B, D, K = 6, 4, 9


# The references: plain loops over pairs, any dtype.


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def nce(positive, negatives):
    return torch.logsumexp(torch.stack([positive, *negatives]), 0) - positive


def brute_clip(image, text, scale):
    rows = []
    for i in range(len(image)):
        others = [j for j in range(len(image)) if j != i]
        positive = scale * cosine(image[i], text[i])
        rows.append(
            [
                nce(positive, [scale * cosine(image[i], text[j]) for j in others]),
                nce(positive, [scale * cosine(image[j], text[i]) for j in others]),
            ]
        )
    return grid(rows)


def brute_siglip(image, text, scale, bias):
    def pair(i, j):
        logit = scale * cosine(image[i], text[j]) + bias
        return -F.logsigmoid(logit if i == j else -logit)

    n = range(len(image))
    return grid([[sum(pair(i, j) for j in n), sum(pair(j, i) for j in n)] for i in n])


def brute_drrho(image, text, reference_image, reference_text, temperature, epsilon=1e-4):
    known = reference_image.detach(), reference_text.detach()

    def beyond(i, j):  # what the model says of a pair beyond the reference
        return cosine(image[i], text[j]) - cosine(known[0][i], known[1][j])

    n, rows = range(len(image)), []
    for i in n:
        row = []
        for pair in (lambda i, j: (i, j), lambda i, j: (j, i)):
            terms = [((beyond(*pair(i, j)) - beyond(i, i)) / temperature).exp() for j in n if j != i]
            mean = sum(terms) / len(terms) if terms else 0 * beyond(i, i)
            row.append(temperature * torch.log(epsilon + mean))
        rows.append(row)
    return grid(rows)


def brute_distill(image, text, teacher_image, teacher_text, scale, temperature, weight):
    known = teacher_image.detach(), teacher_text.detach()
    n, clip = range(len(image)), brute_clip(image, text, scale)
    rows = []
    for i in n:
        row = []
        for r, pair in enumerate((lambda i, j: (i, j), lambda i, j: (j, i))):
            at = [pair(i, j) for j in n]
            ours = [scale * cosine(image[a], text[b]) for a, b in at]
            theirs = [cosine(known[0][a], known[1][b]) / temperature for a, b in at]
            log_q = [one - torch.logsumexp(torch.stack(ours), 0) for one in ours]
            log_p = [one - torch.logsumexp(torch.stack(theirs), 0) for one in theirs]
            apart = sum(p.exp() * (p - q) for p, q in zip(log_p, log_q, strict=True))
            row.append(weight * apart + (1 - weight) * clip[i, r])
        rows.append(row)
    return grid(rows)


def brute_moco_v2(query, key, queue, temperature):
    key, queue = key.detach(), queue.detach()
    rows = []
    for q, k in zip(query, key, strict=True):
        rows.append([nce(cosine(q, k) / temperature, [cosine(q, old) / temperature for old in queue])])
    return grid(rows)


def brute_moco_v3(q1, q2, k1, k2, temperature):
    k1, k2 = k1.detach(), k2.detach()
    rows = []
    for i in range(len(q1)):
        others = [j for j in range(len(q1)) if j != i]
        terms = [
            nce(cosine(q[i], k[i]) / temperature, [cosine(q[i], k[j]) / temperature for j in others])
            for q, k in ((q1, k2), (q2, k1))
        ]
        rows.append([2 * 2 * temperature * term for term in terms])  # the mean of the two is to be their sum
    return grid(rows)


def brute_simclr(z1, z2, temperature):
    n, both = len(z1), torch.cat([z1, z2])
    losses = []
    for i in range(2 * n):
        mate = (i + n) % (2 * n)
        negatives = [cosine(both[i], both[j]) / temperature for j in range(2 * n) if j not in (i, mate)]
        losses.append(nce(cosine(both[i], both[mate]) / temperature, negatives))
    return torch.stack([torch.stack(losses[:n]), torch.stack(losses[n:])], 1)


def grid(rows):
    return torch.stack([torch.stack(row) for row in rows])


# name: function, reference, rows of each feature argument, other arguments (with a gradient if a tensor)
LOSSES: dict[str, tuple[Callable, Callable, int, tuple]] = {
    "clip": (clip_losses, brute_clip, 2, (torch.tensor(20.0),)),
    "siglip": (siglip_losses, brute_siglip, 2, (torch.tensor(10.0), torch.tensor(-10.0))),
    "drrho": (drrho_losses, brute_drrho, 4, (0.2,)),
    "distill": (distill_losses, brute_distill, 4, (torch.tensor(20.0), 0.2, 0.75)),
    "moco_v2": (moco_v2_losses, brute_moco_v2, 2, (0.2,)),
    "moco_v3": (moco_v3_losses, brute_moco_v3, 4, (0.2,)),
    "simclr": (simclr_losses, brute_simclr, 2, (0.1,)),
}
GATHERING = [name for name in LOSSES if name != "moco_v2"]
each = pytest.mark.parametrize("name", LOSSES)


def arguments(name: str, rows: int = B, seed: int = 0, dim: int = D) -> list:
    """Features of any length, about as far apart as those of a model at work, and the other arguments."""
    _, _, count, other = LOSSES[name]
    random = torch.Generator().manual_seed(seed)
    centre = torch.randn(rows, dim, generator=random)
    features = [centre + 0.8 * torch.randn(rows, dim, generator=random) for _ in range(count)]
    queue = [torch.randn(K, dim, generator=random)] if name == "moco_v2" else []
    return [*features, *queue, *other]


def with_gradients(values, dtype=torch.float32):
    return [v.detach().to(dtype, copy=True).requires_grad_() if isinstance(v, torch.Tensor) else v for v in values]


def weights(rows: int = B, columns: int = 2) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) + 0.5


def gradients(values):
    found = [v for v in values if isinstance(v, torch.Tensor)]
    return [torch.zeros_like(v) if v.grad is None else v.grad for v in found]


@each
@pytest.mark.parametrize("rows", [1, 2, B])
def test_values_and_gradients_are_those_of_the_loops(name: str, rows: int) -> None:
    function, brute, _, _ = LOSSES[name]
    given = with_gradients(arguments(name, rows))
    exact = with_gradients(arguments(name, rows), torch.float64)
    losses, expected = function(*given), brute(*exact)
    assert losses.dtype == torch.float32
    assert losses.shape == expected.shape == (rows, 1 if name == "moco_v2" else 2)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-6)
    (losses * weights(*losses.shape)).sum().backward()
    (expected * weights(*losses.shape)).sum().backward()
    for got, want in zip(gradients(given), gradients(exact), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    """The reference's own gradients, once, against nothing but its values."""
    for _, brute, _, _ in LOSSES.values():
        name = next(key for key, value in LOSSES.items() if value[1] is brute)
        given = [v.double() if isinstance(v, torch.Tensor) else v for v in arguments(name, 3)]
        fixed = {"moco_v2": 1, "moco_v3": 2, "drrho": 2, "distill": 2}.get(
            name, len(given)
        )  # from there on keys: no gradient, as published
        for i, v in enumerate(given[:fixed]):
            if isinstance(v, torch.Tensor):
                v.requires_grad_()
                assert torch.autograd.gradcheck(
                    lambda x, i=i, brute=brute, given=given: brute(*given[:i], x, *given[i + 1 :]), (v,)
                )
                v.requires_grad_(False)


def test_means_are_the_published_losses() -> None:
    a, b, c, d = (F.normalize(x, dim=1) for x in arguments("moco_v3")[:4])
    labels = torch.arange(B)

    logits = 20.0 * a @ b.T  # open_clip's ClipLoss
    clip = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(clip_losses(a, b, 20.0).mean(), clip)

    logits = 10.0 * a @ b.T - 10.0  # open_clip's SigLipLoss
    siglip = -F.logsigmoid((2 * torch.eye(B) - 1) * logits).sum() / B
    torch.testing.assert_close(siglip_losses(a, b, 10.0, -10.0).mean(), siglip)

    queue = F.normalize(torch.randn(K, D, generator=torch.Generator().manual_seed(2)), dim=1)
    logits = torch.cat([(a * b).sum(1, keepdim=True), a @ queue.T], dim=1) / 0.2  # MoCo's builder
    torch.testing.assert_close(
        moco_v2_losses(a, b, queue, 0.2).mean(), F.cross_entropy(logits, torch.zeros(B, dtype=torch.int64))
    )

    def contrastive_loss(q, k):  # MoCo v3's builder
        return F.cross_entropy(q @ k.T / 0.2, labels) * (2 * 0.2)

    moco_v3 = contrastive_loss(a, d) + contrastive_loss(b, c)
    torch.testing.assert_close(moco_v3_losses(a, b, c, d, 0.2).mean(), moco_v3)

    both = torch.cat([a, b])
    logits = (both @ both.T / 0.1).fill_diagonal_(-torch.inf)  # SimCLR
    simclr = F.cross_entropy(logits, torch.cat([labels + B, labels]))
    torch.testing.assert_close(simclr_losses(a, b, 0.1).mean(), simclr)


@each
def test_order_of_rows_does_not_matter(name: str) -> None:
    function, given = LOSSES[name][0], arguments(name)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = [v[order] if isinstance(v, torch.Tensor) and v.shape == (B, D) else v for v in given]
    torch.testing.assert_close(function(*moved), function(*given)[order])


@each
def test_lengths_of_rows_do_not_matter(name: str) -> None:
    function, given = LOSSES[name][0], arguments(name)
    longer = [7 * v if isinstance(v, torch.Tensor) and v.ndim == 2 else v for v in given]
    torch.testing.assert_close(function(*longer), function(*given))


@each
def test_autocast_changes_nothing(name: str) -> None:
    function, given = LOSSES[name][0], arguments(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = function(*given)
    assert under.dtype == torch.float32
    assert torch.equal(under, function(*given))


@each
def test_half_precision_features_lose_only_their_own_digits(name: str) -> None:
    """All is float32 from the rounded features on; gradients come back in the features' own type."""
    function, given = LOSSES[name][0], arguments(name)
    half = [v.bfloat16() if isinstance(v, torch.Tensor) and v.ndim == 2 else v for v in given]
    leaves = [v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for v in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = function(*leaves)
    widened = [v.float() if isinstance(v, torch.Tensor) else v for v in half]
    assert torch.equal(losses, function(*widened))
    assert (losses - function(*given)).abs().max() < 0.2  # scales of 5 to 20, features to 1 in 256
    losses.mean().backward()
    assert leaves[0].grad.dtype == torch.bfloat16


@each
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
@pytest.mark.parametrize("kind", ["equal", "opposite", "solved", "zero"])
def test_extremes_stay_finite(name: str, scale: float, kind: str) -> None:
    function, _, count, _ = LOSSES[name]
    rows = torch.eye(D)
    other = {"equal": torch.ones(D, D), "opposite": -rows, "solved": rows.clone(), "zero": torch.zeros(D, D)}[kind]
    features = [torch.ones(D, D) if kind == "equal" else rows, other]
    if count == 4:
        features = [rows, other, rows.clone(), other.clone()]
    if name == "moco_v2":
        features = [rows, other, -other]
    features = with_gradients(features)
    number = (scale, -10.0) if name == "siglip" else (scale,) if name == "clip" else (1 / scale,)
    number = (scale, 1 / scale) if name == "distill" else number
    losses = function(*features, *number)
    losses.mean().backward()
    assert losses.isfinite().all()
    assert (losses >= 0).all()
    for gradient in gradients(features):
        assert gradient.isfinite().all()


def test_small_losses_keep_their_digits() -> None:
    """cross_entropy rounds these to 0, and rows that are learnt could no longer be ranked."""
    angles = torch.tensor([0.0, 1.0, 2.1, 3.3])
    image = torch.stack([angles.cos(), angles.sin()], 1)
    text = torch.stack([(angles + 0.1).cos(), (angles + 0.1).sin()], 1)
    losses = clip_losses(image, text, 100.0)
    assert (losses < 1e-10).all()
    torch.testing.assert_close(losses.double(), brute_clip_small(image, text, 100.0), rtol=1e-3, atol=0.0)
    assert (F.cross_entropy(100.0 * image @ text.T, torch.arange(4), reduction="none") == 0).all()


def brute_clip_small(image, text, scale):
    logits = scale * F.normalize(image.double(), dim=1) @ F.normalize(text.double(), dim=1).T
    odds = (logits - logits.diagonal()[:, None]).exp().fill_diagonal_(0).sum(1)
    back = (logits - logits.diagonal()).exp().fill_diagonal_(0).sum(0)
    return torch.stack([odds.log1p(), back.log1p()], 1)


@pytest.mark.parametrize(
    ("name", "matrices"), [("clip", 1), ("siglip", 1), ("drrho", 1), ("moco_v3", 2), ("simclr", 3)]
)
def test_at_most_one_matrix_a_product_is_kept_for_backward(name: str, matrices: int) -> None:
    rows, kept = 64, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.numel())
        return tensor

    given = with_gradients(arguments(name, rows))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = LOSSES[name][0](*given)
    assert sum(size >= rows * rows for _, size in kept.values()) == matrices
    assert max(size for _, size in kept.values()) == rows * rows
    losses.mean().backward()


def test_drrho_is_infonce_of_what_the_model_says_beyond_the_reference() -> None:
    """Without epsilon, on the differences of the cosines; and a reference that says nothing changes nothing."""
    image, text, known_image, known_text = (F.normalize(x, dim=1) for x in arguments("drrho")[:4])
    beyond = (image @ text.T - known_image @ known_text.T) / 0.05
    for losses, logits in zip(
        drrho_losses(image, text, known_image, known_text, 0.05, 1e-30).T, (beyond, beyond.T), strict=True
    ):
        others = logits.masked_fill(torch.eye(B, dtype=torch.bool), -torch.inf)
        nce = others.logsumexp(1) - logits.diagonal() - torch.tensor(B - 1.0).log()
        torch.testing.assert_close(losses, 0.05 * nce)
    same = torch.ones(B, 3)
    plain = drrho_losses(image, text, same, same, 0.05, 1e-30)
    assert torch.allclose(plain, drrho_losses(image, text, same[:, :1], -same[:, :1], 0.05, 1e-30), atol=1e-6)


def test_distillation_is_that_of_open_clip_less_the_entropy_of_the_teacher() -> None:
    """Its gradient is the same; and a model that matches like its teacher has no loss."""
    from open_clip.loss import DistillClipLoss

    image, text, known_image, known_text = (F.normalize(x, dim=1) for x in arguments("distill")[:4])
    known = F.softmax(torch.stack([known_image @ known_text.T, known_text @ known_image.T]) / 0.2, dim=2)
    entropy = -(known * known.log()).sum(2).mean()
    found = []
    for weight in (1.0, 0.5):
        a, b = with_gradients([image, text])
        distill_losses(a, b, known_image, known_text, 20.0, 0.2, weight).mean().backward()
        ours = a.grad, b.grad
        c, d = with_gradients([image, text])
        unit_c, unit_d = F.normalize(c, dim=1), F.normalize(d, dim=1)
        contrast, distill = DistillClipLoss()(unit_c, unit_d, 20.0, known_image, known_text, 5.0)
        found.append(distill_losses(image, text, known_image, known_text, 20.0, 0.2, weight).mean())
        torch.testing.assert_close(found[-1], weight * (distill - entropy) + (1 - weight) * contrast)
        (weight * distill + (1 - weight) * contrast).backward()
        torch.testing.assert_close(ours, (c.grad, d.grad), rtol=1e-4, atol=1e-6)
    assert found[0] != found[1]
    assert distill_losses(image, text, 2 * image, text, 10.0, 0.1).max() < 1e-5


def test_the_queue_may_move_on_before_backward() -> None:
    query, key, queue = with_gradients(arguments("moco_v2")[:3])
    queue = queue.detach()
    losses = moco_v2_losses(query, key, queue, 0.2)
    queue[:B] = key.detach()
    losses.mean().backward()
    assert query.grad is not None
    assert key.grad is None


def test_a_scale_of_shape_one_is_a_number() -> None:
    image, text, scale = arguments("clip")
    torch.testing.assert_close(clip_losses(image, text, scale[None]), clip_losses(image, text, 20.0))
    torch.testing.assert_close(
        siglip_losses(image, text, scale[None], torch.tensor([-5.0])), siglip_losses(image, text, 20.0, -5.0)
    )


ROWS, WIDER, MORE = torch.ones(3, 4), torch.ones(3, 5), torch.ones(4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip_losses(ROWS, WIDER, 1.0), r"image, text must be \(B, D\).*got image \(3, 4\), text \(3, 5\)"),
        (lambda: clip_losses(ROWS, MORE, 1.0), r"text \(4, 4\)"),
        (lambda: clip_losses(ROWS[0], ROWS[0], 1.0), r"image \(4,\)"),
        (lambda: clip_losses(ROWS, ROWS, torch.ones(3)), r"scale must be one number; got a tensor of shape \(3,\)"),
        (lambda: siglip_losses(ROWS, ROWS, 1.0, torch.ones(2)), r"bias must be one number"),
        (lambda: siglip_losses(ROWS, MORE, 1.0, 0.0), r"text \(4, 4\)"),
        (lambda: moco_v2_losses(ROWS, MORE, ROWS, 1.0), r"query \(3, 4\), key \(4, 4\)"),
        (lambda: moco_v2_losses(ROWS, ROWS, WIDER, 1.0), r"queue must be \(K, 4\), one key per row; got \(3, 5\)$"),
        (lambda: moco_v2_losses(ROWS, ROWS, torch.ones(4, 9), 1.0), r"got \(4, 9\); .* pass queue.T"),
        (lambda: moco_v3_losses(ROWS, ROWS, ROWS, MORE, 1.0), r"q1, q2, k1, k2 must .* k2 \(4, 4\)"),
        (lambda: moco_v3_losses(ROWS, ROWS, ROWS, ROWS, 0.0), r"temperature must be above 0; got 0.0"),
        (lambda: simclr_losses(ROWS, WIDER, 1.0), r"z2 \(3, 5\)"),
        (lambda: simclr_losses(ROWS, ROWS, -1.0), r"temperature must be above 0; got -1.0"),
        (lambda: reduce(torch.ones(3)), r"losses must be \(B, directions\); got \(3,\)"),
        (lambda: reduce(torch.ones(3, 2), torch.ones(3, 2)), r"weights must be \(3,\), one per row; got \(3, 2\)"),
        (lambda: clip_losses(ROWS, ROWS, 1.0, gather=True), "init_process_group"),
        (lambda: drrho_losses(ROWS, ROWS, ROWS[:1], ROWS[:1]), "reference features of 1 rows"),
        (lambda: drrho_losses(ROWS, ROWS, ROWS, ROWS, epsilon=0.0), "epsilon must be above 0"),
        (lambda: distill_losses(ROWS, ROWS, ROWS[:1], ROWS[:1], 1.0), "teacher features of 1 rows"),
        (lambda: distill_losses(ROWS, ROWS, ROWS, ROWS, 1.0, weight=0.0), "weight = 0.0; give a number above 0"),
        (lambda: distill_losses(ROWS, ROWS, ROWS, ROWS, 1.0, temperature=0.0), "temperature must be above 0"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(call: Callable, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_reduce_divides_by_rows_not_by_weights() -> None:
    losses = torch.tensor([[1.0, 3.0], [0.0, 2.0], [5.0, 5.0]], requires_grad=True)
    assert reduce(losses).item() == pytest.approx((2 + 1 + 5) / 3)
    weighed = reduce(losses, torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    assert weighed.dtype == torch.float32
    assert weighed.item() == pytest.approx((4 + 1) / 3)
    weighed.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([[2.0, 2], [1, 1], [0, 0]]) / 6)
    assert reduce(losses[:0]).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_reduce_adds_and_weighs_in_float32_or_wider(dtype: torch.dtype) -> None:
    """The sum of 8,192 losses of 9 is above the largest float16, and a weight of 1/0.7 is not one of bfloat16."""
    losses = torch.full((8192, 1), 9.0, dtype=dtype, requires_grad=True)
    weighed = reduce(losses, torch.full((8192,), 1 / 0.7, dtype=torch.float64))
    assert weighed.item() == pytest.approx(9 / 0.7, rel=1e-5)
    weighed.backward()
    assert losses.grad.dtype == dtype
    torch.testing.assert_close(losses.grad.float().sum().item(), 1 / 0.7, rtol=1e-2, atol=0)


def test_reweighting_is_unbiased_for_losses_that_stand_alone() -> None:
    """Half of the rows dropped with 1 / (1 - 1/2) on those left: over all draws, the mean of all rows."""
    losses = torch.tensor([[1.0], [2.0], [6.0]])
    draws = [[kept for kept in range(3) if mask >> kept & 1] for mask in range(8)]
    sums = [reduce(losses[d], torch.full((len(d),), 2.0)) * len(d) for d in draws]
    assert sum(s.item() for s in sums) / len(draws) == pytest.approx(losses.sum().item())


def test_without_torch_it_says_what_to_type() -> None:
    code = (
        "import sys, importlib.util, thresher; sys.modules['torch'] = None\n"
        f"spec = importlib.util.spec_from_file_location('loss', {sys.modules[clip_losses.__module__].__file__!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "MissingExtraError" in last
    assert "in a checkout of thresher type: pip install '.[torch]'" in last


# Several processes: gloo, on this machine only.


def share(name: str, counts: list[int], rank: int) -> list:
    """This rank's rows of the batch that one process would have seen."""
    lo = sum(counts[:rank])
    whole = arguments(name, sum(counts))
    return [v[lo : lo + counts[rank]] if isinstance(v, torch.Tensor) and v.ndim == 2 else v for v in whole]


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for case, counts in enumerate(RANKS):
        if rank >= len(counts):
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/{case}", rank=rank, world_size=len(counts))
        of_mean = counts[rank] * len(counts) / sum(counts)
        for name in GATHERING:
            given = with_gradients(share(name, counts, rank))
            losses = LOSSES[name][0](*given, gather=True)
            reduce(losses, torch.full((counts[rank],), of_mean)).backward()
            found[name, case] = losses.detach(), gradients(given)
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


RANKS = [[3, 3], [5, 2], [2, 2, 2], [4, 1, 3], [3, 0, 2]]


@pytest.mark.slow
def test_several_processes_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients of the whole batch, gradients averaged over ranks as DistributedDataParallel does."""
    on_ranks(monkeypatch, max(map(len, RANKS)), on_rank, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(max(map(len, RANKS)))]
    for name, case in found[0]:
        ranks, rows = len(RANKS[case]), sum(RANKS[case])
        whole = with_gradients(arguments(name, rows))
        losses = LOSSES[name][0](*whole)
        reduce(losses).backward()
        parts = [of_rank[name, case] for of_rank in found[:ranks]]
        assert [len(part) for part, _ in parts] == RANKS[case]
        torch.testing.assert_close(torch.cat([part for part, _ in parts]), losses.detach())
        for i, expected in enumerate(gradients(whole)):
            of_ranks = [gradient[i] for _, gradient in parts]
            got = torch.cat(of_ranks) / ranks if expected.ndim else torch.stack(of_ranks).mean()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


CHUNKS = ("bidir", "shift", "reduce", "gather")  # open_clip's --loss-dist-impl


def siglip_on_rank(rank: int, world: int, folder: str) -> None:
    """On each rank: the losses per sample, and open_clip's chunked loss with its gradients."""
    from open_clip.loss import SigLipLoss

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found = {}
    for chunks in ("ours", *CHUNKS):
        image, text, scale, bias = with_gradients(share("siglip", [4] * world, rank))
        if chunks == "ours":
            losses = siglip_losses(image, text, scale, bias, gather=True)
            found["losses"], loss = losses.detach(), reduce(losses)
        else:
            own = SigLipLoss(rank=rank, world_size=world, dist_impl=chunks)
            loss = own(F.normalize(image, dim=1), F.normalize(text, dim=1), scale, bias)
        loss.backward()
        found[chunks] = loss.detach(), image.grad, text.grad
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_losses_per_sample_are_right_however_open_clip_chunks_siglip(
    world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one process on the whole batch; in the mean over ranks, open_clip's loss and its gradients."""
    on_ranks(monkeypatch, world, siglip_on_rank, world, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    whole = arguments("siglip", 4 * world)
    torch.testing.assert_close(torch.cat([found["losses"] for found in ranks]), siglip_losses(*whole))
    for chunks in CHUNKS:
        means = [torch.stack([found[name][0] for found in ranks]).mean() for name in ("ours", chunks)]
        torch.testing.assert_close(*means)
        for found in ranks:  # summed over the ranks that used a row, in both
            torch.testing.assert_close(found["ours"][1:], found[chunks][1:], rtol=1e-4, atol=1e-6)


def test_a_world_of_one_is_no_gather(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        for name in GATHERING:
            given = arguments(name)
            assert torch.equal(LOSSES[name][0](*given, gather=True), LOSSES[name][0](*given))
    finally:
        dist.destroy_process_group()
