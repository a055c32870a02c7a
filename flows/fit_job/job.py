"""The files through which the stage `fit` and its trainer processes exchange a job."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.config.sections import ModelSettings, RuntimeSettings
from flows.core.files import read_json, read_record, write_json
from rfdetr.errors import ConfigError

JOB, RESULT, ERROR = "job.json", "result.json", "error.json"
STOPPED = "stopped"
BEAT_SECONDS = 2.0


class FitJob(BaseModel):
    """`job.json`: one training. `devices` is the number on this machine."""

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
        return read_record(folder / JOB, cls)


class FitResult(BaseModel):
    """`result.json`: a finished training."""

    epochs: int
    stopped_early: bool
    best_epoch: int  # counted from 1
    best_metric: str
    best_value: float
    averaged: bool
    class_names: list[str]
    num_classes: int
    resolution: int
    grey_levels: tuple[float, float] | None = None
    mlflow_run_id: str | None

    def write(self, folder: Path) -> None:
        write_json(folder / RESULT, self.model_dump(mode="json"))

    @classmethod
    def read(cls, folder: Path) -> FitResult:
        return read_record(folder / RESULT, cls)


@dataclass(frozen=True)
class Stopped:
    """The trainers ended on request; their state is saved."""


@dataclass(frozen=True)
class Failed:
    """A trainer failed, for the reason in `text`."""

    rank: int
    text: str


@dataclass(frozen=True)
class Killed:
    """The trainers ended without leaving a word."""


def read_outcome(folder: Path) -> Stopped | Failed | Killed:
    """How the trainers of an unfinished training ended."""
    if (folder / STOPPED).exists():
        return Stopped()
    if (folder / ERROR).exists():
        return Failed(**read_json(folder / ERROR))
    return Killed()


@contextlib.contextmanager
def offered(folder: Path) -> Iterator[None]:
    """Touch `job.json` again and again: other machines see that it is not of a killed attempt."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                (folder / JOB).touch()

    thread = threading.Thread(target=touch, name="job-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def beat(folder: Path) -> int | None:
    """The time of `job.json`, which changes while `fit` offers the job; None if it has ended."""
    if any((folder / name).exists() for name in (RESULT, ERROR, STOPPED)):
        return None
    try:
        return (folder / JOB).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def clear_outcome(folder: Path) -> None:
    """Remove what an earlier attempt left."""
    for name in (RESULT, ERROR, STOPPED):
        (folder / name).unlink(missing_ok=True)


def command(folder: Path, runtime: RuntimeSettings, devices: int, run: str) -> list[str]:
    """The torchrun command for one device, several devices, or several machines."""
    # Loopback by address: `--standalone` hangs where no resolver knows the name of the machine.
    where: Sequence[str] = [
        "--nnodes=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        f"--rdzv-id={run}",
        "--local-addr=127.0.0.1",
    ]
    if runtime.nodes > 1:
        where = [
            f"--nnodes={runtime.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={runtime.rendezvous}",
            f"--rdzv-id={run}",
        ]
    return [
        sys.executable, "-m", "flows.fit_job.launcher", *where, f"--nproc-per-node={devices}",
        "--max-restarts=0", "-m", "flows.fit_job.worker", str(folder),
    ]  # fmt: skip


def environment(devices: int, *, on_cpu: bool) -> dict[str, str]:
    """The environment of the trainers; processes on one CPU share its threads."""
    env = dict(os.environ)
    if on_cpu and devices > 1 and "OMP_NUM_THREADS" not in env:
        env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // devices))
    return env


def resolve_devices(runtime: RuntimeSettings) -> tuple[str, int]:
    """(accelerator, number of devices on this machine). Raises ConfigError if one is missing."""
    if runtime.accelerator == "cpu":
        return "cpu", 1 if runtime.devices == "auto" else runtime.devices
    accelerator, present, seen = _present_devices()
    if runtime.accelerator == "gpu" and accelerator != "gpu":
        raise ConfigError(
            f"runtime.accelerator is gpu, but {seen}. Start on a machine with a working CUDA "
            "driver, or set runtime.accelerator to auto or cpu."
        )
    if runtime.accelerator == "mps" and not _has_mps():
        raise ConfigError("runtime.accelerator is mps, but this machine has no Apple GPU.")
    if runtime.devices == "auto":
        return accelerator, present
    if runtime.devices > present:
        raise ConfigError(
            f"runtime.devices is {runtime.devices}, but {seen}. Set it to auto or at most "
            f"{present}; several processes on the CPU need runtime.accelerator: cpu."
        )
    return accelerator, runtime.devices


def _present_devices() -> tuple[str, int, str]:
    """The best accelerator of this machine, how many there are, and a text about its GPUs."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = f"{gpus} GPU(s) are visible (CUDA_VISIBLE_DEVICES can hide some)"
    if gpus:
        return "gpu", gpus, seen
    return "mps" if _has_mps() else "cpu", 1, seen


def _has_mps() -> bool:
    import torch

    return bool(torch.backends.mps.is_available())


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
                warnings.append(f"{path} is unreadable and was skipped: {error}")
                continue
            return path, warnings
    return None, warnings


def needed_space(folder: Path, initial: Path) -> str:
    """What the checkpoints of a training need on the disk of `folder`; a warning if it is short."""
    wanted = 8 * initial.stat().st_size  # optimizer state, EMA weights, best files
    free = shutil.disk_usage(folder).free
    text = f"checkpoints need about {wanted / 1e9:.2g} GB; {free / 1e9:.2g} GB are free"
    return text if free > wanted else f"warning: {text}"
