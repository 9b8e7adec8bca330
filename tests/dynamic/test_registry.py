"""Policies by name: what a command line may ask for, and what it may not."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from tests.dynamic.policies import table
from thresher.dynamic import registry
from thresher.dynamic.policies.d_pruning import DPruning
from thresher.dynamic.policies.dynamic_random import DynamicRandom
from thresher.dynamic.policies.full import Full
from thresher.dynamic.policies.infobatch import InfoBatch
from thresher.dynamic.policies.scan import Scan
from thresher.dynamic.policies.static import Static
from thresher.dynamic.registry import (
    POLICIES,
    check_options,
    epochs_for,
    flags,
    policy_named,
)
from thresher.errors import UsageError
from thresher.runtime.parameters import share_of
from thresher.runtime.plugins import PluginWarning

EPOCHS = 20


def test_without_a_share_policies_are_as_published() -> None:
    assert policy_named("full", EPOCHS) == Full()
    assert policy_named("scan", EPOCHS) == Scan()
    assert policy_named("infobatch", EPOCHS) == InfoBatch(epochs=EPOCHS)
    assert policy_named("dynamic-random", EPOCHS) == DynamicRandom(keep=0.7)
    assert policy_named("d-pruning", EPOCHS) == DPruning(keep=0.7)


@pytest.mark.parametrize("name", ["scan", "infobatch", "dynamic-random", "d-pruning"])
@pytest.mark.parametrize("share", [0.1, 0.25])
def test_a_share_is_that_of_the_whole_run(name: str, share: float) -> None:
    assert policy_named(name, EPOCHS, prune=share).expected_pruned(EPOCHS) == pytest.approx(share)


def test_options_reach_the_policy() -> None:
    found = policy_named(
        "scan", EPOCHS, prune=0.1, options={"cycle": 2, "mode": "redundant", "warmup": 4, "scope": None}
    )
    assert isinstance(found, Scan)
    assert (found.cycle, found.mode, found.warmup, found.scope) == (2, "redundant", 4, "batch")
    assert policy_named("d-pruning", EPOCHS, options={"rule": "epsilon-greedy"}) == DPruning(
        keep=0.7, rule="epsilon-greedy"
    )


def test_selections_keep_their_repeats() -> None:
    mask = policy_named("static", 1, times_N=np.array([1, 0, 1], np.int32))
    repeated = policy_named("static", 1, times_N=np.array([1, 0, 3], np.int32))
    assert isinstance(mask, Static)
    assert mask.times_N.dtype == np.bool_
    assert repeated.expected_pruned(1) == pytest.approx(1 - 4 / 3)
    weighed = policy_named("static", 1, times_N=np.array([1, 0, 3], np.int32), options={"weigh": True})
    assert weighed.expected_pruned(1) == pytest.approx(1 / 3)
    assert (weighed.weighs(), repeated.weighs()) == (True, False)


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("skan", {}, "no policy 'skan'; there are d-pruning, .*scan.* Did you mean 'scan'"),
        ("full", {"prune": 0.3}, "policy full does not prune"),
        ("full", {"options": {"rho": 0.3}}, "policy full has no rho; it has no options"),
        ("infobatch", {"options": {"cycle": 3}}, "policy infobatch has no cycle; it has delta"),
        ("scan", {"prune": 0.3, "options": {"rho": 0.3}}, "rho cannot be combined with a share"),
        ("scan", {"times_N": np.ones(3, np.int32)}, "the other policies do not accept one"),
        ("static", {}, "policy static needs a selection"),
        ("scan", {"prune": 0.9}, "cannot prune 90.0% over 20 epochs"),
    ],
)
def test_what_cannot_be_is_refused(name: str, given: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        policy_named(name, EPOCHS, **given)


def test_messages_name_options_as_they_were_given() -> None:
    with pytest.raises(UsageError, match="policy infobatch has no full-epochs; it has delta"):
        check_options("infobatch", {"full-epochs": 1}, flags=True)
    with pytest.raises(UsageError, match="policy d-pruning has no rho; it has keep, rule, full-epochs"):
        check_options("d-pruning", {"rho": 0.1, "full-epochs": 2}, flags=True)
    with pytest.raises(UsageError, match="full-epochs = 0; give 1 or more"):
        check_options("d-pruning", {"full-epochs": 0}, flags=True)
    with pytest.raises(UsageError, match="policy infobatch has no warmup; it has delta"):
        policy_named("infobatch", EPOCHS, options={"warmup": 1})
    with pytest.raises(UsageError, match="policy scan: mode: 'low'; give one of both, redundant, ill-matched"):
        policy_named("scan", EPOCHS, options={"mode": "low"})
    assert check_options("scan", {"full-epochs": "1", "rho": None}, prune=0.2, flags=True) == {"warmup": 1}
    assert check_options("d-pruning", {"keep": "60%"}) == {"keep": 0.6}


@pytest.mark.parametrize(
    ("text", "share"),
    [("30%", 0.3), (" 30 % ", 0.3), ("0.3", 0.3), (".3", 0.3), ("33.3%", 0.333), ("0.5%", 0.005), ("3e-1", 0.3)],
)
def test_shares_are_read(text: str, share: float) -> None:
    assert share_of(text) == share_of(text, whole=True) == share


@pytest.mark.parametrize(
    "text", ["", "%", "nan", "inf", "0", "0%", "1", "100%", "150%", "1.5", "-0.1", "1e999", "a", "٣%"]
)
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"cannot read {text!r} as a share; give a share strictly between")):
        share_of(text)
    if text in ("1", "100%"):
        assert share_of(text, whole=True) == 1
    else:
        with pytest.raises(UsageError, match="above 0 and up to 1, like 30% or 0.3"):
            share_of(text, whole=True)


@pytest.mark.parametrize("name", [name for name in POLICIES.all() if name != "static"])
@pytest.mark.parametrize("prune", [None, 0.2])
@pytest.mark.parametrize("epochs", [6, 17, 40])
def test_as_many_epochs_as_the_samples_last(name: str, prune: float | None, epochs: int) -> None:
    """The policy for so many samples leaves out so much that they last about so long."""
    if name in ("full", "seta", "jest") and prune:
        return
    rows, options = 1000, {"reference": "losses.parquet"} if name in ("rho", "jest") else None
    policy = policy_named(name, epochs, prune=prune, options=options)
    samples = round(rows * epochs * (1 - policy.expected_pruned(epochs)))
    assert abs(epochs_for(samples, rows, name, prune=prune, options=options) - epochs) <= 1
    assert epochs_for(1, rows, name, prune=prune, options=options) == 1


def test_the_table_of_policies_is_that_of_the_fields() -> None:
    """Write it with ``python -m tests.dynamic.policies.table``."""
    assert table.written() == table.rows()


def test_flags_are_those_of_all_policies() -> None:
    known = {flag.flag: flag for flag in flags()}
    assert set(known) == {
        "rho", "cycle", "mode", "scope", "threshold", "full-epochs", "rule", "delta", "keep", "weigh",
        "mismatched", "redundant", "reference", "softness", "history", "groups", "alpha", "r", "chunks", "score",
    }  # fmt: skip
    assert known["full-epochs"].help == (
        "d-pruning, rho: epochs on all rows before pruning (default: 1); dissect: epochs on all rows before pruning "
        "(default: a quarter of the run); scan: epochs on all rows before pruning; sift: epochs on all rows before "
        "pruning (default: 2)."
    )
    assert known["keep"].help.startswith(
        "d-pruning, dissect, dynamic-random, rho: share of an epoch to keep (default: 0.7)"
    )
    assert (known["full-epochs"].kind, known["full-epochs"].least) == (int, 0)
    assert (known["mode"].metavar, known["rho"].metavar, known["cycle"].metavar) == (
        "both|redundant|ill-matched", "SHARE", "N",
    )  # fmt: skip
    with pytest.warns(PluginWarning) as told:
        assert "cycle" not in {flag.flag for flag in flags({"cycle"})}
    assert any("policy scan: the option cycle is not available" in str(one.message) for one in told)


@dataclass(frozen=True, kw_only=True)
class Clashing(DynamicRandom):
    """Have options that others have otherwise, or that cannot be offered."""

    name: ClassVar[str] = "clashing"
    mode: Literal["fast", "slow"] = field(default="fast", metadata={"help": "how fast"})
    cycle: int = field(default=5, metadata={"help": "of what", "flag": "my_cycle"})


@dataclass(frozen=True, kw_only=True)
class Nowhere(DynamicRandom):
    """Have an option whose type nobody knows."""

    name: ClassVar[str] = "nowhere"
    size: Unknown = field(default=None, metadata={"help": "of no type"})  # noqa: F821


def test_options_of_one_name_and_two_types_are_read_by_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**POLICIES.all(), "clashing": Clashing, "nowhere": Nowhere}

    class Point:
        """Found: these."""

        all = staticmethod(lambda: known)
        find = staticmethod(known.__getitem__)

    monkeypatch.setattr(registry, "POLICIES", Point)
    with pytest.warns(PluginWarning, match="policy nowhere: its options are not available: NameError: name 'Unknown'"):
        found = {flag.flag: flag for flag in flags()}
    assert (found["mode"].kind, found["mode"].metavar, set(found["mode"].of)) == (str, "TEXT", {"scan", "clashing"})
    assert found["my-cycle"].kind is int
    assert check_options("scan", {"mode": "redundant"}, flags=True) == {"mode": "redundant"}
    with pytest.raises(UsageError, match="policy scan: mode: 'fast'; give one of both, redundant, ill-matched"):
        check_options("scan", {"mode": "fast"}, flags=True)


@pytest.mark.parametrize("epochs", [0, 40_000])
def test_a_run_of_a_length_that_is_not_counted_is_refused(epochs: int) -> None:
    with pytest.raises(UsageError, match=f"a run of {epochs:,} epochs; give 1 to 32,768"):
        policy_named("full", epochs)
