"""Encoders by name: models that turn images and captions into vectors.

``make_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k")`` is the only function to call. Every kind of encoder is a frozen
dataclass in a module of its own here: its name is the class attribute ``name``, its fields are the options after the
colon, and ``load(device, precision)`` returns an :class:`Encoder`. Code shared by torch encoders is in
:mod:`thresher.embedding.encoders.base`. Another package offers a kind, or any class or function that returns an
encoder, by an entry point of the group ``thresher.encoders``. Importing these modules loads no library; ``load`` does
that.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from thresher.embedding.preprocess import Pixels
from thresher.errors import ThresherError, UsageError, suggest
from thresher.ops.vectors import F32
from thresher.runtime.parameters import build, is_required, parameters_of, type_of, without_none
from thresher.runtime.plugins import PluginPoint

if TYPE_CHECKING:
    from PIL import Image

Tokens = Mapping[str, npt.NDArray[np.integer[Any]]]

PRECISIONS = ("auto", "float32", "bfloat16", "float16")

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class Encoder(Protocol):
    """A model that encodes images, texts, or both as vectors.

    Images and texts are preprocessed in other processes than the one that encodes: ``preprocess`` and ``tokenize``
    must be picklable, and should not need torch.

    Attributes:
        name: The name it was loaded by, such as "open_clip:ViT-B-32/laion2b_s34b_b79k".
        image_dim: Dimensions of its image vectors, 0 if it does not encode images.
        text_dim: Dimensions of its text vectors, 0 if it does not encode texts.
        preprocess: Converts an upright 8-bit RGB image of PIL to pixels, (H, W, 3) uint8; None if it does not encode
            images.
        tokenize: Converts B texts to integer arrays by name, (B, T) each; T may differ between calls. None if it does
            not encode texts.
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
        """Return vectors, (B, image_dim) float32, not normalised, of the pixels of B images."""
        ...

    def encode_texts(self, tokens: Tokens) -> F32:
        """Return vectors, (B, text_dim) float32, not normalised, of the tokens of B texts."""
        ...

    def weights(self) -> str:
        """Return a short hash of the weights: a pool never gets vectors of other weights."""
        ...


class EncoderKind(Protocol):
    """A frozen dataclass that describes an encoder and loads it."""

    name: ClassVar[str]

    def load(self, device: str, precision: str) -> Encoder:
        """Load the encoder; ``device`` and ``precision`` are as :func:`make_encoder` takes them."""
        ...


@dataclass(frozen=True)
class _Called:
    """Wraps a class or function that returns an encoder: it is called with the text after the colon, if any."""

    rest: str = field(default="", metadata={"help": "passed on unchanged"})

    name: ClassVar[str]
    make: ClassVar[Callable[..., Any]]

    def load(self, device: str, precision: str) -> Encoder:
        """Call the class or function."""
        encoder: Encoder = self.make(*((self.rest,) if self.rest else ()), device=device, precision=precision)
        return encoder


def as_kind(name: str, offered: Any) -> type[EncoderKind]:
    """Return the encoder kind of an object that another package or a user offers: the object itself, or a wrapper.

    Raises:
        UsageError: It cannot be called.
    """
    if isinstance(offered, type) and is_dataclass(offered) and hasattr(offered, "load"):
        kind: Any = offered
        return kind  # type: ignore[no-any-return]
    if not callable(offered):
        raise UsageError(f"{offered!r} is not an encoder: it is neither a class nor a function")
    more = {"name": name, "make": staticmethod(offered), "__module__": getattr(offered, "__module__", __name__)}
    return type(name, (_Called,), more)


ENCODERS: PluginPoint[EncoderKind] = PluginPoint(
    "encoder", "thresher.embedding.encoders", "thresher.encoders", needs=("load",), adapt=as_kind
)


@dataclass(frozen=True)
class Spec:
    """A requested encoder: ``kind`` is a kind of encoder or a module; ``rest`` is the text after the colon."""

    kind: str
    rest: str

    @property
    def name(self) -> str:
        """The text it was parsed from."""
        return f"{self.kind}:{self.rest}" if self.rest else self.kind


def parse(spec: str) -> tuple[Spec, ...]:
    """Return the one encoder of ``spec``, or the two of ``A+B``.

    A plus sign separates two encoders only if the text after it begins like the name of an encoder, because file names
    may contain a plus sign.

    Raises:
        UsageError: There is no such encoder; the message lists what there is.
    """
    known = ENCODERS.names()
    starts = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    parts = re.split(rf"\+(?=(?:{starts})(?::|\+|$)|{_DOTTED.pattern}:)", spec.strip())[:: 1 + _DOTTED.groups]
    if len(parts) > 2:
        raise UsageError(f"{spec!r} names {len(parts)} encoders; give one, or one for images + one for texts")
    return tuple(_one(part, known) for part in parts)


