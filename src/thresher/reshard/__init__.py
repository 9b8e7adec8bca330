"""A selection made into data to train on: the samples that it keeps, copied as they are into new shards."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from thresher.data.parts import Form
from thresher.errors import UsageError

if TYPE_CHECKING:
    from thresher.data import DataOptions
    from thresher.export.keys import Chosen
    from thresher.runtime.progress import Progress

__all__ = ["PER_SHARD", "Form", "Resharded", "reshard"]

PER_SHARD = 10_000


@dataclass(frozen=True, kw_only=True)
class Resharded:
    """What was written.

    Attributes:
        out: The folder.
        form: "webdataset", "parquet" or "csv".
        shards: Files of samples.
        samples: Samples written, repeats included.
        chosen: Samples the selection asked for, repeats included.
        missing: Keys of the selection that the data do not have, listed in ``missing.txt``.
        aside: Files that are damaged and samples that could not be copied, listed in ``set-aside.txt``.
        bytes: Of the shards.
        by: How samples were found: "place", "key" or "uid".
    """

    out: str
    form: Form
    shards: int
    samples: int
    chosen: int
    missing: int
    aside: int
    bytes: int
    by: str


def reshard(
    data: str,
    sel: Chosen,
    out: str,
    *,
    form: Form | None = None,
    per_shard: int = PER_SHARD,
    shuffle: int | None = None,
    workers: int | None = None,
    processes: bool = False,
    overwrite: bool = False,
    options: DataOptions | None = None,
    pool: str | None = None,
    progress: Progress | None = None,
) -> Resharded:
    """Copy the samples that a selection keeps into new shards, without decoding anything.

    The files are the same for any number of workers, and after any number of kills: the same call goes on with the
    shards that are not there yet.

    Args:
        data: Tars (a folder of them, or a path with ``{00000..00099}``, ``*`` or ``::``), parquet or Arrow files, a csv
            of open_clip, or a folder of pictures; anywhere fsspec reaches.
        sel: A selection folder, or a file of keys, as :func:`thresher.export.keys.read_keys` takes it. Where it is of
            a pool that knows the places of its rows in ``data`` (columns key, shard and offset), and they are still
            there, samples are found by these; else by uid where the keys are uids of DataComp and the samples have
            some; else by key.
        out: Folder to write, on this machine.
        form: "webdataset", "parquet" or "csv"; by default that of ``data``, and webdataset for pictures in a folder.
        per_shard: Samples of a shard; the last has what is left. A csv is one file.
        shuffle: Seed of a permutation of all samples; None for the order of ``data``.
        workers: Shards written at once (default: the cores this process may use).
        processes: Whether reading the headers of local tars may be shared among ``workers`` processes where it would
            take more than 2 s. What is started anew then imports the script that calls this, which needs its
            ``if __name__ == "__main__":``.
        overwrite: Replace what an earlier call with other arguments wrote.
        options: How to read ``data``: columns, root of pictures, captions.
        pool: Where the pool of a selection folder is now, if it was moved.
        progress: Where to tell.

    Raises:
        UsageError: A form that cannot be made of the data, or keys that stand for several samples of it.
        PoolError: Data or selection cannot be read, or have no sample in common.
        OutputError: ``out`` holds something else, lies in the data, or cannot be written.
    """
    from thresher.reshard.job import Job, carry_out
    from thresher.selection import Selection

    if per_shard < 1:
        raise UsageError(f"--per-shard {per_shard}: at least 1")
    if shuffle is not None and shuffle < 0:
        raise UsageError(f"--shuffle {shuffle}: a seed is 0 or more")
    more: dict[str, Any] = {} if options is None else {"options": options}
    job = Job(
        data=data,
        out=out,
        form=form,
        per_shard=per_shard,
        shuffle=shuffle,
        overwrite=overwrite,
        processes=processes,
        **more,
    )
    if pool is not None:
        if isinstance(sel, str) and not os.path.isdir(sel):
            raise UsageError(f"--pool: {sel} is no selection folder, and needs no pool")
        sel = replace(sel if isinstance(sel, Selection) else Selection.load(sel), pool=pool)
    return carry_out(job, sel, workers, progress)
