"""``train``, ``coreset``, ``mismatched``, ``reference``: train, and what runs show. Only training imports torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import click

from thresher import api
from thresher.cli import text
from thresher.cli.options import (
    BATCH_SIZE,
    DATA,
    DECODERS,
    DEVICE,
    IMAGES,
    JSON,
    LR,
    MODEL,
    NUMBER,
    OVERWRITE,
    QUIET,
    RUN_SEED,
    WHOLE,
    Choice,
    Group,
    PluginChoice,
    WholeRange,
    options,
)
from thresher.cli.output import Interrupted, Output
from thresher.errors import UsageError
from thresher.runtime.parameters import Share, choices, read


def _value(kind: Any, ctx: click.Context, param: click.Parameter, text: str | None) -> Any:
    """Return the value of a policy's option, parsed from text."""
    try:
        return None if text is None else read(kind, text)
    except UsageError as error:
        raise click.BadParameter(str(error), ctx, param) from None


_OF_POLICY = "of_policy_"


class _Trainer(click.Command):
    """A command with the options of every policy, which load when it is parsed or its help is shown."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters; those of policies come before ``--epochs``."""
        own = super().get_params(ctx)
        at = next(i for i, param in enumerate(own) if param.name == "epochs")
        return [
            *own[:at],
            *_policy_options(frozenset(flag.lstrip("-") for param in own for flag in param.opts)),
            *own[at:],
        ]


@cache
def _policy_options(taken: frozenset[str]) -> list[click.Option]:
    """Return ``--policy``, the shared options and the flags of all policies; ``taken`` are flags of the command."""
    from thresher.dynamic.registry import POLICIES, flags

    policies = POLICIES.all()
    need = " or ".join(name for name, cls in policies.items() if cls.needs_selection)
    prune = "Share of the samples of the run to prune, such as 30% (default: as published for the policy)."
    chosen = f"For --policy {need}: a selection folder, or a file of keys."
    return [
        click.Option(
            ["--policy"],
            type=PluginChoice(lambda: POLICIES),
            default="full",
            show_default=True,
            help="Pruning policy.",
        ),
        click.Option(["--prune"], callback=partial(_value, Share), metavar="SHARE", help=prune),
        click.Option(["--selection"], metavar="SEL", help=chosen),
        *map(_option, flags(taken | {"policy", "prune", "selection"})),
    ]


def _option(flag: Any) -> click.Option:
    """Return the click option of a policy's flag."""
    how: dict[str, Any] = {"help": flag.help, "default": None}
    declared = f"--{flag.flag}"
    if flag.kind is bool:
        declared = f"--{flag.flag}/--no-{flag.flag}"
    elif words := choices(flag.kind):
        how["type"] = Choice(words)
    elif flag.kind is int:
        how |= {"type": WHOLE if flag.least is None else WholeRange(flag.least), "metavar": flag.metavar}
    else:
        how |= {"callback": partial(_value, flag.kind), "metavar": flag.metavar}
    return click.Option([declared, _OF_POLICY + flag.flag.replace("-", "_")], **how)


