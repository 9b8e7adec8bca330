"""A place where raw data may be, looked at no further than a reader asks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

from thresher.io.listing import Files


@dataclass(frozen=True)
class Location:
    """A place where raw data may be.

    Attributes:
        text: As it was given: a folder, a file, a pattern of names, anywhere fsspec reaches.
    """

    text: str

    @property
    def local(self) -> bool:
        """Whether it is on this machine."""
        return "://" not in self.text

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder on this machine."""
        return self.local and os.path.isdir(self.text)

    @property
    def exists(self) -> bool:
        """Whether it is there; of what is elsewhere, that it may be."""
        return not self.local or os.path.exists(self.text)

    @cached_property
    def files(self) -> Files:
        """The files there, two levels down; of a folder of a million pictures ask :meth:`has` first.

        Raises:
            PoolError: Nothing is there, or it cannot be listed.
        """
        return Files.at(self.text)

    def has(self, *endings: str) -> bool:
        """Return whether names end in one of ``endings``, two levels down; by names alone, which is quick."""
        if not self.exists:
            return False
        if not self.is_folder:
            return any(name.endswith(endings) for name in self.files.names)
        return self._names is None or any(name.endswith(endings) for name in self._names)

    @cached_property
    def _names(self) -> list[str] | None:
        """Names in the folder and in those in it; None where links to folders would have to be followed."""
        found: list[str] = []
        for here, inner, names in os.walk(self.text):
            if any(os.path.islink(os.path.join(here, name)) for name in inner):
                return None
            found += [*inner, *names]
            if here != self.text:
                inner.clear()
        return found
