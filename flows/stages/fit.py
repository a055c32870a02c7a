"""The stage `fit`: training in a child process group, resumed from its last checkpoint.

`python -m flows.stages.fit` trains. `rfdetr-pipeline fit --retry` forgets failed attempts first.
`python -m flows.stages.fit --join` runs on the other machines of a training on several nodes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from flows.config.batch_plan import plan_batch
from flows.core.digest import path_digest, paths_digest
from flows.core.errors import USAGE
from flows.core.locks import locked
from flows.core.process import CommandFailed, run_streaming
from flows.core.redact import redact
from flows.core.stopping import Terminated
from flows.fit_job import job as jobs
from flows.fit_job.job import Failed, FitJob, FitResult, Killed, Stopped
from flows.fit_job.mirror import Mirror
from flows.fit_job.resume_state import FitState
from flows.project.project import Project
from flows.stages.runner import run_stage
from flows.stages.trained_model import collect
from flows.stages.validate import require_valid
from flows.storage.packs import open_dataset
from flows.tracking.run import close_run
from rfdetr.errors import RFDETRError
from rfdetr.files import remove_leftovers
from rfdetr.progress import EpochProgress
from rfdetr.tracking.journal import JOURNAL

SECTIONS = ["dataset", "model", "fit"]
JOIN_SECONDS = 600.0
SAME_DEVICES = "Set runtime.devices to one number that all nodes have."
# Code of the stage that does not shape the training: a change rewrites the outputs only.
AFTER_TRAINING = {"flows/stages/trained_model.py"}


class FitError(RFDETRError):
    """The training failed; the text is the trainer's own."""


def fit(project: Project) -> None:
    """Train, and write models/trained, metrics/fit.json and plots/fit.csv.

    Raises ConfigError before any work, FitError with the trainer's reason, BusyError if the same
    training is running, AttemptsError if it keeps failing, and Terminated if it was stopped.
    """
    require_valid(project)
    job = plan(project)
    with trained(project, job) as state:
        collect(project, job, state.folder, state.read().seconds)


@contextlib.contextmanager
def trained(project: Project, job: FitJob) -> Iterator[FitState]:
    """The state of the finished training of `job`, locked; trains or resumes it first."""
    env = project.env
    state = FitState(env.state_dir, fingerprint(project, job))
    mirror = Mirror(state.folder, env.state_url)
    with locked(state.folder):
        for name in ("*.ckpt", "*.pth", "run.json", "job.json"):
            remove_leftovers(state.folder, name)
        if state.done:
            _say(f"already trained: {state.folder} is complete")
        else:
            mirror.fetch()
            _say_if_superseded(state)
            if env.fit_retry:
                state.update(attempts=0)
            _train(project, job, state, mirror)
        yield state


def plan(project: Project) -> FitJob:
    """The job for the trainers. Raises ConfigError for what this machine cannot do."""
    params = project.params
    accelerator, devices = jobs.resolve_devices(params.runtime)
    batch = plan_batch(params.fit, devices * params.runtime.nodes)
    data = open_dataset(project.dataset_dir, project.env.state_dir)
    train: dict[str, Any] = {
        **params.fit.train_fields(),
        "dataset_dir": str(data.absolute()),
        "dataset_file": params.dataset.layout,
        "batch_size": batch.batch_size,
        "grad_accum_steps": batch.grad_accum_steps,
        "num_workers": params.runtime.num_workers,
        "tensorboard": False,
    }
    return FitJob(
        model=params.model,
        train=train,
        initial=str((project.initial / "model.ckpt").absolute()),
        precision=params.fit.precision,
        accelerator=accelerator,
        devices=devices,
        nodes=params.runtime.nodes,
        params={**params.snapshot(*SECTIONS), "batch": batch.model_dump()},
        run_name=project.run_name(),
        dataset={
            "name": params.dataset.name,
            "digest": project.dataset_digest(),
            "source": _source(project),
        },
    )


def fingerprint(project: Project, job: FitJob) -> dict[str, Any]:
    """Everything that must stay the same for a training to be resumed rather than restarted."""
    return {
        **project.params.snapshot(*SECTIONS),
        "data": job.dataset["digest"],
        "initial": path_digest(job.initial, project.digests),
        "effective_batch": job.params["batch"]["effective"],
        "code": paths_digest(project.root, code_of_training(project), project.digests),
    }


def code_of_training(project: Project) -> list[str]:
    """The code among the dependencies of the stage in dvc.yaml that shapes the training."""
    code = [d for d in project.graph["fit"]["deps"] if d.startswith(("flows/", "rfdetr/"))]
    return [path for path in code if path not in AFTER_TRAINING]


