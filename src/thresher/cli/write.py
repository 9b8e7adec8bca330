"""``export`` and ``reshard``: write a selection for training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import click

from thresher import api
from thresher.cli import text
from thresher.cli.options import (
    DATA,
    JSON,
    MOVED,
    OVERWRITE,
    QUIET,
    SHARD,
    WHOLE,
    Choice,
    Configured,
    PluginChoice,
    WholeRange,
    engine_given,
    engine_options,
    field_options,
    made_options,
    options,
)
from thresher.cli.output import Output, show_error
from thresher.errors import UsageError
from thresher.runtime.format import counted, percent
from thresher.runtime.parameters import share_of


@dataclass(frozen=True)
class _Most:
    """The most of something that is allowed: a number, or a share if that is None."""

    text: str
    number: int | None
    share: float = 0.0

    def exceeded(self, count: int, of: int) -> bool:
        """Return whether ``count`` of ``of`` things are more than allowed."""
        return count > (self.share * of if self.number is None else self.number)


def _most_missing(ctx: click.Context, option: click.Parameter, text: str) -> _Most:
    """Parse a number, 0 included, or a share."""
    if text.isdecimal() and len(text) < 19:
        return _Most(text, int(text))
    try:
        return _Most(text, None, share_of(text, whole=True))
    except UsageError as error:
        raise click.BadParameter(f"{error}; or a number of keys, like 0 or 20", ctx, option) from None


class _Export(click.Command):
    """``export``: formats and their options come from the plug-ins."""

    @cached_property
    def _offered(self) -> list[click.Parameter]:
        from thresher.export.registry import EXPORTS

        formats = EXPORTS.all()
        merged: dict[str, click.Option] = {}
        texts: dict[str, dict[str, list[str]]] = {}
        for name, cls in formats.items():
            for option in made_options(field_options(cls)):
                merged.setdefault(str(option.name), option)
                texts.setdefault(str(option.name), {}).setdefault(str(option.help), []).append(name)
        for name, option in merged.items():
            option.help = " ".join(f"{', '.join(names)}: {text}" for text, names in texts[name].items())
        taken = {parameter.name for parameter in self.params}
        kind = click.Option(
            ["--as", "kind"], required=True, type=PluginChoice(lambda: EXPORTS), help="Format to write."
        )
        return [kind, *(option for name, option in merged.items() if name not in taken)]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; ``--manifest`` has an optional value, which must not be mistaken for the next word."""
        for i, word in enumerate(args[: args.index("--")] if "--" in args else args):
            if word == "--manifest" and args[i + 1 : i + 2] not in (["short"], ["full"]):
                args[i] = "--manifest=short"
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        selection, *rest = super().get_params(ctx)
        return [selection, *self._offered, *rest]


@click.command(cls=_Export)
@click.argument("selection", metavar="SEL")
@click.option("-o", "--out", required=True, metavar="FILE", help="File to write.")
@options(*MOVED)
@click.option(
    "--manifest",
    type=Choice(["short", "full"]),
    default="short",
    show_default=True,
    help="Write FILE.manifest.json, with size and time of the files of the pool; full: also their SHA-256, which "
    "reads the whole pool.",
)
@click.option("--no-manifest", is_flag=True, help="Do not write FILE.manifest.json.")
@click.option("--hash-inputs", is_flag=True, hidden=True, help="The same as --manifest full.")
@options(OVERWRITE, QUIET, JSON)
def export(
    selection: str, kind: str, out: str, pool: str | None, metadata: str | None, manifest: str, no_manifest: bool,
    hash_inputs: bool, overwrite: bool, quiet: bool, output: Output, **values: Any,
) -> None:  # fmt: skip
    """Write a selection in a format that training tools read.

    SEL is a selection folder.
    """
    from thresher.export.registry import build
    from thresher.selection import Selection

    full = hash_inputs or manifest == "full"
    if full and no_manifest:
        asked = "--hash-inputs" if hash_inputs else "--manifest full"
        raise UsageError(f"{asked} writes to the manifest; remove {asked} or --no-manifest")
    made = build(kind, {name: value for name, value in values.items() if value is not None})
    done = Selection.load(selection).export(
        made, out, pool=pool, metadata=metadata, manifest=not no_manifest, hash_inputs=full, overwrite=overwrite,
        progress=output.progress(quiet),
    )  # fmt: skip
    output.result(asdict(done), text.exported(done))


