"""``select``, ``run``, ``score`` and ``cluster``: prune a pool, write scores, compute clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from thresher import api
from thresher.cli import text
from thresher.cli.options import (
    OVERWRITE,
    POOL,
    RUN,
    SEED,
    SHARD,
    WHOLE,
    WITHIN,
    Choice,
    Common,
    Group,
    field_options,
    options,
)
from thresher.errors import OutputError, UsageError

_OUT = click.option("-o", "--out", required=True, metavar="DIR", help="Selection folder to write.")


# --- select, run ----------------------------------------------------------------------------------


class _Methods(Group):
    """One subcommand per method; its options are the fields of the method."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from thresher.pruning.registry import METHODS

        return list(METHODS.all())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from thresher.pruning.registry import METHODS

        if not ctx.resilient_parsing and METHODS.broken(cmd_name):
            METHODS.find(cmd_name)  # raises with the reason
        cls = _named(ctx, cmd_name)
        return _method_command(cmd_name, cls) if cls else None


def _named(ctx: click.Context, name: str) -> Any:
    """Return a method, None if there is none; while a shell completes, the others are not loaded."""
    from thresher.pruning.registry import METHODS

    if not ctx.resilient_parsing:
        return METHODS.all().get(name)
    try:
        return METHODS.find(name)
    except UsageError:
        return None


@click.group(cls=_Methods)
def select() -> None:
    """Prune a pool with one method."""


def _method_command(name: str, cls: Any) -> click.Command:
    @click.argument("pool")
    @options(_OUT, *field_options(cls), WITHIN, SEED, OVERWRITE, *POOL, *RUN)
    def command(pool: str, out: str, within: str | None, overwrite: bool, **values: Any) -> None:
        from thresher.pruning.registry import build

        common = Common.from_values(values)
        method = build(name, {key: value for key, value in values.items() if value is not None})
        _run(common, pool, [method], common.seed or 0, out, within, overwrite)

    return click.command(name, help=(cls.__doc__ or "").strip() + f"\n\n\x08\nSee: thresher methods {name}")(command)


@click.command()
@click.argument("recipe")
@click.argument("pool")
@options(_OUT, WITHIN, SEED, OVERWRITE, *POOL, *RUN)
def run(recipe: str, pool: str, out: str, within: str | None, overwrite: bool, **values: Any) -> None:
    """Prune a pool with a recipe of several steps.

    RECIPE is a TOML file, or the name of a recipe that comes with thresher; see thresher recipes.
    """
    from thresher.pruning.recipe import Recipe

    common = Common.from_values(values)
    loaded = Recipe.load(recipe)
    seed = loaded.seed if common.seed is None else common.seed
    _run(common, pool, list(loaded.steps), seed, out, within, overwrite)


def _run(common: Common, pool: str, steps: list[Any], seed: int, out: str, within: str | None, overwrite: bool) -> None:
    """Run steps on a pool and write the selection; an earlier result of the same steps may be replaced."""
    from thresher.io.places import place
    from thresher.runtime.parameters import recorded
    from thresher.runtime.results import free_folder
    from thresher.selection import FILES, Selection

    earlier = Selection.load(within) if within else None
    target, fingerprint = place(out), None
    if (target / "selection.json").exists() and not overwrite:
        known = [(s.method, dict(s.parameters), s.seed) for s in Selection.load(target).steps]
        requested = [(s.method, dict(s.parameters), s.seed) for s in (earlier.steps if earlier is not None else ())]
        requested += [(s.name, recorded(s), seed) for s in steps]
        if [s for s in known if s[0] != "skip-bad"] != [s for s in requested if s[0] != "skip-bad"]:
            raise OutputError(f"{out}: contains the result of other steps; choose another name or pass --overwrite")
        fingerprint = Selection.load(target).store
        overwrite = True
    target = free_folder(target, overwrite, FILES)
    store = common.open(pool)
    if fingerprint not in (None, store.fingerprint()):
        raise OutputError(f"{out}: contains the result of another pool; choose another name or pass --overwrite")
    selection = api.select(store, steps, seed=seed, within=earlier, **common.resources())
    selection.save(target, overwrite=overwrite)
    common.output.result({"out": str(target), **selection.header()}, text.kept(selection, target))


