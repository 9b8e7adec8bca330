"""What an error in reading a file means: damage, not reached, or neither."""

from __future__ import annotations

import errno
import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import faulty_fs
from tests.faulty_fs import HttpError, not_found_because
from thresher.errors import AccessError, MissingPackageError, OutputError, PoolError, UnreachedError, UsageError
from thresher.io.listing import Files, folders_below
from thresher.io.open import file_stamp, meaning_of, open_file, regular_file, trusting
from thresher.io.remote import RemoteFile, file_system, requested


def failing(error: Exception) -> Callable[[], Any]:
    def call() -> Any:
        raise error

    return call


def botocore_error(code: str, status: int) -> Exception:
    error = Exception(f"An error occurred ({code})")
    error.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}  # type: ignore[attr-defined]
    return error


def named(name: str, base: type[Exception] = Exception) -> Exception:
    """An error of a library that is not installed here, known by the name of its class."""
    error: Exception = type(name, (base,), {})("no")
    return error


def with_code(status: int, attribute: str) -> Exception:
    error = Exception("no")
    setattr(error, attribute, status)
    return error


DENIED = {
    "expired token of s3fs": PermissionError("The provided token has expired."),
    "mode 000": PermissionError(errno.EACCES, "Permission denied", "x"),
    "operation": OSError(errno.EPERM, "Operation not permitted"),
    "status 401": HttpError(401),
    "status 403": HttpError(403),
    "proxy": HttpError(407),
    "Azure": with_code(403, "status_code"),
    "Google": with_code(401, "code"),
    "botocore": botocore_error("ExpiredToken", 400),
    "botocore 403": botocore_error("Other", 403),
    "no credentials": named("NoCredentialsError"),
    "single sign-on": named("UnauthorizedSSOTokenError"),
    "refresh": named("RefreshError"),
    "hidden by fsspec": not_found_because(HttpError(403)),
}
UNREACHED = {
    "reset": ConnectionResetError(errno.ECONNRESET, "reset"),
    "refused": ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    "broken pipe": BrokenPipeError(errno.EPIPE, "pipe"),
    "timeout": TimeoutError("timed out"),
    "stale": OSError(errno.ESTALE, "Stale file handle"),
    "EIO": OSError(errno.EIO, "Input/output error"),
    "no route": OSError(errno.EHOSTUNREACH, "no route"),
    "busy": HttpError(503),
    "too many requests": HttpError(429),
    "gateway": HttpError(502),
    "botocore": botocore_error("SlowDown", 503),
    "aiohttp": named("ClientPayloadError"),
    "requests": named("ConnectionError"),
    "httpx": named("TransportError"),
    "open files": OSError(errno.EMFILE, "Too many open files"),
    "hidden by fsspec": not_found_because(ConnectionResetError("reset")),
}
DAMAGE = {
    "zip": zipfile.BadZipFile("no"),
    "zlib": zlib.error("no"),
    "lzma": lzma.LZMAError("no"),
    "end": EOFError("no"),
    "struct": struct.error("no"),
    "tar": tarfile.ReadError("no"),
    "text": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
    "JSON": json.JSONDecodeError("no", "", 0),
    "value": ValueError("no"),
    "an offset that cannot be": OSError(errno.EINVAL, "Invalid argument"),
    "Arrow": pa.ArrowInvalid("no"),
    "Arrow's types": pa.ArrowNotImplementedError("no"),
    "Arrow's keys": pa.lib.ArrowKeyError("no"),
}
NEITHER = {
    "memory": MemoryError("no"),
    "Arrow's memory": pa.ArrowMemoryError("no"),
    "a thread of Arrow": pa.ArrowException("Failed to launch worker thread: Resource temporarily unavailable"),
    "memory in the text of a library": ValueError("Unable to allocate 3 GiB for an array"),
    "package": ImportError("Install s3fs"),
    "key": KeyError("Contents"),
    "attribute": AttributeError("no"),
    "type": TypeError("no"),
    "bug": RuntimeError("no"),
    "assertion": AssertionError("no"),
    "an error of the system without a number": OSError("Unable to connect"),
}


@pytest.mark.parametrize("name", DENIED)
def test_denied_access_is_told_apart(name: str) -> None:
    with pytest.raises(
        AccessError, match="x.tar: not reached: access was denied .* run the same command again"
    ) as found:
        trusting("x.tar", failing(DENIED[name]))
    assert found.value.__cause__ is DENIED[name]


@pytest.mark.parametrize("name", UNREACHED)
def test_a_file_that_was_not_reached_is_not_damaged(name: str) -> None:
    with pytest.raises(UnreachedError, match="x.tar: (network or system error|not reached)") as found:
        trusting("x.tar", failing(UNREACHED[name]))
    assert type(found.value) is UnreachedError
    assert found.value.__cause__ is UNREACHED[name]


