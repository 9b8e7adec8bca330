"""Texts by sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thresher.embed.encoders.base import TorchKind, Towers, library, loading
from thresher.embed.encoders.tokens import FastTokens, Foreign, Slow, twin
from thresher.embed.encoders.transformers import local, quiet
from thresher.errors import UsageError


@dataclass(frozen=True)
class SentenceTransformers(TorchKind):
    """Texts by sentence-transformers."""

    name: ClassVar[str] = "sentence-transformers"
    form: ClassVar[str] = "sentence-transformers:NAME_OR_FOLDER"

    model: str = field(metadata={"help": "name on the hub, or a folder"})

    def towers(self) -> Towers:
        """Load the model; a prompt that is its default is put before every text."""
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
                raise UsageError(f"{name}: leaves its prompt {prefix!r} out of its mean, which cannot be done here")
            names = {key: key for key in ("input_ids", "attention_mask", "token_type_ids") if key in example}
            if "attention_mask" not in names or example.get("modality", "text") != "text":
                raise UsageError(f"{name}: is not a model of plain text")
            length = model.max_seq_length
            slow = Slow(tokenizer, padding=True, truncation=length is not None, max_length=length)
            original = Foreign(_Prefixed(slow, prefix), names)
            tokenize = twin(
                lambda: FastTokens(tokenizer, names=names, length=length, filled=False, prefix=prefix), original
            )
            for texts in (["a"], ["A Photo of two cats ", "x"]):
                own, found = _own(model, texts, prefix), tokenize(texts)
                if any((own[key].numpy() != found[key]).any() for key in names):
                    raise UsageError(f"{name}: makes tokens in a way of its own, which cannot be done here")
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
    """Return what a model makes of texts before it encodes them."""
    if hasattr(model, "preprocess"):
        found: Mapping[str, Any] = model.preprocess(texts, prompt=prefix or None)
    else:  # before version 6
        found = model.tokenize([prefix + text for text in texts])
    return found


class _Prefixed:
    """What calls a tokenizer with a prompt before every text."""

    def __init__(self, call: Slow, prefix: str) -> None:
        self.call, self.prefix = call, prefix

    def __call__(self, texts: list[str]) -> Any:
        return self.call([self.prefix + text for text in texts])
