"""negCLIPLoss of one batch: tiles summed by rows and columns, compared with the whole matrix."""

from __future__ import annotations

import argparse
import tempfile
import tracemalloc
from functools import partial
from pathlib import Path

# common chooses the kernels before NumPy loads
from common import bare_products, embeddings, kernel, median, ratio, side_by_side, table

# isort: split
import numpy as np
import threadpoolctl

from thresher import Cache, Serial, build, make_engine, open_store, run_steps

TEMPERATURE = 0.01


def log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    """As in SciPy: maximum, difference, exponential, sum."""
    high = values.max(axis=axis, keepdims=True)
    return np.log(np.exp(values - high).sum(axis=axis)) + high.squeeze(axis)


def dense(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Dense computation: all cosines at once."""
    logits = image @ text.T / np.float32(TEMPERATURE)
    return TEMPERATURE * (logits.diagonal() - log_sum_exp(logits, 1) / 2 - log_sum_exp(logits, 0) / 2)


def whole(pool: Path, engine: object, batch: int, repeats: int) -> np.ndarray:
    """The whole method: read files, write a cache, make a selection."""
    step = build("negclip", {"keep": "30%", "batch_size": batch, "repeats": repeats, "temperature": TEMPERATURE})
    with tempfile.TemporaryDirectory() as cache:
        return run_steps(open_store(str(pool)), [step], engine=engine, cache=Cache.at(cache)).steps[0].rows["score"]


def pool_of(folder: Path, rows: int, dim: int) -> Path:
    """Write a pool of noisy pairs."""
    pool = folder / f"{rows}x{dim}"
    pool.mkdir()
    image = embeddings(rows, dim, 500)
    np.save(pool / "image.npy", image.astype(np.float16))
    noise = np.random.default_rng(1).standard_normal(image.shape, np.float32) * np.float32(4 * dim**-0.5)
    np.save(pool / "text.npy", (image + noise).astype(np.float16))
    return pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_048, 8_192, 16_384])
    parser.add_argument("--large", type=int, default=98_304, help="rows of the pool for all cores")
    parser.add_argument("--batch", type=int, default=32_768, help="batch size for that pool")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for n in args.rows:
            pool = pool_of(Path(folder), n, args.dim)
            store = open_store(str(pool))
            image, text = (store.vectors_at(name, np.arange(n)) for name in ("image", "text"))
            out = np.empty((min(n, 1_024), n), np.float32)

            def bare(image: np.ndarray = image, text: np.ndarray = text, out: np.ndarray = out) -> None:
                for lo in range(0, len(image), len(out)):
                    np.matmul(image[lo : lo + len(out)], text.T, out=out)

            contestants = {
                "dense, NumPy": partial(dense, image, text),
                "thresher": partial(whole, pool, Serial(), n, 1),
                "bare products": bare,
            }
            with threadpoolctl.threadpool_limits(1):
                error = np.abs(whole(pool, Serial(), n, 1) - dense(image.astype(np.float64), text)).max()
                times = side_by_side(contestants, args.rounds)
            lines += [
                [
                    f"{n:,}",
                    name,
                    f"{median(times[name]):.3f}",
                    f"{ratio(times, name, 'bare products'):.2f}x",
                    f"{error:.1e}" if name == "thresher" else "",
                ]
                for name in contestants
            ]
        pool = pool_of(Path(folder), args.large, args.dim)
        batches = -(-args.large // args.batch)
        products = partial(bare_products, args.large, args.dim, args.large // batches)
        times = side_by_side({"all": partial(whole, pool, make_engine(), args.batch, 1)}, args.rounds)["all"]
        spent = [products() for _ in range(args.rounds)]
        tracemalloc.start()
        whole(pool, make_engine(), args.batch, 1)
        peak = tracemalloc.get_traced_memory()[1]
    print(f"negCLIPLoss of one batch, {args.dim} dimensions, one thread, {args.rounds} rounds, {kernel()} kernels\n")
    print(table(["pairs", "", "seconds", "time against bare products", "largest error against float64"], lines))
    print(
        f"\n{args.large:,} pairs in batches of {args.large // batches:,}, one repeat, all cores, files to selection: "
        f"{median(times):.2f} s, bare products {median(spent):.2f} s, {median(times) / median(spent):.2f}x. "
        f"Peak memory of arrays: {peak / 2**20:.0f} MB, without mapped files."
    )


if __name__ == "__main__":
    main()
