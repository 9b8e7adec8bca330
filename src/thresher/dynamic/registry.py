"""Policies by name, and their command line options.

A policy is a frozen dataclass derived from :class:`thresher.dynamic.policy.Policy`, marked ``@policy("name")``, in its
own file in ``dynamic/policies`` or in another package. The flags of ``thresher train`` and of
``python -m thresher.train.open_clip`` are generated from its fields.
"""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass
from typing import Any, TypeVar

import numpy.typing as npt

from thresher.dynamic.ledger import check_length
from thresher.dynamic.policy import Policy
from thresher.errors import UsageError, suggest
from thresher.runtime import parameters
from thresher.runtime.plugins import PluginPoint, PluginWarning

C = TypeVar("C", bound=type[Any])

POLICIES: PluginPoint[Policy] = PluginPoint(
    "policy",
    "thresher.dynamic.policies",
    "thresher.policies",
    needs=("ledger", "plan", "marks", "remember", "finish", "forecast", "for_run", "for_budget"),
)


def policy(name: str) -> Callable[[C], C]:
    """Mark a frozen dataclass as the policy with this name.

    Its options are checked and converted whenever it is made, as those of methods: ``Scan(rho="30%")`` is
    ``Scan(rho=0.3)``, and a value of a wrong type is a ``UsageError`` that says what is allowed.
    """
    return parameters.named(name, f"policy {name}")


def options_of(cls: type[Policy]) -> list[Field[Any]]:
    """Return the fields of a policy that are options: all but those marked ``metadata={"option": False}``."""
    return [item for item in parameters.parameters_of(cls) if item.metadata.get("option", True)]


def flag_of(item: Field[Any]) -> str:
    """Return the command line name of an option, without leading dashes."""
    return str(item.metadata.get("flag", item.name)).replace("_", "-")


@dataclass(frozen=True)
class Flag:
    """A command line flag: one for all policies that have the option.

    Attributes:
        flag: Its name without leading dashes, such as "full-epochs".
        of: The fields it sets, by the name of the policy.
        kind: Its type; ``str`` if the policies differ, then each parses the text itself.
        least: The smallest integer that any of them accepts, or None.
    """

    flag: str
    of: Mapping[str, Field[Any]]
    kind: Any
    least: int | None

    @property
    def metavar(self) -> str:
        """Return the placeholder for its value in help texts."""
        if words := parameters.choices(self.kind):
            return "|".join(words)
        reads = next((note for note in typing.get_args(self.kind)[1:] if isinstance(note, parameters.Reads)), None)
        return reads.metavar if reads else {int: "N", float: "X"}.get(self.kind, "TEXT")

    @property
    def help(self) -> str:
        """Return the help text: which policies have the option, what it does, and its default."""
        policies: dict[str, list[str]] = {}
        for name, item in self.of.items():
            default = f" (default: {usual})" if (usual := default_of(item)) else ""
            policies.setdefault(f"{item.metadata.get('help', '')}{default}", []).append(name)
        return "; ".join(f"{', '.join(names)}: {text}" for text, names in policies.items()) + "."


