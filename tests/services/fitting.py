"""A run of the deployment in the middle of its training, and what must be true at its end."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from flows.registry.registry import Registry
from tests.services.live import LiveStack, wait_for

MODEL = "service-test"


@dataclass(frozen=True)
class Fitting:
    """A run of the deployment whose training has finished its first epochs."""

    live: LiveStack
    run: str
    folder: Path
    epochs: int

    @property
    def done(self) -> int:
        return self.live.trainings()[self.folder]

    def mlflow_run(self) -> Any:
        """The training's run on the tracking server."""
        client = MlflowClient(tracking_uri=self.live.settings.url("mlflow"))
        experiment = client.get_experiment_by_name("rfdetr/tiny")
        wanted = f"tags.`fit.fingerprint` = '{self.folder.name}'"
        runs = client.search_runs([experiment.experiment_id], filter_string=wanted)
        assert len(runs) == 1, "all attempts of a training are one MLflow run"
        return runs[0]

    def epochs_recorded(self) -> list[int]:
        client = MlflowClient(tracking_uri=self.live.settings.url("mlflow"))
        history = client.get_metric_history(self.mlflow_run().info.run_id, "val/mAP_50_95")
        return sorted({point.step for point in history})

    def assert_trained_once(self) -> None:
        """The training is complete, and was recorded and registered once."""
        assert self.done == self.epochs
        assert len(self.epochs_recorded()) == self.epochs
        assert (self.folder / "done").exists()
        registry = Registry(MODEL, self.live.settings.url("mlflow"))
        runs = [v.run_id for v in registry.versions()]
        assert runs.count(self.mlflow_run().info.run_id) == 1
        assert len(set(runs)) == len(runs)
        assert self.live.slots() == 0


def next_run(live: LiveStack, known: set[str], *resumed: str | None) -> str:
    """The run that an automation starts, of those that resume `resumed` (default: any)."""

    def new() -> list[str]:
        new = [r for r in live.runs() if r["id"] not in known]
        return [r["id"] for r in new if not resumed or r["parameters"].get("resumes") in resumed]

    return wait_for("a flow run that resumes after the crash", new)[0]


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
