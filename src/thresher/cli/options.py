"""Options shared by several commands, and options generated from the fields of a dataclass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from thresher.cli.completion import complete
from thresher.cli.output import JSON_FLAG, Output
from thresher.errors import UsageError, suggest
from thresher.runtime import config

if TYPE_CHECKING:
    from thresher.runtime.plugins import PluginPoint

    _Choice = click.Choice[str]
    _ParamType = click.ParamType[Any]
else:
    _Choice = click.Choice
    _ParamType = click.ParamType

F = TypeVar("F", bound=Callable[..., Any])

MOST_WORKERS = config.MOST_WORKERS


class Choice(_Choice):
    """One of several names; suggests the nearest to an unknown one. A function of names is called on first use."""

    def __init__(self, names: Iterable[str] | Callable[[], Iterable[str]]) -> None:
        """Store the names."""
        self._names = names
        self.case_sensitive = True

    @cached_property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names."""
        return tuple(self._names() if callable(self._names) else self._names)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name.

        Raises:
            click.BadParameter: It is not one of the names.
        """
        if value not in self.choices:
            allowed = ", ".join(self.choices)
            self.fail(f"{value!r} is not one of {allowed}.{suggest(str(value), self.choices)}", param, ctx)
        return str(value)


class PluginChoice(Choice):
    """The name of a plug-in; of one that cannot be loaded the message says why."""

    def __init__(self, point: Callable[[], PluginPoint[Any]], *, options: bool = False) -> None:
        """Remember where plug-ins of this kind are found; the function is called when the names are needed.

        Args:
            point: Returns the place.
            options: Whether ``:OPTION=VALUE,OPTION=VALUE`` may follow the name; they are checked when it is built.
        """
        super().__init__(lambda: point().all())
        self._point, self._options = point, options

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, with the options.

        Raises:
            click.BadParameter: There is no such plug-in, or it cannot be loaded.
        """
        name = str(value).partition(":")[0] if self._options else str(value)
        completing = ctx is not None and ctx.resilient_parsing  # then no plug-in has to be loaded
        if not completing and name not in self.choices:
            try:
                self._point().find(name)
            except UsageError as error:
                self.fail(str(error), param, ctx)
        return str(value)


class _Spoken(_ParamType):
    """A number, whose message about another text says what is allowed and what to type."""

    kind: type[int] | type[float]
    limits = example = ""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number.

        Raises:
            click.BadParameter: It is not one, or not one that is allowed.
        """
        from thresher.runtime.parameters import number_in

        if isinstance(value, str):
            try:
                value = number_in(self.kind, value, self.limits, self.example)
            except UsageError as error:
                self.fail(str(error), param, ctx)
        return super().convert(value, param, ctx)


class _Number(_Spoken, click.types.FloatParamType):
    kind = float


class _Whole(_Spoken, click.types.IntParamType):
    kind = int


class WholeRange(_Spoken, click.IntRange):
    """A whole number from a least one to a largest one, both allowed; None for no limit."""

    kind = int

    def __init__(self, least: int | None = None, most: int | None = None) -> None:
        """Store the limits."""
        super().__init__(least, most)
        if most is None:
            self.limits = f" of at least {least:,}"
        else:
            self.limits = f" of at most {most:,}" if least is None else f" from {least:,} to {most:,}"
        self.example = str(max(10, least or 0))


NUMBER, WHOLE = _Number(), _Whole()


class Configured(click.Option):
    """An option whose default is a setting of the environment or of the configuration file, if there is one."""

    def __init__(self, *args: Any, setting: str, **how: Any) -> None:
        """Store the name of the setting; the rest is as for click."""
        super().__init__(*args, **how)
        self.setting = setting

    def consume_value(self, ctx: click.Context, opts: Any) -> tuple[Any, ParameterSource]:
        """Return the value and where it comes from.

        Raises:
            UsageError: The setting cannot be used by this command; the message says where it is.
        """
        value, source = super().consume_value(ctx, opts)
        if source is not ParameterSource.DEFAULT or ctx.resilient_parsing:  # completions and help need no values
            return value, source
        found = config.setting(self.setting)
        if found.source == "default":
            return value, source
        try:
            self.type_cast_value(ctx, found.value)
        except click.BadParameter as error:
            where = found.where if found.source == "environment" else f"{found.where}: {self.setting}"
            raise UsageError(f"{where}: {error.message}") from None
        in_environment = found.source == "environment"
        return found.value, ParameterSource.ENVIRONMENT if in_environment else ParameterSource.DEFAULT_MAP


class Group(click.Group):
    """A group of commands that suggests the nearest name and lists each command with a full sentence.

    Attributes:
        what: What a command is, in the message that there is no such command.
    """

    what = ""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find a command.

        Raises:
            click.UsageError: No such command; the message suggests the nearest.
        """
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            names = self.list_commands(ctx)
            known = f"no {self.what}{args[0]!r}; there are {', '.join(names)}.{suggest(args[0], names)}"
            raise click.UsageError(known, ctx)
        name, command, rest = super().resolve_command(ctx, args)
        if ctx.resilient_parsing and command is not None:  # a shell completes
            complete(command, rest)
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary_of(command)) for name, command in commands if command])


