"""The jobs of a plan, each done in a process of its own: ``python -m thresher.lab.work JOB.json``.

A job is a folder with ``job.json`` (what to do), ``output.txt`` (what it printed), and at the end ``result.json``. A
job that was killed is done again from its last checkpoint, with the same result.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from thresher.dynamic.run_folder import CHECKPOINT, MARK, Training
from thresher.errors import OutputError, PoolError, ThresherError, UsageError
from thresher.io.paths import is_unsafe, visible
from thresher.lab.corpus import INDEX, cut_in_halves, make_corpus
from thresher.lab.metrics import metrics_of
from thresher.lab.plan import CLUSTERS, EARLY, Corpus, Evaluation, Proxy, Row, Trainer
from thresher.pool.store import absolute
from thresher.runtime.files import writing
from thresher.runtime.memory import OUT_OF_MEMORY, is_out_of_memory
from thresher.runtime.parameters import build
from thresher.runtime.progress import Lines
from thresher.runtime.untrusted import Fields, read_json

JOB, RESULT, OUTPUT = "job.json", "result.json", "output.txt"
TRAIN = "train.parquet"  # in the folder of a changed corpus
# The tables of a job.json.
KINDS: Mapping[str, Any] = {
    "corpus": Corpus, "trainer": Trainer, "evaluation": Evaluation, "proxy": Proxy, "row": Row,
}  # fmt: skip
# The cost of a row before anything.
_NOTHING: Mapping[str, Any] = {"scored_forwards": 0, "seconds": 0.0, "images_decoded": 0}
_COST = ".cost.json"  # ending of the cost of a part of a job, written when the part is done
_MOST = 1e18  # of a number in a result
_COUNTS = ("samples_seen", *_NOTHING)  # of a run
_RATES = ("samples_per_second", "other_seconds")  # of the trial run
PRECISIONS = ("float32", "bfloat16")  # of a run
_PLANTED = ("base", "swapped", "duplicate", "off-topic")  # rows of a corpus
_TRIAL = 40  # steps of the trial run
_PLACES = ("data", "selection", "options", "reference", "concepts")  # settings of a run that name files


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a job needs to know.

    Attributes:
        folder: Folder of the job.
        corpus: What is done to the training data.
        trainer: How to train.
        evaluation: How to evaluate.
        proxy: The model that selections are made from.
        data: The training data: of the plan for the job that makes the corpus, of the corpus for all others.
        evals: Evaluation sets, or their halves.
        off_topic: Data of off-topic rows.
        rows: Rows of the corpus, 0 before it is made.
        seed: Seed of a run.
        row: The row of the table, for a run.
        results: Folders of the jobs that this one needs, by purpose.
    """

    folder: Path
    corpus: Corpus
    trainer: Trainer
    evaluation: Evaluation
    proxy: Proxy
    data: str
    evals: tuple[str, ...]
    off_topic: str = ""
    rows: int = 0
    seed: int = 0
    row: Row | None = None
    results: Mapping[str, str] | None = None

    def result_of(self, purpose: str) -> tuple[Path, dict[str, Any]]:
        """Return the folder and the result of a job that this one needs."""
        folder = Path((self.results or {})[purpose])
        return folder, read_result(folder, "run" if purpose == "coreset" else purpose)


