"""Write the man pages: one for ``thresher`` and one for every command, from the commands themselves.

python website/man.py FOLDER
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from thresher import __version__
from thresher.cli.main import SECTIONS, thresher
from thresher.cli.options import summary_of
from thresher.runtime.config import SETTINGS


def escaped(text: str) -> str:
    """A text that roff shows as it is."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    text = re.sub(r"[^\x20-\x7e]", lambda match: rf"\[u{ord(match[0]):04X}]", text)
    return rf"\&{text}" if text.startswith((".", "'")) else text


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of the help of a command, each on one line; click marks those with fixed lines with a \\b."""
    for part in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in part.splitlines()]
        if lines[0] == "\b":
            yield from lines[1:]
        else:
            yield " ".join(lines)


def commands(command: click.Command, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command from one on, with the words that call it."""
    yield names, command
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            if below is not None:
                yield from commands(below, (*names, name))


def entries(rows: list[tuple[str, str]]) -> Iterator[str]:
    """A list of terms and what they mean."""
    for term, about in rows:
        yield from (".TP", rf"\fB{escaped(term)}\fR", escaped(about) if about else r"\&")


def page(names: tuple[str, ...], command: click.Command, day: str) -> str:
    """The man page of a command."""
    ctx = click.Context(command, info_name=" ".join(names), help_option_names=["-h", "--help"])
    title, summary = "-".join(names), summary_of(command)
    lines = [
        f'.TH "{escaped(title.upper())}" "1" "{day}" "thresher {__version__}" "Thresher"',
        ".SH NAME",
        rf"{escaped(title)} \- {escaped(summary[:1].lower() + summary[1:].rstrip('.'))}",
        ".SH SYNOPSIS",
        rf"\fB{escaped(' '.join(names))}\fR {escaped(' '.join(command.collect_usage_pieces(ctx)))}",
        ".SH DESCRIPTION",
    ]
    for i, paragraph in enumerate(paragraphs(command.help or summary)):
        lines += [".PP"] * (i > 0) + [escaped(paragraph)]
    options = [param for param in command.get_params(ctx) if isinstance(param, click.Option)]
    records = [record for option in options if (record := option.get_help_record(ctx)) is not None]
    lines += [".SH OPTIONS", *entries(records)]
    if command is thresher:
        for section in SECTIONS:
            lines += [f'.SH "{section.title.upper()}"', *entries(list(section.commands.items()))]
        variables = [(item.variable, f"{item.about.capitalize()}: {item.allowed}.") for item in SETTINGS.values()]
        lines += [".SH ENVIRONMENT", *entries(variables)]
        lines += [".SH FILES", *entries([("~/.config/thresher/config.toml", "The settings; see thresher config.")])]
        codes = {"0": "Done.", "1": "Warnings of doctor.", "2": "Wrong usage or unusable input.", "130": "Interrupted."}
        lines += [".SH EXIT STATUS", *entries(list(codes.items()))]
    elif isinstance(command, click.Group):
        below = [(name, command.get_command(ctx, name)) for name in command.list_commands(ctx)]
        lines += [".SH COMMANDS", *entries([(name, summary_of(each)) for name, each in below if each])]
    if len(names) > 1:
        lines += [".SH SEE ALSO", rf"\fB{escaped('-'.join(names[:-1]))}\fR(1)"]
    return "\n".join(lines) + "\n"


def write_pages(folder: Path) -> list[Path]:
    """Write all pages to a folder; the day is that of SOURCE_DATE_EPOCH, so that a build can be repeated."""
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())))
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("thresher*.1"):
        old.unlink()
    written = []
    for names, command in commands(thresher, ("thresher",)):
        path = folder / f"{'-'.join(names)}.1"
        path.write_text(page(names, command, day), encoding="ascii")
        written.append(path)
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(f"{len(write_pages(Path(sys.argv[1])))} pages written to {sys.argv[1]}")
