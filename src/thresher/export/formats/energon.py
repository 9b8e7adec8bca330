"""A split of a dataset of Megatron Energon: its tars stay as they are, and dropped samples are excluded by key."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thresher.errors import UsageError
from thresher.export.registry import Written
from thresher.export.table import batches
from thresher.io.paths import is_unsafe, visible
from thresher.pool.store import EmbeddingStore
from thresher.selection import Selection

_SPECIAL = re.compile(r"([\\{}])")  # what braceexpand, with which Energon reads names, does not take literally


@dataclass(frozen=True, kw_only=True)
class Energon:
    """The split config of a prepared dataset of Megatron Energon, for ``split_config="subset.yaml"``.

    The file is YAML with a line for each row of the pool: an entry of ``exclude`` for a dropped one, a comment for a
    kept one. Tars without a kept row are not part of the split.
    """

    name: ClassVar[str] = "energon"

    split: str = field(default="train", metadata={"help": "name of the split part"})
    folder: str = field(
        default="", metadata={"help": "folder of the tars in the dataset of Energon (default: the dataset itself)"}
    )
    shard_column: str = field(
        default="shard", metadata={"metavar": "COLUMN", "help": "column with the tar of each row, as embed writes it"}
    )

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write the split; kept rows without the name of a tar are missing.

        Raises:
            UsageError: The pool has no column of tars, or one of other files, the selection repeats rows, or a row that
                is to be excluded has no key.
        """
        if selection.repeats is not None:
            raise UsageError("this selection repeats rows, which a split of Energon cannot do; use thresher reshard")
        if self.shard_column not in store.columns:
            raise UsageError(
                "the split of Energon needs the tar of each row, as thresher embed writes it; "
                f"{store.layout.location} has no column {self.shard_column!r}, but {', '.join(store.columns) or 'none'}"
            )
        shards: dict[str, str] = {}  # tars, and the shards they are from
        tars: dict[str, None] = {}  # with a kept row
        missing: list[tuple[int, str]] = []
        for row, key, kept, shard, tar in self._rows(selection, store):
            if tar and shards.setdefault(tar, shard) != shard:
                raise UsageError(
                    f"{visible(shards[tar])} and {visible(shard)} would both be {visible(tar)} in the dataset of "
                    "Energon; export each folder of tars from a pool of its own"
                )
            if kept and tar:
                tars[tar] = None
            elif kept:
                missing.append((row, key))
        if missing and not tars:
            raise UsageError("no selected row has the name of a tar in 'shard', so the split would be empty")
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            names = ", ".join(map(_quoted, tars))
            file.write(f"{{split_parts: {{{_quoted(self.split)}: [{names}]}}, exclude: [\n")
            for row, key, kept, _, tar in self._rows(selection, store):
                if not key and not kept and tar in tars:
                    raise UsageError(
                        f"row {row:,} has no key, so it cannot be excluded from {visible(tar)}; use thresher reshard"
                    )
                file.write(f"{'# kept: ' if kept else '' if tar in tars else '# tar: '}{_quoted(f'{tar}/{key}')},\n")
            file.write("]}\n")
        return Written(selection.total - len(missing), tuple(missing))

    def _rows(self, selection: Selection, store: EmbeddingStore) -> Iterator[tuple[int, str, bool, str, str]]:
        """Yield row, key, whether it is kept, its shard, and the name of its tar, "" if that is missing or unsafe."""
        for part in batches(selection, store, ["row", "key", "kept", self.shard_column]):
            rows, keys, kept, shards = (column.to_pylist() for column in part.columns)
            for row, key, one, shard in zip(rows, keys, kept, shards, strict=True):
                shard = "" if shard is None else str(shard)
                name = posixpath.join(self.folder, posixpath.basename(shard))
                if posixpath.splitext(shard)[1].lower() not in ("", ".tar") and not is_unsafe(name):
                    raise UsageError(
                        f"row {row:,} is in {visible(shard, 120)}, and Energon reads only tars; write some with: "
                        "thresher reshard DATA SEL -o DIR --as webdataset --for-energon"
                    )
                yield row, key or "", one, shard, "" if not posixpath.basename(shard) or is_unsafe(name) else name


def _quoted(text: Any) -> str:
    """Return a name as Energon reads it from YAML: in quotes, with escapes for braces and hidden characters."""
    return '"' + "".join(map(_character, _SPECIAL.sub(r"\\\1", text))) + '"'


def _character(one: str) -> str:
    if one in '"\\':
        return f"\\{one}"
    if one.isprintable():
        return one
    return f"\\u{ord(one):04x}" if ord(one) < 0x10000 else f"\\U{ord(one):08x}"
