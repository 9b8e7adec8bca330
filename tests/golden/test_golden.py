from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.update import COMMAND, FILE, chains, compute


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compute(Path(tmp_path_factory.mktemp("golden")))


@pytest.mark.parametrize("name", list(chains()))
def test_the_selection_is_the_one_written_down(name: str, found: dict[str, Any], written: dict[str, Any]) -> None:
    assert name in written, f"{name} has no hash yet; type: {COMMAND}"
    told = f"{name} selects otherwise than written; if that is meant, type: {COMMAND}"
    now, then = found[name], written[name]
    assert {k: v for k, v in now.items() if k != "others"} == {k: v for k, v in then.items() if k != "others"}, told
    assert now.get("others", {}).keys() == then.get("others", {}).keys(), told
    for array, values in now.get("others", {}).items():
        assert values == pytest.approx(then["others"][array], abs=1e-4), f"{told} ({array})"


def test_nothing_is_written_down_for_what_is_gone(written: dict[str, Any]) -> None:
    assert set(written) <= set(chains()), f"type: {COMMAND}"
    assert sum("hash" in entry for entry in written.values()) >= 10
