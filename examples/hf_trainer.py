"""A CLIP model with the Trainer of Hugging Face, on some of the emoji; lines for pruning are marked ``# new``.

Type: python examples/hf_trainer.py
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pyarrow import parquet
from transformers import CLIPConfig, CLIPModel, TrainingArguments, set_seed

from thresher.dynamic.policies.scan import Scan  # new
from thresher.dynamic.sampler import PruningSampler  # new
from thresher.train.hf_trainer import PruningTrainer  # new: was Trainer of transformers

files = sorted((Path(__file__).parent / "twemoji").glob("*.parquet"))
table = parquet.read_table(files, columns=["key", "text", "image"]).to_pylist()[::8]
LENGTH, END = 24, 127  # captions as ASCII letters


def item(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return what the model takes: an image, and the letters of a caption."""
    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB").resize((16, 16))
    letters = [min(ord(letter), END - 1) for letter in row["text"][: LENGTH - 1]] + [END]
    ids = torch.tensor(letters + [0] * (LENGTH - len(letters)))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": (ids > 0).long()}


dataset = [item(row) for row in table]
set_seed(0)
torch.set_num_threads(1)  # layers as small as these gain nothing from more
size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
text = {**size, "vocab_size": 128, "max_position_embeddings": LENGTH, "eos_token_id": END}
config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 4}, projection_dim=32)

epochs, batch, parts = 6, 32, 2
args = TrainingArguments(
    output_dir="hf-run",
    num_train_epochs=epochs,
    per_device_train_batch_size=batch,
    gradient_accumulation_steps=parts,
    learning_rate=2e-3,
    lr_scheduler_type="cosine",
    warmup_steps=5,
    save_strategy="epoch",
    save_total_limit=1,
    disable_tqdm=True,
    use_cpu=True,
    report_to=[],
)
policy = Scan.for_budget(0.2, epochs, warmup=1)  # new: a fifth of all samples, over the whole run
sampler = PruningSampler(len(dataset), policy=policy, batch_size=batch * parts, epochs=epochs, drop_last=False)  # new
trainer = PruningTrainer(
    model=CLIPModel(config),
    args=args,
    train_dataset=dataset,
    sampler=sampler,  # new
    keys=[row["key"] for row in table],  # new: for thresher report, explain and coreset of the folder hf-run
)
trainer.train()
for e in sampler.log():
    print(f"{e['epoch']} {e['phase']:11} {e['rows']:3} of {e['total']} rows, loss {e['loss']:.3f}")
print(f"{e['pruned_so_far']:.1%} of the samples pruned, in {trainer.state.global_step} steps")
