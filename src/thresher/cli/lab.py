"""``lab``: run plans of experiments, and show how they compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from thresher import api
from thresher.cli import text
from thresher.cli.options import JSON, QUIET, options
from thresher.cli.output import Interrupted, Output


def _plans() -> str:
    from thresher.lab.plan import shipped_plans

    return ", ".join(shipped_plans())


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
@click.option(
    "--eval-label", "labels", multiple=True, metavar="COLUMN",
    help="Class column of the evaluation sets; can be repeated.",
)  # fmt: skip
@click.option("--seeds", type=click.IntRange(1, 1000), metavar="N", help="Number of seeds.")
@click.option("--row", "rows", multiple=True, metavar="NAME", help="Run only this row, and full; can be repeated.")
@click.option("--corpus", "corpora", multiple=True, metavar="NAME", help="Run only this corpus; can be repeated.")
@click.option(
    "--workers", type=click.IntRange(1, 4096), metavar="N", help="Runs at a time (default: as many as fit the cores)."
)
@click.option("--minutes", type=float, metavar="X", help="Stop after this time; the same command continues.")
@click.option("--dry-run", is_flag=True, help="Check the plan and its data, and show what would run.")
@options(QUIET, JSON)
def lab(plan: str, out: str | None, dry_run: bool, quiet: bool, output: Output, **values: Any) -> None:
    """Run a plan: policies and selections, with several seeds, and a table with intervals.

    PLAN is a TOML file, or the name of a plan that comes with thresher: scan-clip, scan-moco, scan-coreset, clipcov,
    dbp, noise, field. Finished runs are not repeated.
    """
    if dry_run:
        result = api.lab(plan, dry_run=True, **values)
        output.result(result, text.lab_plan(result), cost=False)
        return
    if out is None:
        raise click.MissingParameter(param_hint="--out", param_type="option")
    try:
        result = api.lab(plan, out, progress=output.progress(quiet), **values)
    except KeyboardInterrupt:
        raise Interrupted("the same command continues; finished runs are not repeated") from None
    table = Path(out, "table.md").read_text(encoding="utf-8")
    output.result({"out": out, **result}, [*table.rstrip().split("\n"), "", f"written to {out}"])