def read_result(folder: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Return the result of a finished job of a kind; the folder may come from someone else.

    Raises:
        FileNotFoundError: It is not there.
        OutputError: It is damaged, or not a result of this kind.
    """
    path = Path(folder) / RESULT
    result = read_own(path)
    try:
        check_result(Fields(result, str(path)), kind)
    except PoolError as error:
        raise OutputError(f"{error}; remove its folder") from None
    return result


def check_result(result: Fields, kind: str) -> None:
    """Check every value of a result that is used."""
    if kind == "corpus":
        result.whole("rows", 1, 2**40)
        for name in _PLANTED:
            if name in result.values:
                result.whole(name)
        if any(is_unsafe(name) or "/" in name or "\0" in name for name in result.texts("evals")):
            raise result.wrong("evals", "a list of names of files")
        return
    least = {"trial": _RATES, "run": _COUNTS}.get(kind, tuple(_NOTHING))
    for name in least:
        if result.number(name, 0.0, _MOST) is None:
            raise result.wrong(name, "a number from 0")
    if kind == "trial" and not result.values["samples_per_second"]:
        raise result.wrong("samples_per_second", "a number above 0")
    if kind != "run":
        return
    if result.number("share_pruned", -_MOST, 1.0) is None:
        raise result.wrong("share_pruned", "a number up to 1")
    if result.values.get("precision", PRECISIONS[0]) not in PRECISIONS:  # results of older versions have none
        raise result.wrong("precision", " or ".join(PRECISIONS))
    if result.values.get("at_once") is not None:  # nor this
        result.whole("at_once", 1)
    metrics = result.object("metrics")
    for name in metrics.values:
        if metrics.number(name, 0.0, 100.0) is None:
            raise metrics.wrong(name, "a number from 0 to 100")
    for shares in ("kept", "left_out"):
        kinds = Fields(result.values.get(shares) or {}, f"{result.where}: {shares}")
        for name in kinds.values:
            counts = kinds.object(name)
            counts.whole("left_out", 0, counts.whole("rows", 1))


def read_own(path: Path) -> dict[str, Any]:
    """Return a JSON object that was written to the folder of a plan.

    Raises:
        FileNotFoundError: It is not there.
        OutputError: It is damaged.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None
    if not isinstance(value, dict):
        raise damaged(path, "it is not an object")
    return value


def damaged(path: Path, why: object) -> OutputError:
    """Return the error for a file of a plan that cannot be read."""
    return OutputError(f"{path}: cannot be read, it may be damaged ({why}); remove its folder")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with writing(path) as scratch:
        Path(scratch).write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def has_work(folder: Path) -> bool:
    """Return whether the folder of a job has something that took long: a result, a checkpoint, or embeddings."""
    from thresher.embedding.pool import FOLDERS

    return any(any(folder.rglob(name)) for name in (RESULT, CHECKPOINT, f"*{_COST}", f"{FOLDERS['image']}/*.npy"))


# --- jobs -----------------------------------------------------------------------------------------


def corpus(task: Task) -> dict[str, Any]:
    """Make the corpus, and the two halves of every evaluation set."""
    begin, captions = time.monotonic(), task.trainer.task == "clip"
    made = make_corpus(task.corpus, task.data, task.off_topic, task.folder / TRAIN, captions=captions)
    halves = [
        half
        for path in task.evals
        for half in cut_in_halves(path, task.folder, group=task.evaluation.group, labels=task.evaluation.labels, seed=0)
    ]
    return {**made, "evals": [os.path.basename(half) for half in halves], "seconds": time.monotonic() - begin}


def trial(task: Task) -> dict[str, Any]:
    """Train for a few steps, to say what a run will cost; nothing of it is used."""
    shutil.rmtree(task.folder / "run", ignore_errors=True)  # of a trial that was killed: only a whole one is timed
    begin = time.monotonic()
    samples = min(_TRIAL * task.trainer.batch_size, task.trainer.samples(task.rows, 1.0))
    log = _train(task, task.folder / "run", evals=task.evals, samples=samples, checkpoint_minutes=60.0)
    spent = sum(entry["seconds"] for entry in log)
    shutil.rmtree(task.folder / "run")
    return {
        "samples_per_second": sum(entry["samples"] for entry in log) / spent,
        "other_seconds": time.monotonic() - begin - spent,
    }


def proxy(task: Task) -> dict[str, Any]:
    """Train the proxy on the corpus, and embed the corpus with it."""
    how, cost = task.proxy, dict(_NOTHING)
    if how.encoder:
        return _embedded(task, how.encoder, cost, "pool")
    for name, epochs in (("pool", how.epochs), ("early", how.early)):
        if epochs:
            _add(cost, _once(task.folder / f"{name}{_COST}", partial(_own_proxy, task, name, epochs)))
            _forget(task.folder / f"{name}-run")
    return cost


def _own_proxy(task: Task, name: str, epochs: int) -> dict[str, Any]:
    """Train a model on the corpus, and embed the corpus with it; return what both cost."""
    run = task.folder / f"{name}-run"
    return _embedded(task, f"run:{run}", _cost_of(task, _train(task, run, epochs=epochs)), name)


def reference(task: Task) -> dict[str, Any]:
    """Write the loss of every row under a model that was trained on the other half of the rows."""
    cost = _once(task.folder / f"reference{_COST}", partial(_references, task))
    shutil.rmtree(task.folder / "run", ignore_errors=True)
    return cost


def _references(task: Task) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from thresher.train.cross_fit import CrossFitSettings, cross_fit

    how = task.trainer
    schedule = _schedule(task, epochs=task.proxy.reference, seed=task.corpus.seed)
    settings = CrossFitSettings(model=how.model, loss=how.loss, chunk=how.chunk, schedule=schedule)
    fitted = cross_fit(task.data, task.folder / "run", settings, progress=Lines())
    with writing(task.folder / "reference.parquet") as scratch:
        pq.write_table(pa.table({"key": fitted.keys, "loss": fitted.losses_N}), scratch)
    forwards = fitted.gradient_samples + fitted.scored_forwards
    return {"scored_forwards": forwards, "seconds": fitted.seconds, "images_decoded": _decoded(task, forwards)}


def run(task: Task) -> dict[str, Any]:
    """Train a row of the table with a seed, and evaluate it."""
    row, folder = task.row, task.folder / "run"
    if row is None:
        raise UsageError("a run needs a row")
    cost = dict(_NOTHING)
    how: dict[str, Any] = {"policy": row.policy, "prune": row.prune, "options": dict(row.options)}
    notes: dict[str, Any] = {}
    if row.selects:
        selection = row.selection or str(task.folder / "selection")
        if row.selection is None:
            _add(cost, _selected(task, row, Path(selection)))
        how = {"policy": "static", "selection": selection}
        notes["kept"] = _planted(task, selection)
    elif row.needs_reference:
        where, spent = task.result_of("reference")
        how["options"] = {**how["options"], "reference": str(where / "reference.parquet")}
        _add(cost, spent)
    if row.loss or row.compose:
        how |= _with_proxy(task, row)
        if row.needs_proxy and not (row.steps and row.pool == "proxy"):  # a selection by the proxy has counted it
            _add(cost, task.result_of("proxy")[1])
    share = row.share_of(task.trainer)
    length = {"epochs": task.trainer.epochs} if share == 1.0 else {"samples": task.trainer.samples(task.rows, share)}
    log = _train(task, folder, evals=task.evals, seed=task.seed, **length, **how)
    _add(cost, _cost_of(task, log))
    last = log[-1]
    if "eval" not in last:
        raise UsageError(f"{task.folder}: the evaluation failed: {last.get('eval_failed', 'no reason is known')}")
    if not row.selects and row.policy != "full":
        notes["left_out"] = _left_out(task, folder)
    _forget(folder)
    return {
        "metrics": metrics_of(last["eval"]),
        "samples_seen": sum(entry["samples"] for entry in log),
        "share_pruned": last["pruned_so_far"],
        **cost,
        "curve": _curve(log),
        "epochs": len(log),
        "precision": Training.load(folder).settings["precision"],
        **notes,
    }


JOBS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "corpus": corpus, "trial": trial, "proxy": proxy, "reference": reference, "run": run,
}  # fmt: skip


