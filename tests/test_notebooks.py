"""The notebooks of examples/ run from top to bottom, and are stored with their results, small and without local paths.

``python -m tests.test_notebooks`` runs them all and stores their results.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = "your-own-method"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
SLOW = [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.slow]) for name in NAMES]


def read(name: str) -> Any:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def run(notebook: Any) -> Any:
    """Run all cells in a new kernel in the folder of the examples; a cell that raises is an error."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    return notebook


def kinds(notebook: Any) -> list[list[str]]:
    """What each cell shows: the types of its results, without streams and progress."""
    return [
        [
            kind
            for output in cell.get("outputs", ())
            if output.output_type == "execute_result"
            for kind in sorted(output["data"])
        ]
        for cell in notebook.cells
    ]


@pytest.mark.early
@pytest.mark.filterwarnings("ignore")  # of the client of the kernel
@pytest.mark.parametrize("name", SLOW)
def test_a_notebook_runs_and_shows_what_is_stored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    stored = read(name)
    assert kinds(run(read(name))) == kinds(stored)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_with_results_and_nothing_local(name: str) -> None:
    path = EXAMPLES / f"{name}.ipynb"
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    assert not re.search(r"/home/|/work/|/root/|/Users/|/tmp/|[A-Z]:\\\\", text)
    assert "Traceback" not in text
    assert '"image/png"' in text or "data:image/webp" in text
    shown = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in shown] == list(range(1, len(shown) + 1))
    assert "text/html" in [kind for cell in kinds(read(name)) for kind in cell]
    for target in re.findall(
        r"\]\(([^)\s]+)\)", "".join(c.source for c in read(name).cells if c.cell_type == "markdown")
    ):
        assert (EXAMPLES / target).exists(), target


def test_the_notebooks_are_linked_from_the_pages() -> None:
    assert len(NAMES) == 4
    for page in ("README.md", "docs/index.md"):
        text = (EXAMPLES.parent / page).read_text(encoding="utf-8")
        assert [name for name in NAMES if f"examples/{name}.ipynb" not in text] == []


def store() -> None:
    """Run the notebooks and store their results."""
    import nbformat

    for name in os.environ.get("NOTEBOOKS", " ".join(NAMES)).split():
        notebook = run(read(name))
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times
        nbformat.write(notebook, EXAMPLES / f"{name}.ipynb")


if __name__ == "__main__":
    store()
