"""``doctor --self``: what an installation can use, without the network, torch or anything private."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import thresher
from thresher.check import machine
from thresher.cli.main import main


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``doctor --self --json`` and return code and result."""

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        code = main(["doctor", "--self", "--json", *words])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_what_it_shows(look: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(socket, "socket", None)  # no network
    code, found = look()
    assert code == 0
    assert found["versions"]["thresher"] == thresher.__version__
    assert found["versions"]["numpy"] == sys.modules["numpy"].__version__
    assert found["blas"][0]["threads"] >= 1
    assert found["cores"]["usable"] >= 1
    assert found["memory"]["free"] > 0
    assert found["cache"] == {
        "folder": str(tmp_path / "cache"), "exists": False, "writable": True, "bytes": 0,
        "limit_bytes": 20 * 10**9, "free_bytes": found["cache"]["free_bytes"],
    }  # fmt: skip
    assert not (tmp_path / "cache").exists(), "looking creates nothing"
    assert found["temporary"]["writable"]
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert {row["name"]: row["source"] for row in found["config"]["settings"]}["cache"] == "environment"
    assert found["problems"] == []


def test_text_has_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--self"]) == 0
    out = capsys.readouterr().out
    for word in (
        "thresher ",
        "numpy ",
        "BLAS",
        "GPUs",
        "cores",
        "memory",
        "cache",
        "temporary",
        "open files",
        "output",
    ):
        assert re.search(rf"^{word}", out, re.MULTILINE), word


def test_torch_is_not_imported_and_nothing_is_printed_of_the_user(tmp_path: Path) -> None:
    user = getpass.getuser()
    home = tmp_path / "home" / user
    home.mkdir(parents=True)
    secret = "sk-3f9d"
    env = {
        **os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "TMPDIR": str(tmp_path / user),
        "XDG_CACHE_HOME": str(home / ".cache"), "AWS_SECRET_ACCESS_KEY": secret, "HF_TOKEN": secret,
        "THRESHER_ENGINE": f"ray:address=ray://me:{secret}@host:1",
    }  # fmt: skip
    (tmp_path / user).mkdir()
    code = (
        "import sys; from thresher.cli.main import main; main(['doctor', '--self', *sys.argv[1:]])\n"
        "print([name for name in ('torch', 'pyarrow', 'duckdb', 'matplotlib') if name in sys.modules], file=sys.stderr)"
    )
    for words in ([], ["--json"]):
        done = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "[]"
        assert secret not in done.stdout
        assert str(home) not in done.stdout
        assert "~/.cache/thresher" in done.stdout
        assert f"/{user}" not in done.stdout.replace(str(tmp_path.parent.parent), "").replace("pytest-of-" + user, "")


def test_problems_have_a_command_and_an_exit_code(
    look: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "file" / "cache"))
    code, found = look()
    assert code == 1
    assert not found["cache"]["writable"]
    assert "thresher config set cache" in found["problems"][0]
    monkeypatch.setenv("THRESHER_CACHE", "nowhere")
    monkeypatch.setenv("THRESHER_CACH", "x")
    code, found = look()
    assert code == 1
    assert found["cache"] is None
    assert len(found["problems"]) == 2
    assert main(["doctor", "--self"]) == 1
    assert "! THRESHER_CACHE=nowhere" in capsys.readouterr().out


def test_other_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["doctor", "--self", "data"], "DATA: cannot be used with --self"),
        (["doctor", "--self", "--sample", "3"], "--sample: cannot be used with --self"),
        (["doctor", "data", "--torch"], "is for doctor --self"),
        (["doctor"], "Missing argument DATA"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_extras_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "numpy>=2.0",
        'torch>=2.2; extra == "torch"',
        "open-clip-torch[training]>=3.3 ; extra == 'train'",
        'submodlib-py>=0.0.3; python_version < "3.13" and extra == "train"',
    ]
    monkeypatch.setattr(machine.metadata, "requires", lambda name: lines)
    versions = {"numpy": "2.4.6", "torch": "2.13.0+cpu", "open-clip-torch": "2.9.1"}
    monkeypatch.setattr(machine, "_version", versions.get)
    assert machine._extras() == {
        "torch": {"packages": {"torch": "2.13.0+cpu"}, "missing": [], "install": None},
        "train": {
            "packages": {"open-clip-torch": "2.9.1", "submodlib-py": None},
            "missing": ["open-clip-torch>=3.3", "submodlib-py>=0.0.3"],
            "install": "pip install '.[train]'",
        },
    }
    assert machine._versions()["numpy"] == "2.4.6"


@pytest.mark.parametrize(
    ("version", "requires", "devices", "advice"),
    [
        (None, [], [], "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"),
        ("2.13.0", ["nvidia-cublas==1"], [], "pip install --force-reinstall torch torchvision --index-url"),
        ("2.13.0+cpu", ["nvidia-cublas==1"], [], None),
        ("2.13.0", ["numpy"], [], None),
        ("2.13.0", ["nvidia-cublas==1"], ["NVIDIA H200"], None),
        (None, [], ["NVIDIA H200"], None),
    ],
)
def test_a_machine_without_gpu_is_shown_the_cpu_build(
    version: str | None, requires: list[str], devices: list[str], advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine, "_version", lambda name: version)
    monkeypatch.setattr(machine.metadata, "requires", lambda name: requires)
    found = machine._torch(devices, imported=False)["advice"]
    assert found is None if advice is None else advice in found


def test_limits_of_a_container(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    for folder, cpu, memory in (
        ("", "max 100000", "max"),
        ("a", "150000 100000", "2000"),
        ("a/b", "max 100000", "max"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(f"{cpu}\n")
        (tmp_path / folder / "memory.max").write_text(f"{memory}\n")
    assert machine._cpu_quota(tmp_path, own) == 1.5  # of the group that contains ours
    assert machine._memory(tmp_path, own)["container"] == 2000
    old = tmp_path / "v1"
    for path, text in {
        "cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": "9223372036854771712",
    }.items():  # fmt: skip
        (old / path).parent.mkdir(parents=True, exist_ok=True)
        (old / path).write_text(text)
    assert machine._cpu_quota(old, tmp_path / "missing") == 0.5
    assert machine._memory(old, tmp_path / "missing")["container"] is None
    assert machine._cpu_quota(tmp_path / "missing", own) is None


def test_what_is_private() -> None:
    hidden = machine._without_names
    assert hidden("/home/ann/x: cannot", "/home/ann", "ann") == "~/x: cannot"
    assert hidden("/home/ann", "/home/ann", "ann") == "~"
    assert hidden("/home/anna/x", "/home/ann", "ann") == "/home/anna/x"
    assert hidden("/scratch/ann/cache (read-only)", "/home/ann", "ann") == "/scratch/$USER/cache (read-only)"
    for password in ("pw", "p@w", "p/w", "p@/w?x=1"):
        assert hidden(f"ray://ann:{password}@host:1 of x", "/home/ann", "ann") == "ray://***@host:1 of x"
    assert hidden("address=https://host/x?token=abc", "/home/ann", "ann") == "address=https://host/x?***"
    assert hidden("/x/root/y", "/", "") == "/x/root/y"
