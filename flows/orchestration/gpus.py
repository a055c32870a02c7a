"""The NVIDIA GPUs of this machine, without torch: how many, and which ones a flow run may use."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from flows.config.sections import RuntimeSettings
from flows.core.locks import BusyError, locked
from flows.orchestration.limits import slot
from flows.project.project import Project

VISIBLE = "CUDA_VISIBLE_DEVICES"
HELD = "RFDETR_GPU_SLOT"  # for child processes: the id of the process that holds the slot
RETRY_S = 1.0
WARN_AFTER_S = 60.0

LOGGER = logging.getLogger(__name__)


@contextlib.contextmanager
def gpu_slot(project: Project, devices: int | None = None) -> Iterator[None]:
    """Hold slots of the GPU limit and as many GPUs of this machine; other flow runs wait.

    `devices` defaults to what params.yaml says. A child process of a holder has what it needs.
    """
    own = str(os.getpid())
    if os.environ.get(HELD, own) != own:
        yield
        return
    settings, state_dir = project.params.runtime, project.env.state_dir
    slots = wanted_slots(settings) if devices is None else devices
    gpus = 0 if settings.accelerator in {"cpu", "mps"} else slots
    with slot(settings.gpu_slot, slots, state_dir), claimed(gpus, state_dir):
        os.environ[HELD] = own
        try:
            yield
        finally:
            os.environ.pop(HELD, None)


@contextlib.contextmanager
def gpu_of_command(project: Project, devices: int | None = 1) -> Iterator[None]:
    """The same for a command that a user starts, which on a machine without a GPU needs none."""
    if not visible_gpus() or project.params.runtime.accelerator in {"cpu", "mps"}:
        yield
        return
    with gpu_slot(project, devices):
        yield


def wanted_slots(runtime: RuntimeSettings) -> int:
    """Slots of the GPU limit for a training: `devices`; for `auto` all visible GPUs, at least 1."""
    if runtime.devices != "auto":
        return runtime.devices
    return 1 if runtime.accelerator in ("cpu", "mps") else max(1, visible_gpus())


def visible_gpus(env: Mapping[str, str] = os.environ) -> int:
    """The number of NVIDIA GPUs that CUDA would use."""
    return len(_visible(env))


@contextlib.contextmanager
def claimed(count: int, state_dir: Path) -> Iterator[None]:
    """Hold `count` of the visible GPUs; child processes started inside see only those.

    Waits until enough GPUs are free. A claim is a locked file named after the GPU's UUID, so it
    also holds between containers that share the state folder, and it ends with this process,
    however that ends.
    """
    visible = _visible(os.environ)
    if not visible or count < 1:
        yield
        return
    folder = state_dir / "gpus"
    warn_at = time.monotonic() + WARN_AFTER_S
    with contextlib.ExitStack() as locks:
        while len(mine := _lock(visible, count, folder, locks)) < min(count, len(visible)):
            locks.close()  # all or none, or two flow runs could wait for each other
            if time.monotonic() > warn_at:
                warn_at = float("inf")
                LOGGER.warning("still waiting for %d GPUs in use (locks in %s)", count, folder)
            time.sleep(RETRY_S)
        locks.callback(_set_visible, os.environ.get(VISIBLE))
        _set_visible(",".join(mine))
        yield


def _lock(
    visible: Mapping[str, str], count: int, folder: Path, locks: contextlib.ExitStack
) -> list[str]:
    """Lock up to `count` free GPUs until `locks` is closed; returns their names."""
    mine: list[str] = []
    for name, uuid in visible.items():
        if len(mine) == count:
            break
        with contextlib.suppress(BusyError):
            locks.enter_context(locked(folder / uuid))
            mine.append(name)
    return mine


def _set_visible(value: str | None) -> None:
    if value is None:
        os.environ.pop(VISIBLE, None)
    else:
        os.environ[VISIBLE] = value


def _visible(env: Mapping[str, str]) -> dict[str, str]:
    """Name in CUDA_VISIBLE_DEVICES (index or identifier) -> UUID.

    Like CUDA, ignores everything after the first invalid entry.
    """
    uuids, visible = _uuids(), env.get(VISIBLE)
    if visible is None:
        return {str(index): uuid for index, uuid in enumerate(uuids)}
    found: dict[str, str] = {}
    for entry in (item.strip() for item in visible.split(",")) if uuids else ():
        if entry.isdecimal() and int(entry) < len(uuids):
            found[entry] = uuids[int(entry)]
        elif entry.startswith(("GPU-", "MIG-")):  # CUDA accepts the beginning of a UUID
            found[entry] = next((uuid for uuid in uuids if uuid.startswith(entry)), entry)
        else:
            break
    return found


def _uuids() -> list[str]:
    """The UUIDs of the NVIDIA GPUs by index; empty without a driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
