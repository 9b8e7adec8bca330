"""What every method promises: each method that the registry finds, by the contract of ``thresher.testing``."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thresher
from tests.processes import finished
from thresher.pool.store import Block, EmbeddingStore
from thresher.pruning.registry import METHODS
from thresher.pruning.run import Run
from thresher.pruning.scores import Score, Scored
from thresher.testing import MethodContract
from thresher.testing.method import FEW
from thresher.testing.pools import clustered, write_pool

# Of the solver behind density's released = true.
pytestmark = pytest.mark.filterwarnings("ignore:The default value of raise_error:PendingDeprecationWarning")


class Contract(MethodContract):
    """The contract, with files for the parameters that name one."""

    @classmethod
    def others(cls, folder: Path) -> Mapping[str, Any]:
        fields = cls.plugin.__dataclass_fields__
        vectors = str(folder / "vectors.npy")
        np.save(vectors, clustered(6, 8, 6, seed=9))
        (folder / "entries.txt").write_text("word\nother\n")
        write_pool(folder / "reference", cls.pool(FEW)[0][: FEW // 2], clustered(FEW // 2, 8, 9))
        reference = {"reference": str(folder / "reference"), "eps": 0.05, "keep": None}
        found: dict[str, Any] = {
            "batch_size": 150,
            "centroids": vectors,
            "clamp": "0.4",
            "classes": vectors,
            "clusters": 7,
            "column": "width",
            "columns": "width, height=2",
            "entries": str(folder / "entries.txt"),
            "language": "width",
            "proxy": "height",
            "reference_eps": {**reference, "reference_eps": 0.01},
            "sample": "300",
            "target": {"target": vectors},
            "threshold": {"keep": None, "threshold": -1e9},
            "where": "width >= 200",
        }
        if "reference_eps" in fields:  # a pool there, a score elsewhere
            found |= {"reference": reference, "against": {"keep": None, "eps": 0.2, "against": "kept"}}
        elif "reference" in fields:
            found["reference"] = "height"
        return {**found, **super().others(folder)}


class Long(Contract):
    """The contract, for methods with so many parameters that changing each takes seconds."""

    @pytest.mark.slow
    def test_cached_results_of_other_parameters_seeds_and_rows_are_not_used(self, bench: Any, tmp_path: Path) -> None:
        super().test_cached_results_of_other_parameters_seeds_and_rows_are_not_used(bench, tmp_path)


class Captioned(Contract):
    """The contract, on a pool in which no caption is empty: of those that are, ``metaclip`` cannot keep any."""

    @staticmethod
    def pool(rows: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        image, text, table = Contract.pool(rows)
        return image, text, {**table, "text": [f"one {caption} two" for caption in table["text"]]}


LONG = {"clipcov", "density", "herd", "hkmeans", "match", "normsim", "scs", "ssp"}

for _cls in METHODS.all().values():
    _base = Captioned if _cls.name == "metaclip" else Long if _cls.name in LONG else Contract
    globals()[f"Test{_cls.__name__}"] = type(f"Test{_cls.__name__}", (_base,), {"plugin": _cls, "__module__": __name__})


# --- methods with a fault -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Forgetful(Scored):
    """Keep the rows with the largest power of their first number; the power is missing from the key."""

    name = "forgetful"
    meaning = "a power"

    power: float = field(default=2.0, metadata={"help": "exponent"})

    def score(self, run: Run) -> Score:
        power = self.power

        def powers(store: EmbeddingStore, block: Block) -> tuple[Any]:
            return (np.abs(store.vectors("image", block)[:, 0]) ** np.float32(power),)

        return Score(np.asarray(run.column("powers", "image", powers, {"score": "float32"})["score"]))


@pytest.mark.parametrize("example", [{"keep": "30%"}, {"threshold": 0.3}])
def test_a_parameter_that_is_missing_from_a_key_is_found(example, tmp_path, tmp_path_factory) -> None:
    class Faulty(Contract):
        plugin = Forgetful

    Faulty.example = example
    check = Faulty.test_cached_results_of_other_parameters_seeds_and_rows_are_not_used
    from thresher.testing.method import _bench

    with pytest.raises(AssertionError, match="power=1.0.* is answered with what the cache holds"):
        check(Faulty(), _bench(Faulty, tmp_path / "bench"), tmp_path)


# --- a new method ---------------------------------------------------------------------------------------

TOY = '''
"""Every other row."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.selection import Selection


@method("every-other")
@dataclass(frozen=True, kw_only=True)
class EveryOther:
    """Keep every other row."""

    example: ClassVar[dict[str, Any]] = {"shape": "round"}
    shape: str = field(metadata={"help": "nobody could guess it"})
    first: Literal["even", "odd"] = "even"

    def select(self, run: Run) -> Selection:
        """Keep it."""
        rows = {"cluster": run.store.ids.astype(np.int32)}
        odd = self.first == "odd"
        return run.selection(self, run.store.ids % 2 == odd, reasons=("its number is {cluster}",), rows=rows)
'''
MUTE = TOY.replace("every-other", "mute").replace("EveryOther", "Mute").replace("its number is {cluster}", "")


@pytest.mark.slow
@pytest.mark.skipif("TOY_THRESHER" in os.environ, reason="the toys do not test themselves")
def test_a_new_file_is_all_a_new_method_takes(tmp_path) -> None:
    """Methods dropped into a copy of the package are found and tested; one without reasons fails."""
    package = Path(thresher.__file__).parent
    shutil.copytree(package, tmp_path / "thresher", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in (("every_other", TOY), ("mute", MUTE)):
        (tmp_path / "thresher" / "pruning" / "methods" / f"{name}.py").write_text(text)
    done = finished(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", __file__]
        + ["-k", "TestEveryOther or TestMute and (chain or word)"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TOY_THRESHER": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=Path(__file__).parents[2],
        timeout=240,
    )
    told = [line for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR"))]
    sound = [line for line in told if "TestEveryOther" in line]
    assert sound, done.stdout + done.stderr
    assert all(line.startswith("PASSED") for line in sound), done.stdout
    assert any("test_every_word_a_field_allows[first-odd]" in line for line in sound)
    assert any(line.startswith("FAILED") for line in told if "TestMute" in line), done.stdout
