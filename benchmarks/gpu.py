"""Training and clustering on a GPU: check that results equal those of a CPU, and measure the utilisation of the GPU.

    python benchmarks/gpu.py -o FOLDER

A check that fails does not stop the others; the exit status is then 1. ``cuda.json`` in FOLDER is rewritten after every
check. ``--only`` selects checks; ``--device cpu --toy`` tests the checks without a GPU. The pool is that of
``examples/``, repeated for throughput.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import embeddings, table  # chooses the kernels before NumPy loads

# isort: split
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch.nn import functional as F

from thresher.dynamic import loss as losses
from thresher.dynamic.registry import policy_named
from thresher.dynamic.run_folder import CHECKPOINT, LEDGER, LOG
from thresher.dynamic.sampler import PruningSampler
from thresher.dynamic.stream import StreamPruner, prune_stream
from thresher.evaluation.linear_probe import linear_probe
from thresher.ops.neighbors import duplicates_of_kept, nearest_earlier
from thresher.ops.products import ON_CPU
from thresher.ops.torch_products import SLACK, Devices, TorchNearest, TorchProducts, nearest_bfloat16
from thresher.runtime.files import writing
from thresher.runtime.progress import Silent
from thresher.train.augment import crops
from thresher.train.clip import ClipSettings, ClipTask, train_clip
from thresher.train.data import open_pairs
from thresher.train.loop import Schedule, stored_side
from thresher.train.moco import MocoSettings, MocoTask, MocoV2, train_moco
from thresher.train.models import backbone, clip_model

REPOSITORY = Path(__file__).parents[1]
Figures = dict[str, Any]


class Failed(AssertionError):
    """A check failed."""


@dataclass
class Bench:
    """The device and the size of the checks.

    Attributes:
        device: The device to check.
        toy: Whether to use small sizes for a CPU.
        folder: Temporary folder for runs.
        pool: A parquet folder of images and captions.
    """

    device: torch.device
    toy: bool
    folder: Path
    pool: Path

    def size(self, full: int, toy: int) -> int:
        return toy if self.toy else full

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rows(self, copies: int, most: int | None = None) -> Path:
        """Write ``copies`` of the pool to one file, with row numbers modulo 7 as labels, and return its path."""
        path = self.folder / f"pool-{copies}-{most}.parquet"
        if not path.exists():
            parts = [pq.read_table(part, columns=["text", "image"]) for part in sorted(self.pool.glob("*.parquet"))]
            one = pa.concat_tables(parts)
            one = one if most is None else one.slice(0, most)
            label = pa.array([f"class {row % 7}" for row in range(len(one))])
            with writing(path) as scratch:
                pq.write_table(pa.concat_tables([one.append_column("label_name", label)] * copies), scratch)
        return path


def held(name: str, value: float, most: float) -> float:
    """Return a value after checking its maximum."""
    if not value <= most:
        raise Failed(f"{name} is {value:.3g}, above the maximum of {most:.3g}")
    return float(value)


# --- results --------------------------------------------------------------------------------------


def features(rows: int, dim: int, *, seed: int, near: torch.Tensor | None = None) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, dim, generator=rng, dtype=torch.float64)
    return noise if near is None else near + 1.5 * noise


def wide(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Cross-entropy of each row with its own column, in float64 on the CPU, from the definition."""
    products = scale * F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
    return -products.log_softmax(1).diagonal()


