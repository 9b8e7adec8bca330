"""One machine, many users, containers and jobs: nobody's files are lost, nobody's crash harms others."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import pools
from tests.processes import finished
from tests.runtime.common import as_nobody, needs_root, run
from thresher import Cache
from thresher.io.pictures import open_rgb
from thresher.runtime.files import writing, writing_folder
from thresher.runtime.locks import create_locked, create_locked_folder, holding
from thresher.runtime.process import SharedContext

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="users, namespaces and /proc as on Linux")

ROOT = Path(__file__).parents[2]
PR_CAPBSET_DROP = 24


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder for temporary files, as /tmp: everybody can write there, and remove only own files."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # noqa: S108
    folder.chmod(0o1777)
    if os.geteuid() == 0:
        os.chown(folder, 1, 1)  # the owner of the folder may remove files of others
    yield folder
    shutil.rmtree(folder)


def without_privileges() -> None:
    """From the next program on, root is a user like any other."""
    libc = ctypes.CDLL(None)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def script(text: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", text, *map(str, arguments)]
    return finished(words, cwd=ROOT, timeout=120, **options)


# Other users


def left_by_another_user(shared: Path) -> list[Path]:
    """What runs of another user, killed at the worst moment, leave behind; some of it no one else may read."""

    def crash() -> None:
        for mask in (0o022, 0o077):
            os.umask(mask)
            for prefix in ("thresher-tasks-", "thresher-stream-", ".out.", ".pool."):
                folder = create_locked_folder(shared, prefix, ".tmp" if prefix.startswith(".") else "", 0o777 & ~mask)
                (folder.path / "x.task").write_bytes(b"x")
            create_locked(shared, "thresher-", ".pixels", 0o600)
            create_locked(shared, ".file.npy.", ".tmp.npy")
            (shared / "thresher-tasks-empty").mkdir(exist_ok=True)
            (shared / f"thresher-stream-bare{mask}").mkdir(0o777 & ~mask)
            (shared / f"thresher-stream-bare{mask}" / "now.npy").touch()
        for folder in (shared / "cache", shared / "cache" / "arrays", shared / "cache" / "joined"):
            folder.mkdir()
            folder.chmod(0o1777)
        cache = Cache.at(shared / "cache")
        cache.save(cache.path("theirs", {}), np.arange(9))
        holding(cache.path("numbers", {"n": 1}, ".partial") / "lock", "it").__enter__()
        os._exit(0)  # as if it had been killed

    assert run(as_nobody(crash)) == 0
    return sorted(path for path in shared.rglob("*") if path.stat().st_uid)


WORK = """
import sys, tempfile
from pathlib import Path
import numpy as np
shared = Path(sys.argv[1])
tempfile.tempdir = str(shared)
try:
    (shared / "probe").mkdir(); (shared / "thresher-tasks-empty").rmdir()
except PermissionError:
    pass
else:
    raise SystemExit("this process has privileges")
from thresher import Cache, Processes
from thresher.embedding import pipeline
from thresher.runtime.files import writing, writing_folder
engine = Processes(1)
assert list(engine.map(abs, [-1, -2])) == [1, 2]
engine.close()
with pipeline._reserved(shared, 10):
    pass
with writing_folder(shared / "out") as folder:
    (folder / "a").write_text("a")
with writing(shared / "file.npy") as path:
    np.save(path, np.arange(3))
cache = Cache.at(shared / "cache", limit=0)
fill = lambda start: iter([(np.arange(start, 5),)])
found = cache.columns("numbers", {"n": 1}, {"a": "int64"}, 5, fill)
assert found["a"].tolist() == [0, 1, 2, 3, 4]
entry = cache.load(cache.path("theirs", {}))
assert entry is None or entry.tolist() == list(range(9))
del found, entry
cache.trim()
cache.clear()
if sys.argv[2:]:
    from thresher.dynamic.policies.full import Full
    from thresher.dynamic.stream import StreamPruner
    pruner = StreamPruner(policy=Full(), batch_size=1, epochs=1, samples=1)
    assert pruner.folder.parent == shared
