"""Resharding: the samples that a selection keeps, copied into new shards to train on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from thresher.errors import UsageError

if TYPE_CHECKING:
    from thresher.data import DataOptions
    from thresher.data.parts import Form
    from thresher.export.keys import Chosen
    from thresher.runtime.engine import Engine
    from thresher.runtime.jobs import ArrayJob
    from thresher.runtime.progress import Progress

__all__ = ["PER_SHARD", "Resharded", "reshard"]

PER_SHARD = 10_000


@dataclass(frozen=True, kw_only=True)
class Resharded:
    """Result of :func:`reshard`.

    Attributes:
        out: The folder.
        form: "webdataset", "parquet" or "csv".
        shards: Number of shards.
        samples: Samples written, repeats included.
        chosen: Samples the selection asks for, repeats included.
        keys: Number of different keys of the selection; 0 if samples were found by place.
        missing: How many of these the data does not have; they are listed in ``missing.txt``.
        aside: Number of damaged files and of samples that could not be copied; they are listed in ``set-aside.txt``.
        damaged: How many of these are damaged files, whose samples after the damage are missing.
        bytes: Total size of the shards.
        by: How samples were found: "place", "key" or "uid".
        converted: Samples whose image was converted to PNG, repeats included.
        renamed: Samples of tars whose image got another extension, with the same bytes, repeats included.
        captioned: Samples of tars whose caption was written to a ``.txt``, repeats included.
        blank: Samples with an empty ``.txt``, because they have no caption, repeats included; 0 from tars.
        left_out: Samples of tars that were copied and that open_clip will leave out, repeats included, by reason, see
            :func:`thresher.data.trainable.why_left_out`.
        noted: Samples with each of :attr:`thresher.data.Sample.notes`, repeats included; not counted if rows are
            copied from tables to tables.
        notes: What is not read of the data, see :attr:`thresher.data.Data.notes`, and what samples have, as sentences.
    """

    out: str
    form: Form
    shards: int
    samples: int
    chosen: int
    keys: int
    missing: int
    aside: int
    damaged: int
    bytes: int
    by: str
    converted: int = 0
    renamed: int = 0
    captioned: int = 0
    blank: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    noted: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def reshard(
    data: str,
    sel: Chosen,
    out: str,
    *,
    form: Form | None = None,
    per_shard: int = PER_SHARD,
    shuffle: int | None = None,
    trainable: bool | None = None,
    for_hub: bool = False,
    for_energon: bool = False,
    for_dali: bool = False,
    workers: int | None = None,
    processes: bool = False,
    overwrite: bool = False,
    options: DataOptions | None = None,
    pool: str | None = None,
    engine: Engine | None = None,
    shard: ArrayJob | None = None,
    progress: Progress | None = None,
) -> Resharded:
    """Copy the samples that a selection keeps into new shards.

    Images are decoded only to convert them, see ``trainable``. The files are the same for any number of workers and
    interruptions: after it was killed, the same call resumes with the missing shards.

    Args:
        data: Tars (a folder of them, or a path with ``{00000..00099}``, ``*`` or ``::``), parquet or Arrow files, a csv
            of open_clip, or a folder of images; local or anywhere fsspec reaches.
        sel: A selection folder, or a file of keys, as :func:`thresher.export.keys.read_keys` takes it. If it belongs
            to a pool that has the places of its rows in ``data`` (columns key, shard and offset), and the samples are
            still there, they are found by place; else by uid if the keys are uids of DataComp and the samples have
            uids; else by key.
        out: Folder or address to write to.
        form: "webdataset", "parquet" or "csv"; by default the form of ``data``, and webdataset for a folder of images.
        per_shard: Samples per shard; the last shard has the rest. A csv is always one file.
        shuffle: Seed of a permutation of all samples; None for the order of ``data``.
        trainable: Whether to write tars of which open_clip trains on every sample, if its image can be decoded: images
            in other formats than JPEG, PNG and WebP are converted to PNG, and captions of tars are written to ``.txt``.
            Samples that cannot be changed like that are skipped and counted. By default True if ``data`` is not tars
            and they are written as tars, else False.
        for_hub: Whether to write Parquet for the Hugging Face Hub, see :mod:`thresher.resharding.hub`: chunks by
            content, an index of pages, row groups of about 100 MB, and images declared as such.
        for_energon: Whether to write what Megatron Energon reads of tars too, see :mod:`thresher.resharding.energon`;
            also to tars that an earlier call wrote.
        for_dali: Whether to write an index next to each tar, as NVIDIA DALI reads it, see
            :mod:`thresher.resharding.dali`; also to tars that an earlier call wrote.
        workers: Shards written at the same time (default: the cores this process may use).
        processes: Whether to read the headers of local tars in ``workers`` processes if that would take more than 2 s.
            Each process imports the script that calls this, which therefore needs ``if __name__ == "__main__":``.
        overwrite: Replace the result of an earlier call with other arguments.
        options: How to read ``data``: columns, root of images, captions.
        pool: Where the pool of a selection folder is now, if it was moved.
        engine: Where data are read and shards are written, instead of ``workers`` threads and processes of this
            machine. On other machines, ``data`` and ``out`` must be on storage that all of them share.
        shard: Write only the share of one of several jobs, see :mod:`thresher.runtime.jobs`. A call without it, after
            all jobs have finished, writes the files about all shards; the result has the bytes of one call.
        progress: Receives progress updates.

    Raises:
        UsageError: The data cannot be written in this form, or a key belongs to several samples.
        PoolError: Data or selection cannot be read, or have no sample in common.
        OutputError: ``out`` holds other files, is inside the data, or cannot be written.
        UnreachedError: A worker on another machine cannot read the data.
    """
    from thresher.io.places import local_copy, place
    from thresher.io.sql import is_sql, sql_table
    from thresher.resharding.job import Job, run_job
    from thresher.runtime.places import expanded
    from thresher.selection import Selection

    if per_shard < 1:
        raise UsageError(f"--per-shard {per_shard}: must be at least 1")
    if shuffle is not None and shuffle < 0:
        raise UsageError(f"--shuffle {shuffle}: must be at least 0")
    if shard is not None and overwrite:
        raise UsageError(f"--shard {shard}: --overwrite would remove what other jobs wrote; remove {out} first")
    reading: dict[str, Any] = {} if options is None else {"options": options}
    job = Job(
        data=data,
        out=out,
        form=form,
        per_shard=per_shard,
        shuffle=shuffle,
        trainable=trainable,
        for_hub=for_hub,
        for_energon=for_energon,
        for_dali=for_dali,
        overwrite=overwrite,
        processes=processes,
        engine=engine,
        shard=shard,
        **reading,
    )
    if is_sql(sel):
        return run_job(job, sql_table(str(sel)).path, workers, progress)
    sel = expanded(sel) if isinstance(sel, str) else sel
    if isinstance(sel, str) and "://" in sel:
        if place(sel, reads=True).is_file():
            with local_copy(sel) as copy:
                return run_job(replace(job, selection=sel), str(copy), workers, progress)
        sel = Selection.load(sel)
    if pool is not None:
        if isinstance(sel, str) and not os.path.isdir(sel):
            raise UsageError(f"--pool: {sel} is not a selection folder, so it has no pool")
        sel = replace(sel if isinstance(sel, Selection) else Selection.load(sel), pool=pool)
    return run_job(job, sel, workers, progress)
