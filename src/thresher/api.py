"""The functions of ``import thresher as th``: what the command line does, on files and on data in memory.

The command line calls the same functions. Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

from thresher.errors import UsageError, suggest
from thresher.resharding import PER_SHARD

if TYPE_CHECKING:
    from thresher.data.parts import Form
    from thresher.dynamic.policy import Policy
    from thresher.dynamic.run_folder import Training
    from thresher.embedding.pipeline import Embedded
    from thresher.export.keys import Chosen
    from thresher.pool.store import EmbeddingStore
    from thresher.pruning.clusters import Groups
    from thresher.pruning.recipe import Recipe
    from thresher.pruning.registry import Method
    from thresher.pruning.score_table import ScoreTable
    from thresher.pruning.scores import Scored
    from thresher.report.compare import Comparison
    from thresher.report.sweep import Sweep
    from thresher.resharding import Resharded
    from thresher.runtime.cache import Cache
    from thresher.runtime.engine import Engine
    from thresher.runtime.jobs import ArrayJob
    from thresher.runtime.progress import Progress
    from thresher.selection import Keep, Selection
    from thresher.viewer.server import Viewer

    Path: TypeAlias = str | os.PathLike[str]
    Pool: TypeAlias = Path | EmbeddingStore | Any  # or anything that from_arrays takes as image
    MethodLike: TypeAlias = Method | Recipe | Path | Mapping[str, Any] | Sequence[Any]

S = TypeVar("S")

__all__ = [
    "advise", "cluster", "compare", "coreset", "doctor", "embed", "evaluate", "evaluate_model", "inspect", "open",
    "prove", "reference", "reshard", "run_plan", "score", "select", "sweep", "train_clip", "train_moco", "view",
]  # fmt: skip


# --- pools ----------------------------------------------------------------------------------------


def open(pool: Path, *, cache: Path | None = None, **options: Any) -> EmbeddingStore:
    """Open a pool of embeddings: a folder or file with a known layout, local or at any fsspec location.

    Reads headers only. The store has N rows in file order, and no vectors in memory.

    Args:
        pool: The location.
        cache: The cache folder (default: the usual one).
        **options: What names and types in the files do not say: image, text, key, caption, dtype, metadata, skip_bad
            and reader, see :class:`thresher.Options`.

    Raises:
        PoolError: No layout is recognised, or a file is not usable.
        UsageError: An option is unknown, or the pool is data in memory: for that see :func:`from_arrays`.
    """
    from thresher.pool.layout import Options
    from thresher.pool.store import open_store

    return open_store(pool, _made(Options, "open", options), scratch=None if cache is None else os.fspath(cache))


# --- selections -----------------------------------------------------------------------------------


def select(
    pool: Pool,
    *methods: MethodLike,
    seed: int | None = None,
    within: Selection | Path | None = None,
    engine: str | Engine = "threads",
    workers: int | None = None,
    cache: Path | Cache | None = None,
    progress: bool | Progress = True,
) -> Selection:
    """Select rows of a pool with one or several methods, each on the rows that the one before kept.

        kept = th.select("pool/", th.SemDeDup(eps=0.1), th.Density(keep="40%"))
        train = kept.filter(dataset)

    Args:
        pool: The location of a pool, a store, or data in memory that :func:`from_arrays` takes: an array (N, D), a
            tensor, a frame or a Dataset with embeddings.
        *methods: Methods such as ``th.Density(keep="40%")``; recipes, by name or path of a TOML file or as a
            :class:`Recipe`; dictionaries such as ``{"method": "density", "keep": "40%"}``; or lists of these.
        seed: Seed of all randomness (default: that of the recipe, else 0).
        within: Start from an earlier selection of the same pool, or its folder.
        engine: Where work runs: "threads", "serial", "processes", the name of an engine of another package, or one.
        workers: Tasks that run at the same time (default: the cores that this process may use).
        cache: The cache folder (default: the usual one).
        progress: Whether to report progress, in a notebook below the cell and elsewhere on standard error, or an object
            to report it to.

    Returns:
        The selection: which of the N rows are kept, and why each of the others was dropped.

    Raises:
        UsageError: A method is unknown or cannot run, or ``within`` is of another pool.
        PoolError: The pool is damaged, has unusable rows, or changed during the run.
    """
    from thresher.pruning.recipe import run_steps

    steps, own = _steps(methods)
    if not steps:
        raise UsageError('give one method or more, such as thresher.Density(keep="40%"), or the name of a recipe')
    if len(own) > 1 and seed is None:
        raise UsageError(f"the recipes have the seeds {' and '.join(map(str, sorted(own)))}; give one with seed=")
    earlier = None if within is None else _selection("within", within)
    seed = next(iter(own), 0) if seed is None else seed
    resources = _resources(engine, workers, cache, progress)
    return run_steps(_store(pool, cache), steps, seed=seed, within=earlier, **resources)


def sweep(
    pool: Pool,
    method: str | type[Method],
    *,
    covariance: bool = True,
    seed: int = 0,
    within: Selection | Path | None = None,
    engine: str | Engine = "threads",
    workers: int | None = None,
    cache: Path | Cache | None = None,
    progress: bool | Progress = True,
    **parameters: Any,
) -> Sweep:
    """Select with several values of one parameter, and compare what each keeps, from one pass over the pool.

        table = th.sweep("pool/", "semdedup", eps=[0.005, 0.01, 0.02])
        table.to_pandas()

    Args:
        pool: As for :func:`select`.
        method: The name of a method, or its class.
        covariance: Also measure the error of the image-text cross-covariance, if the pool has both embeddings.
        seed: Seed of all randomness.
        within: Start from an earlier selection of the same pool, or its folder.
        engine: As for :func:`select`.
        workers: As for :func:`select`.
        cache: As for :func:`select`.
        progress: As for :func:`select`.
        **parameters: The parameters of the method; one of them a list of values, or a text such as "10%..90%".

    Returns:
        A table with a row per value: rows kept, duplicates, mean score, covariance error, coverage of the clusters.
        ``table.selections`` are the selections.

    Raises:
        UsageError: Not exactly one parameter is a list, or the method cannot run with one of the values.
    """
    from thresher.report.sweep import sweep, values_of

    name = method if isinstance(method, str) else method.name
    several = {key: value for key, value in parameters.items() if isinstance(value, (list, tuple))}
    several |= {key: values_of(value) for key, value in parameters.items() if isinstance(value, str) and ".." in value}
    if len(several) != 1:
        raise UsageError(f"{len(several)} parameters are lists of values; give one, such as eps=[0.01, 0.02]")
    ((parameter, values),) = several.items()
    others = {key: value for key, value in parameters.items() if key != parameter}
    earlier = None if within is None else _selection("within", within)
    how = {"seed": seed, "within": earlier, **_resources(engine, workers, cache, progress)}
    return sweep(_store(pool, cache), name, parameter, values, others, covariance=covariance, **how)


def score(
    pool: Pool,
    method: Scored | type[Scored] | str,
    *,
    out: Path | None = None,
    name: str | None = None,
    overwrite: bool = False,
    shard: str | ArrayJob | None = None,
    seed: int = 0,
    within: Selection | Path | None = None,
    engine: str | Engine = "threads",
    workers: int | None = None,
    cache: Path | Cache | None = None,
    progress: bool | Progress = True,
) -> ScoreTable:
    """Compute the scores of a method for the rows of a pool, without dropping any.

    Args:
        pool: As for :func:`select`.
        method: A scoring method: its name ("clip-score"), its class, or an object, whose budget is not used.
        out: A parquet file to write too, with the keys of the pool.
        name: The column of scores in the file (default: the name of the method).
        overwrite: Replace a different file.
        shard: "3/16": score only the rows of the third of 16 jobs, next to ``out``. A call without it, after all,
            writes the file. Only for methods that score each row by itself.
        seed: Seed of all randomness.
        within: Score only the rows that an earlier selection kept, or its folder.
        engine: As for :func:`select`.
        workers: As for :func:`select`.
        cache: As for :func:`select`.
        progress: As for :func:`select`.

    Returns:
        ``ids_n`` (n,) int64, the rows that were scored; ``values_n`` (n,), their scores, higher is better; ``info``.

    Raises:
        UsageError: The method is not a scoring method, or cannot run.
    """
    from thresher.pruning import score_table
    from thresher.pruning.scores import scorer

    if isinstance(method, type):
        method = method.name
    made = scorer(method) if isinstance(method, str) else method
    earlier = None if within is None else _selection("within", within)
    how = {"seed": seed, "within": earlier, **_resources(engine, workers, cache, progress)}
    store = _store(pool, cache)
    if out is None:
        if shard is not None:
            raise UsageError(f"shard={shard}: the jobs leave their scores next to a file; give out=")
        return score_table.score(store, made, **how)
    return score_table.write_scores(store, made, out, name=name, overwrite=overwrite, shard=_job(shard), **how)


def cluster(
    pool: Pool,
    clusters: int | None = None,
    *,
    out: Path | None = None,
    grow: Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    engine: str | Engine = "threads",
    workers: int | None = None,
    cache: Path | Cache | None = None,
    progress: bool | Progress = True,
    **parameters: Any,
) -> Groups:
    """Cluster the rows of a pool with spherical k-means; methods with the same parameters share the result.

    Args:
        pool: As for :func:`select`.
        clusters: K, the number of clusters (default: chosen from the number of rows).
        out: A folder to write too: centroids.npy, labels.npy, distances.npy and cluster.json.
        grow: Folder of clusters made before the pool grew: keep them and assign the new rows.
        overwrite: Replace different clusters in ``out``.
        seed: Seed of all randomness.
        engine: As for :func:`select`.
        workers: As for :func:`select`.
        cache: As for :func:`select`.
        progress: As for :func:`select`.
        **parameters: embedding ("image", "text" or "joint"), centroids, iterations, sample and precision, as methods
            that cluster have them.

    Returns:
        ``labels_N`` (n,) int32, ``distances_N`` (n,) float32 to the own centroid, ``centroids_KD`` (K, D) float32 and
        ``notes``. n is the number of rows of the pool; rows that are skipped as bad are left out.

    Raises:
        UsageError: A parameter is unknown or given with ``grow``, or there are more clusters than rows.
        OutputError: ``out`` holds something else, or cannot be written.
    """
    from dataclasses import replace

    from thresher.io.places import place
    from thresher.pruning.clusters import FILES, Clustered, cluster_pool, read_groups, write_groups
    from thresher.pruning.run import Run
    from thresher.runtime.results import free_folder, is_unfinished, record_in, refuse_other
    from thresher.selection import Selection

    if grow is not None and (given := [*({"clusters"} if clusters is not None else ()), *parameters]):
        raise UsageError(f"grow keeps the clusters of {os.fspath(grow)} as they are; leave out {', '.join(given)}")
    how = _made(Clustered, "cluster", {"clusters": clusters, **parameters})
    old = None if grow is None else read_groups(grow)
    store = _store(pool, cache)
    settings: dict[str, Any] = {"pool": store.layout.location, "seed": seed}
    names = ("clusters", "centroids", "iterations", "sample", "embedding", "precision")
    settings |= {name: getattr(how, name) for name in names}
    if out is not None:
        target = free_folder(place(out), overwrite, FILES, compared=True)
        if not is_unfinished(target) and (target / FILES[0]).exists() and not overwrite and old is None:
            refuse_other(target, record_in(target / FILES[0]), settings)
    start = Selection.everything("", store.layout.location, {}, store.total)
    run = Run(store, start, seed=seed, **_resources(engine, workers, cache, progress))
    groups, run = cluster_pool(run, how, old)
    if out is not None:
        settings["kernels"] = run.kernels
        if old is not None:
            settings |= {name: old.info.get(name) for name in ("seed", *names)} | {"grown": len(old.labels_N)}
        write_groups(groups, out, settings, within=run.so_far.mask(), overwrite=overwrite, say=run.progress.say)
    notes = (*(note for step in run.so_far.steps for note in step.notes), *groups.notes)
    return replace(groups, notes=notes, store=run.store)


def compare(
    *selections: Selection | Path | Mapping[str, Selection | Path],
    clusters: Path | Groups | None = None,
    worst: int = 10,
) -> Comparison:
    """Compare selections of one pool with each other.

    Args:
        *selections: Selections or their folders; or a dictionary of them by name. Folders are named by their path,
            other selections "1", "2" and so on by their place.
        clusters: Compare within these clusters: those of :func:`cluster`, or a folder of ``thresher cluster``; by
            default those of the step, in any of the selections, that clustered the most rows.
        worst: How many clusters to list, the largest differences first.

    Returns:
        A dictionary, shown as tables in a notebook: "rows", "kept" and "uses" by name,
        "pairs" (rows in both, overlap, Jaccard) and "clusters".

    Raises:
        UsageError: No selections, one is given twice, or they are of different pools.
    """
    from thresher.pruning.clusters import read_labels
    from thresher.report.compare import compare

    named: dict[str, Any] = {}
    for place, one in enumerate(selections, 1):
        if isinstance(one, Mapping):
            more = {name: _selection("compare", each) for name, each in one.items()}
        else:
            loaded = _selection("compare", one)
            more = {str(place) if one is loaded else _place("compare", one): loaded}
        if twice := named.keys() & more.keys():
            raise UsageError(f"a selection is given twice: {', '.join(sorted(twice))}")
        named |= more
    labels = None
    if clusters is not None:
        labels = read_labels(clusters) if isinstance(clusters, (str, os.PathLike)) else clusters.labels_N
    return compare(named, labels, worst)


def coreset(
    run: Path | Training, keep: str | int | float | Keep | None = None, *, pool: str | None = None
) -> Selection:
    """Select the rows of a pool that a training run found least redundant.

    Args:
        run: The folder of a training run with a policy that marks candidates.
        keep: How many rows to keep: "30%", 0.3 or a number. None for a run with ``sift``: all that match.
        pool: Where the pool is now, if it was moved.

    Raises:
        UsageError: The policy does not mark candidates, or has not marked any yet.
        PoolError: The folder is damaged, or the pool is another one.
    """
    from thresher.dynamic.coreset import coreset
    from thresher.dynamic.run_folder import Training

    return coreset(run if isinstance(run, Training) else Training.load(run), keep, pool=pool)


def advise(
    pool: Pool,
    samples_seen: int,
    runs: Path | None = None,
    *,
    metric: str | None = None,
    rows: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Say how much of a pool to keep for a number of samples seen, by a law of repetition fitted on your own runs.

    Args:
        pool: As for :func:`select`.
        samples_seen: Samples that training will see.
        runs: The folder of a lab with runs on this pool, or its results.json. None: nothing is fitted, and the result
            says what is not known.
        metric: Metric of the runs in percent, higher is better (default: the first that all have).
        rows: Rows of the lab's plan to use (default: all).
        seed: Seed of the bootstrap.

    Returns:
        See :func:`thresher.report.advise.advise`: "keep" with "keep_low" and "keep_high", and a "table" of shares.

    Raises:
        UsageError: The runs are too few, or do not have the metric.
        PoolError: The pool or the results cannot be read.
    """
    from thresher.report.advise import advise, read_runs

    total = len(_store(pool, None))
    name, found = ("", None) if runs is None else read_runs(runs, metric, rows)
    return advise(total, samples_seen, found, name, seed)


