"""ClipCov: the whole command compared with the bare class products and with the released notebook, on pools with even
classes, with two power laws, and with one class; and the greedy algorithm in one class compared with submodular
libraries."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import bare_products, kernel, median, table  # chooses the kernels before NumPy loads

# isort: split
import numpy as np
import threadpoolctl

from thresher.ops import crosscov
from thresher.ops.products import ON_CPU

SHAPES = {"even": "even", "power": "power law (1/k)", "steep": "steep (1/k²)", "one": "one class"}
PARTS = ("matrices", "greedy")  # parts of the time of the notebook
OF_POOLS = """\
Bare class products: the sum over classes of rows² x dimensions, at the speed of bare products measured just before.
thresher: the whole command with an empty cache, including class assignment. Notebook: its whole process, with given
classes. Same rows: rows that both the notebook and thresher with `--released` select.
"""
OF_ONE_CLASS = """\
M = S + S^T of similarities clamped at 0. Graph cut: the sum of M over all i and picked j, minus half of the sum over
picked i and j. Facility location: the sum over all i of the largest M to a picked j. Until ready: from vectors in
memory to sums (thresher), to M, or to the data structure that the library builds from M."""


# --- pools ----------------------------------------------------------------------------------------


def sizes_of(shape: str, rows: int, classes: int) -> np.ndarray:
    """Number of rows of each class (K,)."""
    exponent = {"even": 0.0, "power": 1.0, "steep": 2.0, "one": np.inf}[shape]
    weight = np.arange(1, classes + 1) ** -exponent
    sizes = np.floor(weight / weight.sum() * rows).astype(np.int64)
    if shape != "one":
        sizes = np.maximum(sizes, 1)
    sizes[0] += rows - sizes.sum()
    return sizes


class Pairs:
    """Image and text rows of given classes: two separate cones, a class direction, a signal shared by image and text,
    with variances that fall as 1 / i, and independent noise; a tenth of the captions belong to another row."""

    def __init__(self, dim: int, classes: int) -> None:
        self.rng = np.random.default_rng(0)
        self.prompts_KD = self.unit(classes, dim)
        scales = np.arange(1, dim + 1, dtype=np.float32) ** np.float32(-0.5)
        self.scales_D = scales / np.linalg.norm(scales)
        self.image_D, other_D = self.unit(2, dim)
        self.text_D = np.float32(0.3) * self.image_D + np.float32(0.95) * other_D

    def unit(self, rows: int, dim: int) -> np.ndarray:
        return normalised(self.rng.standard_normal((rows, dim), dtype=np.float32))

    def of(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unit rows (B, D) float32."""
        noise = partial(self.rng.standard_normal, (len(labels), len(self.scales_D)), dtype=np.float32)
        signal = noise() * self.scales_D
        said = signal.copy()
        wrong = np.flatnonzero(self.rng.random(len(labels)) < 0.1)
        said[wrong] = signal[self.rng.permutation(wrong)]
        center = self.prompts_KD[labels]
        image = 0.7 * self.image_D + 0.8 * center + 0.6 * signal + 0.3 * noise() * self.scales_D
        text = 0.7 * self.text_D + 0.5 * center + 0.6 * said + 0.3 * noise() * self.scales_D
        return normalised(image), normalised(text)


def normalised(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pool_of(folder: Path, shape: str, rows: int, dim: int, classes: int) -> Path:
    """A folder with a pool of float16 .npy files, class prompts, and the class of each row; created once."""
    folder_of_pool = folder / f"clipcov-{shape}-{rows}x{dim}-{classes}"
    if folder_of_pool.exists():
        return folder_of_pool
    scratch = folder_of_pool.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "pool").mkdir(parents=True)
    pairs = Pairs(dim, classes)
    meant = np.repeat(np.arange(classes), sizes_of(shape, rows, classes))
    pairs.rng.shuffle(meant)
    files = [
        np.lib.format.open_memmap(scratch / "pool" / f"{name}.npy", mode="w+", dtype=np.float16, shape=(rows, dim))
        for name in ("image", "text")
    ]
    nearest = np.empty(rows, np.int32)
    for lo in range(0, rows, 50_000):
        image, text = pairs.of(meant[lo : lo + 50_000])
        here = slice(lo, lo + len(image))
        files[0][here], files[1][here] = image, text
        nearest[here] = (files[0][here].astype(np.float32) @ pairs.prompts_KD.T).argmax(axis=1)
    for file in files:
        file.flush()
    np.save(scratch / "prompts.npy", pairs.prompts_KD)
    np.save(scratch / "nearest.npy", nearest)
    scratch.rename(folder_of_pool)
    return folder_of_pool


