"""``thresher embed``: what the command line asks, as settings."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import click

from thresher.cli.options import DATA, JSON, QUIET, data_options, options

_THUMBNAIL = 64  # pixels of the longer side


@click.command()
@click.argument("data")
@click.option("-o", "--out", required=True, metavar="POOL", help="Folder of the pool.")
@click.option(
    "--encoder", required=True, metavar="NAME",
    help="open_clip:ARCH/PRETRAINED, timm:NAME, torchvision:NAME, transformers:NAME, sentence-transformers:NAME, "
    "conse, or your own package.module:Name.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1, cuda:0,cuda:1.")
@click.option(
    "--precision", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="B", help="Samples at a time in the model (default: 64; GPU: 512)."
)
@click.option(
    "--workers", type=click.IntRange(0), metavar="N",
    help="Processes that decode (default: the cores, less one for the CPU's model; 0: none beside this one).",
)  # fmt: skip
@click.option("--only", type=click.Choice(["image", "text"]), help="Embed no more than that.")
@click.option(
    "--thumbnails", is_flag=True, help="Keep small copies of the pictures, which reports show.",
)  # fmt: skip
@click.option(
    "--pixel-limit", type=click.IntRange(1), metavar="N", help="Pixels a picture may have (default: 134,217,728)."
)
@options(*DATA)
@click.option(
    "--per-shard", type=click.IntRange(1), default=10_000, show_default=True, metavar="N",
    help="Rows of a shard, of data that are not tars.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Begin anew where there is a pool already.")
@options(QUIET, JSON)
def embed(data: str, out: str, overwrite: bool, quiet: bool, as_json: bool, **values: Any) -> None:
    """Embed pictures and captions: DATA becomes a pool.

    DATA is webdataset tars, parquet or Arrow files, a Hugging Face dataset saved to disk, a csv of open_clip, or a
    folder of pictures. The same command goes on after an interruption; with other DATA the pool grows.
    """
    from thresher.embed.pipeline import EmbedSettings
    from thresher.embed.pipeline import embed as run
    from thresher.runtime.progress import progress_for

    reading = data_options(values, per_part=values.pop("per_shard"))
    given = {name: value for name, value in values.items() if value is not None}
    given["thumbnails"] = _THUMBNAIL if given["thumbnails"] else 0
    settings = EmbedSettings(data=reading, **given)
    begin = time.monotonic()
    found = run(data, out, settings, overwrite=overwrite, progress=progress_for(quiet or as_json))
    seconds = time.monotonic() - begin
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(found), "seconds": round(seconds, 3)}, indent=1))
        return
    for note in found.notes:
        click.echo(note)
    if found.new:
        rate = found.new / seconds
        click.echo(f"{found.new:,} rows embedded in {seconds:.1f} s, {rate:,.0f} a second, loading the model included")
    if found.set_aside or found.damaged:
        files = f" and {found.damaged:,} damaged file{'s' if found.damaged > 1 else ''}" if found.damaged else ""
        click.echo(f"{found.set_aside:,} samples{files} set aside, listed in {found.pool}/set_aside.txt")
    shards = f"{found.shards:,} shard{'s' if found.shards > 1 else ''}"
    already = "" if found.new else ", which were there already"
    click.echo(f"{found.pool}: {found.rows:,} rows ({' and '.join(found.fields)}) in {shards}{already}")