@pytest.mark.parametrize("name", DAMAGE)
def test_what_parsers_raise_is_damage(name: str) -> None:
    with pytest.raises(PoolError, match="x.tar: cannot be read, it may be truncated or damaged") as found:
        trusting("x.tar", failing(DAMAGE[name]))
    assert found.value.__cause__ is DAMAGE[name]


@pytest.mark.parametrize("name", NEITHER)
def test_all_other_errors_stay_what_they_are(name: str) -> None:
    with pytest.raises(type(NEITHER[name])) as found:
        trusting("x.tar", failing(NEITHER[name]))
    assert found.value is NEITHER[name]
    assert meaning_of("x.tar", NEITHER[name]) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_damage(number: int) -> None:
    """File systems keep copies of remote files."""
    with pytest.raises(OutputError, match="x.tar: a copy of it cannot be written .* free some space"):
        trusting("x.tar", failing(OSError(number, os.strerror(number))))


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "no", "x"), HttpError(404), not_found_because(HttpError(404))):
        with pytest.raises(PoolError, match="no such file"):
            trusting("x", failing(error))
    with pytest.raises(PoolError, match="is a folder"):
        open_file("file", str(tmp_path)).close()
    (tmp_path / "file").write_bytes(b"")
    os.symlink("loop", tmp_path / "loop")
    for name in ("nothing", "file/below", "loop", "n" * 300):
        with pytest.raises(PoolError, match="no such file"):
            file_stamp("file", str(tmp_path / name))
        assert regular_file(str(tmp_path / name)) is None
    assert regular_file(str(tmp_path)) is None
    assert regular_file("nul\0") is None
    assert regular_file(str(tmp_path / "file")) is not None


def test_damage_that_arrow_reports_without_a_kind(tmp_path: Path) -> None:
    """Arrow raises a bare OSError for a page that cannot be decompressed; so do file systems for lost connections."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [str(i) for i in range(10_000)]}), buffer, compression="snappy")
    good = buffer.getvalue()
    found = set[tuple[str, type]]()
    for at in range(10, len(good), max(1, len(good) // 60)):
        bad = bytearray(good)
        bad[at] ^= 0x10
        try:
            pq.ParquetFile(io.BytesIO(bytes(bad)), page_checksum_verification=True).read()
        except Exception as error:
            found.add((type(error).__name__, type(meaning_of("x", error))))
    assert ("OSError", PoolError) in found
    assert {meaning for _, meaning in found} == {PoolError}

    class Lost(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError("Unable to connect")

    with pytest.raises(OSError, match="Unable to connect"):
        trusting("x", lambda: pq.ParquetFile(Lost(good)).read())


def test_numbers_of_the_system_pass_through_arrow(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(UnreachedError, match="Input/output error"):
        trusting("x", lambda: pq.ParquetFile(Broken(bytes(64))).read())


@pytest.mark.parametrize("kind", ["gzip", "npy", "npz"])
def test_real_files_cut_off(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    if kind == "gzip":
        buffer.write(gzip.compress(bytes(range(256)) * 40))
    elif kind == "npy":
        np.save(buffer, np.arange(99))
    else:
        np.savez_compressed(buffer, a=np.arange(99))
    data = buffer.getvalue()
    load = (lambda raw: gzip.GzipFile(fileobj=raw).read()) if kind == "gzip" else np.load
    for size in range(1, len(data), 7):
        with pytest.raises(PoolError, match="may be truncated or damaged"):
            trusting("x", lambda size=size: _everything(load(io.BytesIO(data[:size]))))  # type: ignore[misc]


def _everything(loaded: Any) -> Any:
    return [loaded[name] for name in loaded.files] if hasattr(loaded, "files") else loaded


# --- local files ----------------------------------------------------------------------------------

_AS_ANOTHER_USER = """
import os, sys
import fsspec.implementations.local
import tenacity
from thresher.errors import AccessError
from thresher.io.listing import Files, folders_below
from thresher.io.open import file_stamp, open_file, regular_file
from thresher.io.remote import file_system
os.setgroups([]); os.setgid(65534); os.setuid(65534)
top = sys.argv[1]
for what in (
    lambda: open_file("file", f"{top}/secret"),
    lambda: regular_file(f"{top}/closed/file"),
    lambda: file_stamp("file", f"{top}/closed/file"),
    lambda: Files.at(top),
    lambda: list(folders_below(top)),
):
    try:
        print("no error:", what())
    except AccessError as error:
        print("denied")
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_what_another_user_may_not_read_is_not_missing(public: Path) -> None:
    (public / "secret").write_bytes(b"x")
    (public / "secret").chmod(0)
    (public / "closed").mkdir()
    (public / "closed" / "file").write_bytes(b"x")
    (public / "closed").chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-c", _AS_ANOTHER_USER, str(public)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[:-1] == ["denied"] * 5, done.stdout + done.stderr


