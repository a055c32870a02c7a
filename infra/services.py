"""The services of the local stack: commands, environment and health checks."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from infra.settings import DATABASES, HOST, StackError, StackSettings, quiet_environment


@dataclass(frozen=True)
class Service:
    """One process of the stack. `healthy` returns True when it answers; it runs as `user`."""

    name: str
    command: list[str]
    healthy: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    prepare: Callable[[], None] | None = None


def answers(url: str) -> bool:
    """Whether `url` answers with a status below 400 within two seconds."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310  (our own address)
            return bool(response.status < 400)
    except OSError:
        return False


def listens(port: int) -> bool:
    """Whether something accepts connections on a loopback port."""
    try:
        with socket.create_connection((HOST, port), timeout=2):
            return True
    except OSError:
        return False


def tool(name: str) -> str:
    """Path of a console script: from this environment, else from PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise StackError(f"'{name}' is not next to {sys.executable} or on PATH; run make setup")
    return found


def postgres_tool(name: str) -> str:
    """Path of a PostgreSQL program: RFDETR_PG_BIN, Debian's folders (newest first), PATH."""
    folders = [Path(f) for f in os.environ.get("RFDETR_PG_BIN", "").split(os.pathsep) if f]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / name).exists():
            return str(folder / name)
    found = shutil.which(name)
    if not found:
        raise StackError(
            f"PostgreSQL's '{name}' was not found; install it (Debian: apt-get install postgresql) "
            "or set RFDETR_PG_BIN to its folder"
        )
    return found


def postgres_folder(folder: Path) -> tuple[Path, str | None]:
    """The data folder, and the user to run as, because PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return folder / "postgres", None
    key = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return Path("/var/tmp") / f"rfdetr-stack-{key}" / "postgres", "postgres"  # noqa: S108


def postgres(folder: Path, settings: StackSettings) -> Service:
    """PostgreSQL on loopback with password authentication."""
    data, user = postgres_folder(folder)
    port = settings.ports["postgres"]

    def prepare() -> None:
        if (data / "PG_VERSION").exists():
            return
        data.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        password = data.parent / "password"
        password.write_text(settings.database_password)
        if user:
            shutil.chown(data.parent, user)
            shutil.chown(password, user)
        try:
            _quietly(
                [
                    postgres_tool("initdb"),
                    "-D",
                    str(data),
                    "-U",
                    "postgres",
                    "-E",
                    "UTF8",
                    "--auth=scram-sha-256",
                    f"--pwfile={password}",
                    "--no-sync",
                ],
                user=user,
            )
        finally:
            password.unlink(missing_ok=True)

    ready = [postgres_tool("pg_isready"), "-q", "-h", HOST, "-p", str(port), "-U", "postgres"]
    return Service(
        name="postgres",
        command=[postgres_tool("postgres"), "-D", str(data), "-h", HOST, "-p", str(port), "-k", ""],
        healthy=lambda: subprocess.run(ready, check=False).returncode == 0,
        user=user,
        prepare=prepare,
    )


def create_databases(settings: StackSettings) -> None:
    """Create the databases of MLflow and Prefect if missing."""
    import psycopg2

    with_password = {"user": "postgres", "password": settings.database_password}
    connection = psycopg2.connect(
        host=HOST, port=settings.ports["postgres"], dbname="postgres", **with_password
    )
    try:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("select datname from pg_database")
        present = {row[0] for row in cursor.fetchall()}
        for name in DATABASES:
            if name not in present:
                cursor.execute(f"create database {name}")  # names are constants above
    finally:
        connection.close()


def s3(folder: Path, settings: StackSettings) -> Service:
    """An S3 server (rclone) that serves a folder; each bucket is a subfolder."""
    store = folder / "s3"
    port = settings.ports["s3"]

    def prepare() -> None:
        for bucket in buckets():
            (store / bucket).mkdir(parents=True, exist_ok=True)

    return Service(
        name="s3",
        command=[
            tool("rclone"),
            "serve",
            "s3",
            str(store),
            "--addr",
            f"{HOST}:{port}",
            "--vfs-cache-mode",
            "off",
            "--config",
            str(folder / "rclone.conf"),
        ],
        env={"RCLONE_AUTH_KEY": f'"{settings.s3_key},{settings.s3_secret}"'},
        healthy=lambda: listens(port),
        prepare=prepare,
    )


def mlflow_server(folder: Path, settings: StackSettings) -> Service:
    """The MLflow server: records in PostgreSQL, artifacts on S3 through the server."""
    return Service(
        name="mlflow",
        command=[
            tool("mlflow"),
            "server",
            "--host",
            HOST,
            "--port",
            str(settings.ports["mlflow"]),
            "--artifacts-destination",
            "s3://mlflow",
            "--workers",
            "1",
        ],
        env={
            **settings.client_environment(folder),
            "MLFLOW_BACKEND_STORE_URI": settings.database("psycopg2", "mlflow"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        healthy=lambda: answers(f"{settings.url('mlflow')}/health"),
        prepare=lambda: create_databases(settings),
    )


def prefect_server(folder: Path, settings: StackSettings) -> Service:
    """The Prefect server on PostgreSQL; leases are on disk, so a restart leaks no slots."""
    return Service(
        name="prefect",
        command=[
            tool("prefect"),
            "server",
            "start",
            "--host",
            HOST,
            "--port",
            str(settings.ports["prefect"]),
        ],
        env={
            **quiet_environment(),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_DATABASE_CONNECTION_URL": settings.database("asyncpg", "prefect"),
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
                "prefect.server.concurrency.lease_storage.filesystem"
            ),
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect.server.events.ordering.db",
            "PREFECT_SERVER_UI_API_URL": f"{settings.url('prefect')}/api",
        },
        healthy=lambda: answers(f"{settings.url('prefect')}/api/health"),
    )


def worker(folder: Path, settings: StackSettings) -> Service:
    """A process worker with a health endpoint; it creates its work pool if missing."""
    environment = {
        **settings.client_environment(folder),
        "PREFECT_HOME": str(folder / "worker"),
        "PREFECT_WORKER_WEBSERVER_HOST": HOST,
        "PREFECT_WORKER_WEBSERVER_PORT": str(settings.ports["worker"]),
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # not 10: the server is on this machine
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return Service(
        name="worker",
        command=[
            tool("prefect"),
            "worker",
            "start",
            "--pool",
            settings.work_pool,
            "--type",
            "process",
            "--with-healthcheck",
        ],
        env=environment,
        healthy=lambda: answers(f"{settings.url('worker')}/health"),
    )


def buckets() -> list[str]:
    """The S3 buckets of the deployed stack, which the local one has too."""
    compose = yaml.safe_load((Path(__file__).parent / "compose.yaml").read_text(encoding="utf-8"))
    return str(compose["services"]["s3-buckets"]["environment"]["BUCKETS"]).split()


def all_services(folder: Path, settings: StackSettings) -> list[Service]:
    """The services in start order."""
    makers = (postgres, s3, mlflow_server, prefect_server, worker)
    return [make(folder, settings) for make in makers]


def _quietly(command: list[str], user: str | None = None) -> None:
    done = subprocess.run(command, user=user, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode:
        raise StackError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip()[-500:]}")
