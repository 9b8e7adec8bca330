"""A program to run by hand, as root on Linux: Ray on three hosts with a network between them.

    python -m tests.runtime.hosts FOLDER [refused|shared|s3|workers|lost|killed ...]

from the root of the repository. FOLDER is made, and must not be in /tmp. Without names, all checks run: 10 minutes.

Each host is a set of namespaces: an address of its own on a bridge, its own /tmp and /dev/shm, its own processes, and
FOLDER/local, which no other host sees. FOLDER/shared stands for storage that all share; an S3 server has the address of
the bridge. The first host has the head of Ray and runs the commands, the others have a raylet each. Every result must
have the bytes of ``serial``, also if a host is cut off, a raylet is killed, or the command is killed and given again.
Prints one line for each check. All hosts end with the program, also on Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.embedding import raw
from tests.objects import hashes_at, put, s3_server
from tests.resharding.common import hashes, keys_file
from thresher.cli.main import main as thresher
from thresher.testing.pools import clustered, write_pool

from .test_ray import RECIPE

ROOT = Path(__file__).parents[2]
BRIDGE, NET = "thresher0", "10.77.0"
HEAD = f"{NET}.2:6379"

# The first process of a host. Its own folders, then it waits; processes that lost their parent are not kept.
FIRST = """
import signal, socket, subprocess, sys
for words in (["mount", "-t", "tmpfs", "tmpfs", "/tmp"], ["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
              ["mount", "--bind", *sys.argv[1:3]], ["ip", "link", "set", "lo", "up"]):
    subprocess.run(words, check=True)
socket.sethostname(sys.argv[3])
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
while True:
    signal.pause()
"""


def say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Host:
    """A host; its processes end with it."""

    def __init__(self, number: int, base: Path, environment: dict[str, str]) -> None:
        self.address, self.link = f"{NET}.{2 + number}", f"thresher{number}h"
        self.environment = environment
        own = base / f"host{number}"
        own.mkdir()
        spaces = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        first = [sys.executable, "-c", FIRST, str(own), str(base / "local"), f"host{number}"]
        self._keeper = subprocess.Popen(["unshare", *spaces, *first], stdout=subprocess.PIPE, text=True)
        try:
            self._connect(number)
        except BaseException:
            self.close()
            raise

    def _connect(self, number: int) -> None:
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == "ready\n"
        self._pid = child_of(self._keeper.pid)
        inside = "eth0"
        ip("link", "add", self.link, "type", "veth", "peer", "name", inside, "netns", str(self._pid))
        ip("link", "set", self.link, "master", BRIDGE, "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", inside)
        self.run("ip", "link", "set", inside, "up")

    def start(self, *words: str, **how: Any) -> subprocess.Popen[str]:
        """Start a program on the host."""
        spaces = ["--net", "--mount", "--uts", "--ipc", "--pid", f"--wd={ROOT}"]
        command = ["nsenter", f"--target={self._pid}", *spaces, *words]
        return subprocess.Popen(command, env={**os.environ, **self.environment}, text=True, **how)

    def run(self, *words: str) -> None:
        with self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            output = process.communicate()[0]
        assert process.returncode == 0, f"{words}: {output}"

    def ray(self, cpus: int, *more: str) -> None:
        """Start Ray here."""
        where = (
            ["--head", "--port=6379", "--include-dashboard=false"] if self.address in HEAD else [f"--address={HEAD}"]
        )
        sizes = [f"--num-cpus={cpus}", "--object-store-memory=200000000"]
        program = str(Path(sys.executable).parent / "ray")
        self.run(program, "start", *where, f"--node-ip-address={self.address}", *sizes, "--disable-usage-stats", *more)

    def thresher(self, *words: str) -> subprocess.Popen[str]:
        """Start a command on the cluster."""
        more = ["--engine", "ray", "--ray-address", HEAD, "--quiet"]
        return self.start(sys.executable, "-m", "thresher", *words, *more, stderr=subprocess.PIPE)

    def processes(self, *having: str) -> list[int]:
        """The processes whose command line has some words."""
        found, space = [], os.readlink(f"/proc/{self._pid}/ns/pid")
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if os.readlink(path / "ns" / "pid") == space and all(word in line for word in having):
                    found.append(int(path.name))
            except OSError:  # it ended meanwhile
                continue
        return found

    def kill(self, *having: str) -> int:
        """Kill processes; return how many."""
        found = self.processes(*having)
        for process in found:
            os.kill(process, signal.SIGKILL)
        return len(found)

    def plug(self, state: str) -> None:
        """Cut the network of the host, with "down", or bring it back, with "up"."""
        ip("link", "set", self.link, state)

    def close(self) -> None:
        self._keeper.kill()
        self._keeper.wait()
        # Connections that were open keep the network of the host for a while.
        subprocess.run(["ip", "link", "delete", self.link], check=False, stderr=subprocess.DEVNULL)


def child_of(process: int) -> int:
    """The only child of a process."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := Path(f"/proc/{process}/task/{process}/children").read_text().split():
            return int(found[0])
        time.sleep(0.01)
    raise AssertionError(f"{process} has no child")


@contextmanager
def hosts(count: int, base: Path) -> Iterator[list[Host]]:
    """Hosts on a bridge, and an S3 server at its address."""
    with ExitStack() as held:
        ip("link", "add", BRIDGE, "type", "bridge")
        held.callback(ip, "link", "delete", BRIDGE)
        ip("address", "add", f"{NET}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        environment = held.enter_context(s3_server(f"{NET}.1"))
        os.environ |= environment
        environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        made = []
        for number in range(count):
            made.append(Host(number, base, environment))
            held.callback(made[-1].close)
        yield made


def wait_for(there: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Wait until something is there, while a command runs."""
    end = time.monotonic() + 600
    while not there():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


def finished(process: subprocess.Popen[str]) -> None:
    error = process.communicate(timeout=1_800)[1]
    assert process.returncode == 0, error


def ids(folder: Path) -> dict[str, int]:
    """The files of a folder and their inodes: a file that is written again has another one."""
    return {str(path): path.stat().st_ino for path in folder.glob("[!.]*") if path.suffix in (".npy", ".parquet")}


def kept(before: dict[str, int], folder: Path) -> str:
    """Check that no file was written again; return how many there were."""
    after = ids(folder)
    again = [name for name, number in before.items() if after.get(name) != number]
    assert not again, f"written again: {again}"
    return f"{len(before)} finished files kept"


class Work:
    """The data, and the commands with their results of ``serial``."""

    def __init__(self, base: Path) -> None:
        self.shared, self.local = base / "shared", base / "local"
        rows = 4_000
        table = {"key": [f"{i:06d}" for i in range(rows)], "sha256": [f"{i % 3_900:064x}" for i in range(rows)]}
        write_pool(self.shared / "pool", clustered(rows, 32, 12), clustered(rows, 32, 9, seed=1), table, files=4)
        raw.tars(self.shared / "tars", 240)
        keys_file(self.shared / "keys", [f"{i:06d}" for i in range(0, 240, 2)])
        np.save(self.shared / "classes.npy", clustered(6, 32, 6, seed=9))
        text = RECIPE.replace("semdedup", "dedup").replace("clusters = 9\neps = 0.05\n", "")
        (self.shared / "recipe.toml").write_text(text.replace("CLASSES", str(self.shared / "classes.npy")))
        self.top = "s3://bucket/top"
        for name in ("pool", "tars"):
            put(self.shared / name, f"{self.top}/{name}")
        for name in self.commands(""):
            for top in (str(self.shared), self.top):
                assert thresher([*self.asked(name, top, "serial"), "--engine", "serial", "--quiet"]) == 0

    @staticmethod
    def commands(top: str) -> dict[str, list[str]]:
        tars = f"{top}/tars/{{00000..00023}}.tar"
        return {
            "run": ["run", "RECIPE", f"{top}/pool"],
            "select": ["select", "semdedup", f"{top}/pool", "--clusters", "9", "--eps", "0.3"],
            "embed": ["embed", tars, "--encoder", "tests.toy:Slow", "--batch-size", "4"],
            "reshard": ["reshard", tars, "KEYS", "--per-shard", "6"],
        }

    def asked(self, name: str, top: str, out: str) -> list[str]:
        """A command whose result goes to the folder ``out`` at ``top``."""
        there = {"RECIPE": str(self.shared / "recipe.toml"), "KEYS": str(self.shared / "keys")}
        words = [there.get(word, word) for word in self.commands(top)[name]]
        cache = ["--cache", str(self.shared / f"cache-{out}")] if name in ("run", "select") else []
        return [*words, "-o", f"{top}/{out}/{name}", *cache]

    def check(self, name: str, top: str, out: str) -> int:
        """Check that a result has the bytes of ``serial``; return the number of files."""
        found = hashes_at(f"{top}/{out}/{name}") if "://" in top else hashes(Path(top) / out / name)
        expected = hashes(self.shared / "serial" / name)
        if "://" in top:  # where what it was made from is differs, and is only in JSON
            there = hashes_at(f"{top}/serial/{name}")
            assert there.keys() == expected.keys()
            assert all(there[path] == expected[path] or path.endswith(".json") for path in there)
            expected = there
        assert found == expected, (name, top, sorted(found.items() ^ expected.items())[:4])
        return len(found)


def refused(work: Work, driver: Host) -> None:
    """What only the driver sees is refused at the start."""
    driver.run("cp", "-r", str(work.shared / "pool"), str(work.shared / "tars"), str(work.local))
    for name in ("run", "select", "embed", "reshard"):
        process = driver.thresher(*work.asked(name, str(work.local), "out"))
        error = process.communicate(timeout=600)[1]
        assert process.returncode == 2, error
        assert "cannot be read on node 10.77.0." in error, error
        say(f"{name} of a local path: {error.strip()[-200:]}")


def same(work: Work, driver: Host, top: str, out: str) -> None:
    """Every command gives the bytes of ``serial``."""
    for name in work.commands(""):
        begin = time.monotonic()
        finished(driver.thresher(*work.asked(name, top, out)))
        say(f"{name} at {top}: {work.check(name, top, out)} files as serial, {time.monotonic() - begin:.0f} s")


def loss(work: Work, driver: Host, name: str, out: str, lose: Callable[[], str]) -> None:
    """Something is lost when a command has finished two files; the others are not written again."""
    folder = work.shared / (f"cache-{out}" if name == "run" else f"{out}/{name}")
    there = folder / ("arrays" if name == "run" else "metadata")
    process = driver.thresher(*work.asked(name, str(work.shared), out))
    wait_for(lambda: there.exists() and len(ids(there)) >= 2, process)
    before = ids(there)
    what = lose()
    finished(process)
    say(f"{name}, {what}: {work.check(name, str(work.shared), out)} files as serial, {kept(before, there)}")


def killed(work: Work, driver: Host) -> None:
    """A command is killed when it has finished some files, and given again."""
    for name in ("embed", "run"):
        folder = work.shared / ("cache-killed/arrays" if name == "run" else f"killed/{name}/metadata")
        words = work.asked(name, str(work.shared), "killed")
        process = driver.thresher(*words)
        wait_for(lambda there=folder: there.exists() and len(ids(there)) >= 2, process)
        os.kill(child_of(process.pid), signal.SIGKILL)
        process.communicate()
        time.sleep(3)  # its workers end
        before = ids(folder)
        finished(driver.thresher(*words))
        files = work.check(name, str(work.shared), "killed")
        say(f"{name}, killed and given again: {files} files as serial, {kept(before, folder)}")


def workers(work: Work, driver: Host, first: Host, second: Host) -> None:
    """Workers with models are killed, and a host is cut off for a moment."""

    def actors() -> str:
        number = first.kill("ray::Kept") + second.kill("ray::Kept")
        assert number
        return f"{number} workers with models killed"

    def briefly() -> str:
        second.plug("down")
        time.sleep(4)
        second.plug("up")
        return "a host cut off for 4 s"

    for lose in (actors, briefly):
        loss(work, driver, "embed", lose.__name__, lose)


def lost(work: Work, driver: Host, second: Host) -> None:
    """A host is cut off, or its raylet is killed; it comes back after the command has ended."""

    def cut() -> str:
        second.plug("down")
        return "a host cut off"

    def crash() -> str:
        number = second.kill("raylet/raylet")
        assert number
        return f"{number} raylet killed"

    for name, lose in (("embed", cut), ("run", crash), ("embed", crash), ("run", cut)):
        loss(work, driver, name, f"{lose.__name__}-{name}", lose)
        second.plug("up")
        begin = time.monotonic()
        while second.processes("raylet/raylet") and time.monotonic() - begin < 120:
            time.sleep(0.5)  # Ray ends on a host that was given up
        say(f"Ray ended there after {time.monotonic() - begin:.0f} s; it starts again")
        second.kill("ray")
        second.ray(2)


def main(base: Path, chosen: list[str]) -> None:
    for name in ("shared", "local"):
        (base / name).mkdir(parents=True)
    with hosts(3, base) as (driver, first, second):
        work = Work(base)
        say("data and results of serial are written")
        driver.ray(0)
        for host in (first, second):
            host.ray(2)
        say("Ray runs on three hosts")
        checks: dict[str, Callable[[], None]] = {
            "refused": lambda: refused(work, driver),
            "shared": lambda: same(work, driver, str(work.shared), "out"),
            "s3": lambda: same(work, driver, work.top, "out"),
            "workers": lambda: workers(work, driver, first, second),
            "lost": lambda: lost(work, driver, second),
            "killed": lambda: killed(work, driver),
        }
        for name in chosen or checks:
            checks[name]()
    shutil.rmtree(base)
    say("good")


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # requests to the S3 server
    main(Path(os.path.abspath(sys.argv[1])), sys.argv[2:])