def _source(project: Project) -> str:
    sources, folder = project.params.sources, project.params.dataset.dir
    name = Path(folder).name
    return sources[name].uri if name in sources else folder


def _say_if_superseded(state: FitState) -> None:
    """Say why a training that was started before does not continue."""
    if state.record_file.exists():
        return
    if found := state.superseded():
        folder, changed = found
        _say(
            f"{folder} holds an unfinished training with the same settings and data, but "
            f"{' and '.join(changed)} changed since: starting from scratch"
        )


def _train(project: Project, job: FitJob, state: FitState, mirror: Mirror) -> None:
    state.begin_attempt()
    jobs.clear_outcome(state.folder)
    job.write(state.folder)
    runtime = project.params.runtime
    started, before, parent = time.monotonic(), state.read().seconds, os.getppid()
    _say(f"training in {state.folder} on {job.devices} x {job.accelerator}")
    _say(jobs.needed_space(state.folder, Path(job.initial)))
    try:
        with open(state.log_file, "a", encoding="utf-8") as log, mirror, jobs.offered(state.folder):
            run_streaming(
                jobs.command(state.folder, runtime, job.devices, state.fingerprint),
                functools.partial(_on_line, state, log),
                env=jobs.environment(job.devices, on_cpu=job.accelerator == "cpu"),
                timeout=runtime.timeout_s,
                silence_timeout=runtime.silence_timeout_s,
                watched=[state.last_checkpoint, state.folder / JOURNAL],
                grace=runtime.grace_s,
            )
    except CommandFailed as error:
        match jobs.read_outcome(state.folder):
            case Stopped():  # the trainers got the signal
                state.forgive_attempt()
                raise Terminated from error
            case Failed(rank, text):
                raise FitError(f"rank {rank}: {text}") from error
            case Killed():
                _close_tracked_run(project, state)
                raise
    except (KeyboardInterrupt, Terminated):  # this process got the signal
        if os.getppid() == parent:  # a request; after a crash of the parent the attempt counts
            state.forgive_attempt()
        raise
    finally:
        state.update(seconds=before + time.monotonic() - started)
    FitResult.read(state.folder)
    state.mark_done()


def _close_tracked_run(project: Project, state: FitState) -> None:
    """Close the MLflow run as failed: killed trainers could not. Resuming reopens it."""
    if (state.folder / JOURNAL).exists():
        close_run(state.folder, "FAILED", project.env.tracking_uri)


def _on_line(state: FitState, log: IO[str], line: str) -> None:
    line = redact(line)
    log.write(line + "\n")
    log.flush()
    progress = EpochProgress.parse(line)
    if progress is not None:
        state.update(finished_epochs=progress.epoch)
    _say(line)


def _say(line: str) -> None:
    print(line, flush=True)


def join(project: Project) -> None:
    """Take part, on another machine, in the training that `fit` runs on the first node."""
    params = project.params
    job = plan(project)
    state = FitState(project.env.state_dir, fingerprint(project, job))
    if state.done:
        _say(f"the training in {state.folder} is complete; nothing to join")
        return
    folder = state.folder
    deadline = time.monotonic() + JOIN_SECONDS
    before = None
    while (now := jobs.beat(folder)) is None or before in (None, now):
        before = now
        batch = state.other_effective_batch()
        if batch is not None:
            raise FitError(
                f"the first node trains with an effective batch of {batch}, which does not fit the "
                f"{job.devices} devices of this machine. {SAME_DEVICES}"
            )
        if time.monotonic() > deadline:
            raise FitError(
                f"no `fit` of the first node offers the job {folder / jobs.JOB}. Is it running, "
                "and is the state folder shared?"
            )
        time.sleep(1.0)
    first = FitJob.read(folder).devices
    if first != job.devices:
        raise FitError(
            f"the first node uses {first} devices, this machine {job.devices}. {SAME_DEVICES}"
        )
    run_streaming(
        jobs.command(folder, params.runtime, job.devices, folder.name),
        _say,
        env=jobs.environment(job.devices, on_cpu=job.accelerator == "cpu"),
        timeout=params.runtime.timeout_s,
        grace=params.runtime.grace_s,
    )


def main(arguments: list[str]) -> int:
    """Exit status of `python -m flows.stages.fit [--join]`."""
    match arguments:
        case []:
            return run_stage("fit", SECTIONS, fit)
        case ["--join"]:
            return run_stage("fit", SECTIONS, join)
    print(__doc__, file=sys.stderr)
    return USAGE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
