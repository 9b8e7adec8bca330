"""Classes by name: sentences about each of them through a text encoder, for zero-shot evaluation and clipcov."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from thresher.embed.encoders import Encoder
from thresher.errors import MissingExtraError, PoolError, UsageError
from thresher.ops.vectors import F32
from thresher.runtime.files import writing

TEMPLATES = ("a photo of a {}.",)
_OPEN_CLIP = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def embed_classes(
    names: Sequence[str], encoder: Encoder, templates: Sequence[str] = TEMPLATES, *, batch: int = 256
) -> F32:
    """Return an embedding of each class: the mean of those of sentences about it.

    Args:
        names: Of C classes.
        encoder: Encodes texts, see :func:`thresher.embed.encoders.make_encoder`.
        templates: Sentences; ``{}`` stands for the name.
        batch: Sentences that go through the encoder at a time.

    Returns:
        (C, D) float32 unit rows, in the order of the names; see :func:`thresher.evaluate.zero_shot.class_embeddings`.

    Raises:
        UsageError: The encoder has no texts, there is no name, or no template with one ``{}``.
    """
    from thresher.evaluate.zero_shot import class_embeddings

    if encoder.tokenize is None or not encoder.text_dim:
        raise UsageError(f"{encoder.name} encodes no texts; name an encoder that does")
    if not names or not templates or batch < 1:
        raise UsageError(
            f"{len(names)} names, {len(templates)} templates, {batch} at a time; give at least one of each"
        )
    for template in templates:
        if template.count("{}") != 1:
            raise UsageError(
                f"template {template!r}: has {template.count('{}')} times {{}}, for the name; write it once"
            )
    found = np.empty((len(names), encoder.text_dim), np.float32)
    step = max(1, batch // len(templates))  # classes at a time: their sentences are not all held
    for lo in range(0, len(names), step):
        here = names[lo : lo + step]
        prompts = [template.replace("{}", name) for name in here for template in templates]
        parts = [
            encoder.encode_texts(encoder.tokenize(prompts[at : at + batch])) for at in range(0, len(prompts), batch)
        ]
        found[lo : lo + step] = class_embeddings(np.concatenate(parts).reshape(len(here), len(templates), -1))
    return found


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of classes, one a line; empty lines at the end do not count.

    Raises:
        PoolError: The file cannot be read, has no name, an empty line among them, or a name twice; says which line.
    """
    lines = _lines(path, "class names")
    if not lines:
        raise PoolError(f"{path}: has no class names; write one a line")
    seen: dict[str, int] = {}
    for number, name in enumerate(lines, 1):
        if not name:
            raise PoolError(f"{path}: line {number:,} is empty; the number of a line is that of its class, so fill it")
        if name in seen:
            raise PoolError(f"{path}: lines {seen[name]:,} and {number:,} are both {name!r}; tell them apart")
        seen[name] = number
    return lines


def read_templates(given: str | None) -> tuple[str, ...]:
    """Return sentences with ``{}`` for the name of a class.

    Args:
        given: "openai" (the 80 of the CLIP paper), "simple" (the 7 that do nearly as well), or a file with one a line,
            where ``{c}``, as CLIP_benchmark writes it, is the same as ``{}``; None for "a photo of a {}." alone.

    Raises:
        PoolError: The file cannot be read, or a line has not exactly one ``{}``; says which.
        MissingExtraError: open_clip is not there to say its templates.
    """
    if given is None:
        return TEMPLATES
    if given in _OPEN_CLIP:
        try:
            import open_clip
        except ImportError:
            raise MissingExtraError(f"--templates {given}", "embed") from None
        return tuple(template("{}") for template in getattr(open_clip, _OPEN_CLIP[given]))
    found = []
    for number, line in enumerate(_lines(given, f"templates (there are also {' and '.join(_OPEN_CLIP)})"), 1):
        template = line.replace("{c}", "{}")
        if line and template.count("{}") != 1:
            raise PoolError(
                f"{given}: line {number:,} has {template.count('{}')} times {{}}, for the name of a class; write one"
            )
        if line:
            found.append(template)
    if not found:
        raise PoolError(f"{given}: has no templates; write one a line, such as {TEMPLATES[0]}")
    return tuple(found)


def _lines(path: str | os.PathLike[str], what: str) -> list[str]:
    """Return lines with their white space evened out, without empty ones at the end."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise PoolError(f"{path}: these {what} cannot be read: {told}") from None
    return [" ".join(line.split()) for line in text.rstrip().split("\n")] if text.strip() else []


def write_classes(
    found_CD: F32, names: Sequence[str], path: str | os.PathLike[str], *, keep: str | os.PathLike[str] | None = None
) -> None:
    """Write embeddings of classes, and the names, one a line, in a .txt beside them.

    Args:
        found_CD: (C, D) float32.
        names: Of the C classes.
        path: Of the .npy.
        keep: The file that the names were read from; if it is the one beside, it is left as it is.

    Raises:
        OutputError: They cannot be written; nothing is left half-written.
    """
    beside = Path(path).with_suffix(".txt")
    same = keep is not None and beside.exists() and beside.samefile(keep)
    with writing(path) as array, nullcontext() if same else writing(beside) as table:
        np.save(array, np.ascontiguousarray(found_CD, np.float32), allow_pickle=False)
        if table is not None:
            Path(table).write_text("\n".join(names) + "\n", encoding="utf-8")
