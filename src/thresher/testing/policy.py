"""The contract of policies, as tests to inherit; and a training loop without a model, to run policies on given losses.

class TestMine(PolicyContract):
    plugin = Mine
"""

from __future__ import annotations

import pickle
from dataclasses import MISSING, is_dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from thresher.dynamic.ledger import Ledger, Losses
from thresher.dynamic.policy import PHASES, Plan, Policy, end_epoch
from thresher.dynamic.registry import flag_of, options_of
from thresher.errors import UsageError
from thresher.runtime import parameters

ROWS, EPOCHS, BATCH = 600, 12, 50
PARTS = ("kept_N", "weights_N", "repeats_N")


def play_epoch(policy: Policy, ledger: Ledger, losses_NR: Losses, epoch: int, batch: int, seed: int = 0) -> Plan:
    """Run one epoch: plan, record batches in random order, finish; return the plan."""
    rng = np.random.Generator(np.random.Philox([seed, epoch, 1]))
    plan = policy.plan(ledger, epoch, rng)
    rows = np.random.Generator(np.random.Philox([seed, epoch, 2])).permutation(plan.rows())
    for lo in range(0, len(rows), batch):
        rows_B = rows[lo : lo + batch]
        marks_B = policy.marks(losses_NR[rows_B], rng) if plan.collects else None
        ledger.record(rows_B, losses_NR[rows_B], epoch, marks_B)
    end_epoch(policy, ledger, plan, rng)
    return plan


def simulated(rows: int, epochs: int, *, agree: float = 0.9, seed: int = 0) -> Losses:
    """Return simulated losses, (epochs, rows, 2) float32: decreasing, skewed, in two directions that mostly agree."""
    rng = np.random.Generator(np.random.Philox(seed))
    own = rng.gamma(2.0, 1.0, (rows, 1))
    noise = rng.gamma(2.0, 1.0, (epochs, rows, 2))
    falling = 2.0 ** -np.arange(epochs)[:, None, None] + 0.5
    return (falling * (agree * own + (1 - agree) * noise)).astype(np.float32)


