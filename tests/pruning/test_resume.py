"""Nothing is lost: a killed run goes on to the identical result, a refused write leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from thresher import Cache, OutputError
from thresher.runtime.checksums import CacheWarning

RECIPE = """
[[step]]
method = "semdedup"
eps = 0.02
clusters = 60
sample = "all"
iterations = 12

[[step]]
method = "clip-score"
keep = "80%"

[[step]]
method = "density"
keep = "30%"
clusters = 30
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((60, 128))
    image = centers[rng.integers(0, 60, 60_000)] + 0.7 * rng.standard_normal((60_000, 128))
    np.save(folder / "image.npy", image.astype(np.float16))
    np.save(folder / "text.npy", (image + rng.standard_normal(image.shape)).astype(np.float16))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def command(pool: Path, out: Path, cache: Path) -> list[str]:
    run = [sys.executable, "-m", "thresher", "run", str(pool / "recipe.toml"), str(pool)]
    return [*run, "-o", str(out), "--cache", str(cache), "--workers", "1"]


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


@pytest.mark.slow
def test_kill_at_random_moments_then_the_identical_result(pool: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    subprocess.run(command(pool, tmp_path / "whole", tmp_path / "cache-whole"), check=True, capture_output=True)
    needed = time.monotonic() - begin
    moments = random.Random(7)
    kills = 0
    finished: dict[Path, int] = {}
    for _ in range(6):
        process = subprocess.Popen(
            command(pool, tmp_path / "out", tmp_path / "cache"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(0.2 + moments.random() * needed)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if (tmp_path / "out").exists():  # killed after its last word
            assert digest(tmp_path / "out") == digest(tmp_path / "whole"), "a killed run left a half-written selection"
            break
        for path, inode in finished.items():
            assert path.stat().st_ino == inode, f"{path.name} was finished and is computed again"
        # Arrays that are done; those of single iterations come and go.
        arrays = [path for path in (tmp_path / "cache").rglob("*.npy") if path.name.startswith(("assign", "semdedup"))]
        finished |= {path: path.stat().st_ino for path in arrays if ".partial" not in str(path) and path.name[0] != "."}
    assert kills, "no run was killed; the test proves nothing"
    done = subprocess.run(
        [*command(pool, tmp_path / "out", tmp_path / "cache")], check=True, capture_output=True, text=True
    )
    for path, inode in finished.items():
        assert path.stat().st_ino == inode, f"{path.name} was finished and is computed again"
    assert "kept" in done.stdout
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path: Path) -> None:
    cache = Cache(tmp_path, flush_seconds=-1)
    key = {"what": "numbers"}

    def fill(start: int, stop: int, calls: list[int]):
        for lo in range(start, stop, 10):
            calls.append(lo)
            yield np.arange(lo, lo + 10, dtype=np.float32), np.arange(lo, lo + 10)
        if stop < 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.columns("numbers", key, {"a": "float32", "b": "int64"}, 100, lambda s: fill(s, 50, []))
    calls: list[int] = []
    found = cache.columns("numbers", key, {"a": "float32", "b": "int64"}, 100, lambda s: fill(s, 100, calls))
    assert calls == [50, 60, 70, 80, 90]
    assert found["a"].tolist() == found["b"].tolist() == list(range(100))


def test_a_full_disk_gives_a_message_and_leaves_nothing(pool: Path, tmp_path: Path) -> None:
    def little_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        command(pool, tmp_path / "out", tmp_path / "cache"),
        capture_output=True,
        text=True,
        preexec_fn=little_space,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    # With space again the same command goes through.
    subprocess.run(command(pool, tmp_path / "out", tmp_path / "cache"), check=True, capture_output=True)
    assert not list(tmp_path.glob(".out*"))


def test_a_damaged_cache_entry_counts_as_absent(tmp_path: Path) -> None:
    cache = Cache.at(tmp_path)
    made = [0]

    def make() -> np.ndarray:
        made[0] += 1
        return np.arange(5)

    assert cache.array("x", {}, make).tolist() == [0, 1, 2, 3, 4]
    path = cache.path("x", {})
    whole = path.read_bytes()
    for turn, damaged in enumerate((whole[:-3], b"", whole[:70] + b"(" + whole[71:], b"x" * len(whole)), 2):
        path.write_bytes(damaged)
        with pytest.warns(
            CacheWarning, match=f"cache entry {re.escape(str(path))} is damaged .*; it is computed again"
        ):
            assert cache.array("x", {}, make).tolist() == [0, 1, 2, 3, 4]
        assert made == [turn]


def test_the_cache_is_bounded_and_can_be_cleared(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=2500)
    for i in range(4):
        cache.array("x", {"i": i}, lambda: np.zeros(100))
        os.utime(cache.path("x", {"i": i}), (i, i))
    assert cache.size() > 2500
    cache.trim()
    assert cache.size() <= 2500
    assert cache.path("x", {"i": 3}).exists(), "the most recently used entry went first"
    assert not cache.path("x", {"i": 0}).exists()
    cache.clear()
    assert cache.size() == 0


def test_a_folder_is_replaced_in_one_step_and_strays_are_swept(tmp_path: Path) -> None:
    from thresher.runtime.files import writing_folder

    out = tmp_path / "out"
    for text in ("first", "second"):
        with writing_folder(out) as scratch:
            (scratch / "file").write_text(text)
        assert (out / "file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError), writing_folder(out) as scratch:
        (scratch / "no such folder" / "file").write_text("half")
    assert (out / "file").read_text() == "second"
    code = "import os, sys; from thresher.runtime.files import writing_folder as w; c = w(sys.argv[1]); c.__enter__(); "
    subprocess.run([sys.executable, "-c", code + "os._exit(9)", str(out)], check=False)  # killed while it wrote
    (left,) = tmp_path.glob(".out.*.tmp")
    with writing_folder(out) as other:  # one that is at work
        assert not left.exists()
        with writing_folder(out) as scratch:
            (scratch / "file").write_text("third")
        assert other.exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == [other.parent.name, "out"]
        (other / "file").write_text("fourth")
    assert (out / "file").read_text() == "fourth"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_while_replacing_there_is_always_a_whole_result(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom thresher.runtime.files import writing_folder\n"
        "for i in range(10**6):\n"
        "    with writing_folder(sys.argv[1]) as scratch:\n"
        "        for name in 'ab': (scratch / name).write_text(str(i))\n"
    )
    out = tmp_path / "out"
    moments = random.Random(3)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, str(out)])
        while not out.exists():
            time.sleep(0.05)
        time.sleep(0.2 + 0.2 * moments.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (out / "a").read_text() == (out / "b").read_text() != ""


def test_what_is_being_filled_is_not_trimmed_but_what_was_given_up_is(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=1)
    for name, age in (("new", 60), ("old", 10 * 86_400)):
        folder = tmp_path / "arrays" / f"{name}.partial"
        folder.mkdir(parents=True)
        for file in ("lock", "rows", "vectors.npy"):
            (folder / file).write_text("0" * 100)
            os.utime(folder / file, (time.time() - age,) * 2)
    os.utime(tmp_path / "arrays" / "new.partial" / "lock", (0, 0))  # older than what is being written
    cache.trim()
    left = sorted(path.relative_to(tmp_path / "arrays").as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["new.partial/lock", "new.partial/rows", "new.partial/vectors.npy"]


def test_a_link_keeps_pointing_where_it_did(tmp_path: Path) -> None:
    from thresher.runtime.files import writing_folder

    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for text in ("first", "second"):
        with writing_folder(tmp_path / "link") as scratch:
            (scratch / "file").write_text(text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
