"""Tars as the trainer of open_clip loads them: its own pipeline, in order, without repeats."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
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
