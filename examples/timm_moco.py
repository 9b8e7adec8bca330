"""MoCo v2 in a plain loop with timm's loader, on some of the emoji; lines for pruning are marked ``# new``.

Type: python examples/timm_moco.py
"""

import copy
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pyarrow import parquet
from torch import nn
from torch.nn.functional import normalize

from thresher.dynamic.loss import moco_v2_losses
from thresher.dynamic.policies.scan import Scan  # new
from thresher.dynamic.sampler import PruningSampler  # new
from thresher.train.timm_loader import pruning_loader  # new: was timm.data.create_loader

files = sorted((Path(__file__).parent / "twemoji").glob("*.parquet"))
images = parquet.read_table(files, columns=["image"])["image"].to_pylist()[::8]


class Emoji:
    """A dataset as those of timm: items (image, target), with a transform that the loader sets."""

    transform: Any = None

    def __len__(self) -> int:  # noqa: D105
        return len(images)

    def __getitem__(self, row: int) -> tuple[Any, int]:  # noqa: D105
        return self.transform(Image.open(io.BytesIO(images[row]["bytes"])).convert("RGB")), 0


torch.manual_seed(0)
torch.set_num_threads(1)  # layers as small as these gain nothing from more
conv = [nn.Conv2d(3, 32, 4, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU()]
encoder = nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64))
momentum = copy.deepcopy(encoder).requires_grad_(False)
queue = normalize(torch.randn(512, 64))
optimizer = torch.optim.SGD(encoder.parameters(), lr=0.03, momentum=0.9)

epochs = 6
policy = Scan.for_budget(0.2, epochs, warmup=1)  # new: a fifth of all samples, over the whole run
sampler = PruningSampler(len(images), policy=policy, batch_size=64, epochs=epochs, drop_last=False)  # new
how: dict[str, Any] = {"num_workers": 0, "scale": (0.4, 1.0), "grayscale_prob": 0.2, "color_jitter": 0.0}
loader = pruning_loader(Emoji(), sampler, 32, views=2, **how)
for _ in range(sampler.epoch, sampler.epochs):  # was range(epochs)
    for rows, (views, _targets) in loader:  # was for views, _targets in loader
        with torch.no_grad():
            for slow, fast in zip(momentum.parameters(), encoder.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
        one, two = views.chunk(2)
        query, key = encoder(one), normalize(momentum(two))
        loss = sampler.reduce(rows, moco_v2_losses(query, key, queue, 0.2))  # was the mean of these losses
        queue = torch.cat([key, queue])[: len(queue)]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    e = sampler.log()[-1]
    print(f"{e['epoch']} {e['phase']:11} {e['rows']:3} of {e['total']} rows, loss {e['loss']:.3f}")
print(f"{e['pruned_so_far']:.1%} of the samples pruned, in {sampler.total_steps()} steps")
