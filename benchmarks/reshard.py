"""Resharding tars by byte ranges, with and without known positions, compared with webdataset, tarfile and DataComp.

DataComp's script is not part of this repository: ``--datacomp PATH`` names a copy of its resharder.py. It needs
cloudpathlib, pysimdjson, tqdm and webdataset 0.2.48 or older, which can be in ``--packages FOLDER``
(``pip install --no-deps --target FOLDER ...``). Its imports for blurring faces are replaced by stubs.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import median, table

from thresher.io.tar import Window, tar_samples
from thresher.resharding import reshard
from thresher.selection import Selection

_STUBS = {"cv2.py": "", "img2dataset/__init__.py": "", "img2dataset/blurrer.py": "class BoundingBoxBlurrer: pass\n"}


def make(folder: Path, samples: int, per_tar: int, size: int, noted: bool = False) -> list[tuple[str, str]]:
    """Write tars of random images, captions and json, with pax headers if ``noted``; return (key, uid) pairs."""
    rng = np.random.default_rng(0)
    noise = rng.bytes(4 * size)
    names = []
    for tar in range(-(-samples // per_tar)):
        with tarfile.open(folder / f"{tar:08d}.tar", "w") as file:
            for i in range(min(per_tar, samples - tar * per_tar)):
                key, uid = f"{tar:08d}{i:04d}", rng.bytes(16).hex()
                names.append((key, uid))
                length, at = rng.integers(size // 2, size * 3 // 2), rng.integers(0, 2 * size)
                meta = {"uid": uid, "caption": f"image {key}", "url": f"https://example.org/{key}.jpg",
                        "key": key, "status": "success", "width": 512, "height": 384, "sha256": 2 * uid}  # fmt: skip
                members = (("jpg", noise[at : at + length]), ("json", json.dumps(meta).encode()),
                           ("txt", meta["caption"].encode()))  # fmt: skip
                for ending, content in members:
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size, info.mode, info.mtime = len(content), 0o444, 1.7e9 + 0.5 if noted else 0
                    file.addfile(info, io.BytesIO(content))
        count = min(per_tar, samples - tar * per_tar)
        (folder / f"{tar:08d}_stats.json").write_text(json.dumps({"successes": count}))
    return names


def pool_of(folder: Path, tars: Path, keys: list[str]) -> None:
    """Write a pool as ``thresher embed`` does, with keys, positions and dummy vectors."""
    places = []
    for path in sorted(tars.glob("*.tar")):
        with open(path, "rb") as file:
            for group in tar_samples(Window(file, str(path)), str(path)):
                places.append((group.key, path.name, next(iter(group.members.values())).start))
    if [key for key, _, _ in places] != keys:
        raise SystemExit("the tars do not contain the samples that were written")
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    np.save(folder / "img_emb" / "img_emb_0.npy", np.ones((len(keys), 4), np.float16))
    columns = dict(zip(("key", "shard", "offset"), map(pa.array, zip(*places, strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / "metadata" / "metadata_0.parquet")


def contents(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the hashes of the members of every sample in the tars of a folder, by uid."""
    result = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as file:
            sample: dict[str, bytes] = {}
            for member in file:
                data = file.extractfile(member).read()  # type: ignore[union-attr]
                sample[member.name.rpartition(".")[2]] = data
                if len(sample) == 3:
                    uid = json.loads(sample["json"])["uid"]
                    result[uid] = tuple(hashlib.sha256(sample[kind]).hexdigest() for kind in sorted(sample))
                    sample = {}
    return result


