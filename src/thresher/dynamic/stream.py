"""Pruning for streams: iterable datasets whose samples have a key but no row number, such as webdataset.

A sample is identified by a 64-bit hash of its key and a 32-bit check, which separates two keys with the same hash. Two
parts share only a folder:

- in the processes that read samples, :class:`prune_stream` looks up every sample in a table of what the current plan
  leaves out, and skips those samples before they are decoded. The table is memory-mapped; a counter in the same folder
  shows when there is a new one;
- in the training process, :class:`StreamPruner` receives the losses, like :class:`PruningSampler`, records them at
  the end of the epoch, plans the next epoch and publishes its table.

Samples that were never seen are always kept, and are added to the ledger at the end of the epoch in which they are
first seen. Rows of the ledger are ordered by hash, so the order of the stream and the number of ranks do not matter.

Shape letters: N known rows, M samples or rows in a list, B rows of a batch, R directions of the loss. An id is two
int64: the hash and the check.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thresher.data.streams import PATIENCE, Seen, uid_of
from thresher.dynamic.ledger import Ints, Ledger, Losses, check_length
from thresher.dynamic.loop import (
    PruningLoop,
    all_gather,
    as_array,
    check_references,
    rank_and_world_size,
    record_epoch,
    refuse_chosen,
    refuse_fractions,
    refuse_shorter,
    untraced,
    warn_of_length,
)
from thresher.dynamic.pick import whole
from thresher.dynamic.policy import Plan, Policy
from thresher.dynamic.references import References
from thresher.errors import UsageError
from thresher.io.key_forms import difference
from thresher.ops.key_hash import BATCH, RECORD, batches_of, id_of, is_uid, records_of
from thresher.runtime.format import counted
from thresher.runtime.locks import Scratch, scratch_folder
from thresher.runtime.untrusted import cut

if TYPE_CHECKING:
    import torch  # noqa: TID253

ID = "__id__"  # the field of a sample that prune_stream adds

AUTO, UID, KEY = "auto", "uid", "__key__"  # how prune_stream identifies samples

_MOST_TIMES = int(np.iinfo(np.uint16).max)
_SURE = 30  # with a share 1/k of the samples kept, none of 30 k is kept with a probability of e^-30

Key = str | Sequence[str] | Callable[[Any], str]
Checks = npt.NDArray[np.uint32]


def ids_of(keys: Iterable[str]) -> Ints:
    """Return the ids of keys, (M, 2) int64."""
    parts = [np.empty(0, RECORD), *(records_of(batch) for batch in batches_of(keys))]
    records_M = np.concatenate(parts)
    return np.stack([records_M["hash"], records_M["check"].astype(np.int64)], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StaticKeys(Policy):
    """A selection made before training, as keys: all other samples of the stream are left out, unknown ones too.

    Attributes:
        ids_M: (M, 2) int64, ids of the keys to keep, ascending.
        times_M: (M,) uint16, how often each sample is used, 1 or more.
        total: Number of samples of the stream from which these were selected; forecasts use it.
        weigh: Multiply losses by weights instead of repeating samples.
        uids: Whether any key is a uid of 32 hexadecimal digits, so that samples have to be looked up by uid.
        example: One of the keys, for messages.
    """

    ids_M: Ints
    times_M: npt.NDArray[np.uint16]
    total: int
    weigh: bool = False
    uids: bool = dataclasses.field(default=False, repr=False)
    example: str = dataclasses.field(default="", repr=False)

    @classmethod
    def of_keys(cls, keys: Iterable[str], total: int, *, weigh: bool = False) -> StaticKeys:
        """Keep the samples with these keys, out of about ``total``; a repeated key is used as often.

        Raises:
            UsageError: No keys, more than ``total``, a key repeated too often, or two keys with the same hash.
        """
        return cls.of_batches(((batch, None) for batch in batches_of(keys)), total, weigh=weigh)

    @classmethod
    def of_batches(
        cls, batches: Iterable[tuple[Sequence[str], Ints | None]], total: int, *, weigh: bool = False
    ) -> StaticKeys:
        """As :meth:`of_keys`, from batches of keys with their counts; takes about 45 bytes per key meanwhile.

        Args:
            batches: Keys, and how often each is used, (M,) int64; None for once.
            total: Number of samples of the stream.
            weigh: Multiply losses by weights instead of repeating samples.

        Raises:
            UsageError: As for :meth:`of_keys`.
        """
        held, often = bytearray(), None  # bytearrays grow in place, without a second copy
        uids, example = False, ""
        for keys, times in batches:
            if times is not None and (times < 1).any():
                keys, times = [key for key, n in zip(keys, times, strict=True) if n > 0], times[times > 0]
            uids, example = uids or any(map(is_uid, keys)), example or next(iter(keys), "")
            if often is None and times is not None and (times != 1).any():
                often = bytearray(np.ones(len(held) // RECORD.itemsize, np.int32).tobytes())
            held += records_of(keys).data
            if often is not None:
                counts = np.ones(len(keys)) if times is None else np.minimum(times, np.iinfo(np.int32).max)
                often += counts.astype(np.int32).data
        records_M = np.frombuffer(held, RECORD)
        ids_M, times_M = _counted(records_M, None if often is None else np.frombuffer(often, np.int32))
        if not 0 < len(ids_M) <= total:
            raise UsageError(
                f"{counted(len(ids_M), 'key')} to keep of {counted(total, 'sample')}; give 1 key or more, and at most "
                "as many as samples"
            )
        if times_M.max() > _MOST_TIMES:
            raise UsageError(f"a key is repeated {times_M.max():,} times; give it {_MOST_TIMES:,} times or fewer")
        if (same := np.diff(ids_M[:, 0]) == 0).any():
            pairs = counted(int(np.count_nonzero(same)), "pair of keys has", "pairs of keys have")
            raise UsageError(f"{pairs} the same 64-bit hash; leave out one key of each pair")
        times_M = times_M.astype(np.uint16)
        return cls(ids_M=ids_M, times_M=times_M, total=total, weigh=weigh, uids=uids, example=example)

    @cached_property
    def hashes_M(self) -> Ints:
        """The hashes of the keys to keep, contiguous, so that a search does not copy them."""
        return np.ascontiguousarray(self.ids_M[:, 0])

    def __len__(self) -> int:
        """Return the number of samples of an epoch, including repeats."""
        return len(self.ids_M) if self.weigh else int(self.times_M.sum(dtype=np.int64))

    def weighs(self) -> bool:
        """Return whether losses are multiplied by weights."""
        return self.weigh

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Keep all known rows: :class:`prune_stream` only passes samples of the selection."""
        return Plan(epoch=epoch, phase="pruned", total=len(ledger))

    def forecast(self, epoch: int) -> float:
        """Return the share left out, the same in every epoch; negative if repeats make epochs longer."""
        return 1 - len(self) / self.total