# --- the released notebook ------------------------------------------------------------------------


def notebook(data: Path, budget: int, mask: Path) -> None:
    """The algorithm of the released notebook, written from its formulas, in a fast implementation.

    As in the notebook: the clamped similarity matrices of all classes are in memory at once; rows are taken one by one
    from one sorted list, and at every 199th, 399th, ... row of a class its scores are updated and all rows are sorted
    again; the class of each row is given. Faster than the notebook: classes are arrays, not dictionaries of lists; the
    columns of the selected rows are indexed by position, not by a list lookup for every row of the class; matrices are
    computed when they are needed, not read from files; products of small classes run on one thread.
    """
    image, text = (np.load(data / "pool" / f"{name}.npy", mmap_mode="r") for name in ("image", "text"))
    prompts, nearest = np.load(data / "prompts.npy"), np.load(data / "nearest.npy")
    n, k = len(nearest), len(prompts)
    partition = np.split(np.argsort(nearest, kind="stable"), np.cumsum(np.bincount(nearest, minlength=k))[:-1])
    matrices: dict[int, np.ndarray] = {}
    cross, self_, label, place = np.empty(n), np.empty(n), np.empty(n), np.empty(n, np.int64)
    sums = np.zeros((k, 2, image.shape[1]), np.float32)
    spent = {"matrices": 0.0}
    blas, cores = threadpoolctl.ThreadpoolController(), len(os.sched_getaffinity(0))
    for j, own in enumerate(partition):
        if not len(own):
            continue
        v, t = (normalised(side[own].astype(np.float32)) for side in (image, text))
        start = time.perf_counter()
        with blas.limit(limits=cores if len(own) > 500 else 1):
            similarity = v @ t.T
        self_[own] = similarity.diagonal()  # not clamped
        similarity *= similarity > 0
        cross[own] = (similarity.sum(axis=1) + similarity.sum(axis=0)) / len(own)
        matrices[j] = similarity
        spent["matrices"] += time.perf_counter() - start
        label[own], place[own] = v @ prompts[j], np.arange(len(own))
        sums[j] = v.sum(axis=0), t.sum(axis=0)
    total, inter = sums.sum(axis=0), np.zeros(n)
    for j, own in enumerate(partition):
        if 0 < len(own) < n:
            v, t = (normalised(side[own].astype(np.float32)) for side in (image, text))
            others = (total - sums[j]) / (n - len(own))
            inter[own] = v @ others[1] + t @ others[0]
    start = time.perf_counter()
    scores = cross + 2 * self_ + label / 2 - inter
    subset = released_greedy(scores, cross, label, nearest, partition, place, matrices, budget)
    spent["greedy"] = time.perf_counter() - start
    kept = np.zeros(n, np.bool_)
    kept[subset] = True
    np.save(mask, kept)
    print(json.dumps(spent))


def released_greedy(
    scores: np.ndarray,
    cross: np.ndarray,
    label: np.ndarray,
    nearest: np.ndarray,
    partition: list[np.ndarray],
    place: np.ndarray,
    matrices: dict[int, np.ndarray],
    budget: int,
) -> list[int]:
    of = nearest.tolist()
    subset: list[int] = []
    selected: list[list[int]] = [[] for _ in partition]
    fresh: list[list[int]] = [[] for _ in partition]
    waiting = np.argsort(scores).tolist()
    while waiting and len(subset) < budget:
        row = waiting.pop()
        subset.append(row)
        j = of[row]
        selected[j].append(row)
        fresh[j].append(row)
        if (len(selected[j]) + 1) % 200 == 0:
            own, columns = partition[j], place[fresh[j]]
            loss = matrices[j][:, columns].sum(axis=1) + matrices[j][columns, :].sum(axis=0)
            scores[own] -= (loss + cross[selected[j]].sum() + label[fresh[j]].sum() / 2) / len(own)
            scores[subset] = -np.inf
            waiting = np.argsort(scores)[len(subset) :].tolist()
            fresh[j] = []
    return subset


