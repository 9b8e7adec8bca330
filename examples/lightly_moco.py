"""MoCo v2 of lightly with Lightning, on some of the emoji images; lines for pruning are marked ``# new``."""

import copy
import io
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.moco_transform import MoCoV2Transform
from PIL import Image
from pyarrow import parquet
from torch import nn
from torch.utils.data import default_collate

from thresher.dynamic.loss import moco_v2_losses  # new: lightly's NTXentLoss returns only the mean
from thresher.dynamic.policies.scan import Scan  # new
from thresher.dynamic.sampler import PruningSampler  # new
from thresher.train.lightning import PruningCallback, PruningLoader  # new

files = sorted((Path(__file__).parent / "twemoji").glob("*.parquet"))
images = parquet.read_table(files, columns=["image"])["image"].to_pylist()[::4]
dataset = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in images]
transform = MoCoV2Transform(input_size=32, cj_strength=0.5)
policy = Scan.for_budget(0.2, 6, warmup=1)  # new: a fifth of all samples, over the whole run
sampler = PruningSampler(len(dataset), policy=policy, batch_size=128, epochs=6, drop_last=False)  # new


class MoCo(pl.LightningModule):  # noqa: D101
    def __init__(self, conv: list[nn.Module]) -> None:  # noqa: D107
        super().__init__()
        self.encoder = nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), MoCoProjectionHead(64, 128, 64))
        self.momentum = copy.deepcopy(self.encoder)
        deactivate_requires_grad(self.momentum)
        self.bank = MemoryBankModule(size=(512, 64), feature_dim_first=False)

    def training_step(self, batch: tuple[torch.Tensor, list[torch.Tensor]], batch_idx: int) -> torch.Tensor:  # noqa: D102
        update_momentum(self.encoder, self.momentum, m=0.99)
        rows, (x_query, x_key) = batch  # was x_query, x_key = batch
        query, key = self.encoder(x_query), nn.functional.normalize(self.momentum(x_key), dim=1)
        key, queue = self.bank(key, update=True)
        return sampler.reduce(rows, moco_v2_losses(query, key, queue, 0.2))  # was criterion(query, key)

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.SGD(self.encoder.parameters(), lr=0.06, momentum=0.9)


pl.seed_everything(0)
torch.set_num_threads(1)  # layers as small as these gain nothing from more
every: dict[str, Any] = {"reload_dataloaders_every_n_epochs": 1, "max_epochs": -1}  # new
quiet: dict[str, Any] = {f"enable_{part}": False for part in ("checkpointing", "progress_bar", "model_summary")}
pruning = PruningCallback(sampler)  # new
trainer = pl.Trainer(**every, use_distributed_sampler=False, callbacks=[pruning], devices=1, logger=False, **quiet)
model = MoCo([nn.Conv2d(3, 32, 4, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU()])
trainer.fit(model, PruningLoader(dataset, sampler, collate_fn=lambda batch: default_collate([*map(transform, batch)])))
for e in sampler.log():
    print(f"{e['epoch']} {e['phase']:11} {e['rows']:3} of {e['total']} rows, loss {e['loss']:.3f}")
print(f"{e['pruned_so_far']:.1%} of the samples pruned, in {trainer.global_step} steps")
