"""``inspect``, ``doctor``, ``advise``, ``methods`` and ``recipes``: what to know before a run."""

from __future__ import annotations

import re
import sys
from dataclasses import MISSING
from typing import Any

import click

from thresher import api
from thresher.cli import text
from thresher.cli.options import (
    DATA,
    JSON,
    MOST_WORKERS,
    POOL,
    QUIET,
    RUN,
    SEED,
    WHOLE,
    Common,
    Configured,
    WholeRange,
    engine_from,
    engine_options,
    options,
)
from thresher.cli.output import Output, columns_of_prose
from thresher.errors import PoolError, UsageError, suggest
from thresher.runtime.config import check_variables
from thresher.runtime.parameters import meant

_MOST_ROWS = 10**15
_TYPED = click.core.ParameterSource.COMMANDLINE
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


def _amount(ctx: click.Context, option: click.Parameter, text: str | None) -> float | None:
    """Parse a number of bytes a second ("2GB/s") or of seconds ("30ms")."""
    units = {"kb/s": 1e3, "mb/s": 1e6, "gb/s": 1e9, "ms": 1e-3, "s": 1.0}
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z/]+)\s*", text)
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise click.BadParameter(f"{text!r}: write a number and a unit, such as 2GB/s or 30ms", ctx, option)
    return float(match[1]) * factor


