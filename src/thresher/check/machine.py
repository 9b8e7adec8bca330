"""What this installation can use: versions, extras, matrix kernels, devices, memory, folders, settings.

Nothing is asked of the network. torch is imported only on request. The home folder is shown as ``~`` and the name of
the user as ``$USER``, and passwords in addresses are left out, so that the result can be shown to others.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from thresher import __version__
from thresher.errors import INSTALL_EXTRA, ThresherError
from thresher.runtime import config, memory
from thresher.runtime.cache import Cache
from thresher.runtime.engine import cores

CPU_TORCH = "pip install {more}torch torchvision --index-url https://download.pytorch.org/whl/cpu"
_VARIABLES = (
    "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
    "PYTHONHASHSEED",
)  # fmt: skip
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([^;]*)(?:;(.*))?")
_CGROUP = Path("/sys/fs/cgroup")
_UNKNOWN = 1 << 60  # bytes; some systems write a number near 2**63 for no limit
_FEW_FILES = 1_024


def look_at_machine(*, with_torch: bool = False) -> dict[str, Any]:
    """Return what this installation can use, as JSON values.

    Args:
        with_torch: Import torch, which takes seconds, to list the devices that it can use.

    Returns:
        ``versions``, ``extras``, ``torch``, ``blas``, ``devices``, ``cores``, ``memory``, ``cache``, ``temporary``,
        ``open_files``, ``terminal``, ``variables``, ``config``, and ``problems``: what to correct, a list of messages.
    """
    problems: list[str] = []
    devices = _devices()
    settings = config.in_force()
    problems += settings["problems"]
    result = {
        "versions": _versions(),
        "extras": _extras(),
        "torch": _torch(devices, with_torch),
        "blas": _blas(),
        "devices": devices,
        "cores": {"machine": os.cpu_count(), "usable": cores(), "container": _cpu_quota()},
        "memory": _memory(),
        "cache": _tried(_cache, problems),
        "temporary": _folder(tempfile.gettempdir()),
        "open_files": _open_files(),
        "terminal": _terminal(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "config": {"file": settings["file"], "settings": settings["settings"]},
    }
    problems += _found_wrong(result)
    result["problems"] = problems
    private: dict[str, Any] = _private(result)
    return private


def _tried(what: Callable[[], dict[str, Any]], problems: list[str]) -> dict[str, Any] | None:
    try:
        return what()
    except (ThresherError, OSError) as error:
        if str(error) not in problems:
            problems.append(str(error))
        return None


# --- packages -------------------------------------------------------------------------------------


def _versions() -> dict[str, str | None]:
    """Return the versions of Python, the system, and the packages that thresher always needs."""
    own = {"thresher": __version__, "python": platform.python_version(), "system": platform.platform()}
    needed = [name for name, _, extra in _requirements() if not extra] or ["numpy", "pyarrow"]
    return {**own, **{name: _version(name) for name in needed}}


def _extras() -> dict[str, dict[str, Any]]:
    """Return the packages of each extra, what is missing or too old, and what to type for it."""
    extras: dict[str, dict[str, Any]] = {}
    for name, least, extra in _requirements():
        if extra:
            entry = extras.setdefault(extra, {"packages": {}, "missing": []})
            version = entry["packages"][name] = _version(name)
            if version is None or _numbers(version) < _numbers(least):
                entry["missing"].append(f"{name}>={least}" if least else name)
    for extra, entry in extras.items():
        entry["install"] = INSTALL_EXTRA.format(extra=extra) if entry["missing"] else None
    return dict(sorted(extras.items()))


def _requirements() -> Iterator[tuple[str, str, str]]:
    """Yield name, least version and extra ("" for none) of what thresher needs; nothing if it is not installed."""
    try:
        lines: Iterable[str] = metadata.requires("thresher") or ()
    except metadata.PackageNotFoundError:
        lines = ()
    for line in lines:
        if match := _REQUIREMENT.match(line):
            least = re.search(r">=\s*([^,\s]+)", match[2])
            extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", match[3] or "")
            yield match[1], least[1] if least else "", extra[1] if extra else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers at the start of a version: "2.13.0+cu130" is (2, 13, 0)."""
    found = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _torch(devices: list[str], imported: bool) -> dict[str, Any]:
    """Return the version of torch, the devices it can use, and advice on its build."""
    version = _version("torch")
    result: dict[str, Any] = {"version": version, "devices": None, "advice": None}
    has_cuda = version is not None and "+cpu" not in version and _needs_cuda()
    if sys.platform == "linux" and not devices and (version is None or has_cuda):
        command = CPU_TORCH.format(more="--force-reinstall " if version else "")
        installed = f"torch {version} is a build for CUDA" if version else "pip would install torch for CUDA"
        result["advice"] = f"no NVIDIA GPU: {installed}, of several GB; for the CPU build, type: {command}"
    if imported and version is not None:
        try:
            import torch

            names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            has_mps = torch.backends.mps.is_available()
            result["devices"] = ["cpu", *names, *(["mps"] if has_mps else [])]
        except Exception as error:  # a build that does not load raises anything
            result["advice"] = f"torch {version} cannot be imported: {' '.join(str(error).split())[:200]}"
    return result


def _needs_cuda() -> bool:
    try:
        return any(line.startswith("nvidia-") for line in metadata.requires("torch") or ())
    except metadata.PackageNotFoundError:
        return False


# --- the machine ----------------------------------------------------------------------------------


