"""Encoders by name: what turns pictures and captions into vectors.

``make_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k")`` is all there is to call. Every kind of encoder is a frozen
dataclass in a module of its own here, with its name as the class attribute ``name``, what follows the colon as fields,
and ``load(device, precision) -> Encoder``; what those of torch share is in :mod:`thresher.embed.encoders.base`. Another
package offers one, or any class or function that makes an encoder, by an entry point of the group
``thresher.encoders``. Importing these modules loads no library: that is done by ``load``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from thresher.embed.preprocess import Pixels
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


class EncoderKind(Protocol):
    """A frozen dataclass that says which encoder is meant, and loads it."""

    name: ClassVar[str]

    def load(self, device: str, precision: str) -> Encoder:
        """Load the encoder; ``device`` and ``precision`` are as :func:`make_encoder` takes them."""
        ...


@dataclass(frozen=True)
class _Called:
    """Any class or function that makes an encoder, as a kind: it is called with what follows the colon, if anything."""

    rest: str = field(default="", metadata={"help": "handed on as it is"})

    name: ClassVar[str]
    make: ClassVar[Callable[..., Any]]

    def load(self, device: str, precision: str) -> Encoder:
        """Call it."""
        made: Encoder = self.make(*((self.rest,) if self.rest else ()), device=device, precision=precision)
        return made


def as_kind(name: str, offered: Any) -> type[EncoderKind]:
    """Return what another package or a user offers as a kind of encoder: as it is, or called where it is none yet.

    Raises:
        UsageError: It cannot be called.
    """
    if isinstance(offered, type) and is_dataclass(offered) and hasattr(offered, "load"):
        kind: Any = offered
        return kind  # type: ignore[no-any-return]
    if not callable(offered):
        raise UsageError(f"{offered!r} makes no encoder: it is neither a class nor a function")
    more = {"name": name, "make": staticmethod(offered), "__module__": getattr(offered, "__module__", __name__)}
    return type(name, (_Called,), more)


ENCODERS: PluginPoint[EncoderKind] = PluginPoint(
    "encoder", "thresher.embed.encoders", "thresher.encoders", needs=("load",), adapt=as_kind
)


@dataclass(frozen=True)
class Spec:
    """An encoder asked for: ``kind`` is a kind of encoder or a module; ``rest`` is what follows its colon."""

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
    known = ENCODERS.names()
    starts = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    parts = re.split(rf"\+(?=(?:{starts})(?::|\+|$)|{_DOTTED.pattern}:)", spec.strip())[:: 1 + _DOTTED.groups]
    if len(parts) > 2:
        raise UsageError(f"{spec!r} names {len(parts)} encoders; give one, or one of pictures + one of texts")
    return tuple(_one(part, known) for part in parts)


def _one(text: str, known: set[str]) -> Spec:
    kind, _, rest = text.partition(":")
    named = rest and _DOTTED.fullmatch(kind) and _DOTTED.fullmatch(rest)
    if kind in known or (named and _found(kind)):
        return Spec(kind, rest)
    every = ENCODERS.all()
    if kind in every:  # another package's, whose entry point has another name
        return Spec(kind, rest)
    if named:
        raise UsageError(
            f"no encoder {text!r}: no module {kind} is found, in the current folder or installed.{suggest(kind, every)}"
        )
    raise UsageError(
        f"no encoder {text!r}; there are {', '.join(form_of(cls) for cls in every.values())}, two of them joined by +, "
        f"or your own as package.module:Name.{suggest(kind, every)}"
    )


def form_of(cls: type[EncoderKind]) -> str:
    """Return how a kind is typed, as errors and documentation show it: ``open_clip:ARCH/PRETRAINED``."""
    names = [] if issubclass(cls, _Called) else [item.name.upper() for item in parameters_of(cls)]
    return getattr(cls, "form", f"{cls.name}:{'/'.join(names)}" if names else cls.name)


def kind_of(cls: type[EncoderKind], rest: str) -> EncoderKind:
    """Make a kind of encoder from what follows its colon.

    A class may read it by a classmethod ``parse(rest) -> dict`` of its fields. Otherwise it is cut at the first slashes
    into as many parts as there are fields, and parts that are empty are left out.

    Raises:
        UsageError: A field that is missing, or a value that is not allowed; says how the kind is typed.
    """
    items = parameters_of(cls)
    if not items and rest:
        raise UsageError(f"'{cls.name}:{rest}': {cls.name} has no variants; type {cls.name}")
    if not rest and any(is_required(item) for item in items):
        raise UsageError(f"{cls.name!r} does not say which model; type {form_of(cls)}")
    read = getattr(cls, "parse", None)
    if read is not None:
        given = read(rest)
    else:
        parts = rest.split("/", len(items) - 1) if items else []
        given = {item.name: part for item, part in zip(items, parts, strict=False) if part}
    return build(cls, f"{cls.name}:{rest}", {name: _typed(type_of(cls, name), text) for name, text in given.items()})


def _typed(kind: Any, text: str) -> Any:
    """Return text as the number that a field wants, or as it is, to be refused."""
    kind = without_none(kind)
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def _found(module: str) -> bool:
    """Return whether a module can be imported, perhaps from the current folder."""
    with _current_folder(module):
        try:
            return importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):  # a package above it is not there, or was hidden on purpose
            return False


@contextmanager
def importable(spec: str) -> Iterator[None]:
    """Let the modules that ``spec`` names be imported from the current folder while the block runs.

    An installed command does not look there. Processes that are started meanwhile find them too. Afterwards
    ``sys.path`` is as it was.
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
    sys.path.append(here)
    try:
        yield
    finally:
        with suppress(ValueError):  # the module may have removed it itself
            sys.path.remove(here)


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
    with importable(spec):
        kinds = [_kind(part) for part in parts]
        made = [_loaded(kind, part.name, device, precision) for kind, part in zip(kinds, parts, strict=True)]
    if len(made) == 2:
        from thresher.embed.encoders.joined import joined

        return joined(*made)
    return made[0]


def _kind(spec: Spec) -> EncoderKind:
    if spec.kind in ENCODERS.names() or not spec.rest or not _found(spec.kind):
        return kind_of(ENCODERS.find(spec.kind), spec.rest)
    with _telling(f"{spec.name}: the module {spec.kind} cannot be imported"):
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
    from thresher.embed.encoders.base import TorchEncoder, TorchKind

    if isinstance(kind, TorchKind):  # its own errors say what is wrong
        return kind.load(device, precision)
    with _telling(f"{name}: cannot be made"):
        made = kind.load(device, precision)
    return made if isinstance(made, TorchEncoder) else checked(made, name)


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
