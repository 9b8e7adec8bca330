"""A plain PyTorch loop over the images and captions of the emoji pool; lines for pruning are marked ``# new``.

Type: python examples/plain_loop.py
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pyarrow import parquet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thresher import open_store
from thresher.dynamic.loss import clip_losses
from thresher.dynamic.policies.scan import Scan  # new
from thresher.dynamic.sampler import PruningSampler, with_rows  # new

files = sorted((Path(__file__).parent / "twemoji").glob("*.parquet"))
images = parquet.read_table(files, columns=["image"])["image"].to_pylist()
pictures = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB").resize((16, 16))) for image in images]
pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() / 255
store = open_store(str(files[0].parent))
captions = torch.from_numpy(store.vectors_at("text", np.arange(len(store))))  # text embeddings
dataset = TensorDataset(pixels, captions)

torch.manual_seed(0)
torch.set_num_threads(1)  # layers as small as these gain nothing from more
conv = [nn.Conv2d(3, 32, 4, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(), nn.Flatten()]
towers = nn.ModuleList([nn.Sequential(*conv, nn.Linear(576, 64)), nn.Linear(256, 64)])
optimizer = torch.optim.AdamW(towers.parameters(), lr=2e-3)

epochs = 10
policy = Scan.for_budget(0.25, epochs)  # new: a quarter of all samples, over the whole run
sampler = PruningSampler(len(dataset), policy=policy, batch_size=256, epochs=epochs)  # new
loader = DataLoader(with_rows(dataset), batch_sampler=sampler)  # was DataLoader(dataset, batch_size=256, shuffle=True)
for _ in range(sampler.epoch, sampler.epochs):  # was range(epochs)
    for rows, (image, text) in loader:  # was for image, text in loader
        losses = clip_losses(towers[0](image), towers[1](text), 20.0)  # (B, 2): one per sample and direction
        loss = sampler.reduce(rows, losses)  # was losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    e = sampler.log()[-1]
    print(f"{e['epoch']} {e['phase']:11} {e['rows']:5,} of {e['total']:,} rows, loss {e['loss']:.3f}")
print(f"{e['pruned_so_far']:.1%} of the samples pruned, in {sampler.total_steps()} steps")

with torch.no_grad():
    similar = nn.functional.normalize(towers[0](pixels)) @ nn.functional.normalize(towers[1](captions)).T
    better = (similar > similar.diagonal()[:, None]).sum(1)
print(f"caption among the best 5 of {len(better):,}: {(better < 5).float().mean():.1%}")
