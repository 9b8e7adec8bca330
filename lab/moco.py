"""Compare MoCo under several policies with the same net untrained, and print a table.

    python lab/moco.py TRAIN EVAL.parquet -o RUNS --label label_name --epochs 5 --arms full scan

kNN and linear probe are fitted on features of the frozen net, of up to 20,000 labelled rows of TRAIN that are not in
EVAL, or else of half of EVAL. All rows of the table use the same protocol, which is printed above it. Runs are folders
of ``thresher train moco`` below RUNS; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from thresher.dynamic.run_folder import MARK
from thresher.evaluation.sets import read_eval
from thresher.runtime.progress import progress_for
from thresher.train.data import open_pairs
from thresher.train.loop import Schedule, device_named, stored_side
from thresher.train.moco import MocoSettings, MocoTask, MocoV2, train_moco
from thresher.train.models import backbone

ARMS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "scan": {"policy": "scan", "prune": 0.25, "options": {"warmup": 1}},
    "dynamic-random": {"policy": "dynamic-random", "prune": 0.25},
}


def untrained(args: argparse.Namespace, settings: MocoSettings) -> dict[str, float]:
    """Return the metrics of the untrained net, with the same evaluation as in training."""
    device = device_named(settings.schedule.device)
    torch.manual_seed(settings.schedule.seed)
    encoder, width = backbone(settings.model, settings.side)
    out = Path(args.out) / "untrained"
    out.mkdir(exist_ok=True)
    side = stored_side(settings.side)
    pairs = open_pairs(args.data, out, side=side, resize="shortest", captions=False, progress=progress_for(False))
    model = MocoV2(encoder, width, settings, 1).to(device)
    held_out = read_eval(args.held_out, labels=(args.label,))
    # Batch norm has no statistics yet: a pass over some rows sets them to the mean over all batches.
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    task = MocoTask(model, device, settings, pairs, [held_out])
    for lo in range(0, min(len(pairs), 8192), 256):
        task.features(torch.from_numpy(pairs.pixels(range(lo, min(lo + 256, len(pairs))))))
    model.eval()
    return task.evaluate()[held_out.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="Parquet with images, file or folder.")
    parser.add_argument("held_out", help="Parquet with images and labels.")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--label", default="label_name")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--version", type=int, default=2, choices=[2, 3])
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--arms", nargs="+", default=["full"], choices=list(ARMS), metavar="ARM")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    results: dict[str, tuple[str, dict[str, float]]] = {}
    for arm in args.arms:
        schedule = Schedule(
            epochs=args.epochs, batch_size=args.batch_size, device=args.device, evals=(args.held_out,), eval_every=0,
            **ARMS[arm],
        )  # fmt: skip
        settings = MocoSettings(
            model=args.model, version=args.version, side=args.image_size, eval_labels=(args.label,), schedule=schedule
        )
        if not results:
            results["untrained"] = ("", untrained(args, settings))
        out = Path(args.out) / arm
        log = train_moco(args.data, out, settings, resume=(out / MARK).exists(), progress=progress_for(False))
        seconds = sum(entry["seconds"] for entry in log)
        summary = f"{sum(entry['samples'] for entry in log):,} samples, {seconds:.0f} s"
        results[arm] = (f"{log[-1]['pruned_so_far']:.1%} pruned, {summary}", log[-1]["eval"][Path(args.held_out).stem])
    names = [f"{probe}_{args.label}_{metric}" for probe in ("knn", "linear") for metric in ("top1", "top5")]
    rows = [
        scores[f"probe_{args.label}_{name}"] for _, scores in results.values() for name in ("rows_learnt", "halves")
    ]
    if len({*rows[::2]}) > 1 or len({*rows[1::2]}) > 1:
        raise SystemExit("the runs were evaluated on different rows because TRAIN or EVAL changed; use another RUNS")
    source = "half of EVAL" if rows[1] else "TRAIN"
    print(f"fitted on {rows[0]:,.0f} rows of {source}\n")
    print("| policy | | 20 neighbors, top 1 | top 5 | linear probe, top 1 | top 5 |")
    print("|---|---|---|---|---|---|")
    for arm, (summary, scores) in results.items():
        print(f"| {arm} | {summary} | " + " | ".join(f"{100 * scores[name]:.1f}" for name in names) + " |")


if __name__ == "__main__":
    main()
