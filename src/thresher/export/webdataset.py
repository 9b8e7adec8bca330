"""A webdataset stage that passes only the samples a selection keeps, before they are decoded.

Put it after the stage that reads samples from tars and before the shuffle buffer and the decoder::

    wds.DataPipeline(
        wds.SimpleShardList(shards), wds.split_by_worker, wds.tarfile_to_samples(),
        keep("subset"), wds.shuffle(1000), wds.decode("pil"), wds.to_tuple("jpg", "txt"),
    )

It does not need webdataset: it takes any iterable of mappings that have ``__key__``.

:class:`read_kept` takes the place of both stages, and reads little more of the tars than the kept samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from thresher.data.layouts.webdataset import TarPart
from thresher.data.parts import Scanned
from thresher.data.streams import PATIENCE, Seen, uid_of
from thresher.errors import UsageError, suggest
from thresher.export.keys import Chosen, KeySet, each_key, read_keys
from thresher.io.key_forms import difference
from thresher.io.paths import visible
from thresher.io.places import located
from thresher.runtime.format import counted
from thresher.runtime.untrusted import cut

_LOOKED = 100_000  # samples without a match after which to warn
_MOST = 1_000_000  # and after which to stop
_PASSES = 100  # that often the same shards were read without a match; then PATIENCE samples are enough to stop

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

    def __init__(self, sel: Chosen | KeySet, *, by: By = "auto", patience: int | None = None) -> None:
        """Read the keys of a selection.

        Args:
            sel: A selection folder, a file of keys, anything else that :func:`thresher.export.keys.read_keys` reads, or
                the :class:`KeySet` it returns.
            by: How samples are identified. "key": by ``__key__``. "uid": by the ``uid`` in their ``json``, as in
                DataComp shards, in upper or lower case; samples without one are skipped. "auto": by uid if keys of the
                selection are uids (32 hexadecimal digits) and the uid of the sample is one of them, else by
                ``__key__``, which pools use for samples without a uid.
            patience: Number of samples after which the stream is refused if none of those read in this process is
                kept. By default 1,000,000, or 10,000 if the shards were read 100 times.

        Raises:
            UsageError: It has no keys, its pool has a key several times, ``by`` is not one of these, or ``patience``
                is below 1.
            PoolError: It cannot be read.
        """
        if by not in get_args(By):
            raise UsageError(f"by={by!r}; give one of {', '.join(get_args(By))}.{suggest(str(by), get_args(By))}")
        if patience is not None and patience < 1:
            raise UsageError(f"{patience=}; give 1 or more samples")
        self.keys = sel if isinstance(sel, KeySet) else read_keys(sel)
        if not len(self.keys):
            raise UsageError(f"{sel}: has no keys, so no sample would be kept; give a selection that keeps some")
        self.by, self.patience, self.seen, self.kept = by, patience, 0, 0
        self._like = "" if isinstance(sel, KeySet) else next((key for key, _ in each_key(sel)), "")
        self._passes = 0

    def __call__(self, samples: Iterable[Any]) -> Iterator[Any]:
        """Yield the kept samples, each as often as the selection uses it.

        Warns if none of the first 100,000 samples, or of all samples, is kept: the keys are then of other data.

        Raises:
            UsageError: A sample without a ``__key__``, or none of ``patience`` samples is kept.
        """
        none: Seen | None = Seen()
        seen = self.seen
        self._passes += 1
        for sample in samples:
            key = self._key(sample)
            times = 0 if key is None else self.keys.times(key)
            self.seen += 1
            self.kept += times
            if times:
                none = None
            elif none is not None:
                none.add(sample, "" if key is None else key)
                if none.samples == _LOOKED:  # streams with resampling have no end
                    warnings.warn(self._nothing(none), stacklevel=2)
                if not self.kept and self.seen >= self._most():
                    raise UsageError(f"{self._nothing(none)}. If its samples come later, raise patience=")
            if times == 1:
                yield sample
            elif times:  # copies, because later stages may modify them
                yield from (dict(one) for one in [dict(sample)] * times)
        if none is not None and 0 < self.seen - seen < _LOOKED:
            warnings.warn(self._nothing(none), stacklevel=2)

    def _most(self) -> int:
        return self.patience or (PATIENCE if self._passes > _PASSES else _MOST)

    def _nothing(self, none: Seen) -> str:
        first = repr(cut(none.key)) if none.key or self.by == "key" else "no uid"
        uid = f" and the uid {cut(none.uid)!r}" if none.uid not in ("", none.key) else ""
        like = f"; the selection has keys such as {cut(self._like)!r}" if self._like else ""
        hint = difference(self._like, none.key) or difference(self._like, none.uid)
        samples, keys = counted(none.samples, "sample"), counted(len(self.keys), "kept key")
        return (
            f"none of {samples} has one of {keys}; the first has {first}{uid}; members: {none.listed()}{like}{hint}. "
            'Give a selection of these data, or by="key" or by="uid"'
        )

    def _key(self, sample: Any) -> str | None:
        """Return the key or uid of a sample; None if it has no uid but needs one."""
        if not isinstance(sample, Mapping) or not isinstance(sample.get("__key__"), str):
            there = ", ".join(map(str, sample)) if isinstance(sample, Mapping) else f"no fields: it is {type(sample)}"
            raise UsageError(f"a sample without __key__; it has {there}. Put the stage after tarfile_to_samples")
        if self.by == "uid" or (self.by == "auto" and self.keys.uids):
            uid = uid_of(sample)
            if self.by == "uid" or uid in self.keys:
                return uid
        return str(sample["__key__"])


class read_kept(keep):  # noqa: N801 - reads as what it does
    """A stage that reads the samples of tars that a selection keeps, in place of ``tarfile_to_samples`` and ``keep``::

        wds.DataPipeline(
            wds.SimpleShardList(shards), wds.split_by_node, wds.split_by_worker,
            read_kept("subset"), wds.shuffle(1000), wds.decode("pil"), wds.to_tuple("jpg", "txt"),
        )

    Of the other samples only headers are read, and of remote tars with an index of NVIDIA DALI next to them
    (``00000.idx`` next to ``00000.tar``) not even those: the kept samples are read with several requests at the same
    time. What an index says is compared with every header that is used; one that does not fit is named in a warning,
    and not used. Samples are those of :class:`keep`, and are identified and repeated as there.
    """

    def __call__(self, sources: Iterable[Any]) -> Iterator[Any]:
        """Yield the kept samples of tars, each as often as the selection uses it.

        Args:
            sources: Paths or addresses of tars, or mappings that have them as ``url``, as the lists of shards of
                webdataset yield them.

        Raises:
            UsageError: A source is not the address of a tar, or none of ``patience`` samples is kept.
            PoolError: A tar is damaged.
        """
        none, kept = Seen(), self.kept
        self._passes += 1
        for source in sources:
            url = source.get("url") if isinstance(source, Mapping) else source
            if not isinstance(url, str) or url.startswith("pipe:"):
                raise UsageError(
                    f"{url!r}: is not the path or address of a tar, so that it cannot be read in places; give paths or "
                    "addresses, such as s3://bucket/00000.tar, or use tarfile_to_samples and keep"
                )
            protocol, path = located(url)
            counts: list[int] = []
            chosen = partial(self._chosen, none, counts)
            by_uid = self.by == "uid" or self.by == "auto" and self.keys.uids
            for window, found in TarPart(path, protocol).read_chosen(chosen, uids=by_uid, say=warnings.warn):
                members = {ending: window.read(one.offset, one.size) for ending, one in found.members.items()}
                sample = {"__key__": found.key, "__url__": url, **members}
                key = self._key(sample)
                times = 0 if key is None else self.keys.times(key)
                self.kept += times
                yield from (dict(one) for one in [sample] * times)
            self.seen, none.samples = self.seen + counts[-1], none.samples + counts[-1]
            if not self.kept and self.seen >= self._most():
                raise UsageError(f"{self._nothing(none)}. If its samples come later, raise patience=")
        if self.kept == kept and none.samples:
            warnings.warn(self._nothing(none), stacklevel=2)

    def _chosen(self, none: Seen, counts: list[int], scanned: Scanned) -> npt.NDArray[np.int64]:
        """Return which samples of a tar are kept, and add how many it has to ``counts``."""
        counts.append(len(scanned.keys))
        if counts[-1] and not none.samples:
            none.key, none.uid = scanned.keys[0], "" if scanned.uids is None else scanned.uids[0]
        for key, why in scanned.skipped:
            if key in self.keys:
                warnings.warn(f"sample {visible(key)} is left out: it {why}", stacklevel=2)
        if scanned.uids is None:
            return np.flatnonzero(self.keys.find_many(scanned.keys) >= 0)
        by_uid = self.keys.find_many(scanned.uids) >= 0
        return np.flatnonzero(by_uid if self.by == "uid" else by_uid | (self.keys.find_many(scanned.keys) >= 0))
