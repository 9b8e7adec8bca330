"""Samples of tars that the loader of open_clip leaves out, changed so that it trains on them.

A caption that is elsewhere, such as in the json, is written to a ``.txt``. An image in a format that the loader does
not take becomes a PNG; one that only has another extension gets the usual one. All other members keep their content,
and all samples their key.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from thresher.data.layouts.webdataset import TarPart
from thresher.data.parts import Ints
from thresher.data.samples import BYTES, Sample
from thresher.data.trainable import CAPTION, KINDS, PICTURES, TAKEN, can_decode, is_decoded, why_left_out
from thresher.errors import PoolError
from thresher.io.paths import visible
from thresher.io.pictures import as_png, kind_of
from thresher.io.tar import NOTES, TAR_BLOCK, Member, TarSample, Window, key_of
from thresher.resharding.tars import RECORD, header
from thresher.runtime.files import writing
from thresher.runtime.untrusted import parse_json, read_npz

CONVERTED, RENAMED, CAPTIONED = 1, 2, 4


@dataclass(frozen=True, eq=False)
class Fixed:
    """The samples of a tar that were changed or skipped, k of them.

    Attributes:
        start_k: Start of each in the tar, ascending.
        to_k: Start of each in the tar with the changed samples; -1 if it was skipped.
        length_k: Length of each there.
        what_k: What was changed: a sum of ``CONVERTED``, ``RENAMED`` (images) and ``CAPTIONED``.
        skipped: (key, why) of each sample that was skipped.
    """

    start_k: Ints
    to_k: Ints
    length_k: Ints
    what_k: npt.NDArray[np.uint8]
    skipped: Sequence[tuple[str, str]]

    def counts(self, start_M: Ints) -> Mapping[str, int]:
        """Return how many samples were changed in which way, repeats included.

        Args:
            start_M: Starts of all samples of the tar that are written, ascending.
        """
        times_k = np.searchsorted(start_M, self.start_k, "right") - np.searchsorted(start_M, self.start_k)
        flags = {"converted": CONVERTED, "renamed": RENAMED, "captioned": CAPTIONED}
        return {name: int(times_k[(self.what_k & flag) > 0].sum()) for name, flag in flags.items()}

    def save(self, path: str) -> None:
        """Write it to a file."""
        skipped = np.frombuffer(json.dumps(self.skipped).encode(), np.uint8)
        with writing(path) as scratch, open(scratch, "wb") as file:
            np.savez(file, start=self.start_k, to=self.to_k, length=self.length_k, what=self.what_k, skipped=skipped)

    @classmethod
    def load(cls, path: str) -> Fixed:
        """Read it from a file.

        Raises:
            OSError: It cannot be read.
        """
        arrays = read_npz(path)
        skipped = [(key, why) for key, why in parse_json(arrays["skipped"].tobytes())]
        return cls(arrays["start"], arrays["to"], arrays["length"], arrays["what"], skipped)


def write(part: TarPart, start_n: Ints, path: str) -> Fixed:
    """Write the samples that have to be changed to a tar, in their order.

    Args:
        part: The tar that has them.
        start_n: Starts of the samples to look at, ascending, each once.
        path: File to write.

    Raises:
        PoolError: The tar changed since it was read.
    """
    rows, skipped = list[tuple[int, int, int, int]](), list[tuple[str, str]]()
    with open(path, "wb") as out:
        for at, (window, members, sample) in zip(start_n.tolist(), part.opened(start_n), strict=True):
            try:
                contents, what = _contents(window, members, sample)
            except PoolError as error:
                skipped.append((sample.key, str(error)))
                rows.append((at, -1, 0, 0))
                continue
            if not what:
                continue
            begin = out.tell()
            for one in contents:
                content = window.read(one.like.offset, one.like.size) if one.content is None else one.content
                out.write(_header(window, one, len(content)))
                out.write(content)
                out.write(bytes(-len(content) % TAR_BLOCK))
            rows.append((at, begin, out.tell() - begin, what))
        out.write(bytes(-(-(out.tell() + 2 * TAR_BLOCK) // RECORD) * RECORD - out.tell()))
    columns = np.array(rows, np.int64).reshape(-1, 4)
    return Fixed(columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3].astype(np.uint8), skipped)


class _Content(NamedTuple):
    """A member to write: its name, the member that its header is like, and its content if that is not the same."""

    name: str
    like: Member
    content: bytes | None = None


def _contents(window: Window, found: TarSample, sample: Sample) -> tuple[list[_Content], int]:
    """Return the members of a sample that the loader trains on, and what was changed.

    Raises:
        PoolError: There is no such sample: no image, no caption, or a member that cannot be decoded.
    """
    members, what = found.members, 0
    contents = {ending: _Content(member.name, member) for ending, member in members.items()}
    for ending, member in members.items():
        if is_decoded(ending) and member.size <= NOTES:
            if can_decode(ending, window.read(member.offset, member.size)):
                continue
            if ending != CAPTION:
                raise PoolError(f"has a .{visible(ending)} that webdataset cannot decode")
            contents[ending] = _Content(member.name, member, sample.text.encode())
            what |= CAPTIONED
    if not why_left_out(tuple(members)):
        return list(contents.values()), what
    image = next((ending for ending in PICTURES if ending in members), None)
    if image is None:
        raise PoolError(sample.why or "has no image")
    member = members[image]
    if image not in TAKEN:
        if member.size > BYTES:
            raise PoolError(f"has an image of {member.size:,} bytes; the limit is {BYTES:,}")
        data = window.read(member.offset, member.size)
        kind = kind_of(data)
        if kind in KINDS:
            what |= RENAMED
        else:
            data, kind, what = as_png(data), "png", what | CONVERTED
        contents[image] = _Content(f"{key_of(member.name)}.{kind}", member, data)
    if CAPTION not in members:
        if not sample.text:
            raise PoolError("has no caption")
        contents[CAPTION] = _Content(f"{key_of(member.name)}.{CAPTION}", member, sample.text.encode())
        what |= CAPTIONED
    return list(contents.values()), what


def _header(window: Window, one: _Content, size: int) -> bytes:
    """Return the header of a member: with the mode, the time and the owner of the one that it is like."""
    try:
        like = tarfile.TarInfo.frombuf(window.read(one.like.offset - TAR_BLOCK, TAR_BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        like = tarfile.TarInfo()
    return header(one.name, size, like)
