"""A running local stack with the project deployed on it, seen as an operator sees it: over HTTP."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

from flows.core.files import read_json
from infra.settings import PORTS, StackSettings
from infra.stack import supervisor_of

T = TypeVar("T")
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
PATIENCE = 800.0  # of one step; a loaded machine of two cores is slow


def wait_for(what: str, look: Callable[[], T], seconds: float = PATIENCE) -> T:
    """The first truthy answer of `look`; an unreachable server counts as no answer."""
    until = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < until:
        try:
            last = look()
        except (httpx.HTTPError, OSError) as error:
            last = error
        else:
            if last:
                return last
        time.sleep(0.5)
    raise AssertionError(f"waited {seconds:g} s for {what}; last seen: {last!r}")


@dataclass(frozen=True)
class LiveStack:
    """The stack's folder, the deployed project, and what tests ask of both."""

    folder: Path
    project: Path

    @property
    def settings(self) -> StackSettings:
        return StackSettings.load(self.folder)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a client: that of the stack, and the repository that workers clone."""
        beside = str(Path(sys.executable).parent)
        return {
            **os.environ,
            **self.settings.client_environment(self.folder),
            "RFDETR_GIT_URL": str(self.project),
            "RFDETR_GIT_BRANCH": "main",
            "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as a client, in the project."""
        done = subprocess.run(
            command, cwd=self.project, env=self.environment, capture_output=True, text=True
        )
        if check and done.returncode:
            raise AssertionError(f"{command} -> {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def module(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", *command, check=check)

    def api(self, method: str, path: str, body: object = None) -> Any:
        """One request to the Prefect server."""
        url = f"{self.settings.url('prefect')}/api{path}"
        answer = httpx.request(method, url, json=body, timeout=30)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def start(self, deployment: str = "retrain/manual", **params: Any) -> str:
        """Start a run with RetrainParams `params`; its id."""
        return self.start_with(deployment, params=params)

    def start_with(self, deployment: str, **parameters: Any) -> str:
        """Start a run of any flow with its `parameters`; its id."""
        found = self.api("GET", f"/deployments/name/{deployment}")
        body = {"parameters": parameters}
        return str(self.api("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.api("GET", f"/flow_runs/{run}")["state"] or {"type": "NONE"})

    def parameters(self, run: str) -> dict[str, Any]:
        """The RetrainParams that a run was started with."""
        return dict(self.api("GET", f"/flow_runs/{run}")["parameters"]["params"])

    def wait_final(self, run: str, *expected: str) -> dict[str, Any]:
        """The run's final state, which is one of `expected` (default: any)."""
        state = wait_for(f"the end of run {run}", lambda: self._final(run))
        if expected and state["type"] not in expected:
            raise AssertionError(f"{state['type']}: {state['message']}\n{self.log(run)}")
        return state

    def _final(self, run: str) -> dict[str, Any] | None:
        state = self.state(run)
        return state if state["type"] in FINAL else None

    def runs(self) -> list[dict[str, Any]]:
        """Every flow run, newest first."""
        body = {"sort": "EXPECTED_START_TIME_DESC", "limit": 200}
        return list(self.api("POST", "/flow_runs/filter", body))

    def task_states(self, run: str) -> dict[str, str]:
        """Task run name -> name of its state."""
        body = {"flow_runs": {"id": {"any_": [run]}}, "limit": 100}
        found = self.api("POST", "/task_runs/filter", body)
        return {
            task["name"].rpartition("-")[0] or task["name"]: task["state_name"] for task in found
        }

    def log(self, run: str) -> str:
        """What the run logged."""
        body = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200, "sort": "TIMESTAMP_DESC"}
        lines = self.api("POST", "/logs/filter", body)
        return "\n".join(line["message"] for line in reversed(lines))

    def slots(self, name: str = "gpu") -> int:
        """Slots of a limit that are held now."""
        return int(self.api("GET", f"/v2/concurrency_limits/{name}")["active_slots"])

    def free_slots(self, name: str = "gpu") -> None:
        """Release slots, as an operator does who knows that they are unused."""
        self.api("PATCH", f"/v2/concurrency_limits/{name}", {"active_slots": 0})

    def trainings(self) -> dict[Path, int]:
        """Folder of each training -> epochs finished."""
        records = (self.folder / "state" / "fit").glob("*/run.json")
        return {file.parent: int(read_json(file)["finished_epochs"]) for file in records}

    def wait_training(self, known: set[Path], epochs: int = 1) -> Path:
        """The folder of a training that is not `known`, once it has finished `epochs`."""

        def look() -> Path | None:
            new = [f for f, done in self.trainings().items() if f not in known and done >= epochs]
            return new[0] if new else None

        return wait_for(f"a new training to finish epoch {epochs}", look)

    def process(self, service: str) -> psutil.Process:
        """The process of a service, as the supervisor reports it."""
        return psutil.Process(self.pid(service))

    def pid(self, service: str) -> int:
        return int((self.folder / "pids" / service).read_text())

    def kill(self, service: str) -> None:
        """kill -9 of a service; returns when the supervisor has it healthy again."""
        old = self.process(service)
        old.kill()
        wait_for(f"{service} to end", lambda: not alive(old))
        wait_for(f"{service} to start again", lambda: self.pid(service) != old.pid)
        wait_for(f"{service} to be healthy", lambda: self.health()[service])

    def health(self) -> dict[str, bool]:
        done = self.module("infra.stack", "--folder", str(self.folder), "status", check=False)
        words = (line.split() for line in done.stdout.splitlines())
        return {line[0]: line[1] == "healthy" for line in words if line and line[0] in PORTS}

    def everything(self) -> list[psutil.Process]:
        """The supervisor's children and theirs."""
        return self.supervisor().children(recursive=True)

    def supervisor(self) -> psutil.Process:
        """The process that holds the lock of the stack's folder."""
        return psutil.Process(supervisor_of(self.folder))

    def flow_processes(self) -> list[psutil.Process]:
        """The engines of flow runs: children of the worker."""
        return [p for p in self.process("worker").children() if "prefect" in " ".join(p.cmdline())]

    def trainers(self) -> list[psutil.Process]:
        """Everything below this stack's flow runs that trains."""
        state = str(self.folder / "state")
        return [p for p in psutil.process_iter() if state in command_of(p)]


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def alive(process: psutil.Process) -> bool:
    """Running; a zombie that nobody has waited for yet is dead."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process whose environment or command names the stack's folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [*process.cmdline(), *process.environ().values()]
            if process.pid != os.getpid() and any(str(folder) in word for word in words):
                found.append(process)
    return found
