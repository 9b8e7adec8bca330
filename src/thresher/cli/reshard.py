"""``thresher reshard``: what the command line asks; the rest is loaded when there is something to do."""

from __future__ import annotations

import json
from typing import Any

import click

from thresher.cli.options import DATA, JSON, QUIET, data_options, options


@click.command()
@click.argument("data")
@click.argument("sel")
@click.option("-o", "--out", required=True, metavar="DIR", help="Folder of the new shards.")
@click.option(
    "--as", "form", type=click.Choice(["webdataset", "parquet", "csv"]), help="What to write (default: as DATA is)."
)
@click.option("--per-shard", type=click.IntRange(1), default=10_000, show_default=True, metavar="N")
@click.option("--shuffle", type=click.IntRange(0), metavar="SEED", help="Mix all samples (default: the order of DATA).")
@click.option("--workers", type=int, metavar="N", help="Shards at once (default: all cores).")
@options(*DATA)
@click.option("--pool", metavar="POOL", help="Where the pool of SEL is now, if it was moved.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier call with other options wrote.")
@options(QUIET, JSON)
def reshard(data: str, sel: str, out: str, **given: Any) -> None:
    """Copy the samples of DATA that SEL keeps into new shards: tars, parquet or a csv.

    DATA: tars (a folder, or a path with {00000..00099}), parquet, a csv of open_clip, or a folder of pictures. SEL: a
    selection folder, a file with a key a line, or a subset file of DataComp.
    """
    from dataclasses import asdict

    from thresher.reshard import reshard as run
    from thresher.runtime.progress import progress_for

    quiet, as_json = given.pop("quiet"), given.pop("as_json")
    reading = data_options(given)
    progress = progress_for(quiet or as_json)
    done = run(data, sel, out, processes=True, options=reading, progress=progress, **given)
    if as_json:
        click.echo(json.dumps(asdict(done), indent=1))
        return
    files = {"webdataset": "tar", "parquet": "parquet file", "csv": "csv"}[done.form]
    files += "s" if done.shards > 1 else ""
    click.echo(f"{done.samples:,} of {done.chosen:,} samples in {done.shards:,} {files}, found by {done.by}")
    if done.missing:
        click.echo(f"{done.missing:,} keys are not in {data}; they are listed in {out}/missing.txt")
    if done.aside:
        click.echo(f"{done.aside:,} files or samples could not be used; they are listed in {out}/set-aside.txt")
    click.echo(f"written to {out}")
