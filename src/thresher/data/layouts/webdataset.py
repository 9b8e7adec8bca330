"""Webdataset: tars whose neighbouring members of one key are a sample."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass

from thresher.data.samples import IMAGES, Place, Sample, caption_of
from thresher.errors import PoolError
from thresher.io.listing import natural
from thresher.io.open import open_file, protocol_of, trusting
from thresher.io.paths import shown, writable
from thresher.io.tar import (
    NOTES,
    Group,
    Window,
    groups,
    json_of,
)

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


@dataclass(frozen=True)
class TarPart:
    """The samples of one tar."""

    path: str
    protocol: str = "file"
    first: int = 0
    rows: int | None = None

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, each with the place of its picture."""
        with open_file(self.protocol, self.path) as file:
            window = Window(file, self.path)
            for group in groups(window, self.path):
                yield self._sample(window, group)

    def _sample(self, window: Window, group: Group) -> Sample:
        found = group.members
        told = json_of(window, found.get("json"))
        text = found.get("txt") or found.get("text") or found.get("caption")
        if text:
            caption = caption_of(window.read(text.offset, min(text.size, NOTES)))
        else:
            caption = next(filter(None, (caption_of(told.get(name)) for name in ("caption", "text"))), "")
        uid = told.get("uid")
        picture = next((found[kind] for kind in IMAGES if kind in found), None)
        return Sample(
            key=group.key,
            text=caption,
            picture=Place(self.path, picture.offset, picture.size, self.protocol) if picture else None,
            at=next(iter(found.values())).start,
            uid=writable(uid) if isinstance(uid, str) else "",
            why="" if picture else f"has no picture (members: {shown(', '.join(found))})",
        )


# --- where tars are -------------------------------------------------------------------------------


def tars_at(location: str) -> list[tuple[str, str]]:
    """Return (protocol, path) of the tars that a location names, in order; [] where it names none.

    Args:
        location: Folders with tars, or paths with ``{00000..00099}`` or ``*``, several with ``::`` between them;
            anywhere fsspec reaches.

    Raises:
        PoolError: Some of those it names are not there, or they are compressed.
    """
    if location.endswith(COMPRESSED):
        raise PoolError(f"{location}: is a compressed tar, which cannot be read in any order; unpack it to a plain one")
    folders = location.split("::")
    if all(os.path.isdir(folder) and not folder.endswith(".tar") for folder in folders):
        return [tar for folder in folders for tar in _in_folder(folder)]
    if not location.endswith(".tar") and ".tar::" not in location:
        return _in_folder(location)
    if os.path.isfile(location):  # whatever its name has of braces and stars
        return [("file", location)]
    found: list[tuple[str, str]] = []
    missing: list[str] = []
    for name in (one for part in _parts(location) for one in _expanded(part)):
        if "://" in name:
            import fsspec

            fs, path = trusting(name, lambda name=name: fsspec.core.url_to_fs(name))  # type: ignore[misc]
            paths = trusting(name, lambda fs=fs, path=path: fs.glob(path) if glob.has_magic(path) else [path])  # type: ignore[misc]
            found += [(protocol_of(fs), str(one)) for one in sorted(paths, key=natural)]
            continue
        paths = sorted(glob.glob(name), key=natural) if glob.has_magic(name) else [name]
        missing += [path for path in paths if not os.path.isfile(path)] or ([] if paths else [name])
        found += [("file", path) for path in paths]
    if missing or not found:
        raise PoolError(
            f"{location}: {missing[0] if missing else 'no file'} is not there, {len(found) - len(missing):,} tars are; "
            "name those you have"
        )
    if len(set(found)) < len(found):
        raise PoolError(f"{location}: names {next(path for one, path in found if found.count((one, path)) > 1)} twice")
    return found


def _expanded(name: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(name))
    except ValueError:
        raise PoolError(f"{name}: a brace has no other; give a range such as {{00000..00099}}") from None


def _parts(location: str) -> list[str]:
    parts = location.split("::")
    if odd := [part for part in parts if not part.endswith(".tar")]:
        raise PoolError(f"{location}: {odd[0] or 'an empty name'} is no .tar; give tars between ::")
    return parts


def _in_folder(location: str) -> list[tuple[str, str]]:
    if "://" not in location:
        return [("file", path) for path in sorted(glob.glob(os.path.join(glob.escape(location), "*.tar")), key=natural)]
    import fsspec

    fs, root = trusting(location, lambda: fsspec.core.url_to_fs(location))
    paths = trusting(location, lambda: fs.glob(f"{root}/*.tar"))
    return [(protocol_of(fs), str(path)) for path in sorted(paths, key=natural)]
