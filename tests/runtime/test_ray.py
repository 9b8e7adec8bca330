"""Ray: the contract of engines, lost workers and nodes, errors, what is sent, and what it leaves behind."""

from __future__ import annotations

import faulthandler
import operator
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.embedding import raw
from tests.processes import finished
from tests.resharding.common import hashes, keys_file
from thresher import MissingExtraError, Ray, ThresherError, UnreachedError, UsageError, api, make_engine
from thresher.cli.main import main
from thresher.runtime.engine import Stateful, reduced
from thresher.runtime.engines import ray as plugin
from thresher.runtime.engines.serial import Serial
from thresher.runtime.ray import cluster, flight, sums
from thresher.runtime.ray.helpers import Helpers
from thresher.runtime.ray.packing import size_of
from thresher.testing import EngineContract
from thresher.testing.pools import clustered, write_pool

ROOT = Path(__file__).parents[2]


def settings() -> dict[str, Any]:
    """What Ray changes in a process that uses it."""
    return {
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        "path": list(sys.path),
        "hook": sys.excepthook,
        "signals": (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)),
        "faults": faulthandler.is_enabled(),
        "home": sorted(Path.home().glob(".ray/*")),
    }


@pytest.fixture(scope="module", autouse=True)
def started() -> Iterator[Ray]:
    """Ray with two workers, which all engines of this process use; what it changed is put back at once."""
    before = settings()
    engine = Ray(2)
    assert list(engine.map(abs, [-1])) == [1]
    assert settings() == before
    yield engine
    before["signals"] = settings()["signals"]  # of the commands of the tests
    engine.close()
    assert settings() == before
    assert not list(Path(tempfile.gettempdir()).glob(f"thresher-ray-*/session_*_{os.getpid()}"))


class TestRay(EngineContract):
    plugin = Ray
    ahead = 5_000  # very short tasks


def test_its_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_engine("ray:num_cpus=0.5,resources=disk=1+tape=2", 3) == Ray(
        3, num_cpus=0.5, resources={"disk": 1.0, "tape": 2.0}
    )
    for text, why in (
        ("ray:num_cpus=-1", "num_cpus = -1: at least 0"),
        ("ray:num_gpus=many", "expected a finite number"),
        ("ray:retries=0.5", "expected a whole number"),
        ("ray:resources=disk", "NAME=AMOUNT"),
        ("ray:resources=disk=-1", "at least 0 each"),
        ("ray:resources=disk=nan", "NAME=AMOUNT"),
        ("ray:resources==1", "NAME=AMOUNT"),
        ("ray:addres=auto", "Did you mean 'address'"),
        ("ray:address", "OPTION=VALUE"),
        ("ray:workers=0", "at least 1"),
    ):
        with pytest.raises(UsageError, match=why):
            make_engine(text)
    monkeypatch.setattr(plugin, "installed", lambda name: name != "ray")
    with pytest.raises(MissingExtraError, match=r"pip install '.\[ray\]'"):
        make_engine("ray")


def test_another_cluster_is_refused() -> None:
    with pytest.raises(UsageError, match="this process is connected to"):
        next(Ray(1, address="10.0.0.7:6379").map(abs, [1]))


# --- errors and lost workers ----------------------------------------------------------------------


