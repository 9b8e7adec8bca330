"""Settings for what would be typed every time: where results of computations are cached, and how fast work runs.

A setting comes from an option of the command line, else from its environment variable, else from the user's
configuration file, else it has its default. No setting changes a selection. Files in the current folder are never read
as configuration: they may come with the data of others, and must not decide where files are written.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from thresher.errors import UsageError, suggest

MOST_WORKERS = 4_096  # tasks at a time; each takes memory
_HINT = "set the variable XDG_CONFIG_HOME to a folder that can be written"
_LARGEST = 100_000  # bytes of a configuration file
# What Kubernetes and Docker set in a container when there is a service of this name.
_OF_CONTAINERS = re.compile(r"THRESHER_(\w+_)?(SERVICE_(HOST|PORT)|PORT|NAME|ENV)(_\w+)?")


@dataclass(frozen=True)
class Setting:
    """A setting.

    Attributes:
        name: Its name in the file and for ``thresher config``.
        about: What it sets.
        allowed: What a value is, after "give" in messages.
        kind: Type of the value.
        fits: Whether a value of this type is allowed.
        default: The value if nothing sets it; None if it depends on the machine.
    """

    name: str
    about: str
    allowed: str
    kind: type
    fits: Callable[[Any], bool]
    default: Any = None

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return f"THRESHER_{self.name.upper()}"

    def parse(self, text: str, given: str) -> Any:
        """Return the value that a text stands for.

        Raises:
            UsageError: It is not allowed; the message begins with ``given``.
        """
        value: Any = text
        if self.kind is int:
            value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None
        elif self.kind is bool:
            value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
        return self.check(value, given)

    def check(self, value: Any, given: str) -> Any:
        """Return a value if it is allowed.

        Raises:
            UsageError: It is not; the message begins with ``given``.
        """
        if type(value) is not self.kind or not self.fits(value):
            raise UsageError(f"{given}: give {self.allowed}")
        return value


@dataclass(frozen=True)
class Found:
    """The value of a setting, and where it comes from.

    Attributes:
        setting: The setting.
        value: Its value; None for a default that depends on the machine.
        source: "environment", "file" or "default".
        where: The variable or the file, "" for a default.
    """

    setting: Setting
    value: Any
    source: str
    where: str


def _is_text(value: str) -> bool:
    return value != "" and value.isprintable()


def _is_folder(value: str) -> bool:
    return _is_text(value) and "://" not in value and os.path.isabs(os.path.expanduser(value))


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("cache", "cache folder", "the full path of a folder, or one that begins with ~", str, _is_folder),
        Setting(
            "workers", "parallel tasks of selecting, embedding and resharding", f"a number from 1 to {MOST_WORKERS}",
            int, lambda n: 1 <= n <= MOST_WORKERS,
        ),
        Setting(
            "engine", "where work on pools runs", "serial, threads, processes, ray or another engine, with its options",
            str, _is_text, "threads",
        ),
        Setting("device", "where models run", "auto, cpu, cuda or cuda:1", str, _is_text, "auto"),
        Setting("quiet", "no progress", "true or false", bool, lambda _: True, False),
        Setting(
            "network_tries", "how often a failed request is tried", "a number of tries from 1 to 999",
            int, lambda n: 1 <= n <= 999, 6,
        ),
    )
}  # fmt: skip


def config_file() -> str:
    """Return ``$XDG_CONFIG_HOME/thresher/config.toml``; by default, in the system's folder for configuration.

    The variable must be a full path, else it is ignored, as its specification says.
    """
    if os.path.isabs(base := os.environ.get("XDG_CONFIG_HOME", "")):
        return os.path.join(base, "thresher", "config.toml")
    import platformdirs

    return os.path.join(platformdirs.user_config_dir("thresher", appauthor=False), "config.toml")


def cache_folder() -> str:
    """Return the folder of the setting ``cache``, else ``$XDG_CACHE_HOME/thresher``, else the system's.

    On Linux the system's is ``~/.cache/thresher``.

    Raises:
        UsageError: The setting cannot be used.
    """
    return str(setting("cache").value or _system_cache())


def _system_cache() -> str:
    if os.path.isabs(base := os.environ.get("XDG_CACHE_HOME", "")):
        return os.path.join(base, "thresher")
    import platformdirs

    return str(platformdirs.user_cache_dir("thresher", appauthor=False))


def setting(name: str) -> Found:
    """Return the value of a setting and where it comes from: the environment, the file, or the default.

    A variable that is set to nothing counts as not set.

    Raises:
        UsageError: The value is not allowed, or the file cannot be used.
    """
    item = SETTINGS[name]
    if text := os.environ.get(item.variable, ""):
        return Found(item, _complete(item, item.parse(text, f"{item.variable}={text}")), "environment", item.variable)
    values = file_values()
    if name in values:
        return Found(item, _complete(item, values[name]), "file", config_file())
    return Found(item, item.default, "default", "")


def _complete(item: Setting, value: Any) -> Any:
    return os.path.expanduser(value) if item.name == "cache" else value


def file_values() -> Mapping[str, Any]:
    """Return the settings in the configuration file; none if there is no file.

    Raises:
        UsageError: The file cannot be read, or has unknown names or values that are not allowed.
    """
    path = config_file()
    values = _parsed(path)
    for name, value in values.items():
        if name not in SETTINGS:
            raise UsageError(f"{path}: {_unknown(name)} To remove it, type: thresher config unset {name}")
        SETTINGS[name].check(value, f"{path}: {name} = {value!r}")
    return values


def find_setting(name: str) -> Setting:
    """Return the setting with a name.

    Raises:
        UsageError: There is none; the message suggests a similar name.
    """
    if name not in SETTINGS:
        raise UsageError(_unknown(name))
    return SETTINGS[name]


def _unknown(name: str) -> str:
    return f"no setting {name!r}; there are {', '.join(SETTINGS)}.{suggest(name.lower().replace('-', '_'), SETTINGS)}"


def check_variables() -> None:
    """Check the names of environment variables that begin with THRESHER_.

    Raises:
        UsageError: One is not a setting; the message suggests a similar name.
    """
    known = [item.variable for item in SETTINGS.values()]
    for name in sorted(os.environ):
        if name.startswith("THRESHER_") and name not in known and not _OF_CONTAINERS.fullmatch(name):
            names = ", ".join(known)
            raise UsageError(f"the variable {name} is not a setting; there are {names}.{suggest(name, known)}")


def in_force() -> dict[str, Any]:
    """Return all settings, and what is wrong with them.

    Returns:
        ``file``, the path of the configuration file, ``settings``, a list of name, value, source, where, variable and
        about, and ``problems``, a list of messages. Of a setting that depends on the machine the value is what it is
        here; of one with a problem, None.
    """
    from thresher.runtime.engine import cores

    problems: list[str] = []

    def tried(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except UsageError as error:
            if str(error) not in problems:
                problems.append(str(error))

    tried(check_variables)
    rows = []
    for item in SETTINGS.values():
        found = tried(partial(setting, item.name)) or Found(item, None, "problem", "")
        here = {"cache": _system_cache, "workers": cores}.get(item.name) if found.source == "default" else None
        of_item = {
            "name": item.name,
            "value": here() if here else found.value,
            "source": found.source,
            "where": found.where,
        }
        rows.append({**of_item, "variable": item.variable, "about": item.about})
    return {"file": config_file(), "settings": rows, "problems": problems}


def write_setting(name: str, value: Any) -> str:
    """Write a setting to the configuration file, or remove it with None; return the path of the file.

    Comments and other lines stay as they are.

    Raises:
        UsageError: There is no such setting, the value is not allowed, or the file cannot be edited.
        OutputError: The file cannot be written.
    """
    from thresher.runtime.files import writing
    from thresher.runtime.locks import holding

    path = os.path.realpath(config_file())  # the file behind a link is replaced, not the link
    with holding(f"{path}.lock", f"the configuration {path}"):
        text, values = _text(path), dict(_parsed(path))
        if value is None:
            if name not in values:
                find_setting(name)
            values.pop(name, None)
        else:
            values[name] = find_setting(name).check(value, f"{name} {value!r}")
        line = "" if value is None else f"{name} = {json.dumps(value)}\n"
        edited = _edited(text, name, line)
        if _loads(edited, path) != values:
            raise UsageError(f"{path}: the line of {name!r} cannot be edited; change it in a text editor")
        if edited != text:
            with writing(path, _HINT) as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
                file.write(edited)
    return path


def _edited(text: str, name: str, line: str) -> str:
    """Return a text with ``line`` instead of the line that sets a name; at the end if there is none."""
    lines = text.splitlines(keepends=True)
    own = [i for i, each in enumerate(lines) if re.match(rf"\s*[\"']?{re.escape(name)}[\"']?\s*=", each)]
    if own:
        lines[own[0]] = line
        return "".join(lines)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    return "".join([*lines, line])


def _text(path: str) -> str:
    """Return the text of the file, "" if there is none."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # the last: a folder of another user
        return ""
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    return _content(path, status.st_mode, status.st_size, (status.st_ino, status.st_mtime_ns))


def _parsed(path: str) -> dict[str, Any]:
    return _loads(_text(path), path)


@lru_cache(2)
def _content(path: str, mode: int, size: int, version: tuple[int, int]) -> str:
    if not stat.S_ISREG(mode) or size > _LARGEST:
        raise UsageError(f"{path}: is not a configuration file of at most {_LARGEST:,} bytes; move it away")
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8; correct it, or remove it") from None


def _loads(text: str, path: str) -> dict[str, Any]:
    if not text:
        return {}
    import tomllib

    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: is not valid TOML ({error}); correct it, or remove it") from None
