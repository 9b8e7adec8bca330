"""The command line: parse, call, print. Everything it does is a call away from Python too."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import threading
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from thresher import __version__
from thresher.cli.embed import embed
from thresher.cli.options import DATA, JSON, QUIET, data_options, options
from thresher.cli.reshard import reshard
from thresher.cli.train import train
from thresher.embed.classes import embed_classes_command
from thresher.errors import OutputError, ThresherError, UsageError, suggest

F = typing.TypeVar("F", bound=Callable[..., Any])


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 on a usage or input error with one readable message."""
    # A polite request to end is treated as an interruption: what is under way is let go, workers end.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = thresher.main(arguments, prog_name="thresher", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command goes on from what the cache holds", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return 2
    except ThresherError as error:
        click.echo(f"Error: {error}", err=True)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"Error: {where}{error.strerror or error}", err=True)
        return 2
    except MemoryError:
        click.echo("Error: out of memory; use fewer --workers or a smaller --sample", err=True)
        return 2
    return code if isinstance(code, int) else 0  # click hands on the code of an Exit


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


# --- options shared by commands -------------------------------------------------------------------


@dataclass(frozen=True)
class Common:
    """Options every command takes that reads a pool."""

    image: str | None
    text: str | None
    key: str | None
    caption: str | None
    dtype: str | None
    metadata: str | None
    skip_bad: bool
    engine: str
    workers: int | None
    seed: int | None
    cache: str | None
    quiet: bool
    as_json: bool

    def open(self, pool: str) -> Any:
        """Open the pool."""
        from thresher.pool.layout import Options
        from thresher.pool.store import open_store

        given = {item.name: getattr(self, item.name) for item in fields(Options)}
        return open_store(pool, Options(**given), scratch=self.cache)

    def places(self) -> dict[str, Any]:
        """Return engine, cache and progress for a run."""
        from thresher.runtime.cache import Cache
        from thresher.runtime.engine import make_engine
        from thresher.runtime.progress import progress_for

        return {
            "engine": make_engine(self.engine, self.workers),
            "cache": Cache.at(self.cache),
            "progress": progress_for(self.quiet or self.as_json),
        }