# --- their parts ----------------------------------------------------------------------------------


def _schedule(task: Task, **more: Any) -> Any:
    """Return the schedule of the plan's trainer with some other settings."""
    from thresher.train.loop import Schedule

    how = task.trainer
    same = ("batch_size", "lr", "weight_decay", "warmup", "precision", "device", "workers", "eval_every")
    return Schedule(**{name: getattr(how, name) for name in same} | more)


def _train(task: Task, folder: Path, *, evals: tuple[str, ...] = (), **schedule: Any) -> list[dict[str, Any]]:
    """Train, or resume; return the log."""
    _found_again(folder, {"data": absolute(task.data), **schedule})
    how = task.trainer
    own: dict[str, Any] = {name: schedule.pop(name) for name in ("loss", "reference") if name in schedule}
    made = _schedule(task, evals=tuple(evals), options=schedule.pop("options", None) or None, **schedule)
    labels: dict[str, Any] = (
        {"eval_labels": task.evaluation.labels, "eval_group": task.evaluation.group} if evals else {}
    )
    more: dict[str, Any] = {"resume": True, "progress": Lines()}
    if how.task == "moco":
        from thresher.train.moco import MocoSettings, train_moco

        own = {"side": how.side, "version": how.version, "momentum": how.momentum, "queue": how.queue}
        return train_moco(task.data, folder, MocoSettings(model=how.model, schedule=made, **own, **labels), **more)
    from thresher.train.clip import ClipSettings, train_clip

    prompts: dict[str, Any] = {"templates": task.evaluation.templates} if evals else {}
    own = {"model": how.model, "loss": how.loss, "chunk": how.chunk, **own}
    settings = ClipSettings(schedule=made, **own, **labels, **prompts)
    return train_clip(task.data, folder, settings, **more)