print("done")
"""


@needs_root
def test_a_crash_of_another_user_harms_nobody_in_a_shared_folder(shared: Path) -> None:
    left = left_by_another_user(shared)
    assert len(left) > 20
    done = script(WORK, shared, "streams", preexec_fn=without_privileges)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", ""), done.stderr
    assert sorted(path for path in left if path.exists()) == left, "it is not ours to remove"


# Containers and hosts that share a folder


def in_a_namespace(text: str, *arguments: object) -> subprocess.Popen[str]:
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", text]
    words += map(str, arguments)
    return subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def can_make_namespaces() -> bool:
    words = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(words, capture_output=True).returncode == 0


HOST = """
import os, sys, tempfile
from contextlib import ExitStack
from pathlib import Path
shared = Path(sys.argv[1])
tempfile.tempdir = str(shared)
from thresher import OutputError, Processes
from thresher.runtime.files import writing_folder
from thresher.runtime.locks import create_locked, create_locked_folder, holding, sweep
engine = Processes(1)
results = engine.map(abs, iter(lambda: -1, 0))
next(results)
file, scratch = create_locked(shared, ".a.", ".tmp")
stream = create_locked_folder(shared, "thresher-stream-")
with writing_folder(shared / "target") as folder:
    (folder / sys.argv[2]).touch()
    print(os.getpid(), engine._pool.folder.path, scratch, stream.path, folder.parent, flush=True)
    with ExitStack() as stack:
        for line in sys.stdin:
            try:
                if line == "hold\\n":
                    stack.enter_context(holding(shared / "lock", "it", wait=False))
                else:
                    sweep(shared.iterdir())
                    with writing_folder(shared / "target"):  # which sweeps what is left of this target
                        raise ValueError
            except OutputError as error:
                print(error, flush=True)
            except ValueError:
                print("swept", flush=True)
            else:
                print("held", flush=True)
"""


def ask(host: subprocess.Popen[str], what: str) -> str:
    host.stdin.write(f"{what}\n")
    host.stdin.flush()
    return host.stdout.readline().rstrip("\n")


@pytest.mark.skipif(not can_make_namespaces(), reason="this user cannot make namespaces")
def test_hosts_with_the_same_process_numbers_leave_each_other_alone(tmp_path: Path) -> None:
    """Two pid namespaces share a folder, as containers share /tmp and hosts a network file system."""
    hosts = [in_a_namespace(HOST, tmp_path, name) for name in ("one", "two")]
    try:
        named = [host.stdout.readline().split() for host in hosts]
        assert named[0][0] == named[1][0] == "1", "both have the same number"
        paths = [[Path(path) for path in words[1:]] for words in named]
        assert [ask(host, "sweep") for host in hosts] == ["swept", "swept"]
        assert all(path.exists() for path in [*paths[0], *paths[1]])
        assert ask(hosts[0], "hold") == "held"
        assert "it: process 1 on" in ask(hosts[1], "hold")
        hosts[0].kill()  # and with it all processes of its namespace
        hosts[0].wait()
        deadline = time.monotonic() + 20
        while any(path.exists() for path in paths[0]) and time.monotonic() < deadline:
            assert ask(hosts[1], "sweep") == "swept"
        assert not any(path.exists() for path in paths[0])
        assert all(path.exists() for path in paths[1])
        assert ask(hosts[1], "hold") == "held"
    finally:
        for host in hosts:
            host.kill()
            host.wait()
            host.stdin.close()
            host.stdout.close()


# File systems without locks

NO_LOCKS = """
import errno, fcntl
def refused(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = refused
"""


@pytest.mark.slow
def test_commands_keep_each_other_out_where_there_are_no_locks(tmp_path: Path) -> None:
    """And go on, with the same result, when the lease of a killed one has ended."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_LOCKS)
    data, pool = _pictures(tmp_path / "pictures", 200), tmp_path / "pool"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]),
    }
    asked = ["--encoder", "tests.toy:Sleepy", "--batch-size", "16", "--workers", "1", "--per-shard", "40", "--quiet"]

    def embed(out: Path, **options: Any) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "thresher", "embed", str(data), "-o", str(out), *asked]
        return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)

    first = embed(pool, env=environment)
    deadline = time.monotonic() + 60
    while not list(pool.glob("metadata/*.parquet")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # until the second has tried
    second = embed(pool, env=environment)
    told = second.communicate(timeout=60)[1]
    assert second.returncode == 2, told
    assert re.fullmatch(r"Error: the pool .*: process \d+ on .* is using it \(if it was killed, .* 300 s\).*\n", told)
    first.kill()
    first.communicate()
    for path in pool.rglob("*"):
        if not path.is_dir():
            os.utime(path, (1, 1))
    for out, options in ((pool, {"env": environment}), (tmp_path / "with-locks", {})):
        again = embed(out, **options)
        assert again.communicate(timeout=120)[1] == ""
        assert again.returncode == 0
    found, expected = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.suffix in (".npy", ".parquet")}
        for out in (pool, tmp_path / "with-locks")
    )
    assert found == expected
    assert len(found) > 5
    assert not list(pool.rglob(".*"))


