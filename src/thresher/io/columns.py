"""The usual names of columns, by content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

KEYS = ("uid", "key", "id", "__key__", "image_path")  # not URLs: pools repeat them
CAPTIONS = ("text", "texts", "caption", "captions", "title", "TEXT", "alt_text")
# Of the names of image files.
FILES = ("file_name", "filename", "filepath", "image_path", "image", "path", "image_name", "images", "name")
IMAGES = ("image", "thumbnail", "jpg", "png", "image_path", "path", "filepath")
SCORES = ("clip_l14_similarity_score", "clip_b32_similarity_score", "similarity", "clip_score", "clip_similarity")


def known(columns: Iterable[str], usual: Sequence[str]) -> list[str]:
    """Return the columns with usual names, in the order of ``usual``; case and blanks around a name do not count."""
    own: dict[str, str] = {}
    for column in columns:
        own.setdefault(column.strip().lower(), column)
    return list(dict.fromkeys(own[name.lower()] for name in usual if name.lower() in own))
