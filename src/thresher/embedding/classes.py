"""Embeddings of classes from their names, by prompts and a text encoder, for zero-shot evaluation and clipcov."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from thresher.embedding.encoders import Encoder
from thresher.errors import MissingExtraError, PoolError, UsageError
from thresher.io.places import place
from thresher.ops.vectors import F32
from thresher.runtime.places import AnyPath, RemotePath
from thresher.runtime.results import Name, Say, result_files

TEMPLATES = ("a photo of a {}.",)
_OPEN_CLIP = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def embed_classes(
    names: Sequence[str], encoder: Encoder, templates: Sequence[str] = TEMPLATES, *, batch: int = 256
) -> F32:
    """Return an embedding of each class: the mean of the embeddings of its prompts.

    Args:
        names: Names of C classes.
        encoder: An encoder of texts, see :func:`thresher.embedding.encoders.make_encoder`.
        templates: Prompts, with ``{}`` in place of the name.
        batch: Prompts to encode at a time.

    Returns:
        (C, D) float32 unit rows, in the order of the names; see :func:`thresher.evaluation.zero_shot.class_embeddings`.

    Raises:
        UsageError: The encoder does not encode texts, there are no names or templates, or a template does not have
            exactly one ``{}``.
    """
    from thresher.evaluation.zero_shot import class_embeddings

    if encoder.tokenize is None or not encoder.text_dim:
        raise UsageError(f"{encoder.name} does not encode texts; name an encoder that does")
    if not names or not templates or batch < 1:
        raise UsageError(
            f"{len(names)} names, {len(templates)} templates, {batch} at a time; give at least one of each"
        )
    for template in templates:
        if template.count("{}") != 1:
            raise UsageError(
                f"template {template!r}: has {{}}, the place of the name, {template.count('{}')} times; write it once"
            )
    embeddings_CD = np.empty((len(names), encoder.text_dim), np.float32)
    step = max(1, batch // len(templates))  # classes at a time, so that not all prompts are in memory
    for lo in range(0, len(names), step):
        here = names[lo : lo + step]
        prompts = [template.replace("{}", name) for name in here for template in templates]
        parts = [
            encoder.encode_texts(encoder.tokenize(prompts[at : at + batch])) for at in range(0, len(prompts), batch)
        ]
        embeddings_CD[lo : lo + step] = class_embeddings(np.concatenate(parts).reshape(len(here), len(templates), -1))
    return embeddings_CD


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of classes, one per line; empty lines at the end are ignored.

    Raises:
        PoolError: The file cannot be read, has no names, has an empty line between names, or a name twice; the
            message says which line.
    """
    lines = _lines(path, "class names")
    if not lines:
        raise PoolError(f"{path}: has no class names; write one per line")
    seen: dict[str, int] = {}
    for number, name in enumerate(lines, 1):
        if not name:
            raise PoolError(f"{path}: line {number:,} is empty; line numbers are class numbers, so write a name there")
        if name in seen:
            raise PoolError(f"{path}: lines {seen[name]:,} and {number:,} are both {name!r}; make them different")
        seen[name] = number
    return lines


def read_templates(source: str | None) -> tuple[str, ...]:
    """Return prompt templates with ``{}`` for the name of a class.

    Args:
        source: "openai" (the 80 of the CLIP paper), "simple" (7 that do nearly as well), or a file with one per line,
            where ``{c}``, as CLIP_benchmark writes it, is the same as ``{}``; None for "a photo of a {}." alone.

    Raises:
        PoolError: The file cannot be read, or a line does not have exactly one ``{}``; the message says which.
        MissingExtraError: open_clip, which has these templates, is not installed.
    """
    if source is None:
        return TEMPLATES
    if source in _OPEN_CLIP:
        try:
            import open_clip
        except ImportError:
            raise MissingExtraError(f"--templates {source}", "embed") from None
        return tuple(template("{}") for template in getattr(open_clip, _OPEN_CLIP[source]))
    templates = []
    for number, line in enumerate(_lines(source, f"templates (there are also {' and '.join(_OPEN_CLIP)})"), 1):
        template = line.replace("{c}", "{}")
        if line and template.count("{}") != 1:
            raise PoolError(
                f"{source}: line {number:,} has {{}}, the place of the class name, {template.count('{}')} times; "
                "write it once"
            )
        if line:
            templates.append(template)
    if not templates:
        raise PoolError(f"{source}: has no templates; write one per line, such as {TEMPLATES[0]}")
    return tuple(templates)


def _lines(path: str | os.PathLike[str], what: str) -> list[str]:
    """Return lines with runs of white space replaced by one space, without empty lines at the end."""
    try:
        text = place(path, reads=True).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or "no such file") if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PoolError(f"{path}: these {what} cannot be read: {reason}") from None
    return [" ".join(line.split()) for line in text.rstrip().split("\n")] if text.strip() else []


def write_classes(
    embeddings_CD: F32,
    names: Sequence[str],
    path: Name,
    *,
    keep: str | os.PathLike[str] | None = None,
    overwrite: bool = True,
    say: Say | None = None,
) -> None:
    """Write embeddings of classes to a .npy file, and the names, one per line, to a .txt file next to it.

    Args:
        embeddings_CD: (C, D) float32.
        names: Names of the C classes.
        path: The .npy file.
        keep: The file that the names were read from; if it is that .txt file, it is not written.
        overwrite: Replace different files.
        say: Called with one line if the files have this content already.

    Raises:
        OutputError: A different file exists and ``overwrite`` is false, or the files cannot be written; no file is
            left half-written.
    """
    target = place(path)
    names_path = target.with_suffix(".txt")
    same = keep is not None and same_file(names_path, keep)
    with result_files(overwrite=overwrite, say=say) as new:
        np.save(new(target), np.ascontiguousarray(embeddings_CD, np.float32), allow_pickle=False)
        if not same:
            new(names_path).write_bytes(names_text(names))


def same_file(path: AnyPath, other: str | os.PathLike[str]) -> bool:
    """Return whether two paths are of the same file."""
    if isinstance(path, RemotePath):
        return path.url == os.fspath(other)
    return path.exists() and os.path.exists(other) and path.samefile(other)


def names_text(names: Sequence[str]) -> bytes:
    """Return the content of the .txt file that :func:`write_classes` writes."""
    return "".join(f"{name}\n" for name in names).encode()