_RUN = [
    click.option("--epochs", type=WholeRange(1), metavar="N", help="Length of the run in epochs (default: 10)."),
    click.option("--samples-seen", "samples", type=WholeRange(1), metavar="N", help="Or its length in samples."),
    BATCH_SIZE,
    LR,
    click.option("--weight-decay", type=NUMBER, metavar="X", help="Weight decay (default: 0.1)."),
    click.option(
        "--warmup", type=NUMBER, default=0.05, show_default=True, metavar="SHARE",
        help="Share of the run with a rising learning rate.",
    ),
    click.option(
        "--compose", type=Choice(["diversity", "frequency"]),
        help="Compose every batch by the concepts of its rows (CABS); needs --concepts.",
    ),
    click.option(
        "--concepts", metavar="WHERE",
        help="For --compose: column:NAME, entries:FILE, or the folder of clusters that thresher cluster wrote.",
    ),
    click.option(
        "--super-batch", type=WholeRange(2), metavar="N",
        help="For --compose: batches of rows that a batch is chosen from (default: 5).",
    ),
    RUN_SEED,
    click.option(
        "--precision", type=Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True,
        help="Precision of the model; auto: bfloat16 if the device has instructions for it, else float32.",
    ),
    DEVICE,
    DECODERS,
    click.option(
        "--eval", "evals", multiple=True, metavar="FILE", help="Parquet file to evaluate on; can be repeated."
    ),
    click.option(
        "--eval-every", type=WholeRange(0), default=5, show_default=True, metavar="N",
        help="Epochs between evaluations; 0: only at the end.",
    ),
    click.option(
        "--eval-label", "eval_labels", multiple=True, metavar="COLUMN",
        help="Class column of the evaluation sets (default: label_name, label); can be repeated.",
    ),
    click.option(
        "--eval-group", metavar="COLUMN",
        help="Column that groups equivalent rows of the evaluation sets (default: group).",
    ),
    click.option(
        "--checkpoint-minutes", type=NUMBER, default=5.0, show_default=True, metavar="X",
        help="Minutes between checkpoints.",
    ),
    click.option("--resume", is_flag=True, help="Resume the run in DIR, if there is one."),
    QUIET,
    JSON,
]  # fmt: skip
_OUT = click.option("-o", "--out", required=True, metavar="DIR", help="Folder of the run.")


@click.group(cls=Group)
def train() -> None:
    """Train a model and prune its data while it trains."""


@train.command(cls=_Trainer)
@click.argument("data")
@_OUT
@MODEL
@click.option(
    "--loss", type=Choice(["clip", "siglip", "drrho", "distill"]), default="clip", show_default=True,
    help="Loss; drrho and distill need a pool with embeddings of the same rows as --reference.",
)  # fmt: skip
@click.option(
    "--temperature", type=NUMBER, metavar="X",
    help="Temperature of drrho, or of the teacher of distill (default: 0.01).",
)  # fmt: skip
@click.option("--distill-weight", type=NUMBER, metavar="X", help="Share of the distillation in distill (default: 1).")
@click.option(
    "--chunk", type=WholeRange(1), metavar="N",
    help="Rows per forward pass: less memory, same gradients.",
)  # fmt: skip
@click.option(
    "--template", "templates", multiple=True, metavar="TEXT",
    help="Prompt for a class, {} for its name; can be repeated.",
)  # fmt: skip
@options(*_RUN, *DATA)
def clip(data: str, out: str, model: str, loss: Any, chunk: int | None, templates: tuple[str, ...], **v: Any) -> None:
    """Train a CLIP model.

    DATA is parquet with image and text, tars, or an open_clip csv.
    """
    v |= {"model": model, "loss": loss, "chunk": chunk, **({"templates": templates} if templates else {})}
    if loss in ("drrho", "distill"):
        v["reference"] = _reference_of_loss(v)
    _trained(api.train_clip, data, out, v)


def _reference_of_loss(values: dict[str, Any]) -> str:
    """Return the value of ``--reference`` for a loss that needs it; the policy gets it too, if it chooses batches."""
    from thresher.dynamic.registry import POLICIES

    cls, given, loss = POLICIES.find(values["policy"]), values.get(_OF_POLICY + "reference"), values["loss"]
    if given is None:
        raise UsageError(f"--loss {loss} needs --reference POOL: a pool with embeddings of the same rows")
    if cls.needs_references:
        raise UsageError(
            f"--loss {loss} and --policy {cls.name} need two references, a pool and a file of losses; use one of the "
            "two, or thresher.train_clip in Python"
        )
    if not cls.chooses_batches:
        values[_OF_POLICY + "reference"] = None
    return str(given)