def check_losses(bench: Bench) -> Figures:
    """Compare losses and gradients under autocast with float64 from their definitions."""
    rows, dim = bench.size(1024, 64), 128
    a = features(rows, dim, seed=0)
    b = features(rows, dim, seed=1, near=a)
    queue = features(4 * rows, dim, seed=2)

    def moco2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        unit = F.normalize(x, dim=1)
        own = (unit * F.normalize(y, dim=1)).sum(1, keepdim=True)
        every = torch.cat([own, unit @ F.normalize(queue, dim=1).T], dim=1) / 0.2
        return -every.log_softmax(1)[:, :1]

    def sigmoids(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        products = 10.0 * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T - 10.0
        each = -F.logsigmoid(products * (2 * torch.eye(len(x), dtype=torch.float64) - 1))
        return torch.stack([each.sum(1), each.sum(0)], dim=1)

    def both(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([wide(x, y, 100.0), wide(y, x, 100.0)], dim=1)

    def simclr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = F.normalize(torch.cat([x, y]), dim=1)
        products = (z @ z.T / 0.2).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
        each = -products.log_softmax(1)[torch.arange(len(z)), torch.arange(len(z)).roll(len(x))]
        return each.view(2, -1).T

    on = queue.float().to(bench.device)
    pairs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "clip": (both, lambda x, y: losses.clip_losses(x, y, 100.0)),
        "siglip": (sigmoids, lambda x, y: losses.siglip_losses(x, y, 10.0, -10.0)),
        "moco v2": (moco2, lambda x, y: losses.moco_v2_losses(x, y, on, 0.2)),
        "moco v3": (
            lambda x, y: 0.8 * torch.stack([wide(x, y, 5.0), wide(y, x, 5.0)], dim=1),
            lambda x, y: losses.moco_v3_losses(x, y, x, y, 0.2),
        ),
        "simclr": (simclr, lambda x, y: losses.simclr_losses(x, y, 0.2)),
    }
    figures: Figures = {}
    for name, (exact, ours) in pairs.items():
        x64, y64 = a.clone().requires_grad_(), b.clone()
        expected = exact(x64, y64)
        x32, y32 = a.float().to(bench.device).requires_grad_(), b.float().to(bench.device)
        with torch.autocast(bench.device.type, torch.bfloat16):
            got = ours(x32, y32)
        if got.dtype != torch.float32 or not got.isfinite().all():
            raise Failed(f"{name}: {got.dtype}, {int((~got.isfinite()).sum())} not finite")
        error = (got.detach().cpu().double() - expected.detach()).abs() / (1 + expected.detach().abs())
        figures[name] = held(f"the error of {name}", error.max().item(), 1e-4)
        if name != "moco v3":  # its keys, here x and y, have no gradient
            expected.mean().backward()
            losses.reduce(got).backward()
            slope = (x32.grad.cpu().double() - x64.grad).norm() / x64.grad.norm()
            figures[f"{name}, gradient"] = held(f"the error of the gradient of {name}", slope.item(), 1e-3)
    with torch.autocast(bench.device.type, torch.bfloat16):
        solved = losses.clip_losses(torch.eye(8, device=bench.device), torch.eye(8, device=bench.device), 60.0)
    figures["smallest loss of solved rows"] = solved.min().item()
    if not 0 < solved.min().item() < 1e-20:
        raise Failed(f"rows that are all but solved have losses of {solved.min().item()}")
    return figures


def check_crops(bench: Bench) -> Figures:
    """Check that the same random state gives the same crops on both devices."""
    images = torch.rand(64, 3, 72, 72)
    crop = crops(64, 0.1)
    torch.manual_seed(5)
    here = crop(images)
    torch.manual_seed(5)
    there = crop(images.to(bench.device)).cpu()
    return {"largest difference": held("the difference of crops", (here - there).abs().max().item(), 1e-4)}


def check_books(bench: Bench) -> Figures:
    """Check that ledgers do not depend on the device of losses, that states are on the CPU, and that streams work."""
    rows, batch = 4096, 256
    values = torch.from_numpy(np.random.default_rng(0).gamma(2.0, 1.0, (64, batch, 2)).astype(np.float32))
    ledgers = []
    for device in (torch.device("cpu"), bench.device):
        policy = policy_named("infobatch", 6)
        sampler = PruningSampler(rows, policy=policy, batch_size=batch, epochs=6, seed=0)
        step = 0
        while sampler.plan is not None:
            for ids in sampler:
                loss = sampler.reduce(np.array(ids), values[step % 64, : len(ids)].to(device))
                step += 1
                if loss.device.type != device.type:
                    raise Failed(f"losses on {device} became a loss on {loss.device}")
        state = sampler.state_dict()
        if any(value.device.type != "cpu" for value in state.values() if isinstance(value, torch.Tensor)):
            raise Failed("a state has tensors that are not on the CPU")
        ledgers.append(sampler.ledger.state())
    if any(ledgers[0][name].tobytes() != ledgers[1][name].tobytes() for name in ledgers[0]):
        raise Failed("ledgers differ")
    pruner = StreamPruner(policy=policy_named("scan", 4, prune=0.2), batch_size=64, epochs=4, samples=512, seed=0)
    stage = prune_stream(pruner)
    ids = np.stack([sample["__id__"] for sample in stage({"__key__": f"{row:05d}"} for row in range(512))])
    for lo in range(0, 512, 64):
        pruner.reduce(ids[lo : lo + 64], values[lo // 64, :64].to(bench.device))
    return {"steps": step}


def check_gathered(bench: Bench) -> Figures:
    """Compare losses and gradients of two processes on one device (gloo) with those of the whole batch."""
    figures = _two(bench, "gloo", 300)
    return {name: held(name, value, 1e-4) for name, value in figures.items()}


def check_nccl(bench: Bench) -> Figures:
    """Report, without a check, whether NCCL supports two ranks on one GPU; it usually does not."""
    if bench.device.type != "cuda":
        return {"two ranks on one device": "not tested"}
    try:
        return {"two ranks on one device": f"works: {_two(bench, 'nccl', 60)}"}
    except (Failed, subprocess.TimeoutExpired) as error:
        return {"two ranks on one device": f"refused: {str(error).strip().splitlines()[-1][:120]}"}


def _two(bench: Bench, backend: str, seconds: float) -> dict[str, float]:
    meeting = Path(tempfile.mkdtemp(dir=bench.folder)) / "meeting"
    options = ["--device", str(bench.device), "--backend", backend, "--meeting", str(meeting)]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(rank), *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        ends = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    for process, (_, errors) in zip(started, ends, strict=True):
        if process.returncode:
            raise Failed(f"a rank with {backend} exited with {process.returncode}: {errors[-2000:]}")
    both = [json.loads(out.strip().splitlines()[-1]) for out, _ in ends]
    return {name: max(one[name] for one in both) for name in both[0]}


def rank_of_two(rank: int, backend: str, meeting: str, device: torch.device) -> None:
    """Compare the part of a rank with a single process that has all rows; the ranks have 40 and 24."""
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=2)
    figures = {}
    image, text = (features(64, 32, seed=seed).float().to(device) for seed in (0, 1))
    lo, hi = ((0, 40), (40, 64))[rank]
    for name, loss in (
        ("clip", lambda x, y, g: losses.clip_losses(x, y, 30.0, gather=g)),
        ("siglip", lambda x, y, g: losses.siglip_losses(x, y, 10.0, -10.0, gather=g)),
        ("simclr", lambda x, y, g: losses.simclr_losses(x, y, 0.2, gather=g)),
    ):
        whole = image.clone().requires_grad_()
        expected = loss(whole, text, False)
        expected.sum().backward()
        part = image[lo:hi].clone().requires_grad_()
        got = loss(part, text[lo:hi], True)
        got.sum().backward()
        figures[f"{name}, two ranks"] = (got - expected[lo:hi]).abs().max().item()
        figures[f"{name}, gradient"] = (part.grad - whole.grad[lo:hi]).abs().max().item()
    sampler = PruningSampler(64, policy=policy_named("full", 1), batch_size=16, epochs=1, seed=0)
    for ids in sampler:
        sampler.reduce(np.array(ids), torch.from_numpy(np.array(ids, np.float32))[:, None].to(device))
    figures["ledger, two ranks"] = float(np.abs(sampler.ledger.loss_N - np.arange(64)).max())
    dist.destroy_process_group()
    print(json.dumps(figures))


# --- trainers -------------------------------------------------------------------------------------


def check_first_batch(bench: Bench) -> Figures:
    """Compare the losses of the first batch on both devices, in float32 and with a larger tolerance in bfloat16."""
    data, batch = bench.rows(1, 600), bench.size(256, 64)
    figures: Figures = {}
    torch.backends.cudnn.allow_tf32 = False  # TF32 convolutions have only ten bits of mantissa
    models = ("tiny",) if bench.toy else ("tiny", "small")
    for model in models:
        first = {}
        for device, precision in (("cpu", "float32"), (str(bench.device), "float32"), (str(bench.device), "bfloat16")):
            out = Path(tempfile.mkdtemp(dir=bench.folder)) / "run"
            schedule = Schedule(samples=batch, batch_size=batch, device=device, precision=precision)
            train_clip(data, out, ClipSettings(model=model, schedule=schedule))
            with np.load(out / LEDGER) as file:
                first[device, precision] = file["losses"][:, 0]
        exact = first["cpu", "float32"]
        for precision, most in (("float32", 0.005), ("bfloat16", 0.3)):
            figures[f"{model}, {precision}"] = _difference(first[str(bench.device), precision], exact, most)
    first = {}
    for device in ("cpu", str(bench.device)):
        out = Path(tempfile.mkdtemp(dir=bench.folder)) / "run"
        schedule = Schedule(samples=batch, batch_size=batch, device=device, precision="float32")
        train_moco(
            data, out, MocoSettings(side=32, groups=1, schedule=schedule)
        )  # random crops are drawn on the device
        with np.load(out / LEDGER) as file:
            first[device] = file["losses"][:, 0]
    figures["moco, float32"] = _difference(first[str(bench.device)], first["cpu"], 0.02)
    torch.backends.cudnn.allow_tf32 = True
    return figures


def _difference(got: np.ndarray, exact: np.ndarray, most: float) -> float:
    seen = np.isfinite(exact)
    if not seen.any() or (np.isfinite(got) != seen).any():
        raise Failed(f"{np.isfinite(got).sum()} rows have a loss, not {seen.sum()}")
    return held("the difference of losses", float(np.abs(got[seen] - exact[seen]).max()), most)


def check_chunks(bench: Bench) -> Figures:
    """Compare the gradients of a batch in chunks with those of the whole batch."""
    name = "tiny" if bench.toy else "small"
    clip = clip_model(name)
    if name == "tiny":
        clip.model.eval()  # batch norm would depend on the chunks
    clip.model.to(bench.device)
    settings = ClipSettings(model=name, schedule=Schedule(epochs=1, precision="float32"))
    tokens = clip.tokenize([f"number {row}" for row in range(64)])
    pixels = torch.randint(0, 256, (64, stored_side(clip.side), stored_side(clip.side), 3), dtype=torch.uint8)
    slopes = []
    for chunk in (None, 24):
        task = ClipTask(clip, tokens, bench.device, replace(settings, chunk=chunk))
        clip.model.zero_grad()
        torch.manual_seed(3)
        task.step(np.arange(64), pixels.to(bench.device), losses.reduce)
        slopes.append(torch.cat([p.grad.flatten() for p in clip.model.parameters() if p.grad is not None]))
    return {"gradient": held("the difference", ((slopes[0] - slopes[1]).norm() / slopes[0].norm()).item(), 1e-3)}


def check_runs(bench: Bench) -> Figures:
    """Run ``thresher train`` with bfloat16, pruning and evaluation; the loss must fall and stay finite."""
    data = str(bench.rows(1, bench.size(3900, 120)))
    batch, epochs = str(bench.size(256, 24)), str(bench.size(6, 3))
    usual = ["--batch-size", batch, "--epochs", epochs, "--eval", data, "--eval-every", "0", "--precision", "bfloat16"]
    pruned = ["--policy", "scan", "--prune", "15%", "--full-epochs", "1"]
    runs = {
        "clip tiny, scan": ["clip", *pruned],
        "clip tiny, siglip, infobatch": ["clip", "--loss", "siglip", "--policy", "infobatch"],
        "moco v2 tiny, scan": ["moco", "--image-size", "32", *pruned],
    }
    if not bench.toy:
        runs["clip small, scan"] = ["clip", "--model", "small", *pruned]
        runs["moco v2 resnet18, dynamic-random"] = [
            "moco", "--model", "resnet18", "--image-size", "64", "--policy", "dynamic-random",
        ]  # fmt: skip
        runs["moco v3 vit"] = ["moco", "--version", "3", "--model", "vit_tiny_patch16_224", "--image-size", "64"]
    figures: Figures = {}
    for name, arguments in runs.items():
        out = Path(tempfile.mkdtemp(dir=bench.folder)) / "run"
        log = _train(bench, [arguments[0], data, "-o", str(out), *arguments[1:], *usual])
        first, last = log[0]["loss"], log[-1]["loss"]
        # The queue starts with random keys, which are easy negatives, so the loss of MoCo rises before it falls.
        rows = log[0]["total"]
        chance = math.log(1 + rows // 4) if "moco v2" in name else 0.8 * math.log(int(batch))
        most = first if "clip" in name else 1.02 * chance
        if last is None or not last < most or any(entry.get("not_finite") for entry in log):
            raise Failed(f"{name}: losses {[entry['loss'] for entry in log]}, the last must be below {most:.3f}")
        if "eval" not in log[-1]:
            raise Failed(f"{name}: was not evaluated: {log[-1].get('eval_failed')}")
        figures[name] = f"loss {first:.3f} to {last:.3f}, {log[-1]['samples_per_second']:,.0f} pairs/s"
    return figures


def _train(bench: Bench, arguments: list[str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "thresher", "train", *arguments, "--device", str(bench.device), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise Failed(
            f"{' '.join(arguments[:2])} exited with {ended.returncode}: {(ended.stdout + ended.stderr)[-2000:]}"
        )
    log: list[dict[str, Any]] = json.loads(ended.stdout)["epochs"]
    return log


def check_resume(bench: Bench) -> Figures:
    """Check that a killed and resumed run differs from an uninterrupted one about as little as two of these differ."""
    data = str(bench.rows(1, bench.size(1536, 96)))
    usual = ["--batch-size", str(bench.size(128, 24)), "--epochs", "6", "--policy", "dynamic-random", "--prune", "20%"]
    runs = {name: Path(tempfile.mkdtemp(dir=bench.folder)) / "run" for name in ("whole", "again", "killed")}
    logs = {}
    for name in ("whole", "again"):
        logs[name] = _train(bench, ["clip", data, "-o", str(runs[name]), *usual])
    arguments = ["clip", data, "-o", str(runs["killed"]), *usual, "--checkpoint-minutes", "0"]
    command = [sys.executable, "-m", "thresher", "train", *arguments, "--device", str(bench.device), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    kept = runs["killed"] / LOG
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end and not (kept.exists() and _lines(kept) >= 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if not (runs["killed"] / CHECKPOINT).exists():
        raise Failed("the killed run has no checkpoint")
    before = _lines(kept) if kept.exists() else 0
    logs["killed"] = _train(bench, [*arguments[:-2], "--resume"])
    for name, log in logs.items():
        if [entry["samples"] for entry in log] != [entry["samples"] for entry in logs["whole"]]:
            raise Failed(f"{name}: other samples {[entry['samples'] for entry in log]}")
    weights = {name: _weights(run) for name, run in runs.items()}
    differences = {
        name: float(np.linalg.norm(weights[name] - weights["whole"]) / np.linalg.norm(weights["whole"]))
        for name in ("again", "killed")
    }
    loss = abs(logs["killed"][-1]["loss"] / logs["whole"][-1]["loss"] - 1)
    return {
        "epochs before the kill": before,
        "weights, whole against whole": differences["again"],
        "weights, killed against whole": held(
            "the difference of weights", differences["killed"], 3 * differences["again"] + 0.02
        ),
        "last loss, relative": held("the difference of losses", loss, 0.05),
    }


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _weights(run: Path) -> np.ndarray:
    state = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)["model"]
    return np.concatenate([state[name].float().numpy().ravel() for name in sorted(state)])


def check_probe(bench: Bench) -> Figures:
    """Compare the accuracy of linear probes on both devices."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((10, 32))
    label = rng.integers(0, 10, 1500)
    rows = centres[label] + 1.5 * rng.standard_normal((1500, 32))
    split = rows[:1000], label[:1000], rows[1000:], label[1000:]
    here, there = (linear_probe(*split, device=device)["top1"] for device in ("cpu", str(bench.device)))
    return {"cpu": here, "device": there, "difference": held("the difference of top 1", abs(here - there), 0.02)}


# --- clustering -----------------------------------------------------------------------------------


def check_kmeans(bench: Bench) -> Figures:
    """Check that clusters from bfloat16 are as good as from float32, and that labels agree except on near ties."""
    from kmeans import objective, ours

    count, dim, clusters = bench.size(400_000, 6000), bench.size(512, 32), bench.size(500, 12)
    rows = embeddings(count, dim, 3 * clusters)
    start = rows[np.sort(np.random.default_rng(1).choice(count, clusters, replace=False))]
    nearest = nearest_bfloat16(str(bench.device))
    label_B, best_B, second_B = nearest(rows[:4096], start)
    products = rows[:4096].astype(np.float64) @ start.T.astype(np.float64)
    ordered = np.sort(products, axis=1)
    close = ordered[:, -1] - ordered[:, -2] < 2 * SLACK
    wrong = float(((label_B != products.argmax(1)) & ~close).mean())
    figures: Figures = {
        "wrong labels, without near ties": held("the share of wrong labels", wrong, 0.0),
        "error of cosines": held("the error of cosines", float(np.abs(best_B - ordered[:, -1]).max()), SLACK),
    }
    held("the error of second cosines", float(np.abs(second_B - ordered[:, -2]).max()), SLACK)
    for name, how in (("float32", {}), ("bfloat16", {"nearest": nearest, "slack": SLACK})):
        begin = time.perf_counter()
        centroids = ours(rows, start, 10, **how)
        bench.wait()
        figures[f"{name}, seconds"] = round(time.perf_counter() - begin, 2)
        figures[f"{name}, mean cosine"] = objective(rows, centroids)
    worse = figures["float32, mean cosine"] - figures["bfloat16, mean cosine"]
    held("how much worse clusters are", worse, 0.02 if bench.toy else 0.002)
    return figures


def check_products(bench: Bench) -> Figures:
    """Check that comparisons on the device decide as on the CPU; measure TFLOP/s, with the copies of the rows."""
    devices = Devices.named(str(bench.device))
    products, dim = TorchProducts(devices, small=0), bench.size(512, 32)
    rows = embeddings(bench.size(131_072, 3000), dim, 300)
    figures: Figures = {}
    for clusters in (5000, 50_000) if not bench.toy else (40, 50):
        centroids = embeddings(clusters, dim, clusters)
        for dtype in ("float32", "bfloat16"):
            nearest = TorchNearest(devices, dtype)
            kept = nearest.prepared(centroids)
            label_B = nearest(rows[:2048], kept)[0]
            begin = time.perf_counter()
            for lo in range(0, len(rows), nearest.stripe):
                nearest(rows[lo : lo + nearest.stripe], kept)
            figures[f"assignment to {clusters:,}, {dtype}, TFLOP/s"] = _tera(rows.size * 2 * clusters, begin)
            if dtype == "float32":
                exact = rows[:2048].astype(np.float64) @ centroids.T.astype(np.float64)
                lost = exact.max(axis=1) - exact[np.arange(len(exact)), label_B]
                held("the cosine that labels lose", float(lost.max()), 1e-6)
    group = embeddings(bench.size(32_768, 1500), dim, 3)

    def load(lo: int, hi: int) -> np.ndarray:
        return group[lo:hi]

    begin = time.perf_counter()
    cosine, _ = nearest_earlier(load, 0, len(group), products)
    figures["nearest earlier row, TFLOP/s"] = _tera(len(group) * group.size, begin)
    last = len(group) - bench.size(2048, 500)
    expected, _ = nearest_earlier(load, last, len(group))
    figures["error of cosines"] = held("the error of cosines", float(np.abs(cosine[last:] - expected).max()), 1e-6)
    threshold = float(np.quantile(cosine[1:], 0.5))
    some = bench.size(8192, 1500)
    here, there = (duplicates_of_kept(load, some, threshold, made)[0] > threshold for made in (products, ON_CPU))
    held("the share of other decisions", float((here != there).mean()), 1e-3)
    sums, expected_sums = (made.sums(group[:some], group[:some][::-1], 0.0)[0] for made in (products, ON_CPU))
    held("the error of sums", float(np.abs(sums - expected_sums).max()) / some, 1e-6)
    return figures


def _tera(operations: float, begin: float) -> float:
    return round(operations / (time.perf_counter() - begin) / 1e12, 2)


# --- throughput -----------------------------------------------------------------------------------


def measure_clip(bench: Bench) -> Figures:
    """Measure pairs per second of the whole trainer, of its steps on one batch, and of the bare model."""
    data = bench.rows(bench.size(10, 1), None if not bench.toy else 200)
    figures: Figures = {}
    for model, batch in (("tiny", 64),) if bench.toy else (("tiny", 256), ("small", 256), ("small", 1024)):
        out = Path(tempfile.mkdtemp(dir=bench.folder)) / "run"
        schedule = Schedule(epochs=3, batch_size=batch, device=str(bench.device), precision="bfloat16", workers=8)
        log = train_clip(data, out, ClipSettings(model=model, schedule=schedule))
        whole = max(entry["samples_per_second"] for entry in log[1:])
        clip = clip_model(model)
        clip.model.to(bench.device).train()
        tokens = np.tile(clip.tokenize(["an image of a red heart and a waving hand"]), (batch, 1))
        task = ClipTask(clip, tokens, bench.device, ClipSettings(model=model, schedule=schedule))
        figures |= _speeds(f"clip {model}, {batch}", bench, task, batch, stored_side(clip.side), whole, _bare_clip)
    return figures


def measure_moco(bench: Bench) -> Figures:
    """Measure the same for MoCo v2."""
    data = bench.rows(bench.size(5, 1), None if not bench.toy else 200)
    figures: Figures = {}
    for model, side, batch in (("tiny", 32, 64),) if bench.toy else (("resnet18", 32, 256), ("resnet18", 32, 512)):
        out = Path(tempfile.mkdtemp(dir=bench.folder)) / "run"
        schedule = Schedule(epochs=3, batch_size=batch, device=str(bench.device), precision="bfloat16", workers=8)
        settings = MocoSettings(model=model, side=side, schedule=schedule)
        log = train_moco(data, out, settings)
        whole = max(entry["samples_per_second"] for entry in log[1:])
        encoder, width = backbone(model, side)
        net = MocoV2(encoder, width, settings, 16_384).to(bench.device).train()
        pairs = open_pairs(
            str(bench.rows(1, 200)), out, side=stored_side(side), resize="shortest", captions=False, progress=Silent()
        )
        task = MocoTask(net, bench.device, settings, pairs)
        figures |= _speeds(f"moco {model}, {batch}", bench, task, batch, stored_side(side), whole, _bare_moco)
    return figures


def _bare_clip(task: ClipTask, pixels: torch.Tensor) -> Callable[[], None]:
    side = task.clip.side
    image = task.normalise(pixels[:, :side, :side].permute(0, 3, 1, 2))
    tokens = torch.from_numpy(task.tokens_NT).to(task.device)

    def step() -> None:
        losses.reduce(task.losses(*task.features(image, tokens))).backward()

    return step


def _bare_moco(task: MocoTask, pixels: torch.Tensor) -> Callable[[], None]:
    side = task.settings.side
    image = task.normalise(pixels[:, :side, :side].permute(0, 3, 1, 2).float() / 255)

    def step() -> None:
        with task.autocast():
            loss = task.model.losses(image, image)
        losses.reduce(loss).backward()
        task.after_step(0.5)

    return step


def _speeds(
    name: str, bench: Bench, task: Any, batch: int, side: int, whole: float, bare: Callable[..., Callable[[], None]]
) -> Figures:
    pixels = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8).to(bench.device)
    rows, bare_step = np.arange(batch), bare(task, pixels)
    optimizer = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad], lr=1e-4)

    def stepping(work: Callable[[], None]) -> None:
        optimizer.zero_grad(set_to_none=True)
        work()
        optimizer.step()

    def full() -> None:
        task.step(rows, pixels, losses.reduce)

    speeds = {}
    turns = bench.size(40, 2)
    for what, work in (("steps", full), ("model", bare_step)):
        for _ in range(3):
            stepping(work)
        best = float("inf")
        for _ in range(3):
            bench.wait()
            begin = time.perf_counter()
            for _ in range(turns):
                stepping(work)
            bench.wait()
            best = min(best, time.perf_counter() - begin)
        speeds[what] = batch * turns / best
    figures: Figures = {
        f"{name}: trainer, pairs/s": round(whole),
        f"{name}: steps, pairs/s": round(speeds["steps"]),
        f"{name}: model, pairs/s": round(speeds["model"]),
        f"{name}: trainer of model": round(whole / speeds["model"], 3),
    }
    if bench.device.type == "cuda":
        busy, waits = _busy(lambda: stepping(full)), _waits(lambda: stepping(full))
        figures[f"{name}: GPU busy in steps"] = round(busy, 3)
        figures[f"{name}: waits a step"] = waits
        figures[f"{name}: peak memory, GB"] = round(torch.cuda.max_memory_allocated(bench.device) / 1e9, 2)
    return figures


def _busy(step: Callable[[], None]) -> float:
    """Return the share of the time in which a kernel runs, according to the profiler, which slows down the run."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        begin = time.perf_counter()
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        spent = time.perf_counter() - begin
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1e6 / spent


def _waits(step: Callable[[], None]) -> dict[str, float]:
    """Return where a step makes the CPU wait for the GPU: file and line, with the number of waits per step."""
    waits: dict[str, float] = {}

    def count(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "synchroniz" in str(message):
            place = f"{'/'.join(Path(filename).parts[-2:])}:{lineno}"
            waits[place] = waits.get(place, 0.0) + 0.25

    before = warnings.showwarning
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = count
            for _ in range(4):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = before
    return waits


# --- all checks -----------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Bench], Figures]] = {
    "losses": check_losses,
    "crops": check_crops,
    "books": check_books,
    "probe": check_probe,
    "first-batch": check_first_batch,
    "chunks": check_chunks,
    "gathered": check_gathered,
    "runs": check_runs,
    "resume": check_resume,
    "clip": measure_clip,
    "moco": measure_moco,
    "kmeans": check_kmeans,
    "products": check_products,
    "nccl": check_nccl,
}


def run(bench: Bench, names: list[str], out: Path, seconds: float) -> bool:
    """Run checks, record the results after each, print a table, and return whether all passed.

    Checks that would start after ``seconds`` are skipped and count as failed.
    """
    begin = time.monotonic()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else bench.device.type,
        "torch": torch.__version__,
        "checks": {},
    }
    for name in names:
        since = time.monotonic()
        result: dict[str, Any] = {"held": True, "figures": {}, "why": ""}
        try:
            if since - begin > seconds:
                raise Failed(f"the time limit of {seconds:.0f} seconds was reached")
            result["figures"] = CHECKS[name](bench)
        except Exception as error:  # the other checks must run after any error
            result.update(held=False, why=f"{type(error).__name__}: {error}", where=traceback.format_exc()[-3000:])
        result["seconds"] = round(time.monotonic() - since, 1)
        report["checks"][name] = result
        print(f"{name}: {'held' if result['held'] else result['where']} ({result['seconds']} s)", flush=True)
        with writing(out / "cuda.json") as scratch:
            Path(scratch).write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    lines = []
    for name, result in report["checks"].items():
        lines.append([f"**{name}**", "held" if result["held"] else "FAILED", result["why"][:160].replace("\n", " ")])
        for what, value in result["figures"].items():
            lines.append(["", what, f"{value:.4g}" if isinstance(value, float) and value < 1e4 else str(value)])
    print(f"\n{report['device']}, torch {report['torch']}\n\n{table(['check', '', ''], lines)}")
    return all(result["held"] for result in report["checks"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", default=".", help="Folder for cuda.json.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="Use small sizes for a CPU.")
    parser.add_argument("--only", nargs="+", default=list(CHECKS), choices=list(CHECKS), metavar="CHECK")
    parser.add_argument("--pool", default=str(REPOSITORY / "examples" / "twemoji"), help="Folder of parquet files.")
    parser.add_argument("--seconds", type=float, default=3600.0, help="Time after which no check starts.")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.empty(1, device=device)  # fail early if the device is not available
    if args.rank is not None:
        rank_of_two(args.rank, args.backend, args.meeting, device)
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, args.toy, Path(folder), Path(args.pool))
        if not run(bench, args.only, out, args.seconds):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
