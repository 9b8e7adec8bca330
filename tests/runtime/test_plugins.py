"""Plug-ins are found in their folder and by entry points; one that cannot be loaded is reported and breaks nothing."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from thresher import UsageError
from thresher.runtime import plugins
from thresher.runtime.engine import ENGINES, make_engine
from thresher.runtime.plugins import Origin, PluginWarning, origin_of

ENGINE = """
from dataclasses import dataclass
from typing import ClassVar

@dataclass(frozen=True)
class Mine:
    name: ClassVar[str] = "{name}"
    workers: int = 1
    pause: float = 0.5

    def map(self, fn, tasks):
        return map(fn, tasks)
"""


def offer(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, value: str = "Mine") -> None:
    """Install a package that offers an engine by an entry point."""
    module = f"package_of_{name}".replace("-", "_")
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[thresher.engines]\n{name} = {module}:{value}\n")
    if str(folder) not in sys.path:
        monkeypatch.syspath_prepend(str(folder))


def test_packages_are_listed_once_and_again_when_one_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[None] = []
    monkeypatch.setattr(plugins, "entry_points", lambda: listed.append(None) or entry_points())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would change the folder too
    monkeypatch.syspath_prepend(str(tmp_path))
    for _ in range(3):
        assert "late" not in ENGINES.all()
        assert "late" not in ENGINES.names()
        assert ENGINES.broken() == []
        assert origin_of(ENGINES.find("serial")).package == "thresher"
    assert len(listed) == 1
    offer(tmp_path, monkeypatch, "late", ENGINE.format(name="late"))  # into a folder that is on the path already
    for _ in range(3):
        assert "late" in ENGINES.names()
        assert origin_of(ENGINES.all()["late"]) == Origin("package-of-late", "1.5")
    assert len(listed) == 2


def test_those_of_the_folder_and_of_other_packages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"processes", "ray", "serial", "threads"}
    assert set(ENGINES.all()) == ENGINES.names() == own
    offer(tmp_path, monkeypatch, "mine", ENGINE.format(name="mine"))
    assert set(ENGINES.all()) == ENGINES.names() == {*own, "mine"}
    assert list(ENGINES.all()) == sorted(ENGINES.all())
    engine = make_engine("mine", 2)
    assert (engine.workers, list(engine.map(abs, [-1]))) == (2, [1])
    assert ENGINES.build("mine:pause=2").pause == 2.0


def test_options_in_text_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, monkeypatch, "picky", ENGINE.format(name="picky"))
    with pytest.raises(UsageError, match="has no parameter 'pauze'.*Did you mean 'pause'"):
        ENGINES.build("picky:pauze=2")
    with pytest.raises(UsageError, match="OPTION=VALUE"):
        ENGINES.build("picky:pause")
    with pytest.raises(UsageError, match="pause"):
        ENGINES.build("picky:pause=soon")


@pytest.mark.parametrize(
    ("source", "value", "why"),
    [
        ("import nothing_that_is_there", "Mine", "ModuleNotFoundError: No module named 'nothing_that_is_there'"),
        ("raise RuntimeError('first line\\nsecond line')", "Mine", "RuntimeError: first line"),
        ("raise SystemExit(3)", "Mine", "SystemExit: 3"),
        ("def Mine(): ...", "Mine", "not a dataclass with a class attribute 'name'"),
        ("", "Gone", "AttributeError: module"),
        (ENGINE.format(name="odd").replace("def map", "def run"), "Mine", "has no map"),
    ],
)
def test_one_that_cannot_be_loaded_is_named_and_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, value: str, why: str
) -> None:
    name = f"broken-{abs(hash((source, value)))}"
    offer(tmp_path, monkeypatch, name, source, value)
    package = f"package-of-{name}"
    with pytest.warns(PluginWarning) as caught:
        assert "threads" in ENGINES.all()
    lines = [str(warning.message) for warning in caught]
    assert len(lines) == 1
    assert lines[0].startswith(f"{package} offers '{name}', which cannot be used: ")
    assert why in lines[0]
    assert "\n" not in lines[0]
    assert [(one.name, one.package) for one in ENGINES.broken()] == [(name, package)]
    with warnings.catch_warnings():  # "threads" is found without looking at other packages
        warnings.simplefilter("error")
        assert ENGINES.find("threads").name == "threads"
        with pytest.raises(UsageError, match=f"'{name}' cannot be loaded: {package}: "):
            ENGINES.find(name)


def test_a_name_that_is_taken_stays_with_its_first_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, monkeypatch, "rival", ENGINE.format(name="threads"))
    with pytest.warns(PluginWarning, match="the name 'threads' is taken by thresher"):
        assert ENGINES.all()["threads"].__module__ == "thresher.runtime.engines.threads"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no engine 'thread'; there are processes, ray, serial, threads.*'threads'"):
        ENGINES.find("thread")
