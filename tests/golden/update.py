"""Hashes of the selections of every method and shipped recipe on one small pool, to notice when one changes.

    python -m tests.golden.update

writes them anew, to be looked at in the diff: a refactor leaves every hash as it was, and a change on purpose is
told to users. Whole numbers and masks are hashed; other numbers are only summed up, since their last digits may
differ between machines. Nothing is written when a millionth more or less in the embeddings moves a row.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import clustered, write_pool
from thresher import Cache, EmbeddingStore, Recipe, Selection, Serial, UsageError, build, run_steps
from thresher.pruning.recipe import shipped_recipes
from thresher.pruning.registry import METHODS
from thresher.runtime.parameters import parameters_of
from thresher.testing.method import example_of

FILE = Path(__file__).with_name("selections.json")
COMMAND = "python -m tests.golden.update"
N = 1_500


def golden_store(folder: Path, shift: float = 0.0) -> EmbeddingStore:
    """Five well separated clusters with near duplicates; captions, sizes, scores."""
    rng = np.random.Generator(np.random.Philox(11))
    image, text = clustered(N, 24, 5, 0.5, seed=2), clustered(N, 24, 5, 0.6, seed=2)
    image[1000:] = image[:500] + rng.uniform(0.001, 0.12, (500, 1)).astype(np.float32) * rng.standard_normal(
        (500, 24), np.float32
    )
    for array in (image, text):
        array += np.float32(shift) * rng.standard_normal(array.shape, np.float32)
    table = {
        "uid": [f"{i:08x}" for i in rng.permutation(N)],
        "text": [" ".join(["word"] * int(count)) for count in rng.integers(0, 8, N)],
        "width": rng.integers(100, 900, N),
        "original_width": rng.integers(100, 900, N),
        "original_height": rng.integers(100, 900, N),
        "clip_l14_similarity_score": rng.permutation(N) / N,
    }
    return write_pool(folder, image, text, table)


def summary(selection: Selection) -> dict[str, Any]:
    """What is compared: rows kept, a hash of whole numbers and masks, and mean, spread and ends of the others."""
    digest = hashlib.sha256()
    others: dict[str, list[float]] = {}
    arrays: dict[str, Any] = {"dropped_by": selection.dropped_by}
    if selection.repeats is not None:
        arrays["repeats"] = selection.repeats
    for number, step in enumerate(selection.steps):
        for kind, found in (("rows", step.rows), ("groups", step.groups)):
            arrays |= {f"{number} {step.method} {kind} {name}": array for name, array in sorted(found.items())}
    for name, array in arrays.items():
        if array.dtype.kind in "iub":
            digest.update(name.encode() + np.ascontiguousarray(array, np.int64).tobytes())
        else:
            finite = array[np.isfinite(array)].astype(np.float64)
            others[name] = [round(float(f(finite)), 6) for f in (np.mean, np.std, np.min, np.max)]
    return {"kept": len(selection), "hash": digest.hexdigest()[:32], "others": others}


def chains() -> dict[str, Any]:
    """Name -> steps and seed: every method with the contract's parameters, every shipped recipe."""
    found: dict[str, Any] = {}
    for name, cls in METHODS.all().items():
        given = example_of(cls)
        if "clusters" in {field.name for field in parameters_of(cls)}:
            given["clusters"] = 5
        found[f"method {name}"] = ([build(name, given)], 0)
    for name in shipped_recipes():
        recipe = Recipe.load(name)
        found[f"recipe {name}"] = (recipe.steps, recipe.seed)
    return found


def compute(folder: Path, shift: float = 0.0) -> dict[str, Any]:
    """Return the summaries of all chains; recipes that this pool is too small for are refused."""
    store = golden_store(folder / "pool", shift)
    found: dict[str, Any] = {}
    for name, (steps, seed) in chains().items():
        try:
            selection = run_steps(store, steps, seed=seed, engine=Serial(), cache=Cache.at(folder / "cache"))
            found[name] = summary(selection)
        except UsageError:
            found[name] = {"refused": True}
    return found


def main() -> None:
    """Write the file, unless the answers hang on the last digits."""
    with tempfile.TemporaryDirectory() as folder:
        found = compute(Path(folder) / "a")
        for turn in range(3):
            shifted = compute(Path(folder) / f"b{turn}", 1e-6)
            torn = [name for name in found if found[name].get("hash") != shifted[name].get("hash")]
            if torn:
                sys.exit(f"not written: a shift of 1e-6 changes {', '.join(torn)}")
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