# --- sweep ----------------------------------------------------------------------------------------


class _Sweeps(_Methods):
    """One subcommand per method with a budget or threshold, which is a list of values."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from thresher.pruning.registry import METHODS

        return [name for name, cls in METHODS.all().items() if _swept(cls)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        cls = _named(ctx, cmd_name)
        return _sweep_command(cmd_name, cls) if cls and _swept(cls) else None


_SWEPT = ("keep", "eps", "threshold")
_SWEPT_COLUMNS = (
    "Columns of the table: score is the mean score of the rows kept; covariance the error of the image-text "
    "covariance, and covariance_ratio that error divided by the one of as many random rows, so that below 1 is better "
    "than random; coverage the share of clusters with a row kept, and least_kept the lowest share of a cluster that is "
    "kept."
)


def _swept(cls: Any) -> list[str]:
    """Return the parameters of a method that can be swept."""
    from thresher.runtime.parameters import parameters_of

    return [item.name for item in parameters_of(cls) if item.name in _SWEPT]


@click.group(cls=_Sweeps)
def sweep() -> None:
    """Compare several budgets or thresholds of a method, from one pass."""


def _sweep_command(name: str, cls: Any) -> click.Command:
    several = [
        click.option(
            f"--{each}",
            each,
            metavar="VALUES",
            help="Values to compare, such as 0.01,0.02, or a range such as 10%..90%.",
        )
        for each in _swept(cls)
    ]

    @click.argument("pool")
    @options(*several, *field_options(cls, without=_swept(cls)))
    @click.option("--covariance/--no-covariance", default=True, help="Measure the covariance error, if possible.")
    @options(WITHIN, SEED, *POOL, *RUN)
    def command(pool: str, within: str | None, covariance: bool, **values: Any) -> None:
        from thresher.report.sweep import values_of

        common = Common.from_values(values)
        given = {key: values.pop(key) for key in _swept(cls)}
        lists: dict[str, Any] = {key: values_of(value) for key, value in given.items() if value is not None}
        if len(lists) != 1:
            flags = " or ".join(f"--{each}" for each in _swept(cls))
            raise UsageError(f"give one list of values: {flags}, such as 0.01,0.02 or 10%..90%")
        others = {key: value for key, value in values.items() if value is not None}
        how: dict[str, Any] = {"seed": common.seed or 0, "within": within, "covariance": covariance}
        table = api.sweep(common.open(pool), name, **lists, **others, **how, **common.resources())
        result = {"method": name, "parameter": table.parameter, "rows": list(table), "notes": list(table.notes)}
        common.output.result(result, [*table.notes, *table.lines()])

    about = f"Compare what {name} keeps with several values.\n\n{_SWEPT_COLUMNS}"
    return click.command(name, help=f"{about}\n\n\x08\nSee: thresher methods {name}")(command)


# --- score ----------------------------------------------------------------------------------------


class _Scorers(Group):
    """One subcommand per scoring method, without the options that set a cutoff."""

    what = "scoring method "

    def list_commands(self, ctx: click.Context) -> list[str]:
        from thresher.pruning.scores import scoring_methods

        return list(scoring_methods())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from thresher.pruning.scores import Scored

        cls = _named(ctx, cmd_name)
        return _score_command(cmd_name, cls) if cls and issubclass(cls, Scored) else None


@click.group(cls=_Scorers)
def score() -> None:
    """Write a method's score of every row to a parquet file."""


