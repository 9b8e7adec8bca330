from __future__ import annotations

import subprocess
import sys

import pytest

from thresher.errors import UsageError
from thresher.runtime import memory


def test_a_limit_of_the_process_counts() -> None:
    code = (
        "import resource; from thresher.runtime.memory import available\n"
        "before = available()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))\n"
        "print(before, available())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 0 < after < 3 * 2**30
    assert after <= before


def test_too_much_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 20 * 10**9)
    memory.require(20 * 10**9, "the table", "take fewer rows")
    with pytest.raises(UsageError) as error:
        memory.require(34 * 10**9, "the table", "take fewer rows")
    assert str(error.value) == "the table takes about 34.0 GB of memory, but only 20.0 GB are free; take fewer rows"


def test_what_is_not_known_is_no_limit() -> None:
    assert memory._of_container("/nonexistent") == sys.maxsize