class prune_stream:  # noqa: N801 - reads as the verb it is
    """A pipeline stage that skips the samples which the current plan leaves out.

    Put it after the stage that groups bytes into samples, and before the shuffle buffer and the decoder, in a
    webdataset pipeline or around any iterable: ``prune_stream(pruner)(samples)``. A sample that is a mapping gets a
    field ``__id__``, (2,) int64, for :meth:`StreamPruner.reduce`; any other sample is yielded as ``(id, sample)``.

    The stage can be pickled, and can run in any number of processes on the pruner's machine. It checks for a new plan
    with every sample. Samples that are in later buffers when an epoch ends were passed by the previous plan.

    Attributes:
        seen: Samples read by this stage in this process.
        passed: Samples yielded by this stage in this process, including repeats.
        without_uid: Samples in which no uid was found, of those looked up by uid. They are identified by ``__key__``.
    """

    def __init__(self, pruner: StreamPruner, key: Key = AUTO, *, patience: int | None = None) -> None:
        """Create the stage for ``pruner``.

        Args:
            pruner: The pruner of the training loop that uses the samples.
            key: How to get the key of a sample, which must be the same in every epoch: the name of a field, several
                names (joined by "/"), or a function of the sample that returns text. img2dataset numbers the samples
                of every dataset from 0: if you mix several, give ``("__url__", "__key__")``. "uid" is the field
                ``uid``, or that in the ``json`` of the sample, as in DataComp shards; samples without one are
                identified by their ``__key__``. "auto" is "uid" for a :class:`StaticKeys` or references with
                uids, else ``"__key__"``.
            patience: For a selection, the number of samples after which the stream is refused if none of those read in
                this process is selected. By default 10,000, and more for a small selection or large shards: as many
                samples, and as many shards, that a selection of the same data would have had some of them.

        Raises:
            UsageError: ``patience`` is below 1.
        """
        if patience is not None and patience < 1:
            raise UsageError(f"{patience=}; give 1 or more samples")
        self.folder, self.patience = pruner.folder, patience
        policy = pruner.policy
        self._of: tuple[int, int, str] | None = None  # keys of the selection, samples of the stream, a key
        uids = False
        if isinstance(policy, StaticKeys):
            self._of, uids = (len(policy.ids_M), policy.total, policy.example), policy.uids
        elif pruner.references is not None:
            uids = pruner.references.uids
        self.key: Key = key if key != AUTO else UID if uids else KEY
        self._by_request = key == UID
        self.seen, self.passed, self.without_uid = 0, 0, 0
        self._none: Seen | None = Seen()  # what was seen while none was known by its key; None afterwards

    def __call__(self, samples: Iterable[Any]) -> Iterator[Any]:
        """Yield the samples to train on, with their ids.

        Warns if some samples have no uid but are looked up by uid.

        Raises:
            UsageError: A sample does not have the fields of the key, or none of many samples is in the selection or has
                the uid that was requested.
        """
        now = np.load(self.folder / "now.npy", mmap_mode="r", allow_pickle=False)
        version, table = -1, None
        before, without = self.seen, self.without_uid
        try:
            for sample in samples:
                if table is None or now[0] != version:
                    version, table = _Table.in_force(self.folder, now)
                self.seen += 1
                id_2, times = self._find(sample, table)
                self.passed += times
                for _ in range(times):
                    yield {**sample, ID: id_2} if isinstance(sample, Mapping) else (id_2, sample)
        except GeneratorExit:  # not read to its end, as with webdataset's ``with_epoch``
            self._count_without_uid(before, without)
            raise
        self._count_without_uid(before, without)

    def _count_without_uid(self, seen: int, without: int) -> None:
        """Warn if samples were read without a uid, since these counts."""
        if self.without_uid > without:
            what = "they are left out unless their __key__ is selected" if self._of else "their __key__ is used"
            warnings.warn(
                f"{self.without_uid - without:,} of {counted(self.seen - seen, 'sample')} had no uid in their json; "
                f"{what}",
                stacklevel=3,
            )

    def nothing(self) -> str | None:
        """Return what to say if no sample that this process has read is in the selection; None if there is one."""
        if self._none is None or self._of is None:
            return None
        kept, _, example = self._of
        like = f", such as {cut(example)!r}" if example else ""
        by = self.key if isinstance(self.key, str) else "key" if callable(self.key) else "/".join(self.key)
        hint = ""
        if self.key != UID and (is_uid(example) or self._none.uid):
            hint = ', or type --prune-key uid (in Python: key="uid") if its keys are uids'
        forms = difference(example, self._none.key) or difference(example, self._none.uid)
        return (
            f"the selection has none of {self._none}, looked up by {by}; it has {counted(kept, 'key')}{like}{forms}. "
            f"Give a selection of these data{hint}"
        )

    def _find(self, sample: Any, table: _Table) -> tuple[Ints, int]:
        """Return the id of a sample, and how often to use it."""
        keys = self._keys(sample)
        ids = map(id_of, keys)
        first = id_2 = next(ids)
        times = table.find(id_2)
        if not table.others:
            while times is None and (other := next(ids, None)) is not None:
                id_2, times = other, table.find(other)
        if self._none is not None:
            if times is None if self._of else self._by_request and uid_of(sample) is None:
                self._none.add(sample, keys[0])
                self._check(self._none)
            else:
                self._none = None
        return (first, table.others) if times is None else (id_2, times)

    def _check(self, none: Seen) -> None:
        """Raise if so many samples are not in the selection, or have no uid, that others will not either."""
        if self._of is None:
            if none.samples >= (self.patience or PATIENCE):
                raise UsageError(
                    f"no uid in the json of {none}; leave out --prune-key uid (in Python: key=) to use __key__"
                )
            return
        if self.patience is None:
            kept, total, _ = self._of
            # Selected samples may lie in few shards, so as many shards are needed as samples, or the whole stream.
            sure = _SURE * total / kept
            whole = none.samples >= (_SURE * total if none.shards else total)
            if none.samples < max(PATIENCE, sure) or not (whole or none.shards >= sure):
                return
        elif none.samples < self.patience:
            return
        raise UsageError(f"{self.nothing()}. If its samples come later, raise --prune-patience (in Python: patience=)")

    def _keys(self, sample: Any) -> list[str]:
        """Return the key of a sample, and the other keys by which a selection may know it."""
        if callable(self.key):
            return [self.key(sample)]
        fields = (self.key,) if isinstance(self.key, str) else self.key
        if self.key == UID:
            if (uid := uid_of(sample)) is not None:
                key = sample.get(KEY)
                return list(dict.fromkeys([uid, uid.lower(), uid.upper(), *([key] if isinstance(key, str) else [])]))
            has_key = isinstance(sample, Mapping) and isinstance(sample.get(KEY), str)
            if has_key and (not self._by_request or "json" in sample or "__url__" in sample):
                self.without_uid += self._by_request or "json" in sample
                return [sample[KEY]]
        if not isinstance(sample, Mapping) or any(field not in sample for field in fields):
            there = ", ".join(map(str, sample)) if isinstance(sample, Mapping) else f"no fields; it is a {type(sample)}"
            raise UsageError(f"a sample without {' and '.join(fields)}; it has {there}. Give the field with key=")
        return ["/".join(str(sample[field]) for field in fields)]


