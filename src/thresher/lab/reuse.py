"""Finished runs of other plans that are the same as runs of this one: rows and corpora of plans often are.

Two runs are the same if they train in the same way on the same corpus with the same seed, whatever their rows, corpora
and plans are called.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from thresher.errors import OutputError, UsageError
from thresher.lab.jobs import Job, run_name, what_of
from thresher.lab.plan import EARLY, Row, Trainer
from thresher.lab.work import JOB, RESULT, damaged, made, read_result, write_json
from thresher.runtime.places import local_path

WhatOf = Callable[[str], dict[str, Any]]  # what a job of a plan does, by name


def reuse(
    folder: Path,
    jobs: Sequence[Job],
    others: Sequence[str | os.PathLike[str]],
    precision: str,
    still_held: Callable[[], None],
) -> list[str]:
    """Write the results of runs that another plan has done already; return the names of these runs.

    Args:
        folder: Folder of the plan.
        jobs: All jobs of the plan; those that are done stay as they are.
        others: Folders of other plans; where two have the same run, that of the first. A run is not taken if its files
            are needed for a coreset.
        precision: The precision that the runs of the plan would have here, "float32" or "bfloat16".
        still_held: Raises if the folder of the plan is no longer locked by this process.

    Raises:
        OutputError: A folder has no runs of a plan, or a file in it is damaged.
    """
    known: dict[str, Path] = {}
    for other in others:
        known = {**_finished(Path(local_path(other))), **known}
    every = {job.name: job for job in jobs}
    left = {job.name: job for job in jobs if job.kind == "run" and not (folder / job.name / RESULT).exists()}
    keys = {name: _fingerprint(name, lambda name: every[name].whole, precision) for name in left}
    found = {name: known[key] for name, key in keys.items() if key in known}
    needed = {need for name, job in left.items() if name not in found for need in job.needs.values()}
    taken = sorted(found.keys() - needed)
    for name in taken:
        result = read_result(found[name], "run")
        still_held()
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_json(folder / name / JOB, {"what": left[name].what, "where": {}, "free": {}})
        write_json(folder / name / RESULT, {**result, "taken_from": os.path.abspath(found[name])})
    return taken


def _finished(folder: Path) -> dict[str, Path]:
    """Return the finished runs in the folder of a plan, by fingerprint."""
    if not (folder / "runs").is_dir():
        raise OutputError(f"{folder}: has no runs of a plan; give a folder that thresher lab wrote")
    found: dict[str, Path] = {}
    for run in sorted(path.parent for path in folder.glob(f"runs/*/*/*/{RESULT}")):
        try:
            name, precision = str(run.relative_to(folder)), read_result(run, "run").get("precision", "unknown")
            found.setdefault(_fingerprint(name, lambda name: what_of(folder / name), precision), run)
        except (KeyError, TypeError, UsageError, FileNotFoundError) as error:
            raise damaged(run / JOB, f"{type(error).__name__}: {error}") from None
    return found


def _fingerprint(name: str, what: WhatOf, precision: str) -> str:
    """Return what a run depends on, as text; the names of rows, corpora and plans are not in it.

    The precision of the trainer may be "auto", which is another one on another machine, so it is given.
    """
    done = what(name)
    corpus, trainer, row, seed = (done[part] for part in ("corpus", "trainer", "row", "seed"))
    data, made_row, source = what(f"corpora/{corpus['name']}"), made(Row, row), None
    if made_row.coreset_of:
        source = run_name(corpus["name"], made_row.coreset_of, seed)
        if what(source)["row"]["coreset_of"]:
            raise UsageError("a coreset of a coreset")
        source = _fingerprint(source, what, precision)
    used = {
        "epochs": made_row.needs_proxy,
        "encoder": made_row.needs_proxy,
        "early": any(EARLY in step.values() for step in made_row.steps),
        "reference": made_row.needs_reference,
    }
    names = {"name", "share", "coreset_of"} | ({"keep"} if made_row.steps else set())  # steps have it, too
    parts = {
        "corpus": {key: value for key, value in corpus.items() if key != "name"},
        "data": [data["sources"], data.get("data_bytes")],
        "trainer": {**{key: value for key, value in trainer.items() if key != "share"}, "precision": precision},
        "evaluation": done["evaluation"],
        "proxy": {key: value for key, value in done.get("proxy", {}).items() if used[key]},
        "row": {key: value for key, value in row.items() if key not in names},
        "coreset_of": source,
        "share": made_row.share_of(made(Trainer, trainer)),
        "seed": seed,
    }
    return json.dumps(parts, sort_keys=True)