# --- processes ------------------------------------------------------------------------------------


class Spent(NamedTuple):
    seconds: float
    own: int  # peak memory of the process in bytes
    parts: dict[str, float]
    mask: np.ndarray


def watched(command: list[str], mask: Path) -> Spent:
    """Run a command that writes a mask, and measure the whole process."""
    import psutil

    begin, own = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = seen.memory_info()
                # Pages of mapped files count as shared; the rest is private memory of the process.
                own = max(own, memory.rss - memory.shared)
            time.sleep(0.01)
        spent = time.perf_counter() - begin
        output = process.stdout.read().decode() if process.stdout else ""
        if process.returncode:
            raise SystemExit(f"the run failed: {' '.join(command)}")
    return Spent(spent, own, json.loads(output) if output.startswith("{") else {}, np.load(mask))


def select(data: Path, budget: int, options: Sequence[str], scratch: Path) -> Spent:
    """`thresher select clipcov` with an empty cache."""
    for name in ("out", "cache"):
        shutil.rmtree(scratch / name, ignore_errors=True)
    command = [sys.executable, "-m", "thresher", "select", "clipcov", str(data / "pool"), "-o", str(scratch / "out")]
    command += ["--keep", str(budget), "--classes", str(data / "prompts.npy"), "--cache", str(scratch / "cache")]
    return watched([*command, "--quiet", *options], scratch / "out" / "mask.npy")


def run_notebook(data: Path, budget: int, scratch: Path) -> Spent:
    mask = scratch / "notebook.npy"
    command = [sys.executable, __file__, "--notebook", str(data), "--budget", str(budget), "--mask", str(mask)]
    return watched(command, mask)


def warm(data: Path) -> None:
    """Read the files of the pool into the page cache."""
    for path in (data / "pool").iterdir():
        with path.open("rb") as file:
            while file.read(2**24):
                pass


HEAD = ["classes", "", "seconds", "against bare products", "class matrices", "greedy", "own memory, peak", "same rows"]


def whole(data: Path, shape: str, dim: int, keep: float, rounds: int, room: float) -> Iterator[list[str]]:
    """Rows of the table for one pool, contestants in turn. The notebook is skipped if its matrices exceed ``room``."""
    nearest = np.load(data / "nearest.npy")
    sizes = np.bincount(nearest).astype(np.float64)
    pairs, budget = float((sizes**2).sum()), int(keep * len(nearest))
    ways = {
        "thresher": (),
        "thresher, `--clamp none`": ("--clamp", "none"),
        "thresher, `--released`": ("--released",),
    }
    contestants = {name: partial(select, data, budget, options) for name, options in ways.items()}
    if pairs * 4 <= room:
        contestants["notebook"] = partial(run_notebook, data, budget)
    times: dict[str, list[Spent]] = {name: [] for name in contestants}
    bare = []
    warm(data)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            bare.append(bare_products(65_536, dim, 1_024) / (65_536 * 1_024) * pairs)
            for name, fn in contestants.items():
                times[name].append(fn(Path(folder)))
    called = f"{SHAPES[shape]}, largest {int(sizes.max()):,}"
    yield [called, "bare class products", f"{median(bare):.2f}", "1.0x", "", "", "", ""]
    for name, runs in times.items():
        relative = median([run.seconds / each for run, each in zip(runs, bare, strict=True)])
        parts = [f"{median([run.parts[part] for run in runs]):.2f}" if runs[0].parts else "" for part in PARTS]
        common = ""
        if name == "thresher, `--released`" and "notebook" in times:
            kept, released = runs[0].mask, times["notebook"][0].mask
            common = f"{int((kept & released).sum()):,} of {int(released.sum()):,}"
        spent, own = median([run.seconds for run in runs]), max(run.own for run in runs)
        yield [called, name, f"{spent:.2f}", f"{relative:.1f}x", *parts, f"{own / 1e6:,.0f} MB", common]
    if "notebook" not in times and room:
        yield [called, "notebook", "does not fit", "", "", "", f"{pairs * 4 / 1e9:,.1f} GB of matrices", ""]