def _found_again(folder: Path, asked: Mapping[str, Any]) -> None:
    """Write to a run that was begun where its inputs are now: the folder of the plan may have been moved.

    What they are is known already: ``check`` compared the jobs, and the trainer compares the rows.
    """
    if not (folder / MARK).exists():
        return
    begun = Training.load(folder)
    settings = {**begun.settings, **{name: asked[name] for name in _PLACES if asked.get(name)}}
    if settings != begun.settings:
        replace(begun, settings=settings).save()


def _cost_of(task: Task, log: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a training run cost: a forward per sample, seconds, and the images that were decoded."""
    samples = sum(entry["samples"] for entry in log)
    seconds = sum(entry["seconds"] for entry in log)
    return {"scored_forwards": samples, "seconds": seconds, "images_decoded": _decoded(task, samples)}


def _decoded(task: Task, samples: int) -> int:
    """Return the images decoded for some samples: images kept in memory once, others before and at every use."""
    from thresher.train.data import IN_MEMORY
    from thresher.train.loop import stored_side

    pixels = stored_side(_side(task.trainer)) ** 2 * 3
    return task.rows + (samples if task.rows * pixels > IN_MEMORY else 0)


def _side(trainer: Trainer) -> int:
    if trainer.task == "moco":
        return trainer.side
    from thresher.train.models import clip_model

    return clip_model(trainer.model, trainer.loss).side


def _add(cost: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name in ("scored_forwards", "seconds", "images_decoded"):
        cost[name] += more[name]


def _once(path: Path, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do a part of a job, unless its cost is written already; return the cost."""
    if not path.exists():
        write_json(path, part())
    return read_own(path)


def _embedded(task: Task, encoder: str, cost: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Embed the corpus; return the cost with that of embedding."""
    from thresher.embedding.pipeline import EmbedSettings, embed

    begin = time.monotonic()
    settings = EmbedSettings(encoder=encoder, workers=0, device=task.trainer.device, precision="float32")
    rows = embed(task.data, task.folder / name, settings, progress=Lines()).rows
    spent = {"scored_forwards": rows, "seconds": time.monotonic() - begin, "images_decoded": rows}
    total = dict(cost)
    _add(total, spent)
    return total


def _selected(task: Task, row: Row, selection: Path) -> dict[str, Any]:
    """Save the selection of a row, unless it is there; return what it cost, with its pool or the run it is from."""
    begin = time.monotonic()
    known = selection / "selection.json"
    if known.exists() and is_missing(read_own(known)["pool"]):
        shutil.rmtree(selection)  # the folder of the plan was moved: made again, the same, from where its pool is now
    if not known.exists():
        made = _coreset(task, row) if row.coreset_of else _select(task, row)
        made.save(selection)
    cost = {"scored_forwards": 0, "seconds": time.monotonic() - begin, "images_decoded": 0}
    _add(cost, task.result_of("coreset")[1] if row.coreset_of else _prepared(task, row))
    return cost


def is_missing(location: str) -> bool:
    """Return whether data are not on this machine; False for addresses and patterns, of which that is not known."""
    return not any(mark in location for mark in "*{:") and not os.path.exists(location)


def _with_proxy(task: Task, row: Row) -> dict[str, Any]:
    """Return the settings of training for the loss of a row, and for the composition of its batches."""
    more: dict[str, Any] = {}
    if row.loss:
        more |= {"loss": row.loss, "reference": str(task.result_of("proxy")[0] / "pool")}
    if row.compose:
        more |= {"compose": row.compose, "concepts": row.concepts}
        if row.concepts == CLUSTERS:
            more["concepts"] = str(_clusters(task))
    return more


def _clusters(task: Task) -> Path:
    """Cluster the embeddings of the proxy; return the folder of the clusters."""
    from thresher.pool.store import open_store
    from thresher.pruning.clusters import Clustered, cluster_pool, write_groups
    from thresher.pruning.run import Run
    from thresher.runtime.cache import Cache
    from thresher.runtime.engine import make_engine
    from thresher.selection import Selection

    folder, store = task.folder / CLUSTERS, open_store(str(task.result_of("proxy")[0] / "pool"))
    start = Selection.everything("", store.layout.location, {}, store.total)
    run = Run(store, start, seed=task.seed, engine=make_engine("serial"), cache=Cache.at(_cache(task)))
    groups, run = cluster_pool(run, Clustered())
    write_groups(groups, folder, {"pool": store.layout.location}, within=run.so_far.mask())
    return folder


def _prepared(task: Task, row: Row) -> dict[str, Any]:
    """Return what the pool of a row cost."""
    return dict(_NOTHING) if row.pool == "data" else task.result_of("proxy")[1]


def _select(task: Task, row: Row) -> Any:
    """Make the selection of a row with the seed of the run."""
    from thresher.pool.store import open_store
    from thresher.pruning.recipe import run_steps
    from thresher.pruning.registry import build as build_method
    from thresher.runtime.cache import Cache
    from thresher.runtime.engine import make_engine

    where, early = task.result_of("corpus")[0] / INDEX, ""
    if row.pool == "proxy":
        folder = task.result_of("proxy")[0]
        where, early = folder / "pool", str(folder / "early")
    tables = [{key: early if value == EARLY else value for key, value in table.items()} for table in row.steps]
    steps = [build_method(table.pop("method"), table) for table in tables]
    engine, cache = make_engine("serial"), Cache.at(_cache(task))
    return run_steps(open_store(str(where)), steps, seed=task.seed, engine=engine, cache=cache)


def _cache(task: Task) -> str:
    """Return the cache of the plan, from the folder of a run."""
    return str(task.folder.parents[2] / "cache")


def _coreset(task: Task, row: Row) -> Any:
    from thresher.dynamic.coreset import coreset

    return coreset(Training.load(Path((task.results or {})["coreset"]) / "run"), row.keep)


def _planted_N(task: Task) -> Any:
    """Return what was planted in each row of the corpus, by key; {} for a corpus as it is."""
    from thresher.lab.corpus import PLANTED
    from thresher.pool.store import open_store

    if not task.corpus.changed:
        return {}
    store = open_store(task.data)
    keys = (key for _, part in store.keys() for key in part)
    kinds = (str(cell) for _, part in store.scan([PLANTED]) for cell in part.column(0).to_pylist())
    return dict(zip(keys, kinds, strict=True))


def _shares(kinds: list[str], left_out: list[bool]) -> dict[str, Any]:
    """Return how many rows of each planted kind there are, and how many of them are left out."""
    counts: dict[str, Any] = {}
    for kind, gone in zip(kinds, left_out, strict=True):
        for name in kind.split("+") if kind else ["as it is"]:
            rows, out = counts.get(name, (0, 0))
            counts[name] = (rows + 1, out + gone)
    return {name: {"rows": rows, "left_out": out} for name, (rows, out) in sorted(counts.items())}


def _planted(task: Task, selection: str) -> dict[str, Any]:
    """Return how much of each planted kind a selection drops."""
    from thresher.export.keys import read_keys

    planted = _planted_N(task)
    if not planted:
        return {}
    keys = list(planted)
    times_N = read_keys(selection).times_many(keys)
    return _shares([planted[key] for key in keys], [bool(times == 0) for times in times_N])


def _left_out(task: Task, folder: Path) -> dict[str, Any]:
    """Return how much of each planted kind was a candidate for pruning in the last search of a run."""
    planted = _planted_N(task)
    training = Training.load(folder)
    ledger = training.ledger()
    if not planted or not ledger.times_N.any():
        return {}
    store = training.open_pool()
    keys = [key for _, part in store.keys() for key in part]
    last = int(ledger.marked_N.max())
    return _shares([planted.get(key, "") for key in keys], (ledger.marked_N == last).tolist())


def _curve(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluations of a run, with the samples seen and the seconds spent until then."""
    points, samples, seconds = [], 0, 0.0
    for entry in log:
        samples, seconds = samples + entry["samples"], seconds + entry["seconds"]
        if "eval" in entry:
            point = {"samples_seen": samples, "seconds": round(seconds, 3), "metrics": metrics_of(entry["eval"])}
            points.append(point)
    return points


def _forget(folder: Path) -> None:
    """Remove the large files of a finished run; log and ledger stay."""
    from thresher.train.data import PICTURES

    for name in (CHECKPOINT, PICTURES):
        (folder / name).unlink(missing_ok=True)


# --- the process ----------------------------------------------------------------------------------


def made(kind: Any, table: Mapping[str, Any]) -> Any:
    """Return a part of a plan from its table in a ``job.json``."""
    tuples = {"labels", "templates", "steps"}
    return build(kind, kind.__name__, {name: tuple(v) if name in tuples else v for name, v in table.items()})


def task_of(job: Mapping[str, Any], folder: Path) -> Task:
    """Return the task of a ``job.json``."""
    what, where = job["what"], job["where"]
    tables = {name: what.get(name, {}) for name in KINDS}
    tables["trainer"] = {**tables["trainer"], **job["free"]}
    parts = {name: made(kind, tables[name]) for name, kind in KINDS.items() if tables[name] or kind is not Row}
    return Task(folder=folder, seed=what.get("seed", 0), **parts, **{**where, "evals": tuple(where["evals"])})


def do(folder: Path) -> None:
    """Do the job of a folder, and write its result."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    task = task_of(job, folder)
    begin = time.monotonic()
    result = JOBS[job["what"]["kind"]](task)
    spent = {"wall_seconds": round(time.monotonic() - begin, 3), "at_once": task.trainer.at_once}
    write_json(folder / RESULT, {**result, **spent})


def main(arguments: list[str]) -> int:
    """Do a job; the exit code is 1 if it failed with an error that its output says."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(arguments[0])
    threads = json.loads((folder / JOB).read_text(encoding="utf-8"))["what"]["trainer"]["threads"]
    try:
        _use_threads(threads)
        do(folder)
    except Exception as error:
        if is_out_of_memory(error):
            sys.stderr.write(f"error: {OUT_OF_MEMORY}\n")
        elif isinstance(error, UnicodeEncodeError):  # bytes of the name of a file, which no table holds
            sys.stderr.write(f"error: {visible(error.object)}: not valid UTF-8; rename it\n")
        elif isinstance(error, (ThresherError, OSError)):
            sys.stderr.write(f"error: {error}\n")
        else:
            raise
        return 1
    return 0


def _use_threads(threads: int) -> None:
    try:
        import torch
    except ImportError:  # the trainer says what to install
        return
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """End this process when the one that started it ends: it holds the other end of the pipe."""
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when this process ends
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
