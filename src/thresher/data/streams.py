"""Samples of a stream, such as webdataset: their uid, and what a message says of a stream of which nothing is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thresher.runtime.untrusted import cut, parse_json

PATIENCE = 10_000  # samples of which none is used, after which a stream may be refused

_SHOWN = 12  # members named in a message
_UID = "uid"


def uid_of(sample: Any) -> str | None:
    """Return the uid of a sample: its field ``uid``, or that in its ``json``, decoded or not; None if it has none."""
    if not isinstance(sample, Mapping):
        return None
    if isinstance(uid := sample.get(_UID), str):
        return uid
    content = sample.get("json")
    if isinstance(content, bytes | bytearray | str):
        try:
            content = parse_json(content)
        except ValueError:
            return None
    uid = content.get(_UID) if isinstance(content, Mapping) else None
    return uid if isinstance(uid, str) else None


class Seen:
    """What a stage saw of a stream, for messages.

    Attributes:
        samples: Number of samples.
        shards: Number of times that a shard was opened; 0 if samples do not have a ``__url__``.
        members: The names of the members of samples, such as "jpg" and "txt".
        key: The key of the first sample.
        uid: Its uid; "" if it has none.
    """

    def __init__(self) -> None:
        """Begin with no sample."""
        self.samples, self.shards = 0, 0
        self.members: dict[str, None] = {}
        self.key, self.uid = "", ""
        self._url: Any = None

    def add(self, sample: Any, key: str) -> None:
        """Add a sample, which is identified by ``key``."""
        if not self.samples:
            self.key, self.uid = key, uid_of(sample) or ""
        self.samples += 1
        if isinstance(sample, Mapping):
            if len(self.members) <= _SHOWN:
                self.members.update((cut(str(name)), None) for name in sample if not str(name).startswith("__"))
            url = sample.get("__url__")
            if url is not None and url != self._url:
                self.shards, self._url = self.shards + 1, url

    def __str__(self) -> str:
        """Return the number of samples, their members, and the key of the first."""
        if not self.samples:
            return "no samples"
        uid = f" and the uid {cut(self.uid)!r}" if self.uid not in ("", self.key) else ""
        return f"{self.samples:,} samples (members: {self.listed()}; the first has the key {cut(self.key)!r}{uid})"

    def listed(self) -> str:
        """Return the members for a message, the first ones if they are many."""
        names = sorted(self.members)
        return ", ".join([*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])]) or "none"
