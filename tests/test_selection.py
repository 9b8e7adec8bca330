from __future__ import annotations

import errno
import json
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher import BudgetError, Keep, OutputError, PoolError, Selection, Step, UsageError

# --- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "rows", "expected"),
    [
        ("30%", 1000, 300), ("30 %", 1000, 300), (" 30% ", 1000, 300), ("0.3", 1000, 300), (0.3, 1000, 300),
        (".5", 9, 4), ("33.3%", 1000, 333), ("0.1%", 1000, 1), ("100%", 7, 7), ("29%", 100, 29), (0.29, 100, 29),
        ("57%", 100, 57), ("3_000", 5000, 3000), ("3000", 5000, 3000), (3000, 5000, 3000), (1, 5, 1), ("1", 5, 1),
        ("1e-1", 50, 5), (Keep(count=3), 5, 3),
    ],
)  # fmt: skip
def test_budgets_are_exact(told, rows, expected) -> None:
    assert Keep.parse(told).of(rows) == expected


@pytest.mark.parametrize(
    "told",
    [1.0, "1.0", "1.5", 0, "0", "0.0", 0.0, -1, "-5", "-5%", "0%", "101%", "100.0001%", True, False, "", "%", "half",
     "nan", "inf", "nan%", "inf%", float("nan"), float("inf"), "1,000", "3__000_", "0x10", "1/3", None, [1], "30%%"],
)  # fmt: skip
def test_budgets_that_leave_a_doubt_are_refused(told) -> None:
    with pytest.raises(UsageError, match="30% or 0.3|100%"):
        Keep.parse(told).of(100)