def _once(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> str | None:
    """Refuse what would be overlooked: of a repeated option the last is taken."""
    if len(values) > 1:
        raise click.BadParameter("given more than once; give one", ctx, option)
    return values[0] if values else None


_POOL = [
    click.option("--image", metavar="NAME", help="Array or column with the image embeddings."),
    click.option("--text", metavar="NAME", help="Array or column with the text embeddings."),
    click.option("--key", metavar="NAME", help="Metadata column that identifies a row (row: none)."),
    click.option("--caption", metavar="NAME", help="Metadata column with the caption."),
    click.option(
        "--dtype", type=click.Choice(["float16", "float32", "float64", "bfloat16"]), help="What unmarked bytes hold."
    ),
    click.option(
        "--metadata",
        metavar="PATH",
        multiple=True,
        callback=_once,
        help="img2dataset output, or scores, to join by key.",
    ),
    click.option("--skip-bad", is_flag=True, help="Set bad files and rows aside, counted and listed."),
]
_RUN = [
    click.option(
        "--engine", type=click.Choice(["serial", "threads", "processes"]), default="threads", show_default=True
    ),
    click.option("--workers", type=int, metavar="N", help="Tasks at once (default: all cores)."),
    click.option("--cache", metavar="DIR", help="Cache folder (default: $XDG_CACHE_HOME/thresher)."),
    QUIET,
    JSON,
]
_WITHIN = click.option(
    "--within", metavar="SEL", multiple=True, callback=_once, help="Only look at the rows an earlier selection kept."
)
_SEED = click.option("--seed", type=int, default=None, metavar="N", help="Seed of all randomness (default: 0).")
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an earlier result.")
_MOVED = [
    click.option("--pool", metavar="POOL", help="Where the pool is now, if it was moved."),
    click.option("--metadata", metavar="PATH", help="What was joined to it by key, or where that is now."),
]


def _common(values: dict[str, Any]) -> Common:
    return Common(**{item.name: values.pop(item.name, None) for item in fields(Common)})


class _Group(click.Group):
    """A group that suggests the nearest command."""

    what = ""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            names = self.list_commands(ctx)
            known = f"no {self.what}{args[0]!r}; there are {', '.join(names)}.{suggest(args[0], names)}"
            raise click.UsageError(known, ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="thresher")
def thresher() -> None:
    """Choose the image-text pairs worth training on."""


thresher.add_command(embed)
thresher.add_command(embed_classes_command)
thresher.add_command(reshard)
thresher.add_command(train)


# --- inspect, methods, recipes --------------------------------------------------------------------


@thresher.command()
@click.argument("pool")
@click.option("--quick", is_flag=True, help="Look at about 100,000 rows only.")
@options(*_POOL, *_RUN)
def inspect(pool: str, quick: bool, **values: Any) -> None:
    """What is in POOL, what looks wrong, and what a run will cost."""
    from thresher.check.pool import inspect as look
    from thresher.select.run import Run
    from thresher.selection import Selection

    common = _common(values)
    store = common.open(pool)
    start = Selection.everything("", pool, {}, store.total)
    found = look(Run(store, start, **common.places()), quick=quick)
    if common.as_json:
        _print_json(found)
        return
    _say(f"{found['location']}: {found['rows']:,} rows, layout {found['layout']}, files: {found['files']:,}")
    for name, field in found["fields"].items():
        norm = f"norms {field['norms']['min']:.3g} .. {field['norms']['max']:.3g}" if field["norms"] else "no good row"
        bad = sum(field[f"{kind}_rows"] for kind in ("nan", "infinite", "zero"))
        _say(
            f"  {name}: {field['dim']} x {field['dtype']}, {_bytes(field['bytes'])}, {norm}, {bad:,} bad rows "
            f"of {field['looked_at']:,} looked at"
        )
    _say(f"  key: {found['key'] or 'none'}; caption: {found['caption'] or 'none'}")
    _say(f"  columns: {', '.join(found['columns']) or 'none'}")
    if found["keys"]:
        _say("  keys: " + ", ".join(f"{found['keys'][kind]:,} {kind}" for kind in ("repeated", "climbing", "empty")))
    for aside in found["set_aside"]:
        _say(f"  set aside: {aside['path']}: {aside['why']}")
    for warning in found["warnings"]:
        _say(f"  ! {warning}")
    if cost := found["cost"]:
        told = ", ".join(f"{name} {_seconds(value)}" for name, value in cost["seconds"].items())
        _say(f"  about, with {cost['clusters']:,} clusters on {common.engine}: {told}")
        _say(f"  memory up to {_bytes(cost['memory_bytes'])}, cache {_bytes(cost['cache_bytes'])}")


@thresher.command()
@click.argument("data")
@click.option("--sample", type=int, default=1000, show_default=True, metavar="N", help="Pictures to decode.")
@click.option("--encoder", metavar="NAME", help="Try this encoder, named as for embed, and tell how long it will take.")
@options(*DATA)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads that decode (default: all cores).")
@click.option("--strict", is_flag=True, help="Exit with 1 where something looks wrong.")
@options(QUIET, JSON)
def doctor(
    data: str, sample: int, encoder: str | None, workers: int | None, strict: bool, quiet: bool, as_json: bool,
    **values: Any,
) -> int:  # fmt: skip
    """What is in DATA before it is embedded, what looks wrong, and what embedding will cost.

    DATA is what embed and train take: tars, parquet, Arrow, a csv, or a folder of pictures.
    """
    from thresher.check.data import doctor as look
    from thresher.runtime.progress import progress_for

    progress = progress_for(quiet or as_json)
    found = look(data, data_options(values), sample=sample, encoder=encoder, workers=workers, progress=progress)
    if as_json:
        _print_json(found)
    else:
        for line in _diagnosis(found):
            _say(line)
    return 1 if strict and found["warnings"] else 0


def _diagnosis(found: dict[str, Any]) -> typing.Iterator[str]:
    """Yield the lines that tell what raw data are like."""
    about, read = "" if found["exact"] else "about ", found["looked_at"]
    files = {"webdataset": "tar", "folder": "picture"}.get(found["kind"], "file")
    size = f"{'about ' if found['kind'] in ('csv', 'folder') else ''}{_bytes(found['bytes'])}"
    yield (
        f"{found['location']}: {about}{found['samples']:,} samples, {found['kind']}, "
        f"{found['files']:,} {files}{'s' * (found['files'] != 1)}, {size}"
    )
    if read < found["samples"]:
        yield f"  keys and captions of {read:,} samples were read, spread over the data"
    if columns := found["columns"]:
        roles = ", ".join(f"{role}: {columns[role] or 'none'}" for role in ("picture", "caption", "key", "uid"))
        yield f"  {roles}; other columns: {', '.join(columns['others']) or 'none'}"
    if found["members"]:
        shares = (name if share == 1 else f"{name} ({share:.1%})" for name, share in found["members"].items())
        yield f"  members: {', '.join(shares)}"
    if keys := found["keys"]:
        yield f"  keys: {keys['repeated']:,} repeated, {keys['climbing']:,} climbing, {keys['uids']:,} with a uid"
    captions = found["captions"]
    if captions["characters"]:
        yield (
            f"  captions: {captions['empty']:,} missing, {captions['repeated']:,} repeated, "
            f"{captions['file_names']:,} names of files, {_least(captions['characters'])} characters"
        )
    pictures = found["pictures"]
    bad = pictures["broken"] + pictures["enormous"]
    yield f"  pictures: {pictures['looked_at']:,} at random were decoded, {bad:,} are broken or too large"
    if pictures["formats"]:
        counts = (f"{name} {count:,}" for kind in ("formats", "modes") for name, count in pictures[kind].items())
        yield f"    {', '.join(counts)}"
        aspect = pictures["aspect"]
        long = "square" if aspect[2] == 1 else f"the longer {_least(aspect)} times that"
        size = _bytes(pictures["bytes"][1])
        yield f"    shorter side {_least(pictures['short_side'])} pixels, {long}; half have up to {size}"
        odd = {"animated": "animated", "transparent": "transparent", "cmyk": "CMYK", "sixteen_bit": "of 16 bits"}
        told = [f"{pictures[name]:,} {what}" for name, what in odd.items() if pictures[name]]
        if told:
            yield f"    of which {', '.join(told)}"
    if tars := found["tars"]:
        sizes = "none" if tars["sizes_json"] is None else "agrees"
        if tars["sizes_json"] and any(tars["sizes_json"].values()):
            sizes = "does not agree"
        each = f"{_least(tars['samples'])} samples each" if tars["samples"] else "none is sound"
        yield f"  tars: {each}; sizes.json: {sizes}"
    for warning in found["warnings"]:
        yield f"  ! {warning}"
    cost = found["cost"]
    rates = {"decoded": "pictures decoded", "images": "encoded", "texts": "captions encoded"}
    told = [f"{cost[name]:,.0f} {what}" for kind, what in rates.items() if (name := f"{kind}_per_second") in cost]
    yield f"  about, a second on {cost['workers']} cores: {', '.join(told)}"
    if "embed_seconds" in cost:
        spent, dims = f"{_seconds(cost['embed_seconds'])} to embed", f"{cost['dims']:,} dimensions"
    else:
        spent, dims = f"{_seconds(cost['decode_seconds'])} to decode", "512 dimensions each"
    yield f"  in all: {spent}, {_bytes(cost['pool_bytes'])} of vectors in {dims}"
    if "embed_seconds" not in cost:
        yield "  --encoder NAME tries an encoder and tells how long embedding takes"
    yield f"  next: {found['next']}"


def _least(values: Sequence[float]) -> str:
    """Show the least, the middle and the greatest."""
    return " .. ".join(f"{value:,}" for value in values)


@thresher.command()
@click.argument("name", required=False)
@JSON
def methods(name: str | None, as_json: bool) -> None:
    """List the methods, or tell all about the one called NAME."""
    from thresher.runtime.parameters import choices, parameters_of, type_of, without_none
    from thresher.select.registry import METHODS

    if name is None:
        found = {key: (cls.__doc__ or "").strip().splitlines()[0] for key, cls in METHODS.all().items()}
        if as_json:
            _print_json(found)
            return
        width = max(map(len, found))
        for key, line in found.items():
            _say(f"{key:{width}}  {line}")
        _say("\nthresher methods NAME tells all about one.")
        return
    cls: Any = METHODS.find(name)
    parameters = []
    for item in parameters_of(cls):
        kind = without_none(type_of(cls, item.name))
        parameters.append(
            {
                "name": item.name,
                "type": " | ".join(choices(kind)) or _KINDS.get(kind.__name__, kind.__name__),
                "default": None if item.default is MISSING else item.default,
                "required": item.default is MISSING,
                "help": item.metadata.get("help", ""),
            }
        )
    about = (sys.modules[cls.__module__].__doc__ or "").strip()
    if as_json:
        _print_json({"name": name, "about": about, "parameters": parameters})
        return
    _say(f"{name}: {(cls.__doc__ or '').strip()}\n\n{about}\n")
    for p in parameters:
        default = "required" if p["required"] else "optional" if p["default"] is None else f"default {p['default']}"
        _say(f"  {p['name']} ({p['type']}; {default})\n      {p['help']}")


@thresher.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the shipped recipes, or print the one called NAME."""
    from thresher.select.recipe import Recipe, shipped_recipes

    found = shipped_recipes()
    if name is None:
        for key in found:
            _say(f"{key}: {' '.join(Recipe.load(key).description.split())}\n")
        return
    if name not in found:
        raise UsageError(f"no shipped recipe {name!r}; there are {', '.join(found)}.{suggest(name, found)}")
    _say(found[name].rstrip())


# --- cluster, select, run -------------------------------------------------------------------------


@thresher.command()
@click.argument("pool")
@click.option("-o", "--out", required=True, metavar="DIR", help="Folder to write.")
@click.option("--clusters", type=int, metavar="K", help="Number of clusters (default: chosen).")
@click.option("--centroids", metavar="FILE", help=".npy of (K, D) centroids: only assign.")
@click.option("--grow", metavar="OLD", help="Folder made before POOL grew: keep its clusters, assign the new rows.")
@click.option("--iterations", type=int, default=20, show_default=True)
@click.option("--sample", default="auto", show_default=True, metavar="all|auto|N", help="Rows to train on.")
@click.option("--embedding", type=click.Choice(["image", "text", "joint"]), default="image", show_default=True)
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="float32", show_default=True)
@_SEED
@_OVERWRITE
@options(*_POOL, *_RUN)
def cluster(pool: str, out: str, grow: str | None, overwrite: bool, **values: Any) -> None:
    """Cluster POOL: writes centroids.npy, labels.npy and distances.npy."""
    from click.core import ParameterSource

    from thresher.select.audit import Audit
    from thresher.select.clusters import FILES, Clustered, read_groups, write_groups
    from thresher.select.clusters import grow as grown
    from thresher.select.run import Run
    from thresher.selection import Selection

    common = _common(values)
    source = click.get_current_context().get_parameter_source
    given = [f"--{name}" for name in (*values, "seed") if source(name) is ParameterSource.COMMANDLINE]
    if grow and given:
        raise UsageError(
            f"--grow keeps the clusters of {grow} as they are; leave out {', '.join(given)}, or leave out --grow to "
            "cluster anew"
        )
    how, old = Clustered(**values), read_groups(grow) if grow else None
    target = _free(out, overwrite, FILES)
    store = common.open(pool)
    start = Selection.everything("", pool, {}, store.total)
    run = Run(store, start, seed=common.seed or 0, **common.places())
    checked = Audit.of(store).select(run)
    run = dataclasses.replace(run, store=store.where(checked.mask()), so_far=checked)
    groups = how.groups(run) if old is None else grown(run, old)
    told = {"pool": pool, "seed": run.seed, **values, "kernels": run.key()["kernels"]}
    if old is not None:
        told |= {name: old.told.get(name) for name in ("seed", *values)} | {"grown": len(old.labels_N)}
    write_groups(groups, target, told, within=checked.mask())
    sizes = groups.sizes_K
    notes = [*(note for step in checked.steps for note in step.notes), *groups.notes]
    found = {
        "out": str(target),
        "rows": len(groups.labels_N),
        "clusters": len(sizes),
        "empty": int((sizes == 0).sum()),
        "smallest": int(sizes.min()),
        "largest": int(sizes.max()),
        "mean_cosine": 1.0 - float(groups.distances_N.mean(dtype="float64")),
        "notes": notes,
    }
    if common.as_json:
        _print_json(found)
        return
    for note in notes:
        _say(note)
    _say(
        f"{found['clusters']:,} clusters of {found['smallest']:,} to {found['largest']:,} rows "
        f"({found['empty']:,} empty), mean cosine to the centroid {found['mean_cosine']:.4f}"
    )
    _say(f"written to {target}")


class _Methods(_Group):
    """One subcommand a method, its flags from the method's fields."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from thresher.select.registry import METHODS

        return list(METHODS.all())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from thresher.select.registry import METHODS

        cls = METHODS.all().get(cmd_name)
        return _method_command(cmd_name, cls) if cls else None


@thresher.group(cls=_Methods)
def select() -> None:
    """Prune a pool with one method."""


def _flags(cls: Any, without: Sequence[str] = ()) -> list[Any]:
    """Return the options of a method's parameters."""
    from thresher.runtime.parameters import choices, parameters_of, type_of, without_none

    options = []
    for item in parameters_of(cls):
        if item.name in without:
            continue
        kind = without_none(type_of(cls, item.name))
        flag = "--" + item.name.replace("_", "-")
        extra: dict[str, Any] = {"help": item.metadata.get("help", ""), "default": None}
        if kind is bool:
            flag = f"{flag}/--no-{item.name.replace('_', '-')}"
        elif words := choices(kind):
            extra["type"] = click.Choice(words)
        elif kind in (int, float):
            extra |= {"type": kind, "metavar": "N" if kind is int else "X"}
        else:
            extra["metavar"] = "AMOUNT" if kind.__name__ == "Keep" else "TEXT"
        if item.default is not MISSING and item.default is not None:
            extra["help"] += f" (default: {item.default})"
        elif item.default is MISSING:
            extra["help"] += " (required)"
        options.append(click.option(flag, item.name, **extra))
    return options


def _method_command(name: str, cls: Any) -> click.Command:
    @click.argument("pool")
    @click.option("-o", "--out", required=True, metavar="DIR", help="Selection folder to write.")
    @options(*_flags(cls))
    @_WITHIN
    @_SEED
    @_OVERWRITE
    @options(*_POOL, *_RUN)
    def command(pool: str, out: str, within: str | None, overwrite: bool, **values: Any) -> None:
        from thresher.select.registry import build

        common = _common(values)
        method = build(name, {key: value for key, value in values.items() if value is not None})
        _run(common, pool, [method], common.seed or 0, out, within, overwrite)

    return click.command(name, help=(cls.__doc__ or "").strip() + f"\n\n\x08\nSee: thresher methods {name}")(command)


class _Scorers(_Group):
    """One subcommand a scoring method, without the flags that cut."""

    what = "method that gives each row a number is called "

    def list_commands(self, ctx: click.Context) -> list[str]:
        from thresher.select.scores import scoring_methods

        return list(scoring_methods())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from thresher.select.scores import scoring_methods

        cls = scoring_methods().get(cmd_name)
        return _score_command(cmd_name, cls) if cls else None


@thresher.group(cls=_Scorers)
def score() -> None:
    """Write a method's number for every row of a pool, as parquet."""


def _score_command(name: str, cls: Any) -> click.Command:
    from thresher.select.score import CUTS

    @click.argument("pool")
    @click.option("-o", "--out", required=True, metavar="FILE", help="Parquet file to write.")
    @options(*_flags(cls, without=CUTS))
    @_WITHIN
    @click.option("--name", "called", metavar="COLUMN", help="Column of the numbers (default: the method's name).")
    @_SEED
    @_OVERWRITE
    @options(*_POOL, *_RUN)
    def command(pool: str, out: str, within: str | None, called: str | None, overwrite: bool, **values: Any) -> None:
        from thresher.select.score import write_scores
        from thresher.select.scores import scorer
        from thresher.selection import Selection

        common = _common(values)
        method = scorer(name, {key: value for key, value in values.items() if value is not None})
        earlier = Selection.load(within) if within else None
        how = {"seed": common.seed or 0, "within": earlier, **common.places()}
        found = write_scores(common.open(pool), method, out, name=called, overwrite=overwrite, **how)
        numbers = found.values_n
        ends = {
            "least": float(numbers.min()),
            "mean": float(numbers.mean(dtype="float64")),
            "most": float(numbers.max()),
        }
        if common.as_json:
            finite = {name: value if math.isfinite(value) else None for name, value in ends.items()}
            _print_json({"out": out, **finite, **found.told})
            return
        for note in found.told["notes"]:
            _say(note)
        _say(
            f"{len(numbers):,} of {found.told['of']:,} rows scored, {ends['least']:.4f} to {ends['most']:.4f}, "
            f"mean {ends['mean']:.4f}"
        )
        _say(f"written to {out}")

    about = f"Write the {cls.meaning} of every row of POOL."
    return click.command(name, help=f"{about}\n\n\x08\nSee: thresher methods {name}")(command)


@thresher.command()
@click.argument("recipe")
@click.argument("pool")
@click.option("-o", "--out", required=True, metavar="DIR", help="Selection folder to write.")
@_WITHIN
@_SEED
@_OVERWRITE
@options(*_POOL, *_RUN)
def run(recipe: str, pool: str, out: str, within: str | None, overwrite: bool, **values: Any) -> None:
    """Run RECIPE, a TOML file or the name of a shipped recipe, on POOL."""
    from thresher.select.recipe import Recipe

    common = _common(values)
    found = Recipe.load(recipe)
    seed = found.seed if common.seed is None else common.seed
    _run(common, pool, list(found.steps), seed, out, within, overwrite)


def _run(common: Common, pool: str, steps: list[Any], seed: int, out: str, within: str | None, overwrite: bool) -> None:
    from thresher.runtime.parameters import recorded
    from thresher.select.recipe import run_steps
    from thresher.selection import FILES, Selection

    earlier = Selection.load(within) if within else None
    target, again = Path(out), None
    if (target / "selection.json").exists() and not overwrite:
        known = [(s.method, dict(s.parameters), s.seed) for s in Selection.load(target).steps]
        asked = [(s.method, dict(s.parameters), s.seed) for s in (earlier.steps if earlier is not None else ())]
        asked += [(s.name, recorded(s), seed) for s in steps]
        if [s for s in known if s[0] != "skip-bad"] != [s for s in asked if s[0] != "skip-bad"]:
            raise OutputError(f"{out}: holds the result of other steps; choose another name or pass --overwrite")
        again = Selection.load(target).store
        overwrite = True
    target = _free(out, overwrite, FILES)
    store = common.open(pool)
    if again not in (None, store.fingerprint()):
        raise OutputError(f"{out}: holds the result of another pool; choose another name or pass --overwrite")
    selection = run_steps(store, steps, seed=seed, within=earlier, **common.places())
    selection.save(target, overwrite=overwrite)
    if common.as_json:
        _print_json({"out": str(target), **selection.header()})
        return
    repeated = f", {selection.uses:,} with repeats" if selection.repeats is not None else ""
    _say(f"kept {len(selection):,} of {selection.total:,} rows ({len(selection) / selection.total:.1%}){repeated}")
    _say(f"written to {target}")


def _free(out: str, overwrite: bool, names: Sequence[str]) -> Path:
    """Refuse a folder in the way before any work is done; ``names`` are a result's, the first its mark."""
    from thresher.runtime.files import only, probe

    target = Path(out)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; name a folder")
    if target.exists() and any(target.iterdir()):
        if not (target / names[0]).exists():
            raise OutputError(f"{target}: exists and is not a result of thresher; choose another name")
        if not overwrite:
            raise OutputError(f"{target}: exists already; choose another name or pass --overwrite")
        only(target, names)
    probe(target)
    return target


# --- compare, explain, export, report -------------------------------------------------------------


@thresher.command()
@click.argument("selections", nargs=-1, required=True, metavar="SEL SEL...")
@click.option("--clusters", metavar="DIR", help="Folder of 'thresher cluster' to tell differences by.")
@click.option("--worst", type=click.IntRange(0), default=10, show_default=True, help="Clusters to list.")
@click.option("--covariance", is_flag=True, help="Also how well each preserves the image-text cross-covariance.")
@options(*_MOVED, *_RUN)
def compare(
    selections: tuple[str, ...], clusters: str | None, worst: int, covariance: bool, pool: str | None,
    metadata: str | None, **values: Any,
) -> None:  # fmt: skip
    """Overlap and differences of selections of one pool; with --covariance one will do."""
    from thresher.pool.store import reopen
    from thresher.report.compare import compare as side_by_side
    from thresher.select.clusters import read_labels
    from thresher.selection import Selection

    common = _common(values)
    if len(set(selections)) != len(selections):
        raise UsageError("a selection is named twice")
    if len(selections) < 2 and not covariance:
        raise UsageError("compare needs at least two selections, or --covariance to compare one with its pool")
    loaded = {name: Selection.load(name) for name in selections}
    labels = read_labels(clusters) if clusters else None
    found = side_by_side(loaded, labels, worst)
    errors = {}
    if covariance:
        errors = _covariance(common, loaded, labels, reopen(next(iter(loaded.values())), pool, metadata))
        found["covariance"] = {name: error.header(worst) for name, error in errors.items()}
    if common.as_json:
        _print_json(found)
        return
    for name, kept in found["kept"].items():
        repeated = f", {found['uses'][name]:,} with repeats" if found["uses"][name] != kept else ""
        _say(f"{name}: {kept:,} of {found['rows']:,} rows ({kept / found['rows']:.1%}){repeated}")
    for pair in found["pairs"]:
        _say(
            f"{pair['a']} and {pair['b']}: {pair['both']:,} in both, {pair['only_a']:,} and {pair['only_b']:,} in one; "
            f"overlap {pair['overlap']:.1%} of the smaller, Jaccard {pair['jaccard']:.3f}"
        )
    if found["clusters"]:
        _say("clusters whose kept shares differ most:")
        for entry in found["clusters"]:
            kept = ", ".join(f"{name} {count:,}" for name, count in entry["kept"].items())
            _say(f"  cluster {entry['cluster']} of {entry['size']:,} rows: {kept}")
    for line in _covariance_table(errors) if errors else ():
        _say(line)


def _covariance(common: Common, selections: dict[str, Any], labels: Any, store: Any) -> dict[str, Any]:
    """Compare the cross-covariance of selections with their pool's, in given clusters or those of their steps."""
    from thresher.report.compare import clusters_of
    from thresher.select.covariance import covariance_errors
    from thresher.select.run import Run

    found = list(selections.values())
    run = Run(store, found[0], **common.places())
    return covariance_errors(run, selections, clusters_of(found) if labels is None else labels)


def _covariance_table(errors: dict[str, Any]) -> typing.Iterator[str]:
    """Yield the lines of a table of covariance errors."""
    first = next(iter(errors.values()))
    inside = f"within {first.classes:,} clusters of {first.classed:,} rows"
    if first.within is None:
        inside = "pass --clusters DIR for the error within clusters"
    yield f"cross-covariance of image and text, relative error to the {first.rows:,} rows of the pool; {inside}:"
    width = max(map(len, ["not centred", *errors]))
    for title, names in (
        ("centred", ("overall", "within")),
        ("not centred", ("overall_uncentred", "within_uncentred")),
    ):
        told = [name for name in names if getattr(first, name) is not None]
        heads = "".join(f"{name.split('_')[0]:>9}{'random':>9}{'ratio':>7}" for name in told)
        yield f"  {title:{width}}{'rows':>14}{heads}" + ("" if first.within is None else f"{'lost':>7}")
        for name, error in errors.items():
            found = [getattr(error, each) for each in told]
            cells = "".join(f"{_figure(d.error, 9, 4)}{_figure(d.random, 9, 4)}{_figure(d.ratio, 7, 2)}" for d in found)
            lost = "" if error.within is None else f"{error.classes_lost:7,}"
            yield f"  {name:{width}}{error.kept:14,}{cells}{lost}"


def _figure(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


@thresher.command()
@click.argument("selection")
@click.argument("key")
@options(*_MOVED, JSON)
def explain(selection: str, key: str, pool: str | None, metadata: str | None, as_json: bool) -> None:
    """The story of the row with KEY (or row:NUMBER) in SELECTION, or in the folder of a training run."""
    from thresher.pool.store import reopen
    from thresher.report.explain import explain as story
    from thresher.selection import Figure, Selection

    if _is_run(selection):
        _explain_run(selection, key, pool, metadata, as_json)
        return
    loaded = Selection.load(selection)
    found = story(loaded, reopen(loaded, pool, metadata), key)
    if as_json:
        _print_json(found)
        return
    caption = f" \u201c{found['caption']}\u201d" if found["caption"] else ""
    fate = "dropped" if not found["kept"] else "kept" if found["uses"] == 1 else f"kept, used {found['uses']:,} times"
    _say(f"row {found['row']:,}, key {found['key']}{caption}: {fate}")
    for number, step in enumerate(found["steps"], 1):
        told = step["reason"] or "passes"
        _say(f"  {number}. {step['method']}: {step['verdict']} - {told}")
        if "score" in step and "history" not in step:
            cut = "" if step["cut"] is None else f" (cut at {Figure(step['cut']):.4f})"
            _say(f"     {step['meaning']}: {Figure(step['score']):.4f}{cut}")
        if "history" in step and not step["reason"]:  # the reason of a row that went has it already
            _say(f"     {_history(step['history'])}")
        if "cluster" in step:
            cluster = step["cluster"]
            facts = ", ".join(
                f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4f}"
                for name, value in cluster.items()
                if name not in ("number", "name")
            )
            called = f" ({cluster['name']})" if "name" in cluster else ""
            _say(f"     cluster {cluster['number']}{called}: {facts}")
        if "duplicate" in step:
            twin = step["duplicate"]
            caption = f" \u201c{twin['caption']}\u201d" if twin["caption"] else ""
            fate = "kept" if twin["kept"] else "dropped"
            _say(f"     duplicates row {twin['row']:,}, key {twin['key']}{caption}, which was {fate}")
        if "reference" in step:
            known = step["reference"]
            key = f", key {known['key']}" if "key" in known else ""
            caption = f" \u201c{known['caption']}\u201d" if known.get("caption") else ""
            _say(f"     repeats row {known['row']:,} of {known['pool']}{key}{caption}")


def _is_run(folder: str) -> bool:
    """Whether a folder is that of a training run, not a selection."""
    from thresher.dynamic.run_folder import MARK

    return (Path(folder) / MARK).exists() and not (Path(folder) / "selection.json").exists()


def _explain_run(folder: str, key: str, pool: str | None, metadata: str | None, as_json: bool) -> None:
    """Tell what a training run has learnt about a row."""
    from thresher.dynamic.run_folder import Training
    from thresher.report.explain import history

    if metadata:
        raise UsageError("--metadata is for selections: nothing is joined to the pool of a training run")
    training = Training.load(folder)
    found = history(training, training.open_pool(pool), key)
    if as_json:
        _print_json(found)
        return
    caption = f" \u201c{found['caption']}\u201d" if found["caption"] else ""
    told = f"{found['epochs']:,} epochs of training, {found['policy']}"
    _say(f"row {found['row']:,}, key {found['key']}{caption}: {told}")
    _say(f"  {_history(found['history'])}")
    _say(f"  candidates were found in {found['searches']:,} of the epochs")


def _history(found: dict[str, Any]) -> str:
    """Say in a line what training has told about a row."""
    if found["seen"] is None:
        told = "never trained on"
    else:
        told = f"last trained on in epoch {found['seen']}, with a loss of {found['loss']:.4f}"
    if not found["candidate"]:
        return f"never a candidate for pruning; {told}"
    times = "once" if found["candidate"] == 1 else f"{found['candidate']:,} times"
    return f"a candidate for pruning {times}, last in epoch {found['last']} as {' and '.join(found['kinds'])}; {told}"


@thresher.command()
@click.argument("run")
@click.option("-o", "--out", required=True, metavar="SEL", help="Selection folder to write.")
@click.option("--keep", required=True, metavar="AMOUNT", help="How many rows: a share like 70%, or a number.")
@click.option("--pool", metavar="POOL", help="Where the pool is now, if it was moved.")
@_OVERWRITE
@JSON
def coreset(run: str, out: str, keep: str, pool: str | None, overwrite: bool, as_json: bool) -> None:
    """Keep the rows that a training run, the folder RUN, could least have done without."""
    from thresher.dynamic.coreset import coreset as choose
    from thresher.dynamic.run_folder import Training
    from thresher.selection import FILES

    target = _free(out, overwrite, FILES)
    selection = choose(Training.load(run), keep, pool=pool)
    selection.save(target, overwrite=overwrite)
    if as_json:
        _print_json({"out": str(target), **selection.header()})
        return
    for note in selection.steps[-1].notes:
        _say(note)
    _say(f"kept {len(selection):,} of {selection.total:,} rows ({len(selection) / selection.total:.1%})")
    _say(f"written to {target}")


class _Export(click.Command):
    """``export``: the formats, and the options of each, are those of the plug-ins."""

    @cached_property
    def _offered(self) -> list[click.Parameter]:
        from thresher.export.registry import EXPORTS

        formats = EXPORTS.all()
        found: dict[str, click.Option] = {}
        for name, cls in formats.items():
            for option in (made for flag in _flags(cls) for made in _made(flag)):
                first = found.setdefault(str(option.name), option)
                first.help = f"{name}: {option.help}" if first is option else f"{first.help} {name}: {option.help}"
        taken = {parameter.name for parameter in self.params}
        kind = click.Option(["--as", "kind"], required=True, type=click.Choice(list(formats)), help="Format.")
        return [kind, *(option for name, option in found.items() if name not in taken)]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        selection, *rest = super().get_params(ctx)
        return [selection, *self._offered, *rest]


def _made(flag: Any) -> list[click.Option]:
    """Return the option that a decorator would put on a command."""

    def command() -> None: ...

    made: list[click.Option] = flag(command).__click_params__
    return made


@thresher.command(cls=_Export)
@click.argument("selection")
@click.option("-o", "--out", required=True, metavar="FILE", help="File to write.")
@options(*_MOVED)
@click.option("--manifest/--no-manifest", default=True, show_default=True, help="Write FILE.manifest.json.")
@click.option("--hash-inputs", is_flag=True, help="With the sha256 of every file of the pool in it: reads them all.")
@_OVERWRITE
@QUIET
@JSON
def export(
    selection: str, kind: str, out: str, pool: str | None, metadata: str | None, manifest: bool, hash_inputs: bool,
    overwrite: bool, quiet: bool, as_json: bool, **values: Any,
) -> None:  # fmt: skip
    """Write SELECTION for a training tool."""
    from thresher.export.registry import build
    from thresher.export.write import export as write
    from thresher.pool.store import reopen
    from thresher.runtime.progress import progress_for
    from thresher.selection import Selection

    if hash_inputs and not manifest:
        raise UsageError("--hash-inputs is for the manifest; leave out one of --hash-inputs and --no-manifest")
    made = build(kind, {name: value for name, value in values.items() if value is not None})
    loaded = Selection.load(selection)
    done = write(
        loaded, made, out, store=reopen(loaded, pool, metadata), manifest=manifest, hash_inputs=hash_inputs,
        overwrite=overwrite, progress=progress_for(quiet or as_json),
    )  # fmt: skip
    if as_json:
        _print_json(vars(done))
        return
    _say(f"{done.rows:,} rows written to {done.path}")
    if done.missing:
        _say(f"{done.missing:,} rows asked for were not found; they are listed in {done.missing_file}")
    if done.manifest:
        _say(f"manifest: {done.manifest}")


@thresher.command()
@click.argument("selection")
@click.option("-o", "--out", required=True, metavar="FILE", help="HTML file to write.")
@click.option("--title", metavar="TEXT", help="Heading of the page.")
@click.option("--examples", type=click.IntRange(0), default=6, show_default=True, help="Sample rows of a cluster.")
@click.option("--without-pool", is_flag=True, help="No captions and pictures: the pool is not read.")
@click.option("--covariance", is_flag=True, help="Also how well the image-text cross-covariance is preserved.")
@click.option("--clusters", metavar="DIR", help="Folder of 'thresher cluster' for --covariance.")
@options(*_MOVED, _OVERWRITE, *_RUN)
def report(
    selection: str, out: str, title: str | None, examples: int, without_pool: bool, covariance: bool,
    clusters: str | None, pool: str | None, metadata: str | None, overwrite: bool, **values: Any,
) -> None:  # fmt: skip
    """One HTML page on SELECTION, or on the folder of a training run, that needs no network."""
    from thresher.export.write import check_target
    from thresher.pool.store import reopen
    from thresher.report import write_report
    from thresher.select.clusters import read_labels
    from thresher.selection import Selection

    common = _common(values)
    if _is_run(selection):
        if covariance or clusters or metadata:
            raise UsageError("--covariance, --clusters and --metadata are for selections, not for a training run")
        _report_run(common, selection, Path(out), title, examples, None if without_pool else pool or "", overwrite)
        return
    if covariance and without_pool:
        raise UsageError("--covariance reads the pool; leave --without-pool out")
    if clusters and not covariance:
        raise UsageError("--clusters is for --covariance; pass both")
    loaded = Selection.load(selection)
    labels = read_labels(clusters) if clusters else None
    store = None if without_pool else reopen(loaded, pool, metadata)
    check_target(Path(out), store, overwrite=overwrite)
    error = _covariance(common, {selection: loaded}, labels, store)[selection] if covariance else None
    path = write_report(loaded, out, store=store, title=title, examples=examples, covariance=error)
    if common.as_json:
        _print_json({"report": str(path), "bytes": path.stat().st_size})
        return
    _say(f"report: {path} ({_bytes(path.stat().st_size)})")


def _report_run(
    common: Common, folder: str, out: Path, title: str | None, examples: int, pool: str | None, overwrite: bool
) -> None:
    """Write the page on a training run; ``pool`` None: without it, "": where it was."""
    from thresher.dynamic.run_folder import FILES, Training
    from thresher.export.write import check_target
    from thresher.report.run import write_run_report

    training = Training.load(folder)
    if out.resolve() in {(training.folder / name).resolve() for name in FILES}:
        raise OutputError(f"{out}: is a file of the run; choose another name")
    store = None if pool is None else training.open_pool(pool or None)
    check_target(out, store, overwrite=overwrite)
    path = write_run_report(training, out, store=store, title=title, examples=examples)
    if common.as_json:
        _print_json({"report": str(path), "bytes": path.stat().st_size})
        return
    _say(f"report: {path} ({_bytes(path.stat().st_size)})")


# --- cache ----------------------------------------------------------------------------------------


@thresher.group(cls=_Group, invoke_without_command=True)
@click.option("--cache", "folder", metavar="DIR", help="Cache folder (default: $XDG_CACHE_HOME/thresher).")
@click.pass_context
def cache(ctx: click.Context, folder: str | None) -> None:
    """Show the size of the cache."""
    from thresher.runtime.cache import Cache

    ctx.obj = Cache.at(folder)
    if ctx.invoked_subcommand is None:
        _say(f"{ctx.obj.folder}: {_bytes(ctx.obj.size())} of at most {_bytes(ctx.obj.limit)}")


@cache.command()
@click.option("--cache", "folder", metavar="DIR", help="Cache folder.")
@click.pass_obj
def clear(obj: Any, folder: str | None) -> None:
    """Remove everything in the cache."""
    from thresher.runtime.cache import Cache

    found = Cache.at(folder) if folder else obj
    _say(f"{_bytes(found.clear())} removed from {found.folder}")


_KINDS = {"int": "whole number", "float": "number", "str": "text", "bool": "true | false", "Keep": "share or count"}


# --- words ----------------------------------------------------------------------------------------


def _say(line: str) -> None:
    click.echo(line)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def _bytes(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"
