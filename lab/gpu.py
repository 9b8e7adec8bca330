"""Run ``thresher train`` many times side by side on one GPU, with several policies and seeds and a time limit.

    python lab/gpu.py clip TRAIN.parquet EVAL.parquet -o RUNS --json clip.json --seconds 540 --at-once 4 \\
        --arms scan full "full, the samples of scan" dynamic-random --seeds 0 1 -- \\
        --model small --epochs 30 --batch-size 512 --eval-label article_type --template {} --workers 3

Arguments after ``--`` are passed to every run. Runs of the first seed start first. The baseline of SCAN, full training
on as many samples, starts when the SCAN run is done. The JSON file is written whenever a run ends and every few
seconds, so that nothing is lost at the time limit: the remaining runs are then stopped, and the file has their logs so
far. Runs side by side do not measure the speed of policies; compare accuracy at equal samples.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thresher.runtime.files import writing

BASELINE = "full, the samples of "
ARMS: dict[str, list[str]] = {
    "scan": ["--policy", "scan"],
    "full": [],
    "full, the samples of scan": [],
    "dynamic-random": ["--policy", "dynamic-random"],
    "infobatch": ["--policy", "infobatch"],
    "scan, by epoch": ["--policy", "scan", "--scope", "epoch"],
    "scan, ill-matched only": ["--policy", "scan", "--mode", "ill-matched"],
    "scan, redundant only": ["--policy", "scan", "--mode", "redundant"],
}


@dataclass
class Job:
    """A run: ``waiting``, ``running``, ``done``, ``failed``, ``cut off`` or ``not begun``."""

    arm: str
    seed: int
    folder: Path
    state: str = "waiting"
    seconds: float = 0.0
    error: str = ""
    command: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    @property
    def baseline_of(self) -> str | None:
        return self.arm.removeprefix(BASELINE) if self.arm.startswith(BASELINE) else None

    def log(self) -> list[dict[str, Any]]:
        """Return the log so far, without histograms; skips a line that is not complete yet."""
        path = self.folder / "log.jsonl"
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                entries.append({name: value for name, value in json.loads(line).items() if name != "histogram"})
            except ValueError:
                break
        return entries


def jobs_of(arms: Sequence[str], seeds: Sequence[int], folder: Path) -> list[Job]:
    """Return all runs, ordered by seed."""
    return [
        Job(arm, seed, folder / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}") for seed in seeds for arm in arms
    ]


def ready(job: Job, jobs: Sequence[Job]) -> bool:
    """Return whether a job may start; if the run it depends on failed, mark it as not begun."""
    if job.state != "waiting" or job.baseline_of is None:
        return job.state == "waiting"
    baseline = next(other for other in jobs if (other.arm, other.seed) == (job.baseline_of, job.seed))
    if baseline.state in ("failed", "cut off", "not begun"):
        job.state, job.error = "not begun", f"{baseline.arm} failed"
    return baseline.state == "done"


def run_all(
    jobs: list[Job], command: Callable[[Job], list[str]], write: Callable[[], None], *, at_once: int, seconds: float
) -> None:
    """Run jobs side by side until all are done or time is up; all child processes have ended when it returns.

    No job starts if less time is left than the shortest finished run took.
    """
    end, written = time.monotonic() + seconds, 0.0
    env = {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", **os.environ}
    try:
        while any(job.state in ("waiting", "running") for job in jobs) and time.monotonic() < end:
            changed = False
            for job in (job for job in jobs if job.state == "running"):
                if job.process is not None and job.process.poll() is not None:
                    job.seconds, changed = time.monotonic() - job.started, True
                    job.state = "failed" if job.process.returncode else "done"
                    print(f"{job.arm}, seed {job.seed}: {job.state} after {job.seconds:.0f} s", flush=True)
            spent = [job.seconds for job in jobs if job.state == "done"]
            for job in jobs:
                running = sum(other.state == "running" for other in jobs)
                if running >= at_once or not ready(job, jobs):
                    continue
                if spent and end - time.monotonic() < min(spent):
                    job.state, job.error, changed = "not begun", "too little time was left", True
                    continue
                job.command, job.started, changed = command(job), time.monotonic(), True
                job.folder.parent.mkdir(parents=True, exist_ok=True)
                with open(_output(job), "wb") as file:
                    job.process = subprocess.Popen(job.command, stdout=file, stderr=subprocess.STDOUT, env=env)
                job.state = "running"
            if changed or time.monotonic() - written > 10:
                write()
                written = time.monotonic()
            time.sleep(0.2)
    finally:
        for job in jobs:
            if job.process is not None and job.process.poll() is None:
                job.process.kill()
                job.process.wait()
                job.state, job.seconds = "cut off", time.monotonic() - job.started
            elif job.state == "waiting":
                job.state, job.error = "not begun", job.error or "time was up"
            elif job.state == "running":
                job.state = "failed" if job.process is None or job.process.returncode else "done"
        write()


def _output(job: Job) -> Path:
    return job.folder.with_name(f"{job.folder.name}.txt")


def summary_of(job: Job) -> dict[str, Any]:
    """Return a job as it is written to the JSON file."""
    printed = _output(job).read_text(encoding="utf-8", errors="replace") if _output(job).exists() else ""
    return {
        "arm": job.arm,
        "seed": job.seed,
        "state": job.state,
        "seconds": round(job.seconds, 1),
        "why": job.error or (printed[-2000:] if job.state == "failed" else ""),
        "arguments": job.command[3:],
        "log": job.log(),
    }


def table_of(runs: Sequence[dict[str, Any]]) -> str:
    """Return a table with a line per arm: the mean over its finished seeds, and the values of the seeds."""
    ended = [run for run in runs if run["state"] == "done" and run["log"] and "eval" in run["log"][-1]]
    scores = {
        id(run): {
            name: value for scores_of_set in run["log"][-1]["eval"].values() for name, value in scores_of_set.items()
        }
        for run in ended
    }
    names = [name for name in (scores[id(ended[0])] if ended else ()) if name.endswith(("R@1", "top1"))]
    lines = ["| policy | seeds | samples seen | pruned | " + " | ".join(names) + " |", "|---" * (len(names) + 4) + "|"]
    for arm in dict.fromkeys(run["arm"] for run in ended):
        mine = [run for run in ended if run["arm"] == arm]
        samples = [sum(entry["samples"] for entry in run["log"]) for run in mine]
        cells = [
            arm,
            " / ".join(str(run["seed"]) for run in mine),
            " / ".join(f"{n:,}" for n in samples),
            " / ".join(f"{run['log'][-1]['pruned_so_far']:.1%}" for run in mine),
        ]
        for name in names:
            values = [100 * scores[id(run)].get(name, math.nan) for run in mine]
            cells.append(f"**{sum(values) / len(values):.1f}** ({' / '.join(f'{value:.1f}' for value in values)})")
        lines.append("| " + " | ".join(cells) + " |")
    others = [f"{run['arm']}, seed {run['seed']}: {run['state']}. {run['why'][-300:]}" for run in runs]
    return "\n".join([*lines, "", *(line for line, run in zip(others, runs, strict=True) if run["state"] != "done")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["clip", "moco"])
    parser.add_argument("data", help="Parquet to train on.")
    parser.add_argument("held_out", help="Parquet to evaluate on, at the end.")
    parser.add_argument("-o", "--out", required=True, help="Folder of the runs.")
    parser.add_argument("--json", required=True, help="File to write the results of all runs to.")
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[:5], choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--prune", default="30%", help="Share to leave out.")
    parser.add_argument("--at-once", type=int, default=4, help="Runs side by side.")
    parser.add_argument("--seconds", type=float, default=540.0, help="Time limit in seconds.")
    own = sys.argv[1:]
    at = own.index("--") if "--" in own else len(own)
    args, rest = parser.parse_args(own[:at]), own[at + 1 :]
    arms = list(args.arms)
    for arm in args.arms:
        if arm.startswith(BASELINE) and arm.removeprefix(BASELINE) not in arms:
            arms.insert(0, arm.removeprefix(BASELINE))
    jobs = jobs_of(arms, args.seeds, Path(args.out))
    if any(job.folder.exists() for job in jobs):
        raise SystemExit(f"{args.out}: has runs already; name another folder")

    def command(job: Job) -> list[str]:
        more = list(rest)
        if job.baseline_of is not None:
            baseline = next(other for other in jobs if (other.arm, other.seed) == (job.baseline_of, job.seed))
            samples = sum(entry["samples"] for entry in baseline.log())
            if "--epochs" in more:
                del more[more.index("--epochs") : more.index("--epochs") + 2]
            more += ["--samples-seen", str(samples)]
        policy = [*ARMS[job.arm], *(["--prune", args.prune] if ARMS[job.arm] else [])]
        usual = ["-o", str(job.folder), "--seed", str(job.seed), "--eval", args.held_out, "--eval-every", "0"]
        words = ["train", args.task, args.data, *usual, *policy, *more, "--checkpoint-minutes", "60", "--quiet"]
        return [sys.executable, "-m", "thresher", *words]

    def write() -> None:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        with writing(Path(args.json)) as scratch:
            Path(scratch).write_text(json.dumps({"runs": [summary_of(job) for job in jobs]}) + "\n", encoding="utf-8")

    run_all(jobs, command, write, at_once=args.at_once, seconds=args.seconds)
    print(table_of([summary_of(job) for job in jobs]))
    if any(job.state == "failed" for job in jobs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
