"""A webdataset stage that passes only the samples a selection keeps, before they are decoded.

Put it after the stage that reads samples from tars and before the shuffle buffer and the decoder::

    wds.DataPipeline(
        wds.SimpleShardList(shards), wds.split_by_worker, wds.tarfile_to_samples(),
        keep("subset"), wds.shuffle(1000), wds.decode("pil"), wds.to_tuple("jpg", "txt"),
    )

It does not need webdataset: it takes any iterable of mappings that have ``__key__``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from thresher.errors import UsageError, suggest
from thresher.export.keys import Chosen, KeySet, read_keys
from thresher.runtime.untrusted import parse_json

_LOOKED = 100_000  # samples without a match after which to warn

By = Literal["auto", "key", "uid"]


class keep:  # noqa: N801 - reads as the verb it is
    """A stage of a stream that skips samples not kept by a selection, without decoding them.

    A sample that the selection uses k times is yielded k times in a row, each time as a separate mapping: put a shuffle
    buffer after this stage. Samples keep their order.

    The stage can be pickled and can run in any number of processes. Forked processes share the keys; spawned ones
    receive a copy of 9 to 13 bytes per key.

    Attributes:
        keys: The keys to keep.
        by: How samples are identified.
        seen: Samples read by this stage in this process.
        kept: Samples yielded by this stage, including repeats.
    """

    def __init__(self, sel: Chosen | KeySet, *, by: By = "auto") -> None:
        """Read the keys of a selection.

        Args:
            sel: A selection folder, a file of keys, anything else that :func:`thresher.export.keys.read_keys` reads, or
                the :class:`KeySet` it returns.
            by: How samples are identified. "key": by ``__key__``. "uid": by the ``uid`` in their ``json``, as in
                DataComp shards, in upper or lower case; samples without one are skipped. "auto": by uid if keys of the
                selection are uids (32 hexadecimal digits) and the uid of the sample is one of them, else by
                ``__key__``, which pools use for samples without a uid.

        Raises:
            UsageError: It has no keys, its pool has a key several times, or ``by`` is not one of these.
            PoolError: It cannot be read.
        """
        if by not in get_args(By):
            raise UsageError(f"by={by!r}; give one of {', '.join(get_args(By))}.{suggest(str(by), get_args(By))}")
        self.keys = sel if isinstance(sel, KeySet) else read_keys(sel)
        if not len(self.keys):
            raise UsageError(f"{sel}: has no keys, so no sample would be kept; give a selection that keeps some")
        self.by, self.seen, self.kept = by, 0, 0

    def __call__(self, samples: Iterable[Any]) -> Iterator[Any]:
        """Yield the kept samples, each as often as the selection uses it.

        Warns if none of the first 100,000 samples, or of all samples, is kept: the keys are then of other data.

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
            elif times:  # copies, because later stages may modify them
                yield from (dict(one) for one in [dict(sample)] * times)
            elif self.seen - seen == _LOOKED and self.kept == kept:  # streams with resampling have no end
                self._warn(_LOOKED, first)
        if 0 < self.seen - seen < _LOOKED and self.kept == kept:
            self._warn(self.seen - seen, first)

    def _warn(self, seen: int, first: str) -> None:
        message = f"none of {seen:,} samples has one of the {len(self.keys):,} kept keys; {first}"
        warnings.warn(message, stacklevel=3)

    def _key(self, sample: Any) -> str | None:
        """Return the key or uid of a sample; None if it has no uid but needs one."""
        if not isinstance(sample, Mapping) or not isinstance(sample.get("__key__"), str):
            there = ", ".join(map(str, sample)) if isinstance(sample, Mapping) else f"no fields: it is {type(sample)}"
            raise UsageError(f"a sample without __key__; it has {there}. Put the stage after tarfile_to_samples")
        if self.by == "uid" or (self.by == "auto" and self.keys.uids):
            uid = _uid(sample.get("json"))
            if self.by == "uid" or uid in self.keys:
                return uid
        return str(sample["__key__"])


def _uid(content: Any) -> str | None:
    """Return the uid in the json of a sample, decoded or not; None if there is none."""
    if isinstance(content, bytes | bytearray | str):
        try:
            content = parse_json(content)
        except ValueError:
            return None
    uid = content.get("uid") if isinstance(content, Mapping) else None
    return uid if isinstance(uid, str) else None