# Workers without a parent

SLOW = """
import os, sys, time
if __name__ == "__mp_main__":
    open(os.path.join(os.environ["MARK"], str(os.getpid())), "w").close()
    time.sleep(float(os.environ["SLOW"]))
from thresher import Processes
if __name__ == "__main__":
    engine = Processes(2)
    results = engine.map(abs, iter(lambda: -1, 0))
    next(results)
    open(os.path.join(os.environ["MARK"], "ready"), "w").close()
    time.sleep(60)
"""


def alive(mark: Path) -> list[int]:
    """The processes that have the variable MARK in their environment, which all children inherit."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"MARK={mark}".encode() in Path("/proc", name, "environ").read_bytes():
                found.append(int(name))
        except OSError:
            pass
    return found


def nothing_is_left(mark: Path, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = alive(mark)
    for one in left:
        os.kill(one, signal.SIGKILL)
    return not left


def killed_when(condition: Callable[[], bool], words: list[str], mark: Path, later: float = 0, **more: str) -> None:
    environment = {**os.environ, "MARK": str(mark), **more}
    with subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as job:
        deadline = time.monotonic() + 60
        while not condition() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(later)
        job.kill()


@pytest.mark.parametrize(("slow", "sign"), [("0.7", ""), ("0", "ready")], ids=["while they start", "while they wait"])
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, slow: str, sign: str) -> None:
    """Also if the parent is dead before they look for it: while they import modules, the main module among them."""
    path = tmp_path / "main.py"
    path.write_text(SLOW)
    mark = tmp_path / "mark"
    mark.mkdir()

    def due() -> bool:
        return (mark / sign).exists() if sign else len(list(mark.iterdir())) == 2

    killed_when(due, [sys.executable, str(path)], mark, SLOW=slow)
    assert len(list(mark.iterdir())) >= 2
    assert nothing_is_left(mark)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["select", "embed", "devices"])
def test_commands_that_are_killed_while_they_start_leave_no_process(tmp_path: Path, command: str) -> None:
    pool = tmp_path / "pool"
    pools.write_clip_retrieval(pool, pools.make(9000))
    data = _pictures(tmp_path / "pictures", 300)
    for number, later in enumerate((0, 0.2, 0.5, 1.0)):
        mark, out = tmp_path / f"mark-{number}", tmp_path / f"out-{number}"
        mark.mkdir()
        words = [sys.executable, "-m", "thresher"]
        words += {
            "select": ["select", "negclip", str(pool), "--keep", "10%", "--engine", "processes"],
            "embed": ["embed", str(data), "--encoder", "tests.toy:Sleepy", "--workers", "2"],
            "devices": ["embed", str(data), "--encoder", "tests.toy:Sleepy", "--workers", "2", "--device", "cpu,cpu"],
        }[command]
        words += ["-o", str(out), "--quiet"]
        cache = str(tmp_path / f"cache-{number}")
        killed_when(lambda mark=mark: len(alive(mark)) > 2, words, mark, later, XDG_CACHE_HOME=cache)
        assert nothing_is_left(mark), later


def _pictures(folder: Path, count: int) -> Path:
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (16, 16), (i % 250, 40, 90)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"a picture of number {i}")
    return folder


# The settings of the process


@pytest.mark.parametrize("mask", [0o027, 0o007, 0o077])
def test_files_have_the_modes_of_the_umask_which_stays(tmp_path: Path, mask: int) -> None:
    """Results, entries of the cache, locks and temporary files, made by several threads at once."""

    def make() -> None:
        os.umask(mask)
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for turn in range(15):
                    _write_all(tmp_path / f"{number}" / f"{turn}", mask)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert not errors, errors
        assert os.umask(0) == mask

    assert run(make) == 0
    modes = {
        (path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.rglob("*") if path.parent != tmp_path
    }
    assert modes == {(True, 0o777 & ~mask), (False, 0o666 & ~mask)}


def _write_all(folder: Path, mask: int) -> None:
    with writing(folder / "a.npy") as path:
        np.save(path, np.arange(3))
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o666 & ~mask
    with writing_folder(folder / "out") as new:
        (new / "b").write_text("b")
    with holding(folder / "lock", "it"):
        assert stat.S_IMODE((folder / "lock").stat().st_mode) == 0o666 & ~mask
    cache = Cache.at(folder / "cache")
    cache.array("numbers", {}, lambda: np.arange(4))
    cache.columns("more", {}, {"a": "int64"}, 3, lambda start: iter([(np.arange(3),)]))
    saved = cache.resumable(cache.path("state", {}))
    saved.save({"a": np.arange(3)})
    scratch = create_locked_folder(folder, "s.")
    assert stat.S_IMODE(scratch.path.stat().st_mode) == 0o777 & ~mask
    scratch.remove()


STATE = """
import gc, json, locale, os, random, signal, sys, threading, warnings
from pathlib import Path