class OfTwoError(Exception):
    """Its class cannot be called with what ``args`` holds, as most have it."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")
        self.two = two


def note(folder: Path, line: str) -> None:
    with open(folder / "calls", "a") as file:
        file.write(f"{line}\n")


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def refuse_three(folder: Path, x: int) -> int:
    note(folder, str(x))
    if x == 3:
        raise OfTwoError("one", "two")
    return x


def test_an_error_of_a_task_is_its_own_and_raised_once(tmp_path: Path) -> None:
    results = Ray(2).map(partial(refuse_three, tmp_path), range(20))
    with pytest.raises(OfTwoError, match="^one and two") as caught:
        list(results)
    assert (caught.value.two, str(caught.value)) == ("two", "one and two")
    assert caught.value.__cause__ is None
    assert "refuse_three" in caught.value.__notes__[0]
    assert calls(tmp_path).count("3") == 1


def leave(x: int) -> int:
    sys.exit(f"task {x}")


def lock(_: int) -> Any:
    return threading.Lock()


def test_a_task_that_exits_or_returns_what_cannot_be_pickled_is_an_error() -> None:
    with pytest.raises(SystemExit, match="task 0"):
        list(Ray(2).map(leave, range(3)))
    with pytest.raises(TypeError, match="pickle"):
        list(Ray(2).map(lock, [1]))
    assert list(Ray(2).map(abs, [-3])) == [3]


def die(folder: Path, times: int, x: int) -> int:
    """Kill the worker of task 3, a number of times."""
    if x == 3:
        note(folder, str(os.getpid()))
        if len(calls(folder)) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
    return x * x


def test_a_lost_worker_is_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(Ray(2).map(partial(die, tmp_path, 1), range(8))) == [x * x for x in range(8)]
    assert len(set(calls(tmp_path))) == 2
    time.sleep(1)  # Ray reports lost workers in the background
    assert capfd.readouterr() == ("", "")


def test_a_worker_lost_again_and_again_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ThresherError, match="was killed, several times.*fewer --workers"):
        list(Ray(2, retries=1).map(partial(die, tmp_path, 99), range(8)))
    assert len(calls(tmp_path)) == 2
    assert list(Ray(2).map(abs, [-3])) == [3]


def large(folder: Path, times: int, x: int) -> tuple[int, np.ndarray]:
    """A small number, and a megabyte to be added up."""
    return die(folder, times, x), np.random.default_rng(x).normal(size=2**17)


def added(engine: Any, fn: Callable[[int], Any], tasks: Iterable[int]) -> tuple[list[int], Any]:
    sums = reduced(engine, fn, tasks, np.add)
    return list(sums), sums.total


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_sums_are_added_on_the_workers_also_if_one_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """This process receives one sum, however many tasks there are; the bytes are those of serial."""
    received: list[int] = []
    unpack = flight.unpack
    for room in (flight, sums):
        monkeypatch.setattr(room, "unpack", lambda packed: received.append(size_of(packed)) or unpack(packed))
    kept, total = added(Ray(workers), partial(large, tmp_path, 1), range(35))
    assert len(set(calls(tmp_path))) == 2  # the task of a lost worker ran again
    assert 2**20 <= sum(received) < 2**20 + 35 * 5_000
    (tmp_path / "here").mkdir()
    (here, expected) = added(Serial(), partial(large, tmp_path / "here", 0), range(35))
    assert kept == here == [x * x for x in range(35)]
    assert total.tobytes() == expected.tobytes()


def pair_of(x: int) -> tuple[int, Any]:
    return x, (threading.Lock() if x == 2 else x)


def refusing(folder: Path, x: int) -> tuple[int, int]:
    return refuse_three(folder, x), x


def test_errors_of_tasks_that_are_added_up(tmp_path: Path) -> None:
    sums = iter(reduced(Ray(2), partial(refusing, tmp_path), range(9), operator.add))
    assert [next(sums) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OfTwoError):
        next(sums)
    with pytest.raises(TypeError, match="pickle"):
        list(reduced(Ray(2), pair_of, range(9), operator.add))
    next(left := iter(reduced(Ray(2), abs_pair, iter(int, 1), operator.add)))  # endless
    left.close()
    assert list(Ray(2).map(abs, [-3])) == [3]


def abs_pair(x: int) -> tuple[int, int]:
    return abs(x), x


# --- functions with a state -----------------------------------------------------------------------


def loaded(folder: Path, helpers: Any) -> Any:
    """A state that notes when it is made."""
    note(folder, str(os.getpid()))
    return helpers


def slow_square(folder: Path, times: int, _: Any, x: int) -> int:
    """Note the task; kill the actor of task 3, a number of times."""
    note(folder, str(x))
    time.sleep(0.06)  # too long to be sent together
    if x == 3 and calls(folder).count("3") <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return x * x


def folders(tmp_path: Path) -> tuple[Path, Path]:
    made, done = tmp_path / "made", tmp_path / "done"
    made.mkdir()
    done.mkdir()
    return made, done


def test_a_lost_actor_is_replaced_and_only_what_it_worked_on_runs_again(tmp_path: Path) -> None:
    made, done = folders(tmp_path)
    fn = Stateful(partial(loaded, made), partial(slow_square, done, 1))
    assert list(Ray(2).map(fn, range(12))) == [x * x for x in range(12)]
    assert len(calls(made)) == len(set(calls(made)))  # once by each
    assert 2 <= len(calls(made)) <= 3  # two, and one in the place of the lost one; fewer if one started late
    assert sorted(calls(done), key=int) == sorted([*map(str, range(12)), "3"], key=int)


def test_a_task_that_kills_every_actor_is_an_error(tmp_path: Path) -> None:
    made, done = folders(tmp_path)
    fn = Stateful(partial(loaded, made), partial(slow_square, done, 99))
    results = Ray(2, retries=1).map(fn, range(12))
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(ThresherError, match="was killed, several times.*fewer --workers"):
        next(results)
    assert calls(done).count("3") == 2


def test_few_tasks_are_sent_to_actors_ahead() -> None:
    assert taken_ahead(Ray(2), Stateful(itself, lambda _, x: nap(x)), range(12)) <= 2 + 2 + 1


def parts(helpers: Any, _: int) -> tuple[int, set[int], int]:
    """The process of the task, those of its parts, and how many parts were taken ahead."""
    taken, most, processes = 0, 0, set()

    def tasks() -> Iterator[int]:
        nonlocal taken
        for x in range(12):
            taken += 1
            yield x

    for done, process in enumerate(helpers.map(own_process, tasks())):
        most = max(most, taken - done)
        processes.add(process)
    return os.getpid(), processes, most


def own_process(_: int) -> int:
    time.sleep(0.06)
    return os.getpid()


@pytest.mark.slow
def test_an_actor_has_parts_of_its_tasks_done_on_free_cpus() -> None:
    for own, processes, ahead in Ray(1).map(Stateful(itself, parts), range(2)):  # of two CPUs
        assert own not in processes
        assert ahead <= 1 + 3
    for own, processes, _ in Ray(2).map(Stateful(itself, parts), range(2)):  # none is free
        assert processes == {own}
    for own, processes, ahead in Ray(1, num_cpus=2).map(Stateful(itself, parts), range(1)):  # nor here
        assert processes == {own}
        assert ahead == 1


def itself(helpers: Any) -> Any:
    return helpers


def no_cpu(helpers: Any, _: int) -> bool:
    """Whether the actor does the parts that nobody has a CPU for."""
    return list(Helpers(1, 0, False, 0.5).map(own_process, range(1))) == [os.getpid()]


@pytest.mark.slow
def test_parts_that_no_cpu_is_free_for_are_done_by_the_actor() -> None:
    """As after a node was lost, and the actors that replace its own took the last CPUs."""
    assert all(Ray(2).map(Stateful(itself, no_cpu), range(2)))


# --- what is sent ---------------------------------------------------------------------------------


class Loaded:
    """A function that notes when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        note(self.folder, str(os.getpid()))

    def __call__(self, x: int) -> int:
        time.sleep(0.02)
        return x


