"""The flow `rollback`: gives the alias champion back to an earlier version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from flows.project.project import Project
from flows.release import steps


@flow(name="rollback")
def rollback(reason: str, name: str | None = None, to: int | None = None) -> dict[str, Any]:
    """Give `champion` back to its predecessor, or to version `to`; the reason goes on record."""
    record = steps.roll_back(Project(Path.cwd()), reason=reason, name=name, to=to)
    return record.model_dump(mode="json")