place, part = Path(sys.argv[1]), sys.argv[2]
os.chdir(place)
import numpy as np
import PIL.Image, PIL.ImageFile
import pyarrow as pa
import threadpoolctl
if part != "quick":
    import torch  # libraries add filters of warnings when they are imported
if part == "train":
    import open_clip, kornia

def state():
    gc.collect()
    found = {
        "environment": dict(os.environ),
        "sys.path": list(sys.path),
        "meta_path": [type(one).__name__ for one in sys.meta_path],
        "argv": list(sys.argv),
        "folder": os.getcwd(),
        "signals": {str(one): str(signal.getsignal(one)) for one in signal.valid_signals()},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "numpy errors": np.geterr(),
        "numpy random": str(np.random.get_state()),
        "numpy print": str(np.get_printoptions()),
        "random": str(random.getstate()),
        "warnings": [str(one) for one in warnings.filters],
        "showwarning": str(warnings.showwarning),
        "locale": str(locale.setlocale(locale.LC_ALL)),
        "pillow": (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.ImageFile.MAXBLOCK),
        "arrow": (pa.cpu_count(), pa.io_thread_count()),
        "blas": {(one["user_api"], one["num_threads"]) for one in threadpoolctl.threadpool_info()
                 if one["user_api"] == "blas"},
        "openmp": sorted({one["num_threads"] for one in threadpoolctl.threadpool_info()
                          if one["user_api"] == "openmp"}),
        "recursion": sys.getrecursionlimit(),
        "switch": sys.getswitchinterval(),
        "hooks": (str(sys.excepthook), str(threading.excepthook), str(sys.unraisablehook)),
        "gc": gc.isenabled(),
        "stdout": (str(sys.stdout), sys.stdout.encoding),
        "threads": threading.active_count(),
        "umask": None,
    }
    mask = os.umask(0o22)
    os.umask(mask)
    found["umask"] = mask
    if part != "quick":
        found["torch"] = (torch.get_num_threads(), torch.get_default_dtype(), str(torch.get_rng_state().tolist()[:40]),
                          torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
                          torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
                          torch.backends.cuda.matmul.allow_tf32)
    return found

def same(what):
    now = state()
    changed = {key: (before[key], now[key]) for key in before if before[key] != now[key]}
    assert not changed, f"{what} changed {changed}"

