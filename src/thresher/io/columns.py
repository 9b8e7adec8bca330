"""The usual names of columns, by content."""

from __future__ import annotations

KEYS = ("uid", "key", "id", "__key__", "image_path")  # not URLs: pools repeat them
CAPTIONS = ("text", "texts", "caption", "captions", "title", "TEXT", "alt_text")
IMAGES = ("image", "thumbnail", "jpg", "png", "image_path", "path", "filepath")
SCORES = ("clip_l14_similarity_score", "clip_b32_similarity_score", "similarity", "clip_score", "clip_similarity")
