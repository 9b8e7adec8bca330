"""The ``thresher`` command."""

from __future__ import annotations

import sys

from thresher.runtime.kernels import prefer_avx512


def main() -> None:
    """Choose the fastest matrix kernels for this machine, then run the command line."""
    prefer_avx512()
    from thresher.cli.main import main as command

    sys.exit(command())


if __name__ == "__main__":
    main()
