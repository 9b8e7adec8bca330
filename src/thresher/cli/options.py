"""Options that several commands have, and how they are put on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from thresher.data import DataOptions

F = TypeVar("F", bound=Callable[..., Any])

# How to read raw data, where names do not say it.
DATA = (
    click.option("--image", metavar="NAME", help="Column of a table with the pictures."),
    click.option("--caption", metavar="NAME", help="Column with the captions."),
    click.option("--key", metavar="NAME", help="Column that identifies a row."),
    click.option("--root", metavar="DIR", help="Folder of the pictures that a table names (default: the table's)."),
    click.option("--captions", "captions_file", metavar="FILE", help="For a folder of pictures: their captions."),
)
QUIET = click.option("--quiet", is_flag=True, help="No progress.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def options(*several: Any) -> Callable[[F], F]:
    """Put options on a command, in the order given."""

    def add(function: F) -> F:
        for option in reversed(several):
            function = option(function)
        return function

    return add


def data_options(values: dict[str, Any], **more: Any) -> DataOptions:
    """Take out of a command's values what :data:`DATA` asked for."""
    return DataOptions(
        **{name: values.pop(name) for name in ("image", "caption", "key", "root", "captions_file")}, **more
    )
