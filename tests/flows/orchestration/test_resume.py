"""Which crashed flow runs are resumed, on a real Prefect server."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Completed, Crashed, Failed, Running, State

from flows import retrain
from flows.orchestration import resume
from flows.project.project import Project
from tests.flows.prefect_fixtures import PrefectServer


@flow(name="resumed")
def resumed_flow(resumes: str | None = None) -> None:
    """Stands for a retraining: only its runs on the server matter."""


@pytest.fixture
def client(prefect_server: PrefectServer) -> Iterator[SyncPrefectClient]:
    at_server = temporary_settings({PREFECT_API_URL: prefect_server.url})
    with at_server, get_client(sync_client=True) as client:
        yield client


def run(client: SyncPrefectClient, *states: State[Any], resumes: str | None = None) -> str:
    made = client.create_flow_run(resumed_flow, parameters={"resumes": resumes}, state=Running())
    for state in states:
        client.set_flow_run_state(made.id, state, force=True)
    return str(made.id)


def test_a_crashed_run_is_resumed_once(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed = run(client, Crashed(name="Lost"))
    first = run(client, resumes=crashed)
    second = run(client, resumes=crashed)
    assert resume.refusal(crashed, first) is None
    assert resume.refusal(crashed, second) == f"flow run {crashed} is already resumed by {first}"
    run(client, Crashed(), resumes=crashed)
    monkeypatch.setattr(resume, "SETTLE_SECONDS", 0.0)
    assert resume.refusal(first, second) is not None, "the first one has not crashed"


@pytest.mark.parametrize("end", [Completed(), Completed(name="Skipped"), Failed()])
def test_a_run_that_ended_is_not_started_again(client: SyncPrefectClient, end: State[Any]) -> None:
    ended = run(client, end)
    reason = resume.refusal(ended, run(client, resumes=ended))
    assert reason == f"flow run {ended} has not crashed; it is {end.name}"


def test_a_cancelled_run_whose_host_was_lost_is_not_started_again(
    client: SyncPrefectClient,
) -> None:
    cancelled = run(client, Cancelling(), Crashed(name="Lost"))
    assert resume.refusal(cancelled, run(client, resumes=cancelled)) == (
        f"flow run {cancelled} was cancelled"
    )


def test_a_run_that_is_still_alive_is_left_alone(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "SETTLE_SECONDS", 0.0)
    alive = run(client)
    assert "it is Running" in str(resume.refusal(alive, str(uuid.uuid4())))


def test_a_run_without_work_ends_after_its_first_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a worker only; that it helps is seen in tests/services/test_deployment.py."""
    waited: list[float] = []
    monkeypatch.setattr(retrain.time, "sleep", waited.append)
    assert (retrain.skipped("no new data").name, waited) == ("Skipped", [])
    monkeypatch.setattr(retrain.runtime.deployment, "id", "some deployment", raising=False)
    assert retrain.skipped("no new data").name == "Skipped"
    assert waited == [retrain.FIRST_HEARTBEAT_SECONDS]


def test_the_commit_of_a_crashed_run_is_used_again(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch has moved since the crash; the run that resumes works on the old commit."""
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    origin.mkdir()
    git(origin, "init", "-q", "-b", "main")
    git(origin, "config", "user.email", "test@localhost")
    git(origin, "config", "user.name", "test")
    commits = []
    for text in ("old", "new"):
        (origin / "code.txt").write_text(text)
        git(origin, "add", ".")
        git(origin, "commit", "-qm", text)
        commits.append(git(origin, "rev-parse", "HEAD"))
    crashed = run(client, Crashed())
    resume.record_commit(crashed, commits[0])
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{origin}", str(clone))
    own = run(client, resumes=crashed)
    monkeypatch.setattr(retrain.runtime.flow_run, "id", own, raising=False)
    monkeypatch.setattr(retrain.runtime.deployment, "id", "some deployment", raising=False)
    lines: list[str] = []
    monkeypatch.setattr(retrain, "log_line", lambda: lines.append)
    retrain.use_code(Project(clone), None, crashed)
    assert (clone / "code.txt").read_text() == "old"
    assert resume.commit_of(own) == commits[0]
    resume.record_commit(crashed, "0" * 40)  # lost by a force-push
    retrain.use_code(Project(clone), None, crashed)
    assert "The training starts again if the code has changed" in lines[-1]


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()
