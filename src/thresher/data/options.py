"""How to read raw data where names do not say it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from thresher.errors import UsageError

PER_PART = 10_000


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How to read raw data where names do not say it.

    Attributes:
        image: Column of a table with the pictures.
        caption: Column with the captions.
        key: Column that identifies a row.
        root: Folder that pictures named by a table lie in (default: that of the table).
        captions_file: For a folder of pictures: the file that has their captions.
        captions: Whether captions are wanted at all.
        per_part: Rows of a part, where a file is cut into several.
        allow_outside: Whether pictures may be read that a csv names by absolute paths elsewhere.
        reader: The reader to use, and its options: ``NAME`` or ``NAME:OPTION=VALUE,...`` (default: the first that
            recognises the data).
    """

    image: str | None = None
    caption: str | None = None
    key: str | None = None
    root: str | None = None
    captions_file: str | None = None
    captions: bool = True
    per_part: int = PER_PART
    allow_outside: bool = False
    reader: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.per_part < 1:
            raise UsageError(f"{self.per_part} rows a part: at least 1")
        if self.root and not os.path.isdir(self.root):
            raise UsageError(f"{self.root}: there is no such folder of pictures")
        if self.captions_file and not os.path.isfile(self.captions_file):
            raise UsageError(f"{self.captions_file}: there is no such file of captions")
