"""Image models of timm (DINOv2, ResNet, ConvNeXt, ...): the features before the classifier."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thresher.embedding.encoders.base import TorchKind, Towers, library, loading
from thresher.embedding.preprocess import of_timm
from thresher.errors import UsageError, suggest

_HEADS = ("head.", "fc.", "classifier.")
_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class Timm(TorchKind):
    """Pooled features of the models of timm."""

    name: ClassVar[str] = "timm"
    form: ClassVar[str] = "timm:NAME or timm:NAME/path/to/weights"

    model: str = field(metadata={"help": "name of a model, hf-hub:ORG/NAME or local-dir:FOLDER"})
    weights: str = field(default="", metadata={"help": "file of weights; by default the pretrained ones of timm"})

    @classmethod
    def parse(cls, rest: str) -> dict[str, str]:
        """Split at the first slash, except for hf-hub: and local-dir: names."""
        model, _, weights = (rest, "", "") if rest.startswith(_SOURCES) else rest.partition("/")
        return {"model": model, "weights": weights}

    def towers(self) -> Towers:
        """Load ``NAME``, ``NAME/path/to/weights``, ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``."""
        name, arch, path = self.spec, self.model, self.weights
        timm = library("timm", name)
        if not arch.startswith(_SOURCES) and not timm.is_model(arch):
            raise UsageError(
                f"{name}: timm has no model {arch!r}; type a name such as timm:vit_small_patch14_dinov2.lvd142m, "
                f"timm:NAME/path/to/weights or timm:hf-hub:ORG/NAME.{suggest(arch, timm.list_models(pretrained=True))}"
            )
        if not path and not arch.startswith(_SOURCES) and not timm.models.is_model_pretrained(arch):
            raise UsageError(
                f"{name}: timm has no pretrained weights for it, and random weights are useless; type "
                f"{name}/path/to/weights"
            )
        with loading(name):
            model = timm.create_model(arch, pretrained=not path, num_classes=0)
            if path:
                _load(timm, model, path, name)
            config = timm.data.resolve_data_config({}, model=model)
            return Towers(modules={"model": model}, image=model, preprocess=of_timm(config))


def _load(timm: Any, model: Any, path: str, name: str) -> None:
    """Load a file of weights into a model without a head; only weights of a head may be unused."""
    try:
        state = timm.models.load_state_dict(path, weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{name}: there is no file {path}") from None
    # Weights as first published (DINOv2's, for example) have other names.
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rename is not None:
        state = rename(state, model)
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = (*_HEADS, *(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier)))
    wanted = set(model.state_dict())
    result = model.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)
    others = [key for key in state if key not in wanted and not key.startswith(heads)]
    if result.missing_keys or others:
        wrong = [f"no {key}" for key in result.missing_keys[:3]] + [f"an unknown {key}" for key in others[:3]]
        raise UsageError(f"{name}: {path} is of another model; it has {', '.join(wrong)}")