class StreamPruner(PruningLoop):
    """Plans the epochs of a stream by a policy, and records its losses.

    A step is one batch on every rank. It is done when its losses are passed to :meth:`reduce`. The number of steps of
    an epoch is fixed at its start: ``samples``, times the share of the known rows that the plan keeps. The last step
    ends the epoch. If the stream is shorter, the epoch ends with it (:meth:`batches`); a longer one, for example with
    shards drawn with replacement, is cut. So a sample may be missing in an epoch or appear several times. It is then
    trained on as often, but counts once in the ledger, with its last loss.

    Attributes:
        policy: The policy that chooses the rows of each epoch.
        batch_size: Rows of a batch over all ranks; every rank has the same number.
        epochs: Length of the run, up to 32,768.
        samples: The approximate number of samples in an epoch on all rows.
        seed: Seed of draws and ties; the same on all ranks.
        folder: The folder in which the current plan is published; removed with the pruner.
        epoch: The current epoch, from 0; ``epochs`` when the run is done.
        step: Number of batches of this epoch that are done.
        references: The reference losses of keys, for a policy that needs them; else None.
        hashes_N: (N,) int64, the hashes of the known rows, ascending.
        checks_N: (N,) uint32, separates keys with the same hash; the row belongs to the first key seen.
        ledger: The record of the finished epochs; None while no row is known.
        plan: The current plan for the known rows; None when all epochs are done.
    """

    ledger: Ledger | None
    _kind = "pruner"
    _later: int  # steps forecast for the epochs after this one
    _own: list[tuple[Ints, torch.Tensor]]  # this rank's batches that were not gathered yet
    _known: list[tuple[Ints, Losses]]  # the global batches before those

    def __init__(
        self,
        *,
        policy: Policy,
        batch_size: int,
        epochs: int,
        samples: int,
        seed: int = 0,
        references: References | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        """Plan and publish epoch 0; see the attributes.

        Args:
            policy: Any policy but ``Static``, which uses row numbers; for a selection give :class:`StaticKeys`.
            batch_size: Rows of a batch over all ranks.
            epochs: Length of the run.
            samples: The approximate number of samples in an epoch on all rows; it sets the length of epochs and
                schedules.
            seed: Seed of draws and ties.
            references: For a policy that needs them, the losses of keys under a reference model.
            scratch: Where to create the folder, on a local disk; by default in the folder for temporary files.

        Raises:
            UsageError: A value is not allowed, or the policy uses row numbers.
        """
        refuse_fractions(batch_size=batch_size, epochs=epochs, samples=samples, seed=seed)
        check_length(epochs)
        warn_of_length(policy, epochs)
        if batch_size < 1 or samples < 1 or not 0 <= seed < 2**63:
            raise UsageError(f"{batch_size=}, {samples=}, {seed=}; give 1 or more, and a seed below 2^63")
        if policy.needs_selection:
            name = type(policy).__name__
            raise UsageError(
                f"{name} uses row numbers, which a stream does not have; give StaticKeys.of_keys(keys, total)"
            )
        refuse_chosen(policy, "StreamPruner")
        if policy.needs_references != (references is not None):
            needs = "needs references" if policy.needs_references else "has no use for references"
            raise UsageError(f"policy {policy.name} {needs}; give References.read(path) to a policy that needs them")
        self.references = references
        self.policy, self.batch_size, self.epochs = policy, int(batch_size), int(epochs)  # the log is JSON
        self.samples, self.seed = int(samples), int(seed)
        held = scratch_folder(scratch or tempfile.gettempdir(), "thresher-stream-", mode=0o700)
        self.folder = held.path
        weakref.finalize(self, _remove, held, os.getpid())
        self._now = np.lib.format.open_memmap(self.folder / "now.npy", mode="w+", dtype=np.int64, shape=(2,))
        self.hashes_N: Ints = np.empty(0, np.int64)
        self.checks_N: Checks = np.empty(0, np.uint32)
        self.ledger = None
        self._log: list[dict[str, Any]] = []
        self._steps_before, self._progress_before = 0, 0.0  # at the start of the epoch
        self._begin(0)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of a loader until the epoch ends; end the epoch if the loader ends first.

        Call it once per epoch, on a loader with a :class:`prune_stream` stage. On several ranks the loader must not end
        first, or the other ranks wait for this one: make it repeat (webdataset: ``with_epoch`` of enough batches).

        Raises:
            UsageError: No batch of the loader was trained on.
        """
        self._in_force()
        epoch = self.epoch
        for batch in loader:
            yield batch
            if self.epoch != epoch:
                return
        if not self.step:
            raise UsageError(
                f"no batch of epoch {epoch} was trained on; check that the stream has samples and a prune_stream stage"
            )
        self.end_epoch()

    def weights(self, ids_B2: Any) -> npt.NDArray[np.float32] | None:
        """Return the weights of these samples in the current plan, (B,) float32; None for 1."""
        plan, ids = self._in_force(), as_array(ids_B2)
        if isinstance(self.policy, StaticKeys):
            if not self.policy.weigh:
                return None
            at, hit = _look_up(self.policy.hashes_M, self.policy.ids_M[:, 1], ids)
            return np.where(hit, self.policy.times_M[at], 1).astype(np.float32)
        if plan.weights_N is None:
            return None
        at, hit = _look_up(self.hashes_N, self.checks_N, ids)
        return np.where(hit, plan.weights_N[at], np.float32(1)).astype(np.float32)

    @untraced
    def reduce(self, ids_B2: Any, losses_BR: torch.Tensor) -> torch.Tensor:
        """Record the losses of this rank's batch and return their weighted mean, to call ``backward`` on.

        Losses stay on their device until the epoch ends, when the ranks gather them. The n-th calls on all ranks
        together are one global batch, within which candidates are ranked.

        Args:
            ids_B2: (B, 2) int64, the ids from :class:`prune_stream`; best left on the CPU.
            losses_BR: (B, R) losses, R = 1 or 2, of any function of :mod:`thresher.dynamic.loss`.

        Raises:
            UsageError: Ids or losses have another shape or type.
        """
        import torch

        from thresher.dynamic.loss import reduce

        self._in_force()
        ids, shape = as_array(ids_B2), tuple(losses_BR.shape)
        if ids.ndim != 2 or ids.shape[1] != 2 or ids.dtype != np.int64 or not len(ids):
            raise UsageError(f"ids of shape {ids.shape} and type {ids.dtype}; give (B, 2) int64, {ID} of the samples")
        before = self._own[0][1].shape[1] if self._own else self._known[0][1].shape[1] if self._known else 0
        if shape not in ((len(ids), 1), (len(ids), 2)) or before not in (0, shape[1]):
            raise UsageError(
                f"losses of shape {shape}; give ({len(ids)}, 1) or ({len(ids)}, 2), the same for the whole epoch"
            )
        weights_B = self.weights(ids)
        weights = None if weights_B is None else torch.from_numpy(weights_B).to(losses_BR.device, non_blocking=True)
        self._own.append((ids.copy(), losses_BR.detach().to(torch.float32, copy=True)))
        self.step += 1
        if self.step == self._steps:
            self.end_epoch()
        return reduce(losses_BR, weights)

    def end_epoch(self) -> None:
        """End the epoch early, on all ranks together: record the losses, plan the next epoch and publish the plan.

        The last step of an epoch calls this automatically.
        """
        plan, batches = self._in_force(), self._gathered()
        ids_M2 = np.concatenate([ids for ids, _ in batches]) if batches else np.empty((0, 2), np.int64)
        known, kept = len(self.hashes_N), self._kept(plan)
        at_M, hit_M = _look_up(self.hashes_N, self.checks_N, ids_M2)
        if not hit_M.all() and self._enter(ids_M2[~hit_M]):
            at_M, hit_M = _look_up(self.hashes_N, self.checks_N, ids_M2)
        came_N = np.zeros(len(self.hashes_N), np.bool_)
        came_N[at_M[hit_M]] = True
        edges = np.cumsum([0, *(len(ids) for ids, _ in batches)])
        mine = [slice(lo, hi) for lo, hi in zip(edges, edges[1:], strict=False)]
        in_rows = [(at_M[s][hit_M[s]], losses[hit_M[s]]) for s, (_, losses) in zip(mine, batches, strict=True)]
        ledger = self.policy.ledger(1) if self.ledger is None else self.ledger
        recorded = record_epoch(self.policy, ledger, self._in_force(), in_rows, self._rng)
        recorded |= {
            "samples": len(ids_M2),
            "again": int(np.count_nonzero(hit_M) - np.count_nonzero(came_N)),
            "new": len(self.hashes_N) - known,
            "collisions": int(np.count_nonzero(~hit_M)),
        }
        if ledger.references_N is not None:
            recorded["without_reference"] = int(np.count_nonzero(np.isnan(ledger.references_N)))
        shares = [*(entry["rows"] / entry["total"] for entry in self._log), kept[0] / kept[1]]
        self._next(plan, *kept, 1 - math.fsum(shares) / len(shares), recorded)

    def log(self) -> list[dict[str, Any]]:
        """Return one entry per finished epoch, of plain values that can be written as JSON.

        As :meth:`PruningSampler.log`, but ``rows`` were kept of the ``total`` known when the epoch began (of
        ``samples`` in the first). In addition ``new`` is the number of rows first seen, ``again`` that of samples seen
        before in the same epoch, and ``collisions`` that of samples whose key has the hash of another key: they are
        trained on, but never pruned or recorded. For a policy with references ``without_reference`` is the number of
        rows that have none.
        """
        return super().log()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, at any step of an epoch: CPU tensors and text, for ``torch.save`` or ``numpy.savez``.

        All ranks must call it; each gets the same, complete state, so save it on one.
        """
        batches = self._gathered()
        arrays: dict[str, npt.NDArray[Any]] = {
            "hashes": self.hashes_N.copy(),
            "checks": self.checks_N.copy().view(np.int32),  # some versions of torch have no uint32
            "sizes": np.array([len(ids) for ids, _ in batches], np.int64),
            "ids": np.concatenate([ids for ids, _ in batches]) if batches else np.empty((0, 2), np.int64),
            "losses": np.concatenate([part for _, part in batches]) if batches else np.empty((0, 1), np.float32),
        }
        numbers = [*self._same().values(), self.epoch, self.step, self._steps_before]
        return self._state(numbers, arrays, self.ledger, self.plan)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`, on any number of ranks; every rank loads the same state.

        From the end of an epoch, the plan and the ledger are those of an uninterrupted run with the same batches. In
        the middle of an epoch the plan and the record are restored too, but the stream starts from the beginning.
        Samples already trained on in the epoch are skipped, unless the plan repeats samples.

        ``epochs`` may differ, but the current epoch keeps its plan.

        Raises:
            UsageError: The state has another policy, batch size, seed or number of samples, or this run is too short
                for it.
        """
        loaded = self._loaded(state, {"hashes", "checks", "sizes", "ids", "losses"}, self._same(), more=3)
        epoch, step, steps_before = loaded.numbers
        arrays = loaded.arrays
        refuse_shorter(epoch + bool(step), self.epochs, "epochs")
        hashes_N, checks_N = arrays["hashes"].copy(), arrays["checks"].copy().view(np.uint32)
        if self.references is not None and loaded.ledger is not None:
            check_references(self.references.of_ids(hashes_N, checks_N), loaded.ledger)
        self.ledger, self._log = loaded.ledger, loaded.log
        self.hashes_N, self.checks_N = hashes_N, checks_N
        self._steps_before, self._progress_before = steps_before, loaded.progress
        edges = np.cumsum([0, *arrays["sizes"].tolist()])
        ids, losses = arrays["ids"].copy(), arrays["losses"].copy()
        known = [(ids[lo:hi], losses[lo:hi]) for lo, hi in zip(edges, edges[1:], strict=False)]
        self._begin(epoch, loaded.plan, known if step else None)

    def _same(self) -> dict[str, int]:
        """Return the values that must be equal in a state, by name."""
        return {"batch_size": self.batch_size, "samples": self.samples, "seed": self.seed}

    def _share_done(self) -> float:
        return self.step / (self._steps + self._later)

    def _steps_later(self) -> int:
        return self._later

    def _length(self) -> str:
        return f"{self.epochs} epochs"

    def rows_of(self, keys: Iterable[str]) -> Ints:
        """Return the rows of these keys in the ledger, (M,) int64; -1 for keys never seen."""
        at_M, hit_M = _look_up(self.hashes_N, self.checks_N, ids_of(keys))
        return np.where(hit_M, at_M, -1)

    def _begin(self, epoch: int, plan: Plan | None = None, known: list[tuple[Ints, Losses]] | None = None) -> None:
        """Start an epoch, with this plan or with a new one."""
        self.epoch, self.step, self._steps, self._later = epoch, len(known or ()), 0, 0
        self._own, self._known, self.plan = [], known or [], None
        if epoch >= self.epochs:
            return
        self.plan = self._planned(epoch) if plan is None else plan
        kept, total = self._kept(self.plan)
        if not kept:
            raise UsageError(f"the plan of epoch {epoch} keeps none of {counted(total, 'row')}; prune less")
        self._steps = self._cut(kept / total)
        self._later = sum(self._cut(1 - self.policy.forecast(later)) for later in range(epoch + 1, self.epochs))
        self._publish(np.concatenate([ids for ids, _ in known]) if known else np.empty((0, 2), np.int64))

    def _planned(self, epoch: int) -> Plan:
        rng = self._rng("plan", epoch)
        if self.ledger is not None:
            return self.policy.plan(self.ledger, epoch, rng)
        # No row is known, so all are kept; the policy still gives the phase, and whether candidates are collected.
        like = self.policy.plan(self.policy.ledger(1), epoch, rng)
        return Plan(epoch=epoch, phase=like.phase, total=1, collects=like.collects)

    def _kept(self, plan: Plan) -> tuple[int, int]:
        """Return how many samples are kept, and of how many."""
        if isinstance(self.policy, StaticKeys):
            return len(self.policy), self.policy.total
        return (self.samples, self.samples) if self.ledger is None else (len(plan), plan.total)

    def _cut(self, share: float) -> int:
        """Return the number of batches of an epoch with this share of the samples, rounded down, at least 1."""
        return max(1, whole(share * self.samples / self.batch_size))

    def _enter(self, ids_M2: Ints) -> bool:
        """Add rows for keys with new hashes to the ledger and the current plan; return whether there were any."""
        plan = self._in_force()
        hashes, first = np.unique(ids_M2[:, 0], return_index=True)
        new = ~np.isin(hashes, self.hashes_N, assume_unique=True)
        if not new.any():
            return False
        before = len(self.hashes_N)
        all_hashes = np.concatenate([self.hashes_N, hashes[new]])
        all_checks = np.concatenate([self.checks_N, ids_M2[first[new], 1].astype(np.uint32)])
        order = np.argsort(all_hashes, kind="stable")
        self.hashes_N, self.checks_N = all_hashes[order], all_checks[order]
        at = np.flatnonzero(order < before)  # the old rows keep their order among themselves
        rows = len(order)
        self.ledger = self.policy.ledger(rows) if self.ledger is None else self.ledger.grown(rows, at)
        if self.references is not None:
            self.ledger.references_N = self.references.of_ids(self.hashes_N, self.checks_N)
        kept, weights = None, None
        if plan.kept_N is not None:
            kept = np.ones(rows, np.bool_)
            kept[at] = plan.kept_N
        if plan.weights_N is not None:
            weights = np.ones(rows, np.float32)
            weights[at] = plan.weights_N
        self.plan = dataclasses.replace(plan, total=rows, kept_N=kept, weights_N=weights)
        return True

    def _publish(self, seen_M2: Ints) -> None:
        """Write the current plan for the reading processes; samples seen in this epoch are skipped."""
        plan, others = self._in_force(), 1
        ids, times = np.empty((0, 2), np.int64), np.empty(0, np.uint16)
        if isinstance(self.policy, StaticKeys):
            ids, others = self.policy.ids_M, 0
            times = np.ones(len(ids), np.uint16) if self.policy.weigh else self.policy.times_M
        elif plan.kept_N is not None:
            left = ~plan.kept_N
            ids = np.stack([self.hashes_N[left], self.checks_N[left].astype(np.int64)], axis=1)
            times = np.zeros(len(ids), np.uint16)
        if len(seen_M2) and (times <= 1).all():
            ids = np.concatenate([seen_M2, ids])
            hashes, at = np.unique(ids[:, 0], return_index=True)  # keeps the first of equals, the one that was seen
            times = np.concatenate([np.zeros(len(seen_M2), np.uint16), times])[at]
            ids = np.stack([hashes, ids[at, 1]], axis=1)
        version = int(self._now[0]) + 1
        _Table.write(self.folder, version, ids, times)
        self._now[1] = others
        self._now[0] = version
        shutil.rmtree(self.folder / str(version - 2), ignore_errors=True)  # a process may still open the previous one

    def _gathered(self) -> list[tuple[Ints, Losses]]:
        """Return the global batches of the epoch so far; gathers new ones."""
        import torch

        own, self._own = self._own, []
        ranks = rank_and_world_size()[1]
        if not own:
            return self._known
        if ranks == 1:
            self._known += [(ids, losses.cpu().numpy()) for ids, losses in own]
            return self._known
        losses, device = torch.cat([losses for _, losses in own]), own[0][1].device
        sizes = torch.tensor([len(ids) for ids, _ in own], device=device)
        ids = torch.from_numpy(np.concatenate([ids for ids, _ in own])).to(device)
        here = torch.tensor([self.epoch, self.step, len(own), losses.shape[1], len(losses)], device=device)
        there = torch.stack(all_gather(here)).cpu().numpy()
        if (there[:, :4] != there[0, :4]).any():
            raise UsageError(
                f"the ranks are at epoch, step {there[:, :2].tolist()}; give all the same batches and arguments"
            )
        pad = int(there[:, 4].max()) - len(losses)
        parts = zip(
            all_gather(sizes),
            all_gather(torch.nn.functional.pad(ids, (0, 0, 0, pad))),
            all_gather(torch.nn.functional.pad(losses, (0, 0, 0, pad))),
            strict=True,
        )
        of_ranks = []
        for of_sizes, of_ids, of_losses in parts:
            cuts = np.cumsum(of_sizes.cpu().numpy())
            whole_ids, whole_losses = of_ids.cpu().numpy()[: cuts[-1]], of_losses.cpu().numpy()[: cuts[-1]]
            of_ranks.append((np.split(whole_ids, cuts[:-1]), np.split(whole_losses, cuts[:-1])))
        for step in range(len(own)):
            batch = [(of_ids[step], of_losses[step]) for of_ids, of_losses in of_ranks]
            self._known.append((np.concatenate([b[0] for b in batch]), np.concatenate([b[1] for b in batch])))
        return self._known


class _Table:
    """A plan for the reading processes: how often listed samples are used, and how often all others."""

    def __init__(self, hashes_M: Ints, checks_M: Checks, times_M: npt.NDArray[np.uint16], others: int) -> None:
        self.hashes_M, self.checks_M, self.times_M, self.others = hashes_M, checks_M, times_M, others

    def find(self, id_2: Ints) -> int | None:
        """Return how often to use the sample with this id; None if it is not listed."""
        at = int(self.hashes_M.searchsorted(id_2[0]))
        if at == len(self.hashes_M) or self.hashes_M[at] != id_2[0] or self.checks_M[at] != id_2[1]:
            return None
        return int(self.times_M[at])

    @staticmethod
    def write(folder: Path, version: int, ids_M2: Ints, times_M: npt.NDArray[np.uint16]) -> None:
        """Write version ``version`` atomically."""
        hidden = folder / f"{version}.part"
        hidden.mkdir()
        np.save(hidden / "hashes.npy", np.ascontiguousarray(ids_M2[:, 0]))
        np.save(hidden / "checks.npy", ids_M2[:, 1].astype(np.uint32))
        np.save(hidden / "times.npy", times_M)
        hidden.rename(folder / str(version))

    @classmethod
    def in_force(cls, folder: Path, now: npt.NDArray[np.int64]) -> tuple[int, _Table]:
        """Return the number of the current version, and its table."""
        while True:
            version = int(now[0])
            try:
                parts = [
                    np.asarray(np.load(folder / str(version) / name, mmap_mode="r", allow_pickle=False))
                    for name in ("hashes.npy", "checks.npy", "times.npy")
                ]
            except FileNotFoundError:
                if version == int(now[0]):
                    raise
                continue  # two newer versions were written while it was opened
            return version, cls(parts[0], parts[1], parts[2], int(now[1]))


def _counted(records_M: npt.NDArray[Any], often_M: npt.NDArray[np.int32] | None) -> tuple[Ints, npt.NDArray[Any]]:
    """Return the different ids, (N, 2) int64 ascending, and the sum of the counts of each, (N,) integers."""
    hashes_M = np.ascontiguousarray(records_M["hash"])
    order_M = np.argsort(hashes_M)
    ids_M2 = np.empty((len(order_M), 2), np.int64)
    for lo in range(0, len(order_M), BATCH):
        at = order_M[lo : lo + BATCH]
        ids_M2[lo : lo + BATCH, 0], ids_M2[lo : lo + BATCH, 1] = hashes_M[at], records_M["check"][at]
    again_M = ids_M2[1:, 0] == ids_M2[:-1, 0]
    if (again_M & (ids_M2[1:, 1] != ids_M2[:-1, 1])).any():  # two keys with one hash: their ids may alternate
        order_M = np.lexsort((records_M["check"], hashes_M))
        ids_M2 = np.stack([hashes_M[order_M], records_M["check"][order_M]], axis=1, dtype=np.int64)
        again_M = (ids_M2[1:] == ids_M2[:-1]).all(axis=1)
    if not again_M.any():
        return ids_M2, np.ones(len(order_M), np.uint16) if often_M is None else often_M[order_M]
    begins_N = np.flatnonzero(np.concatenate([[True], ~again_M]))
    if often_M is None:
        return ids_M2[begins_N], np.diff(begins_N, append=len(order_M))
    return ids_M2[begins_N], np.add.reduceat(often_M[order_M], begins_N, dtype=np.int64)


def _look_up(hashes_N: Ints, checks_N: npt.NDArray[Any], ids_M2: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return the positions of ids among ascending hashes, and whether each is there."""
    if not len(hashes_N):
        return np.zeros(len(ids_M2), np.int64), np.zeros(len(ids_M2), np.bool_)
    at_M = np.minimum(np.searchsorted(hashes_N, ids_M2[:, 0]), len(hashes_N) - 1)
    return at_M, (hashes_N[at_M] == ids_M2[:, 0]) & (checks_N[at_M] == ids_M2[:, 1])


def _remove(held: Scratch, owner: int) -> None:
    """Remove the folder of a deleted pruner; a copy in a forked worker must not remove it."""
    if os.getpid() == owner:
        held.remove()
