"""Decides whether a flow run that an automation started still has a crashed one to resume.

The events that trigger the automations can be late, lost or repeated, for example after a restart
of the Prefect server. The states of flow runs on the server are reliable.
"""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

COMMIT = "commit:"
SETTLE_SECONDS = 30.0  # the automation that marks lost flow runs acts at the same time


def refusal(resumed: str, own: str) -> str | None:
    """The reason why flow run `own` must not resume `resumed`, or None if it may.

    A flow run is resumed once, and only if it crashed and was not cancelled.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        state = _settled(client, UUID(resumed))
        if state is None or not state.is_crashed():
            return f"flow run {resumed} has not crashed; it is {state.name if state else 'new'}"
        if any(past.is_cancelling() for past in client.read_flow_run_states(UUID(resumed))):
            return f"flow run {resumed} was cancelled"
        first = min(_resuming(client, resumed), key=lambda run: (run.created, run.id), default=None)
    if first is not None and str(first.id) != own:
        return f"flow run {resumed} is already resumed by {first.id}"
    return None


def record_commit(run: str, commit: str | None) -> None:
    """Note the commit of a flow run, as a tag, for the flow run that resumes it."""
    from prefect.client.orchestration import get_client

    if commit is None:
        return
    with get_client(sync_client=True) as client:
        tags = [tag for tag in client.read_flow_run(UUID(run)).tags if not tag.startswith(COMMIT)]
        client.update_flow_run(UUID(run), tags=[*tags, COMMIT + commit])


def commit_of(run: str) -> str | None:
    """The commit that a flow run used, if it got that far."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        tags = client.read_flow_run(UUID(run)).tags
    return next((tag.removeprefix(COMMIT) for tag in tags if tag.startswith(COMMIT)), None)


def _settled(client: Any, run: UUID) -> Any:
    """The state of a flow run; a running one is given time to be marked as lost."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        state = client.read_flow_run(run).state
        live = state is not None and (state.is_running() or state.is_pending())
        if not live or time.monotonic() > until:
            return state
        time.sleep(1)


def _resuming(client: Any, resumed: str) -> list[Any]:
    """The flow runs that were started to resume `resumed`."""
    from prefect.client.schemas.filters import FlowFilter, FlowRunFilter

    crashed = client.read_flow_run(UUID(resumed))
    same_flow = FlowFilter.model_validate({"id": {"any_": [crashed.flow_id]}})
    later = FlowRunFilter.model_validate({"expected_start_time": {"after_": crashed.created}})
    runs: list[Any] = []
    while page := client.read_flow_runs(
        flow_filter=same_flow, flow_run_filter=later, limit=200, offset=len(runs)
    ):
        runs += page
    return [run for run in runs if run.parameters.get("resumes") == resumed]
