"""What the processor multiplies fast, and the kernels of OpenBLAS, which reads the environment when NumPy loads."""

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
    return {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= _features()


def has_bfloat16() -> bool:
    """Return whether Linux reports instructions for bfloat16 products; without them torch is 2 to 40 times as slow."""
    return bool({"avx512_bf16", "amx_bf16"} & _features())


def _features() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        return set()
