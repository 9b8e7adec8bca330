"""The connection of a process to Ray: what needs no Ray. What it starts and leaves behind is in ../test_ray.py."""

from __future__ import annotations

import faulthandler
import os
import socket
import stat
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from thresher import UsageError
from thresher.runtime.ray import connection
from thresher.runtime.ray.connection import Connection, settings_kept
from thresher.runtime.ray.needs import Needs

from .simulated import simulated_ray


def test_settings_of_the_process_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRESHER_TEST_KEPT", "1")
    monkeypatch.setenv("THRESHER_TEST_REMOVED", "2")
    before = dict(os.environ), list(sys.path), sys.excepthook, faulthandler.is_enabled()

    def spoil() -> None:
        with settings_kept():
            os.environ["THRESHER_TEST_KEPT"] = "3"
            os.environ["THRESHER_TEST_NEW"] = "4"
            del os.environ["THRESHER_TEST_REMOVED"]
            sys.path.append("/nowhere")
            sys.excepthook = print
            faulthandler.enable()
            raise OSError("Ray does not start")

    with pytest.raises(OSError, match="does not start"):
        spoil()
    assert (dict(os.environ), list(sys.path), sys.excepthook, faulthandler.is_enabled()) == before


def test_an_address_where_nothing_listens_is_found_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connection._check_port(f"127.0.0.1:{port}")
        connection._check_port(f"ray://127.0.0.1:{port}/more")
    with pytest.raises(ConnectionRefusedError):
        connection._check_port(f"127.0.0.1:{port}")
    for address in ("auto", "local", "host", "host:port", "host:65536"):  # Ray says what is wrong with them
        connection._check_port(address)


def test_the_path_of_sockets_is_short_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 50)))
    folder = connection._folder()
    try:
        assert folder.path.parent == Path("/tmp")
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    finally:
        folder.remove()
    assert not folder.path.exists()


def test_a_process_that_is_connected_already_takes_that_cluster_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    mine = Connection()
    assert mine.is_local("")
    assert not mine.is_local("auto")
    with simulated_ray(1) as ray:
        context = ray.get_runtime_context()
        ray.get_runtime_context = lambda: SimpleNamespace(**vars(context), gcs_address="10.0.0.1:6379")
        assert not mine.is_local("")
        for address in ("", "auto", "ray://10.0.0.7:10001", "localhost:1234", "10.0.0.1:6379"):
            mine.open(address, 2, Needs())
        with pytest.raises(
            UsageError, match=r"^Ray at 10.0.0.7:6379: this process is connected to 10.0.0.1:6379; call"
        ):
            mine.open("10.0.0.7:6379", 2, Needs())
    mine.close()
