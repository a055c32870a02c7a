"""The pipeline as a Prefect flow: one thin task per stage, then registry, gate and promotion.

DVC decides what is out of date, so starting the flow again is always the right repair. No task
holds stage logic: each runs `dvc repro --single-item <stage>` as a child process.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.config.environment import Environment
from flows.config.overrides import RetrainParams
from flows.core.files import read_json
from flows.core.process import CommandFailed, run_streaming
from flows.gate.verdict import Verdict
from flows.orchestration import artifacts, resume
from flows.orchestration.children import (
    StageFailedError,
    cause,
    flow_run_name,
    log_line,
)
from flows.orchestration.gpus import gpu_slot
from flows.orchestration.limits import registry_slot
from flows.orchestration.notify import notify
from flows.project.dvc import dvc, has_remote
from flows.project.git import checkout
from flows.project.project import Project
from flows.project.publish import publish_lock
from flows.project.workspace import prepare_workspace, stage_names
from flows.release import freshness, steps
from flows.release.champion import ChampionChangedError
from flows.release.steps import Registered
from rfdetr.errors import ConfigError

# DVC's advice for a person at a terminal.
ADVICE = re.compile(
    r"To (track|enable) .*run:$|\s+(git add|dvc config) |Use `dvc push` to send|^\s*$"
)
SKIPPED = ("didn't change, skipping", "is cached - skipping run")


def _tell(what: str) -> Any:
    """A state hook that sends a notification."""

    def hook(flow: Any, flow_run: Any, state: State) -> None:  # noqa: ARG001  (passed by name)
        facts = {"run": flow_run.name, "run_id": str(flow_run.id), "state": state.name}
        notify(Environment.read(), f"{flow_run.name} {what}", state.message or "no message", facts)

    return hook


@flow(
    name="retrain",
    on_failure=[_tell("failed")],
    on_crashed=[_tell("crashed")],
    on_cancellation=[_tell("was cancelled")],
)
def retrain(
    params: RetrainParams | None = None, resumes: str | None = None
) -> State | dict[str, Any]:
    """Check the data, train, evaluate, register, and let the gate choose the champion.

    Works in the current folder: a checkout, or the clone that a worker made for this run. Returns
    the release: version, verdict, champion. `resumes` is set by the automations: the id of the
    crashed run that this one goes on with.
    """
    params = params or RetrainParams()
    why_not = resume.obstacle(resumes, str(runtime.flow_run.id)) if resumes else None
    if why_not:
        return Completed(name="Skipped", message=why_not)
    project = Project(Path.cwd())
    os.environ.setdefault("MLFLOW_TRACKING_URI", project.tracking_uri)
    if params.ref:
        use_ref(project, params.ref)
    project.override(params.changes())
    known = freshness.judged_version(project) if params.only_if_data_changed else None
    if known is not None:
        outcome = known.tags.get("gate.outcome", "champion")
        message = f"version {known.number} was trained on this dataset already ({outcome})"
        return Completed(name="Skipped", message=message)
    prepare(project)
    *before, fit, evaluate = stage_names(project)
    for stage in before:
        reproduce(project, stage)
    with gpu_slot(project):
        reproduce(project, fit)
        reproduce(project, evaluate)
    push_data(project)
    number = register(project)
    with gpu_slot(project, 1):
        verdict = gate(project, number)
    promote(project, number, verdict, allowed=params.promote)
    if params.publish:
        publish(project)
    return steps.summarise(project, number, steps.last_verdict(project))


def use_ref(project: Project, ref: str) -> None:
    """Stages, data pointers and parameters of `ref`; ConfigError outside of a worker's clone."""
    if runtime.deployment.id is None:
        raise ConfigError(f"ref is for runs on a worker; here, run `git checkout {ref}` first.")
    checkout(project.root, ref, log_line())
    project.reload()


