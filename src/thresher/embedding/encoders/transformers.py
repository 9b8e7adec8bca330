"""CLIP, SigLIP and DINOv2 of Hugging Face transformers, by their name on the hub or from a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thresher.embedding.encoders.base import TorchKind, Towers, library, loading
from thresher.embedding.encoders.tokens import FastTokens, Foreign, Slow, twin
from thresher.embedding.preprocess import of_transformers
from thresher.errors import UsageError


@dataclass(frozen=True)
class Transformers(TorchKind):
    """CLIP, SigLIP and DINOv2 from Hugging Face."""

    name: ClassVar[str] = "transformers"
    form: ClassVar[str] = "transformers:NAME_OR_FOLDER"

    model: str = field(metadata={"help": "name on the hub, or a folder"})

    def towers(self) -> Towers:
        """Load a model with ``get_image_features`` and ``get_text_features``, or a model for images only.

        For an image-only model (DINOv2) the vector is the first token, CLS, of the last hidden state.
        """
        name, rest = self.spec, self.model
        transformers = library("transformers", name)
        torch = library("torch", name)
        local(rest, name)
        safe = {"trust_remote_code": False}  # else transformers asks on the terminal whether to run the model's code
        with loading(name), quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(rest, **safe)
            if config.model_type == "siglip2":
                raise UsageError(
                    f"{name}: takes images of any shape (NaFlex), which is not supported; type a model with a "
                    "fixed image size, such as transformers:google/siglip2-base-patch16-224"
                )
            model, info = transformers.AutoModel.from_pretrained(
                rest, dtype=torch.float32, output_loading_info=True, **safe
            )
            joint = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
            missing = sorted(key for key in info["missing_keys"] if joint or not key.startswith("pooler."))
            if missing:
                raise UsageError(f"{name}: its weights do not contain {', '.join(missing[:3])}, which would be random")
            processor = transformers.AutoImageProcessor.from_pretrained(rest, **safe)
            preprocess = of_transformers(processor.to_dict())
            if not joint:
                return Towers(
                    modules={"model": model},
                    image=lambda image: model(pixel_values=image).last_hidden_state[:, 0],
                    preprocess=preprocess,
                )
            tokenizer = transformers.AutoTokenizer.from_pretrained(rest, **safe)
            names = {key: key for key in tokenizer.model_input_names if key in ("input_ids", "attention_mask")}
            filled = config.model_type.startswith("siglip")  # trained on padded texts without an attention mask
            names = {"input_ids": "input_ids"} if filled else names
            length = int(config.text_config.max_position_embeddings)
            slow = Slow(tokenizer, padding="max_length" if filled else True, truncation=True, max_length=length)
            return Towers(
                modules={"model": model},
                image=lambda image: pooled(model.get_image_features(pixel_values=image)),
                text=lambda tokens: pooled(model.get_text_features(**tokens)),
                preprocess=preprocess,
                tokenize=twin(
                    lambda: FastTokens(tokenizer, names=names, length=length, filled=filled), Foreign(slow, names)
                ),
                mask="attention_mask" if "attention_mask" in names and tokenizer.padding_side == "right" else None,
            )


def pooled(output: Any) -> Any:
    """Return the features; newer versions return an object that has them as a field."""
    return getattr(output, "pooler_output", output)


def local(rest: str, name: str) -> None:
    """Raise UsageError for a path whose folder does not exist: transformers would look for it on the hub."""
    if rest.startswith(("/", "./", "../", "~")) and not os.path.isdir(rest):
        raise UsageError(f"{name}: there is no folder {rest}")


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Hide the progress bar while weights are loaded."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
