"""What the command line prints: results as text or JSON, errors, warnings and progress.

All text goes through :func:`say`, one line at a time, so that text from data can neither control the terminal nor
start a new line. JSON keeps the values and escapes them. Texts of any length are cut, with a note of their length.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from thresher.errors import OutputError
from thresher.io.paths import shortened, visible

if TYPE_CHECKING:
    from thresher.runtime.progress import Advance, Progress

JSON_FLAG = "--json"
_LINE = 10_000  # characters of a line of text, and of a message in it
_MESSAGE = 2_000
_JSON_TEXT = 100_000  # characters of a text in JSON


class Interrupted(Exception):
    """A command was interrupted; the message says how to continue."""


# --- results --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """Where a command puts its result.

    Attributes:
        as_json: Whether the result is printed as one JSON object and progress is off.
        begin: Start of the command, in seconds of the monotonic clock.
    """

    as_json: bool = False
    begin: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the command started."""
        return time.monotonic() - self.begin

    def result(self, value: dict[str, Any], lines: Iterable[str], *, cost: bool = True) -> None:
        """Print a result.

        Args:
            value: The JSON object.
            lines: The same result as text. Not consumed for JSON.
            cost: Whether the JSON object ends with ``seconds`` and ``peak_memory_bytes``.
        """
        if self.as_json:
            spent = {"seconds": round(self.seconds, 3), "peak_memory_bytes": peak_memory()} if cost else {}
            print_json({**value, **spent})
        else:
            say(*lines)

    def progress(self, quiet: bool = False) -> Progress:
        """Return the progress display: standard error, or none with JSON or ``quiet``."""
        from thresher.runtime.progress import progress_for

        return _VisibleProgress(progress_for(quiet or self.as_json))


def columns_of_prose() -> int | None:
    """Return the columns in which to write prose: those of the terminal, at most 110; None if there is no terminal."""
    out = sys.stdout
    is_terminal = out is not None and not out.closed and out.isatty()
    return min(shutil.get_terminal_size().columns, 110) if is_terminal else None


def say(*lines: str) -> None:
    """Print lines to standard output; control characters and line breaks inside a line are escaped, long lines cut."""
    for line in lines:
        _write(sys.stdout, visible(shortened(line, _LINE), limit=None))


def print_json(value: Any) -> None:
    """Print a value as ASCII JSON; NaN and infinities become null, texts of more than 100,000 characters are cut."""
    _write(sys.stdout, json.dumps(_plain(value), indent=1, default=str, allow_nan=False))


def _write(stream: TextIO | None, line: str) -> None:
    """Write a line, in which characters that the stream cannot encode are escaped.

    A stream that is closed, or whose reader has gone, takes no lines: what a command has done stays done.

    Raises:
        OutputError: The stream cannot be written, for example because the disk is full.
    """
    if stream is None or stream.closed:
        return
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        _discard(stream)
    except OSError as error:
        _discard(stream)
        if stream is sys.stdout:
            raise OutputError(f"standard output: cannot be written ({error.strerror or error})") from None


def _discard(stream: TextIO) -> None:
    """Send what is still in the buffer of a stream, and all that follows, to nowhere; Python flushes it at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _plain(value: Any) -> Any:
    """Return a value with None for each number that is not finite, and with long texts cut."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return value if len(value) <= _JSON_TEXT else visible(value, limit=_JSON_TEXT)
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- errors and warnings --------------------------------------------------------------------------


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for JSON, even if it cannot be parsed."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return JSON_FLAG in options


def show_error(kind: str, message: str, *, as_json: bool, ctx: click.Context | None = None) -> None:
    """Print an error: a JSON object on standard output, or text on standard error.

    Args:
        kind: Type of the error, for JSON.
        message: What is wrong.
        as_json: Whether to print JSON.
        ctx: For a usage error: the command whose usage is shown.
    """
    message = shortened(message, _MESSAGE)
    if as_json:
        with contextlib.suppress(OutputError):
            print_json({"error": {"type": kind, "message": message}})
            return
    text = io.StringIO()
    click.UsageError(visible(message, limit=None), ctx).show(text)
    _write(sys.stderr, text.getvalue().removesuffix("\n"))


def show_interruption(message: str, *, as_json: bool) -> None:
    """Print that a command was interrupted, and how to continue."""
    line = f"interrupted; {message}"
    if as_json:
        show_error("Interrupted", line, as_json=True)
    else:
        _write(sys.stderr, visible(line, limit=None))


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show each warning once, as one line on standard error, without the source line that raised it."""
    shown: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = visible(" ".join(shortened(str(message), _MESSAGE).split()), limit=None)
        if text not in shown:
            shown.add(text)
            _write(sys.stderr, f"Warning: {text}")

    with warnings.catch_warnings():
        warnings.showwarning = show  # the documented hook; restored on exit
        yield


# --- progress -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _VisibleProgress:
    """Progress whose labels and lines cannot control the terminal."""

    inner: Progress

    def task(self, label: str, total: int, unit: str = "rows") -> AbstractContextManager[Advance]:
        """Open a bar."""
        return self.inner.task(visible(label), total, unit)

    def say(self, line: str) -> None:
        """Print one line."""
        self.inner.say(visible(shortened(line, _LINE), limit=None))


# --- memory ---------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Return the peak memory in bytes of the largest process, this one or a worker; 0 if unknown."""
    peaks = [_peak_of("self")]
    if multiprocessing := sys.modules.get("multiprocessing"):
        peaks += [_peak_of(str(child.pid)) for child in multiprocessing.active_children()]
    try:
        import resource
    except ImportError:  # Windows
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)
    if not peaks[0]:
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    return max(peaks)


def _peak_of(process: str) -> int:
    """Return the peak memory of a process from /proc, else 0; getrusage would include the program that started it."""
    try:
        status = Path("/proc", process, "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)
