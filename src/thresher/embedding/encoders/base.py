"""Code shared by torch encoders: devices, precision, and running a batch through the model."""

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

from thresher.embedding.preprocess import Pixels, Preprocess
from thresher.errors import MissingExtraError, ThresherError, UsageError
from thresher.ops.vectors import F32
from thresher.runtime.parameters import recorded

if TYPE_CHECKING:
    import torch

    from thresher.embedding.encoders import Tokens

_SAMPLES = 8  # values of each parameter in the hash of the weights
_UNREACHED = ("OfflineMode", "LocalEntryNotFound", "Connect", "Timeout", "offline", "URLError")
_TEXTS = 512  # texts encoded together on a GPU, padded to the longest of them


@dataclass(frozen=True, eq=False, kw_only=True)
class Towers:
    """The image and text towers of a model, with their preprocessing.

    Attributes:
        modules: The torch modules by name, on the CPU, in float32.
        image: Encodes normalised float32 images (B, 3, H, W) as (B, D); None if the model does not encode images.
        text: Encodes int64 tokens (B, T) by name as (B, D); None if the model does not encode texts.
        preprocess: See :class:`thresher.embedding.encoders.Encoder`.
        tokenize: See :class:`thresher.embedding.encoders.Encoder`.
        mask: Name of the attention mask among the tokens, 1 for tokens and 0 for padding at the end: texts of similar
            length are then encoded together. None if all texts have the same length.
        images_at_once: Images that one thread encodes together on a CPU; a fixed number, so that vectors do not depend
            on the number of threads.
        texts_at_once: The same for texts.
        hashed: Other values that the hash of the weights depends on.
        weights: The hash of the weights, for modules that were computed and so depend on the rounding of the machine;
            "" to compute it from the modules.
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
    """An :class:`thresher.embedding.encoders.Encoder` of torch modules.

    ``images`` and ``texts`` do the same as ``encode_images`` and ``encode_texts``, but leave the result on the device:
    on CUDA they return before it is computed, so that the next batch can be prepared at the same time.
    """

    def __init__(self, name: str, towers: Towers, device: str, precision: str) -> None:
        """Move the modules to a device returned by :func:`resolved`, and run them once to get their dimensions."""
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
            UsageError: The encoder does not encode images, or the pixels do not have the shape and type that its
                ``preprocess`` returns.
        """
        torch = library("torch", self.name)
        preprocess, image = self.preprocess, self._towers.image
        if preprocess is None or image is None:
            raise UsageError(f"{self.name} does not encode images")
        if pixels_BHWC.dtype != np.uint8 or pixels_BHWC.shape[1:] != (preprocess.height, preprocess.width, 3):
            raise UsageError(
                f"{self.name}: pixels are {pixels_BHWC.dtype} {pixels_BHWC.shape}; "
                f"give uint8 (B, {preprocess.height}, {preprocess.width}, 3)"
            )
        if not len(pixels_BHWC):
            return torch.empty((0, self.image_dim), device=self.device)
        at_once = self._towers.images_at_once if self.device.type == "cpu" else len(pixels_BHWC)

        def part(lo: int) -> Any:
            with torch.inference_mode(), self._autocast():
                # Permuted (B, H, W, 3) pixels are in torch's channels_last format already: nothing is copied.
                batch = self._on_device(pixels_BHWC[lo : lo + at_once]).permute(0, 3, 1, 2)
                batch = torch.addcmul(self._shift, batch.float(), self._scale)
                return image(batch if self._convolves else batch.contiguous()).float()

        return self._joined(part, range(0, len(pixels_BHWC), at_once))

    def texts(self, tokens: Tokens) -> torch.Tensor:
        """Return (B, text_dim) float32 on the device.

        Raises:
            UsageError: The encoder does not encode texts.
        """
        torch = library("torch", self.name)
        text, mask = self._towers.text, self._towers.mask
        if text is None:
            raise UsageError(f"{self.name} does not encode texts")
        rows = len(next(iter(tokens.values())))
        if not rows:
            return torch.empty((0, self.text_dim), device=self.device)
        at_once = self._towers.texts_at_once if self.device.type == "cpu" else _TEXTS
        lengths_B = None if mask is None else np.asarray(tokens[mask]).astype(bool).sum(axis=1)
        # The longest first, so that no thread starts the largest part when the others are done.
        order_B = np.arange(rows) if lengths_B is None else np.argsort(-lengths_B, kind="stable")

        def part(lo: int) -> Any:
            here = order_B[lo : lo + at_once]
            longest = None if lengths_B is None else max(int(lengths_B[here[0]]), 1)
            with torch.inference_mode(), self._autocast():
                return text(self._tokens({name: array[here, :longest] for name, array in tokens.items()})).float()

        vectors = self._joined(part, range(0, rows, at_once))
        return vectors if lengths_B is None else vectors[self._on_device(np.argsort(order_B))]

    def weights(self) -> str:
        """Return a hash of a few values of each parameter, of the preprocessing of images, and of ``hashed``."""
        return self._hash

    def _joined(self, part: Callable[[int], torch.Tensor], starts: range) -> torch.Tensor:
        """Call ``part`` with each start and return the results in order, as one tensor.

        On a CPU every part runs on one thread of a pool. torch itself splits each operation between all threads, which
        then wait for each other at every layer; that is slow when other processes use the same cores.
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
                count = torch.get_num_threads()
                ready = Barrier(count)

                def use_one_thread() -> None:
                    torch.set_num_threads(1)
                    torch.get_num_threads()  # initialises this thread; else its first operation would reset the number
                    ready.wait(60)

                pool = ThreadPoolExecutor(count, "encode", initializer=use_one_thread)
                list(pool.map(lambda _: None, range(count)))
                torch.set_num_threads(count)  # the pool's threads have set it to 1 for threads started later
                self._pool = pool
            return self._pool

    def _tokens(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        return {name: self._on_device(np.asarray(array, np.int64)) for name, array in tokens.items()}

    def _on_device(self, array: np.ndarray[Any, Any]) -> Any:
        """Return an array on the device; on CUDA through pinned memory, so that the copy is asynchronous."""
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
        autocast: contextlib.AbstractContextManager[Any] = torch.autocast(
            self.device.type, dtype=getattr(torch, self.precision)
        )
        return autocast


class TorchKind:
    """Base class of the kinds of torch encoders; each is a frozen dataclass that derives from it.

    Attributes:
        name: Name of the kind, the text before the colon.
        extra: The extra of thresher that installs the library.
    """

    name: ClassVar[str]
    extra: ClassVar[str] = "embed"

    @property
    def spec(self) -> str:
        """The text that selects it: the name, a colon, and the fields that are not empty."""
        rest = "/".join(value for value in recorded(self).values() if value)
        return f"{self.name}:{rest}" if rest else self.name

    def towers(self) -> Towers:
        """Load the model on the CPU, in float32.

        Raises:
            UsageError: The weights do not exist, or cannot be loaded.
            MissingExtraError: The library is not installed.
        """
        raise NotImplementedError

    def load(self, device: str = "auto", precision: str = "auto") -> TorchEncoder:
        """Load the encoder; see :func:`thresher.embedding.encoders.make_encoder`."""
        device, precision = resolved(device, precision, self.spec, self.extra)
        return TorchEncoder(self.spec, self.towers(), device, precision)


def resolved(device: str, precision: str, what: str = "embedding", extra: str = "embed") -> tuple[str, str]:
    """Return the device and precision with "auto" resolved.

    Args:
        device: See :func:`thresher.embedding.encoders.make_encoder`.
        precision: See :func:`thresher.embedding.encoders.make_encoder`.
        what: What needs torch, for the error if it is not installed.
        extra: The extra of thresher that installs torch.

    Raises:
        UsageError: This machine does not have the device.
        MissingExtraError: torch is not installed.
    """
    torch = library("torch", what, extra)
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    kind, colon, number = device.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps)}
    if kind not in counts or (colon and (kind != "cuda" or not number.isdecimal())):
        raise UsageError(f"device {device!r}; allowed: auto, cpu, cuda, cuda:N, mps")
    if int(number or 0) >= counts[kind]:
        raise UsageError(f"device {device!r}: this machine has {counts[kind]} of that kind; type auto or cpu")
    if precision == "auto":
        precision = "float16" if kind == "cuda" else "float32"
    return device, precision


def fingerprint(towers: Towers) -> str:
    """Return a hash of weights and preprocessing, 16 hexadecimal digits, the same on every device."""
    parts = {repr((towers.preprocess, towers.hashed)).encode()}
    for module in towers.modules.values():
        for value in module.state_dict().values():
            if value.is_floating_point():  # others are positions and counters, which differ between versions
                flat = value.detach().reshape(-1)
                places = sorted({int(place) for place in np.linspace(0, max(len(flat) - 1, 0), _SAMPLES)})[: len(flat)]
                parts.add(repr(tuple(value.shape)).encode() + flat[places].double().cpu().numpy().tobytes())
    # Names are left out: a library may rename its layers in another version.
    return hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in sorted(parts))).hexdigest()[:16]


def library(name: str, what: str, extra: str = "embed") -> Any:
    """Import a package.

    Raises:
        MissingExtraError: It is not installed; ``what`` needs it, and ``extra`` of thresher installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtraError(what, extra) from None


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn any exception of a library into a UsageError with the name of the encoder that is being loaded."""
    try:
        yield
    except (ThresherError, MemoryError):
        raise
    except Exception as error:
        hint = ""
        if any(word in _chain(error) for word in _UNREACHED):
            hint = "; not in the local cache and cannot be downloaded: connect to a network, or give a path"
        text = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{name} cannot be loaded ({text[:300]}){hint}") from error


def _chain(error: BaseException | None) -> str:
    """Return the types and messages of an error and of its causes."""
    texts: list[str] = []
    while error is not None and len(texts) < 20:
        texts.append(f"{type(error).__name__} {error}")
        error = error.__cause__ or error.__context__
    return " ".join(texts)


def state_of(path: str, name: str) -> dict[str, Any]:
    """Return the tensors of a checkpoint file; nothing in it is executed.

    Raises:
        UsageError: The file does not exist, or contains anything other than tensors.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{name}: there is no file {path}")
    with loading(name):
        if path.lower().endswith(".safetensors"):
            state = library("safetensors.torch", name).load_file(path)
        else:
            state = library("torch", name).load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    torch = library("torch", name)
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{name}: {path} is not a checkpoint of one model's weights")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def _numpy(vectors: torch.Tensor) -> F32:
    array: F32 = vectors.cpu().numpy()
    return array
