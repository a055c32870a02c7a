"""The fit stage: training in a child process group, resumed where it stopped.

`python -m flows.stages.fit` trains; `rfdetr-pipeline fit --retry` forgets earlier failed attempts first;
`python -m flows.stages.fit --join` is what the other machines of a training on several nodes run.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from flows.config.batch_plan import plan_batch
from flows.config.environment import Environment
from flows.config.params import Params
from flows.core.digest import path_digest, paths_digest
from flows.core.files import read_json
from flows.core.locks import locked
from flows.core.process import CommandFailed, Terminated, run_streaming
from flows.core.redact import redact
from flows.fit_job import job as jobs
from flows.fit_job.job import ERROR, STOPPED, FitJob, FitResult
from flows.fit_job.mirror import Mirror
from flows.fit_job.progress import parse_progress
from flows.fit_job.state import RETRY, FitState
from flows.fit_job.trained_model import collect
from flows.stages.runner import run_stage
from flows.stages.validate import require_valid
from flows.storage.packs import open_dataset
from flows.tracking.journal import JOURNAL
from flows.tracking.run import close_run
from rfdetr.errors import RFDETRError
from rfdetr.files import remove_cut_off

SECTIONS = ["dataset", "model", "fit"]
INITIAL = Path("models/initial/model.ckpt")
TRAINED, METRICS, CURVES = Path("models/trained"), Path("metrics/fit.json"), Path("plots/fit.csv")
JOIN_SECONDS = 600.0
AFTERWARDS = {
    "flows/fit_job/trained_model.py"
}  # a change writes the outs anew, without training again


class FitError(RFDETRError):
    """The training failed; the text is the trainer's own."""


def fit(params: Params) -> None:
    """Train with `params` and write models/trained, metrics/fit.json and plots/fit.csv.

    Raises ConfigError before any work, FitError with the trainer's reason, StateError when the
    same training runs already or keeps failing, Terminated when it was stopped on request.
    """
    env = Environment.read()
    require_valid(params)
    job = plan(params, env)
    state = FitState(env.state_dir, fingerprint(params, job, env))
    mirror = Mirror(state.folder, env.state_url)
    with locked(state.folder):
        for name in ("*.ckpt", "*.pth", "run.json", "job.json"):
            remove_cut_off(state.folder, name)
        if not state.done:
            mirror.fetch()
        if os.environ.get(RETRY):
            state.update(attempts=0)
        if state.done:
            _say(f"already trained: {state.folder} is done")
        else:
            _train(params, job, state, mirror)
        collect(state.folder, TRAINED, METRICS, CURVES, state.read().seconds)


def plan(params: Params, env: Environment) -> FitJob:
    """Everything that the trainers need. Raises ConfigError for what this machine cannot do."""
    accelerator, devices = jobs.resolve_devices(params.runtime)
    batch = plan_batch(params.fit, devices * params.runtime.nodes)
    data = open_dataset(params.dataset.dir, env.state_dir)
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
        initial=str(INITIAL.absolute()),
        precision=params.fit.precision,
        accelerator=accelerator,
        devices=devices,
        nodes=params.runtime.nodes,
        params={**params.snapshot(*SECTIONS), "batch": batch.model_dump()},
        run_name=f"fit {params.dataset.name}",
        dataset={
            "name": params.dataset.name,
            "digest": path_digest(params.dataset.dir, _memory(env)),
            "source": _source(params),
        },
    )


def fingerprint(params: Params, job: FitJob, env: Environment) -> dict[str, Any]:
    """All that must be equal for a training to be continued and not begun anew."""
    memory = _memory(env)
    return {
        **params.snapshot(*SECTIONS),
        "data": job.dataset["digest"],
        "initial": path_digest(INITIAL, memory),
        "effective_batch": job.params["batch"]["effective"],
        "code": paths_digest(Path(), code_of_stage("fit"), memory),
    }


def code_of_stage(name: str, root: Path = Path()) -> list[str]:
    """The code that dvc.yaml names as dependencies of a stage and that shapes the training."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    code = [dep for dep in stages[name]["deps"] if dep.startswith(("flows/", "rfdetr/"))]
    return [path for path in code if path not in AFTERWARDS]


def _memory(env: Environment) -> Path:
    return env.state_dir / "digests.db"


def _source(params: Params) -> str:
    name = Path(params.dataset.dir).name
    return params.sources[name].uri if name in params.sources else params.dataset.dir


def _train(params: Params, job: FitJob, state: FitState, mirror: Mirror) -> None:
    state.begin_attempt()
    jobs.clear_answers(state.folder)
    job.write(state.folder)
    runtime = params.runtime
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
        _close_tracked_run(state)
        raise
    except (KeyboardInterrupt, Terminated):
        if os.getppid() == parent:  # a request; a parent that died is a crash, and counts
            state.forgive_attempt()
        raise
    finally:
        state.update(seconds=before + time.monotonic() - begun)
    FitResult.read(state.folder)
    state.mark_done()


def _close_tracked_run(state: FitState) -> None:
    """A trainer that was killed could not say that its run failed; a resumed one opens it again."""
    if (state.folder / JOURNAL).exists():
        close_run(state.folder, "FAILED", Environment.read().tracking_uri)


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


def join(params: Params) -> None:
    """Take part, on another machine, in the training that `fit` runs on the first node."""
    env = Environment.read()
    job = plan(params, env)
    state = FitState(env.state_dir, fingerprint(params, job, env))
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
