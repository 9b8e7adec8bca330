"""Embedding end to end compared with the bare model: the share of its speed that remains with reading and writing.

    python benchmarks/embed.py --encoder conse --data fashion.parquet
    python benchmarks/embed.py --arch ViT-L-14 --rows 20000 --workers 16      # random weights, generated JPEGs

The bare model gets batches that are already on its device; its speed is the baseline.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import shutil
import statistics
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from thresher.data import DataOptions, open_data
from thresher.embedding.encoders import make_encoder
from thresher.embedding.pipeline import EmbedSettings, embed
from thresher.runtime.engine import cores


def write_tar(folder: Path, rows: int, side: int, number: int) -> None:
    """Write photo-like JPEGs (noise at all scales, about 25 KB at 256 pixels) with captions of ten words."""
    rng = np.random.default_rng(number)
    words = [f"word{i}" for i in range(2000)]
    with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
        for i in range(rows):
            pixels = np.zeros((side, side, 3))
            for scale in (4, 16, 64, side):
                small = Image.fromarray(rng.integers(0, 256, (scale, scale, 3), np.uint8))
                pixels += np.asarray(small.resize((side, side)), float) * (8 / scale) ** 0.5
            pixels = (255 * (pixels - pixels.min()) / np.ptp(pixels)).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "jpeg", quality=90)
            for ending, content in (("jpg", buffer.getvalue()), ("txt", " ".join(rng.choice(words, 10)).encode())):
                member = tarfile.TarInfo(f"{number:05d}{i:05d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def bare(encoder: object, batch: int, seconds: float) -> dict[str, float]:
    """Return samples per second of the model alone, for images, texts and both."""
    import torch

    model = encoder
    rates_by_kind = {}
    rng = np.random.default_rng(0)
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for name in ("image", "text"):
        if not getattr(model, f"{name}_dim"):
            continue
        if name == "image":
            shape = model.preprocess(Image.new("RGB", (64, 64))).shape
            pixels = rng.integers(0, 256, (batch, *shape), np.uint8)
            run = partial(getattr(model, "images", None) or model.encode_images, pixels)
        else:
            tokens = model.tokenize([" ".join(f"word{j}" for j in rng.integers(0, 2000, 10)) for _ in range(batch)])
            run = partial(getattr(model, "texts", None) or model.encode_texts, tokens)
        for _ in range(3):
            run()
        sync()
        rates = []
        for _ in range(3):
            rounds, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < seconds / 3:
                run()
                rounds += 1
                if rounds % 8 == 0:
                    sync()
            sync()
            rates.append(rounds * batch / (time.perf_counter() - begin))
        rates_by_kind[name] = statistics.median(rates)
    rates_by_kind["both"] = 1 / sum(1 / rate for rate in rates_by_kind.values())
    return rates_by_kind


def random_weights(arch: str, folder: Path) -> str:
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model(arch, load_weights=False).state_dict(), folder / "weights.pt")
    return f"open_clip:{arch}/{folder}/weights.pt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", help="an encoder, such as conse")
    parser.add_argument("--arch", help="an open_clip architecture, with random weights")
    parser.add_argument("--data", help="data to embed (default: generated tars)")
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seconds", type=float, default=9.0, help="time to measure the bare model")
    parser.add_argument("--only", choices=["image", "text"])
    parser.add_argument("--json", help="file to append a JSON line with the results to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = args.data
        if data is None:
            (folder / "tars").mkdir()
            with ProcessPoolExecutor(cores()) as pool:
                per_tar = min(2_500, args.rows)
                list(pool.map(partial(write_tar, folder / "tars", per_tar, args.side), range(args.rows // per_tar)))
            data = str(folder / "tars")
        spec = args.encoder or random_weights(args.arch or "ViT-B-32", folder)
        encoder = make_encoder(spec, device=args.device, precision=args.precision)
        device = str(getattr(encoder, "device", "cpu"))
        batch = args.batch or (512 if device.startswith("cuda") else 64)
        alone = bare(encoder, batch, args.seconds)
        del encoder
        settings = EmbedSettings(
            encoder=spec, device=args.device, precision=args.precision, batch_size=batch, workers=args.workers,
            only=args.only, data=DataOptions(),
        )  # fmt: skip
        begin = time.perf_counter()
        pool_built = embed(data, folder / "pool", settings)
        whole = time.perf_counter() - begin
        # Exclude loading the model and starting the workers: measured with a pool of the first part.
        part = open_data(data).parts[0]
        first = folder / "first"
        begin = time.perf_counter()
        few = embed(data if part.rows else part.path, first, settings) if part.rows is None else None
        start = time.perf_counter() - begin
        rate = pool_built.rows / whole
        steady = (pool_built.rows - few.rows) / max(whole - start, 1e-9) if few and pool_built.rows > few.rows else rate
        limit = (
            alone[args.only] if args.only else alone["both" if len(pool_built.fields) == 2 else pool_built.fields[0]]
        )
        figures = {
            "encoder": args.encoder or args.arch,
            "device": device,
            "rows": pool_built.rows,
            "workers": args.workers,
            "batch": batch,
            **{f"bare {name}/s": round(value, 1) for name, value in alone.items()},
            "end to end/s, start included": round(rate, 1),
            "end to end/s": round(steady, 1),
            "share of the bare model": round(steady / limit, 3),
            "peak memory of the main process, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "set aside": pool_built.skipped,
        }
        print(json.dumps(figures, indent=1))
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(figures) + "\n")
        shutil.rmtree(folder / "pool")


if __name__ == "__main__":
    main()
