"""``evaluate``, ``prove`` and ``lab``: evaluate models, and run experiments that compare methods and policies."""

from __future__ import annotations

from typing import Any

import click

from thresher import api
from thresher.cli import text
from thresher.cli.options import (
    BATCH_SIZE,
    DEVICE,
    JSON,
    MODEL,
    MOST_WORKERS,
    NUMBER,
    QUIET,
    WHOLE,
    Choice,
    Configured,
    WholeRange,
    engine_from,
    engine_options,
    options,
)
from thresher.cli.output import Interrupted, Output
from thresher.runtime.places import local_path

_LABELS = click.option(
    "--eval-label", "labels", multiple=True, metavar="COLUMN",
    help="Class column of the evaluation sets; can be repeated.",
)  # fmt: skip
_WORKERS = click.option(
    "--workers",
    type=WholeRange(1, MOST_WORKERS),
    metavar="N",
    help="Runs at a time (default: as many as fit the cores).",
)


@click.command()
@click.argument("model")
@click.option(
    "--data", multiple=True, required=True, metavar="DATA",
    help="Evaluation set, or a suite of several (.toml); can be repeated.",
)  # fmt: skip
@click.option("-o", "--out", metavar="FILE", help="Write the results too, as JSON Lines (eval_results.jsonl).")
@click.option(
    "--task", "tasks", multiple=True, type=Choice(["zero-shot", "retrieval", "knn", "probe"]),
    help="Only this task (default: all that set and model allow); can be repeated.",
)  # fmt: skip
@click.option(
    "--label", "labels", multiple=True, metavar="COLUMN",
    help="Class column (default: label_name, else label); can be repeated.",
)  # fmt: skip
@click.option("--group", metavar="COLUMN", help="Column that groups equivalent rows (default: group).")
@click.option("--text", metavar="COLUMN", help="Column of captions.")
@click.option(
    "--template", "templates", multiple=True, metavar="TEXT",
    help="Prompt for a class, {} for its name (default: those of the set); can be repeated.",
)  # fmt: skip
@click.option(
    "--train", metavar="DATA", help="Rows to fit kNN and probes on (default: the set's own, else half of it)."
)
@click.option("--seed", type=WHOLE, default=0, show_default=True, metavar="SEED", help="Seed of the halves.")
@click.option(
    "--device", cls=Configured, setting="device", default="auto", show_default=True, metavar="NAME",
    help="Where to run: cpu, cuda or cuda:1.",
)  # fmt: skip
@click.option(
    "--precision", type=Choice(["auto", "float32", "bfloat16", "float16"]), default="float32", show_default=True,
    help="Precision of the model.",
)  # fmt: skip
@options(QUIET, JSON)
def evaluate(model: str, data: tuple[str, ...], quiet: bool, output: Output, **values: Any) -> None:
    """Evaluate a model: zero-shot classification, retrieval, kNN and linear probes.

    MODEL is the name of an encoder (such as open_clip:ViT-B-32/laion2b_s34b_b79k), the folder of a training
    run, or the log folder of open_clip. DATA is parquet, a webdataset of CLIP_benchmark, a folder of classes, or a
    Hugging Face dataset on disk.
    """
    results = api.evaluate_model(model, data, progress=output.progress(quiet), **values)
    output.result({"model": model, "results": results, "out": values["out"]}, text.evaluated(results, values["out"]))


