"""Object storage for tests: a folder of fsspec's memory, and an S3 server on this machine."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec


def hashes_at(location: str) -> dict[str, str]:
    """The files below an address, and the SHA-256 of each."""
    fs, root = fsspec.core.url_to_fs(location)
    fs.invalidate_cache()
    return {
        path.removeprefix(root).lstrip("/"): hashlib.sha256(fs.cat_file(path)).hexdigest() for path in fs.find(root)
    }


def put(folder: Any, location: str) -> str:
    """Copy a folder to an address."""
    fs, root = fsspec.core.url_to_fs(location)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return location


@contextmanager
def s3_environment(monkeypatch: Any) -> Iterator[dict[str, str]]:
    """An S3 server that this process uses; clients of other servers are forgotten."""
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        try:
            yield environment
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextmanager
def s3_server(address: str = "127.0.0.1") -> Iterator[dict[str, str]]:
    """An S3 server with the bucket ``bucket``; yields the environment that leads to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=address, port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        client = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        urllib.request.urlopen(
            urllib.request.Request(f"{client.meta.endpoint_url}/moto-api/reset", method="POST")
        ).close()
        client.create_bucket(Bucket="bucket")
        client.close()
        yield environment
    finally:
        server.stop()
