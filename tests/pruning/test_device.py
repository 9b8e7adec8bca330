"""Methods on a device of torch: the decisions of the CPU, and errors for devices that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thresher import Cache, Processes, Run, Selection, Serial, Threads, make_engine, open_store, select
from thresher.cli.main import main
from thresher.errors import UsageError
from thresher.ops.products import ON_CPU
from thresher.ops.torch_products import Devices, TorchNearest, TorchProducts
from thresher.pruning.clusters import _precision

METHODS: dict[str, dict[str, Any]] = {
    "semdedup": {"eps": 0.04, "clusters": 3},
    "semdedup kept": {"eps": 0.04, "clusters": 3, "against": "kept"},
    "semdedup prefer": {"eps": 0.04, "clusters": 3, "prefer": "quality"},
    "semdedup reference": {"reference": "{reference}", "reference_eps": 0.1},
    "density": {"keep": "60%", "clusters": 40},
    "clipcov": {"keep": "30%", "clusters": 3},
    "normsim": {"keep": "50%", "target": "{target}", "norm": "max"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clusters of more rows than NumPy would compare itself, a third of them near copies."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = tmp_path_factory.mktemp("device")
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 16))
    image = centres[rng.integers(0, 3, 5000)] + 0.5 * rng.standard_normal((5000, 16))
    image[3300:] = image[:1700] + 0.05 * rng.standard_normal((1700, 16))
    text = image + 0.7 * rng.standard_normal(image.shape)
    (made / "pool").mkdir()
    np.save(made / "pool" / "image.npy", image.astype(np.float32))
    np.save(made / "pool" / "text.npy", text.astype(np.float32))
    table = {"uid": [f"k{i}" for i in range(5000)], "quality": rng.random(5000)}
    pq.write_table(pa.table(table), made / "pool" / "meta.parquet")
    np.save(made / "target.npy", rng.standard_normal((700, 16)).astype(np.float32))
    (made / "reference").mkdir()
    other = np.concatenate([rng.standard_normal((800, 16)), image[::9]])
    np.save(made / "reference" / "image.npy", other.astype(np.float32))
    return made


@pytest.mark.parametrize("name", METHODS)
def test_the_decisions_are_those_of_the_cpu(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for what in ("_reduced", "nearest"):
        note_calls(monkeypatch, what, calls)
    parameters = {
        key: value.format(reference=folder / "reference", target=folder / "target.npy")
        if isinstance(value, str)
        else value
        for key, value in METHODS[name].items()
    }
    pool, method = str(folder / "pool"), name.partition(" ")[0]
    found = {
        device: selected(pool, Threads(2, device=device), tmp_path / device, method, parameters)
        for device in ("cpu", "torch-cpu")
    }
    assert calls, "nothing was computed on the device"
    kept = {device: np.asarray(selection.mask()) for device, selection in found.items()}
    np.testing.assert_array_equal(kept["torch-cpu"], kept["cpu"])
    assert 0 < kept["cpu"].sum() < 5000
    one, other = (selection.steps[-1].rows for selection in found.values())
    np.testing.assert_allclose(one["score"], other["score"], atol=2e-6)


def selected(pool: str, engine: Any, cache: Path, method: str, parameters: dict[str, Any]) -> Selection:
    return select(pool, {"method": method, **parameters}, engine=engine, cache=cache, progress=False)


def note_calls(monkeypatch: pytest.MonkeyPatch, what: str, calls: list[str]) -> None:
    real = getattr(TorchProducts, what)
    if isinstance(real, property):
        monkeypatch.setattr(TorchProducts, what, property(lambda self: calls.append(what) or real.fget(self)))
    else:
        monkeypatch.setattr(TorchProducts, what, lambda self, *given: calls.append(what) or real(self, *given))


@pytest.mark.slow
def test_workers_in_processes_have_the_device_too(folder: Path, tmp_path: Path) -> None:
    parameters = METHODS["semdedup"]
    pool = str(folder / "pool")
    engine = Processes(2, device="torch-cpu")
    try:
        found = selected(pool, engine, tmp_path / "one", "semdedup", parameters)
    finally:
        engine.close()
    expected = selected(pool, Serial(device="torch-cpu"), tmp_path / "two", "semdedup", parameters)
    np.testing.assert_array_equal(found.mask(), expected.mask())
    np.testing.assert_array_equal(found.steps[-1].rows["score"], expected.steps[-1].rows["score"])


def test_what_a_device_computed_is_kept_apart(folder: Path) -> None:
    """The last bits differ, so that the cache must not mix them."""
    store = open_store(str(folder / "pool"))
    start = Selection.everything("", "", {}, len(store))

    def made(device: str) -> Run:
        return Run(store, start, make_engine(f"serial:device={device}"), Cache(None))

    assert made("auto").kernels == made("cpu").kernels
    assert made("torch-cpu").kernels == [*made("cpu").kernels, "torch-cpu"]
    assert made("cpu").products is ON_CPU


def test_a_device_that_is_not_there_is_an_error_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = str(folder / "pool")
    with pytest.raises(UsageError, match="give cpu, cuda"):
        selected(pool, Threads(2, device="gpu"), tmp_path / "cache", "random", {"keep": "50%"})
    if torch.cuda.is_available():
        return
    assert main(["select", "random", pool, "--keep", "50%", "--device", "cuda", "-o", str(tmp_path / "sel")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: --device cuda: torch ")
    assert said.endswith("finds no GPU here; pass --device cpu\n")
    assert not (tmp_path / "sel").exists()


def test_the_option_of_the_commands(folder: Path, tmp_path: Path) -> None:
    out, pool = str(tmp_path / "sel"), str(folder / "pool")
    words = ["select", "semdedup", pool, "--eps", "0.04", "--clusters", "3", "--device", "torch-cpu", "--quiet"]
    assert main([*words, "-o", out, "--cache", str(tmp_path / "cache")]) == 0
    expected = selected(pool, Serial(), tmp_path / "other", "semdedup", METHODS["semdedup"])
    np.testing.assert_array_equal(Selection.load(out).mask(), expected.mask())


def test_workers_elsewhere_use_a_gpu_only_if_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may not have the one of this process: Ray hides GPUs that it has not reserved."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    store = open_store(str(folder / "pool"))
    start = Selection.everything("", "", {}, len(store))
    for engine, name in (
        (Serial(), "cuda"),
        (Processes(1), "cpu"),
        (Processes(1, device="cuda"), "cuda"),
        (Serial(device="cpu"), "cpu"),
    ):
        _, nearest, _ = _precision(Run(store, start, engine, Cache(None)), "bfloat16")
        assert isinstance(nearest, TorchNearest)
        assert nearest.devices.names == (name,)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="a worker has no GPU"), Devices.named("cuda").next():
        pass
