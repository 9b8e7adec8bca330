"""Policies by name, and their options as command lines give them.

A policy is a frozen dataclass derived from :class:`thresher.dynamic.policy.Policy`, in a file of its own in
``dynamic/policies`` or in another package. Its fields are its options: the flags of ``thresher train`` and of
``python -m thresher.train.open_clip`` are made from them.
"""

from __future__ import annotations

import typing
import warnings
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass
from typing import Any

import numpy.typing as npt

from thresher.dynamic.policy import Policy
from thresher.errors import UsageError, suggest
from thresher.runtime import parameters
from thresher.runtime.plugins import PluginPoint, PluginWarning

POLICIES: PluginPoint[Policy] = PluginPoint(
    "policy",
    "thresher.dynamic.policies",
    "thresher.policies",
    needs=("ledger", "plan", "marks", "finish", "forecast", "for_run", "for_budget"),
)


def options_of(cls: type[Policy]) -> list[Field[Any]]:
    """Return the fields of a policy that are options: all but those marked ``metadata={"option": False}``."""
    return [item for item in parameters.parameters_of(cls) if item.metadata.get("option", True)]


def flag_of(item: Field[Any]) -> str:
    """Return what an option is called on command lines, without dashes before it."""
    return str(item.metadata.get("flag", item.name)).replace("_", "-")


@dataclass(frozen=True)
class Flag:
    """An option as command lines offer it: one flag for all policies that have it.

    Attributes:
        flag: What it is called, without dashes before it, such as "full-epochs".
        of: The field of each policy that has it, by the name of the policy.
        kind: Its type; ``str`` where policies differ, then each reads the text itself.
        least: The least whole number that any of them takes, or None.
    """

    flag: str
    of: Mapping[str, Field[Any]]
    kind: Any
    least: int | None

    @property
    def metavar(self) -> str:
        """Return what help calls its value."""
        if words := parameters.choices(self.kind):
            return "|".join(words)
        reads = next((note for note in typing.get_args(self.kind)[1:] if isinstance(note, parameters.Reads)), None)
        return reads.metavar if reads else {int: "N", float: "X"}.get(self.kind, "TEXT")

    @property
    def help(self) -> str:
        """Say which policies have it, what it does, and its default."""
        policies: dict[str, list[str]] = {}
        for name, item in self.of.items():
            shown = isinstance(item.default, (int, float, str)) and not isinstance(item.default, bool)
            default = f" (default: {item.default})" if shown else ""
            policies.setdefault(f"{item.metadata.get('help', '')}{default}", []).append(name)
        return "; ".join(f"{', '.join(names)}: {text}" for text, names in policies.items()) + "."


def flags(taken: Collection[str] = ()) -> list[Flag]:
    """Return the flags of all policies, those of one policy side by side.

    Args:
        taken: Flags that the command has already. An option of another package's policy that is called the same is
            not offered, nor are those of a policy whose types cannot be found; a
            :class:`~thresher.runtime.plugins.PluginWarning` says so.
    """
    fields: dict[str, dict[str, tuple[Field[Any], Any]]] = {}
    for name, cls in POLICIES.all().items():
        options = options_of(cls)
        try:
            kinds = {item.name: parameters.without_none(parameters.type_of(cls, item.name)) for item in options}
        except Exception as error:  # a name that is imported for type checkers alone, for one
            _warn(f"policy {name}: its options are not offered: {type(error).__name__}: {error}")
            continue
        for item in options:
            if (flag := flag_of(item)) in taken:
                _warn(f"policy {name}: the option {flag} is not offered, as the command has one; name it by 'flag'")
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
    """Return the options of a policy by field, values of their types; refuse those that it cannot take.

    Args:
        name: Of the policy.
        options: By field, or by flag; None stands for the default, and text is read as the type of the field.
        prune: Share of the samples of the run to leave out, or None.
        flags: Whether ``options`` has flags ("full-epochs"), not fields ("warmup"); messages say the same.

    Raises:
        UsageError: No such policy, an option that it does not have, that goes with no share, or whose value is not
            allowed.
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
        raise UsageError(f"{', '.join(sorted(odd))} follow from the share to prune; give one or the other")
    return values


def check_selection(name: str, has_selection: bool) -> None:
    """Refuse a policy that needs a selection without one, and any other with one.

    Raises:
        UsageError: Says which policies need one.
    """
    if has_selection != POLICIES.find(name).needs_selection:
        need = " or ".join(known for known, cls in POLICIES.all().items() if cls.needs_selection)
        raise UsageError(f"policy {need} needs a selection, and no other policy takes one")


def policy_named(
    name: str,
    epochs: int,
    *,
    prune: float | None = None,
    times_N: npt.NDArray[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Policy:
    """Return the policy of a name for a run of ``epochs`` epochs.

    Args:
        name: Of the policy.
        epochs: Length of the run.
        prune: Share of the samples of the run to leave out, warm-up included; None for the policy as published
            (``dynamic-random`` and ``d-pruning``, published with several, leave out 30% of an epoch).
        times_N: (N,) how often each row comes, for a policy that needs a selection.
        options: Options of the policy by field; None stands for the default.

    Raises:
        UsageError: No such policy, an option it does not have, or a share it cannot reach.
    """
    values = check_options(name, options, prune=prune)
    check_selection(name, times_N is not None)
    cls = POLICIES.find(name)
    if prune is not None:
        return cls.for_budget(prune, epochs, **values)
    return cls.for_run(epochs, **values) if times_N is None else cls.for_selection(times_N, **values)


def epochs_for(
    samples: int, rows: int, name: str, *, prune: float | None = None, options: Mapping[str, Any] | None = None
) -> int:
    """Return about how many epochs of a policy take ``samples`` samples of ``rows`` rows, 1 or more.

    A policy plans by the length of the run, and the length follows from what it leaves out: found by iteration.
    A run of so many samples ends where they do, not where its last epoch would: that may cut into a cycle of ``scan``,
    or into the last epochs of ``infobatch``, which are on everything. So the share left out may miss ``prune`` by up to
    2 points, more in runs of a few epochs; the number of samples is exact.
    """
    if POLICIES.find(name).needs_selection:
        raise UsageError("the epochs of a selection follow from its rows")
    epochs = max(1, round(samples / rows))
    for _ in range(100):
        pruned = policy_named(name, epochs, options=options).expected_pruned(epochs) if prune is None else prune
        following = max(1, round(samples / (rows * (1 - pruned))))
        if following == epochs:
            break
        epochs = following
    return epochs
