"""Pixels are those of the libraries' own transforms, for pictures of every shape."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from thresher.embedding.preprocess import Preprocess, of_open_clip, of_timm, of_torchvision, of_transformers
from thresher.errors import UsageError

MEAN, STD = (0.48, 0.45, 0.40), (0.27, 0.26, 0.28)

# Odd, tiny, wide, tall; a side of 1 only beside others that are small, as libraries make huge pictures of the rest.
SIZES = st.one_of(
    st.tuples(st.integers(1, 90), st.integers(1, 90)).filter(lambda size: max(size) < 25 * min(size)),
    st.sampled_from([(1, 1), (2, 1), (7, 300), (300, 11), (33, 32), (32, 33), (64, 64), (32, 32), (31, 31), (35, 47)]),
)


def picture(width: int, height: int) -> Image.Image:
    """Noise over a slope: no two pixels are alike, and a flip or a shift would show."""
    rng = np.random.default_rng(width * 1000 + height)
    slope = np.linspace(0, 155, width)[None, :, None] * np.ones((height, 1, 3)) * (1.0, 0.5, 0.2)
    return Image.fromarray((slope + rng.integers(0, 100, (height, width, 3))).astype(np.uint8))


def normalised(how: Preprocess, image: Image.Image) -> np.ndarray:
    pixels = how(image)
    assert pixels.shape == (how.height, how.width, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    return ((pixels / 255 - how.mean) / how.std).transpose(2, 0, 1)


def same(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, atol=1e-5)  # a 255th is more than a hundred times that


@given(
    size=SIZES,
    mode=st.sampled_from(["shortest", "longest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    side=st.sampled_from([32, 33, (32, 24), (20, 33)]),
    fill=st.sampled_from([0, 7]),
)
def test_open_clip(
    size: tuple[int, int], mode: str, interpolation: str, side: int | tuple[int, int], fill: int
) -> None:
    told = PreprocessCfg(side, "RGB", MEAN, STD, interpolation, mode, fill)
    if mode == "longest" and 0 in [round(value * np.min(side) / max(size)) for value in size]:
        return  # the library fails
    image = picture(*size)
    same(normalised(of_open_clip(vars(told)), image), image_transform_v2(told, is_train=False)(image).numpy())


@given(
    size=SIZES,
    mode=st.sampled_from(["center", "squash", "border"]),
    interpolation=st.sampled_from(["bicubic", "bilinear", "lanczos"]),
    sides=st.sampled_from([(32, 32), (33, 33), (32, 24)]),
    share=st.sampled_from([0.875, 0.9, 0.95, 1.0, 0.3]),
)
def test_timm(size: tuple[int, int], mode: str, interpolation: str, sides: tuple[int, int], share: float) -> None:
    told = {
        "input_size": (3, *sides), "crop_pct": share, "crop_mode": mode, "interpolation": interpolation,
        "mean": MEAN, "std": STD,
    }  # fmt: skip
    if mode == "border" and min(size) * min(sides) < max(size):
        return  # the library fails
    image = picture(*size)
    same(normalised(of_timm(told), image), timm.data.create_transform(**told, is_training=False)(image).numpy())


@given(size=SIZES, resize=st.sampled_from([32, 35, 40]), crop=st.sampled_from([32, 33, 45]))
def test_torchvision(size: tuple[int, int], resize: int, crop: int) -> None:
    preset = ImageClassification(crop_size=crop, resize_size=resize, interpolation=InterpolationMode.BICUBIC)
    image = picture(*size)
    same(normalised(of_torchvision(preset), image), preset(image).numpy())


PROCESSORS = [
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 33, "width": 30}, resample=2),
    BitImageProcessorPil(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32}, image_mean=MEAN),
    SiglipImageProcessorPil(size={"height": 32, "width": 24}),
    SiglipImageProcessorPil(size={"height": 31, "width": 31}, do_normalize=False),
]


@given(size=SIZES.filter(lambda size: min(size) > 4), at=st.integers(0, len(PROCESSORS) - 1))
def test_transformers(size: tuple[int, int], at: int) -> None:
    image = picture(*size)
    there = PROCESSORS[at](image, return_tensors="np")["pixel_values"][0]
    same(normalised(of_transformers(PROCESSORS[at].to_dict()), image), there)


def test_the_tensors_of_transformers_differ_by_little() -> None:
    """Its processors resize tensors by default, with rounding of their own."""
    image = picture(90, 70)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    there = processor(image, return_tensors="np")["pixel_values"][0].ravel()
    here = normalised(of_transformers(processor.to_dict()), image).ravel()
    assert here @ there / np.linalg.norm(here) / np.linalg.norm(there) > 1 - 1e-3


def test_what_transformers_can_do_and_we_cannot_is_refused() -> None:
    told = PROCESSORS[0].to_dict()
    with pytest.raises(UsageError, match="rescales by 1"):
        of_transformers({**told, "rescale_factor": 1.0})
    with pytest.raises(UsageError, match="longest_edge"):
        of_transformers({**told, "size": {"shortest_edge": 3, "longest_edge": 9}})
    with pytest.raises(UsageError, match="several sizes"):
        of_transformers({**told, "do_center_crop": False})
    uncut = of_transformers({**told, "do_resize": False})
    np.testing.assert_array_equal(uncut(picture(34, 36)), np.asarray(picture(34, 36))[2:34, 1:33])


def test_a_strip_is_refused_before_it_fills_the_memory() -> None:
    how = Preprocess(224, 224, (224, 224))
    with pytest.raises(ValueError, match="60000 x 1 would become 13440000 x 224"):
        how(Image.new("RGB", (60_000, 1)))


@pytest.mark.parametrize("wrong", [{"height": 0}, {"interpolation": "cubic"}, {"std": (1.0, 0.0, 1.0)}])
def test_nonsense_is_refused(wrong: dict) -> None:
    with pytest.raises(UsageError):
        Preprocess(**{"height": 8, "width": 8, "scaled": (8, 8), **wrong})


def test_it_is_sent_to_processes_that_have_no_torch(tmp_path) -> None:
    how = of_timm({"input_size": (3, 32, 32)})
    assert pickle.loads(pickle.dumps(how)) == how
    (tmp_path / "how").write_bytes(pickle.dumps(how))
    code = (
        "import pickle, sys\nfrom PIL import Image\n"
        f"how = pickle.load(open({str(tmp_path / 'how')!r}, 'rb'))\nprint(how(Image.new('RGB', (9, 5))).shape)\n"
        "print([name for name in ('torch', 'torchvision', 'timm', 'open_clip') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "(32, 32, 3)\n[]\n"
