"""One migrated SQLite file a session, copied per test; a real server that can be killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def tracking_uri(migrated_database: Path, tmp_path: Path) -> str:
    """A new store: SQLite and a folder of artifacts beside it."""
    file = tmp_path / "tracking" / "mlflow.db"
    file.parent.mkdir()
    shutil.copyfile(migrated_database, file)
    return f"sqlite:///{file}"


class MlflowServer:
    """`mlflow server` over one SQLite file, on one port."""

    def __init__(self, database: str, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._database, self._folder = database, folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--workers",
            "1",
        ]
        command += ["--port", str(self.port), "--backend-store-uri", self._database]
        command += ["--artifacts-destination", str(self._folder / "served")]
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / "server.log", "ab") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )
        wait_for(f"{self.uri}/health", 60, self._folder / "server.log")

    def kill(self) -> None:
        if self._process is not None:
            stop(self._process)
            self._process = None


def wait_for(url: str, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > end:
                raise AssertionError(f"{url} did not answer\n{log.read_text()[-3000:]}") from None
            time.sleep(0.2)


@pytest.fixture
def mlflow_server(tracking_uri: str, tmp_path: Path) -> Iterator[MlflowServer]:
    """Not started yet; the test starts, kills and restarts it."""
    server = MlflowServer(tracking_uri, tmp_path / "server")
    yield server
    server.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=20)


def runs(uri: str) -> list:
    client = MlflowClient(tracking_uri=uri)
    ids = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(ids, run_view_type=ViewType.ALL))


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    found = MlflowClient(tracking_uri=uri).get_metric_history(run_id, key)
    return sorted((m.step, m.value) for m in found)


def artifacts(uri: str, run_id: str, path: str | None = None) -> set[str]:
    return {f.path for f in MlflowClient(tracking_uri=uri).list_artifacts(run_id, path)}
