"""``thresher train``: what the command line asks, as settings; torch is loaded when there is something to train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from thresher.cli.options import QUIET, options
from thresher.errors import UsageError


def _share(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    """Return a share given as 30% or 0.3; of the epochs that prune, 100% too."""
    from thresher.runtime.parameters import share_of

    try:
        return None if text is None else share_of(text, whole=param.name == "delta")
    except UsageError as error:
        raise click.BadParameter(str(error), ctx, param) from None


_POLICY = [
    click.option(
        "--policy", default="full", show_default=True, metavar="NAME",
        help="full, scan, infobatch, dynamic-random, d-pruning or static: what is left out.",
    ),
    click.option(
        "--prune", callback=_share, metavar="SHARE",
        help="Share of the run's samples to leave out, such as 30% (default: as the policy is published).",
    ),
    click.option("--selection", metavar="SEL", help="For --policy static: a selection folder, or a file of keys."),
    click.option("--rho", callback=_share, metavar="SHARE", help="scan: share of candidates a side (default: 0.3)."),
    click.option("--cycle", type=int, metavar="T", help="scan: mutation epochs of a cycle (default: 3)."),
    click.option("--mode", type=click.Choice(["both", "redundant", "ill-matched"]), help="scan: which candidates."),
    click.option("--scope", type=click.Choice(["batch", "epoch"]), help="scan: what losses are ranked within."),
    click.option("--threshold", callback=_share, metavar="SHARE", help="scan: fall of the loss that ends the warm-up."),
    click.option(
        "--full-epochs", type=click.IntRange(0), metavar="N", help="scan, d-pruning: epochs on everything at first."
    ),
    click.option("--rule", type=click.Choice(["uncertainty", "epsilon-greedy"]), help="d-pruning: what ranks rows."),
    click.option(
        "--delta", callback=_share, metavar="SHARE", help="infobatch: share of the epochs that prune."
    ),
]  # fmt: skip
_RUN = [
    click.option("--epochs", type=click.IntRange(1), metavar="N", help="Length of the run in epochs (default: 10)."),
    click.option("--samples-seen", "samples", type=click.IntRange(1), metavar="N", help="Or its length in samples."),
    click.option("--batch-size", type=click.IntRange(2), default=256, show_default=True, metavar="B"),
    click.option("--lr", type=float, metavar="X", help="Peak learning rate (default: 0.002 for tiny, else 0.0005)."),
    click.option("--weight-decay", type=float, metavar="X"),
    click.option("--warmup", type=float, default=0.05, show_default=True, help="Share of the run the rate rises for."),
    click.option("--seed", type=int, default=0, show_default=True, metavar="N"),
    click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True),
    click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1 ..."),
    click.option("--workers", type=click.IntRange(0), default=2, show_default=True, metavar="N", help="That decode."),
    click.option("--eval", "evals", multiple=True, metavar="PARQUET", help="Evaluate on it; may be repeated."),
    click.option(
        "--eval-every", type=click.IntRange(0), default=5, show_default=True, metavar="N",
        help="Epochs between evaluations; 0: only at the end.",
    ),
    click.option(
        "--eval-label", "eval_labels", multiple=True, metavar="COLUMN",
        help="Classes in the evaluation sets (default: label_name, label); may be repeated.",
    ),
    click.option(
        "--eval-group", metavar="COLUMN", help="What the evaluation sets hold several times (default: group)."
    ),
    click.option("--checkpoint-minutes", type=float, default=5.0, show_default=True, help="Between checkpoints."),
    click.option("--resume", is_flag=True, help="Go on with the run in RUN, if there is one."),
    QUIET,
    click.option("--json", "as_json", is_flag=True, help="Print the log as JSON."),
]  # fmt: skip
_OUT = click.option("-o", "--out", required=True, metavar="RUN", help="Folder of the run.")


@click.group()
def train() -> None:
    """Train a small or an open_clip model, pruning while it trains."""


@train.command()
@click.argument("data")
@_OUT
@click.option(
    "--model", default="tiny", show_default=True, metavar="NAME",
    help="tiny, small, a configuration of open_clip, or the path of one (.json).",
)  # fmt: skip
@click.option("--loss", type=click.Choice(["clip", "siglip"]), default="clip", show_default=True)
@click.option("--chunk", type=click.IntRange(1), metavar="N", help="Rows at once: less memory, the same gradients.")
@click.option("--template", "templates", multiple=True, metavar="TEXT", help="Prompt of a class; {} is its name.")
@options(*_POLICY, *_RUN)
def clip(data: str, out: str, model: str, loss: Any, chunk: int | None, templates: tuple[str, ...], **v: Any) -> None:
    """Train a CLIP model on DATA: parquet with image and text, tars, or a csv of open_clip."""
    from thresher.train.clip import ClipSettings, train_clip

    _check_evaluation(v)
    settings = ClipSettings(
        model=model,
        loss=loss,
        chunk=chunk,
        eval_labels=v.pop("eval_labels"),
        eval_group=v.pop("eval_group"),
        **({"templates": templates} if templates else {}),
        schedule=_schedule(v),
    )
    _told(lambda: train_clip(data, out, settings, resume=v["resume"], progress=_progress(v)), out, v)


@train.command()
@click.argument("data")
@_OUT
@click.option(
    "--model", default="tiny", show_default=True, metavar="NAME", help="tiny, or a ResNet, ViT or other of timm."
)
@click.option("--version", type=click.Choice(["2", "3"]), default="2", show_default=True, help="MoCo v2 or v3.")
@click.option("--image-size", "side", type=click.IntRange(16), default=48, show_default=True, metavar="N")
@click.option("--queue", type=click.IntRange(1), metavar="K", help="v2: keys kept (default: fits the data).")
@click.option("--momentum", type=float, metavar="X", help="Of the key encoder (default: 0.99).")
@click.option("--temperature", type=float, default=0.2, show_default=True, metavar="X")
@options(*_POLICY, *_RUN)
def moco(data: str, out: str, version: Any, **v: Any) -> None:
    """Train a picture encoder on DATA by MoCo; captions are not needed."""
    from thresher.train.moco import MocoSettings, train_moco

    _check_evaluation(v)
    own = {name: v.pop(name) for name in ("model", "side", "queue", "momentum", "temperature")}
    settings = MocoSettings(
        **{name: value for name, value in own.items() if value is not None},
        version=3 if version == "3" else 2,
        eval_labels=v.pop("eval_labels"),
        eval_group=v.pop("eval_group"),
        schedule=_schedule(v),
    )
    _told(lambda: train_moco(data, out, settings, resume=v["resume"], progress=_progress(v)), out, v)


def _check_evaluation(given: dict[str, Any]) -> None:
    if not given["evals"] and (given["eval_labels"] or given["eval_group"]):
        raise UsageError("--eval-label and --eval-group say what to do with --eval PARQUET, which is not given")


def _schedule(given: dict[str, Any]) -> Any:
    from thresher.dynamic.policies.registry import ON_COMMAND_LINES, check_options
    from thresher.train.loop import Schedule

    epochs, samples = given["epochs"], given["samples"]
    if epochs is not None and samples is not None:
        raise UsageError("--epochs and --samples-seen both say how long the run is; give one")
    options = {name: given[name] for name in ("rho", "cycle", "mode", "scope", "threshold", "rule", "delta")}
    options["warmup"] = given["full_epochs"]
    check_options(given["policy"], options, prune=given["prune"], called=ON_COMMAND_LINES)
    names = ("batch_size", "policy", "selection", "seed", "lr", "weight_decay", "warmup", "precision", "device")
    more = ("workers", "evals", "eval_every", "checkpoint_minutes")
    return Schedule(
        epochs=10 if epochs is None and samples is None else epochs,
        samples=samples,
        prune=given["prune"],
        options={name: value for name, value in options.items() if value is not None},
        **{name: given[name] for name in (*names, *more) if given[name] is not None},
    )


def _progress(given: dict[str, Any]) -> Any:
    from thresher.runtime.progress import progress_for

    return progress_for(given["quiet"] or given["as_json"])


def _told(run: Callable[[], list[dict[str, Any]]], out: str, given: dict[str, Any]) -> None:
    """Train, and tell how it went."""
    from thresher.dynamic.run_folder import CHECKPOINT

    try:
        log = run()
    except KeyboardInterrupt:
        there = Path(out, CHECKPOINT).exists()
        again = "goes on from the last checkpoint" if there else "begins anew: there is no checkpoint yet"
        click.echo(f"interrupted; the same command with --resume {again}", err=True)
        raise click.exceptions.Exit(130) from None
    from thresher.train.data import SET_ASIDE
    from thresher.train.loop import table_of

    if given["as_json"]:
        click.echo(json.dumps({"out": out, "epochs": log}, indent=1))
        return
    last = log[-1]
    seen, seconds = sum(e["samples"] for e in log), sum(e["seconds"] for e in log)
    pruned, asked = last["pruned_so_far"], given["prune"]
    missed = f" ({asked:.1%} asked for)" if asked is not None and abs(asked - pruned) > 0.01 else ""
    click.echo(f"{len(log)} epochs, {seen:,} samples in {seconds:,.0f} s, {pruned:.1%} of the rows pruned{missed}")
    for name, found in last.get("eval", {}).items():
        click.echo(f"{name}:\n" + "\n".join(table_of(found)))
    aside = Path(out, SET_ASIDE)
    if aside.exists():
        rows = len(aside.read_text(encoding="utf-8").splitlines())
        click.echo(f"{rows:,} rows could not be used; they are listed in {aside}")
    click.echo(f"written to {out}")