def test_each_worker_loads_the_function_once(tmp_path: Path) -> None:
    assert list(Ray(2).map(Loaded(tmp_path), range(30))) == list(range(30))
    assert len(calls(tmp_path)) == len(set(calls(tmp_path)))


def taken_ahead(engine: Ray, fn: Callable[[Any], Any], tasks: Iterable[Any]) -> int:
    """The largest number of tasks that were taken before their results."""
    taken, most = 0, 0

    def counted() -> Iterator[Any]:
        nonlocal taken
        for task in tasks:
            taken += 1
            yield task

    for done, _ in enumerate(engine.map(fn, counted())):
        most = max(most, taken - done)
    return most


def nap(x: int) -> int:
    time.sleep(0.06)
    return x


def test_only_short_and_small_tasks_are_sent_together() -> None:
    assert taken_ahead(Ray(2), abs, range(3_000)) > 100
    assert taken_ahead(Ray(2), nap, range(20)) <= 5
    assert taken_ahead(Ray(2), len, (np.zeros(2**18) for _ in range(20))) <= 5  # large tasks
    assert (
        taken_ahead(Ray(2), partial(np.zeros, dtype=np.int8), [2**21] * 20) <= 8
    )  # large results: known after the first


def test_the_bytes_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_IN_FLIGHT", 1e-9)
    assert taken_ahead(Ray(2), len, (np.zeros(2**17) for _ in range(9))) <= 2


