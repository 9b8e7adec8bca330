"""The navigation of the site: sections of pages, in order.

An entry is a page of ``docs/``, a page that the site adds (see hooks.py), or a pattern such as ``methods/*.md``. A
pattern stands for all pages that match it and have no place of their own, so a new page is in the navigation without
being named here; name it to say where.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch

NAV: dict[str, tuple[str, ...]] = {
    "Start": (
        "index.md",
        "install.md",
        "config.md",
        "completions.md",
        "for/phd-student.md",
        "for/data-engineer.md",
        "for/notebook-user.md",
        "for/own-method.md",
    ),
    "Notebooks": ("notebooks/*.md",),
    "Select": (
        "which-method.md",
        "nouns.md",
        "cli.md",
        "python.md",
        "recipes.md",
        "view.md",
        "report.md",
        "other-viewers.md",
        "sweep.md",
        "covariance.md",
    ),
    "Methods": ("methods/*.md",),
    "Data": (
        "embed.md",
        "encoders.md",
        "works-with.md",
        "formats.md",
        "object-storage.md",
        "growing.md",
        "load-time.md",
        "lance-and-mds.md",
        "reshard.md",
    ),
    "Train": (
        "dynamic.md",
        "when-scan-helps.md",
        "prove.md",
        "reference.md",
        "drrho.md",
        "distill.md",
        "cabs.md",
        "train.md",
        "open_clip.md",
        "port-a-loop.md",
        "lightning.md",
        "hf-trainer.md",
        "coreset.md",
        "advise.md",
        "lab.md",
        "results/*.md",
    ),
    "Policies": ("policies/*.md",),
    "Scale": ("more-than-one-machine.md", "performance.md", "robustness.md"),
    "Extend": ("adding-*.md",),
    "Reference": ("reference/*.md",),
    "Project": ("cite.md", "project/*.md"),
    "More": ("*.md",),  # pages of docs/ that are named nowhere
}


def arranged(pages: Iterable[str]) -> dict[str, list[str]]:
    """Return the pages of every section; each page is in the first entry that names it, else in the first pattern."""
    found = sorted(pages)
    named = {entry for entries in NAV.values() for entry in entries}
    sections: dict[str, list[str]] = {}
    placed: set[str] = set()
    for section, entries in NAV.items():
        own: list[str] = []
        for entry in entries:
            deep = entry.count("/")
            own += [
                page
                for page in found
                if page not in placed
                and page not in own
                and (page == entry or page not in named and page.count("/") == deep and fnmatch(page, entry))
            ]
        placed.update(own)
        if own:
            sections[section] = own
    return sections
