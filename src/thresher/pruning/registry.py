"""Methods by name.

A method is a frozen dataclass of parameters, marked ``@method("name")``, with ``select(run) -> Selection``. Its fields
define the command line flags, the keys in recipes and the help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from thresher.runtime import parameters
from thresher.runtime.plugins import PluginPoint

if TYPE_CHECKING:
    from thresher.pruning.run import Run
    from thresher.selection import Selection

C = TypeVar("C", bound=type[Any])


class Method(Protocol):
    """A frozen dataclass of parameters that selects rows."""

    name: ClassVar[str]

    def select(self, run: Run) -> Selection:
        """Return the selection so far, with one more step."""
        ...


METHODS: PluginPoint[Method] = PluginPoint("method", "thresher.pruning.methods", "thresher.methods", needs=("select",))


def method(name: str) -> Callable[[C], C]:
    """Mark a frozen dataclass as the method with this name.

    Its parameters are checked and converted whenever it is made: ``keep="30%"``, ``keep=0.3`` and ``keep=1000`` become
    a :class:`~thresher.selection.Keep` before ``__post_init__``, and a value of a wrong type is a ``UsageError`` that
    says what is allowed.
    """
    return parameters.named(name, name)


def only_columns(made: Method) -> tuple[str, ...] | None:
    """Return the columns that a method reads if it reads no embeddings; None if it may, or does not say.

    A class says it with ``only_columns``, a tuple of names or a property; "text" is the caption.
    """
    columns: tuple[str, ...] | None = getattr(made, "only_columns", None)
    return columns


def build(name: str, values: Mapping[str, Any]) -> Method:
    """Make a method from plain values (flags, TOML).

    Raises:
        UsageError: There is no such method, a parameter is unknown or missing, or a value is not allowed.
    """
    return parameters.build(METHODS.find(name), name, values)
