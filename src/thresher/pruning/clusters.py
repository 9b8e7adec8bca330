"""Concept clusters: computed by spherical k-means or given as centroids, cached, and shared between steps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import MissingExtraError, PoolError, UsageError, installed
from thresher.io.npy import npy_piece
from thresher.io.paths import cut
from thresher.io.places import local_copy, located, place
from thresher.ops import kmeans
from thresher.ops.cut import allocate, sizes_of, sums_of
from thresher.ops.neighbors import MeanNearestDistance
from thresher.ops.vectors import F32, to_float32
from thresher.pool.store import Block, EmbeddingStore, vectors_from_npy
from thresher.pruning.audit import Audit, audited
from thresher.pruning.run import Run, unit
from thresher.runtime import memory
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.engine import Engine, reduced, shares_memory
from thresher.runtime.files import refuse_foreign_files
from thresher.runtime.format import counted
from thresher.runtime.kernels import has_bfloat16
from thresher.runtime.places import AnyPath, expanded
from thresher.runtime.random import digest
from thresher.runtime.results import Name, Say, result_folder
from thresher.runtime.untrusted import INTEGERS, Fields, check_array, mapped_array, open_regular, read_json

if TYPE_CHECKING:
    from thresher.report.notebook import Gallery

FILES = ("cluster.json", "centroids.npy", "labels.npy", "distances.npy")  # what write_groups writes
FIELDS = ("image", "text", "joint")
_IN_MEMORY = 2 * 2**30  # training rows are held up to this many bytes of float32, and a quarter of what is free
_ROWS_A_CLUSTER = 256  # in the training sample; more change the objective by less than 0.1%
_LEAST_SAMPLE = 65_536
_WARM_ROWS = 512  # rows per cluster that the first half of the iterations uses
_TREE_FROM = 1_000_000  # rows; of more, methods that compare the rows of a cluster choose a tree
_TREE_EACH = 1_414  # rows of a cluster of a tree, on average: as many as sqrt(n / 2) clusters of a million rows have
_TREE_SAMPLE = 64  # rows per cluster that train a tree
_TREE_TASK = 65_536  # rows that train the clusters of one coarse cluster, at most
_MOST_CHOSEN = 50_000  # clusters, as SemDeDup used for 440 million rows
_PROBED = 512  # rows that are checked against a clustering
_ALIKE = 1e-4  # by how much float32 distances of one row may differ between machines
_MOST_CLUSTERS = 2**20  # of labels without centroids, or the number of rows, if that is higher
_CHECKED = 2**20  # rows of a folder checked at a time
_NAMES = 256 * 2**20  # bytes of a file of class names
_UNIT = 2e-6  # by how much the length of a float32 unit row may differ from 1


@dataclass(frozen=True, eq=False)
class Groups:
    """A clustering of the rows of a view.

    Attributes:
        labels_N: (n,) int32, the cluster of each row.
        distances_N: (n,) float32 cosine distances of the rows to their centroids.
        centroids_KD: (K, D) float32 unit rows.
        notes: How the number of clusters and the sample were chosen.
        store: The view, if :func:`thresher.cluster` made the clustering.
    """

    labels_N: npt.NDArray[np.int32]
    distances_N: F32
    centroids_KD: F32
    notes: tuple[str, ...] = ()
    store: EmbeddingStore | None = None

    def __repr__(self) -> str:
        """Return the counts in one line."""
        sizes = self.sizes_K.tolist()
        each = f", {min(sizes):,} to {max(sizes):,} each" if sizes else ""
        return f"Groups({counted(len(sizes), 'cluster')} of {counted(len(self.labels_N), 'row')}{each})"

    def _repr_html_(self) -> str:
        from thresher.report.notebook import groups_html, in_notebook

        return in_notebook(groups_html, self)

    def show(self, cluster: int | None = None, n: int = 24, *, pool: EmbeddingStore | None = None) -> Gallery:
        """Return a gallery for a notebook: the rows of a cluster nearest to its centroid, and those farthest from it.

        Args:
            cluster: Number of the cluster (default: a few rows of each of the six largest).
            n: Number of rows, 1 to 200.
            pool: The store that was clustered, if :func:`thresher.cluster` did not make the clustering.

        Raises:
            UsageError: No such cluster, or the pool is not known or has another number of rows.
        """
        from thresher.report.notebook import groups_gallery

        return groups_gallery(self, cluster, n, pool)

    @cached_property
    def sizes_K(self) -> npt.NDArray[np.int64]:
        """(K,) number of rows of each cluster."""
        return sizes_of(self.labels_N, len(self.centroids_KD))

    @cached_property
    def d_intra_K(self) -> npt.NDArray[np.float64]:
        """(K,) mean distance of the rows of a cluster to its centroid; NaN for empty clusters."""
        sums = sums_of(self.labels_N, self.distances_N, len(self.centroids_KD))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(sums / self.sizes_K, np.float64)

    def within(self, wide: Run, run: Run) -> Groups:
        """Return the clustering of the rows of ``wide`` for the rows of a run that are among them."""
        if wide is run:
            return self
        at = np.searchsorted(wide.store.ids, run.store.ids)
        return replace(self, labels_N=self.labels_N[at], distances_N=self.distances_N[at])

    def d_inter_K(self, engine: Engine, neighbors: int) -> npt.NDArray[np.float64]:
        """Return the mean distance of each centroid to its ``neighbors`` nearest other centroids, (K,)."""
        rule = MeanNearestDistance(self.centroids_KD, neighbors)
        return np.concatenate(list(engine.map(rule, rule.panels())))


@dataclass(frozen=True, kw_only=True)
class Clustered:
    """Parameters of every method that works inside clusters."""

    name: ClassVar[str]
    compares: ClassVar[bool] = False  # whether all rows of a cluster are compared with each other

    embedding: Literal["image", "text", "joint"] = field(
        default="image", metadata={"help": "embeddings to cluster and compare by"}
    )
    clusters: int | None = field(
        default=None, metadata={"help": "number of clusters (default: chosen, with the reason)"}
    )
    centroids: str | None = field(
        default=None, metadata={"metavar": "FILE", "help": ".npy of (K, D) centroids to use instead of k-means"}
    )
    iterations: int = field(
        default=20, metadata={"help": "k-means iterations (with many rows, the first half uses 512 per cluster)"}
    )
    sample: str = field(
        default="auto",
        metadata={"metavar": "all|auto|N", "help": "rows to train k-means: all, a number, or auto (256 per cluster)"},
    )
    fit: Literal["given", "pool"] = field(
        default="given",
        metadata={"help": "cluster the rows given to the step, or the whole pool once for all steps"},
    )
    precision: Literal["auto", "float32", "bfloat16"] = field(
        default="float32",
        metadata={"help": "precision of the k-means iterations; bfloat16 needs torch; distances are always float32"},
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if self.clusters is not None and self.clusters < 1:
            raise UsageError(f"clusters = {self.clusters}: must be at least 1")
        if self.precision == "bfloat16" and not installed("torch"):
            raise MissingExtraError("bfloat16 k-means", "torch")
        if self.iterations < 0:
            raise UsageError(f"iterations = {self.iterations}: must be at least 0")
        if self.sample not in ("all", "auto") and not (
            str(self.sample).isdecimal() and len(str(self.sample)) < 19 and int(self.sample) > 0
        ):
            raise UsageError(f"sample = {cut(str(self.sample), 100)!r}: must be all, auto, or a number of rows")

    def groups(self, run: Run) -> Groups:
        """Cluster the rows of a run's view.

        Raises:
            UsageError: There are more clusters than rows, or the centroids have another dimension.
            PoolError: The file of centroids is damaged or missing.
        """

        def made() -> Groups:
            wide = self.fitted_on(run)
            return self.groups_of_view(wide).within(wide, run)

        how = tuple(getattr(self, item.name) for item in fields(Clustered))
        return run.remembered(("groups", self.compares, *how), made)

    def fitted_on(self, run: Run) -> Run:
        """Return the run on the rows that are clustered: those given, or the whole pool."""
        return run if self.fit == "given" else replace(run, store=run.store.where(audited(run.so_far)))

    def groups_of_view(self, run: Run) -> Groups:
        """Cluster exactly the rows of a run's view, whatever ``fit`` is."""
        clusters, coarse = self.tree_for(len(run.store))
        if coarse:
            return _of_tree(run, self, clusters, coarse)
        centroids, notes = _computed(run, self) if self.centroids is None else _given(run, self)
        return replace(assign(run, self.embedding, centroids), notes=notes)

    def tree_for(self, rows: int) -> tuple[int, int]:
        """Return the numbers of clusters and of coarse clusters of a tree for so many rows; zeros for none.

        Methods that compare the rows of a cluster use a tree for more than a million rows, unless clusters, centroids
        or a sample are given.
        """
        given = self.clusters is not None or self.centroids is not None or self.sample != "auto"
        return tree_sizes(rows) if self.compares and not given else (0, 0)


