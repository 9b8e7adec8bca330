"""The ``thresher`` command."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Choose the fastest matrix kernels for this machine, then run the command line."""
    _prepare_streams()
    from thresher.runtime.limited import is_limited, run_limited

    sys.exit(run_limited(_command, _out_of_memory) if is_limited() else _command())


def _command() -> int:
    from thresher.runtime.kernels import prefer_avx512

    prefer_avx512()
    try:
        from thresher.cli.main import main as command
    except Exception as error:
        from thresher.runtime.memory import is_out_of_memory

        if is_out_of_memory(error):
            return _out_of_memory()
        raise
    return command()


def _out_of_memory() -> int:
    """Report that there is too little memory, without the modules that there may be no memory for."""
    from thresher.runtime.memory import OUT_OF_MEMORY

    if "--json" in sys.argv:
        sys.stdout.write(f'{{"error": {{"type": "MemoryError", "message": "{OUT_OF_MEMORY}"}}}}\n')
    else:
        sys.stderr.write(f"Error: {OUT_OF_MEMORY}\n")
    return 2


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
