"""What the processor multiplies fast."""

from __future__ import annotations

from pathlib import Path

import pytest

from thresher.runtime.kernels import has_avx512, has_bfloat16

CPU = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPU.exists(), reason="only Linux has /proc/cpuinfo")
def test_features_are_those_of_the_processor() -> None:
    line = next((line for line in CPU.read_text().splitlines() if line.startswith("flags")), "")
    assert has_avx512() == all(f" avx512{part}" in line for part in ("f", "bw", "cd", "dq", "vl"))
    assert has_bfloat16() == (" avx512_bf16" in line or " amx_bf16" in line)
