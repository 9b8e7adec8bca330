"""A loop with Hugging Face accelerate over the embeddings of the emoji pool; lines for pruning are marked ``# new``.

Type: python examples/accelerate_loop.py
On two processes: accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thresher import open_store
from thresher.dynamic.loss import clip_losses
from thresher.dynamic.policies.scan import Scan  # new
from thresher.dynamic.sampler import PruningSampler, with_rows  # new

store = open_store(str(Path(__file__).parent / "twemoji"))
rows_N = np.arange(len(store))
dataset = TensorDataset(*(torch.from_numpy(store.vectors_at(name, rows_N)) for name in ("image", "text")))


class Towers(nn.Module):
    """One layer for images and one for captions, in one module as DistributedDataParallel needs it."""

    def __init__(self) -> None:  # noqa: D107
        super().__init__()
        self.image, self.text = (nn.Linear(tensor.shape[1], 64) for tensor in dataset.tensors)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: D102
        return self.image(image), self.text(text)


set_seed(0)
torch.set_num_threads(1)  # layers as small as these gain nothing from more
accelerator = Accelerator(cpu=True)
towers = Towers()
model, optimizer = accelerator.prepare(towers, torch.optim.AdamW(towers.parameters(), lr=2e-3))

epochs = 8
policy = Scan.for_budget(0.25, epochs)  # new: a quarter of all samples, over the whole run
sampler = PruningSampler(len(dataset), policy=policy, batch_size=256, epochs=epochs)  # new: 256 over all processes
accelerator.register_for_checkpointing(sampler)  # new: part of save_state and load_state
loader = DataLoader(with_rows(dataset), batch_sampler=sampler)  # not prepared: it gives each process its rows
for _ in range(sampler.epoch, sampler.epochs):  # was range(epochs)
    for rows, batch in loader:  # was for batch in loader
        image, text = (part.to(accelerator.device) for part in batch)
        image, text = model(image, text)
        losses = clip_losses(image, text, 20.0, gather=accelerator.num_processes > 1)
        optimizer.zero_grad()
        accelerator.backward(sampler.reduce(rows, losses))  # was losses.mean()
        optimizer.step()
    e = sampler.log()[-1]
    accelerator.print(f"{e['epoch']} {e['phase']:11} {e['rows']:5,} of {e['total']:,} rows, loss {e['loss']:.3f}")
accelerator.save_state("accelerate-state")  # on all processes
accelerator.print(f"{e['pruned_so_far']:.1%} of the samples pruned, in {sampler.total_steps()} steps")
accelerator.end_training()
