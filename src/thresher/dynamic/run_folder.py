"""The folder of a training run: its settings, the log of its epochs, and the history of every row.

Nothing here needs torch: coreset, report and explain read the folder without it.

    training.json    the settings, the data and the policy
    log.jsonl        one object per finished epoch
    ledger.npz       the arrays of the ledger at the end of the last finished epoch
    rows.parquet     key, caption and location of every row, unless the data are a pool of parquet files
    checkpoint.pt    the state of the run, for --resume; only the trainers read it
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thresher.dynamic.histogram import LOSS_EDGES
from thresher.dynamic.ledger import LAST_EPOCH, MOST_ROWS, Ledger
from thresher.dynamic.loop import as_array
from thresher.errors import PoolError, UsageError
from thresher.io.paths import relative, shortened, visible
from thresher.pool.store import EmbeddingStore, absolute, open_store
from thresher.runtime.files import writing
from thresher.runtime.format import counted
from thresher.runtime.places import expanded, local_path
from thresher.runtime.untrusted import Fields, open_regular, parse_json, read_json, read_npz

MARK, LOG, LEDGER, ROWS, CHECKPOINT = "training.json", "log.jsonl", "ledger.npz", "rows.parquet", "checkpoint.pt"
FILES = (MARK, LOG, LEDGER, ROWS, CHECKPOINT)
FORMAT = 1

_TEXTS = ("task", "data", "pool", "store", "policy", "version")
_LOG_BYTES = 256 * 2**20
_MOST_EVALS = 200
_LEDGER_BYTES = 31  # of a row, with losses in both directions, moments, memory and references


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training run, as recorded in its folder.

    Attributes:
        folder: The folder.
        task: "clip", "moco", "open_clip" or "trainer" (of Hugging Face).
        data: The training data, as given by the user.
        pool: The pool of the N rows: the data, or the run's own ``rows.parquet``; "" for a stream.
        store: Fingerprint of the pool.
        rows: N.
        policy: Name of the policy, as on the command line.
        settings: All settings of the run, by name.
        version: Version of thresher.
    """

    folder: Path
    task: str
    data: str
    pool: str
    store: str
    rows: int
    policy: str
    settings: Mapping[str, Any]
    version: str

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Training:
        """Read the folder of a run.

        Raises:
            PoolError: It is not the folder of a run, or it is damaged.
        """
        path = local_path(folder)
        try:
            head = Fields(read_json(path / MARK), str(path / MARK))
        except (FileNotFoundError, NotADirectoryError):
            why = f"{MARK} is missing" if path.exists() else "nothing is there"
            raise PoolError(
                f"{path}: not the folder of a training run ({why}); give a folder that thresher train wrote"
            ) from None
        except (OSError, ValueError) as error:
            raise PoolError(f"{path / MARK}: cannot be read, it may be damaged ({error})") from None
        if head.whole("format", 0, 10**9) != FORMAT:
            raise PoolError(
                f"{path}: {MARK} is not in format {FORMAT}, the only one that this version of thresher reads"
            )
        head.refuse_others(("format", "rows", "settings", *_TEXTS))
        settings = head.object("settings")
        settings.number("prune", 0, 1)
        for name in ("epochs", "samples", "batch_size"):
            if settings.values.get(name) is not None:
                settings.whole(name, 1)
        if settings.values.get("seed") is not None:
            settings.whole("seed", -(2**200), 2**200)
        texts = {name: head.text(name) for name in _TEXTS}
        return cls(folder=path, rows=head.whole("rows", 1, MOST_ROWS), settings=settings.values, **texts)

    def __repr__(self) -> str:
        """Return the task, the data and the policy in one line."""
        data = shortened(visible(relative(self.data)), 80)
        return f"Training({visible(self.task, 20)} on {data}: {counted(self.rows, 'row')}, {visible(self.policy, 80)})"

    def _repr_html_(self) -> str:
        from thresher.report.notebook import in_notebook, training_html

        return in_notebook(training_html, self)

    @property
    def location(self) -> str:
        """The location of the pool; the run's own ``rows.parquet`` is looked up in its folder, which may be moved."""
        own = self.folder / ROWS
        return absolute(str(own)) if os.path.basename(self.pool) == ROWS and own.exists() else self.pool

    @property
    def seed(self) -> int:
        """The seed of the run, 0 if it has none."""
        return int(_whole(self.settings.get("seed")) or 0)

    @property
    def promised(self) -> float | None:
        """The share of the run's samples that was to be left out (``prune``), or None."""
        share = self.settings.get("prune")
        return float(share) if isinstance(share, (int, float)) and not isinstance(share, bool) else None

    def unfinished(self, log: Sequence[Mapping[str, Any]]) -> str:
        """Return how far an unfinished run is, "3 of 14 epochs"; "" if it is finished, or its length is unknown."""
        epochs, samples = (_whole(self.settings.get(name)) for name in ("epochs", "samples"))
        if epochs is not None:
            return "" if len(log) >= epochs else f"{len(log):,} of {counted(epochs, 'epoch')}"
        if samples is None:
            return ""
        # The last samples may not fill a batch.
        seen, batch = sum(int(entry.get("samples") or 0) for entry in log), _whole(self.settings.get("batch_size")) or 1
        return "" if seen > samples - batch else f"{seen:,} of {counted(samples, 'sample')}"

    def save(self) -> None:
        """Write ``training.json``."""
        meta = {name: value for name, value in vars(self).items() if name != "folder"}
        _write(self.folder / MARK, json.dumps({"format": FORMAT, **meta}, indent=1) + "\n")

    def log(self) -> list[dict[str, Any]]:
        """Return the entries of the finished epochs; [] before the end of the first.

        Each has the fields of :meth:`thresher.dynamic.sampler.PruningSampler.log`, ``seconds`` of training, and,
        if an evaluation followed the epoch, ``eval``.

        Raises:
            PoolError: The file is damaged.
        """
        path = self.folder / LOG
        try:
            with open_regular(path) as file:
                text = file.read(_LOG_BYTES + 1).decode("utf-8")
            if len(text) > _LOG_BYTES or text.count("\n") > LAST_EPOCH + 1:
                raise ValueError(f"it has more than {LAST_EPOCH + 1:,} entries")
            values = [parse_json(line) for line in text.split("\n") if line]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise PoolError(f"{path}: cannot be read, it may be damaged ({error})") from None
        entries = [Fields(value, f"{path}: line {number}") for number, value in enumerate(values, 1)]
        before = -1
        for entry in entries:
            _check_entry(entry, self.rows, before + 1)
            before = entry.whole("epoch")
        return [entry.values for entry in entries]

    def ledger(self) -> Ledger:
        """Return the ledger at the end of the last finished epoch.

        Raises:
            PoolError: No epoch is finished, or the file is damaged.
        """
        path = self.folder / LEDGER
        try:
            ledger = Ledger.from_state(read_npz(path, self.rows * _LEDGER_BYTES + 2**20))
        except FileNotFoundError:
            raise PoolError(f"{path}: no such file; the run has not finished an epoch") from None
        except (OSError, ValueError, UsageError) as error:
            raise PoolError(f"{path}: cannot be read, it may be damaged ({error})") from None
        if len(ledger) != self.rows:
            raise PoolError(f"{path}: has {counted(len(ledger), 'row')}, but the run had {self.rows:,}")
        return ledger

    def record(self, log: Sequence[Mapping[str, Any]], ledger: Ledger) -> None:
        """Write log and ledger at the end of an epoch, each atomically."""
        _write(self.folder / LOG, "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in log))
        with writing(self.folder / LEDGER) as scratch, open(scratch, "wb") as file:
            np.savez(file, **ledger.state())  # type: ignore[arg-type]

    def refuse_stream(self) -> None:
        """Raise UsageError for a run on a stream, whose rows are hashes of keys, so that it has no pool."""
        if not self.pool:
            raise UsageError(
                f"{self.folder}: was trained on a stream, whose rows are hashes of keys; compare, and report with "
                "--without-pool, show its numbers"
            )

    def open_pool(self, pool: str | None = None) -> EmbeddingStore:
        """Open the pool of the run.

        Args:
            pool: Its current location, if it was moved.

        Raises:
            PoolError: The pool is missing, or it is another one.
            UsageError: The run has no pool, because it was trained on a stream.
        """
        self.refuse_stream()
        where = pool or self.location
        try:
            store = open_store(where)
        except PoolError as error:
            raise type(error)(f"{error}; if the pool was moved, give its location with --pool") from None
        if (store.total, store.fingerprint()) != (self.rows, self.store):
            raise PoolError(
                f"{where}: is not the pool of {counted(self.rows, 'row')} that {self.folder} was trained on; "
                "give the location of that pool with --pool"
            )
        return store


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a sampler or a pruner as a ``.npz`` file, atomically."""
    plain: dict[str, Any] = {name: as_array(array) for name, array in state.items()}
    with writing(path) as scratch, open(scratch, "wb") as file:
        np.savez(file, **plain)


def is_run(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder is that of a training run, not a selection."""
    folder = Path(expanded(path))
    return "://" not in os.fspath(path) and (folder / MARK).exists() and not (folder / "selection.json").exists()


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _write(path: Path, text: str) -> None:
    with writing(path) as scratch:
        Path(scratch).write_text(text, encoding="utf-8")


# The fields of a log entry that are numbers, with their limits; those of :meth:`PruningSampler.log` and the trainers.
_COUNTS = ("rows", "total", "samples", "scored", "steps", "not_finite", "redundant", "ill_matched", "candidates")
_MEASURES = {
    "pruned_so_far": (-1e6, 1), "overlap": (0, 1), "seconds": (0, 1e12), "samples_per_second": (0, 1e12),
    "loss": (-1e30, 1e30), "lr": (-1e30, 1e30),
}  # fmt: skip


def _check_entry(entry: Fields, rows: int, first: int) -> None:
    """Check an entry of the log of a run on ``rows`` rows; its epoch is ``first`` or later."""
    entry.whole("epoch", first, LAST_EPOCH)
    entry.whole("total", 1, rows)
    entry.whole("rows", 0, 2**53)
    for name in _COUNTS:
        if entry.values.get(name) is not None:
            entry.whole(name, 0, 2**53)
    for name, (low, high) in _MEASURES.items():
        entry.number(name, low, high)
    if entry.values.get("overlap") is not None:
        entry.whole("candidates", 0, 2**53)
    if "phase" in entry.values:
        entry.text("phase")
    if entry.values.get("histogram") is not None:
        _check_histogram(entry.object("histogram"))
    if entry.values.get("eval") is not None:
        results = entry.object("eval")
        for name in results.values:
            metrics = results.object(name)
            for metric in metrics.values:
                metrics.number(metric)
            if len(results.values) > _MOST_EVALS or len(metrics.values) > _MOST_EVALS:
                raise entry.wrong("eval", f"at most {_MOST_EVALS:,} evaluation sets with as many metrics each")


def _check_histogram(histogram: Fields) -> None:
    """Check that a histogram counts losses in some of the bins of all runs."""
    edges, counts = histogram.numbers("edges", len(LOSS_EDGES)), histogram.numbers("counts", len(LOSS_EDGES) - 1)
    at = int(np.searchsorted(LOSS_EDGES, edges[0])) if edges else 0
    if not counts or edges != LOSS_EDGES[at : at + len(counts) + 1].tolist():
        raise histogram.wrong("edges", "the edges of its bins, as thresher writes them")
    if not all(0 <= count <= 2**53 and count == int(count) for count in counts):
        raise histogram.wrong("counts", "whole numbers")
