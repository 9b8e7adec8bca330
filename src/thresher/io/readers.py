"""Readers of pools and of raw data: plug-ins that recognise their own format; the lowest rank wins."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Protocol, TypeVar

from thresher.errors import ThresherError
from thresher.runtime.parameters import is_required, parameters_of
from thresher.runtime.plugins import PluginPoint, PluginWarning, origin_of


class Reader(Protocol):
    """The common interface of both kinds of readers; see :class:`thresher.data.DataReader`."""

    name: ClassVar[str]
    rank: ClassVar[int]
    looks_like: ClassVar[str]

    def recognise(self, where: Any, /) -> bool: ...  # noqa: D102


R = TypeVar("R", bound=Reader)


def readers(point: PluginPoint[R]) -> list[R]:
    """Return all readers without required options, by rank."""
    made = [cls() for cls in point.all().values() if not any(map(is_required, parameters_of(cls)))]
    return sorted(made, key=lambda reader: (reader.rank, reader.name))


def recognising(point: PluginPoint[R], where: Any) -> R | None:
    """Return the reader of the lowest rank that recognises a location, None if none does.

    A reader of another package that raises an error is skipped with a warning.
    """
    for reader in readers(point):
        try:
            if reader.recognise(where):
                return reader
        except ThresherError:
            raise
        except Exception as error:
            if (package := origin_of(type(reader)).package) == "thresher":
                raise
            why = f"the {point.noun} {reader.name!r} of {package} failed to check whether it reads this: {error!r}"
            warnings.warn(why, PluginWarning, stacklevel=3)
    return None


def readable(point: PluginPoint[R]) -> str:
    """Return a description of what all readers read, for messages."""
    return "; ".join(f"{reader.name} ({reader.looks_like})" for reader in readers(point))
