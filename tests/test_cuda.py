"""What is written for a GPU, as far as a CPU can tell: the checks of ``benchmarks/gpu.py``.

The checks run here on sizes for a CPU, so that none fails on a GPU for a reason of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from thresher.train.augment import crops, sampled, to_device

REPOSITORY = Path(__file__).parents[1]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), REPOSITORY / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# --- crops ----------------------------------------------------------------------------------------


@given(
    height=st.integers(2, 40), width=st.integers(2, 40), side=st.integers(2, 40),
    x=st.tuples(st.floats(0, 1), st.floats(0, 1)), y=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)  # fmt: skip
def test_parts_sampled_at_once_are_those_cut_out_and_resized(
    height: int, width: int, side: int, x: tuple[float, float], y: tuple[float, float]
) -> None:
    left, right = sorted(round(share * (width - 1)) for share in x)
    top, bottom = sorted(round(share * (height - 1)) for share in y)
    pictures = torch.rand(2, 3, height, width)
    corners = torch.tensor([[left, top], [right, top], [right, bottom], [left, bottom]]).float()
    got = sampled(pictures, torch.stack([corners, torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]]).float()]), side)
    for picture, part in (
        (got[0], pictures[:1, :, top : bottom + 1, left : right + 1]),
        (got[1], pictures[1:, :, :2, :2]),
    ):
        expected = F.interpolate(part, (side, side), mode="bilinear", align_corners=True)[0]
        assert torch.allclose(picture, expected, atol=1e-4)


@pytest.mark.parametrize("smallest", [0.9, 0.1])
def test_a_gpu_is_given_the_parts_that_a_cpu_cuts(smallest: float) -> None:
    crop = crops(24, smallest)
    pictures = torch.rand(16, 3, 27, 31)
    torch.manual_seed(1)
    expected = crop(pictures)
    torch.manual_seed(1)
    got = sampled(pictures, crop.cut.forward_parameters(pictures.shape)["src"], 24)
    assert torch.allclose(got, expected, atol=1e-4)


def test_what_is_on_the_device_stays_itself() -> None:
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


# --- checks ---------------------------------------------------------------------------------------


Checks = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """``benchmarks/gpu.py``, loaded as when it is run from its folder."""
    names = ("gpu", "common", "kmeans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENBLAS_CORETYPE", "")  # which loading it changes
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        yield importlib.import_module("gpu")
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def checks(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Checks:
    """Run checks: the exit code, what was printed, and what ``cuda.json`` says."""

    def run(*arguments: str) -> tuple[int, str, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--toy", "-o", str(tmp_path), *arguments])
        code = 0
        try:
            gpu.main()
        except SystemExit as ended:
            code = int(str(ended.code))
        return code, capsys.readouterr().out, json.loads((tmp_path / "cuda.json").read_text(encoding="utf-8"))

    return run


@pytest.mark.parametrize(
    "names",
    [
        ["losses", "crops", "books", "first-batch", "chunks", "kmeans", "products"],
        pytest.param(["gathered", "nccl"], marks=pytest.mark.slow),  # which start processes
    ],
    ids=["one process", "two processes"],
)
def test_the_checks_hold_on_a_cpu(checks: Checks, names: list[str]) -> None:
    code, printed, told = checks("--only", *names)
    assert code == 0, printed
    assert list(told["checks"]) == names
    assert all(found["held"] and found["figures"] for found in told["checks"].values())
    if "first-batch" in names:
        assert told["checks"]["first-batch"]["figures"]["tiny, float32"] == 0
    assert f"| **{names[0]}** | held |" in printed


def test_a_check_that_fails_stops_no_other_and_is_told_by_the_status(checks: Checks, tmp_path: Path) -> None:
    code, printed, told = checks("--only", "clip", "crops", "--pool", str(tmp_path / "nowhere"))
    assert code == 1
    assert [found["held"] for found in told["checks"].values()] == [False, True]
    assert "| **clip** | FAILED |" in printed
    code, printed, told = checks("--only", "crops", "--seconds", "-1")
    assert code == 1
    assert "time limit of -1 seconds was reached" in told["checks"]["crops"]["why"]


def test_figures_that_are_no_numbers_are_not_held(gpu: ModuleType) -> None:
    assert gpu.held("it", 1.0, 1.0) == 1.0
    for value in (1.1, float("nan"), float("inf")):
        with pytest.raises(gpu.Failed):
            gpu.held("it", value, 1.0)