def by_webdataset(tars: Path, out: Path, keys: set[str]) -> None:
    """Read all samples and write the selected ones."""
    import webdataset as wds

    paths = sorted(map(str, tars.glob("*.tar")))
    pipeline = wds.DataPipeline(wds.SimpleShardList(paths), wds.tarfile_to_samples())
    with wds.ShardWriter(str(out / "%08d.tar"), maxcount=10_000, verbose=0) as writer:
        for sample in pipeline:
            if sample["__key__"] in keys:
                writer.write(
                    {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")}
                )


def by_tarfile(tars: Path, out: Path, keys: set[str]) -> None:
    """Copy the selected members one by one."""
    with tarfile.open(out / "00000000.tar", "w") as to:
        for path in sorted(tars.glob("*.tar")):
            with tarfile.open(path) as file:
                for member in file:
                    if member.name.partition(".")[0] in keys:
                        to.addfile(member, file.extractfile(member))


def by_datacomp(script: str, packages: str, tars: Path, out: Path, subset: Path, workers: int) -> float:
    """Run the released resharder; return the time it reports itself, without start-up."""
    stubs = tars.parent / "stubs"
    for name, text in _STUBS.items():
        (stubs / name).parent.mkdir(parents=True, exist_ok=True)
        (stubs / name).write_text(text)
    command = [sys.executable, "-W", "ignore", script, "-i", tars, "-o", out, "-s", subset, "-j", workers]
    env = {**os.environ, "PYTHONPATH": f"{stubs}{os.pathsep}{packages}"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    printed = re.search(r"images in ([\d.]+)s", done.stderr)
    if done.returncode or printed is None:
        raise SystemExit(done.stderr)
    return float(printed[1])


def main() -> None:
    """Print samples per second of all tools, and check that they wrote the same samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--size", type=int, nargs="+", default=[50_000, 10_000], help="average bytes of an image")
    parser.add_argument("--noted", action="store_true", help="write a pax header for every member, as webdataset does")
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="folder for about 2 GB (default: a temporary folder)")
    parser.add_argument("--datacomp", metavar="PATH", help="DataComp's resharder.py")
    parser.add_argument("--packages", metavar="FOLDER", default="", help="folder with the packages that it needs")
    args = parser.parse_args()
    for count, size in zip(args.samples, args.size, strict=True):
        with tempfile.TemporaryDirectory(dir=args.folder) as place:
            run(args, count, size, Path(place))


def run(args: argparse.Namespace, count: int, size: int, place: Path) -> None:
    """Create the data, and time all tools in turn."""
    tars = place / "tars"
    tars.mkdir()
    samples = make(tars, count, max(1, count // 10), size, args.noted)
    chosen = np.sort(np.random.default_rng(1).permutation(len(samples))[: int(args.keep * len(samples))])
    keys = [samples[i][0] for i in chosen]
    uids = np.array([(int(samples[i][1][:16], 16), int(samples[i][1][16:], 16)) for i in chosen], "u8,u8")
    np.save(place / "subset.npy", uids[np.lexsort((uids["f1"], uids["f0"]))])
    (place / "keys.txt").write_text("".join(f"{key}\n" for key in keys))
    pool_of(place / "pool", tars, [key for key, _ in samples])
    selected(place, len(samples), chosen)

    def ours(sel: str, workers: int) -> Callable[[Path], object]:
        return lambda out: reshard(str(tars), str(place / sel), str(out), workers=workers, processes=True)

    ways: dict[str, Callable[[Path], object]] = {
        "webdataset, read and write": lambda out: by_webdataset(tars, out, set(keys)),
        "tarfile, read and write": lambda out: by_tarfile(tars, out, set(keys)),
    }
    if args.datacomp:
        for workers in (1, 2):
            ways[f"DataComp's resharder, {workers} workers"] = lambda out, workers=workers: by_datacomp(  # type: ignore[misc]
                args.datacomp, args.packages, tars, out, place / "subset.npy", workers
            )
    for sel, label in (("keys.txt", "keys"), ("subset.npy", "uids"), ("sel", "known positions")):
        for workers in (1, 2):
            ways[f"thresher, {label}, {workers} workers"] = ours(sel, workers)
    times: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, tuple[str, ...]] = {}
    for turn, (name, way) in rounds(ways, args.rounds):
        # Take the better of two runs: the state of memory depends on the program that ran before.
        spent = []
        for _ in range(2):
            out = place / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            os.sync()
            gc.collect()
            begin = time.perf_counter()
            own = way(out)
            spent.append(own if isinstance(own, float) else time.perf_counter() - begin)
        times[name].append(min(spent))
        if not turn:
            result = contents(out)
            first = first or result
            if len(result) != len(keys) or result != first:
                raise SystemExit(f"{name} wrote other samples")
    base = median(times["webdataset, read and write"])
    total = sum(os.path.getsize(path) for path in tars.glob("*.tar"))
    print(f"{len(samples):,} samples of {size:,} bytes, {total / 1e9:.2f} GB, "
          f"{args.keep:.0%} kept; median of {args.rounds}\n")  # fmt: skip
    rows = [[name, f"{len(samples) / median(t):,.0f}", f"{base / median(t):.1f}x"] for name, t in times.items()]
    print(table(["", "input samples per second", "webdataset's"], rows), end="\n\n", flush=True)


def rounds(
    ways: dict[str, Callable[[Path], object]], times: int
) -> Iterator[tuple[int, tuple[str, Callable[[Path], object]]]]:
    """Yield all tools once per round."""
    for turn in range(times):
        for way in ways.items():
            yield turn, way


def selected(place: Path, rows: int, chosen: np.ndarray) -> None:
    """Save a selection of the pool."""
    from dataclasses import replace

    from thresher.pool.store import open_store

    store = open_store(str(place / "pool"))
    start = Selection.everything(store.fingerprint(), str(place / "pool"), {}, rows)
    dropped = np.zeros(rows, np.int16)
    dropped[chosen] = -1
    replace(start, dropped_by=dropped).save(place / "sel")


if __name__ == "__main__":
    main()
