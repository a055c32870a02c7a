"""The flow `drift-check`: recent images against the champion's profile; drift is an event."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Completed

from flows.core.files import read_json
from flows.core.process import CommandFailed, run_streaming
from flows.inference import drift
from flows.inference.drift import DriftCheck, DriftParams
from flows.orchestration import artifacts
from flows.orchestration.children import StageFailedError, cause, log_line
from flows.orchestration.gpus import gpu_slot
from flows.orchestration.notify import notify
from flows.project.project import Project

EVENT = "rfdetr.drift.detected"


@flow(name="drift-check")
def drift_check(
    source: str | None = None, params: DriftParams | None = None
) -> State | dict[str, Any]:
    """Compare recent images with those that the champion was validated on.

    `source` is a folder or s3:// prefix; left empty, RFDETR_RECENT_IMAGES of the worker. Drift is
    reported, sent to people, and emitted as the event `rfdetr.drift.detected` of the resource
    `rfdetr.model.<name>`, on which an automation starts the deployment `retrain/manual`.
    """
    params = params or DriftParams()
    project = Project(Path.cwd())
    source = source or project.env.recent_images
    if not source:
        text = "no images to look at: give a source, or set RFDETR_RECENT_IMAGES for the worker"
        return Completed(name="Skipped", message=text)
    with contextlib.nullcontext() if params.device == "cpu" else gpu_slot(project, 1):
        check = compare_images(project.root, source, params)
    if check.report is None:
        return Completed(name="Skipped", message=check.skipped)
    artifacts.show_drift(project.root / drift.TEXT, project.root / drift.PLOT)
    if check.drifted:
        announce(project, check)
    return summary(check)


@task(retries=1, retry_delay_seconds=10, cache_policy=NO_CACHE)
def compare_images(root: Path, source: str, params: DriftParams) -> DriftCheck:
    """The check in a child process: no network lives in the flow's process."""
    command = [
        sys.executable,
        "-m",
        "flows.inference.drift",
        source,
        "--params",
        params.model_dump_json(),
    ]
    try:
        run_streaming(command, log_line(), cwd=root)
    except CommandFailed as error:
        raise StageFailedError(f"drift check failed: {cause('watch', error)}") from error
    return DriftCheck.model_validate(read_json(root / drift.REPORT))


def summary(check: DriftCheck) -> dict[str, Any]:
    """A check as small plain data, for the event and for people."""
    assert check.report is not None
    return {
        "model": check.model,
        "version": check.version,
        "source": check.source,
        "drifted": check.drifted,
        "alarms": check.report.alarms,
        "recent_images": check.report.recent_images,
        "values": {measure.name: measure.value for measure in check.report.measures},
    }


def announce(project: Project, check: DriftCheck) -> None:
    """Emit the event that automations wait for, and tell people."""
    facts = summary(check)
    resource = {
        "prefect.resource.id": f"rfdetr.model.{check.model}",
        "prefect.resource.name": check.model,
        "rfdetr.model.version": str(check.version),
    }
    emit_event(EVENT, resource=resource, payload=facts)
    measures = ", ".join(facts["alarms"])
    text = f"{check.source} differs from the training set in {measures}"
    notify(project.env, "drift detected", text, facts)