@task(task_run_name="prepare", retries=2, retry_delay_seconds=[5, 30], cache_policy=NO_CACHE)
def prepare(project: Project) -> None:
    """DVC settings, and the data on the remote."""
    prepare_workspace(project, log_line())


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def reproduce(project: Project, stage: str) -> State:
    """One DVC stage; the state is `Cached` when nothing had to be done."""
    log, lines = log_line(), list[str]()
    limit = None if stage == "fit" else project.params.runtime.stage_timeout_s
    repro = ("--wait-for-lock", "repro", "--single-item", stage)
    with artifacts.TrainingProgress() as progress:

        def on_line(line: str) -> None:
            lines.append(line)
            if not ADVICE.match(line):
                log(progress.read(line))

        try:
            dvc(project.root, *repro, on_line=on_line, timeout=limit)
        except CommandFailed as error:
            raise StageFailedError(f"stage {stage} failed: {cause(stage, error)}") from error
        finally:
            if stage == "validate":
                artifacts.show_dataset_report(project.root)
    if stage == "evaluate":
        artifacts.show_pictures(project.root)
    if any(mark in line for line in lines for mark in SKIPPED):
        return Completed(name="Cached", message=f"{stage}: nothing has changed")
    return Completed(message=f"{stage}: done")


@task(task_run_name="push_data", retries=3, retry_delay_seconds=[5, 30, 120], cache_policy=NO_CACHE)
def push_data(project: Project) -> State:
    """Send data, checkpoints and the run cache to the DVC remote, when there is one."""
    if not has_remote(project.root):
        return Completed(name="Skipped", message="no DVC remote is configured")
    limit = project.params.runtime.stage_timeout_s
    for command in (["push"], ["push", "--run-cache"]):
        dvc(project.root, *command, on_line=log_line(), timeout=limit)
    return Completed(message="pushed")


@task(task_run_name="register", retries=3, retry_delay_seconds=[5, 30, 120], cache_policy=NO_CACHE)
def register(project: Project) -> int:
    """The trained model as a version of the registry; the same model is registered once."""
    with registry_slot(project):
        _release_child(project, "register")
    registered = Registered.model_validate(read_json(project.registered))
    artifacts.show_links(registered.links())
    return registered.number


@task(task_run_name="gate", cache_policy=NO_CACHE)
def gate(project: Project, number: int) -> Verdict:
    """Champion and challenger on the same test set; the verdict is recorded whatever it is."""
    return _judge(project, number)


@task(task_run_name="promote", retries=3, retry_delay_seconds=[5, 30, 120], cache_policy=NO_CACHE)
def promote(project: Project, number: int, verdict: Verdict, *, allowed: bool) -> State:
    """Move the alias `champion` if the gate says so and the run may.

    Another champion than the one that the gate knew makes it judge once more.
    """
    if not verdict.promote:
        return Completed(name="Kept", message=f"{verdict.outcome}: {verdict.reason}")
    if not allowed:
        return Completed(name="Kept", message="this run was started without promotion")
    try:
        record = steps.promote_winner(project, number, verdict)
    except ChampionChangedError:
        verdict = _judge(project, number)
        record = steps.promote_winner(project, number, verdict)
    if not verdict.promote:
        return Completed(name="Kept", message=f"{verdict.outcome}: {verdict.reason}")
    if record is None:
        return Completed(name="Kept", message=f"version {number} is champion already")
    return Completed(message=f"version {number} is champion: {record.reason}")


@task(task_run_name="publish", retries=3, retry_delay_seconds=[5, 30, 120], cache_policy=NO_CACHE)
def publish(project: Project) -> State:
    """Push dvc.lock and params.yaml to a branch of the run, for a person to merge."""
    if not has_remote(project.root):
        text = "no DVC remote is configured: nobody could get the data of a published dvc.lock"
        return Completed(name="Skipped", message=text)
    branch = publish_lock(project.root, flow_run_name() or "local", log_line())
    return Completed(message=f"pushed branch {branch}" if branch else "nothing is new")


def _judge(project: Project, number: int) -> Verdict:
    _release_child(project, "judge", str(number))
    verdict = steps.last_verdict(project)
    artifacts.show_verdict(verdict)
    return verdict


def _release_child(project: Project, *arguments: str) -> None:
    """A step of the release in a child process: no network lives in the flow's process."""
    command = [
        sys.executable,
        "-m",
        "flows.release.steps",
        "--flow-run",
        flow_run_name() or "",
        *arguments,
    ]
    limit = project.params.runtime.stage_timeout_s
    try:
        run_streaming(command, log_line(), cwd=project.root, timeout=limit)
    except CommandFailed as error:
        raise StageFailedError(f"{arguments[0]} failed: {cause('release', error)}") from error
