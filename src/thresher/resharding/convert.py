"""Samples of any data as members of a tar: the image, its caption, and a json with the other columns."""

from __future__ import annotations

import json
import math
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import IO, Any
from urllib.parse import quote

import numpy as np

from thresher.data.samples import Sample
from thresher.data.trainable import KINDS
from thresher.errors import PoolError
from thresher.io.pictures import as_png, kind_of
from thresher.io.tar import TAR_BLOCK
from thresher.resharding.plan import ReshardPlan, Source
from thresher.resharding.tars import RECORD, header

_LONGEST = 180  # most characters of a member's name before its extension


@dataclass
class Written:
    """What a tar was made of.

    Attributes:
        samples: Samples written, repeats included.
        converted: How many of these have an image that was converted to PNG.
        blank: How many of these have no caption, so that their ``.txt`` is empty.
        notes: How many have each of :attr:`thresher.data.Sample.notes`, repeats included.
        skipped: (key, why) of the samples that were skipped.
    """

    samples: int = 0
    converted: int = 0
    blank: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def write(plan: ReshardPlan, sources: Sequence[Source], path: str, *, trainable: bool) -> Written:
    """Write a tar of the samples of a plan, which are in the order of the data.

    Args:
        plan: The part of the plan for this shard.
        sources: The sources that the plan refers to by number.
        path: File to write.
        trainable: Whether to convert images in formats that the loader of open_clip does not take to PNG.
    """
    done = Written()
    with open(path, "wb") as out:
        for number, positions in plan.by_source():
            copies = plan.copy_M[positions]
            rows, begins = np.unique(plan.start_M[positions], return_index=True)
            ends = np.r_[begins[1:], len(positions)]
            samples = sources[number].part.chosen(rows)
            for sample, lo, hi in zip(samples, begins.tolist(), ends.tolist(), strict=True):
                try:
                    picture = sample.stored()
                    ending = kind_of(picture)
                    if converted := trainable and ending not in KINDS:
                        picture, ending = as_png(picture), "png"
                except PoolError as error:
                    done.skipped.append((sample.key, str(error)))
                    continue
                for copy in copies[lo:hi].tolist():
                    _add(out, plan.renamed(sample.key, copy), sample, picture, ending)
                done.samples += hi - lo
                done.notes.update(dict.fromkeys(sample.notes, hi - lo))
                done.converted += converted * (hi - lo)
                done.blank += (not sample.text) * (hi - lo)
        out.write(bytes(-(-(out.tell() + 2 * TAR_BLOCK) // RECORD) * RECORD - out.tell()))
    return done


def _add(out: IO[bytes], key: str, sample: Sample, picture: bytes, ending: str) -> None:
    name = safe_name(key)
    meta = {"key": key, "caption": sample.text, **({"uid": sample.uid} if sample.uid else {})}
    meta |= {column: value for column, value in sample.columns.items() if column not in meta}
    content = json.dumps({k: _plain(v) for k, v in meta.items()}, ensure_ascii=False, default=str)
    for kind, data in ((ending, picture), ("json", content.encode("utf-8", "replace")),
                       ("txt", sample.text.encode("utf-8", "replace"))):  # fmt: skip
        info = tarfile.TarInfo()
        info.mode = 0o644
        out.write(header(f"{name}.{kind}", len(data), info))
        out.write(data)
        out.write(bytes(-len(data) % TAR_BLOCK))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def safe_name(key: str) -> str:
    """Return a name for the members of a sample: different for different keys, without slashes and dots.

    Letters, digits, ``_``, ``-`` and ``~`` stay, everything else is percent-encoded as in URLs (``%2F``); the end of a
    very long name is replaced by a hash.
    """
    name = quote(key, safe="", errors="surrogatepass").replace(".", "%2E")
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 33]}~{blake2b(name.encode(), digest_size=16).hexdigest()}"
