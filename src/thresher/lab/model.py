"""The model that ``thresher evaluate`` names, as an encoder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from thresher.dynamic.run_folder import MARK
from thresher.embedding.encoders import make_encoder
from thresher.errors import UsageError
from thresher.io.listing import natural

if TYPE_CHECKING:
    from thresher.embedding.encoders import Encoder

PARAMS, CHECKPOINTS = "params.txt", "checkpoints"
_MODEL = re.compile(r"^model: (\S+)$", re.MULTILINE)
_BYTES = 2**20


def spec_of(model: str) -> str:
    """Return the name of the encoder of a model.

    Args:
        model: The name of an encoder, as ``thresher embed`` takes it; the folder of a run of ``thresher train``; or the
            log folder of the trainer of open_clip, with ``params.txt`` and ``checkpoints``, of which the last epoch is
            taken.

    Raises:
        UsageError: A folder is neither of these.
    """
    folder = Path(model)
    if not folder.is_dir():
        if os.path.isfile(model):
            raise UsageError(
                f"{model}: weights alone do not say their architecture; type open_clip:ARCH/{model} or "
                f"timm:NAME/{model}"
            )
        return model
    saved = sorted((folder / CHECKPOINTS).glob("epoch_*.pt"), key=lambda path: natural(path.name))
    if (folder / PARAMS).is_file() and saved:
        with (folder / PARAMS).open("rb") as file:
            found = _MODEL.search(file.read(_BYTES).decode("utf-8", "replace"))
        if found is None:
            raise UsageError(f"{folder / PARAMS}: has no line 'model: NAME'; type open_clip:ARCH/{saved[-1]}")
        return f"open_clip:{found[1]}/{saved[-1]}"
    if (folder / MARK).is_file():
        return f"run:{model}"
    raise UsageError(
        f"{model}: is neither the folder of a run of thresher train ({MARK}) nor of open_clip ({PARAMS}, "
        f"{CHECKPOINTS}); type the name of an encoder, such as open_clip:ViT-B-32/laion2b_s34b_b79k"
    )


def load_model(model: str, *, device: str = "auto", precision: str = "float32") -> Encoder:
    """Load a model, see :func:`spec_of`; precision is float32 unless asked for, so that metrics are comparable."""
    return make_encoder(spec_of(model), device=device, precision=precision)
