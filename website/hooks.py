"""What the site has beyond the pages of ``docs/``: notebooks, the reference, and files that pages link.

Pages link as they do on a code host, by paths in the repository. Here those paths become pages.
"""

from __future__ import annotations

import html
import json
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

from nav import arranged  # noqa: E402
from reference import pages_of_reference  # noqa: E402

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ("from-embeddings-to-a-subset", "what-did-it-drop", "your-own-method", "prune-while-training")
SHOWN = {  # files of the repository that are pages too
    "README.md": "project/readme.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "examples/twemoji/README.md": "project/example-pool.md",
    **{f"examples/{name}.ipynb": f"notebooks/{i}-{name}.md" for i, name in enumerate(NOTEBOOKS, 1)},
}
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_OUTPUT = re.compile(r"<p>OUTPUT-(\d+)</p>|OUTPUT-(\d+)")
_UNSAFE = re.compile(
    r"<\s*(script|iframe|object|embed|link|base|form)\b|\bon\w+\s*=|javascript:|(src|href)\s*=\s*.?https?:", re.I
)
_outputs: dict[str, list[str]] = {}  # HTML of the cells of a notebook, by page


# --- files ----------------------------------------------------------------------------------------


def on_files(files: Files, config: Any) -> Files:
    """Add pages, and arrange all of them."""
    for path, page in SHOWN.items():
        made = _notebook(path, page) if path.endswith(".ipynb") else (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=made))
    for path in sorted(_sources(files)):
        code = (ROOT / path).read_text(encoding="utf-8")
        text = f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n````py\n{code}\n````\n"
        files.append(File.generated(config, _page_of(path), content=text))
    for page, text in pages_of_reference().items():
        files.append(File.generated(config, page, content=text))
    for name in ("site.css", "site.js", "iframe-worker.js", "icon.svg"):
        target = f"pictures/{name}" if name.endswith("svg") else name
        files.append(File.generated(config, target, abs_src_path=str(ROOT / "website" / name)))
    pages = [file.src_uri for file in files.documentation_pages()]
    config.nav = [
        {section: own} for section, own in arranged([page for page in pages if "source/" not in page]).items()
    ]
    return files


def _sources(files: Files) -> set[str]:
    """Return the files of the repository that pages link and that are no pages: source code."""
    found = set()
    for file in files.documentation_pages():
        if file.generated_by is None:
            for _, target, _ in _LINK.findall(Path(str(file.abs_src_path)).read_text(encoding="utf-8")):
                path = _resolved(f"docs/{file.src_uri}", target)
                if path.endswith(".py") and (ROOT / path).is_file():
                    found.add(path)
    return found


def _page_of(path: str) -> str:
    """Return the page of a file of the repository."""
    if path in SHOWN:
        return SHOWN[path]
    return f"source/{path}.md" if path.endswith(".py") else path.removeprefix("docs/")


def _resolved(path: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target.partition("#")[0]))


# --- pages ----------------------------------------------------------------------------------------


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Turn links to files of the repository into links to their pages."""
    own = {place: path for path, place in SHOWN.items()}
    path = own.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def linked(match: re.Match[str]) -> str:
        target, mark, heading = match[2].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        start = posixpath.dirname(page.file.src_uri) or "."
        place = posixpath.relpath(_page_of(_resolved(path, target)), start)
        return f"{match[1]}{place}{mark}{heading}{match[3]}"

    fences = re.split(r"(^(`{3,}).*?^\2[ ]*$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 3 == 1 else _LINK.sub(linked, part) for i, part in enumerate(fences) if i % 3 != 2)


def on_page_content(content: str, page: Page, config: Any, files: Files) -> str:
    """Put the results of a notebook in their places."""
    outputs = _outputs.get(page.file.src_uri)
    if outputs is None:
        return content
    return _OUTPUT.sub(lambda match: outputs[int(match[1] or match[2])], content)


# --- notebooks ------------------------------------------------------------------------------------


def _notebook(path: str, page: str) -> str:
    """Return a notebook as Markdown, with places for its stored results."""
    outputs = _outputs[page] = []
    parts = []
    for cell in json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if shown := _shown(output):
                if _UNSAFE.search(shown):
                    raise SystemExit(f"{path}: a result has scripts or requests; store the notebook again")
                parts.append(f"OUTPUT-{len(outputs)}")
                outputs.append(f'<div class="shown">{shown}</div>')
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"<pre>{html.escape(''.join(output['text']))}</pre>"
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items() if isinstance(value, (str, list))}
    if "text/html" in data:
        return data["text/html"]
    if "image/png" in data:
        about = html.escape(data.get("text/plain", "a figure"), quote=True)
        return f'<img alt="{about}" src="data:image/png;base64,{data["image/png"].strip()}">'
    return f"<pre>{html.escape(data['text/plain'])}</pre>" if data.get("text/plain") else ""


def on_post_build(config: Any) -> None:
    """Check that no page asks another host for anything."""
    for place in Path(config.site_dir).rglob("*.html"):
        text = place.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>", text):
            if 'rel="canonical"' not in tag:
                raise SystemExit(f"{os.path.relpath(place, config.site_dir)} makes a request: {tag[:200]}")
