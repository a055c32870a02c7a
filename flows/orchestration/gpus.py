"""The GPUs of this machine, known without torch: how many, and which are a run's own."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from flows.config.sections import RuntimeSettings
from flows.core.locks import BusyError, locked
from flows.orchestration.limits import slot
from flows.project.project import Project

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOOK_AGAIN_S = 1.0
WARN_AFTER_S = 60.0

log = logging.getLogger(__name__)


def wanted_slots(runtime: RuntimeSettings) -> int:
    """Slots of the GPU limit that a run takes: its devices; with `auto` all visible GPUs, or 1."""
    if runtime.devices != "auto":
        return runtime.devices
    return 1 if runtime.accelerator in ("cpu", "mps") else max(1, visible_gpus())


def visible_gpus(env: Mapping[str, str] = os.environ) -> int:
    """NVIDIA GPUs of this machine, or those that CUDA_VISIBLE_DEVICES leaves of them."""
    return len(_names(env))


@contextlib.contextmanager
def claimed(count: int, folder: Path) -> Iterator[None]:
    """Hold `count` of the visible GPUs; children that are started inside see no other.

    Waits while other runs of this machine hold them. The claims are lock files in `folder`, which
    end with this process, however it ends.
    """
    names = list(dict.fromkeys(_names(os.environ)))
    if not names or count < 1:
        yield
        return
    place = folder / "gpus" / socket.gethostname()
    asked = time.monotonic()
    with contextlib.ExitStack() as held:
        while len(mine := _free(names, count, place, held)) < min(count, len(names)):
            held.close()  # all or none, or two runs could wait for each other
            if time.monotonic() - asked > WARN_AFTER_S:
                asked = float("inf")
                log.warning(
                    "still waiting for %d GPUs that others hold (locks in %s)", count, place
                )
            time.sleep(LOOK_AGAIN_S)
        before = os.environ.get(VISIBLE)
        held.callback(_set_visible, before)
        _set_visible(",".join(mine))
        yield


def _free(names: list[str], count: int, place: Path, held: contextlib.ExitStack) -> list[str]:
    """Up to `count` GPUs that nobody holds, now locked until `held` is closed."""
    mine: list[str] = []
    for name in names:
        if len(mine) == count:
            break
        with contextlib.suppress(BusyError):
            held.enter_context(locked(place / name))
            mine.append(name)
    return mine


def _set_visible(value: str | None) -> None:
    if value is None:
        os.environ.pop(VISIBLE, None)
    else:
        os.environ[VISIBLE] = value


def _names(env: Mapping[str, str]) -> list[str]:
    """Indexes or identifiers, as CUDA reads its list: it ends at the first that names no GPU."""
    present, visible = _present(), env.get(VISIBLE)
    if visible is None:
        return [str(index) for index in range(present)]
    names: list[str] = []
    for entry in (item.strip() for item in visible.split(",")):
        known = int(entry) < present if entry.isdecimal() else entry.startswith(("GPU-", "MIG-"))
        if not known or not present:
            break
        names.append(entry)
    return names


def _present() -> int:
    try:
        import pynvml
    except ImportError:
        return 0
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


@contextlib.contextmanager
def gpu_slot(project: Project, devices: int | None = None) -> Iterator[None]:
    """Hold slots of the GPU limit and as many GPUs of this machine; other runs wait for them.

    `devices` is what params.yaml says unless given.
    """
    settings = project.params.runtime
    wanted = wanted_slots(settings) if devices is None else devices
    gpus = 0 if settings.accelerator in {"cpu", "mps"} else wanted
    state_dir = project.env.state_dir
    with slot(settings.gpu_slot, wanted, state_dir), claimed(gpus, state_dir):
        yield