def add_one(rows: np.ndarray) -> np.ndarray:
    rows += 1
    return rows


def test_arrays_can_be_changed_on_both_sides() -> None:
    for size in (3, 300_000):
        (row,) = Ray(2).map(add_one, [np.zeros(size)])
        row += 1
        assert (row == 2).all()


def test_functions_without_a_module_work() -> None:
    three = 3
    assert list(Ray(2).map(lambda x: x + three, [1, 2])) == [4, 5]


@pytest.mark.slow
def test_a_function_of_the_main_program_and_of_the_current_folder_work(tmp_path: Path) -> None:
    (tmp_path / "of_ones_own.py").write_text("def twice(x):\n    return 2 * x\n")
    code = "import of_ones_own; from thresher import Ray\nprint(*Ray(1).map(of_ones_own.twice, [1, 2]), flush=True)\n"
    code += "print(*Ray(1).map(lambda x: x + 1, [1, 2]))"
    done = finished([sys.executable, "-c", code], cwd=tmp_path, timeout=120)
    assert (done.stdout, done.stderr) == ("2 4\n2 3\n", "")


# --- files ----------------------------------------------------------------------------------------


def test_files_that_a_node_cannot_read_are_found_at_the_start(tmp_path: Path) -> None:
    """A path through an open folder of this process leads nowhere in any other process, as on another machine."""
    write_pool(tmp_path / "pool", clustered(40), clustered(40, seed=1))
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        here = f"/proc/self/fd/{folder}/pool"
        engine = Ray(2)
        engine.check_files([str(tmp_path / "pool" / "image_0.npy"), str(tmp_path)])
        with pytest.raises(
            UnreachedError, match=r"image_0.npy: cannot be read on node [\d.]+ \(N.*, and 1 other file; put"
        ):
            engine.check_files([f"{here}/image_0.npy", f"{here}/text_0.npy"])
    finally:
        os.close(folder)


def test_every_command_says_which_file_a_node_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pool(tmp_path / "pool", clustered(40), clustered(40, seed=1))
    raw.tars(tmp_path / "tars", 20)
    keys = keys_file(tmp_path / "keys", ["000003"])
    folder = os.open(tmp_path, os.O_RDONLY)
    out, here = str(tmp_path / "out"), f"/proc/self/fd/{folder}"
    try:
        for command in (
            ["select", "clip-score", f"{here}/pool", "--keep", "50%", "-o", out],
            ["score", "clip-score", f"{here}/pool", "-o", f"{out}.parquet"],
            ["cluster", f"{here}/pool", "--clusters", "2", "-o", out],
            ["inspect", f"{here}/pool"],
            ["reshard", f"{here}/tars", keys, "-o", out],
            ["embed", f"{here}/tars", "--encoder", "tests.toy:Toy", "-o", out],
        ):
            more = [] if command[0] in ("reshard", "embed") else ["--cache", str(tmp_path / "cache")]
            assert main([*command, *more, "--engine", "ray", "--workers", "2", "--quiet"]) == 2, command
            assert "cannot be read on node" in capsys.readouterr().err
    finally:
        os.close(folder)


# --- commands -------------------------------------------------------------------------------------

