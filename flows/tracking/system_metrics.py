"""Samples of CPU, memory, disk, network and GPU figures."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

from flows.tracking.journal import Journal

log = logging.getLogger(__name__)


class SystemSampler:
    """Samples CPU, memory, disk, network and GPU figures into the journal."""

    def __init__(self, journal: Journal, every: float) -> None:
        self._journal, self._every = journal, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _work(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        kinds: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor]
        monitors = []
        for kind in kinds:
            with contextlib.suppress(ImportError, RuntimeError):  # no GPU
                monitors.append(kind())
        step = int(time.time() / self._every)  # grows over resumed parts of a run
        while not self._stop.wait(self._every):
            step += 1
            try:
                for monitor in monitors:
                    monitor.collect_metrics()
                    values = monitor.aggregate_metrics()
                    monitor.clear_metrics()
                    self._journal.log_metrics({f"system/{k}": v for k, v in values.items()}, step)
            except Exception as error:  # noqa: BLE001 - figures of the machine are not worth a run
                log.warning("system metrics stop: %s", error)
                return
