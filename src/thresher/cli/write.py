"""``export`` and ``reshard``: write a selection for training."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import Any

import click

from thresher.cli import text
from thresher.cli.options import (
    DATA,
    JSON,
    MOVED,
    OVERWRITE,
    QUIET,
    Choice,
    PluginChoice,
    data_options,
    field_options,
    made_options,
    options,
)
from thresher.cli.output import Output
from thresher.errors import UsageError


class _Export(click.Command):
    """``export``: formats and their options come from the plug-ins."""

    @cached_property
    def _offered(self) -> list[click.Parameter]:
        from thresher.export.registry import EXPORTS

        formats = EXPORTS.all()
        merged: dict[str, click.Option] = {}
        for name, cls in formats.items():
            for option in made_options(field_options(cls)):
                first = merged.setdefault(str(option.name), option)
                first.help = f"{name}: {option.help}" if first is option else f"{first.help} {name}: {option.help}"
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
    from thresher.export.write import export as write
    from thresher.pool.store import reopen
    from thresher.selection import Selection

    full = hash_inputs or manifest == "full"
    if full and no_manifest:
        asked = "--hash-inputs" if hash_inputs else "--manifest full"
        raise UsageError(f"{asked} writes to the manifest; remove {asked} or --no-manifest")
    made = build(kind, {name: value for name, value in values.items() if value is not None})
    loaded = Selection.load(selection)
    done = write(
        loaded, made, out, store=reopen(loaded, pool, metadata), manifest=not no_manifest, hash_inputs=full,
        overwrite=overwrite, progress=output.progress(quiet),
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
    "--per-shard", type=click.IntRange(1), default=10_000, show_default=True, metavar="N", help="Samples per shard."
)
@click.option(
    "--shuffle",
    type=click.IntRange(0),
    metavar="SEED",
    help="Shuffle all samples with this seed (default: the order of DATA).",
)
@click.option("--workers", type=int, metavar="N", help="Shards written in parallel (default: all cores).")
@options(*DATA)
@click.option("--pool", metavar="POOL", help="New location of the pool of SEL, if it was moved.")
@click.option("--overwrite", is_flag=True, help="Replace a result of other options.")
@options(QUIET, JSON)
def reshard(data: str, sel: str, out: str, quiet: bool, output: Output, **values: Any) -> None:
    """Copy the selected samples of raw data into new shards.

    The shards are tars, parquet or a csv. DATA is tars (a folder, or a path with {00000..00099}), parquet, an
    open_clip csv, or a folder of images. SEL is a selection folder, a file with one key per line, or a DataComp
    subset file.
    """
    from thresher.reshard import reshard as run

    reading = data_options(values)
    done = run(data, sel, out, processes=True, options=reading, progress=output.progress(quiet), **values)
    output.result(asdict(done), text.resharded(done, data, out))
