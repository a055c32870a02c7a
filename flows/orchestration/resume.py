"""Whether a run that an automation started has anything to go on with.

Events about runs can be late, lost or held back, for example by a restart of the Prefect server;
what the server has on record about a run is not.
"""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

SETTLE_SECONDS = 30.0  # the automation that marks a lost run acts at the same time


def obstacle(resumed: str, own: str) -> str | None:
    """Why run `own` must not go on with the crashed run `resumed`; None when it shall.

    Only a run that crashed, that nobody cancelled, and that no other run goes on with is resumed.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        state = _settled(client, UUID(resumed))
        if state is None or not state.is_crashed():
            return (
                f"run {resumed} did not crash; it is {state.name if state else 'without a state'}"
            )
        if any(past.is_cancelling() for past in client.read_flow_run_states(UUID(resumed))):
            return f"run {resumed} was cancelled"
        first = min(_resuming(client, resumed), key=lambda run: (run.created, run.id), default=None)
    if first is not None and str(first.id) != own:
        return f"run {first.id} goes on with run {resumed} already"
    return None


def _settled(client: Any, run: UUID) -> Any:
    """The state of a run; one that still counts as running is given time to be marked as lost."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        state = client.read_flow_run(run).state
        live = state is not None and (state.is_running() or state.is_pending())
        if not live or time.monotonic() > until:
            return state
        time.sleep(1)


def _resuming(client: Any, resumed: str) -> list[Any]:
    """The runs that were started to go on with `resumed`."""
    from prefect.client.schemas.filters import FlowRunFilter

    begun = client.read_flow_run(UUID(resumed)).created
    later = FlowRunFilter.model_validate({"expected_start_time": {"after_": begun}})
    runs: list[Any] = []
    while page := client.read_flow_runs(flow_run_filter=later, limit=200, offset=len(runs)):
        runs += page
    return [run for run in runs if run.parameters.get("resumes") == resumed]
