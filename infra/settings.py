"""Ports, keys and addresses of a local stack."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import orjson

from rfdetr.files import atomic_path

HOST = "127.0.0.1"
PORTS = ("postgres", "s3", "mlflow", "prefect", "worker")
DATABASES = ("mlflow", "prefect")


class StackError(RuntimeError):
    """A service cannot be started; the message names the service, the cause and its log."""


@dataclass(frozen=True)
class StackSettings:
    """Ports and keys of one stack folder, generated once and kept in `stack.json` (mode 0600)."""

    ports: dict[str, int]
    database_password: str
    s3_key: str
    s3_secret: str
    work_pool: str = "local"

    @classmethod
    def load(cls, folder: Path) -> StackSettings:
        """Read the folder's settings, or choose free ports and keys and store them."""
        file = folder / "stack.json"
        if file.exists():
            return cls(**orjson.loads(file.read_bytes()))
        settings = cls(
            ports=dict(zip(PORTS, free_ports(len(PORTS)), strict=True)),
            database_password=secrets.token_hex(16),
            s3_key=secrets.token_hex(8),
            s3_secret=secrets.token_hex(16),
        )
        with atomic_path(file) as temporary:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as stream:
                stream.write(orjson.dumps(settings, option=orjson.OPT_INDENT_2))
        return settings

    def url(self, service: str) -> str:
        """The HTTP address of a service."""
        return f"http://{HOST}:{self.ports[service]}"

    def database(self, driver: str, name: str) -> str:
        """An SQLAlchemy address of one of the stack's databases."""
        port = self.ports["postgres"]
        return f"postgresql+{driver}://postgres:{self.database_password}@{HOST}:{port}/{name}"

    def client_environment(self, folder: Path) -> dict[str, str]:
        """The environment of a client of the stack: worker, command line, test."""
        return {
            **quiet_environment(),
            "PREFECT_API_URL": f"{self.url('prefect')}/api",
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            "AWS_ACCESS_KEY_ID": self.s3_key,
            "AWS_SECRET_ACCESS_KEY": self.s3_secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url("s3"),
            "MLFLOW_S3_ENDPOINT_URL": self.url("s3"),
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_WORKER_QUERY_SECONDS": "5",
            "RFDETR_WORK_POOL": self.work_pool,
            "RFDETR_STATE_DIR": str(folder / "state"),
            "RFDETR_DVC_CACHE": str(folder / "dvc-cache"),
            "RFDETR_DVC_REMOTE": "s3://dvc/pipeline",
        }


def free_ports(count: int) -> list[int]:
    """Distinct ports that are currently free on loopback."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind((HOST, 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def quiet_environment() -> dict[str, str]:
    """Telemetry and pickle off, for every process of the stack."""
    return {
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "",  # stages of a flow run share compiled bytecode
    }
