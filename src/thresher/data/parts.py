"""Parts: runs of samples that are read apart from each other, and what embedding, checking and resharding ask of them.

A reader of raw data makes parts. One that yields samples is enough; everything else has a default made of these, to be
replaced where a format can answer without reading pictures.

Shape letters: n samples of a part, c some of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError
from thresher.io.open import file_stamp

if TYPE_CHECKING:
    from thresher.data.samples import Sample
    from thresher.io.tar import Headers

Ints = npt.NDArray[np.int64]
Form = Literal["webdataset", "parquet", "csv"]
P = TypeVar("P", bound="Part")
_ROWS = 64  # in memory at a time: a picture may have megabytes


@dataclass(frozen=True, eq=False)
class Scanned:
    """The samples of a part, n of them, without their pictures.

    Attributes:
        keys: Of each.
        start_n: Where each begins, ascending: a byte of a tar or csv, else a row.
        length_n: How many bytes it has, else 1; below 0 where not all of them are its own.
        at_n: What :attr:`thresher.data.Sample.at` says of each, where that is not ``start_n``: a row of a csv.
        uids: Of each; None where they were not asked for, or there are none.
        skipped: (key, why) of samples that cannot be copied.
        damage: Why the part was not read to its end, "" where it was.
        headers: Gives the headers of some of the samples of a tar, by number; None where it is none.
    """

    keys: Sequence[str]
    start_n: Ints
    length_n: Ints
    at_n: Ints | None = None
    uids: Sequence[str] | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    damage: str = ""
    headers: Callable[[Ints], Headers] | None = None


class Words(NamedTuple):
    """Keys and captions of a run of samples.

    Attributes:
        keys: Those there are; samples that go by their number have none.
        texts: Captions, "" for none, one a sample.
        uids: How many samples have a uid.
    """

    keys: Sequence[str]
    texts: Sequence[str]
    uids: int


@dataclass(frozen=True)
class Part(ABC):
    """A run of samples that is read as one: a tar, or rows of a table, a csv or a folder. Parts can be pickled.

    Attributes:
        path: The file or folder it lies in.
        protocol: Of its file system, as fsspec names it.
        first: Where in the file its samples begin, as ``Sample.at`` counts; 0 where the part is the whole file.
        rows: How many samples it has; None where only reading it tells.
    """

    path: str
    protocol: str = "file"
    first: int = 0
    rows: int | None = None

    unit: ClassVar[str] = "file"
    """What one of the files is called: "tar", "picture"."""
    pictures_apart: ClassVar[bool] = False
    """Whether pictures are files of their own, so that their paths are worth keeping."""
    copied_as: ClassVar[Form | None] = None
    """The format that resharding makes by copying what is stored; None where it is made from samples."""
    scanning_is_slow: ClassVar[bool] = False
    """Whether :meth:`scan` of a file on this machine keeps Python busy, so that threads do not help."""

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Yield the samples in order, those without a picture too.

        Raises:
            PoolError: The file is damaged; raised after the samples before the damage.
        """

    @property
    def has_uids(self) -> bool:
        """Whether its samples may have uids of DataComp."""
        return True

    @property
    def key_column(self) -> str | None:
        """The column of :meth:`schema` with the keys; None where rows go by their number."""
        return "key"

    def stamp(self) -> list[Any]:
        """Return what changes whenever its samples may have: by default size and time of the file.

        Raises:
            PoolError: The file is gone.
        """
        return file_stamp(self.protocol, self.path)

    # --- some of the samples ---

    def slice(self: P, first: int, rows: int) -> P:
        """Return the part of ``rows`` samples from ``first`` on; only asked of parts that have :meth:`words`."""
        return replace(self, first=first, rows=rows)

    def scan(self, *, uids: bool = False) -> Scanned:
        """Return the keys and places of the samples; damage is noted, not raised.

        Args:
            uids: Whether uids are wanted.
        """
        keys, at, found, damage = list[str](), list[int](), list[str](), ""
        try:
            for sample in self.samples():
                keys.append(sample.key)
                at.append(sample.at)
                found.append(sample.uid)
        except PoolError as error:
            damage = str(error).removeprefix(f"{self.path}: ")
        return Scanned(
            keys=keys,
            start_n=np.array(at, np.int64),
            length_n=np.ones(len(at), np.int64),
            uids=found if uids and self.has_uids else None,
            damage=damage,
        )

    def scan_at(self, at_c: Ints) -> Scanned:
        """Return the keys and places of some samples, by what ``Sample.at`` says of them, ascending.

        Raises:
            PoolError: No sample begins there.
        """
        found = self.scan()
        at_n = found.start_n if found.at_n is None else found.at_n
        where_c = np.searchsorted(at_n, at_c)
        if not len(at_n) or (at_n[np.minimum(where_c, len(at_n) - 1)] != at_c).any():
            raise PoolError(f"{self.path}: has no sample there")
        return Scanned([found.keys[i] for i in where_c.tolist()], found.start_n[where_c], found.length_n[where_c])

    def chosen(self, start_c: Ints) -> Iterator[Sample]:
        """Yield some samples with their pictures.

        Args:
            start_c: Where they begin, as :meth:`scan` says; ascending, each once.

        Raises:
            PoolError: The file is damaged, or no sample begins there.
        """
        wanted = set(start_c.tolist())
        found = (sample for sample in self.samples() if sample.at in wanted)
        count = 0
        for sample in islice(found, len(wanted)):
            count += 1
            yield sample
        if count < len(wanted):
            raise PoolError(f"{self.path}: has fewer samples than before; it was changed, start again")

    # --- as a table ---

    def schema(self) -> Any:
        """Return the Arrow schema of :meth:`batches`: by default image, text, key, and :meth:`light`."""
        import pyarrow as pa

        picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        own = {"image": picture, "text": pa.string(), "key": pa.string()}
        return pa.schema([*own.items(), *((name, kind) for name, kind in self.light().items() if name not in own)])

    def light(self) -> Mapping[str, Any]:
        """Return the names and Arrow types of ``Sample.columns``: numbers and texts that go along."""
        return {}

    def batches(self, columns: Sequence[str] | None, start_c: Ints, size: int = _ROWS) -> Iterator[Any]:
        """Yield some samples as Arrow record batches; a picture that is not there is null.

        Args:
            columns: Of :meth:`schema`; None for all.
            start_c: Where the samples begin, as :meth:`scan` says; ascending, any number of times each.
            size: Rows of a batch, at most.

        Raises:
            PoolError: The file is damaged, or no sample begins there.
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
                told = {"image": picture, "text": sample.text, "key": sample.key}
                rows += [{**sample.columns, **told}] * often
            whole = pa.RecordBatch.from_pylist(rows, schema)
            yield from (whole.slice(lo, size) for lo in range(0, len(whole), size))

    # --- for looking them over ---

    def words(self) -> Iterator[Words] | None:
        """Return keys and captions, read without pictures; None where :meth:`samples` reads no pictures either."""
        return None

    def roles(self) -> Mapping[str, str | None]:
        """Return which column is the picture, caption, key and uid; {} where there are no columns."""
        return {}

    def members(self) -> Iterator[Sequence[str]]:
        """Yield the endings of the files that make up each sample; nothing where samples are no files."""
        return iter(())

    def cut_off(self) -> str:
        """Return what is wrong with the end of the file, "" for nothing, without reading all of it."""
        return ""


@dataclass(frozen=True)
class Data:
    """Raw data at a location.

    Attributes:
        location: As it was given.
        kind: The name of the reader: "webdataset", "parquet", "arrow", "csv", "folder".
        parts: In the order of the samples.
    """

    location: str
    kind: str
    parts: tuple[Part, ...]

    @property
    def columns(self) -> Mapping[str, Any]:
        """What tables tell of every sample besides, and its Arrow type."""
        return self.parts[0].light() if self.parts else {}

    def samples(self) -> Iterator[Sample]:
        """Yield all samples, part by part."""
        for part in self.parts:
            yield from part.samples()
