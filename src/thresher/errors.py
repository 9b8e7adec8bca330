"""Everything thresher raises on purpose.

    ThresherError
    ├── UsageError          a flag, parameter or recipe that cannot be carried out
    │   └── BudgetError     a budget that the rows at hand cannot meet
    ├── PoolError           a file of the pool that cannot be trusted; names the file
    │   └── BadRowsError    rows in a good file that cannot be used (NaN, zero, repeated key)
    ├── UnreachedError      data that cannot be reached just now, as when a network is down; nothing is known of it
    ├── OutputError         a result that could not be written; nothing half-written is left
    └── MissingExtraError   an optional dependency is absent; says what to type

Messages say what was given, what is allowed and what to type next.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


class ThresherError(Exception):
    """Base of all errors that carry a message meant for the user."""


class UsageError(ThresherError):
    """A flag, parameter or recipe that cannot be carried out."""


class BudgetError(UsageError):
    """A budget that the rows at hand cannot meet."""


class PoolError(ThresherError):
    """A file of the pool that cannot be trusted."""


class BadRowsError(PoolError):
    """Rows that cannot be used: NaN, infinite or zero vectors, repeated or unsafe keys."""


class UnreachedError(ThresherError):
    """Data that cannot be reached just now: unlike a damaged file it is not set aside, for it may be good."""


class OutputError(ThresherError):
    """A result that could not be written."""


class MissingExtraError(ThresherError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        """Say that ``what`` needs ``pip install 'thresher[extra]'``."""
        super().__init__(f"{what} needs an extra that is not installed; type: pip install 'thresher[{extra}]'")


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # hidden on purpose
        return False


def suggest(given: str, allowed: Iterable[str]) -> str:
    """Return ' Did you mean ...?' when something close to ``given`` is allowed, else ''."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
