"""Plans are read strictly: every mistake is an error that says what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import thresher as th
from thresher.errors import UsageError
from thresher.lab.plan import Plan, Row, Trainer, shipped_plans
from thresher.pruning.recipe import Recipe

PLAN = """
name = "small"
seeds = 2
[data]
train = "a.parquet"
evals = ["b.parquet"]
[[row]]
name = "full"
[[row]]
name = "scan"
policy = "scan"
prune = 0.3
[[row]]
name = "random"
keep = ["5%", "10%"]
pool = "data"
steps = [{ method = "random" }]
[profile.fast]
seeds = [3, 5]
trainer = { epochs = 2 }
[profile.fast.data]
train = "c.parquet"
"""


def test_a_plan_has_its_rows_and_a_row_for_every_budget() -> None:
    plan = Plan.parse(PLAN)
    assert [row.name for row in plan.rows] == ["full", "scan", "random-5%", "random-10%"]
    assert plan.rows[3].steps == ({"method": "random", "keep": "10%"},)
    assert (plan.seeds, plan.rows[1].prune, [one.name for one in plan.corpora]) == ((0, 1), 0.3, ["as-is"])


@pytest.mark.parametrize(
    ("steps", "pool"),
    [
        ('[{ method = "random", keep = "50%" }]', "data"),
        ('[{ method = "filter", where = "words(text) > 2" }, { method = "random", keep = "50%" }]', "data"),
        ('[{ method = "metaclip", keep = "50%" }]', "data"),
        ('[{ method = "dedup", column = "text" }]', "data"),
        ('[{ method = "filter", where = "width > 2" }]', "proxy"),
        ('[{ method = "metaclip", keep = "50%", language = "language" }]', "proxy"),
        ('[{ method = "dedup" }]', "proxy"),
        ('[{ method = "dedup", column = "text", prefer = "clip-score" }]', "proxy"),
        ('[{ method = "semdedup", keep = "50%" }, { method = "random", keep = "50%" }]', "proxy"),
    ],
)
def test_a_row_needs_the_proxy_only_if_a_step_does(steps: str, pool: str) -> None:
    text = PLAN.partition('[[row]]\nname = "random"')[0] + f'[[row]]\nname = "made"\nsteps = {steps}\n'
    made = Plan.parse(text).rows[-1]
    assert (made.pool, made.needs_proxy) == (pool, pool == "proxy")
    given = Plan.parse(text + 'pool = "proxy"\n').rows[-1]
    assert given.needs_proxy


def test_rows_without_steps_need_no_proxy_and_record_what_they_always_did() -> None:
    row = Row(name="scan", policy="scan", prune=0.3)
    assert (row.pool, row.needs_proxy) == ("proxy", False)


def test_a_profile_replaces_what_it_has_and_leaves_the_rest() -> None:
    plan = Plan.parse(PLAN, profile="fast")
    assert (plan.seeds, plan.trainer.epochs, plan.trainer.batch_size) == ((3, 5), 2, Trainer().batch_size)
    assert (plan.data.train, plan.data.evals, plan.profile) == ("c.parquet", ("b.parquet",), "fast")


def test_full_sees_all_samples_and_other_rows_a_share() -> None:
    plan = Plan.parse(PLAN)
    assert [row.share_of(plan.trainer) for row in plan.rows] == [1.0, 0.7, 0.7, 0.7]
    assert Row(name="x", share=0.4).share_of(plan.trainer) == 0.4


@pytest.mark.parametrize("name", shipped_plans())
@pytest.mark.parametrize("profile", [None, "cpu", "gpu"])
def test_every_plan_that_comes_with_thresher_is_valid(name: str, profile: str | None) -> None:
    plan = Plan.load(name, profile)
    plan.check_lengths()
    assert plan.name == name
    assert plan.about
    assert [row.name for row in plan.rows][:2] == ["full", "full-short"]
    assert len(plan.seeds) >= 3


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ('"infobatch"\noptions = { delta = 0.5 }', "row scan: cannot prune 30.0% over 14 epochs"),
        ('"seta"', "row scan: policy seta leaves out whole levels of loss"),
    ],
)
def test_a_share_that_a_policy_cannot_leave_out_is_refused_if_its_row_is_to_run(policy: str, message: str) -> None:
    plan = Plan.parse(PLAN.replace('policy = "scan"', f"policy = {policy}"))
    plan.narrowed(["random-5%"]).check_lengths()
    with pytest.raises(UsageError, match=message):
        plan.check_lengths()


def test_plans_can_be_narrowed() -> None:
    plan = Plan.load("scan-coreset").narrowed(["scan-coreset"], ["clean"], 1)
    assert [row.name for row in plan.rows] == ["full", "full-short", "scan", "scan-coreset"]
    assert ([one.name for one in plan.corpora], plan.seeds) == (["clean"], (0,))
    with pytest.raises(UsageError, match=r"no row 'scam'; it has .* Did you mean 'scan'"):
        plan.narrowed(["scam"])


BAD = [
    ("seeds = 2", "sedes = 2", "unknown key 'sedes'; allowed: .*seeds"),
    ("seeds = 2", "seeds = 0", "seeds = 0; give how many"),
    ("seeds = 2", "seeds = [1, 1]", r"seeds = \[1, 1\]"),
    ('evals = ["b.parquet"]', "evals = []", "give one evaluation set or more"),
    ('evals = ["b.parquet"]', 'evals = ["a/x.parquet", "b/x.parquet"]', "two evaluation sets are named x; give each"),
    ('evals = ["b.parquet"]', 'evals = "b.parquet"', r"\[data\]: evals"),
    ('evals = ["b.parquet"]', 'evals = ["a.parquet"]', "a.parquet is the training data and an evaluation set"),
    ('evals = ["b.parquet"]', 'evals = ["./a.parquet"]', "a.parquet is the training data and an evaluation set"),
    ('policy = "scan"', 'policy = "scann"', "no policy 'scann'.*scan"),
    ("prune = 0.3", "prune = 3", "row scan: prune = 3"),
    ("prune = 0.3", "pruned = 0.3", "row scan has no parameter 'pruned'"),
    ('policy = "scan"', 'loss = "drro"', "row scan: loss = 'drro'"),
    ('policy = "scan"', 'compose = "diverse"', "row scan: compose = 'diverse'"),
    ('policy = "scan"', 'concepts = "column:tag"', "give clusters or column:NAME, and compose"),
    ('policy = "scan"', 'compose = "diversity"\nconcepts = "tag"', "give clusters or column:NAME, and compose"),
    (
        'policy = "scan"',
        'policy = "jest"\ncompose = "diversity"',
        "jest chooses batches itself; leave out compose",
    ),
    (
        "[[row]]\nname",
        "[trainer]\ntask = 'moco'\n[[row]]\nname = 'd'\nloss = 'drrho'\n[[row]]\nname",
        "of MoCo take no",
    ),
    ('name = "scan"', 'name = "full"', "two rows are named full"),
    ('name = "scan"', 'name = "Full"', "two rows are named Full, full; give each its own name"),
    ('name = "scan"', 'name = "../scan"', "it names a folder"),
    ('method = "random"', 'method = "randomly"', "no method 'randomly'"),
    ('method = "random"', 'methd = "random"', "a step is a table with method"),
    ('keep = ["5%", "10%"]', 'keep = ["500%"]', "cannot keep 500%"),
    ('keep = ["5%", "10%"]', "keep = []", r"keep = \[\]; give budgets"),
    ('policy = "scan"', 'coreset_of = "full"', "leave out policy, prune and options"),
    (
        "[[row]]\nname",
        "[[corpus]]\nname = 'x'\n[[corpus]]\nname = 'X'\n[[row]]\nname",
        "two corpora are named X, x; give each its own name",
    ),
    ("[[row]]\nname", "[[corpus]]\nname = 'x'\nswapped = 1.5\n[[row]]\nname", "swapped = 1.5"),
    ("[[row]]\nname", "[[corpus]]\nname = 'x'\noff_topic = 0.1\n[[row]]\nname", "name their data"),
    ("[[row]]\nname", "[trainer]\ntask = 'moco'\n[[corpus]]\nswapped = 0.3\n[[row]]\nname", "MoCo does not read"),
    ("[[row]]\nname", "[trainer]\nepochs = 0\n[[row]]\nname", "epochs = 0"),
    ("[data]", "[data", "not valid TOML"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD, ids=[new.replace("\n", " ") for _, new, _ in BAD])
def test_a_mistake_is_one_line_that_says_what_is_allowed(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UsageError, match=message) as error:
        Plan.load(str(path))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


def test_a_selection_that_does_not_exist_is_known_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN + f'[[row]]\nname = "own"\nselection = "{tmp_path}/keys.txt"\n')
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=f"row own: {tmp_path}/keys.txt does not exist; give a selection folder"):
            th.run_plan(tmp_path / "plan.toml", tmp_path / "out", dry_run=dry_run, progress=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "keys.txt").touch()
    Plan.load(str(tmp_path / "plan.toml")).check_selections()


@pytest.mark.parametrize("load", [Plan.load, Recipe.load])
def test_a_file_in_another_code_says_so(load: Callable[[str], Any], tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(b'name = "\xff"\n')
    with pytest.raises(UsageError, match=r"it is not UTF-8 at byte 8; save it as UTF-8"):
        load(str(path))


def test_an_unknown_plan_or_profile_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="comes with thresher: .*scan-clip.*Did you mean 'scan-clip'"):
        Plan.load("scan-clp")
    with pytest.raises(UsageError, match="no profile 'cpuu'; it has cpu, gpu"):
        Plan.load("field", "cpuu")
    with pytest.raises(UsageError, match="neither a readable file"):
        Plan.load(str(tmp_path))
