"""What trainers on webdataset train on: the rules by which the loader of open_clip leaves samples out.

Consecutive members of a tar with the same key are a sample, as :func:`thresher.io.tar.tar_samples` reads it. The loader
keeps a sample if it has a ``.txt`` and an image in one of :data:`TAKEN`, and if all members that it decodes can be
decoded. The ending decides whether a member is an image, its bytes which format it has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache

from thresher.io.pictures import ENDINGS

TAKEN = ("jpg", "png", "jpeg", "webp")  # endings of images, of which the loader uses the first
KINDS = ("jpg", "png", "webp")  # formats with these endings, as thresher.io.pictures.kind_of names them
PILLOW = ("JPEG", "MPO", "PNG", "WEBP")  # the same, as Pillow names them
PICTURES = tuple(dict.fromkeys((*TAKEN, *ENDINGS)))  # in the order in which one of several is chosen
CAPTION = "txt"
_TEXTS, _JSONS = {"txt", "text", "transcript"}, {"json", "jsn"}
_NUMBERS = {"cls", "cls2", "index", "inx", "id"}
DECODED = frozenset(_TEXTS | _JSONS | _NUMBERS)  # endings that the loader decodes, besides images and arrays
_FORMAT = "format."
_PHRASES = {
    "no_image": ("has no image", "have no image"),
    "no_txt": ("has no .txt", "have no .txt"),
    "apart": ("has its members apart", "have their members apart"),
    "undecodable": ("has a member that cannot be decoded", "have a member that cannot be decoded"),
}


@lru_cache
def why_left_out(endings: tuple[str, ...]) -> str:
    """Return why the loader leaves a sample out, by the endings of its members in lower case.

    Returns:
        "" if it does not, else "no_image", "format.gif" for an image in a format that it does not take, or "no_txt".
    """
    if not any(ending in endings for ending in TAKEN):
        other = next((ending for ending in PICTURES if ending in endings), None)
        return "no_image" if other is None else f"{_FORMAT}{other}"
    return "" if CAPTION in endings else "no_txt"


def is_decoded(ending: str) -> bool:
    """Return whether the loader decodes members with this ending as text, JSON or a number."""
    return ending.rpartition(".")[2] in DECODED


def can_decode(ending: str, content: bytes) -> bool:
    """Return whether the loader can decode a member; an error leaves the whole sample out."""
    kind = ending.rpartition(".")[2]
    try:
        if kind in _TEXTS:
            content.decode("utf-8")
        elif kind in _JSONS:
            json.loads(content)
        elif kind in _NUMBERS:
            int(content)
    except (ValueError, RecursionError):
        return False
    return True


def described(counts: Sequence[tuple[str, int]]) -> str:
    """Return reasons with their numbers of samples as text: "12 have no .txt, 1 has its image as .gif"."""
    return ", ".join(f"{count:,} {phrase(why, count)}" for why, count in counts)


def phrase(why: str, count: int = 1) -> str:
    """Return a reason as a phrase about a number of samples: "has no .txt", "have no .txt"."""
    if why.startswith(_FORMAT):
        return f"{'has its' if count == 1 else 'have their'} image as .{why.removeprefix(_FORMAT)}"
    return _PHRASES[why][count != 1]
