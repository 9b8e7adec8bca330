"""Compare policies: train the same model with several policies and seeds, and print a table.

    python lab/dynamic.py TRAIN.parquet EVAL.parquet -o RUNS --label article_type --epochs 14 --seeds 0 1

Every run is a folder of ``thresher train clip`` below RUNS. Finished runs are not repeated; interrupted runs are
resumed. ``--shuffled 0.3`` trains on data in which this share of the captions is assigned to other images (written
below RUNS; the evaluation set does not change).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from thresher.dynamic.run_folder import MARK, Training
from thresher.runtime.progress import progress_for
from thresher.train.clip import ClipSettings, train_clip
from thresher.train.loop import Schedule

PRUNE = 0.3
ARMS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "scan": {"policy": "scan", "prune": PRUNE},
    "full, the samples of scan": {"policy": "full"},
    "infobatch": {"policy": "infobatch", "prune": PRUNE},
    "dynamic random": {"policy": "dynamic-random", "prune": PRUNE},
    "scan, redundant only": {"policy": "scan", "prune": 0.15, "options": {"mode": "redundant"}},
    "scan, ill-matched only": {"policy": "scan", "prune": 0.15, "options": {"mode": "ill-matched"}},
}
METRICS = ("image_to_text_R@1", "text_to_image_R@1", "zero_shot_{label}_top1")


def train(arm: str, seed: int, args: argparse.Namespace, data: Path) -> list[dict[str, Any]]:
    """Run or resume an arm; return its log."""
    options = dict(ARMS[arm])
    if arm.startswith("full, the samples of"):
        baseline = Training.load(folder(arm.rpartition(" ")[2], seed, args)).log()
        options["samples"] = sum(entry["samples"] for entry in baseline)
    else:
        options["epochs"] = args.epochs
    settings = ClipSettings(
        model=args.model,
        eval_labels=(args.label,),
        templates=("{}",),
        schedule=Schedule(
            seed=seed,
            batch_size=args.batch_size,
            device=args.device,
            precision=args.precision,
            evals=(args.held_out,),
            eval_every=0,
            **options,
        ),
    )
    out = folder(arm, seed, args)
    return train_clip(data, out, settings, resume=(out / MARK).exists(), progress=progress_for(args.quiet))


def folder(arm: str, seed: int, args: argparse.Namespace) -> Path:
    return Path(args.out) / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"


def shuffled(source: str, share: float, target: Path) -> Path:
    """Write the data with ``share`` of the captions exchanged between rows."""
    if not target.exists():
        table = pq.read_table(source)
        texts = np.array(table["text"].to_pylist(), object)
        rng = np.random.Generator(np.random.Philox(0))
        rows = rng.permutation(len(texts))[: round(share * len(texts))]
        texts[rows] = texts[np.roll(rows, 1)]
        at = table.schema.get_field_index("text")
        pq.write_table(table.set_column(at, "text", pa.array(texts.tolist())), target)
    return target


def row(arm: str, logs: list[list[dict[str, Any]]], full: list[list[dict[str, Any]]], args: argparse.Namespace) -> str:
    """Return a line of the table, with the values of all seeds."""
    name = Path(args.held_out).stem
    samples = [sum(entry["samples"] for entry in log) for log in logs]
    seconds = [sum(entry["seconds"] for entry in log) for log in logs]
    fewer = [1 - n / sum(e["samples"] for e in log) for n, log in zip(samples, full, strict=True)]
    faster = [1 - s / sum(e["seconds"] for e in log) for s, log in zip(seconds, full, strict=True)]
    cells = [
        arm,
        " / ".join(f"{n:,}" for n in samples),
        " / ".join(f"{share:.1%}" for share in fewer),
        " / ".join(f"{s:.0f}" for s in seconds),
        " / ".join(f"{share:.1%}" for share in faster),
    ]
    for metric in METRICS:
        values = [100 * log[-1]["eval"][name][metric.format(label=args.label)] for log in logs]
        cells.append(f"**{np.mean(values):.1f}** ({' / '.join(f'{value:.1f}' for value in values)})")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="Parquet with image and text.")
    parser.add_argument("held_out", help="Parquet to evaluate on.")
    parser.add_argument("-o", "--out", required=True, help="Folder of the runs.")
    parser.add_argument("--label", default="label_name", help="Column of classes for zero-shot.")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[:5], choices=list(ARMS), metavar="ARM")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--shuffled", type=float, default=0.0, metavar="SHARE", help="Share of captions to shuffle.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="Threads of torch.")
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = Path(args.data)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.shuffled:
        data = shuffled(args.data, args.shuffled, Path(args.out) / "shuffled.parquet")
    arms = [arm for arm in ARMS if arm in {"full", *args.arms}]  # the baseline comes first
    if "full, the samples of scan" in arms and "scan" not in arms:
        arms.insert(1, "scan")
    logs: dict[str, list[list[dict[str, Any]]]] = {arm: [] for arm in arms}
    for seed in args.seeds:
        for arm in arms:
            logs[arm].append(train(arm, seed, args, data))
    print("| policy | samples seen | fewer | seconds | saved | R@1 image to text | text to image | zero-shot |")
    print("|---|---|---|---|---|---|---|---|")
    for arm in arms:
        print(row(arm, logs[arm], logs["full"], args))


if __name__ == "__main__":
    main()
