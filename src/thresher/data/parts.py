"""Parts: consecutive samples that are read independently, and the operations of embedding, checking and resharding.

A reader of raw data creates parts. A part only has to yield samples; all other methods have a default based on them.
Override these if a format can do better, for example without reading images.

Shape letters: n samples of a part, c some of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from thresher.errors import ChangedError, PoolError, UnreachedError
from thresher.io.listing import named
from thresher.io.open import file_stamp
from thresher.io.remote import in_parallel
from thresher.runtime.format import counted

if TYPE_CHECKING:
    from thresher.data.samples import Sample
    from thresher.io.tar import Headers

Ints = npt.NDArray[np.int64]
Form = Literal["webdataset", "parquet", "csv"]
P = TypeVar("P", bound="Part")
_ROWS = 64  # in memory at a time: an image may have megabytes


@dataclass(frozen=True, eq=False)
class Scanned:
    """The samples of a part, n of them, without their images.

    Attributes:
        keys: Key of each sample.
        start_n: Start of each sample, ascending: a byte offset in a tar or CSV file, else a row.
        length_n: Length in bytes, else 1; negative if other data is in between.
        at_n: :attr:`thresher.data.Sample.at` of each sample, if it differs from ``start_n``: a row of a CSV file.
        uids: uid of each sample; None if they were not requested, or there are none.
        skipped: (key, why) of samples that cannot be copied.
        damage: Why the part was not read to its end, "" if it was.
        headers: Returns the headers of some samples of a tar, by index; None for other formats.
        endings: Yields the file extensions of the members of some samples of a tar, in lower case, by index; None for
            other formats.
        notes: Returns :attr:`thresher.data.Sample.notes` of a sample, by its index and the extensions of its members;
            None if they are not known yet.
        names: Names of the samples in their file, if they differ from their keys.
        said: What the user should know about how they were found, as a sentence; "" for nothing.
        by_index: Whether an index says which samples there are; other samples, whose headers were not read, may have
            other names than it says.
    """

    keys: Sequence[str]
    start_n: Ints
    length_n: Ints
    at_n: Ints | None = None
    uids: Sequence[str] | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    damage: str = ""
    headers: Callable[[Ints], Headers] | None = None
    endings: Callable[[Ints], Iterator[tuple[str, ...]]] | None = None
    notes: Callable[[int, tuple[str, ...]], tuple[str, ...]] | None = None
    names: Sequence[str] | None = None
    said: str = ""
    by_index: bool = False


class Words(NamedTuple):
    """Keys and captions of consecutive samples.

    Attributes:
        keys: Keys of the samples that have one.
        texts: Captions, one per sample, "" for none.
        uids: Number of samples with a uid.
    """

    keys: Sequence[str]
    texts: Sequence[str]
    uids: int


@dataclass(frozen=True)
class Part(ABC):
    """Consecutive samples that are read together: a tar, or rows of a table, a list or a folder. Picklable.

    Attributes:
        path: The file or folder.
        protocol: fsspec protocol of its file system.
        first: ``Sample.at`` of its first sample; 0 if the part is the whole file.
        rows: Number of samples; None if that is known only after reading it.
    """

    path: str
    protocol: str = "file"
    first: int = 0
    rows: int | None = None

    unit: ClassVar[str] = "file"
    """Name of one of its files: "tar", "picture"."""
    pictures_apart: ClassVar[bool] = False
    """Whether images are separate files, so that their paths are worth keeping."""
    copied_as: ClassVar[Form | None] = None
    """The format to which resharding copies stored data unchanged; None if it must convert samples."""
    scanning_is_slow: ClassVar[bool] = False
    """Whether :meth:`scan` of a local file is CPU-bound in Python, so that threads do not help."""

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Yield the samples in order, including those without an image.

        Raises:
            PoolError: The file is damaged; raised after the samples before the damage.
        """

    @property
    def has_uids(self) -> bool:
        """Whether its samples may have DataComp uids."""
        return True

    @property
    def key_column(self) -> str | None:
        """The column of :meth:`schema` with the keys; None if the key is the row number."""
        return "key"

    def stamp(self) -> list[Any]:
        """Return a value that changes whenever the samples may have changed: by default file size and time.

        Raises:
            PoolError: The file no longer exists.
        """
        return file_stamp(self.protocol, self.path)

    # --- some of the samples ---

    def slice(self: P, first: int, rows: int) -> P:
        """Return the part with ``rows`` samples from ``first`` on; only called for parts that have :meth:`words`."""
        return replace(self, first=first, rows=rows)

    def scan(self, *, uids: bool = False) -> Scanned:
        """Return the keys and positions of the samples; damage is recorded, not raised.

        Args:
            uids: Whether to return uids.
        """
        keys, at, found_uids, damage = list[str](), list[int](), list[str](), ""
        try:
            for sample in self.samples():
                keys.append(sample.key)
                at.append(sample.at)
                found_uids.append(sample.uid)
        except PoolError as error:
            damage = str(error).removeprefix(f"{self.path}: ")
        return Scanned(
            keys=keys,
            start_n=np.array(at, np.int64),
            length_n=np.ones(len(at), np.int64),
            uids=found_uids if uids and self.has_uids else None,
            damage=damage,
        )

    def scan_at(self, at_c: Ints) -> Scanned:
        """Return the keys and positions of the samples with some values of ``Sample.at``, ascending.

        Raises:
            PoolError: There is no sample at a position.
        """
        scanned = self.scan()
        at_n = scanned.start_n if scanned.at_n is None else scanned.at_n
        where_c = np.searchsorted(at_n, at_c)
        if not len(at_n) or (at_n[np.minimum(where_c, len(at_n) - 1)] != at_c).any():
            raise PoolError(f"{self.path}: has no sample at a requested position")
        return Scanned([scanned.keys[i] for i in where_c.tolist()], scanned.start_n[where_c], scanned.length_n[where_c])

    def chosen(self, start_c: Ints) -> Iterator[Sample]:
        """Yield some samples with their images.

        Args:
            start_c: Their starts from :meth:`scan`; ascending, each once.

        Raises:
            PoolError: The file is damaged.
            ChangedError: There is no sample at a position.
        """
        wanted = set(start_c.tolist())
        matches = (sample for sample in self.samples() if sample.at in wanted)
        count = 0
        for sample in islice(matches, len(wanted)):
            count += 1
            yield sample
        if count < len(wanted):
            raise ChangedError(f"{self.path}: has fewer samples than before; run the command again")

    def separate_files(self, start_c: Ints) -> Iterator[Sequence[str]]:
        """Yield the local files, besides that of the part, that each of some samples may be read from: image, caption.

        Args:
            start_c: Starts of the samples from :meth:`scan`; ascending, each once.
        """
        yield from (() for _ in start_c)

    # --- as a table ---

    def schema(self) -> Any:
        """Return the Arrow schema of :meth:`batches`: by default image, text, key, and :meth:`light`."""
        import pyarrow as pa

        picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        own = {"image": picture, "text": pa.string(), "key": pa.string()}
        return pa.schema([*own.items(), *((name, kind) for name, kind in self.light().items() if name not in own)])

    def light(self) -> Mapping[str, Any]:
        """Return the names and Arrow types of ``Sample.columns``: extra numbers and texts that are kept."""
        return {}

    def batches(self, columns: Sequence[str] | None, start_c: Ints, size: int = _ROWS) -> Iterator[Any]:
        """Yield some samples as Arrow record batches; a missing image is null.

        Args:
            columns: Columns of :meth:`schema`; None for all.
            start_c: Starts of the samples from :meth:`scan`; ascending, repeats are allowed.
            size: Maximum rows of a batch.

        Raises:
            PoolError: The file is damaged, or there is no sample at a position.
        """
        import pyarrow as pa

        from thresher.io.pictures import kind_of

        schema = self.schema() if columns is None else pa.schema([self.schema().field(name) for name in columns])
        different, times = np.unique(start_c, return_counts=True)
        samples = iter(zip(self.chosen(different), times.tolist(), strict=True))
        while some := list(islice(samples, size)):
            rows: list[dict[str, Any]] = []
            for sample, often in some:
                try:
                    data = sample.stored()
                    picture = {"bytes": data, "path": f"{sample.key}.{kind_of(data)}"}
                except PoolError:
                    picture = None
                row = {"image": picture, "text": sample.text, "key": sample.key}
                rows += [{**sample.columns, **row}] * often
            whole = pa.RecordBatch.from_pylist(rows, schema)
            yield from (whole.slice(lo, size) for lo in range(0, len(whole), size))

    # --- for inspection ---

    def words(self) -> Iterator[Words] | None:
        """Return keys and captions without reading images; None if :meth:`samples` does not read images either."""
        return None

    def roles(self) -> Mapping[str, str | None]:
        """Return the columns of image ("picture"), caption, key and uid; {} if there are no columns."""
        return {}

    def members(self) -> Iterator[Sequence[str]]:
        """Yield the file extensions of the members of each sample; nothing if samples are not made of files."""
        return iter(())

    def cut_off(self) -> str:
        """Return what is wrong with the end of the file, "" if nothing, without reading all of it."""
        return ""

    def lacks_end(self) -> bool:
        """Return whether the file does not have the end mark of its format, and so may be cut off between samples.

        Some programs leave the mark out, so samples are read all the same. Only the last bytes are read.
        """
        return False


