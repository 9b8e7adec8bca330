"""Finished runs of other plans that are the same as runs of this one: rows and corpora of plans often are.

Two runs are the same if they train in the same way on the same corpus with the same seed, whatever their rows, corpora
and plans are called.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from thresher.errors import OutputError, PoolError, UsageError
from thresher.lab.jobs import Job, jobs_of, run_name, what_of
from thresher.lab.plan import EARLY, Plan, Row, Trainer
from thresher.lab.results import DETAILS, WHICH
from thresher.lab.work import JOB, RESULT, check_result, damaged, made, read_own, read_result, write_json
from thresher.runtime.places import local_path
from thresher.runtime.untrusted import Fields

WhatOf = Callable[[str], dict[str, Any]]  # what a job of a plan does, by name
_Finished = tuple[str, dict[str, Any]]  # where a run was found, and its result
_RUNS = 1_000_000  # most runs in one file


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
        others: Folders of other plans, or their files ``details.json``; where two have the same run, that of the first.
            A run is not taken if its files are needed for a coreset.
        precision: The precision that the runs of the plan would have here, "float32" or "bfloat16".
        still_held: Raises if the folder of the plan is no longer locked by this process.

    Raises:
        OutputError: A folder has no runs of a plan, or a file is damaged.
    """
    known: dict[str, _Finished] = {}
    for other in others:
        for key, run in _finished(Path(local_path(other))):
            known.setdefault(key, run)
    every = {job.name: job for job in jobs}
    left = {job.name: job for job in jobs if job.kind == "run" and not (folder / job.name / RESULT).exists()}
    keys = {name: _fingerprint(name, lambda name: every[name].whole, precision) for name in left}
    found = {name: known[key] for name, key in keys.items() if key in known}
    needed = {need for name, job in left.items() if name not in found for need in job.needs.values()}
    taken = sorted(found.keys() - needed)
    for name in taken:
        taken_from, result = found[name]
        still_held()
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_json(folder / name / JOB, {"what": left[name].what, "where": {}, "free": {}})
        write_json(folder / name / RESULT, {**result, "taken_from": taken_from})
    return taken


def _finished(place: Path) -> Iterator[tuple[str, _Finished]]:
    """Yield the finished runs of a plan with their fingerprints, from its folder or from its ``details.json``."""
    if (place / "runs").is_dir():
        yield from _in_folder(place)
    elif (path := place / DETAILS if place.is_dir() else place).is_file():
        yield from _in_details(path)
    else:
        raise OutputError(
            f"{place}: has no runs of a plan; give a folder that thresher lab wrote, or the {DETAILS} of one"
        )


def _in_folder(folder: Path) -> Iterator[tuple[str, _Finished]]:
    for run in sorted(path.parent for path in folder.glob(f"runs/*/*/*/{RESULT}")):
        try:
            name, result = str(run.relative_to(folder)), read_result(run, "run")
            key = _fingerprint(name, lambda name: what_of(folder / name), result.get("precision", "unknown"))
        except (KeyError, TypeError, UsageError, FileNotFoundError) as error:
            raise damaged(run / JOB, f"{type(error).__name__}: {error}") from None
        yield key, (os.path.abspath(run), result)


def _in_details(path: Path) -> Iterator[tuple[str, _Finished]]:
    details = Fields(read_own(path), str(path))
    try:
        what = {job.name: job.whole for job in jobs_of(Plan.of_record(details.object("plan").values))}
        for name in what:
            if name.startswith("corpora/"):
                what[name]["data_bytes"] = details.values["data_bytes"]
        for run in details.objects("runs", _RUNS):
            check_result(run, "run")
            name = run_name(run.text("corpus"), run.text("row"), run.whole("seed"))
            result = {key: value for key, value in run.values.items() if key not in WHICH}
            key = _fingerprint(name, what.__getitem__, result.get("precision", "unknown"))
            yield key, (f"{os.path.abspath(path)}: {name}", result)
    except (KeyError, TypeError, AttributeError, UsageError, PoolError) as error:
        why = f"{type(error).__name__}: {error}"
        raise OutputError(f"{path}: not the {DETAILS} of a plan, or damaged ({why})") from None


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
