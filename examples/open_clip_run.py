"""The trainer of open_clip with ``--prune`` on some of the emoji, with the sigmoid loss and accumulated steps.

Type: python examples/open_clip_run.py
"""

import csv
import json
from pathlib import Path

import torch
from pyarrow import parquet

from thresher.train.open_clip import main

rows = parquet.read_table(Path(__file__).parent / "twemoji" / "twemoji-0.parquet", columns=["key", "text", "image"])
data = Path("open-clip-data")
data.mkdir(exist_ok=True)
with open(data / "pairs.csv", "w", newline="", encoding="utf-8") as file:
    lines = csv.writer(file)
    lines.writerow(["filepath", "title"])
    for row in rows.to_pylist()[::3]:
        path = data / f"{row['key']}.webp"
        path.write_bytes(row["image"]["bytes"])
        lines.writerow([str(path), row["text"]])
vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 8, "patch_size": 8}
text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1}
config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
(data / "open_clip_config.json").write_text(json.dumps(config))

torch.set_num_threads(1)  # layers as small as these gain nothing from more
command = f"""
--dataset-type csv --train-data {data}/pairs.csv --csv-separator , --model local-dir:{data}
--siglip --batch-size 16 --accum-freq 2 --epochs 6 --lr 2e-3 --warmup 4 --workers 0 --device cpu --precision fp32
--logs open-clip-logs --name run --prune scan --prune-share 20%
"""  # all but the last line, and --prune, are arguments of open_clip_train.main
if main(command.split()):
    raise SystemExit(1)
log = [json.loads(line) for line in Path("open-clip-logs/run/pruning.jsonl").read_text().splitlines()]
for e in log:
    print(f"{e['epoch']} {e['phase']:11} {e['rows']:3} of {e['total']} rows, loss {e['loss']:.3f}")
print(f"{e['pruned_so_far']:.1%} of the samples pruned, in {sum(e['steps'] for e in log)} steps")
