"""Text encoders of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thresher.embedding.encoders.base import TorchKind, Towers, library, loading
from thresher.embedding.encoders.tokens import FastTokens, Foreign, Slow, twin
from thresher.embedding.encoders.transformers import local, quiet
from thresher.errors import UsageError


@dataclass(frozen=True)
class SentenceTransformers(TorchKind):
    """Text encoders of sentence-transformers."""

    name: ClassVar[str] = "sentence-transformers"
    form: ClassVar[str] = "sentence-transformers:NAME_OR_FOLDER"

    model: str = field(metadata={"help": "name on the hub, or a folder"})

    def towers(self) -> Towers:
        """Load the model; its default prompt, if it has one, is put before every text."""
        name, rest = self.spec, self.model
        library("torch", name)
        package = library("sentence_transformers", name)
        local(rest, name)
        with loading(name), quiet(library("transformers", name)):
            model = package.SentenceTransformer(rest, device="cpu").float()
            tokenizer = model.tokenizer
            prefix = (model.prompts or {}).get(model.default_prompt_name or "", "") or ""
            example = _own(model, ["a"], prefix)
            if prefix and not all(getattr(part, "include_prompt", True) for part in model):
                raise UsageError(f"{name}: excludes its prompt {prefix!r} from pooling, which is not supported")
            keys = {key: key for key in ("input_ids", "attention_mask", "token_type_ids") if key in example}
            if "attention_mask" not in keys or example.get("modality", "text") != "text":
                raise UsageError(f"{name}: is not a model for plain text")
            length = model.max_seq_length
            slow = Slow(tokenizer, padding=True, truncation=length is not None, max_length=length)
            original = Foreign(_Prefixed(slow, prefix), keys)
            tokenize = twin(
                lambda: FastTokens(tokenizer, names=keys, length=length, filled=False, prefix=prefix), original
            )
            for texts in (["a"], ["A Photo of two cats ", "x"]):
                own, ours = _own(model, texts, prefix), tokenize(texts)
                if any((own[key].numpy() != ours[key]).any() for key in keys):
                    raise UsageError(f"{name}: has a tokenizer of its own, which is not supported")
            dim = model.truncate_dim

            def text(tokens: Mapping[str, Any]) -> Any:
                return model({**tokens, "modality": "text"})["sentence_embedding"][:, :dim]

            return Towers(
                modules={"model": model},
                text=text,
                tokenize=tokenize,
                mask="attention_mask" if tokenizer.padding_side == "right" else None,
            )


def _own(model: Any, texts: list[str], prefix: str) -> Mapping[str, Any]:
    """Return the tokens that the model itself makes of texts."""
    if hasattr(model, "preprocess"):
        tokens: Mapping[str, Any] = model.preprocess(texts, prompt=prefix or None)
    else:  # before version 6
        tokens = model.tokenize([prefix + text for text in texts])
    return tokens


class _Prefixed:
    """Calls a tokenizer with a prompt before every text."""

    def __init__(self, call: Slow, prefix: str) -> None:
        self.call, self.prefix = call, prefix

    def __call__(self, texts: list[str]) -> Any:
        return self.call([self.prefix + text for text in texts])
