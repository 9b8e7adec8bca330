"""``cache``: how large the cache is, and clearing it."""

from __future__ import annotations

from typing import Any

import click

from thresher.cli import text
from thresher.cli.options import JSON, Group
from thresher.cli.output import Output

_FOLDER = click.option("--cache", "folder", metavar="DIR", help="Cache folder (default: see thresher config).")


@click.group(cls=Group, invoke_without_command=True)
@_FOLDER
@JSON
@click.pass_context
def cache(ctx: click.Context, folder: str | None, output: Output) -> None:
    """Show the size of the cache, or clear it."""
    from thresher.runtime.cache import Cache

    ctx.obj = (folder, output)
    if ctx.invoked_subcommand is None:
        here = Cache.at(folder)
        result = {"folder": str(here.folder), "bytes": here.size(), "limit_bytes": here.limit}
        output.result(result, text.cache_size(result), cost=False)


@cache.command()
@_FOLDER
@JSON
@click.pass_obj
def clear(outer: tuple[str | None, Output], folder: str | None, output: Output) -> None:
    """Remove everything in the cache."""
    from thresher.runtime.cache import Cache

    here = Cache.at(folder or outer[0])
    result: dict[str, Any] = {"folder": str(here.folder), "removed_bytes": here.clear()}
    (output if output.as_json else outer[1]).result(result, text.cache_cleared(result), cost=False)