@train.command(cls=_Trainer)
@click.argument("data")
@_OUT
@click.option(
    "--model", default="tiny", show_default=True, metavar="NAME", help="tiny, or a timm model such as a ResNet or ViT."
)
@click.option("--version", type=Choice(["2", "3"]), default="2", show_default=True, help="MoCo v2 or v3.")
@click.option(
    "--image-size", "side", type=WholeRange(16), default=48, show_default=True, metavar="N",
    help="Image size in pixels.",
)  # fmt: skip
@click.option(
    "--queue",
    type=WholeRange(1),
    metavar="N",
    help="Keys in the queue of v2 (default: depends on the size of the data).",
)
@click.option("--momentum", type=NUMBER, metavar="X", help="Momentum of the key encoder (default: 0.99).")
@click.option(
    "--temperature", type=NUMBER, default=0.2, show_default=True, metavar="X", help="Temperature of the loss."
)
@options(*_RUN, *IMAGES)
def moco(data: str, out: str, version: Any, **v: Any) -> None:
    """Train an image encoder with MoCo, without captions.

    DATA is parquet with images, tars, or an open_clip csv.
    """
    _trained(api.train_moco, data, out, v | {"version": 3 if version == "3" else 2})


def _trained(run: Callable[..., list[dict[str, Any]]], data: str, out: str, values: dict[str, Any]) -> None:
    """Train and print the result."""
    from thresher.dynamic.registry import check_options
    from thresher.dynamic.run_folder import CHECKPOINT

    output: Output = values.pop("output")
    progress = output.progress(values.pop("quiet"))
    if not values["evals"] and (values["eval_labels"] or values["eval_group"]):
        raise UsageError("--eval-label and --eval-group need --eval FILE, which is not given")
    if values["epochs"] is not None and values["samples"] is not None:
        raise UsageError("--epochs and --samples-seen both set the length of the run; give one")
    own = [name for name in values if name.startswith(_OF_POLICY)]
    flags = {name.removeprefix(_OF_POLICY).replace("_", "-"): values.pop(name) for name in own}
    prune = values["prune"]
    values["options"] = check_options(values["policy"], flags, prune=prune, flags=True)
    given = {name: value for name, value in values.items() if value is not None}
    try:
        log = run(data, out, progress=progress, **given)
    except KeyboardInterrupt:
        saved = Path(out, CHECKPOINT).exists()
        where = "resumes from the last checkpoint" if saved else "starts over: there is no checkpoint yet"
        raise Interrupted(f"the same command with --resume {where}") from None
    output.result({"out": out, "epochs": log}, text.trained(out, log, prune))


# --- coreset --------------------------------------------------------------------------------------


@click.command()
@click.argument("run")
@click.option("-o", "--out", required=True, metavar="DIR", help="Selection folder to write.")
@click.option(
    "--keep", metavar="N|SHARE",
    help="Rows to keep: a share such as 70%, or a number. For a run with sift, default: all that match.",
)  # fmt: skip
@click.option("--pool", metavar="POOL", help="Where the pool is now, if it was moved.")
@options(OVERWRITE, JSON)
def coreset(run: str, out: str, keep: str | None, pool: str | None, overwrite: bool, output: Output) -> None:
    """Select the rows that a training run found least redundant.

    RUN is the folder of the run. The selection keeps the rows that were a candidate for pruning in the fewest epochs.
    """
    from thresher.runtime.results import free_folder
    from thresher.selection import FILES

    target = free_folder(out, overwrite, FILES, compared=True)
    selection = api.coreset(run, keep, pool=pool)
    selection.save(target, overwrite=overwrite, say=output.progress().say)
    lines = itertools.chain(selection.steps[-1].notes, text.kept(selection, target))
    output.result({"out": str(target), **selection.header()}, lines)


# --- mismatched -----------------------------------------------------------------------------------


