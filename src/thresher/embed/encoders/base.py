"""What encoders made of torch modules share: devices, precision, the way of a batch there and back."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier, Lock
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from thresher.embed.preprocess import Pixels, Preprocess
from thresher.errors import MissingExtraError, ThresherError, UsageError
from thresher.ops.vectors import F32
from thresher.runtime.parameters import recorded

if TYPE_CHECKING:
    import torch

    from thresher.embed.encoders import Tokens

_SAMPLES = 8  # values of each parameter that the hash of the weights looks at
_UNREACHED = ("OfflineMode", "LocalEntryNotFound", "Connect", "Timeout", "offline", "URLError")
_TEXTS = 512  # that go through a GPU together, all as long as the longest of them


@dataclass(frozen=True, eq=False, kw_only=True)
class Towers:
    """What a library gives: how it encodes, and what is done before.

    Attributes:
        modules: The torch modules by name, on the CPU, in float32.
        image: (B, 3, H, W) normalised float32 pictures to (B, D); None without pictures.
        text: Named (B, T) int64 tokens to (B, D); None without texts.
        preprocess: See :class:`thresher.embed.encoders.Encoder`.
        tokenize: Likewise.
        mask: Which of the tokens says by 1 where a text goes on, by 0 where it was filled up at its end: texts of
            like lengths are then encoded together. None where every text is as long.
        images_at_once: Pictures that go through the model together on a CPU, a thread having them to itself; a
            fixed number, so that no vector depends on how many threads there are.
        texts_at_once: Likewise of texts.
        hashed: What else the hash of the weights is of.
        weights: The hash, where it is not to be of the modules: they may have been computed, with the rounding of
            the machine.
    """

    modules: Mapping[str, Any]
    image: Callable[[torch.Tensor], torch.Tensor] | None = None
    text: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] | None = None
    preprocess: Preprocess | None = None
    tokenize: Callable[[Sequence[str]], Tokens] | None = None
    mask: str | None = None
    images_at_once: int = 4
    texts_at_once: int = 32
    hashed: tuple[Any, ...] = ()
    weights: str = ""


class TorchEncoder:
    """An :class:`thresher.embed.encoders.Encoder` of torch modules.

    ``images`` and ``texts`` do what ``encode_images`` and ``encode_texts`` do and leave the result on the device: on
    CUDA they return before it is computed, so that the next batch can be prepared meanwhile.
    """

    def __init__(self, name: str, towers: Towers, device: str, precision: str) -> None:
        """Move the modules to a device that :func:`resolved` has given, and try them."""
        torch = library("torch", name)
        self.name, self.device, self.precision = name, torch.device(device), precision
        self.preprocess, self.tokenize = towers.preprocess, towers.tokenize
        self._towers, self._hash = towers, towers.weights or fingerprint(towers)
        self._pool: ThreadPoolExecutor | None = None
        self._making = Lock()
        self._convolves = self.device.type in ("cpu", "cuda")
        for module in towers.modules.values():
            module.eval().requires_grad_(False)
            module.to(self.device)
            if self._convolves:
                module.to(memory_format=torch.channels_last)
        if self.preprocess is not None:
            std = torch.tensor(self.preprocess.std)[:, None, None]
            mean = torch.tensor(self.preprocess.mean)[:, None, None]
            self._scale, self._shift = (1 / (255 * std)).to(self.device), (-mean / std).to(self.device)
        self.image_dim = self.text_dim = 0
        with loading(name):
            if self.preprocess is not None:
                blank = np.zeros((1, self.preprocess.height, self.preprocess.width, 3), np.uint8)
                self.image_dim = int(self.images(blank).shape[1])
            if self.tokenize is not None:
                self.text_dim = int(self.texts(self.tokenize(["a"])).shape[1])

    def encode_images(self, pixels_BHWC: Pixels) -> F32:
        """Return (B, image_dim) float32 of (B, H, W, 3) uint8 pixels."""
        return _numpy(self.images(pixels_BHWC))

    def encode_texts(self, tokens: Tokens) -> F32:
        """Return (B, text_dim) float32 of (B, T) tokens."""
        return _numpy(self.texts(tokens))

    def images(self, pixels_BHWC: Pixels) -> torch.Tensor:
        """Return (B, image_dim) float32 on the device.

        Raises:
            UsageError: The encoder has no pictures, or these are not what its ``preprocess`` makes.
        """
        torch = library("torch", self.name)
        how, image = self.preprocess, self._towers.image
        if how is None or image is None:
            raise UsageError(f"{self.name} encodes no pictures")
        if pixels_BHWC.dtype != np.uint8 or pixels_BHWC.shape[1:] != (how.height, how.width, 3):
            raise UsageError(
                f"{self.name}: pixels {pixels_BHWC.dtype} {pixels_BHWC.shape}; "
                f"give uint8 (B, {how.height}, {how.width}, 3)"
            )
        if not len(pixels_BHWC):
            return torch.empty((0, self.image_dim), device=self.device)
        at_once = self._towers.images_at_once if self.device.type == "cpu" else len(pixels_BHWC)

        def part(lo: int) -> Any:
            with torch.inference_mode(), self._autocast():
                # Pixels lie colour by colour at each place, which is how torch calls channels_last: no copy is made.
                found = self._moved(pixels_BHWC[lo : lo + at_once]).permute(0, 3, 1, 2)
                found = torch.addcmul(self._shift, found.float(), self._scale)
                return image(found if self._convolves else found.contiguous()).float()

        return self._joined(part, range(0, len(pixels_BHWC), at_once))

    def texts(self, tokens: Tokens) -> torch.Tensor:
        """Return (B, text_dim) float32 on the device.

        Raises:
            UsageError: The encoder has no texts.
        """
        torch = library("torch", self.name)
        text, mask = self._towers.text, self._towers.mask
        if text is None:
            raise UsageError(f"{self.name} encodes no texts")
        rows = len(next(iter(tokens.values())))
        if not rows:
            return torch.empty((0, self.text_dim), device=self.device)
        at_once = self._towers.texts_at_once if self.device.type == "cpu" else _TEXTS
        lengths_B = None if mask is None else np.asarray(tokens[mask]).astype(bool).sum(axis=1)
        # The longest first: where threads share the work, none is left with the most of it in the end.
        order_B = np.arange(rows) if lengths_B is None else np.argsort(-lengths_B, kind="stable")

        def part(lo: int) -> Any:
            here = order_B[lo : lo + at_once]
            longest = None if lengths_B is None else max(int(lengths_B[here[0]]), 1)
            with torch.inference_mode(), self._autocast():
                return text(self._tokens({name: array[here, :longest] for name, array in tokens.items()})).float()

        found = self._joined(part, range(0, rows, at_once))
        return found if lengths_B is None else found[self._moved(np.argsort(order_B))]

    def weights(self) -> str:
        """Return a hash of a few values of each parameter, of what is done to pictures, and of whatever else counts."""
        return self._hash

    def _joined(self, part: Callable[[int], torch.Tensor], starts: range) -> torch.Tensor:
        """Return what ``part`` makes of each start, in order.

        On a CPU every part has a thread to itself. torch would rather share each of its products between all threads,
        which then wait for each other at every layer - for long, where other processes need the cores too.
        """
        torch = library("torch", self.name)
        threads = min(torch.get_num_threads(), len(starts)) if self.device.type == "cpu" else 1
        if threads == 1:
            parts = [part(lo) for lo in starts]
        else:
            parts = list(self._threads().map(part, starts))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _threads(self) -> ThreadPoolExecutor:
        torch = library("torch", self.name)
        with self._making:
            if self._pool is None:
                many = torch.get_num_threads()
                ready = Barrier(many)

                def alone() -> None:
                    torch.set_num_threads(1)
                    torch.get_num_threads()  # settles it for this thread; else the first product would look again
                    ready.wait(60)

                pool = ThreadPoolExecutor(many, "encode", initializer=alone)
                list(pool.map(lambda _: None, range(many)))
                torch.set_num_threads(many)  # the threads told theirs to those that are yet to come
                self._pool = pool
            return self._pool

    def _tokens(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        return {name: self._moved(np.asarray(array, np.int64)) for name, array in tokens.items()}

    def _moved(self, array: np.ndarray[Any, Any]) -> Any:
        """Return an array on the device; on CUDA through pinned memory, so that nobody waits for it."""
        torch = library("torch", self.name)
        if self.device.type == "cuda":
            pinned = torch.empty(array.shape, dtype=getattr(torch, array.dtype.name), pin_memory=True)
            pinned.numpy()[...] = array
            return pinned.to(self.device, non_blocking=True)
        array = np.ascontiguousarray(array)
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        torch = library("torch", self.name)
        if self.precision == "float32":
            return contextlib.nullcontext()
        found: contextlib.AbstractContextManager[Any] = torch.autocast(
            self.device.type, dtype=getattr(torch, self.precision)
        )
        return found


class TorchKind:
    """What kinds of encoders made of torch modules have in common; a frozen dataclass of a library derives from it.

    Attributes:
        name: The kind, the part before the colon.
        extra: The extra of thresher that installs the library.
    """

    name: ClassVar[str]
    extra: ClassVar[str] = "embed"

    @property
    def spec(self) -> str:
        """What is typed for it: the name, and after a colon the fields that are not empty."""
        rest = "/".join(value for value in recorded(self).values() if value)
        return f"{self.name}:{rest}" if rest else self.name

    def towers(self) -> Towers:
        """Load the model on the CPU, in float32.

        Raises:
            UsageError: There are no such weights, or they cannot be loaded.
            MissingExtraError: The library is not installed.
        """
        raise NotImplementedError

    def load(self, device: str = "auto", precision: str = "auto") -> TorchEncoder:
        """Load the encoder; see :func:`thresher.embed.encoders.make_encoder`."""
        place = resolved(device, precision, self.spec, self.extra)
        return TorchEncoder(self.spec, self.towers(), *place)


def resolved(device: str, precision: str, what: str = "embedding", extra: str = "embed") -> tuple[str, str]:
    """Return the device and precision that are meant; ``what`` needs them, and ``extra`` of thresher installs torch.

    Raises:
        UsageError: There is no such device here.
        MissingExtraError: torch is not installed.
    """
    torch = library("torch", what, extra)
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    kind, colon, number = device.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps)}
    if kind not in there or (colon and (kind != "cuda" or not number.isdecimal())):
        raise UsageError(f"device {device!r}; allowed: auto, cpu, cuda, cuda:N, mps")
    if int(number or 0) >= there[kind]:
        raise UsageError(f"device {device!r}: this machine has {there[kind]} of that kind; type auto or cpu")
    if precision == "auto":
        precision = "float16" if kind == "cuda" else "float32"
    return device, precision


def fingerprint(towers: Towers) -> str:
    """Return 16 hexadecimal digits that tell weights and preparation from others, the same on every device."""
    told = {repr((towers.preprocess, towers.hashed)).encode()}
    for module in towers.modules.values():
        for value in module.state_dict().values():
            if value.is_floating_point():  # others are positions and counters, which come and go with versions
                flat = value.detach().reshape(-1)
                places = sorted({int(place) for place in np.linspace(0, max(len(flat) - 1, 0), _SAMPLES)})[: len(flat)]
                told.add(repr(tuple(value.shape)).encode() + flat[places].double().cpu().numpy().tobytes())
    # Names do not count: a library may call its layers otherwise in its next version.
    return hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in sorted(told))).hexdigest()[:16]


def library(name: str, what: str, extra: str = "embed") -> Any:
    """Import a package, or say which extra has it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtraError(what, extra) from None


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Make one error with the encoder's name of whatever a library raises while a model is loaded."""
    try:
        yield
    except (ThresherError, MemoryError):
        raise
    except Exception as error:
        hint = ""
        if any(word in _chain(error) for word in _UNREACHED):
            hint = "; not in the local cache, nor to be fetched: fetch it where there is a network, or give a path"
        told = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{name} cannot be loaded ({told[:300]}){hint}") from error


def _chain(error: BaseException | None) -> str:
    """Return the kinds and messages of an error and of those that led to it."""
    told: list[str] = []
    while error is not None and len(told) < 20:
        told.append(f"{type(error).__name__} {error}")
        error = error.__cause__ or error.__context__
    return " ".join(told)


def state_of(path: str, name: str) -> dict[str, Any]:
    """Return the tensors of a checkpoint file; nothing in it is executed.

    Raises:
        UsageError: There is no such file, or it holds something else than tensors.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{name}: there is no file {path}")
    with loading(name):
        if path.endswith(".safetensors"):
            found = library("safetensors.torch", name).load_file(path)
        else:
            found = library("torch", name).load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    torch = library("torch", name)
    if not isinstance(found, dict) or not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UsageError(f"{name}: {path} is not a checkpoint of one model's weights")
    if all(key.startswith("module.") for key in found):
        found = {key.removeprefix("module."): value for key, value in found.items()}
    return dict(found)


def _numpy(found: torch.Tensor) -> F32:
    array: F32 = found.cpu().numpy()
    return array