@dataclass(frozen=True)
class Data:
    """Raw data at a location.

    Attributes:
        location: The location as the user wrote it.
        kind: Name of the reader: "webdataset", "parquet", "arrow", "csv", "jsonl", "folder".
        parts: The parts, in the order of the samples.
        notes: What the user should know, as sentences: files that are not read, and choices that were made.
        versions: Location of a dataset that keeps its versions -> the version that was opened; {} for other data.
    """

    location: str
    kind: str
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()
    versions: Mapping[str, int] = field(default_factory=dict)

    def captions_elsewhere(self) -> str:
        """Return where captions may be if no sample has one at a usual place, and what to type; "" for nowhere."""
        return ""

    @property
    def columns(self) -> Mapping[str, Any]:
        """Extra columns of every sample, and their Arrow types."""
        return self.parts[0].light() if self.parts else {}

    def samples(self) -> Iterator[Sample]:
        """Yield all samples, one part after another."""
        for part in self.parts:
            yield from part.samples()

    def without_end(self) -> tuple[str, ...]:
        """Return a note about files that may be cut off between samples, see :meth:`Part.lacks_end`; () for none."""
        if not self.parts:
            return ()
        parts = {part.path: part for part in self.parts}
        found = in_parallel(self.parts[0].protocol, _lacks_end, parts.values())
        lacking = [path for path, lacks in zip(parts, found, strict=True) if lacks]
        if not lacking:
            return ()
        unit = self.parts[0].unit
        files = counted(len(lacking), f"{unit} does", f"{unit}s do")
        return (f"{files} not have the end mark of the format and may be cut off: {named(lacking)}",)


def _lacks_end(part: Part) -> bool:
    try:
        return part.lacks_end()
    except (PoolError, UnreachedError):  # reported when the samples are read
        return False
