"""CPU, memory, disk, network and GPU usage during a training."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

import pytorch_lightning as pl

from rfdetr.tracking.mlflow_logger import JournaledMLFlowLogger

log = logging.getLogger(__name__)


class SystemMetrics(pl.Callback):
    """Samples the usage of the machine with rank 0 into the journal, from a background thread.

    MLflow's own monitor needs a run id, which does not exist while the server is unreachable.
    """

    def __init__(self, logger: JournaledMLFlowLogger, every: float) -> None:
        """`every` in seconds."""
        self._logger, self._every = logger, every
        self._stop = threading.Event()

    def on_fit_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            threading.Thread(target=self._work, name="system-metrics", daemon=True).start()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._stop.set()

    on_exception = teardown

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
        step = int(time.time() / self._every)  # keeps growing when the run is resumed
        while not self._stop.wait(self._every):
            step += 1
            try:
                for monitor in monitors:
                    monitor.collect_metrics()
                    values = monitor.aggregate_metrics()
                    monitor.clear_metrics()
                    named = {f"system/{key}": value for key, value in values.items()}
                    self._logger.journal.log_metrics(named, step)
            except Exception as error:  # noqa: BLE001 - these numbers never end a training
                log.warning("system metrics stopped: %s", error)
                return