@pytest.mark.parametrize("told", ["1e999999999%", "1e-999999999", "1e999999999"])
def test_absurd_exponents_are_refused_at_once(told) -> None:
    """In a process of its own: spelled out, such a number takes minutes and gigabytes."""
    code = (
        "import resource, thresher\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"
        f"try: thresher.Keep.parse({told!r}).of(100)\nexcept thresher.UsageError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=5, check=False)
    assert done.stdout == "refused\n"


def test_budgets_that_rows_cannot_meet() -> None:
    with pytest.raises(BudgetError, match="11 rows of the 10"):
        Keep.parse(11).of(10)
    with pytest.raises(BudgetError, match="1% of 10 rows is less than one row"):
        Keep.parse("1%").of(10)


@given(st.decimals("0.001", "100", places=3), st.integers(1, 10**10))
def test_a_percentage_is_rounded_down_exactly_and_reads_back(percent: Decimal, rows: int) -> None:
    keep = Keep.parse(f"{percent}%")
    expected = int(Fraction(percent) * rows / 100)
    assert Keep.parse(str(keep)) == keep
    if expected:
        assert keep.of(rows) == expected
    else:
        with pytest.raises(BudgetError):
            keep.of(rows)


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_float_is_read_as_it_is_written(share: float) -> None:
    assert Keep.parse(share).share == Fraction(repr(share))


@given(st.integers(1, 10**12))
def test_a_number_reads_back(count: int) -> None:
    assert Keep.parse(count) == Keep.parse(str(count)) == Keep.parse(f"{count:_}") == Keep.parse(str(Keep.parse(count)))


# --- chains and sets ----------------------------------------------------------------------------


def step(method: str, keep: list[bool], **more) -> Step:
    told = {"parameters": {}, "seed": 0, "reasons": ("because",), **more}
    return Step(method=method, rows_in=len(keep), rows_out=sum(keep), **told)


def everything(rows: int = 6, store: str = "a") -> Selection:
    return Selection.everything(store, "/pool", {}, rows)


def of(keep: list[bool], method: str = "one") -> Selection:
    return everything(len(keep)).then(step(method, keep), np.array(keep))


bits = st.lists(st.booleans(), min_size=1, max_size=20)


@given(bits, st.data())
def test_a_chain_remembers_which_step_dropped_a_row(first: list[bool], data) -> None:
    second = data.draw(st.lists(st.booleans(), min_size=sum(first), max_size=sum(first)))
    chain = of(first).then(step("two", second), np.array(second, bool))
    left, by = iter(second), []
    for keep in first:
        by.append(0 if not keep else -1 if next(left) else 1)
    assert chain.dropped_by.tolist() == by
    assert chain.rows().tolist() == [i for i, b in enumerate(by) if b == -1]
    assert chain.given(0).tolist() == list(range(len(first)))
    assert chain.given(1).tolist() == [i for i, keep in enumerate(first) if keep]
    assert len(chain) == sum(second)
    assert of(first).dropped_by.tolist() == [-1 if keep else 0 for keep in first]  # the earlier one is as it was


@given(bits, st.data())
def test_set_algebra(a: list[bool], data) -> None:
    b = data.draw(st.lists(st.booleans(), min_size=len(a), max_size=len(a)))
    one, other = of(a), of(b, "two")
    kept = [{i for i, keep in enumerate(x) if keep} for x in (a, b)]
    for found, expected, name in (
        (one & other, kept[0] & kept[1], "intersection"),
        (one | other, kept[0] | kept[1], "union"),
        (one - other, kept[0] - kept[1], "difference"),
    ):
        assert set(found.rows().tolist()) == expected
        assert (found.steps[-1].method, found.steps[-1].rows_in, found.steps[-1].rows_out) == (
            name, len(a), len(expected),
        )  # fmt: skip
        origins = [[head["method"] for head in part] for part in found.steps[-1].parameters["of"]]
        assert origins == [["one"], ["two"]]
        if len(expected) < len(a):
            assert name in found.steps[-1].why(0)


def test_selections_of_different_pools_do_not_mix() -> None:
    for other in (everything(6, "b"), everything(7, "a")):
        for mix in (lambda a, b: a & b, lambda a, b: a | b, lambda a, b: a - b):
            with pytest.raises(UsageError, match="different pools"):
                mix(everything(6, "a"), other)


def test_a_step_judges_the_rows_it_was_given() -> None:
    with pytest.raises(UsageError, match="returned a mask of 6 rows for 3 input rows"):
        of([True, False] * 3).then(step("two", [True] * 6), np.ones(6, bool))


def test_reasons_are_filled_from_the_evidence() -> None:
    told = step(
        "one", [False] * 3,
        cut=0.5,
        reasons=("score {score:.2f} below {cut}", "{cluster} keeps {quota:,} of {size:,}", "of row {duplicate_of}"),
        rows={
            "code": np.array([0, 1, 2], np.uint8), "score": np.array([0.125, 1, 2], np.float32),
            "cluster": np.array([1, 1, 0], np.int32), "duplicate_of": np.array([-1, -1, 7]),
        },
        groups={"quota": np.array([5, 1000]), "size": np.array([9, 2000])},
    )  # fmt: skip
    assert [told.why(i) for i in range(3)] == ["score 0.12 below 0.5", "1 keeps 1,000 of 2,000", "of row 7"]


# --- on disk ------------------------------------------------------------------------------------


@pytest.fixture
def selection() -> Selection:
    evidence = {
        "rows": {"score": np.linspace(0, 1, 6, dtype=np.float32), "cluster": np.array([0, 1] * 3, np.int32)},
        "groups": {"size": np.array([3, 3])},
    }
    first = step("one", [True, True, False] * 2, cut=0.5, notes=("a", "b"), score="s", **evidence)
    chain = everything().then(first, np.array([True, True, False] * 2))
    return chain.then(step("two-b", [True, False, True, True]), np.array([True, False, True, True]))


def test_a_selection_reads_back_as_it_was(selection, tmp_path) -> None:
    folder = selection.save(tmp_path / "new" / "out")
    again = Selection.load(folder)
    assert again.header() == selection.header()
    assert again.dropped_by.tolist() == selection.dropped_by.tolist()
    assert again.dropped_by.dtype == np.int16
    for before, after in zip(selection.steps, again.steps, strict=True):
        assert (before.notes, before.reasons, before.cut) == (after.notes, after.reasons, after.cut)
        for kind in ("rows", "groups"):
            arrays = getattr(after, kind)
            assert {k: (v.dtype, v.tolist()) for k, v in arrays.items()} == {
                k: (v.dtype, v.tolist()) for k, v in getattr(before, kind).items()
            }
    assert np.load(folder / "mask.npy").tolist() == selection.mask().tolist()
    assert json.loads((folder / "selection.json").read_text())["kept"] == 3


def test_repeats_read_back(selection, tmp_path) -> None:
    repeats = np.array([2, 0, 0, 1, 5, 0], np.int32)
    again = Selection(**{**vars(selection), "repeats": repeats})
    assert Selection.load(again.save(tmp_path / "out")).repeats.tolist() == repeats.tolist()


def test_nothing_is_overwritten_unasked(selection, tmp_path) -> None:
    folder = selection.save(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already.*--overwrite"):
        everything().save(folder)
    assert len(Selection.load(folder)) == 3
    everything().save(folder, overwrite=True)
    assert len(Selection.load(folder)) == 6
    assert not (folder / "steps").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("dear")
    with pytest.raises(OutputError, match="not a selection folder"):
        everything().save(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "a.jpg").read_text() == "dear"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt(), ValueError("bug")])
