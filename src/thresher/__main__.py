"""The ``thresher`` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Choose the machine's best matrix kernels, then hand over to the command line."""
    prefer_avx512()
    from thresher.cli import main as command

    sys.exit(command())


def prefer_avx512() -> None:
    """Have OpenBLAS use AVX-512 where the processor has it; takes effect before NumPy loads.

    On processors newer than itself OpenBLAS falls back to an AVX2 kernel, half as fast. Whoever sets
    the variable is left alone.
    """
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= set(flags):
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


if __name__ == "__main__":
    main()