class PolicyContract:
    """Options from text, plans that depend only on ledger and generator, budgets met, candidates as declared.

    Attributes:
        plugin: The policy, a frozen dataclass.
        options: Options to make it with, if it has required ones.
        budgets: Shares of a run of 20 epochs that it can prune; () for a policy that takes no share.
        slack: How far it may miss the share on simulated losses.
    """

    plugin: ClassVar[type[Policy]]
    options: ClassVar[dict[str, Any]] = {}
    budgets: ClassVar[tuple[float, ...]] = (0.1, 0.25)
    slack: ClassVar[float] = 0.02

    def make(self, **options: Any) -> Policy:
        """Return the policy for a run of 12 epochs on 600 rows."""
        values = {**self.options, **options}
        if self.plugin.needs_selection:
            return self.plugin.for_selection(np.arange(ROWS) % 3, **values)
        return self.plugin.for_run(EPOCHS, **values)

    def new_ledger(self, policy: Policy) -> Ledger:
        """Return the ledger of a run on 600 rows at its start, with references if the policy needs them."""
        ledger = policy.ledger(ROWS)
        if policy.needs_references:
            ledger.refer(simulated(ROWS, 1, seed=1)[0].mean(axis=1))
        return ledger

    def played(self, policy: Policy, epochs: int) -> tuple[Ledger, list[Plan]]:
        """Return the ledger and the plans of a run on decreasing losses."""
        ledger, losses = self.new_ledger(policy), simulated(ROWS, epochs)
        return ledger, [play_epoch(policy, ledger, losses[epoch], epoch, BATCH) for epoch in range(epochs)]

    def test_it_is_a_frozen_dataclass_with_a_name_and_a_summary(self) -> None:
        """The name is the value of ``--policy``; the first line of the docstring is the summary in tables."""
        plugin: Any = self.plugin
        assert is_dataclass(plugin)
        assert vars(plugin)["__dataclass_params__"].frozen
        assert self.plugin.name == self.plugin.name.strip().lower().replace(" ", "-") != ""
        assert (self.plugin.__doc__ or "").strip().splitlines()[0].endswith((".", ":"))
        assert self.make() is not None

    def test_every_option_has_help_and_a_flag_of_its_own(self) -> None:
        """No flag of the trainers has the same name."""
        from thresher.cli.train import clip, moco
        from thresher.train.open_clip import OWN

        taken = {name.lstrip("-") for command in (clip, moco) for param in command.params for name in param.opts}
        for item in options_of(self.plugin):
            assert item.metadata.get("help"), f"the option {item.name} has no help"
            assert not item.metadata["help"].endswith("."), f"the help of {item.name} ends with a period"
            flag = flag_of(item)
            assert flag not in taken | {*OWN, "policy", "prune"}, f"{flag} is taken; give metadata={{'flag': ...}}"

    def test_options_are_made_from_text(self) -> None:
        """Every word of a ``Literal``, and the text of a default or an example, gives the value again."""
        for item in options_of(self.plugin):
            kind = parameters.type_of(self.plugin, item.name)
            words: list[Any] = list(parameters.choices(parameters.without_none(kind)))
            value = self.options.get(item.name, item.default)
            words += [value] if value not in (None, MISSING) else []
            for word in words:
                text = str(word).lower() if isinstance(word, bool) else str(word)
                assert parameters.read(kind, text) == word
                assert getattr(self.make(**{item.name: word}), item.name) == word

    def test_unknown_options_are_refused(self) -> None:
        """With a TypeError or a UsageError."""
        with pytest.raises((TypeError, UsageError)):
            self.make(this_is_no_option=1)

    def test_options_are_checked_when_it_is_made(self) -> None:
        """A share may be text, such as "30%"; a value of a wrong type is a UsageError of one line that names it."""
        made: Any = self.make()
        for item in options_of(self.plugin):
            kind, value = parameters.type_of(self.plugin, item.name), getattr(made, item.name)
            if isinstance(value, float) and parameters.without_none(kind) is not float:  # a share
                again = replace(made, **{item.name: f"{value * 100!r}%"})
                assert getattr(again, item.name) == pytest.approx(value), "mark the class @policy"
            with pytest.raises(UsageError, match=rf"policy {self.plugin.name}: {item.name} = ") as error:
                replace(made, **{item.name: object()})
            assert "\n" not in str(error.value)

    def test_plans_fit_the_data(self) -> None:
        """Arrays have the right length and type; every epoch has a row."""
        _, plans = self.played(policy := self.make(), EPOCHS)
        for epoch, plan in enumerate(plans):
            assert (plan.epoch, plan.total, plan.phase in PHASES) == (epoch, ROWS, True)
            assert 0 < len(plan) == len(plan.rows())
            for name, dtype in zip(PARTS, (np.bool_, np.float32, np.int32), strict=True):
                part = getattr(plan, name)
                assert part is None or (part.shape, part.dtype) == ((ROWS,), np.dtype(dtype)), name
            if plan.weights_N is not None:
                assert policy.weighs(), "a plan has weights, so weighs() must return True"
                assert np.isfinite(plan.weights_N).all()
                assert (plan.weights_N[plan.rows()] > 0).all()
            if plan.repeats_N is not None:
                assert plan.kept_N is not None
                np.testing.assert_array_equal(plan.repeats_N > 0, plan.kept_N)

    def test_plans_follow_from_ledger_epoch_and_generator_alone(self) -> None:
        """Copies of the policy and the ledger give the same plan; planning does not change the ledger."""
        policy, losses = self.make(), simulated(ROWS, EPOCHS)
        ledger = self.new_ledger(policy)
        for epoch in range(EPOCHS):
            before, copy = ledger.state(), pickle.loads(pickle.dumps(policy))
            plans = [
                one.plan(known, epoch, np.random.Generator(np.random.Philox([7, epoch])))
                for one, known in ((policy, ledger), (copy, Ledger.from_state(before)), (policy, ledger))
            ]
            for plan in plans[1:]:
                _same(plans[0], plan)
            _unchanged(before, ledger)
            play_epoch(policy, ledger, losses[epoch], epoch, BATCH)

    def test_a_run_resumes_from_the_state_of_its_ledger(self) -> None:
        """All state is in the ledger: resumed from it, a run has the same plans."""
        policy, losses = self.make(), simulated(ROWS, EPOCHS)
        ledger = self.new_ledger(policy)
        for epoch in range(EPOCHS // 2):
            play_epoch(policy, ledger, losses[epoch], epoch, BATCH)
        again = Ledger.from_state(ledger.state())
        for epoch in range(EPOCHS // 2, EPOCHS):
            one = play_epoch(policy, ledger, losses[epoch], epoch, BATCH)
            _same(one, play_epoch(self.make(), again, losses[epoch], epoch, BATCH))

    def test_plans_come_back_from_their_state(self) -> None:
        """As for a checkpoint within an epoch."""
        for plan in self.played(self.make(), EPOCHS)[1]:
            _same(Plan.from_state(plan.state()), plan)

    def test_marks_are_bits(self) -> None:
        """Marks are (B,) uint8; the same losses and generator give the same marks."""
        policy, losses = self.make(), simulated(BATCH, 1)[0]
        marks = [policy.marks(losses, np.random.Generator(np.random.Philox(1))) for _ in range(2)]
        assert (marks[0].shape, marks[0].dtype) == ((BATCH,), np.dtype(np.uint8))
        assert marks[0].max(initial=0) <= 7
        np.testing.assert_array_equal(marks[0], marks[1])

    def test_candidates_are_marked_as_declared(self) -> None:
        """``coreset`` uses ``marks_candidates`` to know whether a run can rank rows."""
        ledger, _ = self.played(self.make(), EPOCHS)
        assert bool(ledger.times_N.any()) == self.plugin.marks_candidates

    def test_forecasts_are_shares(self) -> None:
        """Their mean is the share that the run is expected to prune; repeats make it negative."""
        policy = self.make()
        shares = [policy.forecast(epoch) for epoch in range(EPOCHS)]
        assert all(isinstance(share, float) and share < 1 for share in shares)
        assert policy.expected_pruned(EPOCHS) == pytest.approx(np.mean(shares))

    def test_a_share_to_prune_is_met(self) -> None:
        """In the forecast, and on simulated losses."""
        epochs = 20
        values = {
            item.name: self.options[item.name]
            for item in options_of(self.plugin)
            if item.name in self.options and not item.metadata.get("follows")
        }
        for share in self.budgets:
            policy = self.plugin.for_budget(share, epochs, **values)
            assert policy.expected_pruned(epochs) == pytest.approx(share)
            _, plans = self.played(policy, epochs)
            assert np.mean([plan.pruned for plan in plans]) == pytest.approx(share, abs=self.slack)
        for share in (0.0, 1.0) if self.budgets else (0.3,):
            with pytest.raises(UsageError):
                self.plugin.for_budget(share, epochs, **values)

    def test_it_pickles(self) -> None:
        """For data loaders and worker processes."""
        policy = self.make()
        again = pickle.loads(pickle.dumps(policy))
        assert type(again) is type(policy)
        for item in parameters.parameters_of(self.plugin):
            np.testing.assert_array_equal(getattr(again, item.name), getattr(policy, item.name))


def _same(one: Plan, other: Plan) -> None:
    assert (one.epoch, one.phase, one.total, one.collects) == (other.epoch, other.phase, other.total, other.collects)
    for name in PARTS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(a, b)


def _unchanged(before: dict[str, npt.NDArray[Any]], ledger: Ledger) -> None:
    for name, array in ledger.state().items():
        np.testing.assert_array_equal(array, before[name], err_msg=f"planning changed {name} of the ledger")
