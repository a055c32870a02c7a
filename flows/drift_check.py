"""The flow `drift-check`: compares recent images with the champion's profile; emits an event."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Completed

from flows.core.files import read_record
from flows.inference import drift
from flows.inference.drift import DriftCheck, DriftParams
from flows.orchestration import artifacts
from flows.orchestration.children import RETRIED, run_module
from flows.orchestration.gpus import gpu_slot
from flows.orchestration.notify import notify
from flows.orchestration.prefect_log import readable_prefect_log
from flows.orchestration.run_names import model_flow_time
from flows.project.project import Project

EVENT = "rfdetr.drift.detected"


@flow(name="drift-check", flow_run_name=model_flow_time)
def drift_check(
    source: str | list[str] | None = None, params: DriftParams | None = None
) -> State | dict[str, Any]:
    """Compare recent images with the champion's image profile.

    `source` is a folder or s3:// prefix, or several (default: RFDETR_RECENT_IMAGES of the worker).
    On drift, a notification is sent, and the event `rfdetr.drift.detected` of the resource
    `rfdetr.model.<name>` is emitted, which makes an automation start `retrain/manual`.
    """
    readable_prefect_log()
    params = params or DriftParams()
    project = Project(Path.cwd())
    source = source or project.env.recent_images
    if not source:
        text = "no source of images: pass `source`, or set RFDETR_RECENT_IMAGES for the worker"
        return Completed(name="Skipped", message=text)
    sources = [source] if isinstance(source, str) else source
    with contextlib.nullcontext() if params.device == "cpu" else gpu_slot(project, 1):
        check = compare_images(project, sources, params)
    if check.report is None:
        return Completed(name="Skipped", message=check.skipped)
    artifacts.show_drift(project.root / drift.TEXT, project.root / drift.PLOT)
    if check.drifted:
        announce(project, check)
    return check.summary()


@task(**RETRIED)
def compare_images(project: Project, sources: list[str], params: DriftParams) -> DriftCheck:
    """Run the check as a child process."""
    limit = project.params.runtime.stage_timeout_s
    options = ("--params", params.model_dump_json(), "--")  # a name may start with a hyphen
    run_module(project, "drift check", "flows.inference.drift", *options, *sources, timeout=limit)
    return read_record(project.root / drift.REPORT, DriftCheck)


def announce(project: Project, check: DriftCheck) -> None:
    """Emit the event that the automation waits for, and send a notification."""
    facts = check.summary()
    resource = {
        "prefect.resource.id": f"rfdetr.model.{check.model}",
        "prefect.resource.name": check.model,
        "rfdetr.model.version": str(check.version),
    }
    emit_event(EVENT, resource=resource, payload=facts)
    text = f"{check.source} differs from the training set in {', '.join(facts['alarms'])}"
    notify(project.env, "drift detected", text, facts)
