"""The flow `retrain`: the DVC stages, then registration, gate and promotion.

DVC decides which stages are out of date, so a failed flow run is repaired by starting it again. The
tasks contain no stage logic: each runs `dvc repro` or a step of the release as a child process.
"""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.config.overrides import RetrainParams
from flows.gate.verdict import Verdict
from flows.orchestration import artifacts, resume
from flows.orchestration.children import (
    RETRIED,
    flow_run_name,
    log_line,
    run_dvc_stage,
    run_module,
)
from flows.orchestration.gpus import gpu_slot
from flows.orchestration.limits import registry_slot
from flows.orchestration.notify import notify_about
from flows.orchestration.prefect_log import readable_prefect_log
from flows.project.dvc import EXTRA_GRACE_S, dvc, has_remote
from flows.project.git import checkout, head_commit
from flows.project.project import Project
from flows.project.publish import publish_lock
from flows.project.workspace import prepare_workspace, stage_names
from flows.release import freshness, steps
from flows.release.champion import ChampionChangedError
from flows.release.judgement import last_verdict
from flows.release.registration import last_registered
from rfdetr.errors import ConfigError, RFDETRError

FIRST_HEARTBEAT_SECONDS = 5.0  # sent half a second after the start, delivered in batches


def run_name() -> str:
    """The name of a flow run: dataset, variant and time, with the changes of its parameters."""
    given = runtime.flow_run.parameters.get("params") or RetrainParams()
    try:
        return Project(Path.cwd()).run_name(RetrainParams.model_validate(given).changes())
    except (RFDETRError, ValueError):
        return f"retrain-{datetime.now().astimezone():%Y-%m-%d-%H%M}"  # the flow tells the reason


@flow(
    name="retrain",
    flow_run_name=run_name,
    on_failure=[notify_about("failed")],
    on_crashed=[notify_about("crashed")],
    on_cancellation=[notify_about("was cancelled")],
)
def retrain(
    params: RetrainParams | None = None, resumes: str | None = None
) -> State | dict[str, Any]:
    """Check the data, train, evaluate, register, and let the gate choose the champion.

    Works in the current folder: a checkout, or the clone that a worker made for this flow run.
    Returns version, verdict, metrics and champion. `resumes` is set by the automations: the id of
    the crashed flow run that this one resumes.
    """
    readable_prefect_log()
    params = params or RetrainParams()
    reason = resume.refusal(resumes, str(runtime.flow_run.id)) if resumes else None
    if reason:
        return skipped(reason)
    project = Project(Path.cwd())
    os.environ.setdefault("MLFLOW_TRACKING_URI", project.tracking_uri)  # for child processes
    use_code(project, params.ref, resumes)
    project.override(params.changes())
    known = freshness.judged_version(project) if params.only_if_data_changed else None
    if known is not None:
        outcome = known.tags.get("gate.outcome", "champion")
        message = f"version {known.number} was trained on this dataset already ({outcome})"
        return skipped(message)
    prepare(project)
    *before, fit, evaluate = stage_names(project)
    for stage in before:
        reproduce(project, stage)
    with gpu_slot(project):
        reproduce(project, fit)
        reproduce(project, evaluate)
    push_data(project)
    number = register(project)
    verdict = gate(project, number)
    promote(project, number, verdict, allowed=params.promote)
    if params.publish:
        publish(project)
    return steps.summarise(project, number, last_verdict(project))


def skipped(reason: str) -> State:
    """The end of a flow run without work, on a worker not before its first heartbeat has arrived.

    A heartbeat that reaches the server after the final state looks like a lost flow run: the
    automation would start another one, which ends as quickly, and so on without end.
    """
    if runtime.deployment.id is not None:
        time.sleep(FIRST_HEARTBEAT_SECONDS)
    return Completed(name="Skipped", message=reason)


def use_code(project: Project, ref: str | None, resumes: str | None) -> None:
    """Check out the commit of the flow run to resume, else `ref`, and record what is used.

    The branch may have moved since the crash, and other code would start the training again.
    """
    commit = resume.commit_of(resumes) if resumes else None
    try:
        if commit or ref:
            use_ref(project, str(commit or ref))
    except ConfigError as error:
        if commit is None:
            raise
        log_line()(f"{error} The training starts again if the code has changed since.")
    if runtime.deployment.id is not None:
        resume.record_commit(str(runtime.flow_run.id), head_commit(project.root))


