"""Recipes: lists of steps in which each step gets the rows that the previous one kept; and how to run them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from thresher.errors import UsageError, suggest
from thresher.pool.store import EmbeddingStore, absolute, same_pool, whole_pool
from thresher.pruning.audit import Audit
from thresher.pruning.registry import Method, build
from thresher.pruning.run import Run
from thresher.runtime.cache import Cache
from thresher.runtime.engine import Engine, make_engine
from thresher.runtime.format import counted, percent
from thresher.runtime.places import expanded
from thresher.runtime.process import one_blas_thread
from thresher.runtime.progress import Progress, Silent
from thresher.runtime.untrusted import cut, parse_toml, toml_text
from thresher.selection import Selection, Source


@dataclass(frozen=True)
class Recipe:
    """Steps and a seed. A percentage refers to the rows its step is given."""

    steps: tuple[Method, ...]
    seed: int = 0
    description: str = ""

    @classmethod
    def load(cls, name: str) -> Recipe:
        """Read a TOML file, or a shipped recipe by its name.

        Raises:
            UsageError: There is no such recipe, it is not valid TOML, or it has unknown keys.
        """
        shipped = shipped_recipes()
        path = Path(expanded(name))
        if name in shipped:
            return cls.parse(shipped[name], name)
        try:
            with path.open("rb") as file:
                text = toml_text(file)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{name}: neither a readable file ({getattr(error, 'strerror', None) or error}) nor a shipped recipe; "
                f"shipped: {', '.join(shipped)}.{suggest(name, shipped)}"
            ) from None
        return cls.parse(text, name)

    @classmethod
    def parse(cls, text: str, origin: str = "recipe") -> Recipe:
        """Read TOML text: ``seed``, ``description`` and ``[[step]]`` tables with ``method`` and its parameters."""
        try:
            data = parse_toml(text)
        except ValueError as error:
            raise UsageError(f"{origin}: not valid TOML ({error})") from None
        allowed = ("seed", "description", "step")
        for key in data:
            if key not in allowed:
                raise UsageError(
                    f"{origin}: unknown key {cut(repr(key))}; allowed: {', '.join(allowed)}.{suggest(key, allowed)}"
                )
        steps = data.get("step", [])
        if not isinstance(steps, list) or not steps:
            raise UsageError(f'{origin}: has no steps; write [[step]] and method = "..."')
        seed = data.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UsageError(f"{origin}: seed = {cut(repr(seed))}; expected a whole number")
        methods = []
        for number, table in enumerate(steps, 1):
            if not isinstance(table, dict) or not isinstance(table.get("method", ""), str):
                raise UsageError(f'{origin}: step {number} is not a table; write [[step]] and method = "..."')
            if "method" not in table:
                raise UsageError(f'{origin}: step {number} names no method; write method = "..."')
            try:
                methods.append(build(table["method"], {k: v for k, v in table.items() if k != "method"}))
            except UsageError as error:
                raise UsageError(f"{origin}: step {number}: {cut(str(error), 1_000)}") from None
        return cls(tuple(methods), seed, str(data.get("description", "")))


def as_toml(steps: Sequence[tuple[str, Mapping[str, Any]]], seed: int = 0) -> str:
    """Return the text of a recipe that :meth:`Recipe.parse` reads as these steps.

    Args:
        steps: Name of the method and its parameters as JSON values, as a selection records them; None is left out.
        seed: The seed.
    """
    lines = [f"seed = {seed}"]
    for name, parameters in steps:
        lines += ["", "[[step]]", f"method = {_value(name)}"]
        lines += [f"{key} = {_value(value)}" for key, value in parameters.items() if value is not None]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_value(str(key))} = {_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    # Any other number, or a text, in JSON is one in TOML, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def shipped_recipes() -> dict[str, str]:
    """Return the text of every shipped recipe, by name."""
    folder = resources.files("thresher.pruning") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {file.name[:-5]: file.read_text(encoding="utf-8") for file in files}


def run_steps(
    store: EmbeddingStore,
    steps: Sequence[Method],
    *,
    seed: int = 0,
    within: Selection | None = None,
    engine: Engine | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Run steps on a pool, each on the rows that the previous one kept, and return the selection.

    Args:
        store: The pool.
        steps: Methods; without any, only bad rows are refused or skipped.
        seed: Seed of all randomness.
        within: Start from an earlier selection of the same pool.
        engine: Where work runs; threads on all cores by default.
        cache: Where computed arrays are kept; the default cache folder by default.
        progress: Where progress and notes are reported; nowhere by default.

    Raises:
        UsageError: ``within`` is a selection of another pool, or a step cannot run.
        PoolError: The pool is damaged, has bad rows, or changed during the run.
    """
    whole_pool(store)
    if not isinstance(steps, Sequence):
        raise UsageError(f"steps must be given as a list: [{steps!r}]")
    cache = cache or Cache.at()
    progress = progress or Silent()
    fingerprint = store.fingerprint()
    options: dict[str, Any] = store.options.recorded()
    if options["metadata"]:
        options["metadata"] = absolute(options["metadata"])
    pool = absolute(store.layout.location)
    if within is None:
        start = Selection.everything(fingerprint, pool, options, store.total)
    else:
        same_pool(within, store, fingerprint)
        if not len(within):
            raise UsageError("the earlier selection keeps no row, so there is nothing to select from")
        start = replace(within, pool=pool, options=options)  # the pool may have moved
    cache.trim()
    run = Run(store, start, engine or make_engine(), cache, seed, progress)
    selection = start
    checked = Audit.of(store)
    for step in (checked, *steps) if within is None or not _audited(within) else steps:
        run = replace(run, store=store.where(selection.mask()), so_far=selection)
        selection = apply(run, step)
        if step is not checked or not steps:
            store.check_unchanged("its rows were checked" if step is checked else f"{step.name} ran")
    return replace(selection, source=Source(store, tuple(steps), cache))


def apply(run: Run, step: Method) -> Selection:
    """Return the selection after one more step, and report its notes and counts.

    Raises:
        UsageError: The step cannot run, or keeps no row.
    """
    before = len(run.so_far)
    try:
        with one_blas_thread:  # as in engines: results must not depend on the number of cores
            selection = step.select(run)
    except UsageError as error:
        raise type(error)(f"{step.name}: {error}") from None
    if isinstance(step, Audit) and len(selection.steps) == len(run.so_far.steps):
        return selection
    if not len(selection):
        raise UsageError(
            f"{step.name} keeps none of the {counted(before, 'row')} it was given; no rows would be left to train on"
        )
    for note in selection.steps[-1].notes:
        run.progress.say(f"{step.name}: {note}")
    repeated = f", {selection.uses:,} with repeats" if selection.repeats is not None else ""
    share = percent(len(selection), before)
    run.progress.say(f"{step.name}: kept {len(selection):,} of {counted(before, 'row')} ({share}){repeated}")
    return selection


def _audited(selection: Selection) -> bool:
    return bool(selection.steps) and selection.steps[0].method == Audit.name
