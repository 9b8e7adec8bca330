"""Small pictures, tars and tables, and one way to read all of them to the end."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from thresher.data import Data, DataOptions, open_data
from thresher.errors import PoolError, ThresherError
from thresher.io.pictures import open_rgb


def picture(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (9, 7), **how: Any) -> bytes:
    """A picture of soft colours, as a file."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, kind, **how)
    return file.getvalue()


def tar_of(members: list[tuple[str, bytes]], fmt: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar as Python writes it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=fmt) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def sample_tar(keys: list[str], fmt: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of samples: picture, caption and json of each key."""
    members = []
    for i, key in enumerate(keys):
        told = json.dumps({"uid": f"{i:032x}", "caption": f"caption {key}"}).encode()
        members += [(f"{key}.png", picture(i)), (f"{key}.txt", f"caption {key}".encode()), (f"{key}.json", told)]
    return tar_of(members, fmt)


def table(keys: list[str], **more: Any) -> pa.Table:
    """A table as Hugging Face has it: pictures as bytes and path, texts, keys."""
    cells = [{"bytes": picture(i), "path": f"{key}.png"} for i, key in enumerate(keys)]
    return pa.table({"image": cells, "text": [f"caption {key}" for key in keys], "key": keys, **more})


def parquet_of(what: pa.Table, **how: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(what, file, **how)
    return file.getvalue()


def arrow_of(what: pa.Table, *, stream: bool = True, rows: int = 2) -> bytes:
    file = io.BytesIO()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(file, what.schema) as writer:
        writer.write_table(what, max_chunksize=rows)
    return file.getvalue()


def outcome(location: Path | str, options: DataOptions | None = None) -> tuple[dict[str, str], list[str]]:
    """Read everything: what was found by key ("ok: caption" or the reason), and the errors of whole files.

    Only errors meant for the user may come out of it; parts behind a damaged one are read all the same.
    """
    found: dict[str, str] = {}
    errors: list[str] = []
    try:
        data = open_data(str(location), options)
    except ThresherError as error:
        return found, [told(error)]
    for part in data.parts:
        try:
            for sample in part.samples():
                try:
                    open_rgb(sample.stored())
                    found[sample.key] = f"ok: {sample.text}"
                except PoolError as error:
                    found[sample.key] = told(error)
        except PoolError as error:
            errors.append(told(error))
    return found, errors


def told(error: ThresherError) -> str:
    message = str(error)
    assert message, "an error without a message"
    assert len(message.splitlines()) == 1, f"a message of several lines: {message!r}"
    assert len(message) < 2000, f"a message of {len(message)} characters"
    message.encode()
    return message


def rows(data: Data) -> list[tuple[Any, ...]]:
    """Everything that samples tell, pictures as bytes."""
    return [
        (s.key, s.text, s.stored() if s.picture is not None else None, s.at, s.uid, dict(s.columns))
        for s in data.samples()
    ]
