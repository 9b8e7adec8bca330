"""A small CLIP model that learns from a teacher's stored embeddings: those of the emoji pool. No teacher runs.

Type: python examples/distill.py
"""

from pathlib import Path

from thresher.train.clip import ClipSettings, train_clip
from thresher.train.loop import Schedule

data = Path(__file__).parent / "twemoji" / "twemoji-0.parquet"  # images and captions
pool = str(data.parent)  # embeddings of the same rows, by key, from any encoder of images and captions
epochs = 4
schedule = Schedule(epochs=epochs, batch_size=128, policy="scan", prune=0.2, options={"warmup": 1}, evals=(str(data),))
settings = ClipSettings(loss="distill", reference=pool, distill_weight=0.75, schedule=schedule)
for e in train_clip(data, "distilled", settings):
    print(f"{e['epoch']} {e['phase']:11} {e['rows']:3} of {e['total']} rows, loss {e['loss']:.3f}")
print(f"{e['pruned_so_far']:.1%} of the samples pruned, in {epochs} epochs")
print(f"the image's caption is the first of all: {e['eval']['twemoji-0']['image_to_text_R@1']:.1%}")
