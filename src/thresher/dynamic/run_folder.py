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
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thresher.dynamic.ledger import Ledger
from thresher.errors import PoolError, UsageError
from thresher.pool.store import EmbeddingStore, absolute, open_store
from thresher.runtime.files import DAMAGED, writing

MARK, LOG, LEDGER, ROWS, CHECKPOINT = "training.json", "log.jsonl", "ledger.npz", "rows.parquet", "checkpoint.pt"
FILES = (MARK, LOG, LEDGER, ROWS, CHECKPOINT)
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training run, as recorded in its folder.

    Attributes:
        folder: The folder.
        task: "clip" or "moco".
        data: The training data, as given by the user.
        pool: The pool of the N rows: the data, or the run's own ``rows.parquet``.
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
        path = Path(folder)
        try:
            meta = json.loads((path / MARK).read_text(encoding="utf-8"))
            if meta.pop("format") != FORMAT:
                raise PoolError(
                    f"{path}: {MARK} is not in format {FORMAT}, the only one that this version of thresher reads"
                )
            training = cls(folder=path, **meta)
            texts = (training.task, training.data, training.pool, training.store, training.policy, training.version)
            if _whole(training.rows) is None or training.rows < 1 or not isinstance(training.settings, dict):
                raise ValueError("rows is not a number, or settings is not an object")
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("a value is not text")
        except (FileNotFoundError, NotADirectoryError):
            raise PoolError(f"{path}: not the folder of a training run ({MARK} is missing)") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PoolError(f"{path / MARK}: cannot be read, it may be damaged ({error})") from None
        return training

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
            return "" if len(log) >= epochs else f"{len(log):,} of {epochs:,} epochs"
        if samples is None:
            return ""
        # The last samples may not fill a batch.
        seen, batch = sum(int(entry["samples"]) for entry in log), _whole(self.settings.get("batch_size")) or 1
        return "" if seen > samples - batch else f"{seen:,} of {samples:,} samples"

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
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for entry in entries:
                if not isinstance(entry, dict) or not {"epoch", "rows", "total"} <= set(entry):
                    raise ValueError("an entry lacks epoch, rows or total")
            return entries
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise PoolError(f"{path}: cannot be read, it may be damaged ({error})") from None

    def ledger(self) -> Ledger:
        """Return the ledger at the end of the last finished epoch.

        Raises:
            PoolError: No epoch is finished, or the file is damaged.
        """
        path = self.folder / LEDGER
        try:
            # Opened here because NumPy does not close a file that is not an archive.
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                ledger = Ledger.from_state({name: file[name] for name in file.files})
        except FileNotFoundError:
            raise PoolError(f"{path}: no such file; the run has not finished an epoch") from None
        except (OSError, KeyError, UsageError, zipfile.BadZipFile, *DAMAGED) as error:
            raise PoolError(f"{path}: cannot be read, it may be damaged ({error})") from None
        if len(ledger) != self.rows:
            raise PoolError(f"{path}: has {len(ledger):,} rows, but the run had {self.rows:,}")
        return ledger

    def record(self, log: Sequence[Mapping[str, Any]], ledger: Ledger) -> None:
        """Write log and ledger at the end of an epoch, each atomically."""
        _write(self.folder / LOG, "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in log))
        with writing(self.folder / LEDGER) as scratch, open(scratch, "wb") as file:
            np.savez(file, **ledger.state())  # type: ignore[arg-type]

    def open_pool(self, pool: str | None = None) -> EmbeddingStore:
        """Open the pool of the run.

        Args:
            pool: Its current location, if it was moved.

        Raises:
            PoolError: The pool is missing, or it is another one.
        """
        where = pool or self.location
        try:
            store = open_store(where)
        except PoolError as error:
            raise type(error)(f"{error}; if the pool was moved, give its location with --pool") from None
        if (store.total, store.fingerprint()) != (self.rows, self.store):
            raise PoolError(
                f"{where}: is not the pool of {self.rows:,} rows that {self.folder} was trained on; "
                "give the location of that pool with --pool"
            )
        return store


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _write(path: Path, text: str) -> None:
    with writing(path) as scratch:
        Path(scratch).write_text(text, encoding="utf-8")
