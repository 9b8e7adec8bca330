"""The ``thresher`` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Choose the machine's best matrix kernels, then hand over to the command line.

    OpenBLAS falls back to an AVX2 kernel on processors newer than itself even where AVX-512, twice
    as fast, is there. It reads this variable once, when NumPy loads; whoever sets it is left alone.
    """
    if "OPENBLAS_CORETYPE" not in os.environ and _has_avx512():
        os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"
    from thresher.cli import main as command

    sys.exit(command())


def _has_avx512() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= set(flags)


if __name__ == "__main__":
    main()
