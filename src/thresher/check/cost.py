"""What a run will cost on a cluster: a model of seconds, bytes, requests and memory, without reading anything.

Each method is a list of passes over rows. In a pass, workers read blocks and compute; the driver adds up what they
send. Workers wait for what they read, and the driver works at the same time, so that

    seconds = max(work + reading + waiting, driver), and something for each pass.

The constants are measured by :mod:`thresher.check.calibration`, or typical of a machine of 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thresher.errors import UsageError
from thresher.pool.spill import LARGE, rows_of_part
from thresher.pool.store import EmbeddingStore
from thresher.pruning.clusters import automatic
from thresher.runtime.parameters import check_size
from thresher.selection import Keep

PROGRAM = 220_000_000  # bytes of Python and its libraries: 194 to 247 MB, by how their files are in memory
BLOCK = 16_384  # rows
_ROWS_A_CLUSTER, _LEAST_SAMPLE = 256, 65_536  # rows that train k-means
_TASK = 65_536  # rows of a cluster that are compared in one task, at most
_COMPARED = {"semdedup": 1, "clipcov": 2}  # fields whose rows are compared, cluster by cluster
_PAGE = 4_096
_IN_MEMORY = 2 * 2**30  # bytes of training rows that are held
_TREE_SAMPLE, _NEAREST = 64, 4  # rows per cluster that train a tree, coarse clusters that a row is compared with
_UNEVEN = 1.3  # pairs of rows in the clusters of a tree, relative to as many clusters of k-means (measured)
# Bytes of a row in the driver, measured by benchmarks/scale.py: own, and mapped from files, whose pages the system
# drops when it needs memory: labels, distances, orders, cosines, evidence.
_OWN = {"check": 4, "cluster": 5, "density": 6, "ssp": 6, "clip-score": 10, "semdedup": 9}
_OTHER = 12  # own, of other methods
_MAPPED = {"cluster": 8, "density": 12, "ssp": 12, "clip-score": 8, "semdedup": 48}
_ID = 8  # of a row of a step that does not get all rows


@dataclass(frozen=True)
class Rows:
    """The rows of a pool.

    Attributes:
        count: N.
        dim: D.
        bytes: Bytes of a stored number: 2 for float16.
        fields: Fields of vectors: image, text.
        files: Files with vectors, of each field.
        remote: Whether they are in object storage.
    """

    count: int
    dim: int
    bytes: int = 2
    fields: tuple[str, ...] = ("image", "text")
    files: int = 1
    remote: bool = False

    def __post_init__(self) -> None:
        """Validate the numbers."""
        for name in ("count", "dim", "bytes", "files"):
            check_size(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)}: must be at least 1")


def rows_of(store: EmbeddingStore) -> Rows:
    """Return the rows of an opened pool.

    Raises:
        UsageError: It has no vectors.
    """
    vectors = store.layout.vectors
    if not vectors:
        raise UsageError(f"{store.layout.location}: has no embeddings, so there is nothing to estimate")
    first = next(iter(vectors.values()))
    stored = store.stored_bytes(next(iter(vectors))) // max(len(store) * first[0].dim, 1)
    remote = any(piece.protocol != "file" for piece in first)
    return Rows(store.total, first[0].dim, max(stored, 1), tuple(vectors), len(first), remote)


@dataclass(frozen=True)
class Cluster:
    """Where the work runs.

    Attributes:
        nodes: Number of machines.
        cores: Cores of each; one worker runs on each.
        bandwidth: Bytes a second that a node reads, from the storage or the network.
        latency: Seconds until a request to object storage is answered.
    """

    nodes: int = 1
    cores: int = 16
    bandwidth: float = 1e9
    latency: float = 0.03

    def __post_init__(self) -> None:
        """Validate the numbers."""
        check_size("nodes", self.nodes)
        check_size("cores", self.cores)
        if self.nodes < 1 or self.cores < 1 or self.bandwidth <= 0 or self.latency < 0:
            raise UsageError(f"{self}: nodes and cores must be at least 1, bandwidth above 0 and latency not negative")

    @property
    def workers(self) -> int:
        """Tasks that run at once."""
        return self.nodes * self.cores


@dataclass(frozen=True)
class Constants:
    """How fast one core is while all others work, and the driver.

    Attributes:
        products: Multiply-adds a second of assigning rows to centroids.
        pairs: Multiply-adds a second of comparing rows with each other, with the comparisons of the results.
        prepared: Numbers a second that become unit vectors in float32.
        sums: Bytes a second of sums that the driver adds up.
        row: Seconds that the driver needs for a row in a step: cuts, evidence, files.
        task: Seconds that the driver needs for a task.
        step: Seconds of a step of any size.
        start: Seconds until a command begins.
    """

    products: float = 40e9
    pairs: float = 25e9
    prepared: float = 500e6
    sums: float = 1e9
    row: float = 50e-9
    task: float = 0.3e-3
    step: float = 0.05
    start: float = 0.6


@dataclass(frozen=True)
class Pass:
    """One pass over rows.

    Attributes:
        name: What it does.
        rows: Rows that are read.
        fields: How many fields of them.
        products: Multiply-adds of assignment.
        pairs: Multiply-adds of comparing rows.
        prepared: Share of the work of making unit vectors; the norms alone are about a third.
        tasks: Number of tasks.
        received: Bytes that the driver receives.
        requests: Requests to object storage.
        written: Bytes that are written to the cache, or to --scratch.
    """

    name: str
    rows: int
    fields: int = 1
    products: float = 0.0
    pairs: float = 0.0
    prepared: float = 1.0
    tasks: int = 1
    received: float = 0.0
    requests: int = 0
    written: float = 0.0


@dataclass(frozen=True)
class StepCost:
    """The cost of a step.

    Attributes:
        name: The method.
        rows_in: Rows that it is given.
        rows_out: Rows that it keeps; all that it is given if that depends on the data.
        seconds: In all.
        parts: Seconds of "compute", "read", "wait" (for answers to requests) and "driver", as if nothing overlapped.
        read: Bytes.
        received: Bytes that the driver receives from workers.
        written: Bytes that are written to the cache, or to --scratch.
        requests: Requests to object storage.
        driver_memory: Bytes of the driver at most, without what is mapped from files.
        driver_mapped: Bytes that the driver maps from files; the system drops them when it needs memory.
        worker_memory: Bytes of a worker at most.
    """

    name: str
    rows_in: int
    rows_out: int
    seconds: float
    parts: Mapping[str, float]
    read: float
    received: float
    written: float
    requests: int
    driver_memory: float
    driver_mapped: float
    worker_memory: float

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])

    def memory(self, workers: int) -> float:
        """Return the bytes of one process with threads as workers, at most, with what is mapped from files."""
        return self.driver_memory + self.driver_mapped + workers * (self.worker_memory - PROGRAM)


@dataclass(frozen=True)
class RunCost:
    """The cost of a run of several steps.

    Attributes:
        steps: The steps.
        seconds: In all, with the start of the command.
        doubled: Seconds with twice as many nodes.
        missing: Methods that the model does not know; they are not counted.
    """

    steps: tuple[StepCost, ...]
    seconds: float
    doubled: float
    missing: tuple[str, ...] = field(default=())


def estimate(steps: Sequence[Any], rows: Rows, cluster: Cluster, constants: Constants | None = None) -> RunCost:
    """Estimate the cost of the steps of a recipe.

    Args:
        steps: Methods, as in a recipe; each works on the rows that the one before keeps.
        rows: The rows of the pool.
        cluster: Where it runs.
        constants: Speeds (default: typical ones).

    Returns:
        The cost of each step and of all. Rows that a step keeps by a threshold are not known: all are counted.
    """
    known = constants or Constants()
    done, doubled, missing = [], known.start, []
    seconds, left = known.start, rows
    for name, step in [("check", None), *((step.name, step) for step in steps)]:
        passes = _passes(name, step, left, rows, cluster.nodes > 1)
        if passes is None:
            missing.append(name)
            continue
        kept = _kept(step, left.count)
        clusters, coarse = _clusters(step, left.count)
        training = 0.0 if not clusters else 4.0 * left.dim * _sample(step, left.count, coarse or clusters)
        held = clusters, training if training <= _IN_MEMORY else 0.0
        done.append(_cost(name, passes, left, rows, kept, cluster, known, *held))
        more = replace(cluster, nodes=2 * cluster.nodes)
        doubled += _cost(name, passes, left, rows, kept, more, known, *held).seconds
        seconds += done[-1].seconds
        left = replace(left, count=max(kept, 1))
    return RunCost(tuple(done), seconds, doubled, tuple(missing))


def _kept(step: Any, count: int) -> int:
    keep = getattr(step, "keep", None)
    if keep is None:
        return count
    try:
        return keep.of(count) if isinstance(keep, Keep) else Keep.parse(keep).of(count)
    except UsageError:
        return count


def _clusters(step: Any, count: int) -> tuple[int, int]:
    """Return the clusters of a step and the coarse clusters of its tree, 0 if it has none."""
    if step is None or not hasattr(step, "clusters"):
        return 0, 0
    tree: tuple[int, int] = step.tree_for(count) if hasattr(step, "tree_for") else (0, 0)
    return tree if tree[0] else (int(step.clusters or automatic(count)[0]), 0)


def _passes(name: str, step: Any, left: Rows, rows: Rows, several: bool) -> list[Pass] | None:
    """Return the passes of a step on one or several nodes, None if the model does not know the method."""
    n, d = left.count, left.dim
    blocks = -(-n // BLOCK)

    def reading(label: str, fields: int = 1, **more: Any) -> Pass:
        return Pass(label, n, fields, tasks=blocks, requests=blocks * fields, **more)

    if name == "check":
        fields = len(rows.fields)
        opened = Pass("open", 0, requests=rows.files * (fields + 1) + rows.files // 1000 + 1)
        return [opened, reading("check", fields, prepared=1 / 3)]
    if name in ("random", "filter", "dedup"):
        return [Pass("cut", 0)]
    if name == "clip-score":
        return [reading("clip-score", 2)]
    if name in ("density", "ssp", "semdedup", "cluster", "clipcov"):
        k, coarse = _clusters(step, n)
        passes = []
        if getattr(step, "centroids", None) is None and getattr(step, "classes", None) is None:
            passes.append(_training(step, n, d, coarse or k, several))
        if coarse:
            passes += _tree(step, n, d, k, coarse)
        multiplied = coarse + min(_NEAREST, coarse) * k / coarse if coarse else k
        passes.append(reading("assign", products=float(n) * multiplied * d, received=8.0 * n))
        if fields := _COMPARED.get(name, 0):
            if _in_cluster_order(name, left, rows, several):  # as runs that are then merged
                size = float(n) * fields * d * left.bytes
                part = rows_of_part(n, fields * d * left.bytes, BLOCK)
                files = -(-n // part)
                passes.append(Pass("sort", n, fields, prepared=0.0, tasks=files, requests=2 * files, written=size))
                if files > 1:
                    passes.append(
                        Pass("merge", n, fields, prepared=0.0, tasks=files, requests=files * files, written=size)
                    )
            products, tasks = float(n) * n / max(k, 1) * d, max(k, n // _TASK)
        if name == "semdedup":
            pairs = products / 2 * (_UNEVEN if coarse else 1)
            passes.append(Pass("compare", n, pairs=pairs, tasks=tasks, received=16.0 * n))
        if name == "clipcov":
            clamped = getattr(step, "clamp", "0") != "none"  # else sums of products are products with sums
            taken = 2.0 * _kept(step, n) / n * products  # both ways; the rows that no clamp changes need none
            passes.append(reading("class means", 2, received=16.0 * d * k))
            passes.append(reading("similarities", 2, received=12.0 * n))
            passes.append(Pass("class products", n, 2, pairs=products * clamped, tasks=tasks, received=8.0 * n))
            passes.append(Pass("greedy", n, 2, pairs=taken * clamped, tasks=tasks, received=8.0 * n))
        return passes
    return None


def _in_cluster_order(name: str, left: Rows, rows: Rows, several: bool) -> bool:
    """Return whether the rows that a step compares are written once more, in cluster order."""
    return rows.remote or several or _COMPARED.get(name, 0) * left.count * left.dim * left.bytes >= LARGE


def _sample(step: Any, n: int, k: int) -> int:
    """Return the rows that train k-means."""
    asked = str(getattr(step, "sample", "auto"))
    return min(n if asked == "all" else int(asked) if asked.isdecimal() else max(_ROWS_A_CLUSTER * k, _LEAST_SAMPLE), n)


def _training(step: Any, n: int, d: int, k: int, several: bool) -> Pass:
    """Return the pass that trains centroids: several iterations on a sample."""
    iterations, sample = int(getattr(step, "iterations", 20)), _sample(step, n, k)
    blocks = -(-sample // BLOCK)
    moved = 8.0 * d * min(k, BLOCK)  # bytes of the sums of a block in which every cluster occurs
    received = moved * blocks * iterations / 2  # fewer rows move from iteration to iteration
    if several:  # nodes add up the sums; labels and bounds are received
        received = (8.0 * d * k + 12.0 * sample) * iterations
    return Pass(
        "k-means",
        sample,
        products=float(iterations) * sample * k * d,
        tasks=blocks * iterations,
        received=received,
        requests=blocks,
    )


def _tree(step: Any, n: int, d: int, k: int, coarse: int) -> list[Pass]:
    """Return the passes that train the clusters of each coarse cluster on some of its rows."""
    sample = min(_TREE_SAMPLE * k, n)
    blocks = -(-sample // BLOCK)
    products = float(getattr(step, "iterations", 20)) * sample * k / coarse * d
    return [
        Pass(
            "sample", sample, products=float(sample) * coarse * d, tasks=blocks, received=8.0 * sample, requests=blocks
        ),
        Pass("k-means", sample, products=products, tasks=coarse, received=4.0 * k * d, requests=coarse),
    ]


def _cost(
    name: str,
    passes: Sequence[Pass],
    left: Rows,
    rows: Rows,
    kept: int,
    cluster: Cluster,
    known: Constants,
    clusters: int,
    held: float,
) -> StepCost:
    parts = dict.fromkeys(("compute", "read", "wait", "driver"), 0.0)
    seconds = known.step
    read = received = written = 0.0
    requests = 0
    for one in passes:
        size = float(one.rows) * left.dim * left.bytes * one.fields
        busy = min(cluster.workers, max(one.tasks, 1))
        waves = -(-one.tasks // busy) * busy / max(one.tasks, 1)  # the last tasks leave some workers idle
        compute = waves * (
            one.products / known.products
            + one.pairs / known.pairs
            + one.prepared * float(one.rows) * left.dim * one.fields / known.prepared
        )
        compute /= busy
        nodes = min(cluster.nodes, busy)
        reading = (size + one.written) / (cluster.bandwidth * nodes)
        waiting = one.requests * cluster.latency / busy if rows.remote else 0.0
        local = cluster.nodes == 1
        driver = one.tasks * known.task + one.received / known.sums
        driver += 0.0 if local else one.received / cluster.bandwidth
        seconds += max(compute + reading + waiting, driver)
        for part, value in zip(parts, (compute, reading, waiting, driver), strict=True):
            parts[part] += value
        read, received, written = read + size, received + one.received, written + one.written
        requests += one.requests if rows.remote else 0
    parts["driver"] += known.row * left.count
    seconds += known.row * left.count
    row = left.dim * (left.bytes + 4)  # as stored, and as float32
    compared = _COMPARED.get(name, 0)
    task = _TASK if compared else 2 * BLOCK
    stored = float(left.dim) * left.bytes
    # Each row that is read where it is has a page of the file in memory, as long as the task.
    pages = compared * min(cluster.cores * task * (_PAGE + stored), left.count * stored)
    if _in_cluster_order(name, left, rows, cluster.nodes > 1):
        pages = 0.0
    return StepCost(
        name=name,
        rows_in=left.count,
        rows_out=kept,
        seconds=seconds,
        parts=parts,
        read=read,
        received=received,
        written=written,
        requests=requests,
        driver_memory=PROGRAM
        + float(_OWN.get(name, _OTHER)) * rows.count
        + (_ID * left.count if left.count < rows.count else 0)
        + 24.0 * clusters * left.dim
        + held,
        driver_mapped=float(_MAPPED.get(name, _OTHER)) * left.count + pages,
        worker_memory=PROGRAM + row * min(left.count, task) + 4.0 * clusters * left.dim,
    )
