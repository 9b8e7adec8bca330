"""Image classifiers of torchvision: the input of their last layer."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thresher.embedding.encoders.base import TorchKind, Towers, library, loading, state_of
from thresher.embedding.preprocess import of_torchvision
from thresher.errors import UsageError, suggest


@dataclass(frozen=True)
class Torchvision(TorchKind):
    """The input of the last layer of torchvision's classifiers."""

    name: ClassVar[str] = "torchvision"
    form: ClassVar[str] = "torchvision:NAME/WEIGHTS"

    arch: str = field(metadata={"help": "name of a classifier"})
    weights: str = field(default="", metadata={"help": "torchvision's name of the weights, or a file"})

    def towers(self) -> Towers:
        """Load ``NAME/WEIGHTS``; WEIGHTS is torchvision's name of the weights, or a file."""
        name, arch, source = self.spec, self.arch, self.weights
        models = library("torchvision.models", name)
        known = models.list_models(module=models)
        if arch not in known:
            raise UsageError(
                f"{name}: torchvision has no classifier {arch!r}; type a name and its weights, such as "
                f"torchvision:resnet50/IMAGENET1K_V2.{suggest(arch, known)}"
            )
        enum = models.get_model_weights(arch)
        tags = sorted(enum.__members__)
        weights = enum.__members__.get(source)
        if weights is None and not os.path.isfile(source):
            raise UsageError(
                f"{name}: there is neither a file nor weights {source!r} of {arch}; type one of {', '.join(tags)}, or "
                f"the path of a file.{suggest(source, tags)}"
            )
        with loading(name):
            if weights is not None:
                # Fails on a file that is more than tensors: get_model() would unpickle it.
                weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
            model = models.get_model(arch, weights=weights)
            head, where = _head(name, model)
            if weights is None:
                _load(model, state_of(source, name), where, f"{name}: {source}")
            parent = model.get_submodule(where.rpartition(".")[0])
            setattr(parent, where.rpartition(".")[2], library("torch", name).nn.Identity())
            preset = (weights or enum.DEFAULT).transforms()
            return Towers(modules={"model": model}, image=model, preprocess=of_torchvision(preset))


def _head(name: str, model: Any) -> tuple[Any, str]:
    """Return the layer that classifies, and its name in the model."""
    linear = library("torch", name).nn.Linear
    layers = [(where, layer) for where, layer in model.named_modules() if isinstance(layer, linear)]
    layers = [(where, layer) for where, layer in layers if not where.startswith(("aux", "AuxLogits"))]
    if not layers:
        raise UsageError(f"{name}: has no linear classifier layer, so there are no features before it")
    return layers[-1][1], layers[-1][0]


def _load(model: Any, state: dict[str, Any], head: str, label: str) -> None:
    own = model.state_dict()
    rest = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
    missing = [key for key in own if key not in rest and not key.startswith(f"{head}.")]
    others = [key for key in rest if key not in own]
    if missing or others:
        wrong = [f"no {key}" for key in missing[:3]] + [f"an unknown {key}" for key in others[:3]]
        raise UsageError(f"{label} is of another model; it has {', '.join(wrong)}")
    model.load_state_dict(rest, strict=False)