@click.command()
@click.argument("data")
@click.argument("sel")
@click.option("-o", "--out", required=True, metavar="DIR", help="Folder of the new shards.")
@click.option(
    "--as", "form", type=Choice(["webdataset", "parquet", "csv"]), help="Format to write (default: that of DATA)."
)
@click.option(
    "--per-shard", type=WholeRange(1), default=10_000, show_default=True, metavar="N", help="Samples per shard."
)
@click.option(
    "--shuffle",
    type=WholeRange(0),
    metavar="SEED",
    help="Shuffle all samples with this seed (default: the order of DATA).",
)
@click.option(
    "--trainable/--no-trainable",
    default=None,
    help="Write tars of which open_clip trains on every sample: images in other formats than JPEG, PNG and WebP become "
    "PNG, captions .txt (default: if DATA is not tars).",
)
@click.option(
    "--for-hub",
    is_flag=True,
    help="Write parquet for the Hugging Face Hub: chunks by content, row groups of about 100 MB, images declared as "
    "such.",
)
@click.option(
    "--for-energon",
    is_flag=True,
    help="Write tars that Megatron Energon reads without 'energon prepare': an index of each, and .nv-meta.",
)
@click.option(
    "--for-dali",
    is_flag=True,
    help="Write an index next to each tar, which NVIDIA DALI reads, without 'wds2idx'.",
)
@click.option(
    "--workers", cls=Configured, setting="workers", type=WHOLE, metavar="N",
    help="Shards written in parallel (default: all cores).",
)  # fmt: skip
@options(
    *engine_options(None, "Read and write on an engine, such as ray (default: threads); the result is the same."), SHARD
)
@options(*DATA)
@click.option("--pool", metavar="POOL", help="New location of the pool of SEL, if it was moved.")
@click.option("--overwrite", is_flag=True, help="Replace a result of other options.")
@click.option(
    "--max-missing",
    callback=_most_missing,
    default="1%",
    show_default=True,
    metavar="N|SHARE",
    help="Keys of SEL that DATA may lack before the exit code is 2: a share, or a number.",
)
@click.option("--allow-damaged", is_flag=True, help="Exit with code 0 although files of DATA are damaged.")
@options(QUIET, JSON)
def reshard(
    data: str, sel: str, out: str, max_missing: _Most, allow_damaged: bool, quiet: bool, output: Output, **values: Any
) -> int:  # fmt: skip
    """Copy the selected samples of raw data into new shards.

    The shards are tars, parquet or a csv. DATA is tars (a folder, or a path with {00000..00099}), parquet, an
    open_clip csv, or a folder of images. SEL is a selection folder, or a file of keys: text with one key per line, a
    DataComp subset file, or a table with a column 'key'. If DATA lacks more than --max-missing of the keys, or a file
    of DATA is damaged, what there is is written, and the exit code is 2.
    """
    values["engine"] = engine_given(values)
    done = api.reshard(data, sel, out, processes=True, progress=output.progress(quiet), **values)
    problems = []
    if max_missing.exceeded(done.missing, done.keys):
        problems.append(
            f"{done.missing:,} of {counted(done.keys, 'key')} ({percent(done.missing, done.keys)}) not found in "
            f"{data}, more than --max-missing {max_missing.text}; give the data that {sel} was made from, or, if "
            f"{data} is only a part of it, pass --max-missing {-(-100 * done.missing // done.keys)}%"
        )
    if done.damaged and not allow_damaged:
        problems.append(
            f"{counted(done.damaged, 'file')} of {data} damaged, listed in {out}/set-aside.txt: samples after the "
            "damage are missing; repair the data, or pass --allow-damaged"
        )
    output.result({**asdict(done), "problems": problems}, text.resharded(done, data, out))
    if problems:
        show_error("PoolError", "; ".join(problems), as_json=False)
    return 2 if problems else 0