# --- one class ------------------------------------------------------------------------------------


class Contestant(NamedTuple):
    name: str
    objective: str
    ready: Callable[[], Any]
    pick: Callable[[Any], Iterable[int]]


def by_walk(image: np.ndarray, text: np.ndarray) -> crosscov.Walk:
    """State of the graph cut in thresher, without a matrix; gains are 1/n of those of the libraries."""
    n = len(image)
    sums = sum(ON_CPU.sums(image, text, 0.0))
    toward = np.stack([text.mean(axis=0), image.mean(axis=0)])
    own = np.maximum(np.einsum("ij,ij->i", image, text), 0)
    mean = crosscov.drifts(image, text, toward)
    zeroed = crosscov.where_clamped(sums / n, mean, 0.0)
    return crosscov.Walk((sums - own) / n, mean, toward, zeroed, np.zeros(n))


def walk_on(image: np.ndarray, text: np.ndarray, picks: int, walk: crosscov.Walk) -> list[int]:
    def take(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return image[rows], text[rows]

    def spend(rows: np.ndarray, toward: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        taken = crosscov.Taken.of(image[rows], text[rows], toward)
        return crosscov.losses(image, text, walk.clamped_n, taken, 0.0)

    crosscov.advance(walk, 0.0, 1, picks, -np.inf, take, spend)
    return walk.order[:picks]


def matrix_of(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """M = S + S^T of clamped similarities."""
    similarity = np.maximum(image @ text.T, 0)
    return similarity + similarity.T


def plain(picks: int, matrix: np.ndarray) -> list[int]:
    """Greedy graph cut in NumPy."""
    gains = matrix.sum(axis=1, dtype=np.float64) - matrix.diagonal() / 2
    order = []
    for _ in range(picks):
        best = int(gains.argmax())
        order.append(best)
        gains -= matrix[best]
        gains[best] = -np.inf
    return order


def contestants_of(image: np.ndarray, text: np.ndarray, picks: int) -> list[Contestant]:
    n, matrix, cut = len(image), partial(matrix_of, image, text), "graph cut"
    contestants = [
        Contestant("thresher", cut, partial(by_walk, image, text), partial(walk_on, image, text, picks)),
        Contestant("NumPy, whole matrix", cut, matrix, partial(plain, picks)),
    ]
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # for apricot; the others also use one thread
    try:
        from apricot import FacilityLocationSelection, GraphCutSelection

        def rank(made: Any, matrix: np.ndarray) -> list[int]:
            return made().fit(matrix).ranking.tolist()

        def double() -> np.ndarray:
            return matrix().astype(np.float64)  # the type its kernels are compiled for

        options = {"n_samples": picks, "metric": "precomputed", "optimizer": "lazy"}
        graph_cut = partial(rank, partial(GraphCutSelection, alpha=2, **options))
        location = partial(rank, partial(FacilityLocationSelection, **options))
        contestants.append(Contestant("apricot, lazy", cut, double, graph_cut))
        contestants.append(Contestant("apricot, lazy", "facility location", double, location))
    except ImportError:
        print("apricot-select is not installed: skipped\n")
    try:
        from submodlib import GraphCutFunction

        def made() -> Any:
            return GraphCutFunction(n=n, mode="dense", lambdaVal=0.5, ggsijs=matrix())

        def greedy(optimizer: str, function: Any) -> list[int]:
            stops = {"stopIfZeroGain": False, "stopIfNegativeGain": False, "show_progress": False}
            return [int(row) for row, _ in function.maximize(budget=picks, optimizer=optimizer, **stops)]

        contestants.append(Contestant("submodlib, naive", cut, made, partial(greedy, "NaiveGreedy")))
        contestants.append(Contestant("submodlib, lazy", cut, made, partial(greedy, "LazyGreedy")))
    except ImportError:
        print("submodlib-py is not installed: skipped\n")
    return contestants


def one_class(rows: int, dim: int, picks: int, rounds: int) -> str:
    """The table of the greedy algorithm in one class, one thread, contestants in turn."""
    with threadpoolctl.threadpool_limits(1):
        image, text = Pairs(dim, 1).of(np.zeros(rows, np.int64))
        contestants = contestants_of(image, text, picks)
        for each in contestants_of(image[:200], text[:200], 20):  # imports and compilation happen here, before timing
            each.pick(each.ready())
        times: list[list[tuple[float, float]]] = [[] for _ in contestants]
        orders: list[list[int]] = [[] for _ in contestants]
        for _ in range(rounds):
            for k, each in enumerate(contestants):
                begin = time.perf_counter()
                state = each.ready()
                between = time.perf_counter()
                orders[k] = list(each.pick(state))
                times[k].append((between - begin, time.perf_counter() - between))
                del state
    lines = []
    for each, spent, order in zip(contestants, times, orders, strict=True):
        ready, picking = median([a for a, _ in spent]), median([b for _, b in spent])
        both = median([(a + b) / sum(own) for (a, b), own in zip(spent, times[0], strict=True)])
        same = f"{len(set(order) & set(orders[0]))} of {picks}"
        same += ", in the same order" if order == orders[0] else ""
        lines.append([each.name, each.objective, f"{ready:.3f}", f"{picking:.3f}", f"{both:.1f}x", same])
    head = ["", "objective", "until ready", "picks", "time against thresher", "rows as thresher"]
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=list(SHAPES), help="distribution of rows over classes"
    )
    parser.add_argument("--keep", type=float, default=0.1, help="share of the rows to keep")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--room",
        type=float,
        default=6,
        help="maximum size of the notebook's matrices in GB; above it, the notebook is skipped",
    )
    parser.add_argument(
        "--one-class", type=int, default=5_000, help="rows in the comparison with libraries; 0: skip it"
    )
    parser.add_argument("--picks", type=int, default=500, help="rows to select from that class")
    parser.add_argument(
        "--large", type=int, default=0, help="rows of an additional power-law pool, run once; 0: skip it"
    )
    parser.add_argument("--folder", type=Path, help="folder for pools (default: a temporary folder)")
    parser.add_argument("--notebook", type=Path, help=argparse.SUPPRESS)  # for the subprocess
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--mask", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.notebook:
        notebook(args.notebook, args.budget, args.mask)
        return
    pools = [(shape, args.rows, args.rounds, args.room * 1e9) for shape in args.shapes]
    if args.large:
        pools.append(("power", args.large, 1, 0.0))
    with tempfile.TemporaryDirectory() as scratch:
        for shape, rows, rounds, room in pools:
            data = pool_of(args.folder or Path(scratch), shape, rows, args.dim, args.classes)
            lines = list(whole(data, shape, args.dim, args.keep, rounds, room))
            sizes = f"{rows:,} x {args.dim} float16, {args.classes:,} prompts, {args.keep:.0%} kept"
            print(f"select clipcov, {sizes}, {rounds} rounds, {kernel()} kernels\n\n{table(HEAD, lines)}\n", flush=True)
            if not args.folder:
                shutil.rmtree(data)
    if pools:
        print(OF_POOLS)
    if args.one_class:
        lines = one_class(args.one_class, args.dim, args.picks, args.rounds)
        sizes = f"{args.one_class:,} rows of {args.dim} dimensions, {args.picks:,} picks, one thread"
        print(f"The greedy algorithm in one class, {sizes}, {args.rounds} rounds, {kernel()} kernels\n\n{lines}\n")
        print(OF_ONE_CLASS)


if __name__ == "__main__":
    main()
