"""A run that fails gives its device back in ten seconds, with its error and its checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from rfdetr.tracking import delivery
from rfdetr.tracking.client import local_store
from rfdetr.tracking.mlflow_logger import FAILURE_S, NEW_STORE_S, JournaledMLFlowLogger
from rfdetr.training import failure
from rfdetr.training.lightning_adapter import handles_failure
from rfdetr.training.pictures import Pictures
from tests.datasets import make_roboflow
from tests.unit.training.helpers import Run, StopAt, tiny_model, tiny_run
from tests.unit.training.processes import group_is_gone, started, wait_for

STUCK = {"hang_after": 3, "config": {"num_workers": 4}}  # items of each worker


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_roboflow(tmp_path_factory.mktemp("data"), splits={"train": 80, "valid": 3})


@pytest.mark.slow
def test_an_error_ends_the_process_whatever_workers_and_loggers_do(
    dataset: Path, tmp_path: Path
) -> None:
    job = {"dataset": dataset, "output": tmp_path, "stop_step": 3, **STUCK}
    with started(job) as process:
        wait_for(process, "failing")
        start = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert time.monotonic() - start < 10
        assert process.returncode == 1
        assert "RuntimeError: stopped by the test" in output
        assert "HangingLogger did not end within 3 s" in output
        assert group_is_gone(process.pid, within=1)


@pytest.mark.slow
def test_ctrl_c_ends_the_process_while_its_workers_are_stuck(dataset: Path, tmp_path: Path) -> None:
    job = {"dataset": dataset, "output": tmp_path, **STUCK}
    with started(job) as process:
        wait_for(process, "step 4 ")
        time.sleep(2)  # the main process waits for its workers
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        process.communicate(timeout=60)
        assert time.monotonic() - start < 10
        assert process.returncode == 1
        assert group_is_gone(process.pid, within=1)


@pytest.mark.slow
def test_sigterm_keeps_its_status_when_the_exit_hangs(dataset: Path, tmp_path: Path) -> None:
    job = {"dataset": dataset, "output": tmp_path, "hang_after": 10**6, "pause": 0.2}
    with started(job) as process:
        wait_for(process, "step 2 ")
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        process.communicate(timeout=60)
        assert time.monotonic() - start < 10
        assert process.returncode == 128 + signal.SIGTERM
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] >= 2


def test_a_program_that_handles_the_error_continues(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure, "LIMIT_S", 0.5)
    monkeypatch.setattr(failure, "LOGGERS_S", 0.2)
    config = tiny_run(dataset, tmp_path, epochs=1, num_workers=1)
    run = Run(tiny_model(), config, limit_val_batches=0)
    run.trainer.callbacks.append(StopAt(2))
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run.fit()
    watch: Any = failure._Watch.current
    assert not watch.cancelled
    time.sleep(1)  # longer than a hanging trainer has
    again = Run(tiny_model(), config, limit_val_batches=0, max_steps=1)
    watched, setup = [], again.data.setup

    def reading(stage: str) -> None:  # before any callback of the run knows of it
        thread = threading.current_thread()
        watched.extend(handles_failure(thread, r.trainer) for r in (run, again))
        setup(stage)

    monkeypatch.setattr(again.data, "setup", reading)
    again.fit()
    assert watched == [False, True]
    assert watch.cancelled
    assert failure._Watch.current is None
    assert again.trainer.global_step == 1


def test_a_failure_does_not_wait_for_pictures(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(pl.Callback):
        def on_validation_end(self, *args: Any) -> None:
            raise RuntimeError("stopped by the test")

    handled, drawn = threading.Event(), threading.Event()
    draw = Pictures._work

    def slowly(self: Pictures, *args: Any) -> None:
        if handled.wait(20):
            drawn.set()
        draw(self, *args)

    monkeypatch.setattr(Pictures, "_work", slowly)
    run = Run(tiny_model(), tiny_run(dataset, tmp_path), limit_train_batches=1)
    run.trainer.callbacks.append(Failing())
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run.fit()
    handled.set()
    assert drawn.wait(20)


def test_callbacks_share_the_time_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure._Watch, "current", None)
    assert failure.patience() == failure.FILES_S
    watch = failure._Watch(pl.Trainer(logger=False, accelerator="cpu"), 1)
    monkeypatch.setattr(failure._Watch, "current", watch)
    watch.cancelled = True
    assert 0 < failure.patience() <= failure.FILES_S
    watch.started -= failure.FILES_S
    assert failure.patience() == 0


def test_the_last_checkpoint_of_a_failed_run_is_on_disk(dataset: Path, tmp_path: Path) -> None:
    run = Run(tiny_model(), tiny_run(dataset, tmp_path))
    for callback in run.trainer.callbacks:
        if hasattr(callback, "every_n_steps"):
            callback.every_n_steps = 1
    run.trainer.callbacks.append(StopAt(3))
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run.fit()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


def test_a_failed_script_waits_for_the_store_that_it_creates(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Creating a local MLflow store takes longer than loggers have; a later failure has less."""
    connect = delivery.tracking_client

    def slow(uri: str) -> Any:
        time.sleep(1)
        return connect(uri)

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(failure, "LOGGERS_S", 0.2)
    monkeypatch.setattr(delivery, "tracking_client", slow)
    run = Run(tiny_model(), tiny_run(dataset, tmp_path, mlflow=True), limit_val_batches=0)
    logger = next(log for log in run.trainer.loggers if isinstance(log, JournaledMLFlowLogger))
    run.trainer.callbacks.append(StopAt(1))
    assert logger.failure_seconds == NEW_STORE_S
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run.fit()
    client = connect(local_store(tmp_path / "mlflow"))
    assert client.get_run(logger.run_id).info.status == "FAILED"
    assert logger.failure_seconds == FAILURE_S


def test_a_slow_handling_leaves_less_time_for_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loggers, handling and exit together end within END_S."""
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    monkeypatch.setattr(failure.atexit, "register", lambda _: None)
    now = 10_000.0
    monkeypatch.setattr(failure, "time", SimpleNamespace(monotonic=lambda: now))
    watch = failure._Watch(pl.Trainer(logger=False, accelerator="cpu"), 1)
    spent = []
    for handling in (0.0, 1.0, 3.0, 4.9):
        watch.started = now - handling
        spent.append(failure.LOGGERS_S + handling + watch._at_exit())
    assert max(spent) == pytest.approx(failure.END_S)
    assert spent[0] == failure.LOGGERS_S + failure.AT_EXIT_S
    watch.started -= 3600  # the program handled the error and continued
    assert watch._at_exit() == failure.AT_EXIT_S