@click.command()
@click.argument("recipe")
@click.argument("pool", required=False)
@click.option("--rows", metavar="N", help="Rows, instead of POOL: 10_000_000_000.")
@click.option("--dim", type=WholeRange(1), metavar="D", help="Dimensions of the embeddings, with --rows.")
@click.option("--remote", is_flag=True, help="The pool is in object storage, with --rows.")
@click.option("--nodes", type=WholeRange(1), default=1, show_default=True, metavar="N", help="Machines.")
@click.option("--cores", type=WholeRange(1), metavar="N", help="Cores of each (default: those of this one).")
@click.option("--gpus", type=WHOLE, default=0, show_default=True, metavar="N", help="GPUs of each; only 0 so far.")
@click.option(
    "--bandwidth",
    callback=_amount,
    default="1GB/s",
    show_default=True,
    metavar="RATE",
    help="What a node reads from the storage.",
)
@click.option(
    "--latency",
    callback=_amount,
    default="30ms",
    show_default=True,
    metavar="TIME",
    help="Of a request to object storage.",
)
@click.option("--calibrate", is_flag=True, help="Measure the constants of the model here, in about ten seconds.")
@options(*engine_options("threads", "Engine whose tasks --calibrate measures."), JSON)
def plan(
    recipe: str, pool: str | None, rows: str | None, dim: int | None, remote: bool, nodes: int, cores: int | None,
    gpus: int, bandwidth: float, latency: float, calibrate: bool, engine: str, ray_address: str | None, output: Output,
) -> None:  # fmt: skip
    """Estimate seconds, bytes, requests and memory of a run on a cluster.

    RECIPE is a TOML file, or the name of a recipe that comes with thresher, or of a method. POOL is read for its
    headers only; without it, give --rows and --dim.
    """
    from dataclasses import asdict

    from thresher.check.calibration import calibrated
    from thresher.check.cost import Cluster, Constants, Rows, estimate, rows_of
    from thresher.pool.store import open_store
    from thresher.runtime.engine import cores as own_cores

    if gpus:
        raise UsageError(f"--gpus {gpus}: the model does not know GPUs yet; leave it out")
    if (pool is None) == (rows is None):
        raise UsageError("give either a pool or --rows and --dim")
    if pool is not None:
        if dim is not None or remote:
            raise UsageError(f"{pool}: its dimensions and place are known; remove --dim and --remote")
        known = rows_of(open_store(pool))
    else:
        digits = str(rows).replace("_", "")
        if not (digits.isascii() and digits.isdecimal()) or not 1 <= int(digits[:20]) <= _MOST_ROWS:
            likely = meant(int, str(rows))
            close = f"; type --rows {likely}" if likely not in ("", rows) else ""
            raise UsageError(f"--rows {rows}: give a whole number from 1 to {_MOST_ROWS:,}{close}")
        if dim is None:
            raise UsageError(f"--rows {rows}: give the dimensions of the embeddings too, such as --dim 768")
        known = Rows(int(digits), dim, files=max(int(digits) // 1_000_000, 1), remote=remote)
    cluster = Cluster(nodes, cores or own_cores(), bandwidth, latency)
    made = engine_from(engine, None, ray_address)
    constants = calibrated(made, known.dim) if calibrate else Constants()
    found = estimate(_steps(recipe), known, cluster, constants)
    result = {
        "rows": known.count, "dim": known.dim, "cluster": asdict(cluster), "constants": asdict(constants),
        "seconds": found.seconds, "seconds_with_twice_the_nodes": found.doubled, "not_counted": list(found.missing),
        "steps": [{**asdict(step), "bottleneck": step.bottleneck} for step in found.steps],
    }  # fmt: skip
    output.result(result, text.planned(found, known.count, cluster.nodes, calibrate), cost=False)


def _steps(recipe: str) -> list[Any]:
    """Return the steps of a recipe, or a method with the defaults of its parameters, as far as it has any."""
    import os

    from thresher.pruning.recipe import Recipe, shipped_recipes
    from thresher.pruning.registry import METHODS

    if recipe in shipped_recipes() or os.path.exists(recipe) or recipe not in METHODS.names():
        return list(Recipe.load(recipe).steps)
    cls: Any = METHODS.find(recipe)
    return [cls(**{"keep": "50%"} if hasattr(cls, "keep") or "keep" in cls.__dataclass_fields__ else {})]


@click.command()
@click.argument("data", required=False)
@click.option("--self", "own", is_flag=True, help="Show what this installation can use instead: for bug reports.")
@click.option("--torch", is_flag=True, help="With --self: import torch and list its devices.")
@click.option("--sample", type=WHOLE, default=1000, show_default=True, metavar="N", help="Number of images to decode.")
@click.option("--encoder", metavar="NAME", help="Also try this encoder, named as for embed, and estimate its time.")
@options(*DATA)
@click.option(
    "--workers", cls=Configured, setting="workers", type=WholeRange(1, MOST_WORKERS), metavar="N",
    help="Decoding threads (default: all cores).",
)  # fmt: skip
@click.option("--strict", is_flag=True, help="Exit with code 1 if something looks wrong.")
@options(QUIET, JSON)
@click.pass_context
def doctor(
    ctx: click.Context, /, data: str | None, own: bool, torch: bool, sample: int, encoder: str | None,
    workers: int | None, strict: bool, quiet: bool, output: Output, **values: Any,
) -> int:  # fmt: skip
    """Show what raw data contain, or with --self what this installation can use.

    DATA is the input of embed and train: tars, parquet, Arrow, csv, or a folder of images. The exit code is 2 if some
    data was not reached, such as after a network failure. With --self it is 1 if something must be corrected.
    """
    if own:
        return _self(ctx, output, torch)
    if data is None:
        raise click.MissingParameter(ctx=ctx, param_hint="DATA", param_type="argument")
    if torch:
        raise UsageError("--torch: is for doctor --self; pass that too")
    check_variables()
    from thresher.check.pool import look_instead

    how: dict[str, Any] = {"sample": sample, "encoder": encoder, "workers": workers, "progress": output.progress(quiet)}
    try:
        result = api.doctor(data, **how, **values)
    except (PoolError, UsageError) as error:
        if any(what in str(error) for what in ("; type ", "thresher inspect")):  # it says what to do
            raise
        raise type(error)(f"{error}{look_instead(data)}") from None
    output.result(result, text.diagnosis(result))
    if result["unreached"]:
        return 2
    return 1 if strict and result["warnings"] else 0


def _self(ctx: click.Context, output: Output, with_torch: bool) -> int:
    """Show what this installation can use; refuse arguments that say how to read data."""
    from thresher.check.machine import look_at_machine

    typed = [param for param in ctx.command.params if ctx.get_parameter_source(param.name or "") is _TYPED]
    allowed = ("own", "torch", "output", "quiet")
    if odd := [
        param.opts[-1] if isinstance(param, click.Option) else param.opts[-1].upper()
        for param in typed
        if param.name not in allowed
    ]:
        raise UsageError(f"{', '.join(odd)}: cannot be used with --self, which reads no data")
    result = look_at_machine(with_torch=with_torch)
    output.result(result, text.machine(result))
    return 1 if result["problems"] else 0


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
    summary = (cls.__doc__ or "").strip()
    output.result(result, text.method_page(name, summary, about, parameters, columns_of_prose()), cost=False)


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
        output.result(summaries, text.recipe_list(summaries, columns_of_prose()), cost=False)
        return
    if name not in shipped:
        raise UsageError(f"no shipped recipe {name!r}; there are {', '.join(shipped)}.{suggest(name, shipped)}")
    toml = shipped[name].rstrip()
    output.result({"name": name, "toml": toml}, toml.split("\n"), cost=False)


@click.command()
@click.argument("pool")
@click.option(
    "--samples-seen", "samples", type=WholeRange(1), required=True, metavar="N", help="Samples training will see."
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
