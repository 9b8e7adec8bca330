"""The matrix kernels of OpenBLAS, which reads the environment once, when NumPy loads."""

from __future__ import annotations

import os


def prefer_avx512() -> None:
    """Make OpenBLAS use AVX-512 if the processor supports it; must be called before NumPy loads.

    On processors newer than itself OpenBLAS falls back to an AVX2 kernel, which is half as fast. A variable that is
    already set is not changed.
    """
    if has_avx512():
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


def has_avx512() -> bool:
    """Return whether Linux reports the features that the AVX-512 kernels of OpenBLAS need."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= set(flags)