RECIPE = """
seed = 3
[[step]]
method = "semdedup"
clusters = 9
eps = 0.05
[[step]]
method = "clip-score"
keep = "80%"
[[step]]
method = "density"
clusters = 7
keep = "70%"
[[step]]
method = "clipcov"
classes = "CLASSES"
keep = "50%"
"""


def trees(tmp_path: Path, command: list[str], out: str) -> dict[str, dict[str, str]]:
    """Run a command on both engines, and return the hashes of what each writes."""
    found = {}
    for engine in ("serial", "ray"):
        where = tmp_path / engine / out
        more = ["--cache", str(tmp_path / engine / "cache")] if command[0] == "run" else []
        asked = [*command, "-o", str(where), *more, "--engine", engine, "--workers", "2", "--quiet"]
        assert main(asked) == 0
        found[engine] = hashes(where)
    return found


def test_run_gives_the_bytes_of_serial(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", clustered(3_000, 16, 12), clustered(3_000, 16, 9, seed=1), files=3)
    np.save(tmp_path / "classes.npy", clustered(6, 16, 6, seed=9))
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("CLASSES", str(tmp_path / "classes.npy")))
    found = trees(tmp_path, ["run", str(tmp_path / "recipe.toml"), str(tmp_path / "pool")], "out")
    assert found["ray"] == found["serial"]
    assert len(found["ray"]) > 10


MAKERS = {
    "tars": raw.tars,
    "parquet": lambda folder, rows: raw.parquet(folder / "0.parquet", rows),
    "files": raw.files,
    "csv": raw.open_clip_csv,
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "parquet" else pytest.mark.slow) for kind in MAKERS]
)
def test_embed_gives_the_bytes_of_serial(tmp_path: Path, kind: str) -> None:
    data = str(MAKERS[kind](tmp_path / "data", 45))
    command = ["embed", data, "--encoder", "tests.toy:Toy", "--per-shard", "10"]
    found = trees(tmp_path, command, "pool")
    assert found["ray"] == found["serial"]
    assert len(found["ray"]) == 1 + 3 * 5
    assert main([*command, "-o", str(tmp_path / "plain"), "--quiet", "--workers", "0"]) == 0
    assert hashes(tmp_path / "plain") == found["ray"]


def test_embed_with_images_decoded_elsewhere_gives_the_bytes_of_serial(tmp_path: Path) -> None:
    """One actor, and a CPU for images; one of them is damaged."""
    data = raw.tars(tmp_path / "data", 25)
    raw.write_tar(data / "00009.tar", [("bad", {"png": b"no image", "txt": b"a"}), ("good", {"png": raw.picture(0)})])
    for engine in (["serial"], ["ray", "--workers", "1"]):
        command = ["embed", str(data), "--encoder", "tests.toy:Pictures", "-o", str(tmp_path / engine[0])]
        assert main([*command, "--engine", *engine, "--quiet"]) == 0
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "serial")
    assert "key bad" in (tmp_path / "ray" / "set_aside.txt").read_text()