# --- look -----------------------------------------------------------------------------------------


def inspect(
    pool: Pool,
    *,
    quick: bool = False,
    engine: str | Engine = "threads",
    workers: int | None = None,
    cache: Path | Cache | None = None,
    progress: bool | Progress = True,
) -> dict[str, Any]:
    """Return what a pool contains, what looks wrong, and what a run will cost.

    Args:
        pool: As for :func:`select`.
        quick: Check about 100,000 rows instead of all.
        engine: As for :func:`select`.
        workers: As for :func:`select`.
        cache: As for :func:`select`.
        progress: As for :func:`select`.

    Returns:
        See :func:`thresher.check.pool.inspect`; "warnings" are sentences.
    """
    from thresher.check.pool import inspect
    from thresher.pruning.run import Run
    from thresher.selection import Selection

    store = _store(pool, cache)
    start = Selection.everything("", store.layout.location, {}, store.total)
    return inspect(Run(store, start, **_resources(engine, workers, cache, progress)), quick=quick)


def doctor(
    data: Path,
    *,
    sample: int = 1000,
    encoder: str | None = None,
    workers: int | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> dict[str, Any]:
    """Return what raw data contain, what looks wrong, and what embedding will cost.

    Args:
        data: Tars, parquet, Arrow, csv, JSON Lines, or a folder of images.
        sample: Number of images to decode.
        encoder: Also try this encoder, named as for :func:`embed`, and estimate its time.
        workers: Threads that decode (default: one per core).
        progress: As for :func:`select`.
        **options: How to read the data: image, caption, key, root and others of
            :class:`thresher.data.DataOptions`.

    Returns:
        See :func:`thresher.check.data.doctor`; "warnings" are sentences.
    """
    from thresher.check.data import doctor
    from thresher.data import DataOptions

    reading = _made(DataOptions, "doctor", options)
    return doctor(
        _place("data", data, "; thresher.inspect takes embeddings in memory"),
        reading,
        sample=sample,
        encoder=encoder,
        workers=workers,
        progress=_progress(progress),
    )


# --- raw data -------------------------------------------------------------------------------------


@overload
def embed(
    data: Any, out: Path | None = None, *, encoder: str, shard: None = None, **options: Any
) -> EmbeddingStore: ...


@overload
def embed(data: Any, out: Path, *, encoder: str, shard: str | ArrayJob, **options: Any) -> Embedded: ...


def embed(
    data: Any,
    out: Path | None = None,
    *,
    encoder: str,
    captions: Sequence[str] | None = None,
    overwrite: bool = False,
    retry_damaged: bool = False,
    engine: str | Engine | None = None,
    shard: str | ArrayJob | None = None,
    report: Callable[[Embedded], object] | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> EmbeddingStore | Embedded:
    """Embed images and captions, and return the pool as a store, on disk or in memory.

        store = th.embed(dataset, encoder="open_clip:ViT-B-32/openai")

    Args:
        data: A path or URL of raw data, as for ``thresher embed``; a Hugging Face Dataset; or a list of images (PIL
            images, bytes or paths), of pairs (image, caption) or of dictionaries.
        out: Folder of the pool. Without it, the pool is in memory, as float16 vectors.
        encoder: "open_clip:ARCH/PRETRAINED", "timm:NAME", "transformers:NAME" and others, see docs/encoders.md.
        captions: N captions, for a list of images.
        overwrite: Start from the beginning if the pool exists; otherwise the same call resumes.
        retry_damaged: Embed shards again whose data was damaged or lacked images.
        engine: Embed each shard as a task of an engine, such as "ray", with ``workers`` tasks at a time. By default the
            model runs here, and ``workers`` processes decode.
        shard: "3/16": do only the share of the third of 16 jobs. A call without it, after all, finishes the pool.
        report: Called with the counts: rows, new rows, skipped samples, damaged files, notes. By default they are
            reported as progress.
        progress: As for :func:`select`.
        **options: device, precision, batch_size, workers, thumbnails (pixels), pixel_limit and only of
            :class:`thresher.embedding.pipeline.EmbedSettings`; image, caption, key and others of
            :class:`thresher.data.DataOptions`.

    Returns:
        The store. Samples that cannot be used have no row; they are counted and listed. With ``shard``, the counts.

    Raises:
        UsageError: The data is something else, or an option or encoder does not exist.
        PoolError: No sample can be used.
        MissingExtraError: The encoder needs an extra that is not installed.
    """
    from thresher.data import DataOptions
    from thresher.embedding.memory import embed_samples
    from thresher.embedding.pipeline import EmbedSettings
    from thresher.runtime.engine import make_engine

    parts = _split(options, "embed", EmbedSettings, DataOptions)
    how: dict[str, Any] = {"overwrite": overwrite, "retry_damaged": retry_damaged, "progress": _progress(progress)}
    how["engine"] = make_engine(engine, parts[0].pop("workers", None)) if isinstance(engine, str) else engine
    how["shard"] = _job(shard)
    settings = EmbedSettings(encoder=encoder, **{"data": DataOptions(**parts[1]), **parts[0]})
    return embed_samples(data, captions, out, settings, report=report, **how)


def reshard(
    data: Path,
    kept: Selection | Chosen,
    out: Path,
    *,
    form: Form | None = None,
    per_shard: int = PER_SHARD,
    shuffle: int | None = None,
    trainable: bool | None = None,
    for_hub: bool = False,
    for_energon: bool = False,
    for_dali: bool = False,
    workers: int | None = None,
    processes: bool = False,
    engine: str | Engine | None = None,
    shard: str | ArrayJob | None = None,
    overwrite: bool = False,
    pool: Path | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> Resharded:
    """Copy the samples that a selection keeps into new shards; images are decoded only to convert them.

    Args:
        data: The raw data: tars, parquet, a csv of open_clip, or a folder of images.
        kept: A selection, its folder, or a file of keys.
        out: Folder of the new shards.
        form: "webdataset", "parquet" or "csv" (default: that of ``data``).
        per_shard: Samples per shard.
        shuffle: Seed of a permutation of all samples; None for the order of ``data``.
        trainable: Write tars of which open_clip trains on every sample: images in other formats than JPEG, PNG and WebP
            become PNG, captions .txt (default: if ``data`` is not tars).
        for_hub: Write Parquet for the Hugging Face Hub: chunks by content, so that a later version of a file shares
            most of its bytes, row groups of about 100 MB, and images declared as such for the viewer.
        for_energon: Also write what Megatron Energon reads of tars, so that ``energon prepare`` is not needed.
        for_dali: Also write an index next to each tar, so that ``wds2idx`` of NVIDIA DALI is not needed.
        workers: Shards written at the same time (default: the cores that this process may use).
        processes: Read the headers of large local tars in ``workers`` processes; a script that does so needs
            ``if __name__ == "__main__":``.
        engine: Read and write on an engine, such as "ray", instead of threads of this machine.
        shard: "3/16": do only the share of the third of 16 jobs. A call without it, after all, writes the result.
        overwrite: Replace a result of other arguments.
        pool: Where the pool of the selection is now, if it was moved.
        progress: As for :func:`select`.
        **options: How to read the data, see :class:`thresher.data.DataOptions`.

    Returns:
        Counts: samples written, keys that the data does not have, damaged files.

    Raises:
        UsageError: The data cannot be written in this form, or a key belongs to several samples.
        PoolError: Data or selection cannot be read, or have no sample in common.
        OutputError: ``out`` holds other files, is inside the data, or cannot be written.
    """
    from thresher.data import DataOptions
    from thresher.resharding import reshard
    from thresher.runtime.engine import make_engine

    return reshard(
        _place("data", data), kept, _place("out", out), form=form,
        per_shard=per_shard, shuffle=shuffle, trainable=trainable, for_hub=for_hub, for_energon=for_energon,
        for_dali=for_dali,
        workers=workers, processes=processes, overwrite=overwrite, options=_made(DataOptions, "reshard", options),
        pool=None if pool is None else os.fspath(pool), progress=_progress(progress),
        engine=make_engine(engine, workers) if isinstance(engine, str) else engine, shard=_job(shard),
    )  # fmt: skip


# --- training -------------------------------------------------------------------------------------


def train_clip(
    data: Path,
    out: Path,
    *,
    policy: str | Policy = "full",
    resume: bool = False,
    progress: bool | Progress = True,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train a CLIP model on image-text pairs, and prune the data while it trains.

        log = th.train_clip("train.parquet", "run", policy=th.InfoBatch(), epochs=30)

    Args:
        data: Parquet with images and captions, tars, or a csv of open_clip.
        out: Folder of the run.
        policy: A pruning policy or its name.
        resume: Resume the run in ``out``, if there is one.
        progress: As for :func:`select`.
        **settings: epochs (default: 10) or samples, batch_size, prune, selection, seed, lr, evals and others of
            :class:`thresher.train.loop.Schedule`; model, loss and others of :class:`thresher.train.clip.ClipSettings`;
            image, caption and others of :class:`thresher.data.DataOptions`.

    Returns:
        The log, one dictionary per epoch.

    Raises:
        UsageError, PoolError, OutputError: Settings, data or folder cannot be used; raised before training starts.
        MissingExtraError: The extra ``train`` is not installed.
    """
    from thresher.train.clip import ClipSettings, train_clip

    made, reading = _training(ClipSettings, "train_clip", policy, settings)
    return train_clip(
        _place("data", data), _place("out", out), made, resume=resume, progress=_progress(progress), reading=reading
    )


def train_moco(
    data: Path,
    out: Path,
    *,
    policy: str | Policy = "full",
    resume: bool = False,
    progress: bool | Progress = True,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train an image encoder with MoCo, without captions, and prune the data while it trains.

    Args:
        data: Parquet with images, tars, or a csv of open_clip.
        out: Folder of the run.
        policy: A pruning policy or its name.
        resume: Resume the run in ``out``, if there is one.
        progress: As for :func:`select`.
        **settings: As for :func:`train_clip`, with those of :class:`thresher.train.moco.MocoSettings` for the model.

    Returns:
        The log, one dictionary per epoch.

    Raises:
        UsageError, PoolError, OutputError: Settings, data or folder cannot be used; raised before training starts.
        MissingExtraError: The extra ``train`` is not installed.
    """
    from thresher.train.moco import MocoSettings, train_moco

    made, reading = _training(MocoSettings, "train_moco", policy, settings)
    return train_moco(
        _place("data", data), _place("out", out), made, resume=resume, progress=_progress(progress), reading=reading
    )


def reference(
    data: Path | None,
    out: Path,
    *,
    pool: Pool | None = None,
    run: Path | None = None,
    overwrite: bool = False,
    progress: bool | Progress = True,
    **settings: Any,
) -> dict[str, Any]:
    """Write a loss of every row under a reference model to a file, for the policy ``rho``.

        cost = th.reference("train.parquet", "ref.parquet", epochs=4)
        th.train_clip("train.parquet", "run", policy=th.Rho(reference="ref.parquet"))

    Small models are trained, each without one part of the data, and score the part that they have not seen. Or the
    embeddings stored in a pool give the losses: that is help from the model that made the pool.

    Args:
        data: Data as for :func:`train_clip`; None with ``pool``.
        out: Parquet file to write: a key and a loss per row. Its cost is written to ``<name>.cost.json`` next to it.
        pool: A pool with embeddings of images and captions in one space, instead of data.
        run: Folder of the training runs (default: the name of ``out`` with "-run" added). A run that was killed there
            resumes.
        overwrite: Replace a file that was made in another way.
        progress: As for :func:`select`.
        **settings: folds (default: 2), epochs (default: 4), and all others of :func:`train_clip` but a policy; with a
            pool key, batch_size, temperature, seed, engine and cache.

    Returns:
        How the losses were made, the counts of rows, and what it cost: "gradient_samples", "scored_forwards" and
        "seconds".

    Raises:
        UsageError, PoolError, OutputError: Settings, data, pool or file cannot be used.
        MissingExtraError: The extra ``train`` is not installed, which only training needs.
    """
    if (data is None) == (pool is None):
        raise UsageError("give either data to train on, or a pool whose stored embeddings give the losses")
    if data is None:
        from thresher.pruning.reference_losses import references_from_pool

        if run is not None:
            raise UsageError("run is the folder of training runs; nothing is trained with a pool")
        own = ("key", "batch_size", "temperature", "seed", "engine", "cache")
        if odd := [name for name in settings if name not in own]:
            raise UsageError(
                f"reference of a pool has no option {odd[0]!r}; it has {', '.join(own)}.{suggest(odd[0], own)}"
            )
        key = settings.pop("key", None)
        store = _store(pool, settings.get("cache")) if key is None else open(str(pool), key=key)
        made = _resources(settings.pop("engine", "threads"), None, settings.pop("cache", None), progress)
        return references_from_pool(store, out, overwrite=overwrite, **settings, **made)
    from thresher.data.location import refuse_inside
    from thresher.pruning.reference_losses import check_references_target, write_references
    from thresher.train.cross_fit import CrossFitSettings, cross_fit

    if odd := [name for name in ("policy", "prune", "options", "selection") if name in settings]:
        raise UsageError(f"reference has no option {odd[0]!r}: a reference model is trained on all rows of its part")
    if "epochs" not in settings and "samples" not in settings:
        settings["epochs"] = 4
    made_of, reading = _training(CrossFitSettings, "reference", "full", settings)
    shown = _progress(progress)
    request = made_of.request(data)
    path = check_references_target(out, request, overwrite=overwrite)
    refuse_inside(data, path)
    folder = os.fspath(run) if run is not None else f"{path.with_suffix('')}-run"
    fitted = cross_fit(data, folder, made_of, progress=shown, reading=reading)
    batches = [(fitted.keys, fitted.losses_N)]
    return write_references(path, batches, request, fitted.cost(), overwrite=overwrite, progress=shown)


def run_plan(
    plan: Path,
    out: Path | None = None,
    *,
    profile: str | None = None,
    data: Path = ".",
    train: Path | None = None,
    evals: Sequence[Path] = (),
    labels: Sequence[str] = (),
    seeds: int | None = None,
    rows: Sequence[str] = (),
    corpora: Sequence[str] = (),
    workers: int | None = None,
    minutes: float | None = None,
    engine: str | Engine | None = None,
    reuse: Sequence[Path] = (),
    dry_run: bool = False,
    progress: bool | Progress = True,
) -> dict[str, Any]:
    """Run a plan of experiments: policies and selections, with several seeds, and a table with intervals.

    Args:
        plan: A TOML file, or the name of a plan that comes with thresher, such as "scan-clip".
        out: Folder of the results: results.json, table.md, plot.png and details.json. The same call resumes.
        profile: Profile of the plan, such as "cpu".
        data: Folder of the data that the plan names by a relative path.
        train: Train on these data instead.
        evals: Evaluate on these sets instead, parquet.
        labels: Class columns of the evaluation sets instead.
        seeds: Number of seeds instead.
        rows: Run only these rows, and full.
        corpora: Run only these corpora.
        workers: Runs at the same time (default: as many as fit the cores).
        minutes: Stop after this time; the same call continues.
        engine: Run on the workers of an engine, such as "ray"; they must see the folder and the data.
        reuse: Folders of other plans on the same data, or their details.json; runs that they have finished are taken
            where they are the same.
        dry_run: Only check the plan and its data, and return what would run.
        progress: As for :func:`select`.

    Returns:
        The content of results.json: "plan", and "runs" with row, seed, metrics in percent, samples_seen,
        scored_forwards, seconds and share_pruned. With ``dry_run`` see :func:`thresher.lab.runner.described`.

    Raises:
        UsageError: The plan is not valid or does not fit the data, or a run failed.
        PoolError: Data are missing or damaged.
        OutputError: ``out`` has results of another plan, or cannot be written.
    """
    import json
    from dataclasses import replace

    from thresher.lab import runner
    from thresher.lab.plan import Plan
    from thresher.lab.results import RESULTS
    from thresher.pool.store import absolute
    from thresher.runtime.engine import make_engine
    from thresher.runtime.places import local_path

    made = Plan.load(os.fspath(plan), profile).narrowed(rows, corpora, seeds)
    here: dict[str, Any] = {"train": absolute(os.fspath(train))} if train is not None else {}
    if evals:
        here["evals"] = tuple(absolute(os.fspath(one)) for one in evals)
    made = replace(made, data=replace(made.data, **here))
    if labels:
        made = replace(made, evaluation=replace(made.evaluation, labels=tuple(labels)))
    made.check_selections()
    if dry_run:
        return runner.described(made, data)
    if out is None:
        raise UsageError("give the folder of the results, or dry_run=True")
    how: dict[str, Any] = {"workers": workers, "minutes": minutes, "others": reuse, "progress": _progress(progress)}
    how["engine"] = make_engine(engine, workers) if isinstance(engine, str) else engine
    runner.run_plan(made, out, data=data, **how)
    result: dict[str, Any] = json.loads((local_path(out) / RESULTS).read_text(encoding="utf-8"))
    return result


def prove(
    data: Path,
    out: Path,
    *,
    method: str | None = None,
    policy: str | None = None,
    selection: Path | None = None,
    keep: str | float = "70%",
    workers: int | None = None,
    progress: bool | Progress = True,
    **settings: Any,
) -> dict[str, Any]:
    """Train on the rows that a method or policy chooses, on all rows, and on random rows; say what that shows.

    Args:
        data: The data: anything that :func:`train_clip` reads.
        out: Folder of the results, as of :func:`run_plan`. The same call resumes.
        method: A method that selects rows (default: density, if nothing else is given), or
        policy: a policy that prunes while training, or
        selection: an earlier selection of these data, or its folder.
        keep: Share of the rows to keep, or of the samples to train on.
        workers: Runs at the same time (default: as many as fit the cores).
        progress: As for :func:`select`.
        **settings: evals, labels, seeds (3), epochs (8), model ("tiny"), batch_size, device, options and rows of
            :class:`thresher.lab.prove.Question`.

    Returns:
        "sentence", and the content of results.json.

    Raises:
        UsageError: A parameter is not allowed, or a run failed.
        PoolError: Data are missing or damaged.
        OutputError: ``out`` has other results, or cannot be written.
    """
    import json

    from thresher.lab.prove import Question, cut_data, sentence, write_sentence
    from thresher.lab.results import RESULTS
    from thresher.lab.runner import run_plan
    from thresher.pool.store import absolute
    from thresher.runtime.parameters import share_of
    from thresher.runtime.places import local_path

    if method is None and policy is None and selection is None:
        method = "density"
    for option in ("evals", "labels"):
        given = settings.get(option, ())
        settings[option] = (
            (os.fspath(given),) if isinstance(given, (str, os.PathLike)) else tuple(map(os.fspath, given))
        )
    share = share_of(keep) if isinstance(keep, str) else keep
    chosen = None if selection is None else absolute(os.fspath(selection))
    question = _made(
        Question, "prove", {"method": method, "policy": policy, "selection": chosen, "keep": share, **settings}
    )
    folder, shown = local_path(out), _progress(progress)
    train, evals = cut_data(question, absolute(os.fspath(data)), folder / "data")
    plan = question.plan(folder, train, [absolute(path) for path in evals])
    text = sentence(question, run_plan(plan, folder, workers=workers, progress=shown))
    write_sentence(folder, text)
    result: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    return {"sentence": text, **result}


def evaluate(
    image: Any,
    text: Any = None,
    *,
    groups: Any = None,
    classes: Any = None,
    labels: Any = None,
) -> dict[str, dict[str, float]]:
    """Evaluate embeddings: retrieval between images and captions, and zero-shot classification of images.

    Args:
        image: (N, D) image embeddings: an array or a tensor. Or a store or the location of a pool, whose vectors are
            read into memory.
        text: (N, D) embeddings of the captions, for retrieval (of a pool: its own).
        groups: (N,) numbers or texts; rows of a group count as the same in retrieval. By default all rows differ.
        classes: (C, D) embeddings of class names, for zero-shot classification, as ``thresher embed-classes`` makes
            them: an array, or a .npy file.
        labels: (N,) the number of each row's class, -1 for none.

    Returns:
        "retrieval", with "image_to_text_R@1" and others, and "zero_shot", with "top1" and others: shares from 0 to 1,
        see :mod:`thresher.evaluation`.

    Raises:
        UsageError: Shapes do not fit, or there is nothing to evaluate.
    """
    import numpy as np

    from thresher.evaluation.retrieval import retrieval
    from thresher.evaluation.zero_shot import zero_shot
    from thresher.pool.memory import array_of
    from thresher.pool.store import EmbeddingStore

    if isinstance(image, (str, os.PathLike, EmbeddingStore)):
        store = _store(image, None)
        found = {
            name: np.concatenate([store.vectors(name, block) for block in store.blocks(name)])
            for name in store.layout.vectors
        }
        image, text = found.get("image"), found.get("text") if text is None else text
    if (classes is None) != (labels is None):
        raise UsageError("zero-shot classification needs classes and labels; give both")
    if isinstance(classes, (str, os.PathLike)):
        from thresher.io.npy import npy_piece
        from thresher.io.places import located

        piece = npy_piece(*located(classes))
        classes = piece.read(0, piece.rows)
    if image is None or (text is None and classes is None):
        raise UsageError("give embeddings of images, and either those of their captions or classes and labels")
    results: dict[str, dict[str, float]] = {}
    vectors = array_of(image)
    if text is not None:
        results["retrieval"] = retrieval(vectors, array_of(text), image_group_N=groups, text_group_M=groups)
    if classes is not None:
        results["zero_shot"] = zero_shot(vectors, array_of(classes), np.asarray(labels))
    return results


def evaluate_model(
    model: str,
    data: Path | Sequence[Path],
    *,
    out: Path | None = None,
    device: str = "auto",
    precision: str = "float32",
    seed: int = 0,
    progress: bool | Progress = True,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Evaluate a model: zero-shot classification, retrieval, kNN and linear probes, with bootstrap intervals.

    Args:
        model: The name of an encoder, as for :func:`embed`; the folder of a training run; or the log folder of the
            trainer of open_clip.
        data: Evaluation sets: parquet, webdatasets of CLIP_benchmark, folders of classes, Hugging Face datasets on
            disk; or one suite, a TOML file.
        out: A file for the results, JSON Lines, such as eval_results.jsonl.
        device: As for :func:`embed`.
        precision: As for :func:`embed`.
        seed: Seed of the halves of a set that kNN and probes are fitted and tested on, if it has no training rows.
        progress: As for :func:`select`.
        **settings: For all sets: train, tasks, labels, group, text and templates, see
            :class:`thresher.lab.evaluate.SetSettings`.

    Returns:
        See :func:`thresher.lab.evaluate.evaluate_model`; metrics are shares.

    Raises:
        UsageError: The model or a set has not what a task needs.
        PoolError: A set is missing or damaged.
        OutputError: The results cannot be written; this is checked first. A file of results is replaced.
    """
    from thresher.lab.evaluate import SetSettings, Suite, check_target, evaluate_model, write_results
    from thresher.lab.model import load_model
    from thresher.runtime.places import local_path

    paths = [os.fspath(data)] if isinstance(data, (str, os.PathLike)) else [os.fspath(one) for one in data]
    if not paths:
        raise UsageError("give one evaluation set or more, or a suite")
    for option in ("tasks", "labels", "templates"):
        given = settings.get(option, ())
        settings[option] = (given,) if isinstance(given, str) else tuple(given)
    if len(paths) == 1 and paths[0].lower().endswith(".toml"):
        if odd := [name for name, value in settings.items() if value]:
            raise UsageError(f"{paths[0]} is a suite, which has its own {odd[0]}; leave that out")
        suite = Suite.load(paths[0])
    else:
        made = (_made(SetSettings, "evaluate_model", {"data": path, **settings}) for path in paths)
        suite = Suite(name="given", sets=tuple(made))
    target = None if out is None else local_path(out)
    if target is not None:
        check_target(target)
    encoder = load_model(model, device=device, precision=precision)
    results = evaluate_model(encoder, suite, seed=seed, progress=_progress(progress))
    if target is not None:
        write_results(results, target)
    return results


def view(
    *what: Any,
    host: str = "127.0.0.1",
    port: int = 0,
    names: Sequence[str] = (),
    out: Path | None = None,
    pool: Path | None = None,
    metadata: Path | None = None,
    cache: Path | Cache | None = None,
) -> Viewer:
    """Show selections, training runs or a pool in the browser; returns at once.

    Args:
        *what: One to five selections of one pool, training runs, or one pool: paths or objects.
        host: The address to listen at; any other than a loopback one can be reached from other machines.
        port: The port; 0 for a free one.
        names: Other names under which the server is called, such as that of a Jupyter server in front of it.
        out: The folder in which the page may save selections (default: where the first selection is).
        pool: New location of the pool of selections or runs, if it was moved.
        metadata: New location of joined metadata, if it was moved.
        cache: The cache folder (default: the usual one).

    Returns:
        The running server, with ``url`` and ``close()``.

    Raises:
        UsageError: Too many selections, of different pools, or something that cannot be shown.
        PoolError: Something cannot be opened.
        OutputError: The server cannot listen there.
        MissingExtraError: The extra ``view`` is not installed.
    """
    from thresher.runtime.cache import Cache
    from thresher.viewer.server import show

    where = {
        name: None if value is None else os.fspath(value) for name, value in (("pool", pool), ("metadata", metadata))
    }
    made = cache if isinstance(cache, Cache) else Cache.at(None if cache is None else os.fspath(cache))
    return show(what, host=host, port=port, names=tuple(names), out=out, cache=made, **where)


# --- arguments ------------------------------------------------------------------------------------


def _place(argument: str, value: Any, instead: str = "") -> str:
    """Return a path or URL.

    Raises:
        UsageError: It is something else, such as data in memory.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{argument}: {type(value).__name__}; give a path or URL{instead}")
    return os.fspath(value)


def _selection(argument: str, value: Any) -> Selection:
    """Return a selection: as given, or loaded from its folder."""
    from thresher.selection import Selection

    if isinstance(value, Selection):
        return value
    return Selection.load(_place(argument, value, " of a selection, or the selection"))


def _store(pool: Pool, cache: Path | Cache | None) -> EmbeddingStore:
    """Return a store: as given, opened, or made of data in memory."""
    from thresher.pool.memory import from_arrays
    from thresher.pool.store import EmbeddingStore, open_store

    if isinstance(pool, EmbeddingStore):
        return pool
    from thresher.runtime.cache import Cache

    folder = None if cache is None else os.fspath(cache.folder if isinstance(cache, Cache) else cache)
    if isinstance(pool, (str, os.PathLike)):
        return open_store(pool, scratch=folder)
    return from_arrays(pool, cache=folder)


def _steps(given: Iterable[Any]) -> tuple[list[Method], set[int]]:
    """Return methods, and the seeds of the recipes among them."""
    from thresher.pruning.recipe import Recipe, shipped_recipes
    from thresher.pruning.registry import METHODS, build

    steps: list[Any] = []
    seeds: set[int] = set()
    for one in given:
        if isinstance(one, (str, os.PathLike)):
            name = os.fspath(one)
            if name not in shipped_recipes() and not os.path.exists(name) and name in METHODS.names():
                raise UsageError(
                    f"{name} is a method with parameters: give thresher.{METHODS.find(name).__name__}(...)"
                )
            one = Recipe.load(name)
        if isinstance(one, Recipe):
            steps += one.steps
            seeds.add(one.seed)
        elif isinstance(one, Mapping):
            if not isinstance(one.get("method"), str):
                raise UsageError(f'{one!r} names no method; write {{"method": "density", "keep": "40%"}}')
            steps.append(build(one["method"], {name: value for name, value in one.items() if name != "method"}))
        elif isinstance(one, (list, tuple)):
            more, others = _steps(one)
            steps += more
            seeds |= others
        elif isinstance(one, type) or not hasattr(one, "select"):
            what = f"the class {one.__name__}; give its parameters" if isinstance(one, type) else type(one).__name__
            raise UsageError(f"a method is an object such as thresher.Density(keep='40%'), or a recipe; not {what}")
        else:
            steps.append(one)
    return steps, seeds


def _job(shard: str | ArrayJob | None) -> ArrayJob | None:
    from thresher.runtime.jobs import ArrayJob

    return ArrayJob.parse(shard) if isinstance(shard, str) else shard


def _resources(
    engine: str | Engine, workers: int | None, cache: Path | Cache | None, progress: bool | Progress
) -> dict[str, Any]:
    """Return engine, cache and progress for a run."""
    from thresher.runtime.cache import Cache
    from thresher.runtime.engine import make_engine

    return {
        "engine": make_engine(engine, workers) if isinstance(engine, str) else engine,
        "cache": cache if isinstance(cache, Cache) else Cache.at(None if cache is None else os.fspath(cache)),
        "progress": _progress(progress),
    }


def _progress(progress: bool | Progress) -> Progress:
    from thresher.runtime.progress import progress_for

    return progress_for(quiet=not progress) if isinstance(progress, bool) else progress


def _split(options: Mapping[str, Any], name: str, *classes: type[Any]) -> list[dict[str, Any]]:
    """Return the options of each of several dataclasses.

    Raises:
        UsageError: None of them has an option; the message suggests a similar name. Or a number is too large.
    """
    from dataclasses import fields

    from thresher.runtime.parameters import check_size

    known = [{item.name for item in fields(cls) if item.init} for cls in classes]
    every = sorted(set().union(*known))
    for option, value in options.items():
        check_size(f"{name}: {option}", value)
        if option not in every:
            raise UsageError(f"{name} has no option {option!r}; it has {', '.join(every)}.{suggest(option, every)}")
    return [{option: value for option, value in options.items() if option in own} for own in known]


def _made(cls: type[S], name: str, options: Mapping[str, Any]) -> S:
    return cls(**_split(options, name, cls)[0])


def _training(cls: type[S], name: str, policy: str | Policy, settings: Mapping[str, Any]) -> tuple[S, Any]:
    """Return the settings of a trainer, and how to read its data."""
    from dataclasses import MISSING

    from thresher.data import DataOptions
    from thresher.dynamic.registry import options_of
    from thresher.train.loop import Schedule

    own, schedule, reading = _split(settings, name, cls, Schedule, DataOptions)
    if not isinstance(policy, str):
        given = {item.name: getattr(policy, item.name) for item in options_of(type(policy))}
        defaults = {item.name: item.default for item in options_of(type(policy)) if item.default is not MISSING}
        changed = {option: value for option, value in given.items() if value != defaults.get(option, MISSING)}
        schedule["options"] = {**changed, **(schedule.get("options") or {})}
        policy = policy.name
    if "epochs" not in schedule and "samples" not in schedule:
        schedule["epochs"] = 10
    for option in ("evals", "eval_labels", "templates"):
        for part in (own, schedule):
            if isinstance(part.get(option), (str, os.PathLike)):
                part[option] = (os.fspath(part[option]),)
            elif option in part:
                part[option] = tuple(part[option])
    return cls(**{"schedule": Schedule(policy=policy, **schedule), **own}), DataOptions(**reading)
