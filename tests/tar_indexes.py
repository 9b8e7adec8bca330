"""A slow writer of DALI's indexes, from their documentation: ``v1.2 N``, and a line for each sample."""

from __future__ import annotations

import tarfile
from pathlib import Path


def slow_index(path: Path) -> str:
    """The index of a tar: extension, offset, size and name of every regular file, a line for each sample."""
    samples: list[tuple[str, list[str]]] = []
    with tarfile.open(path) as file:
        for member in file:
            folder, slash, base = member.name.rpartition("/")
            stem, dot, ending = base.partition(".")
            if not member.isreg() or not stem:
                continue
            key, ending = (folder + slash + stem, ending) if dot else (member.name[:-1], member.name)  # as wds2idx does
            if not samples or samples[-1][0] != key:
                samples.append((key, []))
            samples[-1][1].append(f"{ending} {member.offset_data} {member.size} {member.name}")
    return "\n".join([f"v1.2 {len(samples)}", *(" ".join(members) for _, members in samples), ""])


def write_index(path: Path) -> Path:
    """Write the index of a tar next to it."""
    index = path.with_suffix(".idx")
    index.write_text(slow_index(path), encoding="utf-8")
    return index