@click.command()
@click.argument("data")
@click.option("-o", "--out", required=True, metavar="DIR", help="Selection folder to write.")
@click.option("--run", metavar="DIR", help="Folder of the training run (default: the selection's, with '-run' added).")
@click.option("--epochs", type=WholeRange(2), default=4, show_default=True, metavar="N", help="Epochs to train for.")
@MODEL
@BATCH_SIZE
@RUN_SEED
@DEVICE
@DECODERS
@options(*DATA, OVERWRITE, QUIET, JSON)
def mismatched(
    data: str, out: str, run: str | None, epochs: int, overwrite: bool, quiet: bool, output: Output, **v: Any
) -> None:
    """Drop the pairs whose image and caption do not belong together.

    DATA is raw data, see 'thresher train clip'. A small model is trained for a few epochs, without any other model; a
    pair whose loss ranks high in every epoch is probably mismatched. The same command resumes a run that was killed.
    """
    from thresher.runtime.results import free_folder
    from thresher.selection import FILES

    target = free_folder(out, overwrite, FILES, compared=True)
    folder = run or f"{os.path.normpath(out)}-run"
    if os.path.realpath(folder) == os.path.realpath(out):
        raise UsageError(f"--run and --out are both {out}; give two folders")
    progress = output.progress(quiet)
    how: dict[str, Any] = {"epochs": epochs, "policy": "sift", "options": {"warmup": epochs}, "progress": progress}
    try:
        api.train_clip(data, folder, resume=True, **how, **v)
    except KeyboardInterrupt:
        raise Interrupted("the same command continues from the last checkpoint, if there is one") from None
    selection = api.coreset(folder)
    selection.save(target, overwrite=overwrite, say=progress.say)
    lines = itertools.chain(selection.steps[-1].notes, text.mismatched(selection, target, folder))
    output.result({"out": str(target), "run": folder, **selection.header()}, lines)


# --- reference ------------------------------------------------------------------------------------

_TYPED = click.core.ParameterSource.COMMANDLINE
_OF_POOLS = ("data", "out", "pool", "batch_size", "seed", "key", "overwrite", "quiet", "output")  # with --from


@click.command()
@click.argument("data", required=False)
@click.option("-o", "--out", required=True, metavar="FILE", help="Parquet file to write.")
@click.option("--from", "pool", metavar="POOL", help="Use the embeddings stored in a pool instead of training models.")
@click.option(
    "--cross-fit", "folds", type=WholeRange(2), default=2, show_default=True, metavar="N",
    help="Parts of the data; each is scored by a model trained on the others.",
)  # fmt: skip
@click.option("--run", metavar="DIR", help="Folder of the training runs (default: the file's name with '-run' added).")
@click.option("--epochs", type=WholeRange(1), default=4, show_default=True, metavar="N", help="Epochs to train for.")
@MODEL
@click.option("--loss", type=Choice(["clip", "siglip"]), default="clip", show_default=True, help="Contrastive loss.")
@BATCH_SIZE
@LR
@RUN_SEED
@DEVICE
@DECODERS
@options(*DATA, OVERWRITE, QUIET, JSON)
@click.pass_context
def reference(
    ctx: click.Context, /, data: str | None, out: str, pool: str | None, quiet: bool, output: Output, **v: Any
) -> None:
    """Write a loss of every row under a reference model, for the policy rho.

    DATA is raw data, see 'thresher train clip'. Small models are trained, each without one part of the data, and score
    the part that they have not seen. The same command resumes a run that was killed.
    """
    if (data is None) == (pool is None):
        raise UsageError("give either DATA to train on, or --from POOL, whose stored embeddings give the losses")
    if pool is not None:
        given = [param for param in ctx.command.params if ctx.get_parameter_source(param.name or "") is _TYPED]
        if odd := [param.opts[-1] for param in given if param.name not in _OF_POOLS]:
            raise UsageError(f"{', '.join(odd)}: cannot be used with --from {pool}, which trains nothing")
        v = {name: v[name] for name in _OF_POOLS if name in v}
    given_values = {name: value for name, value in v.items() if value is not None}
    try:
        made = api.reference(data, out, pool=pool, progress=output.progress(quiet), **given_values)
    except KeyboardInterrupt:
        raise Interrupted("the same command continues from the last checkpoint, if there is one") from None
    output.result(made, text.referenced(made))
