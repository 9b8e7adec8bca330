"""CLIP, SigLIP and the other models of open_clip."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from thresher.dynamic.run_folder import CHECKPOINT, MARK
from thresher.embedding.encoders.base import TorchKind, Towers, library, loading, state_of
from thresher.embedding.encoders.tokens import ClipTokens, FastTokens, Foreign, twin
from thresher.embedding.preprocess import of_open_clip
from thresher.errors import UsageError, suggest

_SOURCES = ("local-dir:", "hf-hub:")  # names that open_clip resolves itself
_CLEAN = {"_clean_lower": "lower", "_clean_whitespace": "whitespace", "_clean_canonicalize": "canonicalize"}


@dataclass(frozen=True)
class OpenClip(TorchKind):
    """CLIP, SigLIP and the other models of open_clip."""

    name: ClassVar[str] = "open_clip"

    arch: str = field(
        metadata={"help": "a configuration of open_clip, a .json file of one, local-dir:FOLDER or hf-hub:ORG/NAME"}
    )
    pretrained: str = field(default="", metadata={"help": "a tag, a file of weights, or the folder of a training run"})

    @classmethod
    def parse(cls, rest: str) -> dict[str, str]:
        """Split after the first .json path, otherwise at the first slash."""
        if rest.startswith(_SOURCES):
            return {"arch": rest}
        config = re.match(r"(.*?\.json)(?:/(.*))?$", rest)
        arch, _, pretrained = rest.partition("/")
        return (
            {"arch": config[1], "pretrained": config[2] or ""} if config else {"arch": arch, "pretrained": pretrained}
        )

    def towers(self) -> Towers:
        """Load ``ARCH/PRETRAINED``, ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``.

        ARCH is a configuration of open_clip or a .json file of one; PRETRAINED is a tag, a file of weights, or the
        folder of a training run of that architecture.
        """
        name, arch, pretrained = self.spec, self.arch, self.pretrained
        open_clip = library("open_clip", name)
        if arch.startswith(_SOURCES):
            with loading(name):
                model = open_clip.create_model(arch, require_pretrained=True)
                return _towers(open_clip, model, open_clip.get_tokenizer(arch))
        if arch.endswith(".json"):
            if not os.path.isfile(arch):
                raise UsageError(f"{name}: there is no configuration file {arch}")
            with loading(name):
                open_clip.add_model_config(arch)
            arch = Path(arch).stem
        known = open_clip.list_models()
        if arch not in known:
            raise UsageError(
                f"{name}: open_clip has no architecture {arch!r}; type open_clip:ARCH/PRETRAINED, such as "
                f"open_clip:ViT-B-32/laion2b_s34b_b79k, or open_clip:CONFIG.json/PRETRAINED.{suggest(arch, known)}"
            )
        tags = open_clip.list_pretrained_tags_by_model(arch)
        choice = f"give a file of weights, or a tag of {arch}: {', '.join(tags) or 'there are none'}"
        if not pretrained:
            raise UsageError(f"{name}: without weights the embeddings would be random; {choice}")
        run = Path(pretrained) / MARK
        if not os.path.isfile(pretrained) and not run.is_file() and not open_clip.get_pretrained_cfg(arch, pretrained):
            raise UsageError(
                f"{name}: there is neither a tag nor a file {pretrained!r}; {choice}.{suggest(pretrained, tags)}"
            )
        with loading(name):
            if run.is_file():
                with _loaded_below():
                    model = open_clip.create_model(arch, load_weights=False, pretrained_text=False)
                model.load_state_dict(state_of(str(run.with_name(CHECKPOINT)), name))
            else:
                model = open_clip.create_model(arch, pretrained=pretrained, require_pretrained=True)
            return _towers(open_clip, model, open_clip.get_tokenizer(arch))


@contextmanager
def _loaded_below() -> Iterator[None]:
    """Drop the warning of open_clip that a model has random weights: they are loaded right after it is made."""

    def keep(record: logging.LogRecord) -> bool:
        return "initialized randomly" not in str(record.msg)

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


def _towers(open_clip: Any, model: Any, tokenizer: Any) -> Towers:
    clean: Any = _CLEAN.get(getattr(getattr(tokenizer, "clean_fn", None), "__name__", ""), "")
    original = Foreign(tokenizer)

    def make() -> Any:
        if hasattr(tokenizer, "bpe_ranks"):
            return ClipTokens(tokenizer, clean)
        names = {"tokens": "input_ids"}
        return FastTokens(tokenizer.tokenizer, names=names, length=tokenizer.context_length, filled=True, clean=clean)

    return Towers(
        modules={"model": model},
        image=model.encode_image,
        text=lambda tokens: model.encode_text(tokens["tokens"]),
        preprocess=of_open_clip(open_clip.get_model_preprocess_cfg(model)),
        tokenize=twin(make, original),
    )
