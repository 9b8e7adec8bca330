"""Train on the samples of a dataset of the Hugging Face Hub that a selection keeps, streamed while it trains.

Type, for a dataset with images, captions and a column of keys:
    thresher embed hf://datasets/OWNER/NAME -o pool --encoder open_clip:ViT-B-32/openai
    thresher select density pool -o subset --keep 40%
    python examples/hub_stream.py OWNER/NAME subset
"""

import sys
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from thresher import Selection
from thresher.dynamic.loss import clip_losses

name, subset = sys.argv[1:]
stream = datasets.load_dataset(name, split="train", streaming=True).cast_column("image", datasets.Image())
kept = Selection.load(subset)
train = kept.filter(stream)  # the images of other samples are not decoded


def tensors(rows: dict[str, Any]) -> dict[str, Any]:
    """Small pixels, and captions as the numbers of their words."""
    images = [np.asarray(image.convert("RGB").resize((16, 16)), np.float32) / 255 for image in rows["image"]]
    words = [[sum(word.encode()) % 512 for word in text.split()][:8] for text in rows["text"]]
    return {"pixels": images, "words": [(line + [0] * 8)[:8] for line in words]}


torch.manual_seed(0)
towers = nn.ModuleList([nn.Sequential(nn.Flatten(), nn.Linear(768, 32)), nn.EmbeddingBag(512, 32)])
optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-2)
batches = train.map(tensors, batched=True, batch_size=16, remove_columns=stream.column_names).with_format("torch")
for epoch in range(3):
    seen = 0
    for batch in batches.batch(16):
        loss = clip_losses(towers[0](batch["pixels"]), towers[1](batch["words"]), 10.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(batch["pixels"])
    print(f"{epoch}: {seen:,} samples of {kept.total:,}, loss {loss:.3f}")
