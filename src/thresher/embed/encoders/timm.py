"""Pictures by the models of timm: DINOv2, ResNet, ConvNeXt ...; what they make before they classify."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thresher.embed.encoders.base import TorchKind, Towers, library, loading
from thresher.embed.preprocess import of_timm
from thresher.errors import UsageError, suggest

_HEADS = ("head.", "fc.", "classifier.")
_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class Timm(TorchKind):
    """Pooled features of the models of timm."""

    name: ClassVar[str] = "timm"
    form: ClassVar[str] = "timm:NAME or timm:NAME/path/to/weights"

    model: str = field(metadata={"help": "name of a model, hf-hub:ORG/NAME or local-dir:FOLDER"})
    weights: str = field(default="", metadata={"help": "file of weights; by default those that timm knows"})

    @classmethod
    def parse(cls, rest: str) -> dict[str, str]:
        """Split at the first slash, but for names of other sources."""
        model, _, weights = (rest, "", "") if rest.startswith(_SOURCES) else rest.partition("/")
        return {"model": model, "weights": weights}

    def towers(self) -> Towers:
        """Load ``NAME``, ``NAME/path/to/weights``, ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``: pooled features."""
        name, found, path = self.spec, self.model, self.weights
        timm = library("timm", name)
        if not found.startswith(_SOURCES) and not timm.is_model(found):
            raise UsageError(
                f"{name}: timm has no model {found!r}; type a name such as timm:vit_small_patch14_dinov2.lvd142m, "
                f"timm:NAME/path/to/weights or timm:hf-hub:ORG/NAME.{suggest(found, timm.list_models(pretrained=True))}"
            )
        if not path and not found.startswith(_SOURCES) and not timm.models.is_model_pretrained(found):
            raise UsageError(
                f"{name}: timm knows no weights for it, and random ones embed nothing; type {name}/path/to/weights"
            )
        with loading(name):
            model = timm.create_model(found, pretrained=not path, num_classes=0)
            if path:
                _load(timm, model, path, name)
            found_config = timm.data.resolve_data_config({}, model=model)
            return Towers(modules={"model": model}, image=model, preprocess=of_timm(found_config))


def _load(timm: Any, model: Any, path: str, name: str) -> None:
    """Load a file into a model without a head; only those of heads may be left over."""
    try:
        state = timm.models.load_state_dict(path, weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{name}: there is no file {path}") from None
    # Weights as they were first published (DINOv2's own, for one) go by other names.
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rename is not None:
        state = rename(state, model)
    given = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = (*_HEADS, *(f"{head}." for head in ([given] if isinstance(given, str) else given)))
    wanted = set(model.state_dict())
    left = model.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)
    others = [key for key in state if key not in wanted and not key.startswith(heads)]
    if left.missing_keys or others:
        told = [f"no {key}" for key in left.missing_keys[:3]] + [f"an unknown {key}" for key in others[:3]]
        raise UsageError(f"{name}: {path} is of another model; it has {', '.join(told)}")