def default_of(item: Field[Any]) -> str:
    """Return the default of an option as help texts show it: ``usual`` of its metadata, or its own; "" for none."""
    value = item.metadata.get("usual", item.default)
    return str(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else ""


def flags(taken: Collection[str] = ()) -> list[Flag]:
    """Return the flags of all policies, grouped by policy.

    Args:
        taken: Flags that the command already has. A policy option with the same name is skipped, as are all options
            of a policy whose type hints cannot be resolved; both emit a
            :class:`~thresher.runtime.plugins.PluginWarning`.
    """
    fields: dict[str, dict[str, tuple[Field[Any], Any]]] = {}
    for name, cls in POLICIES.all().items():
        options = options_of(cls)
        try:
            kinds = {item.name: parameters.without_none(parameters.type_of(cls, item.name)) for item in options}
        except Exception as error:  # for example a name that is imported under TYPE_CHECKING only
            _warn(f"policy {name}: its options are not available: {type(error).__name__}: {error}")
            continue
        for item in options:
            if (flag := flag_of(item)) in taken:
                _warn(
                    f"policy {name}: the option {flag} is not available, because the command has a flag of that name; "
                    "set another one with metadata 'flag'"
                )
                continue
            fields.setdefault(flag, {})[name] = item, kinds[item.name]
    result = []
    for flag, of in fields.items():
        of_all = [kind for _, kind in of.values()]
        least = [item.metadata["least"] for item, _ in of.values() if "least" in item.metadata]
        result.append(
            Flag(
                flag=flag,
                of={name: item for name, (item, _) in of.items()},
                kind=of_all[0] if all(kind == of_all[0] for kind in of_all) else str,
                least=min(least) if len(least) == len(of) else None,
            )
        )
    return result


def _warn(what: str) -> None:
    warnings.warn(what, PluginWarning, stacklevel=3)


def check_options(
    name: str, options: Mapping[str, Any] | None, *, prune: float | None = None, flags: bool = False
) -> dict[str, Any]:
    """Validate the options of a policy, and return them by field, converted to the types of the fields.

    Args:
        name: The name of the policy.
        options: Options by field or by flag; None means the default, and text is parsed as the type of the field.
        prune: Share of the samples of the run to leave out, or None.
        flags: Whether ``options`` has flags ("full-epochs") rather than fields ("warmup"); messages use the same.

    Raises:
        UsageError: The policy is unknown, it does not have an option, an option cannot be combined with ``prune``, or
            a value is not allowed.
    """
    cls = POLICIES.find(name)
    known = {flag_of(item) if flags else item.name: item for item in options_of(cls)}
    chosen = {key: value for key, value in (options or {}).items() if value is not None}
    if odd := sorted(chosen.keys() - known.keys()):
        has = ", ".join(known) or "no options"
        raise UsageError(f"policy {name} has no {', '.join(odd)}; it has {has}.{suggest(odd[0], known)}")
    values = {}
    for key, value in chosen.items():
        item = known[key]
        kind = parameters.type_of(cls, item.name)
        if isinstance(value, str):
            try:
                value = parameters.read(kind, value)
            except UsageError as error:
                raise UsageError(f"policy {name}: {key}: {error}") from None
        values[item.name] = value = parameters.coerce(f"policy {name}: {key}", kind, value)
        if (least := item.metadata.get("least")) is not None and value < least:
            raise UsageError(f"policy {name}: {key} = {value}; give {least} or more")
    if prune is not None and (odd := [key for key in chosen if known[key].metadata.get("follows")]):
        raise UsageError(
            f"{', '.join(sorted(odd))} cannot be combined with a share to prune, which sets it; give one or the other"
        )
    return values


def check_selection(name: str, has_selection: bool) -> None:
    """Check that a selection is given if, and only if, the policy needs one.

    Raises:
        UsageError: Names the policies that need one.
    """
    if has_selection != POLICIES.find(name).needs_selection:
        need = " or ".join(known for known, cls in POLICIES.all().items() if cls.needs_selection)
        raise UsageError(f"policy {need} needs a selection; the other policies do not accept one")


def policy_named(
    name: str,
    epochs: int,
    *,
    prune: float | None = None,
    times_N: npt.NDArray[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Policy:
    """Return the policy with this name for a run of ``epochs`` epochs.

    Args:
        name: The name of the policy.
        epochs: Length of the run.
        prune: Share of the samples of the run to leave out, including the warm-up; None for the published defaults
            (``dynamic-random`` and ``d-pruning`` were published with several shares; they leave out 30% of an epoch).
        times_N: (N,) how often each row is used, for a policy that needs a selection.
        options: Options of the policy by field; None means the default.

    Raises:
        UsageError: The policy is unknown, does not have an option, or cannot reach the share.
    """
    check_length(epochs)
    values = check_options(name, options, prune=prune)
    check_selection(name, times_N is not None)
    cls = POLICIES.find(name)
    if prune is not None:
        return cls.for_budget(prune, epochs, **values)
    return cls.for_run(epochs, **values) if times_N is None else cls.for_selection(times_N, **values)


def epochs_for(
    samples: int, rows: int, name: str, *, prune: float | None = None, options: Mapping[str, Any] | None = None
) -> int:
    """Return about how many epochs a policy needs for ``samples`` samples of a dataset of ``rows`` rows, 1 or more.

    The policy depends on the length of the run, and the length on what the policy leaves out, so the number is found
    by iteration. A run with a fixed number of samples may end in the middle of an epoch. That may cut a cycle of
    ``scan``, or the last epochs of ``infobatch``, which are on all rows. So the share left out may differ from
    ``prune`` by up to 2 percentage points, more in runs of a few epochs; the number of samples is exact.
    """
    if POLICIES.find(name).needs_selection:
        raise UsageError(f"policy {name} trains on a selection: its number of rows gives the number of epochs")
    epochs = max(1, round(samples / rows))
    for _ in range(100):
        pruned = policy_named(name, epochs, options=options).expected_pruned(epochs) if prune is None else prune
        following = max(1, round(samples / (rows * (1 - pruned))))
        if following == epochs:
            break
        epochs = following
    return epochs
