"""What a log says of a task: how far, how fast, how long it takes."""

from __future__ import annotations

import pytest

from thresher.runtime import progress
from thresher.runtime.progress import Bars, Lines, Silent, progress_for


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_lines_come_every_ten_seconds_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Lines().task("read", 1000) as advance:
        advance(0)
        for _ in range(10):
            clock.now += 4
            advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "read: 30.0% (300 of 1,000 rows), 25 rows/s, ETA 28.0 s",
        "read: 60.0% (600 of 1,000 rows), 25 rows/s, ETA 16.0 s",
        "read: 90.0% (900 of 1,000 rows), 25 rows/s, ETA 4.0 s",
        "read: 1,000 rows in 40.0 s",
    ]


def test_what_an_earlier_run_did_says_nothing_of_the_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Lines().task("read", 1000, "files") as advance:
        advance(700)
        clock.now = 10
        advance(100)
    assert capsys.readouterr().err.splitlines()[0] == "read: 80.0% (800 of 1,000 files), 10 files/s, ETA 20.0 s"


def test_short_tasks_and_quiet_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (Lines(), Silent(), progress_for(True)):
        with shown.task("read", 10) as advance:
            advance(10)
    Silent().say("x")
    assert capsys.readouterr().err == ""


def test_a_line_that_is_said_again_right_after_itself_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (Lines(), Bars()):
        for line in ("found in the cache", "found in the cache", "found in the cache", "kept", "found in the cache"):
            shown.say(line)
        assert capsys.readouterr().err.splitlines() == ["found in the cache", "kept", "found in the cache"]


def test_bars_say_the_same(clock: Clock) -> None:
    from rich.console import Console

    shown = Bars()
    shown._console = Console(record=True, width=120, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with shown.task("read [b]", 1000) as advance:
        advance(0)
        clock.now = 10
        advance(250)
    shown.say("[bold] stays")
    shown._console.file.close()
    text = shown._console.export_text()
    assert "25 rows/s, ETA 30.0 s" in text
    assert "[bold] stays" in text