def test_a_save_that_fails_leaves_what_was_there(selection, tmp_path, monkeypatch, error) -> None:
    folder = everything().save(tmp_path / "out")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(np, "save", fail)
    for target, overwrite in ((folder, True), (tmp_path / "other", False)):
        with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
            selection.save(target, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(Selection.load(folder)) == 6


def edit(folder, **changes) -> None:
    header = json.loads((folder / "selection.json").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = header
        for name in parents:
            place = place[int(name) if isinstance(place, list) else name]
        place[last] = value
    (folder / "selection.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2}, {"format": None}, {"rows": 7}, {"rows": "many"}, {"kept": 4}, {"steps": 5}, {"steps": [1]},
        {"store": None, "rows": None}, {"repeats": True},
        {"steps__0__rows": ["../../secret"]}, {"steps__0__rows": ["../rows.score"]}, {"steps__0__rows": ["/etc/x"]},
        {"steps__0__rows": [5]}, {"steps__0__rows": ["./../../../../secret"]},
        {"steps__0__groups": ["../../../secret"]}, {"steps__0__method": "../../x"},
        {"steps__0__method": "a/b"}, {"steps__0__method": ""}, {"steps__0__method": None},
        {"steps__0__rows_in": 5}, {"steps__0__surprise": 1}, {"steps__0__rows": ["missing"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_selection_that_was_tampered_with_is_refused(selection, tmp_path, changes) -> None:
    folder = selection.save(tmp_path / "out")
    np.save(tmp_path / "secret.npy", np.zeros(6))
    (folder / "steps" / "00-one" / "rows..").mkdir()
    edit(folder, **changes)
    with pytest.raises(PoolError, match="out|name"):
        Selection.load(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "selection.json").unlink(),
        lambda folder: (folder / "selection.json").write_text("{"),
        lambda folder: (folder / "selection.json").write_text("[]"),
        lambda folder: (folder / "selection.json").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "dropped_by.npy").unlink(),
        lambda folder: (folder / "dropped_by.npy").write_bytes(b""),
        lambda folder: (folder / "dropped_by.npy").write_bytes((folder / "dropped_by.npy").read_bytes()[:-4]),
        lambda folder: np.save(folder / "dropped_by.npy", np.array([None] * 6), allow_pickle=True),
        lambda folder: np.save(folder / "dropped_by.npy", np.full(5, -1, np.int16)),
        lambda folder: (folder / "steps" / "00-one" / "rows.score.npy").unlink(),
    ],
)
def test_a_damaged_selection_is_refused(selection, tmp_path, damage) -> None:
    folder = selection.save(tmp_path / "out")
    damage(folder)
    with pytest.raises(PoolError, match="out"):
        Selection.load(folder)


def test_the_home_folder_may_be_written_as_a_tilde(selection, tmp_path, monkeypatch) -> None:
    """Python passes ``~`` on as it is, and a shell leaves it in ``--out=~/sel``."""
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "here")
    assert selection.save("~/sel") == tmp_path / "sel"
    assert len(Selection.load("~/sel")) == len(Selection.load(tmp_path / "sel")) == 3
    assert not any((tmp_path / "here").iterdir()), "no folder has the name ~"
    (tmp_path / "here" / "~").mkdir()
    assert selection.save("~") == Path("~"), "a folder of that name is used if it is there, as for data"


def test_what_is_no_selection_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(PoolError, match="not a selection folder"):
            Selection.load(path)


@pytest.mark.parametrize("harm", ["empty", "short", "header", "gone"])
@pytest.mark.parametrize("name", ["mask.npy", "dropped_by.npy"])
def test_a_damaged_array_is_told_of(tmp_path: Path, name: str, harm: str) -> None:
    Selection.everything("store", "pool", {}, 100).save(tmp_path / "sel")
    path = tmp_path / "sel" / name
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        damaged = {"empty": b"", "short": data[:-30], "header": data[:70] + b"(" + data[71:]}
        path.write_bytes(damaged[harm])
    with pytest.raises(PoolError, match="damaged|missing"):
        Selection.load(tmp_path / "sel")


@pytest.mark.parametrize("name", ["duplicate_of", "reference"])
def test_why_of_a_row_that_was_kept_names_no_row(name: str) -> None:
    step = Step(
        method="near", parameters={}, seed=0, rows_in=2, rows_out=1,
        reasons=(f"duplicate of row {{{name}}}",), rows={name: np.array([-1, 0], np.int64)},
    )  # fmt: skip
    assert step.why(1) == "duplicate of row 0"
    assert step.why(0) == "does not repeat another row"