@dataclass(frozen=True)
class Careless(Serial):
    """Leaves the temporary file of a worker that was killed while it wrote."""

    path: Path = Path()

    def map(self, fn: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        for result in super().map(fn, tasks):
            if self.path.parent.is_dir():
                self.path.touch()
            yield result


def test_nothing_is_left_of_workers_that_were_killed(tmp_path: Path) -> None:
    data = str(raw.tars(tmp_path / "data", 12))
    half = tmp_path / "pool" / "metadata" / ".metadata_00000.parquet.0123abcd.tmp.parquet"
    api.embed(data, tmp_path / "pool", encoder="tests.toy:Toy", engine=Careless(path=half), progress=False)
    assert not half.exists()
    half = tmp_path / "shards" / ".00000000.tar.0123abcd.tmp.tar"
    keys = keys_file(tmp_path / "keys", ["000003"])
    api.reshard(data, Path(keys), tmp_path / "shards", engine=Careless(path=half), progress=False)
    assert not half.exists()
    assert (tmp_path / "shards" / "00000000.tar").exists()


def test_a_device_of_many_is_refused_with_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw.tars(tmp_path / "data", 5)
    command = ["embed", str(tmp_path / "data"), "--encoder", "tests.toy:Toy", "-o", str(tmp_path / "out")]
    assert main([*command, "--engine", "serial", "--device", "cuda:0,cuda:1"]) == 2
    assert "--device cuda:0,cuda:1: with --engine each worker has one device" in capsys.readouterr().err


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("more", [[], ["--shuffle", "1"]])
def test_reshard_gives_the_bytes_of_serial(tmp_path: Path, kind: str, more: list[str]) -> None:
    data = str(MAKERS[kind](tmp_path / "data", 45))
    names = [f"pictures/{i:06d}.png" if kind == "csv" else f"{i:06d}" for i in range(45)]
    keys = keys_file(tmp_path / "keys", names[::2])
    found = trees(tmp_path, ["reshard", data, keys, "--per-shard", "6", *more], "out")
    assert found["ray"] == found["serial"]
    assert len(found["ray"]) >= 2


def test_an_address_is_for_ray_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["inspect", "x"],
        ["inspect", "x", "--engine", "threads"],
        ["reshard", "x", "y", "-o", "z"],
        ["embed", "x", "-o", "z", "--encoder", "y"],
    ):
        assert main([*command, "--ray-address", "auto"]) == 2
        assert "--ray-address auto: is for --engine ray; pass that too" in capsys.readouterr().err


# --- on its own -----------------------------------------------------------------------------------


def running(folder: Path) -> list[str]:
    """The processes that were started with a folder for temporary files."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={folder}\0" in (process / "environ").read_text(errors="replace"):
                found.append((process / "cmdline").read_text(errors="replace").replace("\0", " ")[:100])
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "working"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_stopped_leaves_no_process(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    raw.tars(tmp_path / "tars", 120, 2)
    temporary = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # a short path
    command = [sys.executable, "-m", "thresher", "embed", str(tmp_path / "tars"), "--encoder", "tests.toy:Sleepy"]
    command += ["-o", str(tmp_path / "pool"), "--engine", "ray", "--workers", "2", "--quiet"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    try:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
            begin = time.monotonic()
            while not (len(running(temporary)) > 3 if moment == "starting" else list(tmp_path.glob("pool/*/*.npy"))):
                assert time.monotonic() - begin < 120
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(number)
            error = process.communicate(timeout=60)[1]
        if number != signal.SIGKILL:
            assert (process.returncode, error.strip().count("\n")) == (130, 0), error
            assert error.startswith("\ninterrupted; run the same command again")
        begin = time.monotonic()
        while left := running(temporary):
            assert time.monotonic() - begin < 150, left  # after SIGKILL, two helpers of Ray try to report first
            time.sleep(0.2)
        if number != signal.SIGKILL and moment == "working":
            assert not list(temporary.glob("thresher-ray-*"))
    finally:
        shutil.rmtree(temporary)
    assert main([*command[3:]]) == 0  # continues
    assert len(list(tmp_path.glob("pool/*/*.npy"))) == 120


@pytest.mark.slow
def test_a_cluster_that_loses_a_node_in_every_command_gives_the_bytes_of_serial(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", clustered(60_000, 32, 12), clustered(60_000, 32, 9, seed=1), files=3)
    np.save(tmp_path / "classes.npy", clustered(6, 32, 6, seed=9))
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("CLASSES", str(tmp_path / "classes.npy")))
    raw.tars(tmp_path / "tars", 300)
    keys = keys_file(tmp_path / "keys", [f"{i:06d}" for i in range(0, 300, 2)])
    commands = (
        f"run {tmp_path}/recipe.toml {tmp_path}/pool",
        f"embed {tmp_path}/tars --encoder tests.toy:Toy",
        f"reshard {tmp_path}/tars {keys} --per-shard 6 --shuffle 1",
    )
    program = [sys.executable, "-m", "tests.runtime.ray_cluster", str(tmp_path), *commands]
    done = finished(program, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("good\n")
