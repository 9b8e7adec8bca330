"""``config`` and ``completions``: what is set once for all commands."""

from __future__ import annotations

from typing import Any

import click

from thresher.cli import text
from thresher.cli.options import JSON, Choice, Group
from thresher.cli.output import Output, say
from thresher.runtime import config as settings

_NAME = click.argument("name", metavar="NAME")


# --- config ---------------------------------------------------------------------------------------


@click.group(cls=Group, invoke_without_command=True)
@JSON
@click.pass_context
def config(ctx: click.Context, output: Output) -> int:
    """Show the settings and where they come from, or change them.

    A setting comes from an option of a command, else from an environment variable, else from the configuration file.
    The exit code is 2 if a setting cannot be used.
    """
    ctx.obj = output
    if ctx.invoked_subcommand is not None:
        return 0
    result = settings.in_force()
    output.result(result, text.settings(result), cost=False)
    return 2 if result["problems"] else 0


@config.command("set")
@_NAME
@click.argument("value", metavar="VALUE")
@JSON
@click.pass_obj
def set_(outer: Output, name: str, value: str, output: Output) -> None:
    """Write a setting to the configuration file."""
    parsed = settings.find_setting(name).parse(value, f"{name} {value}")
    if name == "engine":
        from thresher.runtime.engine import ENGINES

        ENGINES.build(value)
    file = settings.write_setting(name, parsed)
    result = {"file": file, "name": name, "value": parsed}
    _chosen(outer, output).result(result, [f"{name} = {text.shown(parsed)} in {file}"], cost=False)


@config.command()
@_NAME
@JSON
@click.pass_obj
def unset(outer: Output, name: str, output: Output) -> None:
    """Remove a setting from the configuration file."""
    file = settings.write_setting(name, None)
    _chosen(outer, output).result({"file": file, "name": name}, [f"{name} is not set in {file}"], cost=False)


@config.command()
@JSON
@click.pass_obj
def path(outer: Output, output: Output) -> None:
    """Print the path of the configuration file, which need not exist."""
    file = settings.config_file()
    _chosen(outer, output).result({"file": file}, [file], cost=False)


def _chosen(outer: Output, own: Output) -> Output:
    return own if own.as_json else outer


# --- completions ----------------------------------------------------------------------------------


@click.command()
@click.argument("shell", type=Choice(["bash", "zsh", "fish"]))
@JSON
@click.pass_context
def completions(ctx: click.Context, shell: str, output: Output) -> None:
    """Print the script that completes commands in a shell.

    The script is for bash 4.4 or newer, zsh or fish. See docs/completions.md for where it goes.
    """
    from click.shell_completion import get_completion_class

    cls: Any = get_completion_class(shell)
    lines = _script(cls, ctx.find_root().command).rstrip().split("\n")
    if output.as_json:
        output.result({"shell": shell, "script": "\n".join(lines)}, (), cost=False)
    else:
        say(*lines)


def _script(cls: Any, command: click.Command) -> str:
    made = cls(command, {}, "thresher", "_THRESHER_COMPLETE")
    return str(made.source_template % made.source_vars())  # source() would start a bash to look at its version