@click.command()
@click.argument("plan")
@click.option("-o", "--out", metavar="DIR", help="Folder of the results; the same command resumes.")
@click.option("--profile", metavar="NAME", help="Profile of the plan, such as cpu or gpu.")
@click.option(
    "--data", default=".", show_default=True, metavar="DIR",
    help="Folder of the data that the plan names by a relative path.",
)  # fmt: skip
@click.option("--train", metavar="DATA", help="Train on these data instead of those of the plan.")
@click.option("--eval", "evals", multiple=True, metavar="FILE", help="Evaluate on this set instead; can be repeated.")
@_LABELS
@click.option("--seeds", type=WholeRange(1, 1000), metavar="N", help="Number of seeds.")
@click.option("--row", "rows", multiple=True, metavar="NAME", help="Run only this row, and full; can be repeated.")
@click.option("--corpus", "corpora", multiple=True, metavar="NAME", help="Run only this corpus; can be repeated.")
@_WORKERS
@click.option("--minutes", type=NUMBER, metavar="X", help="Stop after this time; the same command continues.")
@click.option(
    "--reuse", multiple=True, metavar="PATH",
    help="Folder or details.json of another plan; the runs that are the same are taken from it. Can be repeated.",
)  # fmt: skip
@options(*engine_options(None, "Where runs start, such as ray: its workers must see the folder and the data."))
@click.option("--dry-run", is_flag=True, help="Check the plan and its data, and show what would run.")
@options(QUIET, JSON)
def lab(
    plan: str, out: str | None, dry_run: bool, engine: str | None, ray_address: str | None, quiet: bool, output: Output,
    **values: Any,
) -> None:  # fmt: skip
    """Run a plan: policies and selections, with several seeds, and a table with intervals.

    PLAN is a TOML file, or the name of a plan that comes with thresher: scan-clip, scan-moco, scan-coreset, clipcov,
    dbp, noise, field, web-like. Finished runs are not repeated.
    """
    if dry_run:
        result = api.run_plan(plan, dry_run=True, **values)
        output.result(result, text.lab_plan(result), cost=False)
        return
    if out is None:
        raise click.MissingParameter(param_hint="--out", param_type="option")
    if engine is not None or ray_address is not None:
        values["engine"] = engine_from(engine or "", values["workers"], ray_address)
    try:
        result = api.run_plan(plan, out, progress=output.progress(quiet), **values)
    except KeyboardInterrupt:
        raise Interrupted("the same command continues; finished runs are not repeated") from None
    table = (local_path(out) / "table.md").read_text(encoding="utf-8")
    output.result({"out": out, **result}, [*table.rstrip().split("\n"), "", f"written to {out}"])


@click.command()
@click.argument("data")
@click.option("-o", "--out", required=True, metavar="DIR", help="Folder of the results; the same command resumes.")
@click.option("--method", metavar="NAME", help="Method that selects rows (default: density).")
@click.option("--policy", metavar="NAME", help="Or a policy that prunes while training.")
@click.option("--selection", metavar="SEL", help="Or a selection of these data, or a file of keys.")
@click.option(
    "--keep", default="70%", show_default=True, metavar="SHARE",
    help="Rows to keep, or samples to train on; for --selection the share that it keeps.",
)  # fmt: skip
@click.option(
    "--eval", "evals", multiple=True, metavar="FILE",
    help="Parquet file to evaluate on (default: a tenth of the data is held out); can be repeated.",
)  # fmt: skip
@_LABELS
@click.option("--seeds", type=WholeRange(1, 1000), default=3, show_default=True, metavar="N", help="Seeds.")
@click.option("--epochs", type=WholeRange(1), default=8, show_default=True, metavar="N", help="Of full training.")
@MODEL
@BATCH_SIZE
@click.option(
    "--rows", type=WholeRange(200), default=40_000, show_default=True, metavar="N",
    help="Use at most this many rows, drawn at random.",
)  # fmt: skip
@DEVICE
@_WORKERS
@options(QUIET, JSON)
def prove(data: str, out: str, quiet: bool, output: Output, **values: Any) -> None:
    """Show whether pruning pays on your data: a method or policy, all rows and random rows.

    DATA is raw data, see 'thresher train clip'. Small models are trained with several seeds, all but one of them on
    equally many samples; the time is estimated first, and the last line is what the intervals show.
    """
    try:
        result = api.prove(data, out, progress=output.progress(quiet), **values)
    except KeyboardInterrupt:
        raise Interrupted("the same command continues; finished runs are not repeated") from None
    table = (local_path(out) / "table.md").read_text(encoding="utf-8")
    output.result(
        {"out": out, **result}, [*table.rstrip().split("\n"), "", f"written to {out}", "", result["sentence"]]
    )
