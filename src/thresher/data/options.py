"""Options for reading raw data."""

from __future__ import annotations

import os
from dataclasses import dataclass

from thresher.errors import UsageError

PER_PART = 10_000


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How to read raw data if the names in it are not sufficient.

    Attributes:
        image: Column with the images, or with their paths; for tars the extension of a member, such as ``input.jpg``.
        caption: Column with the captions; for a folder also the attribute of ``NAME.json`` next to an image; for tars
            the extension of a member, or ``json:NAME`` for an attribute of the json.
        key: Column that identifies a row; for tars ``json:NAME``.
        root: Folder with the images that a file names by path (default: the folder of the file).
        captions_file: For a folder of images: the file with their captions.
        captions: Whether captions are needed.
        pictures: Whether images are needed.
        columns: For a CSV file without a first line of names: the names of its columns, separated by commas.
        per_part: Rows per part, if a file is split into several.
        allow_outside: Whether images outside the root may be read if a file names them.
        reader: The reader to use, and its options: ``NAME`` or ``NAME:OPTION=VALUE,...`` (default: the first that
            recognises the data).
        thumbnails_as_data: Whether a pool may be read as data: its thumbnails as images.
    """

    image: str | None = None
    caption: str | None = None
    key: str | None = None
    root: str | None = None
    captions_file: str | None = None
    captions: bool = True
    pictures: bool = True
    columns: str | None = None
    per_part: int = PER_PART
    allow_outside: bool = False
    reader: str | None = None
    thumbnails_as_data: bool = False

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if self.per_part < 1:
            raise UsageError(f"{self.per_part} rows a part: at least 1")
        if self.root and not os.path.isdir(self.root):
            raise UsageError(f"{self.root}: there is no such folder of images")
        if self.captions_file and not os.path.isfile(self.captions_file):
            raise UsageError(f"{self.captions_file}: there is no such file of captions")
        if self.columns is not None and ("" in self.names or len(set(self.names)) < len(self.names)):
            raise UsageError(
                f"--columns {self.columns!r}: give a different name for each column, separated by commas, such as "
                "filepath,title"
            )

    @property
    def names(self) -> list[str]:
        """The names of ``columns``, [] for none."""
        return [] if self.columns is None else [name.strip() for name in self.columns.split(",")]

    def refuse(self, location: str, kind: str, **flags: str) -> None:
        """Refuse options that have no meaning for a kind of data.

        Args:
            location: The data.
            kind: What they are: "a folder of images".
            flags: Name of an option, and what to do instead.

        Raises:
            UsageError: One of the options is given.
        """
        for name, instead in flags.items():
            if value := getattr(self, name):
                flag = name.removesuffix("_file").replace("_", "-")
                raise UsageError(f"--{flag} {value}: {location} is {kind}, which does not use it; {instead}")