def _blas() -> list[dict[str, Any]]:
    """Return library, kernels, version and threads of every BLAS that NumPy loads."""
    import numpy  # noqa: F401 - loads its BLAS
    import threadpoolctl

    names = {"internal_api": "library", "architecture": "kernels", "version": "version", "num_threads": "threads"}
    return [
        {new: library.get(old) for old, new in names.items()}
        for library in threadpoolctl.threadpool_info()
        if library.get("user_api") == "blas"
    ]


def _devices() -> list[str]:
    """Return the names of the NVIDIA GPUs that the driver lists, without loading it; on macOS the processor."""
    if sys.platform == "darwin":
        return ["Apple GPU (mps)"] if platform.machine() == "arm64" else []
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        model = re.search(r"^Model:\s*(.+)$", text, re.MULTILINE)
        names.append(model[1].strip() if model else "NVIDIA GPU")
    return names or ["NVIDIA GPU" for _ in Path("/dev").glob("nvidia[0-9]*")]


def _cpu_quota(root: Path = _CGROUP, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the cores that the container may use at a time, None without a limit."""
    found = []
    for folder in _groups(root, own):
        parts = _words(folder / "cpu.max")
        if len(parts) == 2 and parts[0].isdecimal() and int(parts[1]):
            found.append(int(parts[0]) / int(parts[1]))
    quota, period = _words(root / "cpu/cpu.cfs_quota_us"), _words(root / "cpu/cpu.cfs_period_us")
    if quota and period and quota[0].isdecimal() and period[0].isdecimal() and int(period[0]):
        found.append(int(quota[0]) / int(period[0]))
    return round(min(found), 2) if found else None


def _memory(root: Path = _CGROUP, own: Path = Path("/proc/self/cgroup")) -> dict[str, int | None]:
    """Return bytes of memory: of the machine, the limits of the container and of this process, and what is free."""
    limits = [_words(folder / "memory.max") for folder in _groups(root, own)]
    limits.append(_words(root / "memory/memory.limit_in_bytes"))
    found = [int(words[0]) for words in limits if words and words[0].isdecimal() and int(words[0]) < _UNKNOWN]
    free = memory.available()
    return {
        "machine": _total(),
        "container": min(found) if found else None,
        "process": _limit("RLIMIT_AS"),
        "free": free if free < _UNKNOWN else None,
    }


def _groups(root: Path, own: Path) -> list[Path]:
    """Return the folders of the control group of this process and of all that contain it."""
    line = next((word for word in _words(own) if word.startswith("0::/")), "0::/")
    names = [name for name in line.removeprefix("0::/").split("/") if name not in ("", "..")]
    return [root.joinpath(*names[:count]) for count in range(len(names), -1, -1)]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return []


def _total() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _limit(name: str) -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(getattr(resource, name))[0]
    return None if limit == resource.RLIM_INFINITY else int(limit)


def _open_files() -> dict[str, int | None]:
    return {"limit": _limit("RLIMIT_NOFILE")}


# --- folders, terminal ----------------------------------------------------------------------------


def _cache() -> dict[str, Any]:
    cache = Cache.at()
    return {**_folder(str(cache.folder)), "bytes": cache.size(), "limit_bytes": cache.limit}


def _folder(folder: str) -> dict[str, Any]:
    """Return whether a folder exists, can be written (a file is created and removed), and what is free."""
    there = os.path.isdir(folder)
    nearest = os.path.abspath(folder)
    while not os.path.lexists(nearest) and nearest != os.path.dirname(nearest):
        nearest = os.path.dirname(nearest)
    try:
        if there:
            with tempfile.TemporaryFile(dir=folder):
                writable = True
        else:
            writable = os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)
        free: int | None = shutil.disk_usage(nearest).free
    except OSError:
        writable, free = False, None
    return {"folder": folder, "exists": there, "writable": writable, "free_bytes": free}


def _terminal() -> dict[str, Any]:
    return {
        "is_terminal": sys.stdout is not None and sys.stdout.isatty(),
        "columns": shutil.get_terminal_size().columns,
        "type": os.environ.get("TERM"),
        "encoding": getattr(sys.stdout, "encoding", None),
        "locale": next((os.environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), None),
    }


def _found_wrong(result: dict[str, Any]) -> Iterator[str]:
    cache, temporary, limit = result["cache"], result["temporary"], result["open_files"]["limit"]
    if cache is not None and not cache["writable"]:
        yield f"{cache['folder']}: the cache cannot be written; type: thresher config set cache FOLDER"
    if not temporary["writable"]:
        yield f"{temporary['folder']}: temporary files cannot be written; set the variable TMPDIR to another folder"
    if limit is not None and limit < _FEW_FILES:
        yield f"only {limit} files can be open at a time; type: ulimit -n 65536"
    for name in (name for name, version in result["versions"].items() if version is None):
        yield f"the package {name} is missing; type: pip install --force-reinstall ."


# --- what is shown --------------------------------------------------------------------------------


def _private(value: Any) -> Any:
    """Return a value without the name of the user and without passwords in addresses."""
    if isinstance(value, dict):
        return {name: _private(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_private(each) for each in value]
    return _without_names(value, os.path.expanduser("~"), _user()) if isinstance(value, str) else value


def _without_names(text: str, home: str, user: str) -> str:
    text = re.sub(r"(?<=://)\S*@", "***@", text)  # to the last @: passwords have any characters
    text = re.sub(r"(://[^\s?]*\?)\S+", r"\1***", text)  # where signed addresses have their signature
    if home not in ("", "/", "~"):
        text = re.sub(rf"{re.escape(home.rstrip(os.sep))}(?=[{re.escape(os.sep)}\s:;,)'\"]|$)", "~", text)
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\\s:;,)'\"]|$)", "$USER", text) if user else text


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # no such user, as in some containers
        return ""
