"""Which stages a run would execute, and why. Runs and writes nothing (stale DVC locks go)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from flows.core.locks import BusyError
from flows.project.dvc import forget_dead_locks
from flows.project.project import Project
from flows.project.workspace import current_version, stage_names, used_source

State = Literal["up to date", "runs", "may run"]


class StagePlan(BaseModel):
    """One stage: whether it would run, and because of which changes."""

    model_config = ConfigDict(frozen=True)

    stage: str
    state: State
    reasons: tuple[str, ...] = ()


def plan_stages(project: Project) -> list[StagePlan]:
    """The stages of a run in order. `may run`: an earlier stage runs, and its output may change.

    Raises BusyError while another DVC process is running in the folder.
    """
    from dvc.lock import LockError
    from dvc.repo import Repo, lock_repo

    root = project.root
    forget_dead_locks(root)
    with Repo(str(root)) as repo:
        try:
            with lock_repo(repo):  # so that both read dvc.yaml once
                status = repo.status()
                upstream = _upstream(repo.index.stages)
        except LockError as error:
            raise BusyError(f"{root} is in use by another process: {error}") from error
    plans: dict[str, StagePlan] = {}
    for name in stage_names(project):
        reasons = _reasons(status.get(name, []))
        if name.startswith("fetch@"):
            reasons += _source_changes(project)
        waiting = [
            p for p in upstream.get(name, ()) if p in plans and plans[p].state != "up to date"
        ]
        state: State = "runs" if reasons else "may run" if waiting else "up to date"
        after = tuple(f"after {parent}" for parent in sorted(waiting))
        plans[name] = StagePlan(stage=name, state=state, reasons=(*reasons, *after))
    return list(plans.values())


def _upstream(stages: Sequence[Any]) -> dict[str, set[str]]:
    """The names of the stages whose results each stage reads. DVC's own graph loads networkx."""
    owners = {Path(out.fs_path): stage.addressing for stage in stages for out in stage.outs}
    return {
        stage.addressing: {
            owner
            for path, owner in owners.items()
            for read in (Path(dep.fs_path) for dep in stage.deps)
            if path.is_relative_to(read) or read.is_relative_to(path)
        }
        for stage in stages
    }


def _source_changes(project: Project) -> list[str]:
    """Changes of the source on S3. Raises StorageError if S3 does not answer."""
    found = used_source(project)
    if found is None or current_version(found[1]) == found[1].version:
        return []
    change = "has changed" if found[1].version else "has no recorded version"
    return [f"{found[1].uri} {change}"]


def _reasons(changes: list[Any]) -> list[str]:
    """DVC's status of one stage as short texts."""
    found: list[str] = []
    for change in changes:
        if isinstance(change, str):
            found.append(change)
            continue
        for kind, items in change.items():
            if not isinstance(items, Mapping):
                found.append(f"{kind}: {items}")
                continue
            for path, what in items.items():
                found.extend(_changed(kind, path, what))
    return found


def _changed(kind: str, path: str, what: Any) -> list[str]:
    if isinstance(what, Mapping):  # parameters: name -> what happened to it
        return [f"{name} {how}" for name, how in what.items()]
    subject = "result" if kind == "changed outs" else ""
    return [f"{subject} {path} {what}".strip()]
