"""How many GPUs this process's children will see, known without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from flows.settings import RuntimeSettings


def wanted_slots(runtime: RuntimeSettings) -> int:
    """Slots of the GPU limit that a run takes: its devices; with `auto` all visible GPUs, or 1."""
    if runtime.devices != "auto":
        return runtime.devices
    return 1 if runtime.accelerator in ("cpu", "mps") else max(1, visible_gpus())


def visible_gpus(env: Mapping[str, str] = os.environ) -> int:
    """NVIDIA GPUs of this machine, or those that CUDA_VISIBLE_DEVICES leaves of them.

    As CUDA reads that list: it ends at the first entry that names no GPU.
    """
    present, visible = _present(), env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    count = 0
    for entry in (item.strip() for item in visible.split(",")):
        known = int(entry) < present if entry.isdecimal() else entry.startswith(("GPU-", "MIG-"))
        if not known:
            break
        count += 1
    return count if present else 0


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
