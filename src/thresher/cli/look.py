"""``inspect``, ``doctor``, ``advise``, ``methods`` and ``recipes``: what to know before a run."""

from __future__ import annotations

import sys
from dataclasses import MISSING
from typing import Any

import click

from thresher import api
from thresher.cli import text
from thresher.cli.options import DATA, JSON, MOST_WORKERS, POOL, QUIET, RUN, SEED, Common, options
from thresher.cli.output import Output
from thresher.errors import PoolError, UsageError, suggest

_TYPES = {"int": "integer", "float": "number", "str": "text", "bool": "true | false", "Keep": "share or count"}


@click.command()
@click.argument("pool")
@click.option("--quick", is_flag=True, help="Check only about 100,000 rows.")
@options(*POOL, *RUN)
def inspect(pool: str, quick: bool, **values: Any) -> None:
    """Show what a pool contains, what looks wrong and what a run will cost.

    POOL is a folder or file of embeddings with their metadata.
    """
    common = Common.from_values(values)
    result = api.inspect(common.open(pool), quick=quick, **common.resources())
    common.output.result(result, text.inspection(result, common.engine))


@click.command()
@click.argument("data")
@click.option("--sample", type=int, default=1000, show_default=True, metavar="N", help="Number of images to decode.")
@click.option("--encoder", metavar="NAME", help="Also try this encoder, named as for embed, and estimate its time.")
@options(*DATA)
@click.option(
    "--workers", type=click.IntRange(1, MOST_WORKERS), metavar="N", help="Decoding threads (default: all cores)."
)
@click.option("--strict", is_flag=True, help="Exit with code 1 if something looks wrong.")
@options(QUIET, JSON)
def doctor(
    data: str, sample: int, encoder: str | None, workers: int | None, strict: bool, quiet: bool, output: Output,
    **values: Any,
) -> int:  # fmt: skip
    """Show what raw data contain, what looks wrong and what embedding will cost.

    DATA is the input of embed and train: tars, parquet, Arrow, csv, or a folder of images. The exit code is 2 if some
    data was not reached, such as after a network failure.
    """
    from thresher.check.pool import look_instead

    how: dict[str, Any] = {"sample": sample, "encoder": encoder, "workers": workers, "progress": output.progress(quiet)}
    try:
        result = api.doctor(data, **how, **values)
    except (PoolError, UsageError) as error:
        if "thresher inspect" in str(error):
            raise
        raise type(error)(f"{error}{look_instead(data)}") from None
    output.result(result, text.diagnosis(result))
    if result["unreached"]:
        return 2
    return 1 if strict and result["warnings"] else 0


@click.command()
@click.argument("name", required=False)
@JSON
def methods(name: str | None, output: Output) -> None:
    """List the pruning methods, or describe one of them.

    With NAME, describe that method and its parameters.
    """
    from thresher.pruning.registry import METHODS

    if name is None:
        summaries = {key: (cls.__doc__ or "").strip().splitlines()[0] for key, cls in METHODS.all().items()}
        output.result(summaries, text.method_list(summaries), cost=False)
        return
    cls: Any = METHODS.find(name)
    parameters = _parameters(cls)
    about = (sys.modules[cls.__module__].__doc__ or "").strip()
    result = {"name": name, "about": about, "parameters": parameters}
    output.result(result, text.method_page(name, (cls.__doc__ or "").strip(), about, parameters), cost=False)


def _parameters(cls: Any) -> list[dict[str, Any]]:
    """Return name, type, default and help of each parameter of a method."""
    from thresher.runtime.parameters import choices, parameters_of, type_of, without_none

    rows = []
    for item in parameters_of(cls):
        kind = without_none(type_of(cls, item.name))
        rows.append(
            {
                "name": item.name,
                "type": " | ".join(choices(kind)) or _TYPES.get(kind.__name__, kind.__name__),
                "default": None if item.default is MISSING else item.default,
                "required": item.default is MISSING,
                "help": item.metadata.get("help", ""),
            }
        )
    return rows


@click.command()
@click.argument("name", required=False)
@JSON
def recipes(name: str | None, output: Output) -> None:
    """List the recipes that come with thresher, or print one of them.

    With NAME, print that recipe as TOML.
    """
    from thresher.pruning.recipe import Recipe, shipped_recipes

    shipped = shipped_recipes()
    if name is None:
        summaries = {key: " ".join(Recipe.load(key).description.split()) for key in shipped}
        lines = (line for key, about in summaries.items() for line in (f"{key}: {about}", ""))
        output.result(summaries, lines, cost=False)
        return
    if name not in shipped:
        raise UsageError(f"no shipped recipe {name!r}; there are {', '.join(shipped)}.{suggest(name, shipped)}")
    toml = shipped[name].rstrip()
    output.result({"name": name, "toml": toml}, toml.split("\n"), cost=False)


@click.command()
@click.argument("pool")
@click.option(
    "--samples-seen", "samples", type=click.IntRange(1), required=True, metavar="N", help="Samples training will see."
)
@click.option("--runs", metavar="LAB", help="Folder of a lab with runs on this pool, or its results.json.")
@click.option("--metric", metavar="NAME", help="Metric of the runs, in percent (default: the first that all have).")
@click.option("--row", "rows", multiple=True, metavar="NAME", help="Row of the lab to use; can be repeated.")
@options(SEED, *POOL, JSON)
def advise(
    pool: str, samples: int, runs: str | None, metric: str | None, rows: tuple[str, ...], output: Output, **values: Any
) -> None:
    """Advise how much of a pool to keep for a number of samples seen.

    A law of repetition is fitted on your own runs, with several shares kept and several lengths. Without runs, the
    output says what is not known.
    """
    if runs is None and (metric or rows):
        raise UsageError("--metric and --row are of the runs; give --runs LAB")
    common = Common.from_values({**values, "engine": "threads", "output": output})
    found = api.advise(common.open(pool), samples, runs, metric=metric, rows=rows, seed=common.seed or 0)
    output.result(found, text.advised(found))