def summary_of(command: click.Command) -> str:
    """Return the full first sentence of a command's help."""
    return command.get_short_help_str(limit=10_000)


def options(*several: Any) -> Callable[[F], F]:
    """Put options on a command, in the given order."""

    def add(function: F) -> F:
        for option in reversed(several):
            function = option(function)
        return function

    return add


def _once(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> str | None:
    """Raise if an option is repeated; click would silently use the last one."""
    if len(values) > 1:
        raise click.BadParameter("given more than once; give it once", ctx, option)
    return values[0] if values else None


def _engines() -> PluginPoint[Any]:
    from thresher.runtime.engine import ENGINES

    return ENGINES


# --- options of most commands ---------------------------------------------------------------------

QUIET = click.option("--quiet/--no-quiet", cls=Configured, setting="quiet", default=False, help="Do not show progress.")
JSON = click.option(
    JSON_FLAG, "output", is_flag=True, callback=lambda ctx, option, on: Output(on), help="Print the result as JSON."
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an existing result.")
SEED = click.option("--seed", type=WHOLE, metavar="SEED", help="Seed of all randomness (default: 0).")
WITHIN = click.option(
    "--within", metavar="SEL", multiple=True, callback=_once, help="Use only the rows kept by an earlier selection."
)

# Of commands that train.
MODEL = click.option(
    "--model", default="tiny", show_default=True, metavar="NAME",
    help="tiny, small, an open_clip configuration, or the path of one (.json).",
)  # fmt: skip
BATCH_SIZE = click.option(
    "--batch-size", type=WholeRange(2), default=256, show_default=True, metavar="N", help="Samples per batch."
)
LR = click.option("--lr", type=NUMBER, metavar="X", help="Peak learning rate (default: 0.002 for tiny, else 0.0005).")
RUN_SEED = click.option(
    "--seed", type=WHOLE, default=0, show_default=True, metavar="SEED", help="Seed of all randomness."
)
DEVICE = click.option(
    "--device",
    cls=Configured,
    setting="device",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Where to train: cpu, cuda or cuda:1.",
)
DECODERS = click.option(
    "--workers", type=WholeRange(0), default=2, show_default=True, metavar="N", help="Decoding workers."
)

READER = click.option(
    "--reader",
    metavar="NAME[:OPTION=VALUE]",
    help="Reader, with its options separated by commas (default: the first one that recognises the files).",
)

# How to read a pool.
POOL = (
    click.option("--image", metavar="COLUMN", help="Array or column of image embeddings."),
    click.option("--text", metavar="COLUMN", help="Array or column of text embeddings."),
    click.option("--key", metavar="COLUMN", help="Metadata column that identifies rows; 'row' uses row numbers."),
    click.option("--caption", metavar="COLUMN", help="Metadata column of captions."),
    click.option(
        "--dtype",
        type=Choice(["float16", "float32", "float64", "bfloat16"]),
        help="Data type of vector files without a header.",
    ),
    click.option(
        "--metadata", metavar="PATH", multiple=True, callback=_once, help="img2dataset output or scores to join by key."
    ),
    click.option("--skip-bad", is_flag=True, help="Skip and list bad files and rows instead of stopping."),
    READER,
)

# The new location of a pool.
MOVED = (
    click.option("--pool", metavar="POOL", help="New location of the pool, if it was moved."),
    click.option("--metadata", metavar="PATH", help="New location of the joined metadata, if it was moved."),
)


def engine_options(default: str | None, help: str, **how: Any) -> tuple[Any, ...]:
    """Return the options that choose an engine; ``how`` is passed on to click."""
    return (
        click.option(
            "--engine", type=PluginChoice(_engines, options=True), default=default, show_default=default is not None,
            metavar="NAME[:OPTION=VALUE]", help=help, **how,
        ),
        click.option(
            "--ray-address", metavar="ADDRESS",
            help="Cluster for --engine ray: auto, HOST:PORT or ray://HOST:PORT (default: Ray starts on this machine).",
        ),
    )  # fmt: skip


def engine_from(engine: str, workers: int | None, ray_address: str | None, device: str | None = None) -> Any:
    """Return the engine that the values of :func:`engine_options` describe, for products on a device.

    Raises:
        UsageError: There is no such engine or option, or an address for an engine other than ray.
    """
    from thresher.runtime.engine import make_engine

    _check_address(engine, ray_address)
    given = {"address": ray_address, "device": device}
    return make_engine(engine, workers, {name: value for name, value in given.items() if value})


def _check_address(engine: str | None, ray_address: str | None) -> None:
    if ray_address and (engine or "").partition(":")[0] != "ray":
        raise UsageError(f"--ray-address {ray_address}: is for --engine ray; pass that too")


def engine_given(values: dict[str, Any]) -> Any:
    """Remove the values of :func:`engine_options` from those of a command; return the engine, None if none is given.

    If one is given, ``workers`` are its workers, and None in the values.
    """
    engine, address = values.pop("engine"), values.pop("ray_address")
    if engine is None and address is None:
        return None
    workers, values["workers"] = values["workers"], None
    return engine_from(engine or "", workers, address)


CACHE = click.option("--cache", metavar="DIR", help="Cache folder (default: see thresher config).")
# How to run.
RUN = (
    *engine_options(
        "threads", "Where the work runs: serial, threads, processes or ray; the result is the same.",
        cls=Configured, setting="engine",
    ),
    click.option(
        "--workers", cls=Configured, setting="workers", type=WholeRange(1, MOST_WORKERS), metavar="N",
        help="Number of parallel tasks (default: all cores).",
    ),
    click.option(
        "--device", metavar="NAME",
        help="Where vectors are compared: cpu, cuda (all GPUs), or some of them, such as cuda:0,cuda:1.",
    ),
    CACHE,
    click.option(
        "--scratch", metavar="DIR|URL",
        help="Where vectors are written once more, cluster by cluster, during a step (default: the cache folder).",
    ),
    QUIET,
    JSON,
)  # fmt: skip


def _job(ctx: click.Context, option: click.Parameter, value: str | None) -> Any:
    from thresher.runtime.jobs import ArrayJob

    return None if value is None else ArrayJob.parse(value)


SHARD = click.option(
    "--shard", metavar="I/N", callback=_job,
    help="Do the share of job I of N, for job arrays; the same command without --shard merges the shares.",
)  # fmt: skip

THUMBNAILS = click.option(
    "--thumbnails-as-data", is_flag=True, help="Read a pool as data, with its thumbnails as images."
)

_CAPTION = click.option(
    "--caption", metavar="COLUMN",
    help="Column of captions; for tars the extension of a member, or json:NAME for an attribute of the json.",
)  # fmt: skip
# How to read raw data of images alone.
IMAGES = (
    click.option(
        "--image", metavar="COLUMN", help="Column of images; for tars the extension of a member, such as input.jpg."
    ),
    click.option("--key", metavar="COLUMN", help="Column of keys, or row for row numbers; for tars json:NAME."),
    click.option(
        "--columns", metavar="NAMES",
        help="Names of the columns of a csv without a first line of names, such as filepath,title.",
    ),
    click.option(
        "--root", metavar="DIR", help="Folder of image files named in a table (default: the folder of the table)."
    ),
    click.option("--captions", "captions_file", metavar="FILE", help="File of captions for a folder of images."),
    click.option("--allow-outside", is_flag=True, help="Also read images outside the folder, if DATA names them."),
    THUMBNAILS,
    READER,
)  # fmt: skip
# How to read raw data.
DATA = (IMAGES[0], _CAPTION, *IMAGES[1:])


@dataclass(frozen=True)
class Common:
    """The values of :data:`POOL`, :data:`RUN` and :data:`SEED`."""

    image: str | None
    text: str | None
    key: str | None
    caption: str | None
    dtype: str | None
    metadata: str | None
    skip_bad: bool
    reader: str | None
    engine: str
    ray_address: str | None
    workers: int | None
    device: str | None
    seed: int | None
    cache: str | None
    scratch: str | None
    quiet: bool
    output: Output

    def __post_init__(self) -> None:
        """Refuse, before any work, an address that the engine does not use."""
        _check_address(self.engine, self.ray_address)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Common:
        """Remove these values from a command's values; None for options that the command does not have."""
        return cls(**{item.name: values.pop(item.name, None) for item in fields(cls)})

    def open(self, pool: str) -> Any:
        """Open the pool."""
        from thresher.pool.layout import Options
        from thresher.pool.store import open_store

        values = {item.name: getattr(self, item.name) for item in fields(Options)}
        return open_store(pool, Options(**values), scratch=self.cache)

    def resources(self) -> dict[str, Any]:
        """Return engine, cache and progress for a run."""
        from thresher.io.places import place
        from thresher.runtime.cache import Cache

        return {
            "engine": engine_from(self.engine, self.workers, self.ray_address, self.device),
            "cache": Cache.at(self.cache, scratch=None if self.scratch is None else place(self.scratch)),
            "progress": self.output.progress(self.quiet),
        }


# --- options from fields ---------------------------------------------------------------------


def field_options(cls: Any, without: Sequence[str] = ()) -> list[Any]:
    """Return an option for each field of a dataclass of parameters; each defaults to None, which means not set.

    Args:
        cls: The dataclass. ``metadata["help"]`` of a field describes it, ``metadata["metavar"]`` names its value.
        without: Fields to exclude.
    """
    from thresher.runtime.parameters import parameters_of

    return [_field_option(cls, item) for item in parameters_of(cls) if item.name not in without]


def made_options(decorators: Sequence[Any]) -> list[click.Option]:
    """Return the options that decorators would add to a command, in the given order."""

    def command() -> None: ...

    options(*decorators)(command)
    return list(reversed(getattr(command, "__click_params__", [])))


def _field_option(cls: Any, item: Any) -> Any:
    from thresher.runtime.parameters import choices, type_of, without_none

    kind = without_none(type_of(cls, item.name))
    flag = "--" + item.name.replace("_", "-")
    more: dict[str, Any] = {"help": _sentence(item), "default": None}
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    elif words := choices(kind):
        more["type"] = Choice(words)
    else:
        more["metavar"] = item.metadata.get("metavar") or _metavar(kind)
        more["type"] = {int: WHOLE, float: NUMBER}.get(kind, str)
    return click.option(flag, item.name, **more)


def _sentence(item: Any) -> str:
    """Return the help of a field's option, with its default."""
    from thresher.runtime.parameters import is_required

    about = str(item.metadata.get("help", ""))
    plain = any(item.default is value for value in (None, False, MISSING)) or item.default == ""
    default = "" if plain else f" (default: {item.default})"
    return f"{about[:1].upper()}{about[1:]}{' (required)' if is_required(item) else default}."


def _metavar(kind: Any) -> str:
    """Return the placeholder for values of a type."""
    for note in getattr(kind, "__metadata__", ()):
        if hasattr(note, "metavar"):
            return str(note.metavar)
    return {"int": "N", "float": "X", "Keep": "N|SHARE"}.get(getattr(kind, "__name__", ""), "TEXT")


# --- results that are folders ---------------------------------------------------------------------
