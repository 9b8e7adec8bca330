"""Another cut of the last step: which parameters can be moved, what the cut keeps, and the command that makes it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from thresher.errors import OutputError, ThresherError, UsageError
from thresher.io.paths import relative
from thresher.pool.store import IN_MEMORY
from thresher.pruning.audit import Audit
from thresher.pruning.recipe import as_toml
from thresher.pruning.registry import METHODS, build
from thresher.report.facts import parameters, plain
from thresher.selection import Selection, Step
from thresher.viewer.subject import MOVED, Cut, Subject

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Slider:
    """A parameter of the last step that can be moved.

    Attributes:
        name: Name of the parameter.
        help: What it means.
        value: Its value, as a person would write it; "" if it is not set.
        low: Lowest value of the slider.
        high: Highest value of the slider.
        at: Where the slider is: ``value`` as a number, a share for a budget; if not set, what the cut comes to.
        scale: "linear" or "log".
        is_share: Whether the values are shares of the rows.
    """

    name: str
    help: str
    value: str
    low: float
    high: float
    at: float
    scale: str = "linear"
    is_share: bool = False


def sliders(selection: Selection) -> tuple[Slider, ...]:
    """Return the parameters of the last step that only cut; none if the step cannot be cut again."""
    if not selection.steps:
        return ()
    step = selection.steps[-1]
    try:
        method: Any = build(step.method, step.parameters)
    except ThresherError:  # not a method, or recorded by another version
        return ()
    made = []
    for item in fields(method):
        if item.name not in MOVED or (item.name == "reference_eps" and not step.parameters.get("reference")):
            continue
        value = step.parameters.get(item.name)
        text = "" if value is None else str(value)
        about = str(item.metadata.get("help", ""))
        if item.name == "keep":
            share = step.rows_out / step.rows_in if step.rows_in else 1.0
            made.append(Slider("keep", about, text, 0.0, 1.0, share, is_share=True))
        elif item.name == "temperature":
            at = float(value) if value is not None else 0.1
            low, high = min(0.005, at / 2), max(5.0, at * 2)
            made.append(Slider(item.name, about, text, low, high, at, "log"))
        elif item.name in ("eps", "reference_eps"):
            at = float(value) if value is not None else _cut_as_eps(step)
            made.append(Slider(item.name, about, text, 0.0, max(0.5, min(2.0, at * 1.5)), at))
        else:
            low, high = _range(step)
            at = float(value) if value is not None else float(step.cut if step.cut is not None else low)
            if high > low:
                made.append(Slider(item.name, about, text, low, high, min(max(at, low), high)))
    return tuple(made)


def _cut_as_eps(step: Step) -> float:
    return min(max(1 - step.cut, 0.0), 2.0) if step.cut is not None else 0.0


def _range(step: Step) -> tuple[float, float]:
    scores = np.asarray(step.rows["score"]) if "score" in step.rows else np.empty(0)
    scores = scores[np.isfinite(scores)]
    return (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 0.0)


# --- the command ----------------------------------------------------------------------------------


def command(selection: Selection, out: str) -> str:
    """Return what to type for the selection, to be written to ``out``.

    It is "" if the pool is in memory, or the steps are not methods with one seed; :func:`python` always has a way.
    """
    steps = [step for step in selection.steps if step.method != Audit.name]
    methods = [step.method for step in steps]
    seeds = {step.seed for step in steps}
    words = _options(selection)
    in_files = not selection.pool.startswith(IN_MEMORY)
    if in_files and len(seeds) == 1 and all(name in METHODS.names() for name in methods):
        seed = next(iter(seeds))
        seeded = ["--seed", str(seed)] if seed else []
        pool, target = relative(selection.pool), relative(out)
        if len(steps) == 1:
            own = _flags(steps[0])
            if own is not None:
                return shlex.join(["thresher", "select", methods[0], pool, *own, *seeded, *words, "-o", target])
        recipe = as_toml([(step.method, _chosen(step)) for step in steps], seed)
        name = f"{Path(out).name}.toml"
        run = shlex.join(["thresher", "run", name, pool, *words, "-o", target])
        return f"cat > {shlex.quote(name)} <<'END'\n{recipe}END\n{run}"
    return ""


def python(path: str, cut: Cut | None, out: str) -> str:
    """Return the lines of Python that make a selection from the one in a folder."""
    changes = ", ".join(f"{name}={value!r}" for name, value in cut.changes.items()) if cut is not None else ""
    again = f".recut({changes})" if changes else ""
    return f"import thresher as th\nkept = th.Selection.load({relative(path)!r}){again}\nkept.save({relative(out)!r})"


def _flags(step: Step) -> list[str] | None:
    """Return the options of ``thresher select`` for a step; None if one cannot be written as an option."""
    words: list[str] = []
    for name, value in _chosen(step).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, (str, int, float)):
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
        else:
            return None
    return words


def _chosen(step: Step) -> dict[str, Any]:
    """Return the parameters of a step that do not have their defaults."""
    usual = {one.name for one in parameters(step.method, step.parameters) if one.usual}
    return {name: value for name, value in step.parameters.items() if name not in usual and value is not None}


def _options(selection: Selection) -> list[str]:
    """Return the options with which the pool was opened."""
    words: list[str] = []
    for name, value in selection.options.items():
        if value in (None, False):
            continue
        words += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    return words


# --- saving ---------------------------------------------------------------------------------------


def target_of(subject: Subject, name: Any) -> Path:
    """Return the folder of a selection that is to be saved, directly below the folder for results.

    Raises:
        OutputError: There is no folder for results, the name is not a plain one, or there is something already.
    """
    if subject.out is None:
        raise OutputError("there is no folder to save in; start with thresher view ... --out DIR")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OutputError(
            "a name has 1 to 100 letters, digits, dots, dashes or underscores, and begins with a letter or a digit"
        )
    target = subject.out / name
    if target.exists() or target.is_symlink():
        raise OutputError(f"{plain(name, 100)}: exists already; choose another name")
    return target


def save(subject: Subject, given: Mapping[str, Any]) -> dict[str, Any]:
    """Write a selection with another cut, as the command line would, and return where it is.

    Raises:
        UsageError: The request is not one.
        OutputError: It cannot be written there; nothing is ever replaced.
    """
    from thresher.viewer.sets import cut_of

    number = given.get("selection")
    if not isinstance(number, int) or isinstance(number, bool):
        raise UsageError("selection: give a whole number")
    target = target_of(subject, given.get("name"))
    selection = subject.selection(number, cut_of(given.get("cut")))
    selection.save(target)
    return {"path": relative(str(target)), "kept": len(selection), "rows": selection.total}
