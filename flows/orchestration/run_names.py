"""Names of flow runs that tell them apart in Prefect."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from prefect import runtime

from flows.project.project import Project
from rfdetr.errors import RFDETRError


def model_flow_time() -> str:
    """Registered model, flow and time of start, such as demo-drift-check-2026-11-28-0105."""
    flow = f"{runtime.flow_run.flow_name}-{datetime.now().astimezone():%Y-%m-%d-%H%M}"
    try:
        return f"{Project(Path.cwd()).params.registry.name}-{flow}"
    except RFDETRError:
        return flow  # the flow tells the reason
