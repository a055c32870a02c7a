"""The fit stage: training in a child process group, resumed where it stopped.

`python -m flows.stages.fit` trains; `rfdetr-pipeline fit --retry` forgets earlier failed attempts
first; `python -m flows.stages.fit --join` runs on the other machines of a training on several
nodes.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

from flows.config.batch_plan import plan_batch
from flows.core.digest import path_digest, paths_digest
from flows.core.files import read_json
from flows.core.locks import locked
from flows.core.process import CommandFailed, Terminated, run_streaming
from flows.core.redact import redact
from flows.fit_job import job as jobs
from flows.fit_job.job import ERROR, STOPPED, FitJob, FitResult
from flows.fit_job.mirror import Mirror
from flows.fit_job.progress import parse_progress
from flows.fit_job.state import FitState
from flows.fit_job.trained_model import collect
from flows.project.project import Project
from flows.stages.runner import run_stage
from flows.stages.validate import require_valid
from flows.storage.packs import open_dataset
from flows.tracking.journal import JOURNAL
from flows.tracking.run import close_run
from rfdetr.errors import RFDETRError
from rfdetr.files import remove_leftovers

SECTIONS = ["dataset", "model", "fit"]
JOIN_SECONDS = 600.0
AFTERWARDS = {
    "flows/fit_job/trained_model.py"
}  # a change writes the outs anew, without training again


class FitError(RFDETRError):
    """The training failed; the text is the trainer's own."""


def fit(project: Project) -> None:
    """Train with params.yaml and write models/trained, metrics/fit.json and plots/fit.csv.

    Raises ConfigError before any work, FitError with the trainer's reason, StateError when the
    same training runs already or keeps failing, Terminated when it was stopped on request.
    """
    env = project.env
    require_valid(project)
    job = plan(project)
    state = FitState(env.state_dir, fingerprint(project, job))
    mirror = Mirror(state.folder, env.state_url)
    with locked(state.folder):
        for name in ("*.ckpt", "*.pth", "run.json", "job.json"):
            remove_leftovers(state.folder, name)
        if not state.done:
            mirror.fetch()
        if env.fit_retry:
            state.update(attempts=0)
        if state.done:
            _say(f"already trained: {state.folder} is done")
        else:
            _train(project, job, state, mirror)
        collect(project, state.folder, state.read().seconds)


def plan(project: Project) -> FitJob:
    """Everything that the trainers need. Raises ConfigError for what this machine cannot do."""
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
        run_name=f"fit {params.dataset.name}",
        dataset={
            "name": params.dataset.name,
            "digest": project.dataset_digest(),
            "source": _source(project),
        },
    )


def fingerprint(project: Project, job: FitJob) -> dict[str, Any]:
    """All that must be equal for a training to be continued and not begun anew."""
    return {
        **project.params.snapshot(*SECTIONS),
        "data": job.dataset["digest"],
        "initial": path_digest(job.initial, project.digests),
        "effective_batch": job.params["batch"]["effective"],
        "code": paths_digest(project.root, code_of_stage(project, "fit"), project.digests),
    }


def code_of_stage(project: Project, name: str) -> list[str]:
    """The code that dvc.yaml names as dependencies of a stage and that shapes the training."""
    code = [dep for dep in project.graph[name]["deps"] if dep.startswith(("flows/", "rfdetr/"))]
    return [path for path in code if path not in AFTERWARDS]


def _source(project: Project) -> str:
    params = project.params
    name = Path(params.dataset.dir).name
    return params.sources[name].uri if name in params.sources else params.dataset.dir


def _train(project: Project, job: FitJob, state: FitState, mirror: Mirror) -> None:
    state.begin_attempt()
    jobs.clear_answers(state.folder)
    job.write(state.folder)
    runtime = project.params.runtime
    begun, before, parent = time.monotonic(), state.read().seconds, os.getppid()
    note = jobs.needed_space(state.folder, Path(job.initial))
    if note:
        _say(f"warning: {note}")
    _say(f"training in {state.folder} on {job.devices} x {job.accelerator}")
    try:
        with open(state.log_file, "a", encoding="utf-8") as log, mirror:
            run_streaming(
                jobs.command(state.folder, runtime, job.devices, state.fingerprint),
                functools.partial(_on_line, state, log),
                env=jobs.environment(job.devices, on_cpu=job.accelerator == "cpu"),
                timeout=runtime.timeout_s,
                silence_timeout=runtime.silence_timeout_s,
                watched=[state.last_checkpoint, state.folder / "journal.jsonl"],
                grace=runtime.grace_s,
            )
    except CommandFailed as error:
        if (state.folder / STOPPED).exists():
            state.forgive_attempt()
            raise Terminated from error
        if (state.folder / ERROR).exists():
            told = read_json(state.folder / ERROR)
            raise FitError(f"rank {told['rank']}: {told['text']}") from error
        _close_tracked_run(project, state)
        raise
    except (KeyboardInterrupt, Terminated):
        if os.getppid() == parent:  # a request; a parent that died is a crash, and counts
            state.forgive_attempt()
        raise
    finally:
        state.update(seconds=before + time.monotonic() - begun)
    FitResult.read(state.folder)
    state.mark_done()


def _close_tracked_run(project: Project, state: FitState) -> None:
    """A trainer that was killed could not say that its run failed; a resumed one opens it again."""
    if (state.folder / JOURNAL).exists():
        close_run(state.folder, "FAILED", project.env.tracking_uri)


def _on_line(state: FitState, log: Any, line: str) -> None:
    line = redact(line)
    log.write(line + "\n")
    log.flush()
    progress = parse_progress(line)
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
        _say(f"the training in {state.folder} has ended; nothing to join")
        return
    folder = state.folder
    deadline = time.monotonic() + JOIN_SECONDS
    while not (folder / jobs.JOB).exists():
        if time.monotonic() > deadline:
            raise FitError(f"{folder / jobs.JOB} did not appear: is the state folder shared?")
        time.sleep(1.0)
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
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
