"""The samples of a remote tar by the index next to it, so that not all headers are read: almost the whole tar.

An index is a hint. It is used only if the tar has what it says: its members are one after the other in the tar, the
tar ends after the last, and the headers of some samples, and later of every sample that is used, are as it says. Where
something else lies between members than ordinary headers, these headers are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from thresher.errors import AccessError, PoolError
from thresher.io.remote import read_range
from thresher.io.spans import Span, open_spans, size_of
from thresher.io.tar import TAR_BLOCK, Member, TarSample, Window, grouped, tar_samples
from thresher.io.tar_apart import Watch
from thresher.io.tar_index import IndexProblem, index_path, members_in
from thresher.runtime.format import counted

_COMPARED = 16  # samples of which the headers are read in any case
_LOOKED_INTO = 64  # most places with something else between members
_LEFT_OUT = 1 << 20  # most bytes between two members


@dataclass(frozen=True)
class Listed:
    """The samples of a tar, in order, as its index lists them.

    Attributes:
        protocol: Protocol of the file system of the tar.
        path: The tar.
        samples: The samples.
    """

    protocol: str
    path: str
    samples: Sequence[TarSample]

    def check(self, samples: Sequence[TarSample]) -> None:
        """Compare samples with the headers in the tar.

        Raises:
            IndexProblem: One is not in the tar as the index says.
        """
        for _ in self.opened(samples):
            pass

    def opened(self, samples: Sequence[TarSample], *, contents: bool = False) -> Iterator[tuple[Window, TarSample]]:
        """Yield samples that are in the tar as the index says, each with a window to read it.

        Args:
            samples: Some of the samples, in their order.
            contents: Whether the contents are read, too.

        Raises:
            IndexProblem: One is not.
        """
        spans = [span for sample in samples for span in _spans(sample, contents=contents)]
        with open_spans(self.protocol, self.path, spans) as file:
            window = Window(file, self.path, TAR_BLOCK)
            for sample in samples:
                try:
                    there = next(tar_samples(window, self.path, sample.start), None)
                except PoolError:  # no header, or a member that is longer than the tar
                    there = None
                if there is None or _said(there) != _said(sample):
                    raise IndexProblem(f"does not fit the tar at byte {sample.start:,}")
                yield window, there


def _said(sample: TarSample) -> list[tuple[str, int, int]]:
    """Return what an index says of a sample; where the headers of its members begin, it does not say."""
    return [(member.name, member.offset, member.size) for member in sample.members.values()]


def _spans(sample: TarSample, *, contents: bool) -> Iterator[Span]:
    """Yield what is read of a sample: with the next header, which shows that no other member belongs to it."""
    if contents:
        yield sample.start, sample.end + TAR_BLOCK
        return
    for member in sample.members.values():
        yield member.start, member.offset
    yield sample.end, sample.end + TAR_BLOCK


def listed(protocol: str, path: str) -> Listed | None:
    """Return the samples of a remote tar by its index, None if there is no index.

    Raises:
        IndexProblem: There is one that is not used.
        UnreachedError: The index or the tar was not reached.
    """
    index = index_path(path)
    if not index:
        return None
    try:
        length = size_of(protocol, index)
    except (PoolError, AccessError):  # S3 denies access to what is not there if listing is not allowed
        return None
    size = size_of(protocol, path)
    if length is None or size is None:
        return None
    if length > size:
        raise IndexProblem(f"has {length:,} bytes, and the tar only {size:,}")
    members = members_in(read_range(protocol, index, 0, length), size)
    samples = list(grouped(members))
    watch = Watch()
    for sample in samples:
        watch.add(sample)
    if len(watch.found().start_m):
        raise IndexProblem("has samples whose members lie apart")
    found = Listed(protocol, path, samples)
    found.check([samples[i] for i in _to_compare(samples)])
    _refuse_more(found, members)
    return found


def _to_compare(samples: Sequence[TarSample]) -> list[int]:
    """Return the samples to compare: some, and all after which, or in which, there is more than ordinary headers.

    Raises:
        IndexProblem: These are too many, or there is too much.
    """
    gaps = [{member.offset - member.start for member in sample.members.values()} for sample in samples]
    if (most := max(map(max, gaps), default=0)) > _LEFT_OUT:
        raise IndexProblem(f"leaves out {most:,} bytes between two members")
    often = Counter(gap for of_one in gaps for gap in of_one)
    usual = {TAR_BLOCK, *(gap for gap, _ in often.most_common(1))}  # such as those with metadata of webdataset
    longer = [i for i, of_one in enumerate(gaps) if of_one - {TAR_BLOCK}]
    odd = [i for i in longer if gaps[i] - usual]
    if len(odd) > _LOOKED_INTO:
        raise IndexProblem(f"leaves out something between members at {len(odd):,} places")
    return sorted({*odd, *_spread(range(len(samples))), *_spread(longer)})


def _spread(which: Sequence[int]) -> list[int]:
    return [which[i] for i in np.linspace(0, len(which) - 1, min(_COMPARED, len(which))).astype(int).tolist()]


def _refuse_more(found: Listed, members: Sequence[Member]) -> None:
    """Raise if the tar has samples after the last member of the index."""
    end = members[-1].end if members else 0
    with open_spans(found.protocol, found.path, [(end, end + TAR_BLOCK)]) as file:
        try:
            more = next(tar_samples(Window(file, found.path, TAR_BLOCK), found.path, end), None)
        except PoolError:
            raise IndexProblem(f"ends at byte {end:,}, where the tar does not end") from None
    if more is not None:
        raise IndexProblem(f"lists {counted(len(found.samples), 'sample')}, and the tar has more")