def cluster_pool(run: Run, how: Clustered, old: Written | None = None) -> tuple[Groups, Run]:
    """Cluster the rows of a pool that are not skipped as bad.

    Args:
        run: A run on the whole pool.
        how: The parameters.
        old: A clustering of the pool before it grew, to :func:`grow`.

    Returns:
        The clustering, and a run on the rows that were clustered.

    Raises:
        PoolError: The pool is damaged, or changed while it was clustered.
    """
    checked = Audit.of(run.store).select(run)
    run = replace(run, store=run.store.where(checked.mask()), so_far=checked)
    groups = how.groups(run) if old is None else grow(run, old)
    run.store.check_unchanged("it was clustered")
    return groups, run


def write_groups(
    groups: Groups,
    folder: Name,
    info: Mapping[str, Any],
    within: npt.NDArray[np.bool_] | None = None,
    *,
    overwrite: bool = True,
    say: Say | None = None,
) -> AnyPath:
    """Write centroids.npy (K, D) float32, labels.npy (N,) int32, distances.npy (N,) float32 and cluster.json.

    Args:
        groups: The clustering of the rows marked in ``within``.
        folder: Folder to write atomically.
        info: Further entries of cluster.json.
        within: (N,) bool; rows not marked get the label -1 and a distance of NaN. All rows by default.
        overwrite: Whether a different clustering in the folder may be replaced.
        say: Called with one line if the folder holds this clustering already.

    Raises:
        OutputError: The folder has other files or must not be overwritten, or it cannot be written; nothing is left
            half-written.
    """
    arrays = {"centroids": groups.centroids_KD, "labels": groups.labels_N, "distances": groups.distances_N}
    if within is not None and not within.all():
        for name, nothing in (("labels", -1), ("distances", np.nan)):
            some = arrays[name]
            arrays[name] = np.full(len(within), nothing, some.dtype)
            arrays[name][within] = some
    target = place(folder)
    refuse_foreign_files(target, FILES)
    with result_folder(target, marker="cluster.json", overwrite=overwrite, say=say) as scratch:
        for name, array in arrays.items():
            np.save(scratch / f"{name}.npy", array, allow_pickle=False)
        header = {"rows": len(arrays["labels"]), "clusters": len(groups.centroids_KD), "notes": groups.notes, **info}
        (scratch / "cluster.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
    return target


@dataclass(frozen=True, eq=False)
class Written:
    """A clustering that :func:`write_groups` wrote.

    Attributes:
        folder: Where it was read from.
        labels_N: (N,) integers, -1 for rows that were skipped.
        distances_N: (N,) float32, NaN for rows that were skipped.
        centroids_KD: (K, D) float32 unit rows.
        info: The entries of cluster.json.
    """

    folder: Path
    labels_N: npt.NDArray[Any]
    distances_N: F32
    centroids_KD: F32
    info: Mapping[str, Any]

    @property
    def embedding(self) -> str:
        """Which embeddings were clustered."""
        return str(self.info.get("embedding", "image"))


def read_groups(folder: str | os.PathLike[str]) -> Written:
    """Read what :func:`write_groups` wrote, also if others made it; the arrays are memory-mapped.

    Raises:
        PoolError: The folder is missing, damaged or inconsistent; the message names the file.
    """
    with local_copy(folder, "cluster.json") as path:
        return _read_groups(path)


def _read_groups(path: Path) -> Written:
    try:
        head = Fields(read_json(path / "cluster.json"), str(path / "cluster.json"))
        if "embedding" in head.values and head.text("embedding") not in FIELDS:
            raise head.wrong("embedding", " or ".join(FIELDS))
        centroids = mapped_array(path / "centroids.npy", ("float32",), (None, None))
        labels = read_labels(path)
        distances = mapped_array(path / "distances.npy", ("float32",), (len(labels),))
    except (FileNotFoundError, NotADirectoryError) as error:
        name = os.path.basename(error.filename or "cluster.json")
        raise PoolError(f"{path}: not a folder of clusters ({name} is missing)") from None
    except (OSError, ValueError) as error:
        raise PoolError(f"{path}: cannot read the clustering; it may be damaged ({_said(error)})") from None
    step = max(_CHECKED // max(centroids.shape[1], 1), 1)
    parts = (centroids[lo : lo + step] for lo in range(0, len(centroids), step))
    if not centroids.size or not all(np.isfinite(part).all() for part in parts):
        raise PoolError(f"{path}: centroids.npy is empty or has values that are not finite; run clustering again")
    for lo in range(0, len(labels), _CHECKED):
        if not np.array_equal(np.isfinite(distances[lo : lo + _CHECKED]), labels[lo : lo + _CHECKED] >= 0):
            raise PoolError(f"{path}: labels and distances do not match; run clustering again")
    return Written(path, labels, distances, centroids, head.values)


def _said(error: Exception) -> str:
    """Return what is wrong, and with which file."""
    if isinstance(error, OSError) and error.filename:
        return f"{Path(os.fsdecode(error.filename)).name}: {error.strerror or error}"
    return f"cluster.json: {error}"


def grow(run: Run, old: Written) -> Groups:
    """Cluster a pool that has new rows at its end: keep the centroids and the labels of old rows, assign the new rows.

    The result is the same as assigning all rows to the old centroids, bit for bit if the same matrix kernels are in
    use. It is cached as such, so methods that are given these centroids use it. Of the old vectors, only a few
    hundred are read for a check, and those in the block where the new rows begin.

    Args:
        run: A run on the rows of the grown pool that are not skipped.
        old: The clustering of the pool before it grew.

    Raises:
        UsageError: ``old`` is not a clustering of the first rows of the pool, or skipped other rows.
    """
    name, n, pool = old.embedding, len(old.labels_N), run.store.layout.location
    if n > run.store.total:
        raise UsageError(
            f"{old.folder}: is a clustering of {n:,} rows, but {pool} has only {run.store.total:,}; new rows must be "
            "at the end of the pool"
        )
    if old.centroids_KD.shape[1] != run.store.dim(name):
        raise UsageError(
            f"{old.folder}: has centroids of {old.centroids_KD.shape[1]} dimensions, but the {name} embeddings have "
            f"{run.store.dim(name)}"
        )
    old = replace(old, centroids_KD=np.array(old.centroids_KD))
    good = np.flatnonzero(old.labels_N >= 0)
    known = int(np.searchsorted(run.store.ids, n))  # number of old rows in the view
    if not np.array_equal(good, run.store.ids[:known]):
        raise UsageError(
            f"{old.folder}: {n - len(good):,} of its {n:,} rows were skipped, but now other rows are ({n - known:,}); "
            "open the pool with the same --skip-bad and --key as before"
        )
    labels, distances = old.labels_N[good], old.distances_N[good]
    _check_rows(run, old, labels, distances)
    block = run.store.block
    # The last bits of a row may depend on its place in the block, so that a block is computed as a whole.
    edge = known if known == len(run.store) else known // block * block

    def fill(start: int) -> Iterator[tuple[Any, ...]]:
        for lo in range(start, edge, block):
            yield labels[lo : min(lo + block, edge)], distances[lo : min(lo + block, edge)]
        if edge < len(run.store):
            rule = partial(_assign, name, kmeans.Assign(old.centroids_KD, run.products.nearest))
            yield from run.over_blocks("assign", name, rule, max(start, edge))

    key = run.key(_assign, of=name, centroids=_token(old.centroids_KD))
    if old.info.get("kernels") != key["kernels"]:
        key["grown"] = [digest(labels), digest(distances)]
    columns = run.cache.columns("assign", key, _assigned(len(old.centroids_KD)), len(run.store), fill)
    notes = [f"centroids, and labels of {known:,} rows, kept from {old.folder}"]
    if known < len(run.store):
        new = len(run.store) - known
        before, after = (
            1 - float(part.mean(dtype=np.float64))
            for part in (columns["distances"][:known], columns["distances"][known:])
        )
        notes.append(f"mean cosine to the centroid: {after:.4f} for {new:,} new rows, {before:.4f} for the others")
    return Groups(columns["labels"], columns["distances"], old.centroids_KD, tuple(notes))


def _check_rows(run: Run, old: Written, labels: npt.NDArray[Any], distances: F32) -> None:
    """Refuse a clustering of other rows: check evenly spaced rows against their labels and distances."""
    at = np.unique(np.linspace(0, len(labels) - 1, min(_PROBED, len(labels))).astype(np.int64))
    if not len(at):
        raise UsageError(f"{old.folder}: has no labels; run clustering again")
    _, best = kmeans.nearest_centroid(rows := run.store.vectors_at(old.embedding, at), old.centroids_KD)
    own = np.einsum("ij,ij->i", rows, old.centroids_KD[labels[at]])
    wrong = np.flatnonzero(~((np.abs(1 - own - distances[at]) <= _ALIKE) & (best - own <= _ALIKE)))
    if len(wrong):
        row, i, pool = int(run.store.ids_at(at[wrong[:1]])[0]), wrong[0], run.store.layout.location
        raise UsageError(
            f"{old.folder}: is not a clustering of the first {len(old.labels_N):,} rows of {pool}: row {row:,} is "
            f"{1 - own[i]:.4f} from the centroid of cluster {labels[at[i]]} and {1 - best[i]:.4f} from the nearest "
            f"one, but the folder says {distances[at[i]]:.4f} ({len(wrong):,} of {len(at):,} checked rows differ); "
            "pass the folder made before the pool grew, or run clustering again"
        )


def read_labels(folder: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Return the labels that :func:`write_groups` wrote, (N,) integers, memory-mapped.

    Raises:
        PoolError: The labels are missing, cannot be read, or are not below the number of centroids.
    """
    with local_copy(folder, "labels.npy") as path:
        return _read_labels(path / "labels.npy")


def _read_labels(path: Path) -> npt.NDArray[Any]:
    rows = k = None
    with suppress(FileNotFoundError, NotADirectoryError):  # another tool may write labels alone
        rows = len(mapped_array(path.with_name("distances.npy"), ("float32",), (None,)))
        k = len(mapped_array(path.with_name("centroids.npy"), ("float32",), (None, None)))
    try:
        labels = mapped_array(path, INTEGERS, (rows,))
    except (FileNotFoundError, NotADirectoryError):
        raise PoolError(f"{path}: no such file; write labels with 'thresher cluster POOL -o DIR'") from None
    most = max(len(labels), _MOST_CLUSTERS) if k is None else k
    return check_array(labels, str(path), INTEGERS, (None,), -1, most - 1)


def read_names(centroids: str, count: int) -> list[str]:
    """Return the names of given classes: the lines of the .txt file next to their .npy, [] if there is no such file.

    Raises:
        PoolError: The file cannot be read, or does not have ``count`` lines.
    """
    path = place(centroids, reads=True).with_suffix(".txt")
    try:
        with local_copy(path) if path.exists() else nullcontext(Path(str(path))) as copy, open_regular(copy) as file:
            names = file.read(_NAMES).decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise PoolError(f"{path}: cannot read the class names ({error})") from None
    if len(names) != count:
        raise PoolError(f"{path}: {len(names):,} class names, one per line, for the {count:,} rows of {centroids}")
    return [" ".join(name.split()) for name in names]


def automatic(rows: int) -> tuple[int, str]:
    """Choose a number of clusters; return it and the reason.

    Assigning n rows to K clusters costs n K products, and comparing all pairs within clusters about
    n^2 / 2K; the two are equal at K = sqrt(n / 2). There are at least 50 rows per cluster, and at most 50,000
    clusters, as SemDeDup used for 440 million rows.
    """
    k = int(min(max(round((rows / 2) ** 0.5), 1), _MOST_CHOSEN, max(rows // 50, 1)))
    return (
        k,
        f"{counted(k, 'cluster')} chosen for {counted(rows, 'row')} (about sqrt(rows / 2): assignment and "
        "comparison cost the same)",
    )


def tree_sizes(rows: int) -> tuple[int, int]:
    """Choose a number of clusters, and of coarse clusters that they belong to; zeros for up to a million rows.

    With sqrt(n / 2) clusters, the time of a row grows with sqrt(n). Here clusters have as many rows as those of a
    million rows, so that a row is always compared with as many others, until there are 50,000 clusters. To find the
    cluster of a row takes time in proportion to sqrt(K), see :class:`thresher.ops.kmeans.AssignTree`.
    """
    if rows <= _TREE_FROM:
        return 0, 0
    clusters = min(rows // _TREE_EACH, _MOST_CHOSEN)
    return clusters, round(clusters**0.5)


def assign(run: Run, embedding: str, centroids_KD: F32) -> Groups:
    """Assign each row of the view to its nearest centroid, in float32; cached, resumable."""
    rule = partial(_assign, embedding, kmeans.Assign(centroids_KD, run.products.nearest))
    columns = run.column("assign", embedding, rule, _assigned(len(centroids_KD)), centroids=_token(centroids_KD))
    return Groups(columns["labels"], columns["distances"], centroids_KD)


def _assigned(k: int) -> dict[str, str | ArraySpec]:
    """Return what the columns of an assignment to K centroids are; rounding may exceed a distance of 0 or 2."""
    return {"labels": ArraySpec("int32", least=0, most=k - 1), "distances": ArraySpec("float32", least=-1, most=3)}


def _token(centroids_KD: F32) -> str:
    return digest(centroids_KD)


def _assign(name: str, rule: kmeans.Assign | kmeans.AssignTree, store: EmbeddingStore, block: Block) -> tuple[Any, Any]:
    return rule(store.stripes(name, block, rule.stripe))


def _given(run: Run, how: Clustered) -> tuple[F32, tuple[str, ...]]:
    path = expanded(str(how.centroids))
    centroids = np.concatenate(list(vectors_from_npy(path, "centroids", run.store, how.embedding)))
    # Unit rows are not normalised again, so that labels are the same as in the run that computed the centroids.
    stored = to_float32(npy_piece(*located(path)).read(0, len(centroids)))
    lengths = np.sqrt(np.einsum("ij,ij->i", stored, stored, dtype=np.float64))
    np.copyto(centroids, stored, where=(np.abs(lengths - 1) <= _UNIT)[:, None])
    if how.clusters not in (None, len(centroids)):
        raise UsageError(f"{path}: has {len(centroids):,} centroids, but clusters = {how.clusters:,}; omit clusters")
    return centroids, (f"centroids given: {path}",)


def _computed(run: Run, how: Clustered) -> tuple[F32, tuple[str, ...]]:
    n = len(run.store)
    notes: list[str] = []
    k = how.clusters
    if k is None:
        k, why = automatic(n)
        notes.append(why)
    if k > n:
        raise UsageError(f"cannot make {k:,} clusters from {n:,} rows; use at most {n:,}")
    sample = n if how.sample == "all" else max(_ROWS_A_CLUSTER * k, _LEAST_SAMPLE)
    if how.sample not in ("all", "auto"):
        sample = int(how.sample)
        if sample < k:
            raise UsageError(f"sample = {sample:,}: must be at least the number of clusters ({k:,})")
    sample = min(sample, n)
    if sample < n:
        notes.append(f"k-means trained on {sample:,} of {n:,} rows; use sample = all for all rows")
    if sample > 2 * _WARM_ROWS * k and how.iterations > 1:
        notes.append(f"the first {how.iterations // 2} k-means iterations use {_WARM_ROWS * k:,} rows, the others all")
    return _train(run, how, k, sample, how.iterations), tuple(notes)


def _precision(run: Run, wanted: str) -> tuple[str, kmeans.Nearest, float]:
    """Return the precision of the iterations, what finds the nearest centroids in it, and its error in radians."""
    from thresher.ops import torch_products

    # Workers elsewhere may not have the GPU of this process: they use one only if the engine names it.
    device = run.device if run.device != "auto" or shares_memory(run.engine) else "cpu"
    if wanted == "float32" or (wanted == "auto" and not torch_products.worthwhile(has_bfloat16(), device)):
        return "float32", run.products.nearest, kmeans.SLACK
    return "bfloat16", torch_products.nearest_bfloat16(device), torch_products.SLACK


def _train(run: Run, how: Clustered, k: int, sample: int, iterations: int) -> F32:
    """Run k-means, cached; the state is saved every few seconds, so that a killed run can resume.

    With many rows, the first half of the iterations uses a sample of 512 per cluster, which is enough while
    centroids are still far from their final places. The second half uses all rows.
    """
    name, n = how.embedding, len(run.store)
    precision, nearest, slack = _precision(run, how.precision)
    key = run.key(_train, of=name, k=k, iterations=iterations, sample=sample, seed=run.seed, precision=precision)
    path = run.cache.path("kmeans", key)
    dim = run.store.dim(name)
    unit_rows = ArraySpec("float32", (k, dim), least=-2, most=2)
    known = run.cache.load(path, unit_rows)
    if known is not None:
        run.progress.say(f"k-means: {counted(k, 'centroid')} found in the cache")
        return np.asarray(known)
    first = None
    if sample > 2 * _WARM_ROWS * k and iterations > 1:
        first = _train(run, how, k, _WARM_ROWS * k, iterations // 2)
        iterations -= iterations // 2
    if sample < n:
        positions = np.sort(run.rng("kmeans-sample", name, sample).choice(n, sample, replace=False, shuffle=False))
        run = replace(run, store=replace(run.store, rows=run.store.ids_at(positions)))
    # Rows in this process would be sent to workers of another one in every iteration: these read them from the files.
    elsewhere = not shares_memory(run.engine) and run.store.mapped(name)
    if sample * dim * 4 <= min(_IN_MEMORY, memory.available() // 4) and not elsewhere:
        held = np.empty((sample, dim), np.float32)
        lo = 0
        for rows in run.over_blocks("k-means: read", name, partial(unit, name)):
            held[lo : lo + len(rows)] = rows
            lo += len(rows)
        each: kmeans.Passes = partial(_each_held, run, held)
        take: Callable[[Any], F32] = held.__getitem__
    else:
        run = run.local(name)
        each = partial(_each_stored, run, name)
        take = partial(run.store.vectors_at, name)
    saved = run.cache.resumable(path)
    state_arrays = saved.load(
        {
            "centroids_KD": unit_rows,
            "moved_K": ArraySpec("float32", (k,), least=0),
            "sums_KD": ArraySpec("float64", (k, dim), least=-2 * sample, most=2 * sample),
            "sizes_K": ArraySpec("int64", (k,), least=0, most=sample),
            "labels_N": ArraySpec("int32", (sample,), least=-1, most=k - 1),
            "upper_N": ArraySpec("float32", (sample,)),
            "lower_N": ArraySpec("float32", (sample,)),
            "done": ArraySpec("int64", (), least=0, most=iterations),
        }
    )
    if state_arrays is not None:
        state = kmeans.State(**state_arrays)
    else:
        if first is None:
            first = take(np.sort(run.rng("kmeans-init", name, k).choice(sample, k, replace=False, shuffle=False)))
        state = kmeans.State.start(first, sample)
    with run.progress.task(f"k-means: {k:,} clusters, {iterations} iterations", iterations * sample) as advance:
        advance(int(state.done) * sample)

        def after(state: kmeans.State) -> None:
            advance(sample)
            saved.offer(state.arrays)

        centroids = kmeans.fit(each, take, state, iterations, nearest=nearest, slack=slack, after=after)
    run.cache.save(path, centroids)
    saved.remove()
    return centroids


def _of_tree(run: Run, how: Clustered, clusters: int, coarse: int) -> Groups:
    """Cluster rows by coarse k-means, and a sample of the rows of each coarse cluster by k-means again."""
    name, n = how.embedding, len(run.store)
    coarse_JD = _train(run, how, coarse, min(max(_ROWS_A_CLUSTER * coarse, _LEAST_SAMPLE), n), how.iterations)
    sample = min(_TREE_SAMPLE * clusters, n)
    positions = np.sort(run.rng("kmeans-tree", name, sample).choice(n, sample, replace=False, shuffle=False))
    part = replace(run, store=replace(run.store, rows=run.store.ids_at(positions)))
    labels_S = assign(part, name, coarse_JD).labels_N
    order_S = positions[np.argsort(labels_S, kind="stable")]
    sizes_J = sizes_of(labels_S, coarse)
    coarse_JD, sizes_J = coarse_JD[sizes_J > 0], sizes_J[sizes_J > 0]
    counts_J = allocate(sizes_J * (clusters / sample), np.ones_like(sizes_J), sizes_J, clusters)
    centroids, ends_J = _train_tree(run, how, order_S, np.cumsum(sizes_J), counts_J), np.cumsum(counts_J)
    tree = kmeans.AssignTree(coarse_JD, centroids, ends_J)
    tokens = {"centroids": _token(centroids), "coarse": _token(coarse_JD), "ends": digest(ends_J)}
    columns = run.column("assign", name, partial(_assign, name, tree), _assigned(clusters), **tokens)
    each = f"about {n // clusters:,} rows each, so that the time of a row does not grow"
    notes = (
        f"{counted(clusters, 'cluster')} chosen for {counted(n, 'row')} ({each}), in "
        f"{counted(len(ends_J), 'coarse cluster')}",
        f"k-means trained on {_TREE_SAMPLE} rows per cluster; give clusters for k-means without coarse clusters",
    )
    return Groups(columns["labels"], columns["distances"], centroids, notes)


def _train_tree(
    run: Run, how: Clustered, order_S: npt.NDArray[np.int64], ends_J: npt.NDArray[np.int64], counts_J: Any
) -> F32:
    """Run k-means in each coarse cluster, (K, D); cached, resumed at a coarse cluster.

    Args:
        run: The run.
        how: The parameters.
        order_S: (S,) positions of the training rows, those of the first coarse cluster first.
        ends_J: (J,) where the rows of each coarse cluster end.
        counts_J: (J,) number of clusters of each.
    """
    name = how.embedding
    precision, nearest, slack = _precision(run, how.precision)
    starts_J = np.cumsum(counts_J) - counts_J

    def fill(start: int) -> Iterator[tuple[F32]]:
        vectors = ordered()

        def tasks() -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
            for j in range(int(np.searchsorted(starts_J, start)), len(ends_J)):
                lo, hi = int(ends_J[j - 1]) if j else 0, int(ends_J[j])
                places = lo + (hi - lo) * np.arange(size := min(hi - lo, _TREE_TASK)) // size
                first = run.rng("kmeans-init", name, "tree", j).choice(size, counts_J[j], replace=False, shuffle=False)
                yield vectors.at(places), np.sort(first)

        train = partial(_train_part, vectors.store, name, how.iterations, nearest, slack)
        with run.progress.task(f"k-means: {counts_J.sum():,} clusters", len(order_S)) as advance:
            for j, centroids in enumerate(run.engine.map(train, tasks()), int(np.searchsorted(starts_J, start))):
                advance(int(ends_J[j]) - (int(ends_J[j - 1]) if j else 0))
                yield (centroids,)

    key = run.key(
        _train_part,
        of=name,
        order=digest(order_S),
        ends=digest(ends_J),
        counts=digest(counts_J),
        iterations=how.iterations,
        precision=precision,
        seed=run.seed,
    )
    specs = {"centroids": ArraySpec("float32", least=-2, most=2)}
    with run.in_order(name, order_S) as ordered:
        columns = run.cache.columns("kmeans.tree", key, specs, int(counts_J.sum()), fill, width=run.store.dim(name))
    return np.asarray(columns["centroids"])


def _train_part(
    store: EmbeddingStore,
    name: str,
    iterations: int,
    nearest: kmeans.Nearest,
    slack: float,
    task: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
) -> F32:
    """Run k-means on some rows, in memory and by one worker."""
    rows, first = task
    held = store.vectors_at(name, rows)

    def each(rule: kmeans.MoveRows, state: kmeans.State) -> Iterator[kmeans.Moves]:
        yield from _on_held(rule, (held, state.bounds(0, len(held))))

    state = kmeans.State.start(held[first], len(held))
    return kmeans.fit(each, held.__getitem__, state, iterations, nearest=nearest, slack=slack)


def centroids_of_array(run: Run, rows_ND: F32, k: int, iterations: int, purpose: str) -> F32:
    """Run k-means on unit rows in memory, such as the centroids of another k-means; cached.

    Args:
        run: The run, for its engine, cache and seed.
        rows_ND: (N, D) float32 unit rows.
        k: Number of clusters, at most N.
        iterations: Number of iterations.
        purpose: What the random start is for.

    Returns:
        (K, D) float32 unit rows.
    """

    def made() -> F32:
        start = np.sort(run.rng("kmeans-init", purpose, k).choice(len(rows_ND), k, replace=False, shuffle=False))
        state = kmeans.State.start(rows_ND[start], len(rows_ND))
        return kmeans.fit(partial(_each_held, run, rows_ND), rows_ND.__getitem__, state, iterations)

    key = run.key(centroids_of_array, rows=_token(rows_ND), k=k, iterations=iterations, purpose=purpose, seed=run.seed)
    spec = ArraySpec("float32", (k, rows_ND.shape[1]), least=-2, most=2)
    return np.asarray(run.cache.array("kmeans.array", key, made, spec))


def _each_held(run: Run, held: F32, rule: kmeans.MoveRows, state: kmeans.State) -> Iterator[kmeans.Moves]:
    size = run.store.block
    tasks = ((held[lo : lo + size], state.bounds(lo, lo + size)) for lo in range(0, len(held), size))
    return _moves(run.engine, partial(_on_held, rule), tasks)


def _moves(
    engine: Engine, fn: Callable[[Any], tuple[kmeans.Moves, kmeans.Moves]], tasks: Any
) -> Iterator[kmeans.Moves]:
    """Yield the bounds of each block, and then the changes of all."""
    done = reduced(engine, fn, tasks, kmeans.Moves.plus)
    yield from done
    if done.total is not None:
        yield done.total


def _on_held(rule: kmeans.MoveRows, task: tuple[F32, kmeans.Bounds]) -> tuple[kmeans.Moves, kmeans.Moves]:
    rows, bounds = task
    size = rule.stripe
    return rule((rows[lo : lo + size] for lo in range(0, len(rows), size)), bounds).apart()


def _each_stored(run: Run, name: str, rule: kmeans.MoveRows, state: kmeans.State) -> Iterator[kmeans.Moves]:
    tasks = ((block, state.bounds(block.lo, block.hi)) for block in run.blocks(name))
    return _moves(run.engine, partial(_on_stored, rule, name, run.store), tasks)


def _on_stored(
    rule: kmeans.MoveRows, name: str, store: EmbeddingStore, task: tuple[Block, kmeans.Bounds]
) -> tuple[kmeans.Moves, kmeans.Moves]:
    block, bounds = task
    return rule(store.stripes(name, block, rule.stripe), bounds).apart()
