"""The flow `rollback`: makes an earlier version champion again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from flows.config.sections import Name
from flows.orchestration.prefect_log import readable_prefect_log
from flows.orchestration.run_names import model_flow_time
from flows.project.project import Project
from flows.release import steps


@flow(name="rollback", flow_run_name=model_flow_time)
def rollback(reason: str, name: Name | None = None, to: int | None = None) -> dict[str, Any]:
    """Restore the previous champion, or version `to`, and record the reason."""
    readable_prefect_log()
    record = steps.roll_back(Project(Path.cwd()), reason=reason, name=name, to=to)
    return record.model_dump(mode="json")
