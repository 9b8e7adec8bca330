"""``config``, ``completions`` and ``--version``: what the user sees; shells complete for real."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher import __version__
from thresher.cli.main import main

SHELLS = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed"))
    for name in ("bash", "zsh", "fish")
]


@pytest.mark.parametrize("words", [["--version", "--json"], ["--json", "--version"]])
def test_the_version_as_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["version"] == __version__


def test_json_before_a_command_says_where_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "methods"]) == 2
    assert "thresher methods --json" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_config_shows_each_value_and_where_it_comes_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["config", "set", "workers", "3"]) == 0
    monkeypatch.setenv("THRESHER_QUIET", "true")
    capsys.readouterr()
    assert main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith(("workers", "quiet", "engine"))] == [
        ["workers", "3", "the", "file"],
        ["engine", "threads", "default"],
        ["quiet", "true", "THRESHER_QUIET"],
    ]
    assert lines[-1] == f"file: {tmp_path}/thresher/config.toml"
    assert main(["config", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    assert (rows["workers"]["value"], rows["workers"]["source"]) == (3, "file")
    assert rows["cache"]["value"] == f"{os.environ['XDG_CACHE_HOME']}/thresher"
    assert main(["config", "unset", "workers"]) == 0
    assert main(["config", "path"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/thresher/config.toml"
    assert (tmp_path / "thresher" / "config.toml").read_text() == ""
    monkeypatch.setenv("THRESHER_WORKERS", "no")
    assert main(["config", "--json"]) == 2
    assert "THRESHER_WORKERS=no" in json.loads(capsys.readouterr().out)["problems"][0]


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with ``thresher`` in ``bin``, some files, and the scripts of the shells."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "thresher"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m thresher "$@"\n')
    command.chmod(0o755)
    (tmp_path / "pool with spaces").mkdir()
    for shell in ("bash", "zsh", "fish"):
        assert main(["completions", shell]) == 0
        (tmp_path / shell).write_text(capsys.readouterr().out)
    return tmp_path


def completed(shell: str, words: list[str], place: Path) -> list[str]:
    """What a shell offers for the last of some words."""
    quoted = " ".join(f"'{word}'" for word in words)
    programs = {
        # The function that bash calls, with the variables that it sets; files are left to bash (compopt).
        "bash": f'source ./bash; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; compopt() {{ echo "FILES"; }}\n'
        f'$(complete -p thresher | sed "s/.*-F \\([^ ]*\\).*/\\1/") thresher; printf "%s\\n" "${{COMPREPLY[@]}}"',
        # The same for zsh, whose completion system only works in a terminal: what it would be handed is printed.
        "zsh": "compdef() { :; }; source ./zsh; compadd() { print -l -- $completions; }; "
        "_describe() { print -l -- $completions_with_descriptions; }; _path_files() { print FILES; }\n"
        f"words=({quoted}); CURRENT={len(words)}; _thresher_completion",
        "fish": f"source ./fish; complete -C {json.dumps(' '.join(words))}",
    }
    env = {**os.environ, "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(place)}
    norc = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [shell, *norc, "-c", programs[shell]], cwd=place, env=env, capture_output=True, text=True, timeout=120
    )
    return [re.split("[\t:]", line)[0] for line in done.stdout.splitlines() if line] or [done.stderr]


@pytest.mark.parametrize(
    "shell", [SHELLS[0], *(pytest.param(*one.values, marks=[*one.marks, pytest.mark.slow]) for one in SHELLS[1:])]
)
def test_a_shell_completes(shell: str, place: Path) -> None:
    assert completed(shell, ["thresher", "sel"], place) == ["select"]
    assert completed(shell, ["thresher", "select", "semdedup", "x", "--engine", "ser"], place) == ["serial"]
    files = completed(shell, ["thresher", "select", "semdedup", "po" if shell == "fish" else ""], place)
    assert "FILES" in files or any("pool with spaces" in each.replace("\\", "") for each in files)


def offered(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("_THRESHER_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"thresher {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" "))))
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert not err
    return [
        value if kind == "plain" else "" for kind, value in (line.split(",", 1) for line in out.splitlines() if line)
    ]


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool, data and an evaluation set in the current folder, each with columns of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool" / "metadata").mkdir(parents=True)
    (tmp_path / "pool" / "img_emb").mkdir()
    pq.write_table(pa.table({"key": ["a"], "kind": [1], "width": [2]}), "pool/metadata/metadata_00000.parquet")
    pq.write_table(pa.table({"key": ["b"], "klass": ["c"], "x; touch y": [1], "a b": [2], "$(x)": [3]}), "set.parquet")
    with pa.ipc.new_file("data.arrow", pa.schema([("kept", pa.int64())])) as file:
        file.write(pa.record_batch({"kept": [1]}))
    Path("rows.csv").write_text("sep=;\nkey;kilo;title\n1;2;3\n")
    Path("rows.jsonl").write_text('{"key": 1, "kin": 2}\n{"key": 3}\n')
    Path("pool/pool.json").write_text('{"shards": []}')
    (tmp_path / "subset").mkdir()
    Path("subset/selection.json").write_text(json.dumps({"pool": str(tmp_path / "pool")}))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("inspect pool --key ", ["key", "kind", "width"]),
        ("inspect pool --key k", ["key", "kind"]),
        ("inspect --json pool --caption w", ["width"]),
        ("inspect --skip-bad pool --image k", ["key", "kind"]),
        ("select clip-score pool --column wi", ["width"]),
        ("select dedup pool -o x --prefer ki", ["kind"]),
        ("embed rows.csv --caption ti", ["title"]),
        ("embed rows.jsonl --key k", ["key", "kin"]),
        ("doctor data.arrow --key k", ["kept"]),
        ("reshard set.parquet subset --key k", ["key", "klass"]),
        ("train clip pool --eval set.parquet --eval-label k", ["key", "klass"]),
        ("train clip pool --eval set.parquet --key ki", ["kind"]),
        ("evaluate run --data set.parquet --label kl", ["klass"]),
        ("prove pool --eval set.parquet --eval-label kl", ["klass"]),
        ("export subset --as parquet --columns ", ["key", "kind", "width"]),
        ("export subset --as parquet --columns key,wi", ["key,width"]),
        ("export subset --as parquet --columns width,", ["width,key", "width,kind"]),
        ("export subset --as energon --shard-column ki", ["kind"]),
        ("export subset --pool set.parquet --as energon --shard-column k", ["key", "klass"]),
        ("embed data --quality sha256,ph", ["sha256,phash"]),
        ("score clip-score pool --name k", []),  # a new column
        # No name that a shell could take for something else, and nothing from what is not on this machine or broken.
        ("inspect set.parquet --key ", ["key", "klass"]),
        ("inspect s3://bucket/pool --key ", []),
        ("inspect nowhere --key ", []),
        ("inspect broken.parquet --key ", []),
        ("inspect pipe.parquet --key ", []),
        ("inspect --key ", []),
        ("export nowhere --as parquet --columns ", []),
        ("export rows.csv --as parquet --columns ", []),
        ("embed empty --key ", []),
    ],
)
def test_columns_of_the_files_on_the_line_are_completed(
    words: str, found: list[str], tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.parquet").write_bytes(b"PAR1 no footer PAR1")
    Path("empty").mkdir()
    os.mkfifo("pipe.parquet")
    assert sorted(offered(words, monkeypatch, capsys)) == sorted(found)


def test_completing_a_column_reads_one_table_and_opens_no_connection(
    tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, 50):
        (tables / "pool" / "metadata" / f"metadata_{number:05d}.parquet").write_bytes(b"broken")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("opened a connection"))
    assert offered("inspect pool --key ki", monkeypatch, capsys) == ["kind"]
    for location in ("https://127.0.0.1/x.parquet", "hf://datasets/a/b", "s3://bucket/x.parquet"):
        assert offered(f"inspect {location} --key ", monkeypatch, capsys) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_columns(shell: str, place: Path) -> None:
    pq.write_table(pa.table({"key": ["a"], "width": [2]}), place / "few.parquet")
    assert completed(shell, ["thresher", "inspect", "few.parquet", "--key", "wi"], place) == ["width"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("select sem", ["semdedup"]),
        ("select semdedup pool --embed", ["--embedding"]),
        ("select random pool --engine r", ["ray"]),
        ("train clip data --policy sc", ["scan"]),
        ("run datacomp-b", ["datacomp-basic"]),
        ("run mine.t", [""]),  # a file
        ("methods negc", ["negclip"]),
        ("recipes dfn", ["dfn-style"]),
        ("lab scan-c", ["scan-clip", "scan-coreset"]),
        ("export sel --as open", ["open_clip"]),
        ("embed data --encoder con", ["conse"]),
        ("prove data --method hk", ["hkmeans"]),
        ("config set net", ["network_tries"]),
        ("completions f", ["fish"]),
        ("select random pool --within ", [""]),
        ("select random pool --seed ", []),
        ("cache c", ["clear"]),
    ],
)
def test_what_is_completed(
    words: str, found: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("THRESHER_WORKERS", "no")  # a setting that cannot be used stops no completion
    assert offered(words, monkeypatch, capsys) == found
