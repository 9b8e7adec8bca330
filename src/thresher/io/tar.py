"""Tar files read by their headers: the byte range of every member, without unpacking.

Member names are treated as text and never as paths. Members that are not regular files (links, devices, folders) are
skipped."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError
from thresher.io.open import trusting
from thresher.io.paths import all_plain, is_unsafe, visible
from thresher.runtime.untrusted import parse_json

TAR_BLOCK = 512
_PADDING = 65_536  # bytes after the end in which another archive is looked for
_SPAN = 1 << 20  # bytes fetched at a time
_NAME = 1 << 20  # maximum bytes of a long name or of the pax metadata of a member
_REGULAR = frozenset((b"0", b"\0", b"7"))
_META = re.compile(r"__[^/]*__($|/)")  # metadata of webdataset itself
LONG = frozenset((b"L", b"x", b"X"))  # headers that describe the next member
NOTES = 1 << 20  # maximum bytes of a caption or a JSON member
_MAGIC = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Member(NamedTuple):
    """A member of a tar.

    Attributes:
        name: The stored name; bytes that are not valid UTF-8 are escaped.
        regular: Whether it is a regular file.
        start: Byte offset of its first header.
        offset: Byte offset of its content.
        size: Bytes of its content.
    """

    name: str
    regular: bool
    start: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Byte offset after its padding."""
        return self.offset + -(-self.size // TAR_BLOCK) * TAR_BLOCK


class Window:
    """Buffered reads of a file whose parts are requested roughly in order."""

    def __init__(self, file: IO[bytes], path: str, span: int = _SPAN) -> None:
        """Read ``file``, named ``path`` in messages, ``span`` bytes at a time."""
        self._file, self._path, self._span = file, path, span
        self._at, self._held = 0, b""
        self.size = trusting(path, lambda: file.seek(0, os.SEEK_END))

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on, fewer at the end of the file."""
        lo = offset - self._at
        if lo < 0 or lo + size > len(self._held):
            self._held = trusting(self._path, lambda: self._fetch(offset, max(size, self._span)))
            self._at, lo = offset, 0
        return self._held[lo : lo + size]

    def _fetch(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(max(0, min(size, self.size - offset)))


def members(window: Window, path: str, at: int = 0) -> Iterator[Member]:
    """Yield the members of a tar in order (ustar, GNU and pax names and sizes), from the one at byte ``at`` on.

    Raises:
        PoolError: The file is truncated or damaged, raised after the members before the damage.
    """
    start = at
    longer, notes = "", dict[str, str]()
    read = window.read
    while True:
        header = read(at, TAR_BLOCK)
        if len(header) < TAR_BLOCK:
            if len(header) or start != at:
                raise PoolError(f"{path}: is cut off at byte {window.size:,}, in the header of a member")
            if not at:
                raise PoolError(f"{path}: is empty, not a tar")
            return
        kind = header[156:157]
        try:
            checksum = _number(header[148:156])
            size = _number(header[124:136])
        except ValueError:
            checksum = size = -1
        # The sum of the header's bytes, with blanks as its checksum; the low half of adler32 is the fastest way to sum.
        total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * 32
        if checksum < 0 or size < 0 or (total - checksum) % 65521:
            if not header.strip(b"\0"):
                return
            raise PoolError(f"{path}: {_no_header(header, at)}")
        offset = at + TAR_BLOCK
        if kind in (b"L", b"K", b"x", b"g", b"X"):
            if size > _NAME:
                raise PoolError(f"{path}: is damaged at byte {at:,}: {size:,} bytes of metadata for one member")
            content = read(offset, size)
            if len(content) < size:
                raise PoolError(f"{path}: is cut off at byte {window.size:,}, in the metadata of a member")
            if kind == b"L":
                longer = _text(content.split(b"\0", 1)[0])
            elif kind in (b"x", b"X"):
                notes = _notes(content, path, at)
            at = offset + -(-size // TAR_BLOCK) * TAR_BLOCK
            continue
        name = notes.get("path") or longer
        if not name:
            name = _text(header[:100].split(b"\0", 1)[0])
            if header[345] and header[257:263] == b"ustar\0":
                prefix = _text(header[345:500].split(b"\0", 1)[0])
                name = f"{prefix}/{name}"
        if "size" in notes:
            if not re.fullmatch(r"[0-9]{1,20}", notes["size"]):
                raise PoolError(f"{path}: is damaged at byte {at:,}: invalid size '{visible(notes['size'])}'")
            size = int(notes["size"])
        if kind in b"123456" or kind == b"\0" and name.endswith("/"):
            size = 0  # links, devices and folders have no content, whatever their headers say
        sparse = kind == b"S" or notes and any(note.startswith("GNU.sparse") for note in notes)
        if kind == b"S" and header[482]:
            raise PoolError(f"{path}: contains a sparse file at byte {at:,}, which is not supported")
        member = Member(name, kind in _REGULAR and not sparse and not name.endswith("/"), start, offset, size)
        if offset + size > window.size:
            raise PoolError(f"{path}: is cut off at byte {window.size:,}, in the member '{visible(name)}'")
        yield member
        at = start = member.end
        longer, notes = "", {}


def _refuse_another(window: Window, path: str, at: int) -> None:
    """Raise if an archive begins after the end of this one at byte ``at``, as in a file made by ``cat A.tar B.tar``."""
    rest = window.read(at, _PADDING)
    begin = at + (len(rest) - len(rest.lstrip(b"\0"))) // TAR_BLOCK * TAR_BLOCK
    if at < begin < at + len(rest) and window.read(begin + 257, 5) == b"ustar":
        raise PoolError(
            f"{path}: another archive begins at byte {begin:,}, after the end of the first, and is not read; join "
            "archives with: tar --concatenate --file=FIRST.tar SECOND.tar"
        )


def _number(digits: bytes) -> int:
    """Parse a number of a header: octal digits, or the GNU binary format that begins with 0x80."""
    if digits[0] & 0x80:
        return -1 if digits[0] & 0x7F else int.from_bytes(digits[1:], "big")
    return int(digits.split(b"\0", 1)[0].strip() or b"0", 8)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _notes(content: bytes, path: str, at: int) -> dict[str, str]:
    """Parse the pax metadata of a member: records of length, name and value."""
    notes = {}
    begin, stop = 0, len(content.rstrip(b"\0"))
    while begin < stop:
        length = content[begin : begin + 8].partition(b" ")[0]
        end = begin + int(length) if length.isdigit() and len(length) < 8 else 0
        name, equals, value = content[begin + len(length) + 1 : end].partition(b"=")
        if not equals or end > len(content) or not value.endswith(b"\n"):
            raise PoolError(f"{path}: is damaged at byte {at:,}: the metadata of a member is not valid pax")
        notes[_text(name)] = _text(value[:-1])
        begin = end
    return notes


def _no_header(header: bytes, at: int) -> str:
    packed = _MAGIC.get(header[:2])
    if not at and packed:
        return (
            f"is compressed ({packed}), and compressed tars have no random access; decompress it: "
            f"{packed} -dc < OLD.tar > NEW.tar"
        )
    return f"is damaged at byte {at:,}: there is no valid tar header" if at else "is not a tar"


@dataclass(slots=True)
class TarSample:
    """Consecutive members with the same key: a sample in the sense of webdataset.

    Attributes:
        key: Folder and name up to the first dot.
        members: Members by file extension, in lower case, in the order of the tar.
        linked: Extension of its last member that is not a regular file, and so is not one of them; "" for none.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    linked: str = ""

    @property
    def start(self) -> int:
        """Byte offset of its first member."""
        return next(iter(self.members.values())).start

    @property
    def end(self) -> int:
        """Byte offset after its last member."""
        return next(reversed(self.members.values())).end


def tar_samples(window: Window, path: str, at: int = 0) -> Iterator[TarSample]:
    """Yield the samples of a tar, from the member at byte ``at`` on.

    The rules are those of webdataset. If an extension occurs twice, a new sample begins, as in open_clip. A name that
    consists only of an extension (``folder/.jpg``) is skipped.

    Raises:
        PoolError: As in :func:`members`; the sample at the damage is not yielded. Or another archive follows.
    """
    end = at

    def followed() -> Iterator[Member]:
        nonlocal end
        for member in members(window, path, at):
            end = member.end
            yield member

    yield from grouped(followed())
    _refuse_another(window, path, end)


def grouped(found: Iterable[Member]) -> Iterator[TarSample]:
    """Yield the samples of the members of a tar, by the rules of :func:`tar_samples`."""
    sample, linked = TarSample(""), ("", "")
    for member in found:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if not stem or not dot or member.name.startswith("__") and _META.match(member.name):
            continue
        key, ending = folder + slash + stem, ending.lower()
        if not member.regular:
            linked = key, ending
            if key == sample.key:
                sample.linked = ending
            continue
        if key != sample.key or ending in sample.members:
            if sample.members:
                yield sample
            sample = TarSample(key, linked=linked[1] if linked[0] == key else "")
        sample.members[ending] = member
    if sample.members:
        yield sample


def why_unsafe(sample: TarSample) -> str:
    """Return why a sample must not be copied, "" if it may: unpacking unsafe names would write to other folders."""
    names = ".".join((sample.key, *sample.members))
    if "\0" not in names and all_plain(f"\0{names}"):
        return ""
    name = next((member.name for member in sample.members.values() if is_unsafe(member.name)), None)
    return "" if name is None else f"has the name {name!r}, which points outside its folder"


def extent(window: Window, sample: TarSample) -> tuple[int, int]:
    """Return the start and the length of a sample in bytes; the length is negative if other data is in between."""
    start = end = sample.start
    whole = True
    for member in sample.members.values():
        whole &= member.start == end and (
            member.offset == member.start + TAR_BLOCK or all(kind in LONG for kind, _, _ in notes_of(window, member))
        )
        end = member.end
    length = min(end, window.size) - start
    return start, length if whole else -length


def notes_of(window: Window, member: Member) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, the start and the end of each extra header before the header of a member."""
    at, own = member.start, member.offset - TAR_BLOCK
    while at < own:
        digits = window.read(at + 124, 12).strip(b"\0 ")
        end = at + TAR_BLOCK + -(-int(digits or b"0", 8) // TAR_BLOCK) * TAR_BLOCK
        yield window.read(at + 156, 1), at, end
        at = end


class Row(NamedTuple):
    """A header and its content.

    Attributes:
        offset: Byte offset of the content; the header is the block before.
        size: Bytes of the content.
        name: Name of the member; "" if the header describes the next member.
    """

    offset: int
    size: int
    name: str

    @property
    def span(self) -> tuple[int, int]:
        """Start of the header, and the number of bytes from there to the end of the padding."""
        return self.offset - TAR_BLOCK, TAR_BLOCK + -(-self.size // TAR_BLOCK) * TAR_BLOCK


def rows_of(window: Window, sample: TarSample) -> list[Row]:
    """Return all headers of a sample that are copied."""
    rows: list[Row] = []
    for member in sample.members.values():
        notes = ((at, to) for kind, at, to in notes_of(window, member) if kind in LONG)
        rows += [Row(at + TAR_BLOCK, to - at - TAR_BLOCK, "") for at, to in notes]
        rows.append(Row(member.offset, member.size, member.name))
    return rows


@dataclass(frozen=True, eq=False)
class Headers:
    """The positions of m headers of n samples of a tar, as arrays, so that they are read only once.

    Attributes:
        begin_n: (n + 1,) index of the first header of each sample, and m at the end.
        offset_m: (m,) int64, see :class:`Row`.
        size_m: (m,) int64, see :class:`Row`.
        name_m: Arrow array of m strings, see :class:`Row`.
    """

    begin_n: npt.NDArray[np.int64]
    offset_m: npt.NDArray[np.int64]
    size_m: npt.NDArray[np.int64]
    name_m: Any

    @classmethod
    def of(cls, samples: Iterable[Sequence[Row]]) -> Headers:
        """Create the arrays from the headers of each sample."""
        import pyarrow as pa

        whole, rows = [0], list[Row]()
        for sample in samples:
            rows += sample
            whole.append(len(rows))
        place_m2 = np.array([(row.offset, row.size) for row in rows], np.int64).reshape(-1, 2)
        names = pa.array([row.name for row in rows], pa.large_string())
        return cls(np.array(whole, np.int64), place_m2[:, 0], place_m2[:, 1], names)

    @classmethod
    def joined(cls, parts: Sequence[Headers]) -> Headers:
        """Concatenate several."""
        import pyarrow as pa

        lengths = np.cumsum([0, *(len(part.offset_m) for part in parts)])
        begins = [part.begin_n[:-1] + first for part, first in zip(parts, lengths.tolist(), strict=False)]
        return cls(
            np.concatenate([*begins, lengths[-1:]]),
            np.concatenate([np.empty(0, np.int64), *(part.offset_m for part in parts)]),
            np.concatenate([np.empty(0, np.int64), *(part.size_m for part in parts)]),
            pa.concat_arrays([pa.array([], pa.large_string()), *(part.name_m for part in parts)]),
        )

    def __len__(self) -> int:
        """Return n."""
        return len(self.begin_n) - 1

    def rows(self, sample: int) -> list[Row]:
        """Return the headers of a sample."""
        lo, hi = self.begin_n[sample : sample + 2].tolist()
        columns = (self.offset_m[lo:hi].tolist(), self.size_m[lo:hi].tolist(), self.name_m[lo:hi].to_pylist())
        return [Row(*row) for row in zip(*columns, strict=True)]


def key_of(name: str) -> str:
    """Return the key of a member: its folder and its name up to the first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def ending_of(name: str) -> str:
    """Return the extension of a member, in lower case: what follows the first dot of its name."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def json_of(window: Window, member: Member | None) -> dict[str, Any]:
    """Return the JSON object of a sample, {} if there is none or it cannot be parsed."""
    if member is None or member.size > NOTES:
        return {}
    return json_in(window.read(member.offset, member.size))


def json_in(content: bytes) -> dict[str, Any]:
    """Return a JSON object, {} if it cannot be parsed."""
    try:
        value = parse_json(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
