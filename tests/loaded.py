"""The trainer of open_clip in tests: what its own pipeline loads, a tiny model, and its loggers put back."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


def loaded(tars: Sequence[Path], tokenize: Any = lambda text: [text]) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Key, pixels and tokens of every sample that open_clip trains on; by default the caption instead of tokens."""
    import webdataset as wds
    from open_clip_train.data import get_wds_dataset

    from thresher.train.open_clip import insert_stage, stages_of

    args = Namespace(
        train_data="::".join(map(str, tars)), val_data=None, train_num_samples=1, val_num_samples=None,
        dataset_resampled=False, train_data_upsampling_factors=None, seed=0, workers=1, batch_size=1, world_size=1,
        rank=0,
    )  # fmt: skip
    info = get_wds_dataset(args, lambda image: np.asarray(image), is_train=True, tokenizer=tokenize)
    stages = stages_of(info.dataloader)
    insert_stage(stages, lambda samples: iter(samples), ids=False)  # only for webdataset's markers of where tars end
    at = next(i for i, stage in enumerate(stages) if getattr(stage, "args", None) == ("image", "text"))
    for sample in wds.DataPipeline(*stages[:at]):
        yield sample["__key__"], sample["image"], sample["text"]


def keys_loaded(tars: Sequence[Path]) -> list[str]:
    """The keys that open_clip trains on, sorted."""
    return sorted(key for key, _, _ in loaded(tars))


def tiny_model(folder: Path) -> str:
    """Write the config of a model of few parameters, nearly all token embeddings, and return its ``--model``."""
    folder.mkdir(exist_ok=True)
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip adds handlers to the root logger and sets the level of all: put back what was."""
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    levels, handlers = [logger.level for logger in loggers], list(logging.root.handlers)
    try:
        yield
    finally:
        for handler in [handler for handler in logging.root.handlers if handler not in handlers]:
            logging.root.removeHandler(handler)
            handler.close()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
