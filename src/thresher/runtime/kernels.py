"""Which matrix kernels OpenBLAS uses: it reads the environment once, when NumPy loads."""

from __future__ import annotations

import os


def prefer_avx512() -> None:
    """Have OpenBLAS use AVX-512 where the processor has it; takes effect before NumPy loads.

    On processors newer than itself OpenBLAS falls back to an AVX2 kernel, half as fast. Whoever sets
    the variable is left alone.
    """
    if has_avx512():
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


def has_avx512() -> bool:
    """Whether the processor has what OpenBLAS's AVX-512 kernels need, as far as Linux tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= set(flags)
