"""Where a run tells what it is doing: bars with an ETA on a terminal, plain lines in a log, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

_EVERY = 10.0  # seconds between lines of a log
Advance = Callable[[int], None]


class Progress(Protocol):
    """Where a run tells what it is doing."""

    def task(self, label: str, total: int, unit: str = "rows") -> AbstractContextManager[Advance]:
        """Open a bar of ``total`` rows, or what else is counted; the block is given a function that advances it."""
        ...

    def say(self, line: str) -> None:
        """Print one line."""
        ...


class Silent:
    """No progress."""

    def task(self, label: str, total: int, unit: str = "rows") -> AbstractContextManager[Advance]:
        """Say nothing."""
        return nullcontext(lambda _: None)

    def say(self, line: str) -> None:
        """Say nothing."""


def progress_for(quiet: bool) -> Progress:
    """Return what suits standard error."""
    if quiet:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()


class Bars:
    """Bars on a terminal, one a task."""

    def __init__(self) -> None:
        """Write to standard error."""
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, emoji=False)

    @contextmanager
    def task(self, label: str, total: int, unit: str = "rows") -> Iterator[Advance]:
        """Show a bar, with the time gone and the time to go."""
        from rich import progress as bars

        columns: list[Any] = [
            bars.TextColumn("{task.description}", markup=False),  # labels hold names from data
            bars.BarColumn(bar_width=20),
            bars.TaskProgressColumn(),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TimeElapsedColumn(),
            bars.TextColumn("ETA"),
            bars.TimeRemainingColumn(),
        ]
        with bars.Progress(*columns, console=self._console, transient=True) as shown:
            task = shown.add_task(label, total=total, rate="")

            def advance(rows: int) -> None:
                shown.advance(task, rows)
                if speed := shown.tasks[0].speed:
                    shown.update(task, rate=f"{speed:,.0f} {unit} a second")

            yield advance

    def say(self, line: str) -> None:
        """Print one line."""
        self._console.print(line, markup=False, soft_wrap=True)


class Lines:
    """Lines for a log: a task's progress every ten seconds, and its end where it took a second or more."""

    def task(self, label: str, total: int, unit: str = "rows") -> AbstractContextManager[Advance]:
        """Write lines about a task of ``total`` rows, or what else ``unit`` says."""
        return self._task(label, total, unit)

    @contextmanager
    def _task(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        begin = told = time.monotonic()
        done = 0

        def advance(rows: int) -> None:
            nonlocal done, told
            done += rows
            now = time.monotonic()
            if now - told >= _EVERY and done < total:
                told = now
                rate = done / (now - begin)
                left = f"{rate:,.0f} a second, ETA {(total - done) / rate:,.0f} s" if done else "ETA unknown"
                self.say(f"{label}: {done / total:.0%} ({done:,} of {total:,} {unit}), {left}")

        yield advance
        if (spent := time.monotonic() - begin) >= 1:
            self.say(f"{label}: {total:,} {unit} in {spent:.1f} s")

    def say(self, line: str) -> None:
        """Print one line."""
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
