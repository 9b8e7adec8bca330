"""Progress reports: bars with an ETA on a terminal or in a notebook, plain lines in a log, or nothing."""

from __future__ import annotations

import html
import io
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import IO, Any, Protocol, cast

from thresher.runtime.format import counted, duration, pace, percent

_EVERY = 10.0  # seconds between lines of a log
_PATIENCE = 0.5  # seconds before a notebook shows a bar, and between its updates
Advance = Callable[[int], None]


class Progress(Protocol):
    """Reports what a run is doing."""

    def task(self, label: str, total: int, unit: str = "rows") -> AbstractContextManager[Advance]:
        """Start a bar of ``total`` units; the context manager yields a function that advances it."""
        ...

    def say(self, line: str) -> None:
        """Print one line."""
        ...


class _Count:
    """The progress and the rate of a task."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit = total, unit
        self.done = 0
        self._begin = time.monotonic()
        self._first: tuple[float, int] | None = None

    def add(self, rows: int) -> None:
        self.done += rows
        if self._first is None:  # the first step includes the work of an earlier run, so it does not count for the rate
            self._first = time.monotonic(), self.done

    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def pace(self) -> str:
        begin, before = self._first or (time.monotonic(), 0)
        return pace(self.done - before, self.total - before, time.monotonic() - begin, self.unit)


class Silent:
    """No progress."""

    def task(self, label: str, total: int, unit: str = "rows") -> AbstractContextManager[Advance]:
        """Say nothing."""
        return nullcontext(lambda _: None)

    def say(self, line: str) -> None:
        """Say nothing."""


def progress_for(quiet: bool) -> Progress:
    """Return the progress report that suits a notebook, or else standard error."""
    if quiet:
        return Silent()
    if _kernel() is not None:
        return Cells()
    if sys.stderr is None or sys.stderr.closed:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()


def _kernel() -> Any:
    """Return the shell of the notebook that this process runs for, None outside notebooks."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell if getattr(shell, "kernel", None) is not None else None


class _Said(ABC):
    """Prints lines; one that is said again right after itself, as by a loop that finds all in the cache, once."""

    _last: str | None = None

    def say(self, line: str) -> None:
        """Print one line, unless it is the last one again."""
        if line != self._last:
            self._last = line
            self._print(line)

    @abstractmethod
    def _print(self, line: str) -> None: ...


class Cells(_Said):
    """Bars below a notebook cell, for tasks that take longer than half a second; a bar goes when its task ends."""

    def __init__(self) -> None:
        """Start without lines."""
        self._lines: list[str] = []
        self._name = uuid.uuid4().hex

    @contextmanager
    def task(self, label: str, total: int, unit: str = "rows") -> Iterator[Advance]:
        """Show a bar with the share, the rate and the remaining time."""
        from IPython.display import display, update_display

        done, due, name = _Count(total, unit), _PATIENCE, ""

        def advance(rows: int) -> None:
            nonlocal due, name
            done.add(rows)
            if (spent := done.seconds()) < due:
                return
            due = spent + _PATIENCE
            text = f"{percent(done.done, total)}, {done.pace()}"
            bar = f'<progress value="{int(done.done)}" max="{max(int(total), 1)}" style="width:12em"></progress>'
            shown = {
                "text/plain": f"{label}: {text}",
                "text/html": f"<small>{_html(label)} {bar} {_html(text)}</small>",
            }
            if name:
                update_display(shown, display_id=name, raw=True)
            else:
                name = uuid.uuid4().hex
                display(shown, display_id=name, raw=True)

        try:
            yield advance
        finally:
            if name:
                update_display({"text/plain": "", "text/html": ""}, display_id=name, raw=True)

    def _print(self, line: str) -> None:
        """Show one line; earlier ones are folded away below it."""
        from IPython.display import display, update_display

        self._lines.append(line)
        *earlier, last = map(_html, self._lines)
        more = f" (and {counted(len(earlier), 'earlier line')})" if earlier else ""
        summary = f"<summary>{last}{more}</summary>{'<br>'.join(earlier)}"
        text = f'<details style="font-size:smaller;opacity:.75">{summary}</details>'
        shown = {"text/plain": "\n".join(self._lines), "text/html": text}
        if len(self._lines) > 1:
            update_display(shown, display_id=self._name, raw=True)
        else:
            display(shown, display_id=self._name, raw=True)


def _html(text: str) -> str:
    """Return text for a page: escaped, without control characters, because labels contain names from data."""
    return html.escape("".join(c if c.isprintable() else " " for c in text))


class _Stderr(io.TextIOBase):
    """Standard error, whose failures are ignored: a closed terminal or a log on a full disk must not end the work."""

    def __init__(self) -> None:
        """Keep the stream of now: while a bar is shown, rich puts its own in its place, which writes to this one."""
        self._stream = sys.stderr

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the text."""
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the file descriptor, from which the width of the terminal is read."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write text; characters that the stream cannot encode are escaped."""
        with suppress(OSError, ValueError):
            self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Write what is in the buffer."""
        with suppress(OSError, ValueError):
            self._stream.flush()


class Bars(_Said):
    """Bars on a terminal, one per task."""

    def __init__(self) -> None:
        """Write to standard error."""
        from rich.console import Console

        self._console = Console(file=cast(IO[str], _Stderr()), highlight=False, emoji=False)

    @contextmanager
    def task(self, label: str, total: int, unit: str = "rows") -> Iterator[Advance]:
        """Show a bar with the elapsed and the remaining time."""
        from rich import progress as bars

        columns: list[Any] = [
            bars.TextColumn("{task.description}", markup=False),  # labels contain names from data
            bars.BarColumn(bar_width=20),
            bars.TaskProgressColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("{task.fields[pace]}"),
        ]
        counted = _Count(total, unit)
        with bars.Progress(*columns, console=self._console, transient=True) as shown:
            task = shown.add_task(label, total=total, pace=counted.pace())

            def advance(rows: int) -> None:
                counted.add(rows)
                shown.update(task, advance=rows, pace=counted.pace())

            yield advance

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


class Lines(_Said):
    """Lines for a log: the progress of a task every ten seconds, and its end if it took a second or more."""

    def task(self, label: str, total: int, unit: str = "rows") -> AbstractContextManager[Advance]:
        """Write lines about a task of ``total`` units."""
        return self._task(label, total, unit)

    @contextmanager
    def _task(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        done, last = _Count(total, unit), 0.0

        def advance(rows: int) -> None:
            nonlocal last
            done.add(rows)
            if (spent := done.seconds()) - last >= _EVERY and done.done < total:
                last = spent
                shares = f"{percent(done.done, total)} ({done.done:,} of {total:,} {unit})"
                self._print(f"{label}: {shares}, {done.pace()}")

        yield advance
        if (spent := done.seconds()) >= 1:
            self._print(f"{label}: {counted(total, unit.removesuffix('s'))} in {duration(spent)}")

    def _print(self, line: str) -> None:
        stderr = _Stderr()
        stderr.write(line + "\n")
        stderr.flush()