np.ones((50, 50)) @ np.ones((50, 50))
import pandas  # Arrow loads it, and it may load six, which changes sys.meta_path
from thresher import Cache, Processes, Serial, Threads, build, open_store, run_steps
from thresher.embedding.pipeline import EmbedSettings, embed
from thresher.export.write import export
from thresher.report import write_report
from thresher.resharding import reshard
from thresher.check.data import doctor
signal.signal(signal.SIGUSR1, lambda *_: None)  # of the user
os.umask(0o027)
warnings.simplefilter("default")
random.seed(1)
np.random.seed(1)
before = state()

whole = part == "all"
if part != "train":
    for workers in (0, 1)[: 1 + whole]:
        embed("pictures", f"pool-{workers}", EmbedSettings(encoder="of_ones_own:Own", workers=workers, device="cpu"))
        same(f"embed with {workers} workers")
    doctor("pictures")
    same("doctor")
    store = open_store("pool-0")
    same("open_store")
    for number, engine in enumerate((Serial(), Threads(2), Processes(1))[: 2 + whole]):
        cache = Cache.at(f"cache-{number}")
        chosen = run_steps(store, [build("negclip", {"keep": "50%", "batch_size": 10})], engine=engine, cache=cache)
        if hasattr(engine, "close"):
            engine.close()
        same(f"run_steps on {engine.name}")
    maps = [Serial().map(abs, range(9)), Threads(2).map(abs, range(9)), Serial().map(abs, range(9))]
    for one in maps:
        next(one)
    while maps:
        maps.pop(0).close()  # in the order in which they began, which nested contexts do not do
    same("maps that overlap")
    chosen.save("sel")
    same("save")
    export(chosen, "keys", "keys.txt", store=store)
    same("export")
    reshard("pictures", "sel", "shards", processes=whole)
    same("reshard")
    if whole:
        import matplotlib.figure
        write_report(chosen, "report.html", store=store)
        same("report")
else:
    from thresher.train.clip import ClipSettings, train_clip
    from thresher.train.loop import Schedule
    train_clip("pictures", "run", ClipSettings(schedule=Schedule(epochs=2, batch_size=20, workers=1)))
    same("train")
print("done")
"""

OWN = """
import os, sys
import beside
from tests.toy import Toy
from tests.toy import preprocess as _p, tokenize as _t
def preprocess(picture): return _p(picture)
def tokenize(texts):
    assert os.environ.get("TOKENIZERS_PARALLELISM", "false") == "false"
    return _t(texts)
class Own(Toy):
    name = "of_ones_own:Own"
    preprocess, tokenize = staticmethod(preprocess), staticmethod(tokenize)
"""


def state_script(place: Path, part: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose main module is elsewhere, with two threads for products."""
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "main.py").write_text(f'if __name__ == "__main__":\n{textwrap.indent(STATE, "    ")}')
    _pictures(place / "pictures", 60)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"OMP_NUM_THREADS": "2", "PYTHONPATH": path, "XDG_CACHE_HOME": str(place / "cache")}
    words = [sys.executable, str(elsewhere / "main.py"), str(place), part]
    return finished(words, timeout=300, env=environment)


@pytest.mark.parametrize("part", ["quick", *(pytest.param(part, marks=pytest.mark.slow) for part in ("all", "train"))])
def test_the_user_s_process_keeps_its_settings(tmp_path: Path, part: str) -> None:
    """Also with an encoder of a module in the current folder, which is not in ``sys.path``."""
    (tmp_path / "of_ones_own.py").write_text(OWN)
    (tmp_path / "beside.py").touch()
    done = state_script(tmp_path, part)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_setting_that_several_change_at_once_is_restored() -> None:
    """Whatever the order in which they end: contexts of their own would leave the value of another."""
    values = [0]

    @contextmanager
    def one() -> Iterator[None]:
        before, values[0] = values[0], 1
        yield
        values[0] = before

    setting = SharedContext(one)
    inside, leave = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

    def work(number: int) -> None:
        with setting:
            inside[number].set()
            assert leave[number].wait(20)
            assert values == [1]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for number, thread in enumerate(threads):
        thread.start()
        assert inside[number].wait(20)
    for number, thread in enumerate(threads):
        leave[number].set()
        thread.join()
        assert values == [int(number < 2)]


def test_pictures_decoded_by_several_threads_leave_the_filters_of_warnings(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: open_rgb(data), range(300)))
    assert warnings.filters == before
