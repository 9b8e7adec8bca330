"""The jobs of a plan: what each does, what it needs, and whether one that was begun does the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from thresher.errors import OutputError
from thresher.lab.plan import Plan, Sources
from thresher.lab.work import JOB, KINDS, damaged, has_work, read_own

FREE = ("at_once", "device", "workers")  # parts of a trainer that do not change a result
_ORDER = ("corpus", "trial", "proxy", "reference")
_EMBEDDING = 0.5  # forwards that embedding a row costs, in those of training on it


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to do: make a corpus, train a proxy or a reference, or a run.

    Attributes:
        name: Its folder, below the folder of the plan.
        what: What to do; a finished job with the same is not done again.
        corpus: Name of its corpus.
        needs: Names of the jobs that must be done before, by purpose.
    """

    name: str
    what: Mapping[str, Any]
    corpus: str
    needs: Mapping[str, str]

    @property
    def kind(self) -> str:
        """What kind of job it is."""
        return str(self.what["kind"])

    @property
    def whole(self) -> dict[str, Any]:
        """What to do, as :func:`what_of` reads it: JSON values, names of data instead of paths, which may be moved."""
        return _whole(json.loads(json.dumps(self.what)))


def jobs_of(plan: Plan) -> list[Job]:
    """Return all jobs of a plan, in an order in which each comes after those it needs, and the first seed first."""
    jobs: list[Job] = []
    trainer = {name: value for name, value in asdict(plan.trainer).items() if name not in FREE}
    for corpus in plan.corpora:
        same: dict[str, Any] = {"corpus": asdict(corpus), "trainer": trainer, "evaluation": asdict(plan.evaluation)}
        proxy: dict[str, Any] = {"proxy": asdict(plan.proxy)}
        made = f"corpora/{corpus.name}"
        at = {"corpus": made}

        def add(
            name: str, kind: str, needs: Mapping[str, str], same: Any = same, of: str = corpus.name, **more: Any
        ) -> str:
            jobs.append(Job(name=name, what={"kind": kind, **same, **more}, corpus=of, needs=needs))
            return name

        add(made, "corpus", {}, sources=asdict(plan.data), data_bytes=bytes_of(plan.data))
        if corpus is plan.corpora[0]:
            add("trial", "trial", dict(at))
        if any(row.needs_proxy for row in plan.rows):
            at["proxy"] = add(f"proxies/{corpus.name}", "proxy", dict(at), **proxy)
        if any(row.needs_reference for row in plan.rows):
            at["reference"] = add(f"references/{corpus.name}", "reference", {"corpus": made}, **proxy)
        for seed in plan.seeds:
            for row in sorted(plan.rows, key=lambda row: row.coreset_of is not None):
                needs = {"corpus": made}
                if row.needs_proxy:
                    needs["proxy"] = at["proxy"]
                if row.needs_reference:
                    needs["reference"] = at["reference"]
                if row.coreset_of:
                    needs["coreset"] = run_name(corpus.name, row.coreset_of, seed)
                more = proxy if needs.keys() & {"proxy", "reference"} else {}
                add(run_name(corpus.name, row.name, seed), "run", needs, row=asdict(row), seed=seed, **more)
    firsts = sorted((job for job in jobs if job.kind != "run"), key=lambda job: _ORDER.index(job.kind))
    return firsts + sorted((job for job in jobs if job.kind == "run"), key=lambda job: job.what["seed"])


def bytes_of(sources: Sources) -> list[int]:
    """Return the bytes of the files of a plan: other data of the same name differ, and folders may be moved."""
    return [
        os.path.getsize(path) for path in (sources.train, *sources.evals, sources.off_topic) if os.path.isfile(path)
    ]


def run_name(corpus: str, row: str, seed: int) -> str:
    """Return the folder of a run."""
    return f"runs/{corpus}/{row}/seed-{seed}"


def samples_of(plan: Plan, job: Job, rows: int) -> float:
    """Return about how many samples a job trains on or embeds."""
    full = plan.trainer.epochs * rows
    if job.kind == "run":
        row = next(row for row in plan.rows if row.name == job.what["row"]["name"])
        return row.share_of(plan.trainer) * full
    if job.kind == "proxy":
        if plan.proxy.encoder:
            return _EMBEDDING * rows
        epochs = [plan.proxy.epochs, *([plan.proxy.early] if plan.proxy.early else [])]
        return rows * (sum(epochs) + _EMBEDDING * len(epochs))
    return rows * (plan.proxy.reference + 2 * _EMBEDDING) if job.kind == "reference" else 0.0


def check(folder: Path, job: Job) -> None:
    """Refuse a job that was done, or begun, with other settings.

    A trial run is only a measurement, and one that failed before anything was saved has nothing to lose: forget them.
    """
    try:
        known = what_of(folder / job.name)
    except FileNotFoundError:
        return
    wanted = job.whole
    if "data_bytes" not in known:  # begun before it was written
        wanted.pop("data_bytes", None)
    if known == wanted:
        return
    own = folder / job.name
    if job.kind == "trial" or not has_work(own):
        shutil.rmtree(own)
    else:
        names = sorted(_differing(known, wanted))
        raise OutputError(
            f"{own}: was begun with other settings ({', '.join(names)}); choose another folder for this "
            "plan, or remove that one"
        )


def what_of(folder: Path) -> dict[str, Any]:
    """Return what the job in a folder does, completely and without paths, see :attr:`Job.whole`.

    Raises:
        FileNotFoundError: It was not begun.
        OutputError: Its ``job.json`` is damaged.
    """
    path = folder / JOB
    try:
        return _whole(read_own(path)["what"])
    except (AttributeError, KeyError, TypeError):
        raise damaged(path, "it does not say what to do") from None


def _whole(what: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a job does: with defaults for what its ``job.json`` lacks, names for paths, and without remarks."""
    made = dict(what)
    for name, kind in KINDS.items():
        if name in made:
            new = {one.name: one.default for one in fields(kind) if one.default is not MISSING}
            made[name] = {**json.loads(json.dumps(new)), **made[name]}
    if row := made.get("row"):
        made["row"] = {key: value for key, value in row.items() if key != "about"}  # a remark
    if sources := made.get("sources"):
        made["sources"] = {
            name: [os.path.basename(path) for path in value] if isinstance(value, list) else os.path.basename(value)
            for name, value in sources.items()
        }
    return made


def _differing(one: Any, other: Any, name: str = "") -> set[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() | other.keys()
        return {found for key in keys for found in _differing(one.get(key), other.get(key), str(key))}
    return set() if one == other else {name}
