"""Run all benchmarks, each in its own process, and print their tables."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Print the tables of docs/performance.md."""
    print(f"{platform.machine()}, Python {platform.python_version()}\n", flush=True)
    for name in (
        "quotas",
        "semdedup",
        "density",
        "kmeans",
        "warm_start",
        "clipcov",
        "negclip",
        "covariance",
        "dynamic",
        "keys",
        "reshard",
    ):
        subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py")), *sys.argv[1:]], check=True)
        print(flush=True)


if __name__ == "__main__":
    main()