# --- remote files ---------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    faulty_fs.register()
    path = tmp_path / "plan.json"
    monkeypatch.setenv(faulty_fs.PLAN, str(path))

    def write(**files: Any) -> None:
        for old in tmp_path.glob("plan.json.*"):
            old.unlink()
        path.write_text(json.dumps({name.replace("_", "."): what for name, what in files.items()}))

    return write


@pytest.mark.parametrize("error", ["reset", "slow", "busy", "hidden", "io"])
def test_a_request_is_tried_again_and_gives_the_same_bytes(tmp_path: Path, plan: Any, error: str) -> None:
    data = np.random.default_rng(0).bytes(700_000)
    (tmp_path / "a.bin").write_bytes(data)
    plan(a_bin={"error": error, "after": 1, "times": 1})
    with open_file("faulty", f"{tmp_path}/a.bin") as file:
        assert file.read(300_000) == data[:300_000]
        assert file.read() == data[300_000:]
        assert file.seek(-5, os.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        assert file.seek(10) == 10
        assert file.read(7) == data[10:17]
        into = bytearray(9)
        assert file.readinto(into) == 9  # type: ignore[attr-defined]
        assert bytes(into) == data[17:26]
    assert (tmp_path / "plan.json.a.bin.reads").stat().st_size > 2


def test_how_often_a_request_is_tried(tmp_path: Path, plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    for tries in ("1", "2"):
        monkeypatch.setenv("THRESHER_NETWORK_TRIES", tries)
        plan(a_bin={"error": "reset"})
        with open_file("faulty", f"{tmp_path}/a.bin") as file, pytest.raises(UnreachedError, match="reset by peer"):
            file.read()
        assert (tmp_path / "plan.json.a.bin.reads").stat().st_size == int(tries)
    for tries in ("0", "x", "-1", "1000"):
        monkeypatch.setenv("THRESHER_NETWORK_TRIES", tries)
        with pytest.raises(UsageError, match="THRESHER_NETWORK_TRIES=.*a number of tries from 1 to 999"):
            requested("x", lambda: None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [("expired", AccessError), ("forbidden", AccessError), ("memory", MemoryError), ("full", OutputError)],
)
def test_what_would_fail_again_is_tried_once(tmp_path: Path, plan: Any, error: str, kind: type[Exception]) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    plan(a_bin={"error": error})
    with open_file("faulty", f"{tmp_path}/a.bin") as file, pytest.raises(kind):
        file.read()
    assert (tmp_path / "plan.json.a.bin.reads").stat().st_size == 1


def test_a_remote_file_is_a_file(tmp_path: Path, plan: Any) -> None:
    (tmp_path / "lines.txt").write_bytes(b"one\ntwo\n\nfour")
    (tmp_path / "t.parquet").write_bytes(b"")
    pq.write_table(pa.table({"a": list(range(9))}), tmp_path / "t.parquet")
    with open_file("faulty", f"{tmp_path}/lines.txt") as file:
        assert list(file) == [b"one\n", b"two\n", b"\n", b"four"]
    assert file.closed
    with open_file("faulty", f"{tmp_path}/t.parquet") as file:
        assert pq.read_table(file).column("a").to_pylist() == list(range(9))
    raw = RemoteFile("faulty", f"{tmp_path}/lines.txt")
    assert raw.readable()
    assert raw.seekable()
    assert not raw.writable()
    assert raw.seek(2) == raw.tell() == 2
    assert raw.seek(2, os.SEEK_CUR) == 4
    assert raw.readall() == b"two\n\nfour"
    with pytest.raises(ValueError, match="not negative"):
        raw.seek(-1)
    raw.close()
    raw.close()
    with pytest.raises(ValueError, match="closed"):
        raw.read()
    with pytest.raises(PoolError, match="no such file"):
        open_file("faulty", f"{tmp_path}/nothing")


def test_a_location_that_no_package_opens() -> None:
    with pytest.raises(UsageError, match="nowhere://x: cannot be opened .*not known"):
        file_system("nowhere://x")
    with pytest.raises(UsageError, match="not known"):
        Files.at("nowhere://x")
    with pytest.raises((MissingPackageError, UsageError), match="dropbox://x"):
        file_system("dropbox://x")
    assert list(folders_below("/nothing/here")) == []
