"""All errors that thresher raises on purpose.

    ThresherError
    ├── UsageError          an invalid flag, parameter or recipe
    │   └── BudgetError     a budget that the available rows cannot meet
    ├── PoolError           a file of the pool that is missing, damaged or unsupported; names the file
    │   └── BadRowsError    rows in a good file that cannot be used (NaN, zero, repeated key)
    ├── UnreachedError      data that may be good but was not reached, for example during a network failure
    │   └── AccessError     access was denied: an expired token, a missing permission
    ├── ChangedError        data that changed while a command read it
    ├── OutputError         a result that could not be written; no partial file is left behind
    └── MissingPackageError a package is not installed
        └── MissingExtraError   an extra of thresher is not installed; says what to type

Messages say what was given, what is allowed and what to type next.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any


class ThresherError(Exception):
    """Base of all errors that carry a message meant for the user."""


class UsageError(ThresherError):
    """An invalid flag, parameter or recipe."""


class BudgetError(UsageError):
    """A budget that the available rows cannot meet."""


class PoolError(ThresherError):
    """A file of the pool that is missing, damaged or unsupported."""


class BadRowsError(PoolError):
    """Rows that cannot be used: NaN, infinite or zero vectors, repeated or unsafe keys."""


class UnreachedError(ThresherError):
    """Data that was not reached. Unlike a damaged file it is never skipped, because it may be good."""


class AccessError(UnreachedError):
    """Access to data was denied: a permission is missing, or credentials are missing or have expired."""


class ChangedError(ThresherError):
    """Data changed while a command read it, so a result would mix two versions of the data."""


class OutputError(ThresherError):
    """A result that could not be written."""


class MissingPackageError(ThresherError):
    """A package that is needed to read something is not installed."""


INSTALL_EXTRA = "pip install '.[{extra}]'"  # in a checkout: there is no release on a registry yet


class MissingExtraError(MissingPackageError):
    """An extra of thresher is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        """Say that ``what`` needs an extra, and how to install it."""
        super().__init__(
            f"{what} needs an extra that is not installed; in a checkout of thresher type: "
            f"{INSTALL_EXTRA.format(extra=extra)}"
        )


def require_package(package: str, what: str) -> Any:
    """Return a package that ``what`` needs.

    Raises:
        MissingPackageError: It is not installed; the message says what to type.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingPackageError(f"{what} needs the package {package}; type: pip install {package}") from None


def installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # hidden on purpose, as tests do
        return False


def suggest(value: str, allowed: Iterable[str]) -> str:
    """Return ' Did you mean ...?' when an allowed value is close to ``value``, else ''."""
    import difflib

    close = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
