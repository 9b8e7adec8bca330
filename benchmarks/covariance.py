"""Covariance errors of the selections of all methods, on a synthetic pool with classes and on the example pool."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import table  # chooses the kernels before NumPy loads

# isort: split
import numpy as np

from thresher import (
    Cache,
    Clustered,
    EmbeddingStore,
    Run,
    Selection,
    ThresherError,
    build,
    make_engine,
    open_store,
    run_steps,
)
from thresher.pruning.covariance import Deviation, covariance_errors
from thresher.pruning.registry import METHODS
from thresher.runtime.parameters import parameters_of

PLAIN = {"weight_self": 0.0, "weight_label": 0.0, "weight_inter": 0.0}
VARIANTS = {"clipcov, cross alone": PLAIN, "clipcov, refresh 200": {"refresh": 200}}
EXAMPLE = Path(__file__).parents[1] / "examples" / "twemoji"


def pairs(
    rows: int, dim: int, classes: int, mismatched: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Image and text rows (rows, dim) float16, their classes, and which captions belong to another row.

    Classes have uneven sizes and a mean shared by image and text. Image and text of a row share a signal with variances
    that fall as 1 / i, and add independent noise of a strength that differs by row. Images and texts are in two
    separate cones.
    """
    rng = np.random.default_rng(0)
    sizes = rng.pareto(1.5, classes) + 0.5
    labels = rng.choice(classes, rows, p=sizes / sizes.sum())
    scales = np.arange(1, dim + 1) ** -0.5 / np.sqrt(np.log(dim))
    shared = 1.2 * (rng.standard_normal((classes, dim)) * scales)[labels] + rng.standard_normal((rows, dim)) * scales
    noise = rng.uniform(0.3, 1.2, (rows, 1))
    image, text = (shared + noise * rng.standard_normal((rows, dim)) / np.sqrt(dim) for _ in range(2))
    wrong = rng.random(rows) < mismatched
    text[wrong] = text[rng.permutation(np.flatnonzero(wrong))]
    for part in (image, text):
        part += 1.5 * rng.standard_normal(dim) / np.sqrt(dim)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return image.astype(np.float16), text.astype(np.float16), labels.astype(np.int32), wrong


def chosen(store: EmbeddingStore, cache: Cache, keep: str, clusters: int) -> tuple[dict[str, Selection], set[str]]:
    """Selections of all methods that need only a budget and a number of clusters, and the errors of the others."""
    result, missed = {}, set()
    for name, cls in METHODS.all().items():
        options = {"keep": keep, "clusters": clusters}
        known = {item.name for item in parameters_of(cls)}
        if "keep" in known:
            try:
                method = build(name, {key: value for key, value in options.items() if key in known})
                result[name] = run_steps(store, [method], cache=cache)
            except ThresherError as error:
                missed.add(f"{name} ({error})")
    for name, more in VARIANTS.items():
        method = build("clipcov", {"keep": keep, "clusters": clusters, **more})
        result[name] = run_steps(store, [method], cache=cache)
    return result, missed


def errors_table(
    store: EmbeddingStore, cache: Cache, budgets: list[str], clusters: int, labels: np.ndarray, wrong: np.ndarray | None
) -> str:
    lines, missed = [], set()
    for keep in budgets:
        kept, others = chosen(store, cache, keep, clusters)
        missed |= others
        run = Run(store, kept["random"], make_engine(), cache)
        for name, error in covariance_errors(run, kept, labels).items():
            share = [] if wrong is None else [f"{wrong[kept[name].mask()].mean():.1%}"]
            lines.append([keep, name, *shown(error.overall), *shown(error.within), f"{error.classes_lost}", *share])
    head = ["kept", "method", "overall", "random", "ratio", "within", "random", "ratio", "classes lost"]
    result = table(head if wrong is None else [*head, "mismatched"], lines)
    return f"{result}\n\nSkipped: {'; '.join(sorted(missed)) or 'none'}.\n"


def shown(value: Deviation | None) -> list[str]:
    if value is None or value.error is None or value.ratio is None:
        return ["-", "-", "-"]
    return [f"{value.error:.3f}", f"{value.random:.3f}", f"{value.ratio:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--mismatched", type=float, default=0.15)
    parser.add_argument("--budgets", nargs="+", default=["5%", "10%", "30%"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache.at(Path(folder) / "cache")
        image, text, labels, wrong = pairs(args.rows, args.dim, args.classes, args.mismatched)
        np.save(Path(folder) / "image.npy", image)
        np.save(Path(folder) / "text.npy", text)
        print(
            f"{args.rows:,} synthetic pairs of {args.dim} dimensions in {args.classes} synthetic classes, "
            f"{wrong.mean():.1%} mismatched; errors within these classes\n"
        )
        print(errors_table(open_store(folder), cache, args.budgets, args.classes, labels, wrong))

        store = open_store(str(EXAMPLE))
        everything = Selection.everything(store.fingerprint(), str(EXAMPLE), {}, store.total)
        groups = Clustered(clusters=40).groups(Run(store, everything, make_engine(), cache))
        print(f"{len(store):,} pairs of examples/twemoji, errors within 40 k-means clusters\n")
        print(errors_table(store, cache, args.budgets, 40, groups.labels_N, None))


if __name__ == "__main__":
    main()
