"""Finds silent faults: versions, unsent records, leaked slots, leftovers on the disk.

With `--repair`, what can be repaired without losing anything is repaired.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from pydantic import BaseModel

from flows.cli.machine import machine_notes, machine_problems, project_problems
from flows.config.environment import Environment
from flows.core.errors import explain
from flows.core.locks import BusyError, locked
from flows.core.redact import redact
from flows.orchestration.limits import LEASE_SECONDS
from flows.orchestration.temporary_server import server_address
from flows.project.dvc import has_remote
from flows.project.project import Project
from flows.release.freshness import registry_of
from flows.release.repair import champion_problem, repair_champion
from flows.tracking.run import sync, unsent_journals
from rfdetr.errors import ConfigError
from rfdetr.tracking.delivery import deliver
from rfdetr.tracking.journal import JOURNAL, Journal

log = logging.getLogger(__name__)
OLD_DAYS = 30
REPAIR = "rfdetr-pipeline doctor --repair"
COPIES = ("unpacked", "exports", "downloads")  # every use refreshes the mtime
CACHES = ("profiles", "scores", "predictions", "checks")
LEASES_ENDED_S = LEASE_SECONDS + 20  # the server checks for expired leases every 15 s
LEASE_STORAGE = "prefect.server.concurrency.lease_storage.memory"


class Finding(BaseModel, frozen=True):
    """The result of one check; `repair` is the command that repairs a fault."""

    subject: str
    level: Literal["ok", "note", "problem"]
    text: str
    repair: str | None = None


def examine(project: Project, *, repair: bool = False) -> list[Finding]:
    """Run every check; with `repair`, repair what can be repaired without losing anything."""
    env, uri = project.env, project.tracking_uri
    checks: list[Callable[[], Iterator[Finding]]] = [
        _versions,
        lambda: _machine(project),
        lambda: _project(project),
        lambda: _unsent(env, uri, repair=repair),
        lambda: _interrupted(env, uri, repair=repair),
        lambda: _old_state(env, repair=repair),
        lambda: _old_copies(env, repair=repair),
        lambda: _remote(project.root),
        lambda: _registry(project, repair=repair),
        lambda: _prefect(repair=repair),
    ]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings.extend(check())
        except Exception as error:  # noqa: BLE001 - an unavailable server must not hide the rest
            text = explain(error).splitlines()[0]
            findings.append(Finding(subject="check", level="problem", text=text))
    return findings


def _versions() -> Iterator[Finding]:
    """Installed packages against the bounds of pyproject.toml."""
    wrong = []
    for text in metadata.requires("rfdetr-pipeline") or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": "pipeline"}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is outside {requirement.specifier}")
    level: Literal["ok", "problem"] = "problem" if wrong else "ok"
    yield Finding(subject="packages", level=level, text="; ".join(wrong) or "as required")


def _machine(project: Project) -> Iterator[Finding]:
    """What a run on this machine would fail on."""
    problems, notes = list(machine_problems(project)), list(machine_notes(project))
    for level, texts in (("problem", problems), ("note", notes)):
        for text in texts:
            yield Finding.model_validate({"subject": "machine", "level": level, "text": text})
    if not problems and not notes:
        yield Finding(subject="machine", level="ok", text="folders, disk and git are usable")


def _project(project: Project) -> Iterator[Finding]:
    """Files of the project that were replaced or damaged."""
    problems = list(project_problems(project))
    for text in problems:
        yield Finding(subject="project", level="problem", text=text)
    if not problems:
        yield Finding(subject="project", level="ok", text="files and folders are readable")


def _unsent(env: Environment, uri: str, *, repair: bool) -> Iterator[Finding]:
    """Tracking records that did not reach the server."""
    waiting = unsent_journals(env.state_dir, uri)
    if waiting and repair:
        left = [p for p in sync(env.state_dir, uri).values() if p]
        text = f"{len(waiting) - len(left)} journals sent, {len(left)} unsent"
        yield Finding(subject="journals", level="problem" if left else "ok", text=text)
    elif waiting:
        yield Finding(
            subject="journals",
            level="note",
            text=f"{len(waiting)} with unsent records below {env.state_dir}",
            repair="rfdetr-pipeline sync",
        )
    else:
        yield Finding(subject="journals", level="ok", text="everything was sent")


def _interrupted(env: Environment, uri: str, *, repair: bool) -> Iterator[Finding]:
    """Trainings of this project whose process died before it closed the MLflow run.

    A training that is resumed after the repair reopens its run.
    """
    open_journals = list(_open_journals(env.state_dir, uri, end=repair))
    if not open_journals:
        yield Finding(subject="trainings", level="ok", text="all running or finished")
        return
    text = f"{len(open_journals)} interrupted and not resumed"
    if not repair:
        yield Finding(subject="trainings", level="note", text=text, repair=REPAIR)
        return
    unsent = sum(not _delivered(journal, uri) for journal in open_journals)
    finished = sum((journal.folder / "done").exists() for journal in open_journals)
    text += f"; {len(open_journals) - unsent - finished} closed as KILLED in MLflow"
    text += f", {finished} as FINISHED" if finished else ""
    text += f", {unsent} unsent" if unsent else ""
    yield Finding(subject="trainings", level="note", text=text)


def _open_journals(state_dir: Path, uri: str, *, end: bool) -> Iterator[Journal]:
    """Journals of trainings that were started, not closed, and do not run; with `end`, closed.

    A training that finished is closed as FINISHED, even if its process died right after it.
    """
    for file in (state_dir / "fit").glob(f"*/{JOURNAL}"):
        try:
            with locked(file.parent):
                journal = Journal(file.parent, mask=redact)
                if not (journal.open and journal.belongs_to(redact(uri))):
                    continue
                if end:
                    journal.end("FINISHED" if (file.parent / "done").exists() else "KILLED")
        except (BusyError, ConfigError, OSError):  # it is running, or its journal is unreadable
            continue
        yield journal


def _delivered(journal: Journal, uri: str) -> bool:
    try:
        deliver(journal, uri)
    except Exception as error:  # noqa: BLE001 - the others are still sent; `sync` tries again
        log.warning("%s cannot be sent: %s", journal.folder, redact(str(error)))
        return False
    return True


def _old_state(env: Environment, *, repair: bool) -> Iterator[Finding]:
    """Resume state not used for a month; only finished trainings are removed.

    One with unsent records is kept: its journal is the only copy.
    """
    old = _old(env.state_dir / "fit")
    waiting = [journal.folder for journal in unsent_journals(env.state_dir)]
    done = [
        folder
        for folder in old
        if (folder / "done").exists() and not any(w.is_relative_to(folder) for w in waiting)
    ]
    text = f"{len(old)} trainings older than {OLD_DAYS} days, {_mebibytes(old)} MiB"
    yield _prune("state", text, old, done, "finished ones", repair=repair)


def _old_copies(env: Environment, *, repair: bool) -> Iterator[Finding]:
    """Copies and caches that were not used for a month; they can be made again."""
    for name in (*COPIES, *(cache for cache in CACHES if (env.state_dir / cache).is_dir())):
        old = _old(env.state_dir / name)
        text = f"{len(old)} not used for {OLD_DAYS} days, {_mebibytes(old)} MiB"
        yield _prune(name, text, old, old, "of them", repair=repair)


def _prune(
    subject: str, text: str, old: list[Path], useless: list[Path], which: str, *, repair: bool
) -> Finding:
    """Report what is old; with `repair`, remove `useless`."""
    if repair:
        for path in useless:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if repair and useless:
        text += f"; {len(useless)} {which} removed"
    advice = REPAIR if useless and not repair else None
    return Finding(subject=subject, level="note" if old else "ok", text=text, repair=advice)


def _old(folder: Path) -> list[Path]:
    """What is in `folder` and was last used over a month ago, except locks."""
    limit = time.time() - OLD_DAYS * 86400
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in paths if p.suffix != ".lock" and p.stat().st_mtime < limit)


def _mebibytes(paths: list[Path]) -> int:
    files = (f for path in paths for f in (path, *path.rglob("*")) if f.is_file())
    return sum(f.stat().st_size for f in files) >> 20


def _remote(root: Path) -> Iterator[Finding]:
    text = "a DVC remote is configured" if has_remote(root) else "no DVC remote: nothing is pushed"
    yield Finding(subject="dvc", level="ok" if has_remote(root) else "note", text=text)


def _registry(project: Project, *, repair: bool) -> Iterator[Finding]:
    """Whether the tracking server answers, and whether there is a champion that can be loaded."""
    registry = registry_of(project)
    done = repair_champion(project) if repair else []
    newest, aliases = next(registry.tagged({}), None), registry.aliases()
    named = ", ".join(f"{alias} {number}" for alias, number in sorted(aliases.items()))
    text = f"newest version {newest.number}; {named or 'no champion yet'}" if newest else "empty"
    yield Finding(subject="registry", level="ok", text="; ".join([text, *done]))
    problem = champion_problem(project)
    if problem is not None:
        advice = None if repair else REPAIR
        yield Finding(subject="champion", level="problem", text=problem, repair=advice)


def _prefect(*, repair: bool) -> Iterator[Finding]:
    """Whether the server is reachable, keeps leases on disk, and leaked no slot."""
    if server_address() is None:
        yield Finding(subject="prefect", level="ok", text="no server: flows use a temporary one")
        return
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
        if problem is not None:
            raise problem
        running = _running(client)
        yield Finding(
            subject="prefect", level="ok", text=f"reachable, {len(running)} flow runs active"
        )
        settings = client.request("GET", "/admin/settings").json()
        storage = settings.get("server", {}).get("concurrency", {}).get("lease_storage")
        if storage == LEASE_STORAGE:
            text = "leases are in memory: a restart of the server leaks the slots of running flows"
            yield Finding(subject="leases", level="problem", text=text)
        yield from _slots(client, running, repair=repair)


def _running(client: Any) -> list[Any]:
    from prefect.client.schemas.filters import FlowRunFilter

    wanted = {"state": {"type": {"any_": ["RUNNING", "CANCELLING", "PENDING"]}}}
    return list(client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted)))


def _slots(client: Any, running: list[Any], *, repair: bool) -> Iterator[Finding]:
    """Slots that are held although no flow run is active; a server restart can leak them.

    The expiry of a killed run's lease frees a slot, even one that was freed by hand and now belongs
    to another run. So the repair first waits until every lease has expired.
    """
    if running:
        return
    until = time.monotonic() + (LEASES_ENDED_S if repair else 0)
    while (held := _held(client)) and time.monotonic() < until:
        time.sleep(1)
    if held and repair and _running(client):
        text = "a flow run has started; try again when none is active"
        yield Finding(subject="limits", level="problem", text=text)
        return
    for limit in held:
        if repair:
            from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

            client.update_global_concurrency_limit(
                limit.name, GlobalConcurrencyLimitUpdate(active_slots=0)
            )
        yield Finding(
            subject=f"limit {limit.name}",
            level="note" if repair else "problem",
            text=f"{limit.active_slots} slots held without an active flow run"
            + ("; freed" if repair else ""),
            repair=None if repair else REPAIR,
        )


def _held(client: Any) -> list[Any]:
    limits = client.read_global_concurrency_limits(limit=200, offset=0)
    return [limit for limit in limits if limit.active_slots]
