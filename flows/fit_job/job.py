"""What the fit stage hands to its trainer processes and gets back: files in one folder."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.config.sections import ModelSettings, RuntimeSettings
from flows.core.files import read_json, write_json
from rfdetr.errors import ConfigError

JOB, RESULT, ERROR = "job.json", "result.json", "error.json"
STOPPED = "stopped"  # the trainer ended on request, its state is saved


class FitJob(BaseModel):
    """`job.json`: one training. `devices` are those of this machine."""

    model: ModelSettings
    train: dict[str, Any]  # fields of TrainConfig
    initial: str
    precision: str
    accelerator: str
    devices: int
    nodes: int
    params: dict[str, Any]
    run_name: str
    dataset: dict[str, str]  # name, digest, source

    def write(self, folder: Path) -> None:
        write_json(folder / JOB, self.model_dump(mode="json"))

    @classmethod
    def read(cls, folder: Path) -> FitJob:
        return cls.model_validate(read_json(folder / JOB))


class FitResult(BaseModel):
    """`result.json`: a training that came to its end."""

    epochs: int
    stopped_early: bool
    best_epoch: int  # counted from 1
    best_metric: str
    best_value: float
    averaged: bool
    class_names: list[str]
    num_classes: int
    resolution: int
    mlflow_run_id: str | None

    def write(self, folder: Path) -> None:
        write_json(folder / RESULT, self.model_dump(mode="json"))

    @classmethod
    def read(cls, folder: Path) -> FitResult:
        return cls.model_validate(read_json(folder / RESULT))


def clear_answers(folder: Path) -> None:
    """Forget what an earlier attempt handed back."""
    for name in (RESULT, ERROR, STOPPED):
        (folder / name).unlink(missing_ok=True)


def command(folder: Path, runtime: RuntimeSettings, devices: int, run: str) -> list[str]:
    """The torchrun command; the same for one device, several, and several machines."""
    where: Sequence[str] = ["--standalone"]
    if runtime.nodes > 1:
        where = [
            f"--nnodes={runtime.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={runtime.rendezvous}",
            f"--rdzv-id={run}",
        ]
    return [
        sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={devices}",
        "--max-restarts=0", "-m", "flows.fit_job.worker", str(folder),
    ]  # fmt: skip


def environment(devices: int, *, on_cpu: bool) -> dict[str, str]:
    """The environment of the trainers: threads of a CPU are shared out among its processes."""
    env = dict(os.environ)
    if on_cpu and devices > 1 and "OMP_NUM_THREADS" not in env:
        env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // devices))
    return env


def resolve_devices(runtime: RuntimeSettings) -> tuple[str, int]:
    """(accelerator, number of devices on this machine). Raises ConfigError when one is missing."""
    if runtime.accelerator == "cpu":
        return "cpu", 1 if runtime.devices == "auto" else runtime.devices
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    seen = f"{gpus} GPU(s) are visible (CUDA_VISIBLE_DEVICES can hide some)"
    if runtime.accelerator == "gpu" and not gpus:
        raise ConfigError(
            f"runtime.accelerator is gpu, but {seen}. Start on a machine with a working CUDA "
            "driver, or set runtime.accelerator to auto or cpu."
        )
    if runtime.accelerator == "mps" and not mps:
        raise ConfigError("runtime.accelerator is mps, but this machine has no Apple GPU.")
    if runtime.devices == "auto":
        return ("gpu", gpus) if gpus else ("mps" if mps else "cpu", 1)
    most = gpus or 1
    if runtime.devices > most:
        raise ConfigError(
            f"runtime.devices is {runtime.devices}, but {seen}. Set it to auto or at most {most}; "
            "several processes on the CPU need runtime.accelerator: cpu."
        )
    return ("gpu" if gpus else "mps" if mps else "cpu"), runtime.devices


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest readable checkpoint, and a warning for each unreadable one before it."""
    from rfdetr.checkpoints.record import read_checkpoint

    numbered = sorted(
        folder.glob("checkpoint_[0-9]*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    warnings = []
    for path in (folder / "last.ckpt", *numbered):
        if path.exists():
            try:
                read_checkpoint(path, mmap=True)
            except (ValueError, OSError) as error:
                warnings.append(f"{path} is unreadable and passed over: {error}")
                continue
            return path, warnings
    return None, warnings


def needed_space(folder: Path, initial: Path) -> str | None:
    """A warning when the disk of `folder` will hardly hold the checkpoints of a training."""
    wanted = 8 * initial.stat().st_size  # optimizer state, averaged weights, best files
    free = shutil.disk_usage(folder).free
    if free > wanted:
        return None
    return f"{folder} has {free >> 20} MiB free; checkpoints may need {wanted >> 20} MiB."
