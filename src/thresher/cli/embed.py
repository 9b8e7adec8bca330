"""``embed`` and ``embed-classes``: embed images, captions and class names."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from thresher import api
from thresher.cli import text
from thresher.cli.options import (
    DATA,
    JSON,
    MOST_WORKERS,
    OVERWRITE,
    QUIET,
    SHARD,
    Choice,
    Configured,
    WholeRange,
    engine_given,
    engine_options,
    options,
)
from thresher.cli.output import Output
from thresher.errors import UsageError

if TYPE_CHECKING:
    from thresher.embedding.pipeline import Embedded

_THUMBNAIL = 64  # longer side in pixels
_DEVICE = click.option(
    "--device", cls=Configured, setting="device", default="auto", show_default=True, metavar="NAME",
    help="Where the model runs: cpu, cuda, or several such as cuda:0,cuda:1.",
)  # fmt: skip
_PRECISION = click.option(
    "--precision", type=Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
    help="Precision of the model; auto: float16 on a GPU, else float32.",
)  # fmt: skip


@click.command()
@click.argument("data")
@click.option("-o", "--out", required=True, metavar="POOL", help="Folder of the pool.")
@click.option(
    "--encoder", required=True, metavar="NAME",
    help="open_clip:ARCH/PRETRAINED, timm:NAME, torchvision:NAME, transformers:NAME, sentence-transformers:NAME, "
    "conse, or your own package.module:Name.",
)  # fmt: skip
@options(_DEVICE, _PRECISION)
@click.option("--batch-size", type=WholeRange(1), metavar="N", help="Samples per batch (default: 64; on a GPU: 512).")
@click.option(
    "--workers", cls=Configured, setting="workers", type=WholeRange(0, MOST_WORKERS), metavar="N",
    help="Processes that decode images; 0: decode in this process (default: all cores; one fewer if the model runs "
    "on the CPU). With --engine: shards at a time.",
)  # fmt: skip
@click.option("--only", type=Choice(["image", "text"]), help="Embed only images or only captions.")
@click.option(
    "--quality", metavar="NAMES",
    help="Columns to compute from every image: sha256, phash, sharpness, brightness, text_area, and NAME=HEAD.npy for "
    "a linear score of its embedding; separated by commas.",
)  # fmt: skip
@click.option("--thumbnails", is_flag=True, help="Store thumbnails of the images for reports.")
@click.option(
    "--pixel-limit",
    type=WholeRange(1),
    metavar="N",
    help="Maximum number of pixels of an image (default: 134,217,728).",
)
@options(*engine_options(None, "Embed each shard as a task of an engine, such as ray; the result is the same."), SHARD)
@options(*DATA)
@click.option(
    "--per-shard", type=WholeRange(1), default=10_000, show_default=True, metavar="N",
    help="Rows per shard, for data other than tars.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Start from the beginning if the pool exists.")
@click.option("--retry-damaged", is_flag=True, help="Embed shards again whose data was damaged or lacked images.")
@options(QUIET, JSON)
def embed(
    data: str, out: str, overwrite: bool, retry_damaged: bool, quiet: bool, output: Output, **values: Any
) -> None:
    """Embed images and captions into a pool.

    DATA is webdataset tars, parquet or Arrow files, a Hugging Face dataset saved to disk, an open_clip csv, or a
    folder of images. After an interruption, the same command resumes. With more DATA, the pool grows. If some data
    was not reached, such as after a network failure, the rest is embedded, the exit code is 2, and the same command
    embeds what is missing.
    """

    def report(result: Embedded) -> None:
        output.result(dataclasses.asdict(result), text.embedded(result, output.seconds))

    engine = engine_given(values)
    chosen = {name: value for name, value in values.items() if value is not None}
    chosen["thumbnails"] = _THUMBNAIL if chosen["thumbnails"] else 0
    how = {"overwrite": overwrite, "retry_damaged": retry_damaged, "engine": engine, "report": report}
    api.embed(data, out, per_part=chosen.pop("per_shard"), progress=output.progress(quiet), **how, **chosen)


@click.command("embed-classes")
@click.argument("names", metavar="NAMES.txt")
@click.option(
    "-o", "--out", required=True, metavar="FILE.npy", help="File to write; the names go to a .txt file next to it."
)
@click.option("--encoder", required=True, metavar="NAME", help="Encoder of the captions, named as for embed.")
@click.option(
    "--templates",
    metavar="FILE",
    help="File with one sentence per line, {} for the name; or a built-in set: openai or simple.",
)
@options(_DEVICE, _PRECISION)
@click.option(
    "--batch-size", type=WholeRange(1), default=256, show_default=True, metavar="N", help="Sentences per batch."
)
@options(OVERWRITE, JSON)
def embed_classes(
    names: str, out: str, encoder: str, templates: str | None, device: str, precision: str, batch_size: int,
    overwrite: bool, output: Output,
) -> None:  # fmt: skip
    """Embed class names, for clipcov and for zero-shot evaluation.

    NAMES.txt holds one class name per line.
    """
    from thresher.embedding.classes import embed_classes as run
    from thresher.embedding.classes import names_text, read_names, read_templates, same_file, write_classes
    from thresher.embedding.encoders import make_encoder
    from thresher.io.places import place
    from thresher.runtime.files import check_writable
    from thresher.runtime.results import exists_already

    target = place(out)
    if target.suffix != ".npy":
        raise UsageError(f"{out}: the result is a .npy file; type {target.with_suffix('.npy')}")
    classes, sentences = read_names(names), read_templates(templates)
    names_file = target.with_suffix(".txt")
    for path in (target, names_file):
        if path.is_dir():
            raise exists_already(path)
    if names_file.exists() and not same_file(names_file, names) and not overwrite:
        if names_file.read_bytes() != names_text(classes):
            raise exists_already(names_file)
    elif target.exists() and not names_file.exists() and not overwrite:
        raise exists_already(target)
    check_writable(target)
    made = make_encoder(encoder, device=device, precision=precision)
    vectors = run(classes, made, sentences, batch=batch_size)
    write_classes(vectors, classes, target, keep=names, overwrite=overwrite, say=output.progress().say)
    result = {
        "out": out, "names": str(names_file), "classes": len(classes), "templates": len(sentences),
        "dims": vectors.shape[1],
    }  # fmt: skip
    output.result(result, text.classes_embedded(result))
