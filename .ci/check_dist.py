"""Check what `make dist` built: its files, and that they work where only they are installed.

python .ci/check_dist.py DIST [--python PYTHON] [--constraint FILE]

The wheel is installed into a new environment and used in an empty folder; only the example pool is read from the
repository. The source distribution must give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "thresher"
NATIVE = (".so", ".pyd", ".dylib", ".dll", ".a")


def run(*command: object, cwd: Path, allowed: tuple[int, ...] = (0,)) -> str:
    """The standard output of a command that sees neither the repository nor the user's settings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "THRESHER_"))}
    env |= {"XDG_CACHE_HOME": str(cwd / "cache"), "XDG_CONFIG_HOME": str(cwd / "config")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode not in allowed:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def check(is_right: bool, what: str) -> None:
    """End with a message unless something is right."""
    if not is_right:
        raise SystemExit(f"wrong: {what}")
    print(f"ok: {what}", flush=True)


def check_files(wheel: Path) -> None:
    """The wheel is pure Python and has every file of the package, and the man pages."""
    check(wheel.name.endswith("-py3-none-any.whl"), f"{wheel.name} is for every Python and system")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/WHEEL"))).decode()
    check("Root-Is-Purelib: true" in metadata, "the wheel says that it is pure Python")
    check(not [name for name in names if name.endswith(NATIVE)], "it has no compiled files")
    own = {path.relative_to(SOURCE.parent).as_posix() for path in SOURCE.rglob("*") if path.is_file()}
    lacking = sorted(name for name in own - names if "__pycache__" not in name)
    check(not lacking, f"it has all {len(own & names)} files of src/thresher" + ", ".join(["", *lacking[:5]]))
    extra = [name for name in names if name.startswith("thresher/") and name not in own]
    check(not extra, "it has no other files" + ", ".join(["", *extra[:5]]))
    pages = [name for name in names if "/share/man/man1/" in name]
    check(any(name.endswith("/thresher-select-semdedup.1") for name in pages), f"it has {len(pages)} man pages")


def check_commands(wheel: Path, python: str, constraint: list[str], folder: Path) -> None:
    """The installed command works in an empty folder."""
    venv = folder / "venv"
    run(python, "-m", "venv", venv, cwd=folder)
    run(venv / "bin" / "python", "-m", "pip", "install", "-q", *constraint, wheel, cwd=folder)
    command, pool = venv / "bin" / "thresher", ROOT / "examples" / "twemoji"
    home = run(venv / "bin" / "python", "-c", "import thresher; print(thresher.__file__)", cwd=folder).strip()
    check(Path(home).is_relative_to(venv), "thresher is imported from the environment")
    version = json.loads(run(command, "--version", "--json", cwd=folder))["version"]
    check(f"-{version}-" in wheel.name, f"thresher --version is {version}")
    # Exit code 1 is about the machine: on macOS a process may open 256 files.
    found = json.loads(run(command, "doctor", "--self", "--json", cwd=folder, allowed=(0, 1)))
    check(found["versions"]["thresher"] == version, f"doctor --self: Python {found['versions']['python']}")
    check(None not in found["versions"].values() and "torch" in found["extras"], "it lists packages and extras")
    run(command, "select", "semdedup", pool, "-o", "sel", "--eps", "0.15", cwd=folder)
    check((folder / "sel" / "mask.npy").exists(), "select on the example pool")
    run(command, "report", "sel", "-o", "report.html", cwd=folder)
    check((folder / "report.html").stat().st_size > 100_000, "report: the templates are there")
    check("datacomp-basic" in run(command, "recipes", cwd=folder), "recipes are there")
    plans = "from thresher.lab.plan import shipped_plans; print(*shipped_plans())"
    check("scan-clip" in run(venv / "bin" / "python", "-c", plans, cwd=folder), "plans are there")
    check("_thresher_completion" in run(command, "completions", "zsh", cwd=folder), "completions")
    check((venv / "share" / "man" / "man1" / "thresher.1").exists(), "man thresher")


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file but those that pip writes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in ("RECORD", "direct_url.json", "INSTALLER", "REQUESTED")
        and "__pycache__" not in path.parts
    }


def main() -> None:
    """Check all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--constraint", help="file of constraints for pip")
    args = parser.parse_args()
    (wheel,), (source,) = args.dist.resolve().glob("*.whl"), args.dist.resolve().glob("*.tar.gz")
    constraint = ["-c", str(Path(args.constraint).resolve())] if args.constraint else []
    check_files(wheel)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, file in (("wheel", wheel), ("source", source)):
            options = ("-q", "--no-deps", "--no-compile", "--target", folder / kind)
            run(sys.executable, "-m", "pip", "install", *options, file, cwd=folder)
        check(contents(folder / "wheel") == contents(folder / "source"), "the source distribution gives the same files")
        check_commands(wheel, args.python, constraint, folder)


if __name__ == "__main__":
    main()
