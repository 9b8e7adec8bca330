"""The entry point: the list of commands and the exit codes. The module of a command loads when the command runs."""

from __future__ import annotations

import importlib
import platform
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

import click
from click.shell_completion import CompletionItem

from thresher import __version__
from thresher.cli.options import Group
from thresher.cli.output import (
    JSON_FLAG,
    Interrupted,
    print_json,
    say,
    show_error,
    show_interruption,
    wants_json,
    warnings_as_lines,
)
from thresher.errors import ThresherError
from thresher.io.paths import visible
from thresher.runtime.config import check_variables


class Section(NamedTuple):
    """Commands under one heading of the help.

    Attributes:
        title: The heading.
        module: The module of ``thresher.cli`` that holds them.
        commands: Name and summary of each; the summary is the first sentence of its own help.
    """

    title: str
    module: str
    commands: dict[str, str]


SECTIONS = (
    Section(
        "Look",
        "look",
        {
            "inspect": "Show what a pool contains, what looks wrong and what a run will cost.",
            "plan": "Estimate seconds, bytes, requests and memory of a run on a cluster.",
            "doctor": "Show what raw data contain, or with --self what this installation can use.",
            "advise": "Advise how much of a pool to keep for a number of samples seen.",
            "methods": "List the pruning methods, or describe one of them.",
            "recipes": "List the recipes that come with thresher, or print one of them.",
        },
    ),
    Section(
        "Embed",
        "embed",
        {
            "embed": "Embed images and captions into a pool.",
            "embed-classes": "Embed class names, for clipcov and for zero-shot evaluation.",
        },
    ),
    Section(
        "Select",
        "select",
        {
            "select": "Prune a pool with one method.",
            "run": "Prune a pool with a recipe of several steps.",
            "score": "Write a method's score of every row to a parquet file.",
            "cluster": "Cluster a pool with spherical k-means.",
            "sweep": "Compare several budgets or thresholds of a method, from one pass.",
        },
    ),
    Section(
        "Explain",
        "explain",
        {
            "explain": "Explain why one row was kept or dropped.",
            "compare": "Compare selections of one pool with each other, or training runs.",
            "report": "Write an HTML report on a selection or a training run, or compare several.",
            "view": "Show selections, training runs or a pool in the browser.",
        },
    ),
    Section(
        "Train",
        "train",
        {
            "train": "Train a model and prune its data while it trains.",
            "coreset": "Select the rows that a training run found least redundant.",
            "mismatched": "Drop the pairs whose image and caption do not belong together.",
            "reference": "Write a loss of every row under a reference model, for the policy rho.",
        },
    ),
    Section(
        "Compare",
        "lab",
        {
            "evaluate": "Evaluate a model: zero-shot classification, retrieval, kNN and linear probes.",
            "prove": "Show whether pruning pays on your data: a method or policy, all rows and random rows.",
            "lab": "Run a plan: policies and selections, with several seeds, and a table with intervals.",
        },
    ),
    Section(
        "Write",
        "write",
        {
            "export": "Write a selection in a format that training tools read.",
            "reshard": "Copy the selected samples of raw data into new shards.",
        },
    ),
    Section("Cache", "cache", {"cache": "Show the size of the cache, or clear it."}),
    Section(
        "Set up",
        "setup",
        {
            "config": "Show the settings and where they come from, or change them.",
            "completions": "Print the script that completes commands in a shell.",
        },
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success, 2 after a usage or input error with one readable message, 130 after an interruption; 1 is for
        ``doctor --strict`` and for problems that ``doctor --self`` finds.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = wants_json(words)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # like Ctrl-C, so that workers stop too
    with warnings_as_lines():
        try:
            code = thresher.main(words, prog_name="thresher", standalone_mode=False)
        except (click.Abort, KeyboardInterrupt):
            show_interruption("run the same command again; it reuses what is in the cache", as_json=as_json)
            return 130
        except Interrupted as error:
            show_interruption(str(error), as_json=as_json)
            return 130
        except SystemExit:  # click ends so if the reader of the help has gone (``| head``), and after completion
            return 0
        except click.ClickException as error:
            message = error.format_message()
            if isinstance(error, click.MissingParameter):  # click lists the choices on separate lines
                message = " ".join(message.split())
            if isinstance(error, click.NoSuchOption):
                message = message.rstrip(".") + _as_argument(words, error)
            show_error("UsageError", message, as_json=as_json, ctx=getattr(error, "ctx", None))
        except UnicodeEncodeError as error:  # bytes of the command line or of a file's name
            message = f"{visible(error.object)}: not valid UTF-8"
            show_error("UsageError", message, as_json=as_json)
        except Exception as error:
            from thresher.runtime.memory import OUT_OF_MEMORY, is_out_of_memory

            if is_out_of_memory(error):
                show_error("MemoryError", OUT_OF_MEMORY, as_json=as_json)
            elif isinstance(error, ThresherError):
                show_error(type(error).__name__, str(error), as_json=as_json)
            elif isinstance(error, OSError):
                where = f"{error.filename}: " if error.filename else ""
                show_error(type(error).__name__, f"{where}{error.strerror or error}", as_json=as_json)
            else:
                raise
        else:
            return code if isinstance(code, int) else 0  # click returns the code of an Exit
    return 2


def _as_argument(words: list[str], error: click.NoSuchOption) -> str:
    """Return the end of the message on an unknown option: what to type if it was meant as an argument, such as a key.

    "" if the command has no arguments, or an option with a similar name.
    """
    if (
        error.possibilities
        or error.ctx is None
        or not any(isinstance(param, click.Argument) for param in error.ctx.command.params)
    ):
        return ""
    name, before = error.option_name, words[: words.index("--")] if "--" in words else words
    short = {name[1:]} if len(name) == 2 else set()  # of -dash click names the first letter that is not an option
    at = [i for i, word in enumerate(before) if word.partition("=")[0] == name]
    at += [i for i, word in enumerate(before) if short and word[:1] == "-" != word[1:2] and short & set(word[1:])]
    if not at:
        return ""
    rest, after = before[at[0] + 1 :], words[len(before) + 1 :]
    options = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    typed = [*words[: at[0]], *rest[options:], "--", words[at[0]], *rest[:options], *after]
    return f"; if {words[at[0]]} is not an option, put -- before it: thresher {shlex.join(typed)}"


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class _Root(Group):
    """All commands, grouped under headings."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in SECTIONS for name in section.commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for section in SECTIONS:
            if cmd_name in section.commands:
                module = importlib.import_module(f"thresher.cli.{section.module}")
                command: click.Command = getattr(module, cmd_name.replace("-", "_"))
                return command
        return None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a command without loading its module."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        every = {name: summary for section in SECTIONS for name, summary in section.commands.items()}
        return [CompletionItem(name, help=about) for name, about in every.items() if name.startswith(incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.list_commands(ctx)))
        for title, _, commands in SECTIONS:
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), summary) for name, summary in commands.items()])


_WITH_ANY_VARIABLES = ("config", "completions", "doctor")  # what shows, or does not use, a setting


def _show_version(ctx: click.Context, param: click.Parameter, on: bool) -> None:
    """Print the version and exit; ``--json`` is parsed first, wherever it is."""
    if not on or ctx.resilient_parsing:
        return
    python = platform.python_version()
    if ctx.params["as_json"]:
        print_json({"name": "thresher", "version": __version__, "python": python})
    else:
        say(f"thresher, version {__version__}")
    ctx.exit()


@click.group(
    cls=_Root, name="thresher", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option(JSON_FLAG, "as_json", is_flag=True, is_eager=True, help="With --version: print it as JSON.")
@click.option("--version", is_flag=True, expose_value=False, callback=_show_version, help="Show the version.")
@click.pass_context
def thresher(ctx: click.Context, as_json: bool) -> None:
    """Choose the image-text pairs worth training on."""
    command = ctx.invoked_subcommand
    if as_json:
        raise click.UsageError(f"{JSON_FLAG} comes after the command: thresher {command} {JSON_FLAG}", ctx)
    if command not in _WITH_ANY_VARIABLES:
        check_variables()
