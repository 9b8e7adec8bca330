"""``thresher evaluate``: zero-shot classification, retrieval, kNN and linear probes of a model, on sets of all kinds.

Metrics have the names and definitions of CLIP_benchmark: ``acc1``, ``acc5`` and ``mean_per_class_recall``,
``image_retrieval_recall@K`` and ``text_retrieval_recall@K``, with the prefix ``lp_`` for the linear probe and ``knn_``
for kNN. Two things differ: with groups, all rows of the query's group are right; and a right answer that ties with
a wrong one counts as wrong, where CLIP_benchmark leaves ties to the order of a sort. The probe is fitted by L-BFGS,
with a strength chosen on held-out rows, not by a fixed number of steps.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from thresher.errors import OutputError, PoolError, UsageError, suggest
from thresher.evaluation.bootstrap import share_interval
from thresher.evaluation.knn import knn
from thresher.evaluation.linear_probe import linear_probe
from thresher.evaluation.retrieval import retrieval
from thresher.evaluation.split import split
from thresher.evaluation.zero_shot import class_embeddings, zero_shot
from thresher.io.pictures import open_rgb
from thresher.lab.sets import LabelledSet, open_set
from thresher.runtime.files import check_writable, writing
from thresher.runtime.format import counted
from thresher.runtime.parameters import build
from thresher.runtime.progress import Progress, Silent
from thresher.runtime.untrusted import cut, open_regular, parse_json, parse_toml, toml_text

if TYPE_CHECKING:
    from thresher.embedding.encoders import Encoder

T = TypeVar("T")
Floats = npt.NDArray[np.float32]
TaskName = Literal["zero-shot", "retrieval", "knn", "probe"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
RESULTS = "eval_results.jsonl"
TEMPLATES = ("{}", "a photo of a {}.")
_MAIN = {"zero-shot": "acc1", "knn": "knn_acc1", "probe": "lp_acc1", "retrieval": "mean_recall@1"}
_SHARES = {"top1": "acc1", "top5": "acc5", "mean_per_class": "mean_per_class_recall"}
_BATCH, _TEXTS = 64, 512  # images and texts encoded at a time
_KS = (1, 5, 10)
_LINE = 1 << 20  # bytes of a line of results
_REPEATED = 0.05  # share of captions from which repeated ones are mentioned


@dataclass(frozen=True, kw_only=True)
class SetSettings:
    """An evaluation set of a suite.

    Attributes:
        data: The set, see :func:`thresher.lab.sets.open_set`.
        name: Its name in the results; "" for that of the file.
        train: Rows to fit kNN and probes on.
        tasks: What to evaluate; () for all that the set and the model allow.
        labels: Label columns.
        group: Column of groups.
        text: Column of captions.
        templates: Prompts for class names, with {}; () for those of the set, else "{}" and "a photo of a {}.".
    """

    data: str
    name: str = ""
    train: str | None = None
    tasks: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    group: str | None = None
    text: str | None = None
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if odd := [task for task in self.tasks if task not in TASKS]:
            raise UsageError(f"no task {odd[0]!r}; allowed: {', '.join(TASKS)}.{suggest(odd[0], TASKS)}")
        if odd := [template for template in self.templates if "{}" not in template]:
            raise UsageError(f"template {odd[0]!r} has no {{}} for the name of a class")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Evaluation sets whose main metrics are averaged: TOML with ``name`` and ``[[set]]`` tables."""

    name: str
    sets: tuple[SetSettings, ...] = field(default=())

    @classmethod
    def load(cls, path: str) -> Suite:
        """Read a suite; relative paths in it are below its folder.

        Raises:
            UsageError: It cannot be read, is not valid TOML, or has other keys.
        """
        try:
            with Path(path).open("rb") as file:
                text = toml_text(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: not a readable suite ({getattr(error, 'strerror', None) or error})") from None
        try:
            data = parse_toml(text)
        except ValueError as error:
            raise UsageError(f"{path}: not valid TOML ({error})") from None
        tables = data.pop("set", None)
        if not isinstance(tables, list) or not tables or set(data) - {"name"}:
            raise UsageError(f'{path}: a suite has name = "..." and [[set]] tables with data = "..."')
        sets = []
        for number, table in enumerate(tables, 1):
            if not isinstance(table, dict):
                raise UsageError(f"{path}: set {number} is not a table; write [[set]]")
            values: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
            }
            for key in ("data", "train"):
                if isinstance(values.get(key), str) and "://" not in values[key]:
                    values[key] = str(Path(path).parent / values[key])
            sets.append(build(SetSettings, f"{path}: set {number}", values))
        return cls(name=str(data.get("name", Path(path).stem)), sets=tuple(sets))


