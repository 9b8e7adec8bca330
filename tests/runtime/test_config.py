"""Settings: option > environment > file > default; bad ones are refused; no setting changes a result."""

from __future__ import annotations

import multiprocessing
import os
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from tests.runtime.common import as_nobody, needs_root, run
from thresher.cli.main import main, thresher
from thresher.cli.options import Configured
from thresher.errors import OutputError, UsageError
from thresher.runtime.cache import Cache
from thresher.runtime.config import SETTINGS, cache_folder, check_variables, config_file, setting, write_setting
from thresher.testing.pools import clustered, write_pool


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file of the test, which does not exist."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "thresher" / "config.toml"


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


VALUES = {"cache": "/a/b", "workers": 3, "engine": "serial", "device": "cpu", "quiet": True, "network_tries": 2}
TEXTS = {"cache": "/c", "workers": "5", "engine": "processes", "device": "cuda:1", "quiet": "0", "network_tries": "9"}
OF_TEXTS = {"cache": "/c", "workers": 5, "engine": "processes", "device": "cuda:1", "quiet": False, "network_tries": 9}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_environment_before_the_file_before_the_default(
    name: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = SETTINGS[name]
    assert (setting(name).value, setting(name).source) == (item.default, "default")
    assert write_setting(name, VALUES[name]) == os.path.realpath(file)
    assert (setting(name).value, setting(name).source, setting(name).where) == (VALUES[name], "file", str(file))
    monkeypatch.setenv(item.variable, TEXTS[name])
    assert (setting(name).value, setting(name).source) == (OF_TEXTS[name], "environment")
    monkeypatch.setenv(item.variable, "")  # set to nothing: not set
    assert setting(name).source == "file"
    write_setting(name, None)
    assert setting(name).source == "default"


@needs_root
def test_a_folder_of_another_user_has_no_settings(file: Path) -> None:
    """As the home folder in a container, or under sudo."""
    put(file, "workers = 3")
    file.parent.chmod(0o700)
    assert setting("workers").value == 3

    def other() -> None:
        assert setting("workers").source == "default"
        with pytest.raises(OutputError, match="Permission denied"):
            write_setting("workers", 2)

    assert run(as_nobody(other)) == 0
    assert file.read_text() == "workers = 3"


@pytest.mark.parametrize("base", ["conf", "."])
def test_relative_base_folders_are_ignored(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else files in the current folder would be read."""
    put(tmp_path / base / "thresher" / "config.toml", 'cache = "/from/others"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", base)
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert Path(config_file()).is_relative_to(tmp_path / "home")
    assert Path(cache_folder()).is_relative_to(tmp_path / "home")


BAD: list[tuple[str, str, Any]] = [
    ("workers", "0", 0), ("workers", "x", "4"), ("workers", "4097", True), ("workers", "1e3", 1.5),
    ("workers", "-1", -1), ("workers", "\u0663", None), ("cache", "relative", "relative"), ("cache", "s3://b/c", "s3://b"),
    ("cache", "/a\nb", 5), ("quiet", "yes", "true"), ("quiet", "2", 1), ("network_tries", "1000", 0),
    ("engine", "\x1b[2J", ""), ("device", "\t", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "value"), BAD)
def test_values_that_are_not_allowed(
    name: str, text: str, value: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = SETTINGS[name]
    monkeypatch.setenv(item.variable, text)
    with pytest.raises(UsageError, match=f"(?s){item.variable}=.*give "):
        setting(name)
    monkeypatch.delenv(item.variable)
    assert main(["config", "set", name, "--", text]) == 2
    assert not file.exists()
    if value is not None:
        put(file, f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}\n")
        with pytest.raises(UsageError, match=f"config.toml: {name} = .*give "):
            setting(name)
        with pytest.raises(UsageError, match="config.toml"):  # one bad line, whatever is read
            setting("engine" if name != "engine" else "workers")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"workrs = 2\n", "no setting 'workrs'.*Did you mean 'workers'.*config unset workrs"),
        (b"[tool.thresher]\nworkers = 2\n", "no setting 'tool'"),
        (b"workers = \n", "not valid TOML"),
        (b"workers = 1\nworkers = 2\n", "not valid TOML"),
        (b"workers = " + b"[" * 5000, "not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"#" * 100_001, "at most 100,000 bytes"),
    ],
)
def test_files_that_cannot_be_used(content: bytes, message: str, file: Path, capsys: pytest.CaptureFixture) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        setting("workers")
    assert main(["config", "set", "workers", "2"]) in (0, 2)
    capsys.readouterr()
    if b"workrs" in content:  # the file can be corrected with the command that the message names
        assert main(["config", "unset", "workrs"]) == 0
        assert setting("workers").value == 2
    else:
        assert file.read_bytes().startswith(content[:100]), "a file that cannot be read is not replaced"


def test_a_file_that_is_none(file: Path) -> None:
    file.parent.mkdir(parents=True)
    os.mkfifo(file)  # opening it would wait forever
    with pytest.raises(UsageError, match="not a configuration file"):
        setting("workers")
    file.unlink()
    file.symlink_to(file.parent / "missing")
    assert setting("workers").source == "default"
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("")  # a file where the folder should be
    assert setting("workers").source == "default"
    with pytest.raises(OutputError):
        write_setting("workers", 2)


def test_comments_and_order_stay(file: Path) -> None:
    text = '# mine\r\ncache = "/x" # big disk\r\n\r\n  "workers"=4\nquiet = true'
    put(file, "")
    file.write_bytes(text.encode())
    write_setting("workers", 8)
    write_setting("device", "cpu")
    assert file.read_bytes() == text.replace('  "workers"=4', "workers = 8").encode() + b'\ndevice = "cpu"\n'
    write_setting("cache", None)
    assert b"# mine\r\n\r\nworkers = 8" in file.read_bytes()


@pytest.mark.parametrize("text", ['cache = """\n/a\nworkers = 3"""\n', 'engine = """\nworkers = 2\n"""\n'])
def test_what_cannot_be_edited_safely_is_left(text: str, file: Path) -> None:
    put(file, text)
    name = text.partition(" ")[0]
    with pytest.raises(UsageError, match="change it in a text editor|not valid TOML"):
        write_setting(name, None)
    assert file.read_text() == text


def test_the_file_behind_a_link_is_written(file: Path, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.toml"
    real.write_text("workers = 1\n")
    file.parent.mkdir(parents=True)
    file.symlink_to(real)
    write_setting("workers", 2)
    assert file.is_symlink()
    assert tomllib.loads(real.read_text()) == {"workers": 2}


def _write_one(name: str, value: Any) -> None:
    write_setting(name, value)


def test_two_writers_lose_nothing(file: Path) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_one, args=item) for item in VALUES.items()]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert tomllib.loads(file.read_text()) == VALUES
    assert [path.name for path in file.parent.iterdir()] == ["config.toml"]


def test_a_file_in_the_current_folder_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("thresher.toml").write_text('cache = "/evil"\n')
    Path("pyproject.toml").write_text('[tool.thresher]\ncache = "/evil"\n')
    Path("config.toml").write_text('cache = "/evil"\n')
    assert setting("cache").source == "default"


def test_the_cache_of_the_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THRESHER_CACHE", "~/mine")
    assert cache_folder() == os.path.expanduser("~/mine")
    write_setting("cache", str(tmp_path / "other"))
    monkeypatch.delenv("THRESHER_CACHE")
    assert Cache.at().folder == tmp_path / "other"
    assert Cache.at(tmp_path / "given").folder == tmp_path / "given"


@pytest.mark.parametrize("name", ["THRESHER_WORKER", "THRESHER_CACHE_DIR", "THRESHER_THREADS", "THRESHER_"])
def test_unknown_variables_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(name, "2")
    assert main(["methods"]) == 2
    assert f"the variable {name} is not a setting" in capsys.readouterr().err
    assert main(["config"]) == 2  # shown, with everything else
    shown = capsys.readouterr().out
    assert f"! the variable {name} is not a setting" in shown
    assert "network_tries" in shown


@pytest.mark.parametrize(
    "name", ["THRESHER_SERVICE_HOST", "THRESHER_PORT", "THRESHER_PORT_80_TCP_ADDR", "THRESHER_API_SERVICE_PORT_HTTP"]
)
def test_variables_of_a_cluster_are_not_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "tcp://10.0.0.1:80")
    check_variables()


def options_of(command: click.Command, name: str) -> Iterator[tuple[str, Configured]]:
    """Every option that has a setting, below a command, with the words of its command."""
    ctx = click.Context(command)
    if isinstance(command, click.Group):
        for word in command.list_commands(ctx):
            below = command.get_command(ctx, word)
            assert below is not None
            yield from options_of(below, f"{name} {word}")
    yield from ((name, param) for param in command.params if isinstance(param, Configured))


def test_the_table_and_the_options_agree() -> None:
    found = dict.fromkeys(f"{option.opts[0]} {option.setting}" for _, option in options_of(thresher, ""))
    assert sorted(found) == ["--device device", "--engine engine", "--quiet quiet", "--workers workers"]
    for name, option in options_of(thresher, ""):
        default = SETTINGS[option.setting].default
        assert option.to_info_dict()["default"] == default, name


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What ``select random`` with some options hands to the engine."""
    write_pool(tmp_path / "pool", clustered(40))
    seen: dict[str, Any] = {}

    def select(store: Any, steps: Any, **how: Any) -> Any:
        seen.update(how)
        raise UsageError("seen")

    monkeypatch.setattr("thresher.api.select", select)

    def run(*words: str) -> dict[str, Any]:
        seen.clear()
        main(["select", "random", str(tmp_path / "pool"), "--keep", "50%", "-o", str(tmp_path / "out"), *words])
        return {"seen": dict(seen), "engine": getattr(seen.get("engine"), "name", ""), **seen}

    return run


def test_an_option_before_the_environment(
    given: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"engine": "threads", "workers": 3, "quiet": True, "cache": str(tmp_path / "c")}.items():
        write_setting(name, value)
    run = given()
    assert (run["seen"]["engine"].workers, run["seen"]["cache"].folder) == (3, tmp_path / "c")
    quiet = type(run["progress"].inner)
    monkeypatch.setenv("THRESHER_WORKERS", "5")
    assert given()["seen"]["engine"].workers == 5
    run = given("--workers", "7", "--cache", str(tmp_path / "d"), "--engine", "processes", "--no-quiet")
    assert (run["seen"]["engine"].workers, run["seen"]["cache"].folder) == (7, tmp_path / "d")
    assert type(run["seen"]["engine"]).__name__ == "Processes"
    assert type(run["progress"].inner) is not quiet


def test_a_setting_that_a_command_cannot_use_is_named(
    given: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, file: Path
) -> None:
    monkeypatch.setenv("THRESHER_ENGINE", "thread")
    assert not given()["seen"]
    assert "THRESHER_ENGINE: no engine 'thread'" in capsys.readouterr().err
    assert given("--engine", "serial")["seen"]
    monkeypatch.delenv("THRESHER_ENGINE")
    put(file, 'engine = "thread"\n')
    capsys.readouterr()
    assert not given()["seen"]
    assert "config.toml: engine: no engine 'thread'" in " ".join(capsys.readouterr().err.split())
    assert main(["config", "set", "engine", "thread"]) == 2
    assert main(["config", "set", "engine", "threads:workers=2"]) == 0


def test_settings_do_not_change_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pool(tmp_path / "pool", clustered(3000), clustered(3000, seed=1))
    results = []
    for i, settings in enumerate(
        (
            {},
            {"engine": "processes", "workers": 2, "quiet": True},
            {"engine": "serial", "network_tries": 1, "workers": 3},
        )
    ):
        for name, value in {"device": "cpu", "cache": str(tmp_path / f"cache{i}"), **settings}.items():
            write_setting(name, value)
        out = tmp_path / "out"
        command = ["density", str(tmp_path / "pool"), "--keep", "40%", "--clusters", "7", "-o", str(out)]
        assert main(["select", *command]) == 0
        assert (tmp_path / f"cache{i}").is_dir()
        results.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
        out.rename(tmp_path / f"out{i}")
    assert len(results[0]) > 3
    assert results[0] == results[1] == results[2]
