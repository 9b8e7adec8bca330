"""Every policy that is found holds the contract: a new file under ``policies`` is tested as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.policies.dynamic_random import DynamicRandom
from thresher.dynamic.policy import Plan
from thresher.dynamic.registry import POLICIES
from thresher.testing import PolicyContract

# What a policy needs beside its file: one that takes no share has no budgets.
OWN: dict[str, dict[str, Any]] = {
    "full": {"budgets": ()},
    "static": {"budgets": ()},
    "jest": {"options": {"reference": "losses.parquet"}, "budgets": ()},
    "rho": {"options": {"reference": "losses.parquet"}},
    "seta": {"budgets": ()},
    "sift": {"options": {"mismatched": 0.2}},  # simulated losses show no mismatched pairs
}

for _name, _cls in POLICIES.all().items():
    _test = type(f"Test_{_name}", (PolicyContract,), {"plugin": _cls, **OWN.get(_name, {})})
    globals()[_test.__name__] = _test


@dataclass(frozen=True, kw_only=True)
class Writes(DynamicRandom):
    """Write into the ledger while it plans."""

    name: ClassVar[str] = "writes"

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        ledger.marks_N[0] += 1
        return super().plan(ledger, epoch, rng)


@dataclass(frozen=True, kw_only=True)
class Wanders(DynamicRandom):
    """Draw from a generator of its own."""

    name: ClassVar[str] = "wanders"

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        return super().plan(ledger, epoch, np.random.default_rng())


@dataclass(frozen=True, kw_only=True)
class Remembers(DynamicRandom):
    """Keep the first plan where no checkpoint has it."""

    name: ClassVar[str] = "remembers"
    seen: dict[int, Plan] = field(default_factory=dict, metadata={"option": False})

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        first = self.seen.setdefault(0, super().plan(ledger, epoch, rng))
        return Plan(epoch=epoch, phase="pruned", total=len(ledger), kept_N=first.kept_N)


@dataclass(frozen=True, kw_only=True)
class Promises(DynamicRandom):
    """Leave out half of what it promises."""

    name: ClassVar[str] = "promises"

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        return DynamicRandom(keep=(1 + self.keep) / 2).plan(ledger, epoch, rng)


@dataclass(frozen=True, kw_only=True)
class Weighs(DynamicRandom):
    """Weigh in float64, unannounced."""

    name: ClassVar[str] = "weighs"

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        return Plan(epoch=epoch, phase="pruned", total=len(ledger), weights_N=np.ones(len(ledger)))


@dataclass(frozen=True, kw_only=True)
class Announces(DynamicRandom):
    """Announce candidates and mark none; have an option without help, with a flag that is taken."""

    name: ClassVar[str] = "announces"
    marks_candidates: ClassVar[bool] = True
    seed: int = 0


@pytest.mark.parametrize(
    ("cls", "test"),
    [
        (Writes, "test_plans_follow_from_ledger_epoch_and_generator_alone"),
        (Wanders, "test_plans_follow_from_ledger_epoch_and_generator_alone"),
        (Remembers, "test_a_run_resumes_from_the_state_of_its_ledger"),
        (Promises, "test_a_share_to_prune_is_met"),
        (Weighs, "test_plans_fit_the_data"),
        (Announces, "test_candidates_are_marked_as_declared"),
        (Announces, "test_every_option_has_help_and_a_flag_of_its_own"),
    ],
)
def test_the_contract_is_broken_by(cls: Any, test: str) -> None:
    """A policy that breaks a promise fails, and fails the test of that promise."""
    case = type("Test", (PolicyContract,), {"plugin": cls})()
    with pytest.raises(AssertionError):
        getattr(case, test)()
