"""Indexes of tars as ``wds2idx`` of NVIDIA DALI writes them: ``00000000.idx`` next to ``00000000.tar``.

The first line is ``v1.2`` and the number of samples. Every other line is a sample: for each of its members the
extension, the byte at which its content begins, the size of the content, and its name, separated by spaces.

An index is a file of its own, so it may be damaged, or be of another tar. It is only a hint where to look: what it
says is compared with the headers of the tar by :mod:`thresher.data.indexed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from thresher.io.paths import visible
from thresher.io.tar import TAR_BLOCK, Member, Row

ENDING = ".idx"
_VERSION = "v1.2"
_FIRST = re.compile(r"(v[0-9]{1,4}\.[0-9]{1,4}) ([0-9]{1,15})\r?")
_NUMBER = re.compile("[0-9]{1,18}", re.ASCII)
_ESCAPED = re.compile(rb"\\([0-7]{3}|[abfnrtv\\])")  # how GNU tar lists names, which wds2idx calls
_LETTERS = dict(zip(b"abfnrtv\\", b"\a\b\f\n\r\t\v\\", strict=True))


class IndexProblem(ValueError):  # noqa: N818 - it never leaves the readers
    """Why an index is not used; the text completes "the index ..."."""


def index_path(path: str) -> str:
    """Return where the index of a tar is: NAME.idx next to NAME.tar; "" if it has another name."""
    return path[: -len(".tar")] + ENDING if path.lower().endswith(".tar") else ""


def members_in(content: bytes, size: int) -> list[Member]:
    """Return the members that an index lists, in the order of the tar.

    The ``start`` of each is the end of the one before: whatever lies between are its headers, or something that the
    index does not list.

    Args:
        content: The index.
        size: Bytes of the tar.

    Raises:
        IndexProblem: It is not an index of this version, or what it says cannot be true of a tar of this size.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise IndexProblem("is not text") from None
    lines = text.split("\n")
    first = _FIRST.fullmatch(lines[0])
    if first is None:
        raise IndexProblem(f"does not begin with {_VERSION} and a number")
    if first[1] != _VERSION:
        raise IndexProblem(f"has the version {first[1]}; {_VERSION} is read")
    if lines.pop():
        raise IndexProblem("is cut off: its last line does not end")
    if int(first[2]) != len(lines) - 1:
        raise IndexProblem(f"says {int(first[2]):,} samples, and has {len(lines) - 1:,} lines")
    found: list[Member] = []
    end = 0
    for number, line in enumerate(lines[1:], 2):
        fields = _fields(line)
        if not fields or len(fields) % 4:
            raise IndexProblem(f"line {number:,} is not an extension, an offset, a size and a name for each member")
        for at in range(0, len(fields), 4):
            member = _member(fields[at : at + 4], end, size, number)
            end = member.end
            found.append(member)
    return found


def _fields(text: str) -> list[str]:
    """Return the parts of a text between white space of ASCII; other white space is part of names."""
    return [field.decode("utf-8", "surrogateescape") for field in text.encode("utf-8", "surrogateescape").split()]


def _member(fields: Sequence[str], start: int, size: int, line: int) -> Member:
    ending, at, much, name = fields
    if not _NUMBER.fullmatch(at) or not _NUMBER.fullmatch(much):
        raise IndexProblem(f"line {line:,} has an offset or a size that is not a number")
    member = Member(_name(name), True, start, int(at), int(much))
    if member.offset % TAR_BLOCK or member.offset < start + TAR_BLOCK:
        raise IndexProblem(
            f"line {line:,}: no member begins at byte {member.offset:,}, after one that ends at {start:,}"
        )
    if member.offset + member.size > size:
        raise IndexProblem(f"line {line:,} ends at byte {member.offset + member.size:,}, and the tar has {size:,}")
    base, dot, own = name.rpartition("/")[2].partition(".")
    if ending != (own if dot else name) or not base:  # wds2idx has no dot to split README at
        raise IndexProblem(f"line {line:,}: {visible(ending, 40)} is not the extension of {visible(name, 80)}")
    return member


def _name(text: str) -> str:
    """Return a name without the escapes of GNU tar."""
    if "\\" not in text:
        return text
    plain = _ESCAPED.sub(lambda one: _byte(one[1]), text.encode())
    return plain.decode("utf-8", "backslashreplace")


def _byte(escape: bytes) -> bytes:
    return bytes([int(escape, 8) & 0xFF if len(escape) == 3 else _LETTERS[escape[0]]])


def index_of(samples: Iterable[Sequence[Row]]) -> bytes:
    """Return the index of a tar.

    Args:
        samples: The headers of each sample, in the order of the tar.

    Raises:
        IndexProblem: A name has white space, which separates the fields of an index.
    """
    lines = []
    for rows in samples:
        members = [(row.name, row.offset, row.size) for row in rows if row.name]
        if spaced := next((name for name, _, _ in members if _fields(name) != [name]), ""):
            raise IndexProblem(f"cannot have a name with white space: '{visible(spaced, 120)}'")
        fields = ((name.rpartition("/")[2].partition(".")[2], str(at), str(size), name) for name, at, size in members)
        lines.append(" ".join(" ".join(one) for one in fields))
    return "\n".join([f"{_VERSION} {len(lines)}", *lines, ""]).encode("utf-8", "surrogateescape")