def _one(text: str, known: set[str]) -> Spec:
    kind, _, rest = text.partition(":")
    named = rest and _DOTTED.fullmatch(kind) and _DOTTED.fullmatch(rest)
    if kind in known or (named and _importable(kind)):
        return Spec(kind, rest)
    every = ENCODERS.all()
    if kind in every:  # from another package, under an entry point with another name
        return Spec(kind, rest)
    if named:
        raise UsageError(
            f"no encoder {text!r}: no module {kind} in the current folder or installed.{suggest(kind, every)}"
        )
    raise UsageError(
        f"no encoder {text!r}; allowed: {', '.join(form_of(cls) for cls in every.values())}, two of them joined by +, "
        f"or your own as package.module:Name.{suggest(kind, every)}"
    )


def form_of(cls: type[EncoderKind]) -> str:
    """Return the form of a kind as errors and documentation show it: ``open_clip:ARCH/PRETRAINED``."""
    names = [] if issubclass(cls, _Called) else [item.name.upper() for item in parameters_of(cls)]
    return getattr(cls, "form", f"{cls.name}:{'/'.join(names)}" if names else cls.name)


def kind_of(cls: type[EncoderKind], rest: str) -> EncoderKind:
    """Make a kind of encoder from the text after the colon.

    A class may parse it with a classmethod ``parse(rest)`` that returns a dictionary of its fields. Otherwise the text
    is split at the first slashes into as many parts as there are fields; empty parts are ignored.

    Raises:
        UsageError: A field is missing, or a value is not allowed; the message shows the form to type.
    """
    items = parameters_of(cls)
    if not items and rest:
        raise UsageError(f"'{cls.name}:{rest}': {cls.name} has no variants; type {cls.name}")
    if not rest and any(is_required(item) for item in items):
        raise UsageError(f"{cls.name!r} does not name a model; type {form_of(cls)}")
    read = getattr(cls, "parse", None)
    if read is not None:
        values = read(rest)
    else:
        parts = rest.split("/", len(items) - 1) if items else []
        values = {item.name: part for item, part in zip(items, parts, strict=False) if part}
    return build(cls, f"{cls.name}:{rest}", {name: _typed(type_of(cls, name), text) for name, text in values.items()})


def _typed(kind: Any, text: str) -> Any:
    """Return text as a number if the field is one; text that is not a number is returned unchanged, to be refused."""
    kind = without_none(kind)
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def _importable(module: str) -> bool:
    """Return whether a module can be imported, from the current folder too."""
    with _current_folder(module):
        try:
            return importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):  # its parent package does not exist, or is None in sys.modules
            return False


@contextmanager
def importable(spec: str) -> Iterator[None]:
    """Make modules that ``spec`` names importable from the current folder while the block runs.

    An installed command does not have that folder in ``sys.path``, which stays as it is.
    """
    with ExitStack() as stack:
        for part in parse(spec):
            stack.enter_context(_current_folder(part.kind))
        yield


@contextmanager
def _current_folder(module: str) -> Iterator[None]:
    here, top = os.getcwd(), module.split(".")[0]
    if here in sys.path or not any(os.path.exists(os.path.join(here, top + ending)) for ending in (".py", "")):
        yield
        return
    finder = _Finder(here)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Finds the modules of a folder that are found nowhere else."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [self._folder]) if path is None else None


def make_encoder(spec: str, *, device: str = "auto", precision: str = "auto") -> Encoder:
    """Load an encoder.

    Args:
        spec: "KIND:NAME", see ``docs/encoders.md``: open_clip, timm, torchvision, transformers, sentence-transformers,
            conse, the name of an entry point of the group ``thresher.encoders``, or your own "package.module:Name";
            "A+B" encodes images with A and texts with B.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" or "mps".
        precision: Precision of the computation: "float32", "bfloat16" or "float16"; "auto" is float16 on CUDA, else
            float32. Vectors are always float32.

    Raises:
        UsageError: The encoder, its weights or the device does not exist, or the encoder cannot be loaded.
        MissingExtraError: The library is not installed.
    """
    parts = parse(spec)
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}; allowed: {', '.join(PRECISIONS)}.{suggest(precision, PRECISIONS)}")
    with importable(spec):
        kinds = [_kind(part) for part in parts]
        encoders = [_loaded(kind, part.name, device, precision) for kind, part in zip(kinds, parts, strict=True)]
    if len(encoders) == 2:
        from thresher.embedding.encoders.joined import joined

        return joined(*encoders)
    return encoders[0]


