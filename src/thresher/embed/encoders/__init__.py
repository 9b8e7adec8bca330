"""Encoders by name: what turns pictures and captions into vectors.

``make_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k")`` is all there is to call. Every library has a module here that
is loaded when it is asked for; what they share is in :mod:`thresher.embed.encoders.base`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from thresher.embed.preprocess import Pixels
from thresher.errors import ThresherError, UsageError, suggest
from thresher.ops.vectors import F32

if TYPE_CHECKING:
    from PIL import Image

Tokens = Mapping[str, npt.NDArray[np.integer[Any]]]

# What may follow the kind, as errors and documentation show it.
KINDS = {
    "open_clip": "open_clip:ARCH/PRETRAINED",
    "timm": "timm:NAME or timm:NAME/path/to/weights",
    "torchvision": "torchvision:NAME/WEIGHTS",
    "transformers": "transformers:NAME_OR_FOLDER",
    "sentence-transformers": "sentence-transformers:NAME_OR_FOLDER",
    "conse": "conse",
}
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
GROUP = "thresher.encoders"  # of entry points

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class Encoder(Protocol):
    """What makes vectors of pictures, of texts, or of both.

    Pictures and texts are prepared in other processes than the one that encodes: ``preprocess`` and ``tokenize`` must
    be picklable, and should not need torch.

    Attributes:
        name: What was asked for, such as "open_clip:ViT-B-32/laion2b_s34b_b79k".
        image_dim: Dimensions of its image vectors, 0 where it encodes no pictures.
        text_dim: Likewise of texts.
        preprocess: Makes pixels, (H, W, 3) uint8, of an upright 8-bit RGB picture of PIL; None without pictures.
        tokenize: Makes arrays of whole numbers by name, (B, T) each, of B texts; T may differ between calls. None
            without texts.
    """

    name: str
    image_dim: int
    text_dim: int

    @property
    def preprocess(self) -> Callable[[Image.Image], Pixels] | None:
        """See the class."""

    @property
    def tokenize(self) -> Callable[[Sequence[str]], Tokens] | None:
        """See the class."""

    def encode_images(self, pixels_BHWC: Pixels) -> F32:
        """Return (B, image_dim) float32 of B pictures that ``preprocess`` has made, not normalised."""
        ...

    def encode_texts(self, tokens: Tokens) -> F32:
        """Return (B, text_dim) float32 of what ``tokenize`` has made of B texts, not normalised."""
        ...

    def weights(self) -> str:
        """Return a short hash that tells the weights from others: a pool is never grown with other ones."""
        ...


@dataclass(frozen=True)
class Spec:
    """An encoder asked for: ``kind`` is a library, an entry point or a module; ``rest`` is what follows its colon."""

    kind: str
    rest: str

    @property
    def name(self) -> str:
        """What was given."""
        return f"{self.kind}:{self.rest}" if self.rest else self.kind


def parse(spec: str) -> tuple[Spec, ...]:
    """Return the one encoder of ``spec``, or the two of ``A+B``.

    A plus divides two encoders only where what follows it begins with a name that an encoder can have: names of files
    may have one.

    Raises:
        UsageError: There is no such encoder; says what there is.
    """
    known = {*KINDS, *(point.name for point in entry_points(group=GROUP))}
    starts = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    parts = re.split(rf"\+(?=(?:{starts})(?::|\+|$)|{_DOTTED.pattern}:)", spec.strip())[:: 1 + _DOTTED.groups]
    if len(parts) > 2:
        raise UsageError(f"{spec!r} names {len(parts)} encoders; give one, or one of pictures + one of texts")
    return tuple(_one(part, known) for part in parts)


def _one(text: str, known: set[str]) -> Spec:
    kind, colon, rest = text.partition(":")
    if kind in KINDS and not rest and kind != "conse":
        raise UsageError(f"{text!r} does not say which model; type {KINDS[kind]}")
    if kind == "conse" and colon:
        raise UsageError(f"{text!r}: conse has no variants; type conse")
    if kind in known or (rest and _DOTTED.fullmatch(kind) and _DOTTED.fullmatch(rest) and _importable(kind)):
        return Spec(kind, rest)
    if rest and _DOTTED.fullmatch(kind) and _DOTTED.fullmatch(rest):
        raise UsageError(
            f"no encoder {text!r}: no module {kind} is found, in the current folder or installed.{suggest(kind, known)}"
        )
    raise UsageError(
        f"no encoder {text!r}; there are {', '.join(KINDS.values())}, two of them joined by +, or your own as "
        f"package.module:Name.{suggest(kind, known)}"
    )


def _importable(module: str) -> bool:
    """Whether a module can be found, in the current folder too, which is not on the path of an installed command."""
    here, top = os.getcwd(), module.split(".")[0]
    if here not in sys.path and any(os.path.exists(os.path.join(here, top + ending)) for ending in (".py", "")):
        sys.path.append(here)  # for good: decode workers load the module too
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a package above it is not there, or was hidden on purpose
        return False


def make_encoder(spec: str, *, device: str = "auto", precision: str = "auto") -> Encoder:
    """Load an encoder.

    Args:
        spec: "KIND:NAME", see ``docs/encoders.md``: open_clip, timm, torchvision, transformers, sentence-transformers,
            conse, the name of an entry point of the group ``thresher.encoders``, or your own "package.module:Name";
            "A+B" takes pictures from A and texts from B.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" or "mps".
        precision: "float32", "bfloat16" or "float16" of the arithmetic; "auto" is float16 on CUDA, else float32.
            Vectors are float32 in any case.

    Raises:
        UsageError: There is no such encoder, no such weights, no such device, or they cannot be loaded.
        MissingExtraError: The library is not installed.
    """
    parts = parse(spec)
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}; allowed: {', '.join(PRECISIONS)}.{suggest(precision, PRECISIONS)}")
    if len(parts) == 2:
        from thresher.embed.encoders.joined import joined

        pictures, texts = (_made(part, device, precision) for part in parts)
        return joined(pictures, texts)
    return _made(parts[0], device, precision)


def _made(spec: Spec, device: str, precision: str) -> Encoder:
    if spec.kind in KINDS:
        from thresher.embed.encoders.base import TorchEncoder, resolved

        place = resolved(device, precision, spec.name)
        module = importlib.import_module(f"{__name__}.{spec.kind.replace('-', '_')}")
        return TorchEncoder(spec.name, module.towers(spec.rest), *place)
    points = {point.name: point for point in entry_points(group=GROUP)}
    if spec.kind in points:
        make, given = points[spec.kind].load(), ((spec.rest,) if spec.rest else ())
    else:
        module, given = importlib.import_module(spec.kind), ()
        try:
            make = module
            for name in spec.rest.split("."):
                make = getattr(make, name)
        except AttributeError:
            close = suggest(spec.rest, (name for name in vars(module) if not name.startswith("_")))
            raise UsageError(f"{spec.name}: {spec.kind} has no {spec.rest}.{close}") from None
    with _telling(f"{spec.name}: cannot be made"):
        made = make(*given, device=device, precision=precision)
    return checked(made, spec.name)


def checked(made: Any, name: str) -> Encoder:
    """Return a user's encoder, if it is one: it is tried on two pictures and two texts.

    Raises:
        UsageError: Something is missing, fails, or is not of the shape it is to have; says what.
    """
    wanted = ("name", "image_dim", "text_dim", "preprocess", "tokenize", "encode_images", "encode_texts", "weights")
    missing = [item for item in wanted if not hasattr(made, item)]
    if missing:
        raise UsageError(f"{name}: what it makes has no {', '.join(missing)}; an encoder has {', '.join(wanted)}")
    for dim, prepare in (("image_dim", "preprocess"), ("text_dim", "tokenize")):
        if bool(getattr(made, dim)) != (getattr(made, prepare) is not None):
            raise UsageError(
                f"{name}: {dim} is {getattr(made, dim)!r}, {prepare} {getattr(made, prepare)!r}; 0 goes with None"
            )
    if not made.image_dim and not made.text_dim:
        raise UsageError(f"{name}: encodes neither pictures nor texts")
    with _telling(f"{name}: weights() fails"):
        if not isinstance(made.weights(), str):
            raise UsageError(f"{name}: weights() gives {made.weights()!r}; it is to give a text that tells its version")
    if made.image_dim:
        from PIL import Image

        with _telling(f"{name}: preprocess cannot be sent to another process, a function of a module can"):
            pickle.dumps(made.preprocess)
        with _telling(f"{name}: fails on a picture"):
            pixels = np.stack([made.preprocess(Image.new("RGB", (40, 30), one)) for one in ("red", "blue")])
            if pixels.dtype != np.uint8 or pixels.ndim != 4:
                raise UsageError(f"{name}: preprocess gives {pixels.dtype} {pixels.shape[1:]}; give uint8 (H, W, 3)")
            shaped(made, "image", 2, made.encode_images(pixels))
    if made.text_dim:
        with _telling(f"{name}: tokenize cannot be sent to another process, a function of a module can"):
            pickle.dumps(made.tokenize)
        with _telling(f"{name}: fails on a text"):
            shaped(made, "text", 2, made.encode_texts(made.tokenize(["a dog", "a photo of a cat"])))
    found: Encoder = made
    return found


def shaped(encoder: Encoder, field: str, rows: int, vectors: Any) -> npt.NDArray[np.floating[Any]]:
    """Return vectors of an encoder as an array.

    Raises:
        UsageError: They are of another shape, and would be read as other rows.
    """
    found, shape = np.asarray(vectors), (rows, getattr(encoder, f"{field}_dim"))
    if found.shape != shape or found.dtype.kind != "f":
        raise UsageError(
            f"{encoder.name}: gives {found.dtype} {found.shape} for {rows} of its {field}s; an encoder gives float32 "
            f"{shape}"
        )
    return found


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Turn whatever somebody's own code raises into an error that says of what."""
    try:
        yield
    except ThresherError:
        raise
    except Exception as error:
        raise UsageError(f"{what} ({type(error).__name__}: {error})") from error
