"""A stage for webdataset pipelines that lets through what a selection keeps, before it is decoded.

It goes after what makes samples of tar files and before the shuffle buffer and the decoder::

    wds.DataPipeline(
        wds.SimpleShardList(shards), wds.split_by_worker, wds.tarfile_to_samples(),
        keep("subset"), wds.shuffle(1000), wds.decode("pil"), wds.to_tuple("jpg", "txt"),
    )

webdataset is not needed for it: any iterable of samples will do that are mappings and have ``__key__``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from thresher.errors import UsageError, suggest
from thresher.export.keys import Chosen, KeySet, read_keys

_LOOKED = 100_000  # samples without a kept one that are too many

By = Literal["auto", "key", "uid"]


class keep:  # noqa: N801 - reads as the verb it is
    """A stage of a stream that passes over the samples which a selection does not keep, undecoded.

    A sample that is to be used k times comes k times, one after the other, each a mapping of its own: let a shuffle
    buffer follow. Samples keep their order.

    The stage may be pickled, and run in any number of processes. Processes that are forked share the keys; one that is
    spawned is sent them, 9 to 13 bytes a key.

    Attributes:
        keys: What is kept.
        by: What samples are known by.
        seen: Samples that this stage has read in this process.
        kept: Samples that it has let through, repeats counted.
    """

    def __init__(self, sel: Chosen | KeySet, *, by: By = "auto") -> None:
        """Read the keys of a selection.

        Args:
            sel: A selection folder, a file of keys or another that :func:`thresher.export.keys.read_keys` reads, or
                the keys that it read.
            by: What a sample is known by. "key": its ``__key__``. "uid": the ``uid`` in its ``json``, as DataComp's
                shards have it, in upper or lower case; samples without one are passed over. "auto": the uid where
                keys of the selection are uids, 32 hexadecimal digits, and the sample's is one of them; else
                ``__key__``: a pool knows the samples without a uid by that.

        Raises:
            UsageError: There is no key in it, a pool has one several times, or ``by`` is none of these.
            PoolError: It cannot be read.
        """
        if by not in get_args(By):
            raise UsageError(f"by={by!r}; give one of {', '.join(get_args(By))}.{suggest(str(by), get_args(By))}")
        self.keys = sel if isinstance(sel, KeySet) else read_keys(sel)
        if not len(self.keys):
            raise UsageError(f"{sel}: has no key, and would keep no sample; give what keeps some")
        self.by, self.seen, self.kept = by, 0, 0

    def __call__(self, samples: Iterable[Any]) -> Iterator[Any]:
        """Yield the samples that are kept, as often as they are to be used.

        Warns where not one sample is kept, of the first 100,000 or of all: the keys are of other data then.

        Raises:
            UsageError: A sample without a ``__key__``.
        """
        first, seen, kept = "", self.seen, self.kept
        for sample in samples:
            key = self._key(sample)
            if self.seen == seen:
                first = f"the first has {'no uid' if key is None else repr(key)}"
            times = 0 if key is None else self.keys.times(key)
            self.seen += 1
            self.kept += times
            if times == 1:
                yield sample
            elif times:  # of one mapping the stages that follow would change what comes again
                yield from (dict(one) for one in [dict(sample)] * times)
            elif self.seen - seen == _LOOKED and self.kept == kept:  # streams drawn with replacement have no end
                self._warn(_LOOKED, first)
        if 0 < self.seen - seen < _LOOKED and self.kept == kept:
            self._warn(self.seen - seen, first)

    def _warn(self, seen: int, first: str) -> None:
        told = f"none of {seen:,} samples is among the {len(self.keys):,} keys that are kept; {first}"
        warnings.warn(told, stacklevel=3)

    def _key(self, sample: Any) -> str | None:
        """Return what a sample is known by; None where it has no uid and needs one."""
        if not isinstance(sample, Mapping) or not isinstance(sample.get("__key__"), str):
            there = ", ".join(map(str, sample)) if isinstance(sample, Mapping) else f"no fields, but {type(sample)}"
            raise UsageError(f"a sample without __key__; it has {there}. Put the stage after tarfile_to_samples")
        if self.by == "uid" or (self.by == "auto" and self.keys.uids):
            uid = _uid(sample.get("json"))
            if self.by == "uid" or uid in self.keys:
                return uid
        return str(sample["__key__"])


def _uid(content: Any) -> str | None:
    """Return the uid of a sample's json, decoded or not; None where there is none."""
    if isinstance(content, bytes | bytearray | str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError):
            return None
    found = content.get("uid") if isinstance(content, Mapping) else None
    return found if isinstance(found, str) else None