def _kind(spec: Spec) -> EncoderKind:
    if spec.kind in ENCODERS.names() or not spec.rest or not _importable(spec.kind):
        return kind_of(ENCODERS.find(spec.kind), spec.rest)
    with _errors_as(f"{spec.name}: the module {spec.kind} cannot be imported"):
        module = importlib.import_module(spec.kind)
    try:
        offered: Any = module
        for name in spec.rest.split("."):
            offered = getattr(offered, name)
    except AttributeError:
        close = suggest(spec.rest, (name for name in vars(module) if not name.startswith("_")))
        raise UsageError(f"{spec.name}: {spec.kind} has no {spec.rest}.{close}") from None
    return kind_of(as_kind(spec.name, offered), "")


def _loaded(kind: EncoderKind, name: str, device: str, precision: str) -> Encoder:
    from thresher.embedding.encoders.base import TorchEncoder, TorchKind

    if isinstance(kind, TorchKind):  # its errors already say what is wrong
        return kind.load(device, precision)
    with _errors_as(f"{name}: cannot be loaded"):
        encoder = kind.load(device, precision)
    return encoder if isinstance(encoder, TorchEncoder) else checked(encoder, name)


def checked(candidate: Any, name: str) -> Encoder:
    """Return a user's encoder after a check on two images and two texts.

    Raises:
        UsageError: An attribute is missing, a call fails, or an array has another shape or type than it should have.
    """
    wanted = ("name", "image_dim", "text_dim", "preprocess", "tokenize", "encode_images", "encode_texts", "weights")
    missing = [item for item in wanted if not hasattr(candidate, item)]
    if missing:
        raise UsageError(f"{name}: the encoder has no {', '.join(missing)}; it must have {', '.join(wanted)}")
    for dim, prepare in (("image_dim", "preprocess"), ("text_dim", "tokenize")):
        if bool(getattr(candidate, dim)) != (getattr(candidate, prepare) is not None):
            raise UsageError(
                f"{name}: {dim} is {getattr(candidate, dim)!r} and {prepare} is {getattr(candidate, prepare)!r}; "
                f"{prepare} must be None if and only if {dim} is 0"
            )
    if not candidate.image_dim and not candidate.text_dim:
        raise UsageError(f"{name}: encodes neither images nor texts")
    with _errors_as(f"{name}: weights() fails"):
        if not isinstance(candidate.weights(), str):
            raise UsageError(
                f"{name}: weights() returns {candidate.weights()!r}; return a str that identifies the version"
            )
    if candidate.image_dim:
        from PIL import Image

        with _errors_as(f"{name}: preprocess cannot be pickled for other processes; use a function of a module"):
            pickle.dumps(candidate.preprocess)
        with _errors_as(f"{name}: fails on an image"):
            pixels = np.stack([candidate.preprocess(Image.new("RGB", (40, 30), one)) for one in ("red", "blue")])
            if pixels.dtype != np.uint8 or pixels.ndim != 4:
                raise UsageError(
                    f"{name}: preprocess returns {pixels.dtype} {pixels.shape[1:]}; return uint8 (H, W, 3)"
                )
            shaped(candidate, "image", 2, candidate.encode_images(pixels))
    if candidate.text_dim:
        with _errors_as(f"{name}: tokenize cannot be pickled for other processes; use a function of a module"):
            pickle.dumps(candidate.tokenize)
        with _errors_as(f"{name}: fails on a text"):
            shaped(candidate, "text", 2, candidate.encode_texts(candidate.tokenize(["a dog", "a photo of a cat"])))
    encoder: Encoder = candidate
    return encoder


def shaped(encoder: Encoder, field: str, rows: int, vectors: Any) -> npt.NDArray[np.floating[Any]]:
    """Return vectors of an encoder as an array.

    Raises:
        UsageError: The shape is not (rows, dimensions), or the type is not a float.
    """
    array, shape = np.asarray(vectors), (rows, getattr(encoder, f"{field}_dim"))
    if array.shape != shape or array.dtype.kind != "f":
        raise UsageError(
            f"{encoder.name}: returns {array.dtype} {array.shape} for {rows} {field}s; it must return float32 {shape}"
        )
    return array


@contextmanager
def _errors_as(what: str) -> Iterator[None]:
    """Turn any exception of a user's code into a UsageError that begins with ``what``."""
    try:
        yield
    except ThresherError:
        raise
    except Exception as error:
        raise UsageError(f"{what} ({type(error).__name__}: {error})") from error