def _score_command(name: str, cls: Any) -> click.Command:
    from thresher.pruning.scores import CUTS

    @click.argument("pool")
    @click.option("-o", "--out", required=True, metavar="FILE", help="Parquet file to write.")
    @options(*field_options(cls, without=CUTS), WITHIN)
    @click.option("--name", "score_column", metavar="COLUMN", help="Column of the scores (default: the method's name).")
    @options(SHARD, SEED, OVERWRITE, *POOL, *RUN)
    def command(
        pool: str, out: str, within: str | None, score_column: str | None, overwrite: bool, shard: Any, **values: Any
    ) -> None:
        from thresher.pruning.scores import scorer

        common = Common.from_values(values)
        method = scorer(name, {key: value for key, value in values.items() if value is not None})
        how: dict[str, Any] = {"name": score_column, "overwrite": overwrite, "seed": common.seed or 0, "within": within}
        how["shard"] = shard
        scores = api.score(common.open(pool), method, out=out, **how, **common.resources())
        numbers = scores.values_n
        result = {
            "out": out,
            "least": float(numbers.min()) if len(numbers) else None,
            "mean": float(numbers.mean(dtype="float64")) if len(numbers) else None,
            "most": float(numbers.max()) if len(numbers) else None,
            **scores.info,
            **({} if shard is None else {"shard": str(shard)}),
        }
        common.output.result(result, text.scored(result))

    about = f"Write the {cls.meaning} of every row of a pool."
    return click.command(name, help=f"{about}\n\n\x08\nSee: thresher methods {name}")(command)


# --- cluster --------------------------------------------------------------------------------------


@click.command()
@click.argument("pool")
@click.option("-o", "--out", required=True, metavar="DIR", help="Folder to write.")
@click.option("--clusters", type=WHOLE, metavar="K", help="Number of clusters (default: chosen from the rows).")
@click.option("--centroids", metavar="FILE", help=".npy file of (K, D) centroids; rows are only assigned to them.")
@click.option(
    "--grow", metavar="DIR", help="Folder of clusters made before POOL grew: keep them and assign the new rows."
)
@click.option("--iterations", type=WHOLE, default=20, show_default=True, metavar="N", help="Iterations of k-means.")
@click.option(
    "--sample", default="auto", show_default=True, metavar="all|auto|N", help="Rows that train the centroids."
)
@click.option(
    "--embedding",
    type=Choice(["image", "text", "joint"]),
    default="image",
    show_default=True,
    help="Embeddings to cluster by.",
)
@click.option(
    "--precision",
    type=Choice(["auto", "float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Precision of the k-means iterations; bfloat16 needs torch.",
)
@options(SEED, OVERWRITE, *POOL, *RUN)
def cluster(pool: str, out: str, grow: str | None, overwrite: bool, **values: Any) -> None:  # fmt: skip
    """Cluster a pool with spherical k-means.

    Writes centroids.npy, labels.npy, distances.npy and cluster.json.
    """
    from click.core import ParameterSource

    common = Common.from_values(values)
    source = click.get_current_context().get_parameter_source
    passed = [f"--{name}" for name in (*values, "seed") if source(name) is ParameterSource.COMMANDLINE]
    if grow and passed:
        raise UsageError(
            f"--grow keeps the clusters of {grow} as they are; remove {', '.join(passed)}, or remove --grow to "
            "run clustering again"
        )
    how: dict[str, Any] = {
        "out": out,
        "grow": grow,
        "overwrite": overwrite,
        "seed": common.seed or 0,
        **({} if grow else values),
    }
    groups = api.cluster(common.open(pool), **how, **common.resources())
    sizes = groups.sizes_K
    result = {
        "out": out if "://" in out else str(Path(out)),
        "rows": len(groups.labels_N),
        "clusters": len(sizes),
        "empty": int((sizes == 0).sum()),
        "smallest": int(sizes.min()),
        "largest": int(sizes.max()),
        "mean_cosine": 1.0 - float(groups.distances_N.mean(dtype="float64")),
        "notes": list(groups.notes),
    }
    common.output.result(result, text.clustered(result))
