"""What a reader of the terminal sees: ranges with their unit, short captions, shares that differ, plain defaults."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from thresher.check.data import doctor
from thresher.cli import text
from thresher.cli.main import main
from thresher.cli.output import columns_of_prose

POOL = str(Path(__file__).parents[2] / "examples" / "twemoji")


def row(number: int, caption: str, **more: Any) -> dict[str, Any]:
    return {"row": number, "key": f"k{number}", "caption": caption, "kept": False, "uses": 0, "steps": [], **more}


@pytest.mark.parametrize(
    ("values", "unit", "shown"),
    [
        ([2, 26, 5000], "characters", "2 to 5,000 characters (median 26)"),
        ([48, 48, 48], "pixels", "48 pixels"),
        ([1.5, 1.5, 30.0], "", "1.5 to 30.0 (median 1.5)"),
    ],
)
def test_a_range_says_which_number_is_the_median(values: list[float], unit: str, shown: str) -> None:
    assert text._range(values, unit) == shown


def test_a_long_caption_takes_a_few_lines_of_an_explanation() -> None:
    note = "... (5,000 characters)"
    twin = {"duplicate": {**row(2, "y" * 2000 + note), "links": 1}}
    step = {"method": "semdedup", "package": "", "verdict": "dropped", "reason": "a copy", **twin}
    lines = list(text.explanation(row(1, "x" * 2000 + note, steps=[step])))
    assert max(map(len, lines)) < 400
    assert sum(note in line for line in lines) == 2, "the length of the whole caption is still shown"
    assert next(text.explanation(row(3, "a short one"))) == "row 3, key k3 “a short one”: dropped"


def test_data_without_images_have_no_rate_of_decoding(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("title,words\n" + "".join(f"a{i},caption {i}\n" for i in range(20)))
    lines = "\n".join(text.diagnosis(doctor(str(tmp_path / "captions.csv"))))
    assert "images: none" in lines
    assert "0 random images" not in lines
    assert "estimated rate" not in lines


def test_a_method_is_described_without_markup_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "density"]) == 0
    out = capsys.readouterr().out
    assert "softmax of complexity / `temperature`" in out
    assert "``" not in out
    assert "released (true | false; default false)" in out


def test_workers_have_a_least_number_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--help"]) == 0
    assert "[1<=x<=4096]" in capsys.readouterr().out


def test_small_shares_of_an_advice_stay_apart() -> None:
    lines = [
        {"keep": keep, "passes": 1.0, "expected": 40.0, "low": 39.0, "high": 41.0, "best": 0.5}
        for keep in (0.0005, 0.0012, 0.277, 1.0)
    ]
    found = {
        "notes": [],
        "known": True,
        "metric": "R@1",
        "table": lines,
        "keep": 0.277,
        "keep_low": 0.0005,
        "keep_high": 1,
    }
    shown = [line.split()[0] for line in text.advised(found)][1:-1]
    assert shown == ["0.05%", "0.12%", "27.7%", "100%"]
    assert list(text.advised(found))[-1] == "keep 27.7% (from 0.05% to 100% in 90% of the bootstraps)"


def test_one_group_of_runs_is_compared_with_nothing() -> None:
    group = {"name": "scan", "runs": ["a"], "repeated": {}, "samples": 5.0, "seconds": 1.0, "pruned": 0.2}
    metric = {"mean": 0.4, "half": None, "values": {"a": 0.4}, "minus_first": None}
    one = {**group, "metrics": {"R@1": metric}}
    shown = {"groups": [one], "runs": {}, "agreement": []}
    assert "minus" not in "\n".join(text.run_comparison(shown))
    assert "minus scan, paired by seed" in "\n".join(text.run_comparison({**shown, "groups": [one, one]}))


def test_prose_is_broken_between_words_on_a_terminal_and_whole_in_a_file() -> None:
    about = "ClipCov keeps clip-score and\nother words of sentence-transformers:NAME.\n\nA second paragraph."
    assert list(text.prose(about, None)) == about.split("\n")
    lines = list(text.prose(about, 30, hanging="  "))
    assert max(map(len, lines)) <= 30 or "sentence-transformers:NAME." in max(lines, key=len)
    assert "  sentence-transformers:NAME." in lines, "a name is not broken at its hyphen"
    assert lines[-2:] == ["", "A second paragraph."]
    page = list(text.method_page("x", "Keep it.", about, [], 30))
    assert page[0] == "x: Keep it."
    assert list(text.recipe_list({"a": "word " * 20}, 40))[1].startswith("  word")


def test_prose_has_the_columns_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    for columns, expected in (("60", 60), ("500", 110)):
        monkeypatch.setenv("COLUMNS", columns)
        assert columns_of_prose() == expected
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert columns_of_prose() is None


def test_a_plan_says_what_the_time_of_the_steps_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "density", "--rows", "1_000_000_000", "--dim", "768"]) == 0
    out = capsys.readouterr().out
    assert "0.6 s of it to start" in out
    assert max(map(len, out.splitlines())) < 120
