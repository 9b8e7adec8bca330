"""Locks on remote file systems: a file that its holder writes again every few seconds, a lease.

Of several processes one creates the file (S3, Google Cloud Storage and memory decide that; other servers may let two
through that start in the same moment). A lease that has not been renewed for a while, by the clock of the server, has
ended: its holder was killed. The holder names its process, so that on the same machine nothing has to wait for that.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from thresher.errors import OutputError, ThresherError
from thresher.runtime.leases import LEASE, Hold, Lease, taken_over
from thresher.runtime.places import RemotePath

_FIRST_WORD, _NEXT_WORD = 5.0, 60.0  # seconds of waiting before the first message, and between messages
_PAUSE = 5.0  # seconds between looks, at most


def hold(path: RemotePath, what: str, wait: bool, say: Callable[[str], None] | None, lease: Lease = LEASE) -> Hold:
    """Create a lock file and keep its lease.

    Args:
        path: The lock file.
        what: What it protects, for messages.
        wait: Wait while another process holds it; otherwise raise.
        say: Called with a message after some seconds of waiting.
        lease: The same for all processes.

    Raises:
        OutputError: Another process holds the lock and ``wait`` is false, or the file cannot be written.
    """
    begin, pause, word = time.monotonic(), 0.05, _FIRST_WORD
    text = _new_content()
    while not path.create(text):
        known = _content(path)
        if known == text:  # it was created, but the answer was lost
            break
        if known is None or (_has_ended(path, known, lease) and _removed(path, known, lease)):
            continue
        using = (
            f"{what}: {_holder(known)} is using it (if it was killed on another machine, its lease ends after "
            f"{lease.ends:.0f} s)"
        )
        if not wait:
            raise OutputError(f"{using}; wait until it has finished")
        waited = time.monotonic() - begin
        if say and waited >= word:
            say(f"waiting for {using}, {waited:.0f} s so far")
            word = waited + _NEXT_WORD
        time.sleep(pause)
        pause = min(2 * pause, _PAUSE)
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, text, lease, ended), name=f"lease of {what}", daemon=True)
    thread.start()

    def release() -> None:
        ended.set()
        thread.join()
        with suppress(ThresherError):
            if _content(path) == text:  # only its holder removes it
                path.unlink(missing_ok=True)

    def check() -> None:
        if _content(path) != text:
            raise taken_over(what, lease)

    return Hold(release, check)


def _renew(path: RemotePath, text: bytes, lease: Lease, ended: threading.Event) -> None:
    """Write the lock file again every few seconds, until it is released or belongs to another process."""
    import tempfile

    while not ended.wait(lease.heartbeat):
        with suppress(ThresherError, OSError):  # the server may be back at the next time
            if _content(path) != text:
                return
            with tempfile.TemporaryDirectory() as folder:
                scratch = Path(folder) / "lease"
                scratch.write_bytes(text)
                path.upload(scratch)


def _has_ended(path: RemotePath, known: bytes, lease: Lease) -> bool:
    """Return whether the holder of a lock is known to be gone."""
    holder = _parsed(known)
    own = _own()
    if all(holder.get(name) == own[name] for name in ("host", "boot", "processes")):
        return _started(holder.get("process")) != holder.get("started")
    status = path.status()
    return status is not None and path.now() - status.st_mtime >= lease.ends


def _removed(path: RemotePath, known: bytes, lease: Lease) -> bool:
    """Remove the lock file of a holder that is gone; return whether it may be gone.

    Of several processes that want to do so, one at a time may: so none removes the file of the next holder.
    """
    claim = path.with_name(f".{path.name.lstrip('.')}.{blake2b(known, digest_size=8).hexdigest()}.tmp")
    text = _new_content()
    if not claim.create(text) and (other := _content(claim)) != text:  # the same: the answer was lost
        if other is not None and _has_ended(claim, other, lease):  # it was killed here
            claim.unlink(missing_ok=True)
        return False
    try:
        if _content(path) == known:
            path.unlink(missing_ok=True)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _content(path: RemotePath) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _holder(content: bytes) -> str:
    """Return the holder that a lock file names; the text comes from another process."""
    holder = _parsed(content)
    process, host = holder.get("process"), str(holder.get("host", ""))
    if isinstance(process, int) and host.isascii() and host.isprintable() and len(host) < 256:
        return f"process {process} on {host}"
    return "another process"


def _new_content() -> bytes:
    """Return the content of a file that no other process, and no other call, writes."""
    return json.dumps({**_own(), "token": secrets.token_hex(8)}).encode()


def _own() -> dict[str, Any]:
    """Return what identifies this process: its machine, the set of process numbers it is in, and when it started."""
    return {**_machine(), "process": os.getpid(), "started": _started(os.getpid())}


@cache
def _machine() -> dict[str, Any]:
    boot = processes = secrets.token_hex(8)  # unknown: like no other
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        processes = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "processes": processes}


def _started(process: object) -> str:
    """Return when a process of this machine started, "" if there is none."""
    if not isinstance(process, int):
        return ""
    try:
        return (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, IndexError):
        return ""
