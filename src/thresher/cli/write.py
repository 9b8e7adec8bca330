"""``export`` and ``reshard``: a selection as files that training reads."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from thresher.cli import text
from thresher.cli.options import DATA, JSON, MOVED, OVERWRITE, QUIET, Choice, data_options, options
from thresher.cli.output import Output


def _formats() -> list[str]:
    from thresher.export.formats import formats

    return list(formats())


@click.command()
@click.argument("selection", metavar="SEL")
@click.option("--as", "kind", required=True, type=Choice(_formats), help="Format to write.")
@click.option("-o", "--out", required=True, metavar="FILE", help="File to write.")
@options(*MOVED)
@click.option("--manifest/--no-manifest", default=True, show_default=True, help="Write FILE.manifest.json with sha256.")
@options(OVERWRITE, JSON)
def export(
    selection: str, kind: str, out: str, pool: str | None, metadata: str | None, manifest: bool, overwrite: bool,
    output: Output,
) -> None:  # fmt: skip
    """Write a selection in a format that training tools read.

    SEL is a selection folder.
    """
    from thresher.export.formats import export as write
    from thresher.pool.store import reopen
    from thresher.selection import Selection

    loaded = Selection.load(selection)
    done = write(loaded, kind, out, store=reopen(loaded, pool, metadata), manifest=manifest, overwrite=overwrite)
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
    "--shuffle", type=click.IntRange(0), metavar="SEED", help="Shuffle all samples (default: the order of DATA)."
)
@click.option("--workers", type=int, metavar="N", help="Shards written at once (default: all cores).")
@options(*DATA)
@click.option("--pool", metavar="POOL", help="Where the pool of SEL is now, if it was moved.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier call with other options wrote.")
@options(QUIET, JSON)
def reshard(data: str, sel: str, out: str, quiet: bool, output: Output, **given: Any) -> None:
    """Copy the selected samples of raw data into new shards.

    The shards are tars, parquet or a csv. DATA is tars (a folder, or a path with {00000..00099}), parquet, a csv of
    open_clip, or a folder of images. SEL is a selection folder, a file with one key per line, or a subset file of
    DataComp.
    """
    from thresher.reshard import reshard as run

    reading = data_options(given)
    done = run(data, sel, out, processes=True, options=reading, progress=output.progress(quiet), **given)
    output.result(asdict(done), text.resharded(done, data, out))
