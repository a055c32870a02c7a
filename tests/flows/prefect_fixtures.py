"""A real Prefect server for the session, and a tiny project that was retrained through it once."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.flows.mlflow_fixtures import free_port, stop, wait_for
from tests.flows.projects import environment, make_project, run

SECRET = "hunter2-planted-secret"
LEASES = "prefect.server.concurrency.lease_storage.filesystem"


class PrefectServer:
    """`prefect server start` on loopback with its own database."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}/api"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "server.log"
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                stdout=output,
                stderr=output,
                env={
                    **os.environ,
                    "PREFECT_HOME": str(self.folder),
                    # With the default, in memory, a restart would leak the slots for ever.
                    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES,
                },
                start_new_session=True,
            )
        wait_for(f"{self.url}/health", 180, log)

    def kill(self) -> None:
        if self._process is not None:
            stop(self._process)
            self._process = None

    def read(self, kind: str, **filters: Any) -> list[dict[str, Any]]:
        """Rows of `flow_runs`, `task_runs`, `artifacts` or `logs`, oldest first."""
        found: list[dict[str, Any]] = []
        while True:
            body = json.dumps({**filters, "offset": len(found), "limit": 200}).encode()
            request = urllib.request.Request(
                f"{self.url}/{kind}/filter", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                page = json.load(answer)
            found += page
            if len(page) < 200:
                return sorted(found, key=lambda row: row.get("created") or "")

    def last_run(self) -> dict[str, Any]:
        return self.read("flow_runs")[-1]

    def states(self, flow_run: str) -> dict[str, str]:
        """Name of each task run of a flow run -> name of its state."""
        chosen = {"flow_runs": {"id": {"any_": [flow_run]}}}
        return {row["name"]: row["state"]["name"] for row in self.read("task_runs", **chosen)}

    def artifacts(self, flow_run: str) -> dict[str, Any]:
        """Key -> data of the artifacts of a flow run."""
        chosen = {"artifacts": {"flow_run_id": {"any_": [flow_run]}}}
        return {row["key"]: row["data"] for row in self.read("artifacts", **chosen)}


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    server.start()
    yield server
    server.kill()


class Webhook:
    """Keeps the JSON bodies that are posted to `url`."""

    def __init__(self) -> None:
        posts: list[dict[str, Any]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self.posts = posts
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook?token={SECRET}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="session")
def webhook() -> Iterator[Webhook]:
    hook = Webhook()
    yield hook
    hook.close()


@dataclass
class Retrained:
    """A project folder with what its runs need from outside."""

    root: Path
    server: PrefectServer
    webhook: Webhook

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.root / 'mlflow.db'}"

    def environment(self) -> dict[str, str]:
        return environment(
            self.root,
            PREFECT_API_URL=self.server.url,
            PREFECT_HOME=str(self.server.folder),
            RFDETR_NOTIFY_URL=self.webhook.url,
            RFDETR_ACTOR="tester",
            PLANTED_API_KEY=SECRET,
        )

    def pipeline(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`rfdetr-pipeline` as a process in the project."""
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli.main", *arguments],
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{arguments} -> {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def copy(self, folder: Path) -> Retrained:
        """The same project elsewhere, with its own state and registry."""
        shutil.copytree(self.root, folder / "project", symlinks=True)
        shutil.copytree(self.root.parent / "state", folder / "state")
        return Retrained(folder / "project", self.server, self.webhook)


def make_retrainable(
    folder: Path, database: Path, server: PrefectServer, webhook: Webhook, **changes: Any
) -> Retrained:
    """A tiny project in git, whose registry is empty and which has not run yet."""
    root = make_project(folder / "project", **changes)
    shutil.copyfile(database, root / "mlflow.db")
    run(root, "git", "init", "-q", "-b", "main")
    run(root, "git", "config", "user.email", "test@localhost")
    run(root, "git", "config", "user.name", "test")
    run(root, "git", "add", ".")
    run(root, "git", "commit", "-qm", "first")
    return Retrained(root, server, webhook)


@pytest.fixture(scope="session")
def retrained(
    prefect_server: PrefectServer,
    webhook: Webhook,
    migrated_database: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Retrained:
    """Retrained once with secrets planted in URLs and in the working tree. Do not change it."""
    folder = tmp_path_factory.mktemp("retrained")
    project = make_retrainable(
        folder, migrated_database, prefect_server, webhook, fit={"epochs": 1}
    )
    root = project.root
    run(root, "git", "remote", "add", "origin", f"https://bot:{SECRET}@localhost/repo.git")
    with open(root / "params.yaml", "a", encoding="utf-8") as file:
        file.write(f"# see https://reader:{SECRET}@example.org/wiki\n")
    done = project.pipeline("retrain")
    (folder / "first.log").write_text(done.stdout + done.stderr)
    (folder / "first.id").write_text(prefect_server.last_run()["id"])
    return project
