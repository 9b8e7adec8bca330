"""Which members of a sample in a tar are its image, its caption and its key: the usual ones, or those a user names.

A member is named by its whole extension, ``jpg`` or ``input.jpg``, and an attribute of the json by ``json:NAME``: the
attribute ``NAME``, or for ``a.b`` else ``b`` in the object ``a``, and for ``a.0`` the first item of the list ``a``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from thresher.data.options import DataOptions
from thresher.data.rows import TEXTS, text_of
from thresher.data.trainable import PICTURES, TAKEN
from thresher.errors import UsageError, suggest
from thresher.io.columns import known
from thresher.io.paths import visible, writable
from thresher.io.pictures import ENDINGS

JSON = "json"
APART = (  # notes
    "have members that lie apart in the tar: trainers based on webdataset drop or split them; thresher reshard writes "
    "them next to each other"
)
SEVERAL = (
    f"have several images; the first of {', '.join(TAKEN)} and other formats is used, as in open_clip; --image names "
    "another"
)
_CAPTIONS = ("txt", "text", "caption")  # members
_ATTRIBUTES = tuple(dict.fromkeys(("caption", *TEXTS)))  # of the json
_TEXT = re.compile("txt|text|caption")
_KEYS = "text, or a number without a fraction"
_SHOWN = 20  # names in a message
_DEEP = 3  # lists and objects in each other in which a text may be a caption


@dataclass(frozen=True)
class Members:
    """What a user named; "" for the usual members.

    Attributes:
        image: Extension of the image.
        caption: Extension of the caption.
        caption_in: Attribute with the caption.
        key_in: Attribute with the key.
    """

    image: str = ""
    caption: str = ""
    caption_in: str = ""
    key_in: str = ""

    @classmethod
    def of(cls, location: str, options: DataOptions) -> Members:
        """Return what the options name.

        Raises:
            UsageError: An option is not the name of a member or of an attribute.
        """
        options.refuse(
            location,
            "tars",
            root="their images are in the tars",
            captions_file="name a member or an attribute with captions: --caption txt2, --caption json:NAME",
        )
        image, caption, key = (_named(value) for value in (options.image, options.caption, options.key))
        if image[1]:
            raise UsageError(f"--image {options.image}: an image is a member; give its extension, such as input.jpg")
        if key[0]:
            raise UsageError(
                f"--key {options.key}: the key of a sample in a tar is its name; to use an attribute of its json, give "
                "json:NAME, such as json:id"
            )
        for flag, name in (("image", image[0]), ("caption", caption[0])):
            if name == JSON or "/" in name:
                raise UsageError(
                    f"--{flag} {visible(name)}: give the extension of a member, such as "
                    f"{'input.jpg' if flag == 'image' else 'txt2, or an attribute of the json, such as json:prompt'}"
                )
        return cls(image[0], *caption, key[1])

    def image_in(self, members: Iterable[str]) -> str:
        """Return the extension of the image, "" if there is none."""
        names = (self.image,) if self.image else PICTURES
        return next((name for name in names if name in members), "")

    def notes(self, members: tuple[str, ...], *, apart: bool) -> tuple[str, ...]:
        """Return the :attr:`thresher.data.samples.Sample.notes` of a sample."""
        return (*((APART,) if apart else ()), *((SEVERAL,) if not self.image and _are_several(members) else ()))

    def why_no_image(self, members: Iterable[str], linked: str = "") -> str:
        """Return why there is no image; ``linked`` is the extension of a member that is not a regular file."""
        listed = visible(", ".join(members))
        if linked and self.image_in([linked]):
            return (
                f"has no image (members: {listed}): its {visible(linked)} is a link or another special file, which is "
                "not read; pack the images themselves: tar --dereference --hard-dereference"
            )
        if self.image:
            return f"has no {visible(self.image)} (members: {listed})"
        if dotted := next((name for name in members if name.rpartition(".")[2] in ENDINGS), ""):
            return (
                f"has no image (members: {listed}): the extension begins at the first dot of a name, as in webdataset; "
                f"--image {visible(dotted)} names it"
            )
        return f"has no image (members: {listed})"

    def caption_member(self, members: Iterable[str]) -> str:
        """Return the extension of the member with the caption, "" if there is none."""
        names = () if self.caption_in else (self.caption,) if self.caption else _CAPTIONS
        return next((name for name in names if name in members), "")

    def caption_of(self, info: Mapping[str, Any]) -> str:
        """Return the caption in the json of a sample without a caption member, "" if there is none."""
        if self.caption:
            return ""
        if self.caption_in:
            return text_of(value_in(info, self.caption_in))
        return next(filter(None, (text_of(info[name]) for name in known(info, _ATTRIBUTES))), "")

    def key_of(self, info: Mapping[str, Any]) -> tuple[str, str]:
        """Return the key in the json of a sample, and why there is none, "" if there is one."""
        return key_text(value_in(info, self.key_in), self.key_in)


NO_NAMES = Members()


@lru_cache
def _are_several(members: tuple[str, ...]) -> bool:
    return sum(name in members for name in PICTURES) > 1


def _named(value: str | None) -> tuple[str, str]:
    """Return the extension or the attribute that an option names, "" for the other."""
    if not value:
        return "", ""
    kind, colon, name = value.partition(":")
    if kind.lower() != JSON or not colon:
        return value.lower().removeprefix("."), ""
    if not name:
        raise UsageError(f"{value} names no attribute; give one, such as json:caption")
    return "", name


def value_in(info: Mapping[str, Any], name: str) -> Any:
    """Return an attribute of a json; None if there is none."""
    if name in info:
        return info[name]
    value: Any = info
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isascii() and part.isdigit() and len(part) < 7 and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def key_text(value: Any, name: str) -> tuple[str, str]:
    """Return the text of a key in a json, the same as that of a column of a table, and why there is none."""
    if isinstance(value, str) and value:
        return writable(value), ""
    if isinstance(value, bool):
        return str(value).lower(), ""
    if isinstance(value, int):
        return str(value), ""
    what = "nothing" if value is None or value == "" else f"a {type(value).__name__}"
    return "", f"has no key: {visible(name)} of its json is {what}; a key is {_KEYS}"


# --- what the first samples have ------------------------------------------------------------------


class Found:
    """The members and attributes of the samples looked at, and which of those that a user named are among them."""

    def __init__(self, members: Members) -> None:
        """Look for these."""
        self._wanted = members
        self.samples = 0
        self.captions = False
        self._image = self._key = False
        self._key_why = ""
        self._members: dict[str, None] = {}
        self._attributes: dict[str, None] = {}
        self._texts: dict[str, None] = {}  # what may be captions

    def add(self, members: Iterable[str], info: Mapping[str, Any], caption: str) -> None:
        """Add a sample."""
        wanted, self.samples = self._wanted, self.samples + 1
        self.captions |= bool(caption)
        self._image |= bool(wanted.image_in(members))
        if wanted.key_in and not self._key:
            key, why = wanted.key_of(info)
            self._key, self._key_why = bool(key), why
        self._members.update(dict.fromkeys(members))
        self._attributes.update(dict.fromkeys(info))
        self._texts.update((name, None) for name in members if _TEXT.search(name) and name not in _CAPTIONS)
        places = (_caption_below(value, f"{JSON}:{name}") for name, value in info.items())
        self._texts.update(dict.fromkeys(filter(None, places)))

    def done(self, *, captions: bool) -> bool:
        """Return whether everything that is wanted was found; captions may be not needed."""
        wanted = self._wanted
        named = wanted.caption or wanted.caption_in
        return (
            (self.captions or not (captions or named))
            and (self._image or not wanted.image)
            and (self._key or not wanted.key_in)
        )

    def refusal(self, location: str) -> UsageError | None:
        """Return the error for what the user named and no sample has."""
        wanted = self._wanted
        for flag, name, attribute, found in (
            ("image", wanted.image, "", self._image),
            ("caption", wanted.caption, wanted.caption_in, self.captions),
            ("key", "", wanted.key_in, self._key),
        ):
            if (name or attribute) and not found:
                return self._lacking(location, flag, name, attribute)
        return None

    def _lacking(self, location: str, flag: str, name: str, attribute: str) -> UsageError:
        given = f"{JSON}:{attribute}" if attribute else name
        allowed = [*self._members, *(f"{JSON}:{one}" for one in self._attributes)]
        same = next((one for one in allowed if one == f"{JSON}:{name}"), "")
        hint = f" Did you mean {same!r}?" if same else suggest(given, allowed)
        what = "has text there" if flag == "caption" and given in allowed else "has it"
        if flag == "key" and given in allowed:
            what = f"has a key there ({self._key_why.removeprefix('has no key: ')})"
        return UsageError(
            f"--{flag} {visible(given)}: none of the {self.samples:,} samples looked at in {location} {what}; "
            f"{self.listed()}.{hint}"
        )

    def listed(self) -> str:
        """Return the members and attributes for a message."""
        members, attributes = _shown(self._members), _shown(self._attributes)
        return f"they have the members {members}" + (f", and json with {attributes}" if attributes else "")

    def captions_elsewhere(self, location: str) -> str:
        """Return what to do about captions that may be at an unusual place, "" if there can be none."""
        if self.captions or not self._texts:
            return ""
        return (
            f"{location}: no sample has a caption at a usual place ({', '.join(_CAPTIONS)}, or {JSON} with "
            f"{', '.join(_ATTRIBUTES)}); {self.listed()}; name one, such as --caption "
            f"{visible(next(iter(self._texts)))}"
        )


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return visible(", ".join([*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])]))


def _caption_below(value: Any, name: str, deep: int = _DEEP) -> str:
    """Return the name of the first place in an attribute that has a text of several words, "" if there is none."""
    text = text_of(value)
    if " " in text and text[0] not in "{[":
        return name
    if not deep or not isinstance(value, (list, dict)):
        return ""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    places = (_caption_below(one, f"{name}.{part}", deep - 1) for part, one in islice(inner, _SHOWN))
    return next(filter(None, places), "")
