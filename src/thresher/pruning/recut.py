"""The last step of a selection with another budget or threshold, from what is cached."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError, ThresherError, UsageError
from thresher.io.pieces import Array, Piece
from thresher.pool.store import EmbeddingStore, reopen
from thresher.pruning.recipe import apply
from thresher.pruning.registry import METHODS, Method, build
from thresher.pruning.run import Run, SameKeys
from thresher.runtime.cache import Cache
from thresher.runtime.engine import make_engine
from thresher.runtime.parameters import recorded
from thresher.selection import Selection, Source

R = TypeVar("R")

_CUTS = ("keep", "threshold", "eps")  # of these, a method has one at a time


def recut(
    selection: Selection, changes: Mapping[str, Any], cache: str | os.PathLike[str] | Cache | None = None
) -> Selection:
    """Return a selection with other parameters of its last step, see :meth:`thresher.selection.Selection.recut`."""
    if not selection.steps or not changes:
        raise UsageError("give the parameters of the last step to change, such as keep='30%'")
    return Recut.of(selection, cache).cut(changes)


@dataclass(frozen=True, eq=False)
class Recut:
    """A selection whose last step is cut several times; what the cuts have in common is computed once.

    Attributes:
        selection: The selection.
        method: Its last method.
        run: A run on the rows that the last step was given.
        store: The pool.
    """

    selection: Selection
    method: Method
    run: Run
    store: EmbeddingStore

    @classmethod
    def of(cls, selection: Selection, cache: str | os.PathLike[str] | Cache | None = None) -> Recut:
        """Prepare the cuts of a selection with at least one step.

        Raises:
            UsageError: The last step is not a method that can be run again.
            PoolError: The pool has changed or cannot be opened.
        """
        method = _last_method(selection)
        last, source = len(selection.steps) - 1, selection.source
        before = replace(
            selection,
            dropped_by=np.where(selection.dropped_by == last, np.int16(-1), selection.dropped_by),
            steps=selection.steps[:-1],
            repeats=None,
        )
        store = reopen(selection)
        if cache is None:
            cache = (source and source.cache) or Cache.at()
        elif not isinstance(cache, Cache):
            cache = Cache.at(os.fspath(cache))
        vectors = {name: tuple(map(_Unread, pieces)) for name, pieces in store.layout.vectors.items()}
        unread = replace(store, layout=replace(store.layout, vectors=vectors)).where(before.mask())
        run = _OnlyCached(unread, before, make_engine(), cache, selection.steps[-1].seed, origin=store.version())
        return cls(selection, method, run, store)

    def cut(self, changes: Mapping[str, Any]) -> Selection:
        """Return the selection with other parameters of its last step.

        Raises:
            UsageError: The method has no such parameters, or its result for others needs vectors.
            PoolError: The pool has changed.
        """
        selection, source, cache = self.selection, self.selection.source, self.run.cache
        method = _with(self.method, changes)
        try:
            made = apply(self.run, method)
        except _VectorsNeededError:
            given = ", ".join(f"{name} = {value}" for name, value in changes.items())
            raise UsageError(
                f"{method.name} with {given} is more than another cut of what is in the cache {cache.folder}: it would "
                "read vectors; select again"
            ) from None
        if (made.repeats is None) != (selection.repeats is None):
            raise UsageError("an earlier step repeats rows, and how often is known only for kept rows; select again")
        if self.store.changed():
            raise PoolError(f"{selection.pool}: a file of the pool has changed; select again")
        methods = (*(source.methods[:-1] if source is not None else ()), method)
        return replace(made, source=Source(self.store, methods, cache))


def _last_method(selection: Selection) -> Method:
    """Return the method of the last step: the object that selected, or one made again from what is recorded."""
    step, source = selection.steps[-1], selection.source
    if source is not None and source.methods:
        method = source.methods[-1]
        if (method.name, recorded(method)) == (step.method, dict(step.parameters)):
            return method
    try:
        METHODS.find(step.method)
    except UsageError:
        if step.method not in METHODS.names():  # looks through all packages
            raise UsageError(f"the last step is {step.method!r}, which is not a method that can be run again") from None
        raise
    return build(step.method, step.parameters)


def _with(method: Method, changes: Mapping[str, Any]) -> Method:
    """Return a method with other parameters; a budget replaces a threshold, and the other way round."""
    optional = {item.name for item in fields(method) if item.default is None and item.name in _CUTS}  # type: ignore[arg-type]
    replaces = any(changes.get(name) is not None for name in optional)
    others = dict.fromkeys(optional - changes.keys()) if replaces else {}
    made: Method = replace(method, **{**others, **changes})  # type: ignore[type-var]
    return made


class _VectorsNeededError(ThresherError):
    """A method would read vectors."""


@dataclass(frozen=True)
class _OnlyCached(SameKeys):
    """A run that cannot read vectors, and keeps what methods compute."""

    held: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def remembered(self, key: Hashable, make: Callable[[], R]) -> R:
        """Return what was made before for these rows, or make it."""
        whole = (self.view, key)
        if whole not in self.held:
            self.held[whole] = make()
        return cast(R, self.held[whole])

    def local(self, name: str) -> NoReturn:
        """Refuse to copy the vectors, or to read an earlier copy."""
        raise _VectorsNeededError


@dataclass(frozen=True)
class _Unread:
    """A piece whose rows must not be read; everything else about it is known."""

    piece: Piece

    def __getattr__(self, name: str) -> Any:
        """Return what is known about the piece."""
        if name.startswith("__") or name == "piece":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.piece, name)

    def read(self, start: int, stop: int) -> Array:
        """Refuse."""
        raise _VectorsNeededError

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Refuse."""
        raise _VectorsNeededError

    def stream(self, batch: int) -> Iterator[Array]:
        """Refuse."""
        raise _VectorsNeededError
