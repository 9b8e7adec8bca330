"""The help of every command: complete sentences, and options that say what they take."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from thresher.cli.main import SECTIONS, main, thresher
from thresher.cli.options import summary_of


def tree(command: click.Command, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below one, with the words that call it."""
    yield names, command
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            assert below is not None
            yield from tree(below, (*names, name))


TREE = dict(tree(thresher))
IDS = [" ".join(names) or "thresher" for names in TREE]


@pytest.mark.parametrize("names", TREE, ids=IDS)
def test_the_summary_is_a_whole_sentence(names: tuple[str, ...]) -> None:
    assert re.fullmatch(r"[A-Z].*[a-z0-9)]\.", summary_of(TREE[names]))


@pytest.mark.parametrize("names", TREE, ids=IDS)
def test_every_option_says_what_it_is_and_takes(names: tuple[str, ...]) -> None:
    command = TREE[names]
    for option in command.get_params(click.Context(command)):
        if not isinstance(option, click.Option):
            continue
        name = f"{' '.join(names)} {option.opts[-1]}"
        assert re.search(r"\w", option.help or ""), f"{name} has no help"
        assert option.help == (option.help or "").strip()
        assert (option.help or "").endswith("."), f"{name}: {option.help}"
        assert "(default: )" not in (option.help or ""), f"{name}: {option.help}"
        if not option.is_flag:
            assert option.metavar or isinstance(option.type, click.Choice), f"{name} has no metavar"


@pytest.mark.parametrize("names", TREE, ids=IDS)
def test_nothing_in_the_help_is_cut_off(names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*names, "--help"]) == 0
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith("Usage: thresher")
    assert "..." not in rest
    assert "TEXT RANGE" not in rest
    assert "INTEGER" not in rest


def test_commands_are_listed_under_headings_by_the_first_sentence_of_their_help() -> None:
    listed = {name: summary for section in SECTIONS for name, summary in section.commands.items()}
    assert len(listed) == sum(len(section.commands) for section in SECTIONS)
    for name, summary in listed.items():
        assert summary_of(TREE[name,]) == summary
    with click.Context(thresher, info_name="thresher", terminal_width=200) as ctx:
        text = thresher.get_help(ctx)
    for section in SECTIONS:
        listing = text.partition(f"\n{section.title}:\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in listing.splitlines()] == list(section.commands)
        for name, summary in section.commands.items():
            assert re.search(rf"^  {name} +{re.escape(summary)}$", listing, re.MULTILINE)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["wash"], []])
def test_the_list_of_commands_loads_none_of_them(words: list[str]) -> None:
    code = "import sys; from thresher.cli.main import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "thresher.cli.main" in loaded
    commands = {f"thresher.cli.{section.module}" for section in SECTIONS}
    heavy = {"numpy", "rich", "fsspec", "duckdb", "pyarrow", "torch", "threadpoolctl", "multiprocessing"}
    assert not loaded & (commands | heavy)
    assert {name for name in loaded if name.startswith("thresher.")} == {
        "thresher.cli", "thresher.cli.completion", "thresher.cli.main", "thresher.cli.options", "thresher.cli.output",
        "thresher.errors", "thresher.io", "thresher.io.paths", "thresher.api", "thresher.resharding",
        "thresher.runtime", "thresher.runtime.config",
    }  # fmt: skip


HEAVY = {"numpy", "rich", "fsspec", "duckdb", "pyarrow", "torch", "ssl", "thresher.data", "thresher.runtime.engines"}


@pytest.mark.parametrize(
    ("words", "found", "not_loaded"),
    [
        ("thresher sel", "select", HEAVY | {f"thresher.cli.{section.module}" for section in SECTIONS}),
        ("thresher inspect --quic", "--quick", HEAVY),
        ("thresher report x --ti", "--title", HEAVY),
        ("thresher select semdedup --ep", "--eps", {"thresher.data", "thresher.pruning.methods.density", "pyarrow"}),
        ("thresher sweep semdedup --ep", "--eps", {"thresher.report", "thresher.pruning.methods.density", "pyarrow"}),
        ("thresher score negclip --na", "--name", {"thresher.export", "thresher.pruning.methods.density", "pyarrow"}),
    ],
)
def test_a_completion_loads_only_what_it_needs(words: str, found: str, not_loaded: set[str]) -> None:
    """A shell waits for it at every Tab."""
    code = "import sys; from thresher.cli.main import main; main([]); print(*sys.modules, file=sys.stderr)"
    variables = {"_THRESHER_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **variables}
    )
    assert found in done.stdout
    assert not not_loaded & set(done.stderr.split())


def test_an_option_of_several_formats_is_described_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert " ".join(capsys.readouterr().out.split()).count("csv, jsonl: Columns, separated by commas (default:") == 1
