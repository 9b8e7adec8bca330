"""CLIP, SigLIP and DINOv2 from Hugging Face, by their name there or from a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thresher.embed.encoders.base import TorchKind, Towers, library, loading
from thresher.embed.encoders.tokens import FastTokens, Foreign, Slow, twin
from thresher.embed.preprocess import of_transformers
from thresher.errors import UsageError


@dataclass(frozen=True)
class Transformers(TorchKind):
    """CLIP, SigLIP and DINOv2 from Hugging Face."""

    name: ClassVar[str] = "transformers"
    form: ClassVar[str] = "transformers:NAME_OR_FOLDER"

    model: str = field(metadata={"help": "name on the hub, or a folder"})

    def towers(self) -> Towers:
        """Load a model with ``get_image_features`` and ``get_text_features``, or one of pictures alone.

        Of one of pictures alone (DINOv2) the vector is the first token, CLS, of the last hidden state.
        """
        name, rest = self.spec, self.model
        transformers = library("transformers", name)
        torch = library("torch", name)
        local(rest, name)
        safe = {"trust_remote_code": False}  # else a terminal is asked whether to run what lies there
        with loading(name), quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(rest, **safe)
            if config.model_type == "siglip2":
                raise UsageError(
                    f"{name}: takes pictures of any shape (NaFlex), which cannot be done here; type one of a fixed "
                    "size, such as transformers:google/siglip2-base-patch16-224"
                )
            model, told = transformers.AutoModel.from_pretrained(
                rest, dtype=torch.float32, output_loading_info=True, **safe
            )
            joint = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
            missing = sorted(key for key in told["missing_keys"] if joint or not key.startswith("pooler."))
            if missing:
                raise UsageError(f"{name}: its weights lack {', '.join(missing[:3])}, which would be random")
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
            filled = config.model_type.startswith("siglip")  # trained on texts that were filled up, without a mask
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


def pooled(found: Any) -> Any:
    """Return the features, which newer versions return as a field of an output."""
    return getattr(found, "pooler_output", found)


def local(rest: str, name: str) -> None:
    """Refuse what looks like a folder and is none: it would be looked for on the hub."""
    if rest.startswith(("/", "./", "../", "~")) and not os.path.isdir(rest):
        raise UsageError(f"{name}: there is no folder {rest}")


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Show no bar while weights are loaded."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
