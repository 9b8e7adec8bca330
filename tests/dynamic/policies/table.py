"""The table of policies in docs/dynamic.md, from the policies and their fields.

    python -m tests.dynamic.policies.table

updates it; a test compares it.
"""

from __future__ import annotations

from pathlib import Path

from thresher.dynamic.registry import POLICIES, default_of, flag_of, options_of

PAGE = Path(__file__).parents[3] / "docs" / "dynamic.md"
HEAD = "| policy | class | what it does | options |"


def rows() -> list[str]:
    """Return the lines of the table."""
    lines = [HEAD, "|---|---|---|---|"]
    for name, cls in POLICIES.all().items():
        module = cls.__module__.removeprefix("thresher.dynamic.")
        options = []
        for item in options_of(cls):
            options.append(f"`{flag_of(item)}`" + (f" ({usual})" if (usual := default_of(item)) else ""))
        summary = (cls.__doc__ or "").strip().splitlines()[0].rstrip(".")
        lines.append(f"| `{name}` | `{module}.{cls.__name__}` | {summary} | {', '.join(options) or 'none'} |")
    return lines


def written() -> list[str]:
    """Return the lines of the table as the page has them."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEAD)
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return lines[start:end]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace("\n".join(written()), "\n".join(rows())), encoding="utf-8")
