"""The ``thresher`` command."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Choose the fastest matrix kernels for this machine, then run the command line."""
    _prepare_streams()
    from thresher.runtime.kernels import prefer_avx512

    prefer_avx512()
    from thresher.cli.main import main as command

    sys.exit(command())


def _prepare_streams() -> None:
    """Make the standard streams usable.

    A closed one (``>&-``) becomes the null device; otherwise the next file that is opened gets its number and then
    what is printed. Characters that the encoding of the terminal lacks are escaped.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
