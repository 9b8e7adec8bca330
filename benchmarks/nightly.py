"""Compare the speed with stored ratios: fails if something became slower than before, beyond what is noise.

Every contest runs thresher and something else in turn, several rounds, in one process. The ratio of their processor
times hardly depends on the machine, nor on what else runs there. It fails if a ratio is more than 15% plus the noise
above the stored one.

python benchmarks/nightly.py              compare with thresholds.json, and append a line to history.jsonl
python benchmarks/nightly.py --store      take what is measured as the new thresholds
python benchmarks/nightly.py --plot       only draw docs/speed.svg from history.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import embeddings, kernel, side_by_side  # chooses the kernels before NumPy loads

# isort: split
import numpy as np
from threadpoolctl import threadpool_limits

from thresher import __version__
from thresher.runtime.engine import cores

HERE = Path(__file__).parent
THRESHOLDS, HISTORY, PLOT = HERE / "thresholds.json", HERE / "history.jsonl", HERE.parent / "docs" / "speed.svg"
ALLOWED = 0.15
Contestants = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Contest:
    """Something that thresher does, and what it is compared with.

    Attributes:
        against: The other side.
        needs: The package that it needs, "" for none.
        make: Yields the two contestants, "thresher" and "other".
        calls: How often "thresher" does the task while "other" does it once, so that both can be measured.
    """

    against: str
    needs: str
    make: Callable[[Path], Any]
    calls: int = 1


@dataclass(frozen=True)
class Ratio:
    """The processor time of thresher divided by that of the other side.

    Attributes:
        ratio: Median over the rounds.
        noise: Half the distance of the quartiles of the rounds, relative to the median.
        rounds: Number of rounds.
    """

    ratio: float
    noise: float
    rounds: int


# --- contests -------------------------------------------------------------------------------------


@contextmanager
def kmeans(folder: Path) -> Iterator[Contestants]:
    """20 iterations of spherical k-means, 100,000 x 256, K = 90."""
    import faiss
    from kmeans import faiss_kmeans, ours

    faiss.omp_set_num_threads(1)  # waiting threads of OpenMP use the processor
    rows = embeddings(100_000, 256, 270)
    start = rows[np.sort(np.random.default_rng(1).choice(len(rows), 90, replace=False))]
    yield {"thresher": lambda: ours(rows, start, 20), "other": lambda: faiss_kmeans(rows, start, 20)}


@contextmanager
def duplicates(folder: Path) -> Iterator[Contestants]:
    """Nearest earlier row in 10 clusters of 2,000 rows, against the dense procedure of the released SemDeDup."""
    from semdedup import blocked, dense

    rows = embeddings(20_000, 256, 20)
    parts = [rows[lo : lo + 2_000] for lo in range(0, len(rows), 2_000)]
    yield {
        "thresher": lambda: [blocked(part) for part in parts],
        "other": lambda: [dense(part) for part in parts],
    }


@contextmanager
def quotas(folder: Path) -> Iterator[Contestants]:
    """Quotas of 5,000 clusters, against the solver that the released pruning uses."""
    from quotas import osqp_rounded

    from thresher.ops.cut import allocate

    rng = np.random.default_rng(0)
    sizes = np.maximum((rng.pareto(1.2, 5_000) * 200).astype(np.int64), 1)
    target, low, total = rng.random(5_000) * sizes, np.minimum(1, sizes), int(sizes.sum() * 0.3)
    yield {
        "thresher": lambda: [allocate(target, low, sizes, total) for _ in range(20)],
        "other": lambda: osqp_rounded(target, low, sizes, total),
    }


@contextmanager
def cut(folder: Path) -> Iterator[Contestants]:
    """The best 30% of 2,000,000 scores, ties by row, against a stable sort in NumPy."""
    from thresher.ops.cut import top

    scores = np.random.default_rng(0).standard_normal(2_000_000, dtype=np.float32)
    k = len(scores) * 3 // 10

    def plain() -> np.ndarray:
        mask = np.zeros(len(scores), bool)
        mask[np.argsort(-scores, kind="stable")[:k]] = True
        return mask

    if (top(scores, k) != plain()).any():
        raise SystemExit("cut: the two sides do not keep the same rows")
    yield {"thresher": lambda: [top(scores, k) for _ in range(5)], "other": plain}


@contextmanager
def tars(folder: Path) -> Iterator[Contestants]:
    """Read the members of 20,000 samples in tars."""
    import webdataset as wds

    from thresher.io.tar import Window, tar_samples

    paths = []
    for number in range(4):
        paths.append(folder / f"{number:05d}.tar")
        with tarfile.open(paths[-1], "w") as file:
            for i in range(5_000):
                for ending, content in (("jpg", b"x" * 700), ("txt", b"a caption")):
                    info = tarfile.TarInfo(f"{number}{i:06d}.{ending}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))

    def ours() -> int:
        count = 0
        for path in paths:
            with open(path, "rb") as file:
                count += sum(1 for _ in tar_samples(Window(file, str(path)), str(path)))
        return count

    def other() -> int:
        pipeline = wds.DataPipeline(wds.SimpleShardList(list(map(str, paths))), wds.tarfile_to_samples())
        return sum(1 for _ in pipeline)

    if (ours(), other()) != (20_000, 20_000):
        raise SystemExit("tars: the two sides do not read the same samples")
    yield {"thresher": ours, "other": other}


CONTESTS = {
    "k-means": Contest("faiss", "faiss", kmeans),
    "duplicates": Contest("the released code", "", duplicates),
    "quotas": Contest("the released solver", "osqp", quotas, calls=20),
    "cut": Contest("plain NumPy", "", cut, calls=5),
    "tars": Contest("webdataset", "webdataset", tars),
}

# --- measure and compare --------------------------------------------------------------------------


def measured(contest: Contest, rounds: int) -> Ratio:
    """Run a contest; a first round, which warms up, does not count."""
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1), contest.make(Path(folder)) as contestants:
        side_by_side(contestants, 1)
        times = side_by_side(contestants, rounds, time.process_time)
    return ratio_of([spent / contest.calls for spent in times["thresher"]], times["other"])


def ratio_of(ours: list[float], others: list[float]) -> Ratio:
    """The ratio of times of the same rounds."""
    ratios = [a / b for a, b in zip(ours, others, strict=True)]
    middle = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (middle,) * 3
    return Ratio(round(middle, 5), round((high - low) / 2 / middle, 4), len(ratios))


def limit_of(stored: Ratio, now: Ratio) -> float:
    """The largest ratio that is no regression: 15% and the noise of both measurements above the stored one."""
    return stored.ratio * (1 + ALLOWED + stored.noise + now.noise)


def verdicts(stored: dict[str, Ratio], now: dict[str, Ratio]) -> tuple[list[str], list[str]]:
    """A line on every contest, and the names of those that became slower."""
    lines, slower = [], []
    for name in now:
        found = now[name]
        line = f"{name}: {found.ratio:.4f} of the time of {CONTESTS[name].against}, noise {found.noise:.1%}"
        if name not in stored:
            lines.append(f"{line}; nothing stored, use --store")
            slower.append(name)
            continue
        limit = limit_of(stored[name], found)
        is_slower = found.ratio > limit
        lines.append(f"{line}; stored {stored[name].ratio:.4f}, limit {limit:.4f}{'  SLOWER' if is_slower else ''}")
        slower += [name] * is_slower
    return lines, slower


def load(path: Path) -> dict[str, Ratio]:
    """The stored ratios by name."""
    if not path.exists():
        return {}
    return {name: Ratio(**value) for name, value in json.loads(path.read_text(encoding="utf-8"))["ratios"].items()}


def machine() -> dict[str, Any]:
    """What the figures depend on, without names of machines or users."""
    packages = {name: _version(name) for name in ("numpy", "faiss-cpu", "webdataset")}
    return {
        "machine": platform.machine(), "system": platform.system(), "cores": cores(), "kernels": kernel(),
        "load": round(os.getloadavg()[0], 1), "python": platform.python_version(), **packages,
    }  # fmt: skip


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The short hash of the commit, "" outside a repository."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def record(now: dict[str, Ratio]) -> dict[str, Any]:
    """The line of the history."""
    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    ratios = {name: asdict(ratio) for name, ratio in now.items()}
    return {"day": day, "version": __version__, "commit": commit(), "machine": machine(), "ratios": ratios}


# --- plot -----------------------------------------------------------------------------------------


def plot(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios of all lines of the history, with their noise, one panel per contest."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "thresher", "svg.fonttype": "none", "font.size": 8}
    figure, axes = plt.subplots(1, len(CONTESTS), figsize=(2.9 * len(CONTESTS), 2.8), layout="constrained")
    labels = [f"{line['version']}\n{line['day']}" for line in history]
    for axis, (name, contest) in zip(axes, CONTESTS.items(), strict=True):
        points = [(i, line["ratios"][name]) for i, line in enumerate(history) if name in line["ratios"]]
        at, ratios = [i for i, _ in points], [point["ratio"] for _, point in points]
        axis.errorbar(at, ratios, [p["ratio"] * p["noise"] for _, p in points], fmt="o-", color="#1f6feb", capsize=3)
        axis.axhline(1, color="#888888", linewidth=0.8, linestyle="--")
        axis.set_title(f"{name}\nrelative to {contest.against}", fontsize=9)
        axis.set_ylim(0, max([1.1, *(1.15 * r for r in ratios)]))
        shown = [0, len(history) - 1] if len(history) > 4 else range(len(history))
        axis.set_xticks(sorted(set(shown)), [labels[i] for i in sorted(set(shown))])
        axis.margins(x=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of the history, oldest first."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> int:
    """Measure, compare, record. Returns 1 if something became slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CONTEST", help=f"of {', '.join(CONTESTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each contest")
    parser.add_argument("--store", action="store_true", help="take what is measured as the new thresholds")
    parser.add_argument("--no-history", action="store_true", help="append nothing to history.jsonl")
    parser.add_argument("--plot", action="store_true", help="only draw docs/speed.svg from history.jsonl")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in CONTESTS]:
        parser.error(f"no contest {unknown[0]!r}; there are {', '.join(CONTESTS)}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1")
    if not args.plot:
        chosen = {name: contest for name, contest in CONTESTS.items() if name in args.names or not args.names}
        if lacking := [c.needs for c in chosen.values() if c.needs and importlib.util.find_spec(c.needs) is None]:
            parser.error(f"{', '.join(lacking)} missing; type: pip install --group bench")
        now = {name: measured(contest, args.rounds) for name, contest in chosen.items()}
        stored = load(THRESHOLDS)
        if args.store:
            stored |= now
            content = {
                "machine": machine(),
                "version": __version__,
                "ratios": {n: asdict(r) for n, r in stored.items()},
            }
            THRESHOLDS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        lines, slower = verdicts(stored, now)
        print("\n".join(lines), flush=True)
        if not args.no_history:
            with open(HISTORY, "a", encoding="utf-8") as file:
                file.write(json.dumps(record(now)) + "\n")
        if slower:
            print(f"slower than stored: {', '.join(slower)}", file=sys.stderr)
            return 1
    if args.plot or args.store:
        plot(read_history(HISTORY), PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