def evaluate_model(
    encoder: Encoder, suite: Suite, *, seed: int = 0, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Evaluate a model on every set of a suite.

    Args:
        encoder: The model.
        suite: The sets.
        seed: Seed of the halves that kNN and probes are fitted and tested on, where a set has no rows to fit on.
        progress: Where to report progress.

    Returns:
        An object per set, task and label column: "key", "dataset", "task", "label", "rows", "metrics" (shares), with
        "main_metric" and its 95% bootstrap interval "main_metric_interval". Finally, if there are several, the averages
        of the main metrics with the key "average": over all, and by task.

    Raises:
        UsageError, PoolError: A set cannot be evaluated with this model.
    """
    progress = progress or Silent()
    found: list[dict[str, Any]] = []
    for one in suite.sets:
        data = open_set(one.data, train=one.train, labels=one.labels, group=one.group, text=one.text)
        done = list(_evaluated(encoder, one, data, seed, progress))
        if not done:
            raise UsageError(f"{one.data}: {encoder.name} can do none of the tasks of this set; see --task")
        found += done
    if len(found) > 1:
        found.append(_average(suite.name, found))
    return found


def check_target(path: Path) -> None:
    """Check, before any work is done, that results can be written; only a file of results is replaced.

    Raises:
        OutputError: They cannot be written there.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give a file")
    check_writable(path)
    if not path.exists():
        return
    try:
        with open_regular(path) as file:
            line = file.readline(_LINE)
        known = not line or "key" in parse_json(line)
    except (OSError, ValueError, TypeError):
        known = False
    if not known:
        raise OutputError(f"{path}: exists and is not a file of results; choose another name")


def write_results(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write JSON Lines, one object per set and task, as CLIP_benchmark and DataComp do."""
    with writing(path) as scratch:
        lines = "".join(json.dumps(one, allow_nan=False) + "\n" for one in results)
        Path(scratch).write_text(lines, encoding="utf-8")


# --- the tasks ------------------------------------------------------------------------------------


def _evaluated(
    encoder: Encoder, how: SetSettings, data: LabelledSet, seed: int, progress: Progress
) -> Iterator[dict[str, Any]]:
    name = how.name or data.name
    tasks = how.tasks or TASKS
    able = _able(encoder, data)
    if how.tasks and (odd := [task for task in how.tasks if task not in able]):
        raise UsageError(f"{how.data}: cannot do {', '.join(odd)} with {encoder.name}: {_lacks(encoder, data, odd[0])}")
    wanted = [task for task in tasks if task in able]
    if not wanted:
        return
    image_ND = _images(encoder, data, progress)
    if "retrieval" in wanted:
        _warn_of_repeats(how.data, data)
        text_MD = encode_texts(encoder, data.texts)
        scores = retrieval(
            image_ND, text_MD, image_group_N=data.group_N, text_group_M=data.group_N[data.text_row_M], ks=_KS
        )
        yield _result(name, "retrieval", None, _retrieval(scores), len(data))
    train_ND = None
    for column, labels in data.labels.items():
        rows = int(np.count_nonzero(labels.index_N >= 0))
        if "zero-shot" in wanted:
            templates = how.templates or data.templates or TEMPLATES
            classes_CD = class_embeddings(prompts(encoder, labels.names, templates))
            yield _result(name, "zero-shot", column, _classified(zero_shot(image_ND, classes_CD, labels.index_N)), rows)
        for task, prefix in (("knn", "knn_"), ("probe", "lp_")):
            if task not in wanted:
                continue
            if data.train is not None and train_ND is None:
                train_ND = _images(encoder, data.train, progress)
            try:
                fitted = _fitting(data, column, image_ND, train_ND, seed)
                scores = (knn if task == "knn" else linear_probe)(*fitted)
            except UsageError as error:  # too few rows or classes: an error only if it was asked for
                if how.tasks:
                    raise type(error)(f"{how.data}: {task} of {column}: {error}") from None
                warnings.warn(f"{how.data}: {task} of {column} is not measured: {error}", stacklevel=2)
                continue
            if unseen := int(np.count_nonzero((fitted[3] >= 0) & ~np.isin(fitted[3], fitted[1]))):
                warnings.warn(
                    f"{how.data}: {task} of {column}: of the {int(scores['rows']):,} tested, {unseen:,} without "
                    "training rows of their class count as wrong; give training rows with --train",
                    stacklevel=2,
                )
            yield _result(name, task, column, _classified(scores, prefix), int(scores["rows"]))


def _warn_of_repeats(path: str, data: LabelledSet) -> None:
    """Warn if many captions are also those of rows that count as wrong."""
    groups_of: dict[str, set[int]] = {}
    group_M = data.group_N[data.text_row_M].tolist()
    for text, group in zip(data.texts, group_M, strict=True):
        groups_of.setdefault(text, set()).add(group)
    repeated = sum(len(groups_of[text]) > 1 for text in data.texts)
    if repeated > _REPEATED * len(data.texts):
        warnings.warn(
            f"{path}: {repeated:,} of {counted(len(data.texts), 'caption')} are also those of other images, which "
            "count as wrong; name a column of rows that belong together with --group",
            stacklevel=3,
        )


def _able(encoder: Encoder, data: LabelledSet) -> set[str]:
    joint = bool(encoder.image_dim) and encoder.image_dim == encoder.text_dim
    able = {"retrieval"} if joint and data.texts else set()
    if data.labels and encoder.image_dim:
        able |= {"knn", "probe", *(["zero-shot"] if joint else [])}
    return able


def _lacks(encoder: Encoder, data: LabelledSet, task: str) -> str:
    if not encoder.image_dim:
        return "the model does not encode images"
    if task in ("retrieval", "zero-shot") and encoder.image_dim != encoder.text_dim:
        return "the model does not encode images and texts in one space"
    return "the set has no captions" if task == "retrieval" else "the set has no labels; name a column with --label"


def _fitting(data: LabelledSet, column: str, image_ND: Floats, train_ND: Floats | None, seed: int) -> tuple[Any, ...]:
    """Return training rows and labels, test rows and labels; halves of the set if it has no rows to fit on."""
    index_N = data.labels[column].index_N
    if data.train is not None:
        return train_ND, data.train.labels[column].index_N, image_ND, index_N
    rows = np.flatnonzero(index_N >= 0)
    first = split(len(rows), groups_N=data.group_N[rows], seed=seed)
    fit, test = rows[first], rows[~first]
    return image_ND[fit], index_N[fit], image_ND[test], index_N[test]


def prompts(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Floats:
    """Return the embeddings of the prompts of all classes, (C, T, D)."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    text_MD = encode_texts(encoder, texts)
    return text_MD.reshape(len(names), len(templates), -1)


def encode_texts(encoder: Encoder, texts: Sequence[str]) -> Floats:
    """Return the embeddings of texts, (M, D)."""
    if encoder.tokenize is None:
        raise UsageError(f"{encoder.name} does not encode texts")
    parts = [encoder.encode_texts(encoder.tokenize(list(part))) for part in _batches(texts, _TEXTS)]
    return np.concatenate(parts)


def _images(encoder: Encoder, data: LabelledSet, progress: Progress) -> Floats:
    """Return the embeddings of the images of a set, (N, D).

    Raises:
        PoolError: An image cannot be decoded; evaluations do not skip rows.
    """
    preprocess = encoder.preprocess
    if preprocess is None:
        raise UsageError(f"{encoder.name} does not encode images")
    parts, row = [], 0
    with progress.task(f"embed {data.name}", len(data), "images") as advance:
        for pictures in _batches(data.pictures(), _BATCH):
            pixels = []
            for picture in pictures:
                try:
                    pixels.append(preprocess(open_rgb(picture)))
                except PoolError as error:
                    raise PoolError(f"{data.name}: row {row:,} {error}") from None
                row += 1
            parts.append(np.asarray(encoder.encode_images(np.stack(pixels)), np.float32))
            advance(len(pictures))
    return np.concatenate(parts)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` items, the last one shorter."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


# --- results --------------------------------------------------------------------------------------


def _classified(scores: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Return accuracies under the names of CLIP_benchmark; with fewer than 5 classes there is no acc5."""
    return {f"{prefix}{new}": scores[old] for old, new in _SHARES.items() if old != "top5" or scores["classes"] >= 5}


def _retrieval(scores: Mapping[str, float]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for k in _KS:
        to_image, to_text = scores[f"text_to_image_R@{k}"], scores[f"image_to_text_R@{k}"]
        metrics |= {f"image_retrieval_recall@{k}": to_image, f"text_retrieval_recall@{k}": to_text}
        metrics[f"mean_recall@{k}"] = (to_image + to_text) / 2
    return metrics


def _result(name: str, task: str, label: str | None, metrics: dict[str, float], rows: int) -> dict[str, Any]:
    main = metrics[_MAIN[task]]
    low, high = share_interval(main, rows)  # for retrieval as if both directions were right for the same rows
    key = "/".join([name, task, *([label] if label else [])])
    return {
        "key": key, "dataset": name, "task": task, "label": label, "rows": rows,
        "metrics": {**metrics, "main_metric": main, "main_metric_interval": [low, high]},
    }  # fmt: skip


def _average(suite: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mains: dict[str, list[float]] = {}
    for one in results:
        for kind in ("main_metric", f"{one['task']} main_metric"):
            mains.setdefault(kind, []).append(one["metrics"]["main_metric"])
    metrics = {kind: math.fsum(values) / len(values) for kind, values in mains.items()}
    return {"key": "average", "dataset": cut(suite), "task": None, "label": None, "rows": None, "metrics": metrics}
