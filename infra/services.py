"""The services of the local stack: commands, environment and health checks."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import yaml

from rfdetr.files import atomic_path

HOST = "127.0.0.1"
PORTS = ("postgres", "s3", "mlflow", "prefect", "worker")
DATABASES = ("mlflow", "prefect")


class StackError(RuntimeError):
    """A service cannot be started; the message names the service, the cause and its log."""


@dataclass(frozen=True)
class Service:
    """One process of the stack. `healthy` returns True when it answers; it runs as `user`."""

    name: str
    command: list[str]
    healthy: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    prepare: Callable[[], None] | None = None


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