def use_ref(project: Project, ref: str) -> None:
    """Check out `ref` in the clone of a worker. Raises ConfigError in a user's own checkout."""
    if runtime.deployment.id is None:
        raise ConfigError(
            f"ref is for flow runs on a worker; here, run `git checkout {ref}` first."
        )
    checkout(project.root, ref, log_line())
    project.reload()


@task(task_run_name="prepare", **RETRIED)
def prepare(project: Project) -> None:
    """Apply the DVC settings, and pull the data from the remote."""
    prepare_workspace(project, log_line())


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def reproduce(project: Project, stage: str) -> State:
    """Run one DVC stage. The state is `Cached` if its results were up to date."""
    runtime = project.params.runtime
    limit = None if stage == "fit" else runtime.stage_timeout_s
    grace = runtime.grace_s + EXTRA_GRACE_S
    try:
        with artifacts.TrainingProgress() as progress:
            ran = run_dvc_stage(project, stage, progress.read, timeout=limit, grace=grace)
    finally:
        if stage == "validate":
            artifacts.show_dataset_report(project.reports)
    if stage == "fit":
        artifacts.show_images(project.fit_picture)
    if stage == "evaluate":
        artifacts.show_images(project.reports / "curves", project.reports / "pictures")
    if not ran:
        return Completed(name="Cached", message=f"{stage}: nothing has changed")
    return Completed(message=f"{stage}: done")


@task(task_run_name="push_data", **RETRIED)
def push_data(project: Project) -> State:
    """Push data, models and the run cache to the DVC remote, if there is one."""
    if not has_remote(project.root):
        return Completed(name="Skipped", message="no DVC remote is configured")
    limit = project.params.runtime.stage_timeout_s
    for command in (["push"], ["push", "--run-cache"]):
        dvc(project.root, *command, on_line=log_line(), timeout=limit)
    return Completed(message="pushed")


@task(task_run_name="register", **RETRIED)
def register(project: Project) -> int:
    """Register the trained model, once; returns the number of its version."""
    with gpu_slot(project, 1), registry_slot(project):
        _release_step(project, "register", "--flow-run", flow_run_name() or "")
    registered = last_registered(project)
    artifacts.show_links(registered.links())
    return registered.number


@task(task_run_name="gate", cache_policy=NO_CACHE)
def gate(project: Project, number: int) -> Verdict:
    """Compare challenger and champion on the same test set, and record the verdict."""
    return _judge(project, number)


@task(task_run_name="promote", **RETRIED)
def promote(project: Project, number: int, verdict: Verdict, *, allowed: bool) -> State:
    """Make the version champion if the gate says so and the flow run may promote.

    If the champion has changed since the gate ran, the gate runs once more.
    """
    if not verdict.promote:
        return Completed(name="Kept", message=f"{verdict.outcome}: {verdict.reason}")
    if not allowed:
        return Completed(name="Kept", message="promotion is turned off for this flow run")
    try:
        record = steps.promote_winner(project, number, verdict)
    except ChampionChangedError:
        verdict = _judge(project, number)
        record = steps.promote_winner(project, number, verdict)
    if not verdict.promote:
        return Completed(name="Kept", message=f"{verdict.outcome}: {verdict.reason}")
    if record is None:
        return Completed(name="Kept", message=f"version {number} is already champion")
    return Completed(message=f"version {number} is champion: {record.reason}")


@task(task_run_name="publish", **RETRIED)
def publish(project: Project) -> State:
    """Push dvc.lock and params.yaml to a new branch, to be merged by hand."""
    if not has_remote(project.root):
        text = "no DVC remote is configured, so the data of a published dvc.lock would be missing"
        return Completed(name="Skipped", message=text)
    branch = publish_lock(project.root, flow_run_name() or "local", log_line())
    return Completed(message=f"pushed branch {branch}" if branch else "nothing new to publish")


def _judge(project: Project, number: int) -> Verdict:
    with gpu_slot(project, 1):
        _release_step(project, "judge", str(number))
    verdict = last_verdict(project)
    artifacts.show_verdict(verdict)
    return verdict


def _release_step(project: Project, step: str, *arguments: str) -> None:
    limit = project.params.runtime.stage_timeout_s
    run_module(project, step, "flows.release.steps", step, *arguments, timeout=limit)
