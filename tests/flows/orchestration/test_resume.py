"""Which crashed flow runs are resumed, on a real Prefect server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Completed, Crashed, Failed, Running, State

from flows.orchestration import resume
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


def test_a_crashed_run_is_resumed_once(client: SyncPrefectClient) -> None:
    crashed = run(client, Crashed(name="Lost"))
    first = run(client, resumes=crashed)
    second = run(client, resumes=crashed)
    assert resume.refusal(crashed, first) is None
    assert resume.refusal(crashed, second) == f"flow run {crashed} is already resumed by {first}"
    run(client, Crashed(), resumes=crashed)
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
