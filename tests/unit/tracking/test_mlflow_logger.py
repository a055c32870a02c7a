"""The logger during a training: outages, kills, resumes, and how runs end."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

from rfdetr.errors import ConfigError
from rfdetr.tracking import sender as sender_module
from rfdetr.tracking.journal import Journal, RunSpec
from rfdetr.tracking.mlflow_logger import JournaledMLFlowLogger
from rfdetr.tracking.sender import Sender, close_run, sync, unsent_journals
from tests.flows.mlflow_fixtures import MlflowServer, artifacts, history, runs

SPEC = RunSpec(experiment="rfdetr/demo", name="fit", tags={"fit.fingerprint": "abc"})
NOWHERE = "http://127.0.0.1:9"  # nothing listens on the discard port


class TinyModule(LightningModule):
    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.error = error
        self.save_hyperparameters({"lr": 0.1, "nested": {"a": [1, 2]}})

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        loss = self.layer(batch).pow(2).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.log("val/loss", self.layer(batch).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(logger: JournaledMLFlowLogger, steps: int = 5) -> Trainer:
    return Trainer(
        logger=logger,
        max_steps=steps,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train(logger: JournaledMLFlowLogger, error: BaseException | None = None) -> None:
    trainer(logger).fit(TinyModule(error), DataLoader(torch.ones(5, 1)))


def kinds(folder: Path) -> list[str]:
    records, _ = Journal(folder).read(0)
    return [record["kind"] for record in records if record["kind"] in {"begin", "end"}]


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_training_arrives_complete(tracking_uri: str, tmp_path: Path) -> None:
    logger = JournaledMLFlowLogger(tmp_path / "fit", SPEC, tracking_uri)
    (tmp_path / "pr.png").write_bytes(b"\x89PNG")
    logger.log_image(key="val/pr", images=[str(tmp_path / "pr.png")], step=1)
    (tmp_path / "pr.png").unlink()
    train(logger)
    (run,) = runs(tracking_uri)
    assert artifacts(tracking_uri, run.info.run_id, "plots/val") == {"plots/val/pr.png"}
    assert (run.info.status, run.info.run_name) == ("FINISHED", "fit")
    assert run.data.params == {"lr": "0.1", "nested/a": "[1, 2]"}
    assert run.data.tags["fit.fingerprint"] == "abc"
    steps = [step for step, _ in history(tracking_uri, run.info.run_id, "train/loss")]
    assert steps == [0, 1, 2, 3, 4]
    assert run.info.run_id == logger.run_id == logger.version
    assert logger.experiment.get_run(logger.run_id).info.status == "FINISHED"


def test_reading_a_finished_logger_does_not_reopen_its_run(
    tracking_uri: str, tmp_path: Path
) -> None:
    logger = JournaledMLFlowLogger(tmp_path / "fit", SPEC, tracking_uri)
    assert logger.run_id is None and not (tmp_path / "fit").exists()
    train(logger)
    logger.finalize("success")
    for name in ("run_id", "version", "experiment", "name", "save_dir", "journal"):
        assert getattr(logger, name)
    assert kinds(tmp_path / "fit") == ["begin", "end"]
    assert not Journal(tmp_path / "fit").open


def test_evaluation_after_a_fit_belongs_to_its_finished_run(
    tracking_uri: str, tmp_path: Path
) -> None:
    logger = JournaledMLFlowLogger(tmp_path / "fit", SPEC, tracking_uri)
    train(logger)
    trainer(logger).validate(TinyModule(), DataLoader(torch.ones(2, 1)), verbose=False)
    (run,) = runs(tracking_uri)
    assert run.info.status == "FINISHED"
    assert {"train/loss", "val/loss"} <= set(run.data.metrics)
    assert kinds(tmp_path / "fit") == ["begin", "end", "end"]


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [
        (ValueError("no secret"), ValueError, "FAILED"),
        (KeyboardInterrupt(), SystemExit, "KILLED"),
        (SystemExit(143), SystemExit, "KILLED"),
    ],
)
def test_a_run_ends_with_the_right_status(
    error: BaseException,
    raised: type[BaseException],
    status: str,
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Lightning switches off Ctrl-C
    logger = JournaledMLFlowLogger(
        tmp_path, SPEC, tracking_uri, mask=lambda text: text.replace("secret", "***")
    )
    with pytest.raises(raised):
        train(logger, error)
    (run,) = runs(tracking_uri)
    assert run.info.status == status
    assert run.data.tags["pipeline.error"].startswith(type(error).__name__)
    assert "secret" not in run.data.tags["pipeline.error"]


def test_a_resumed_fit_continues_its_run_and_a_new_fit_starts_another(
    tracking_uri: str, tmp_path: Path
) -> None:
    def fit(rate: float, *, resumed: bool) -> str | None:
        logger = JournaledMLFlowLogger(tmp_path, SPEC, tracking_uri, run_per_fit=True)
        logger.begin_fit(resumed=resumed, step=None)
        logger.log_hyperparams({"lr": rate, "seed": 1})
        logger.log_metrics({"loss": rate}, int(10 * rate))
        logger.finalize("success")
        return logger.run_id

    first = fit(0.1, resumed=False)
    assert fit(0.2, resumed=True) == first
    second = fit(0.3, resumed=False)
    assert second != first and len(runs(tracking_uri)) == 2
    found = {run.info.run_id: run for run in runs(tracking_uri)}[str(first)]
    assert found.data.params == {"lr": "0.1", "seed": "1"}
    assert found.data.tags["changed.lr"] == "0.2"
    assert history(tracking_uri, str(first), "loss") == [(1, 0.1), (2, 0.2)]
    left = JournaledMLFlowLogger(tmp_path, SPEC, None, run_per_fit=True)
    left.begin_fit(resumed=True, step=None)
    left.log_metrics({"loss": 0.4}, 4)  # the process dies here
    fit(0.5, resumed=False)
    states = {run.info.run_id: run.info.status for run in runs(tracking_uri)}
    assert sorted(states.values()) == ["FINISHED", "FINISHED", "KILLED"]
    assert states[str(second)] == "KILLED"


def test_without_a_server_training_ends_well_and_the_next_one_sends_everything(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(sender_module, "CLOSE_SECONDS", 1.0)
    start = time.monotonic()
    train(JournaledMLFlowLogger(tmp_path, SPEC, NOWHERE, run_per_fit=True, advice="do x."))
    assert time.monotonic() - start < 6
    assert "have not reached MLflow. They are kept; do x." in caplog.text
    (journal,) = unsent_journals(tmp_path)
    assert journal.run_id is None
    logger = JournaledMLFlowLogger(tmp_path, SPEC, tracking_uri, run_per_fit=True)
    logger.begin_fit(resumed=False, step=None)
    logger.finalize("success")
    first, second = journal.run_id, logger.run_id
    assert {run.info.run_id for run in runs(tracking_uri)} == {first, second}
    assert len(history(tracking_uri, str(first), "train/loss")) == 5
    assert not unsent_journals(tmp_path)
    assert sync(tmp_path, tracking_uri) == {}


def test_server_killed_and_restarted_during_a_run(
    mlflow_server: MlflowServer, tracking_uri: str, tmp_path: Path
) -> None:
    mlflow_server.start()
    logger = JournaledMLFlowLogger(tmp_path / "fit", SPEC, mlflow_server.uri)
    logger.log_metrics({"loss": 1.0}, 1)
    wait_until(lambda: logger.run_id and not logger.journal.unsent)
    mlflow_server.kill()
    slowest = 0.0
    for step in range(2, 500):
        before = time.monotonic()
        logger.log_metrics({"loss": float(step)}, step)
        slowest = max(slowest, time.monotonic() - before)
    assert slowest < 0.5
    (tmp_path / "report.md").write_text("report")
    logger.journal.log_artifact(tmp_path / "report.md", "reports")
    logger.journal.log_dataset("demo", "d" * 32 + ".dir", "s3://bucket/data")
    mlflow_server.start()
    logger.finalize("success")
    assert not logger.journal.unsent
    (found,) = runs(tracking_uri)
    assert found.info.status == "FINISHED"
    assert [s for s, _ in history(tracking_uri, found.info.run_id, "loss")] == list(range(1, 500))
    assert artifacts(mlflow_server.uri, found.info.run_id, "reports") == {"reports/report.md"}
    (entry,) = found.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("demo", "d" * 32 + ".dir")
    assert entry.dataset.source == '{"uri": "s3://bucket/data"}'


def test_a_slow_or_failing_server_delays_nothing_and_all_sent_is_only_said_when_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sender_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(sender_module, "INTERVAL", 0.001)
    calls = 0

    def deliver(journal: Journal, *_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise ConnectionError("refused")
        time.sleep(0.01)
        state = journal.state
        _, offset = journal.read(state.offset, limit=30)
        journal.save(state.model_copy(update={"offset": offset}))

    monkeypatch.setattr(sender_module, "deliver", deliver)
    journal = Journal(tmp_path, SPEC)
    sender = Sender([journal], "uri", "wait.")
    sender.start()
    start = time.monotonic()
    for step in range(200):
        journal.log_metrics({"a": step}, step)
    assert time.monotonic() - start < 5
    arrived = sender.close(0.001)
    assert arrived == (journal.unsent == 0)
    assert caplog.text.count("MLflow is unreachable") == 1
    again = Sender([journal], "uri", "wait.")
    again.start()
    journal.end("FINISHED")
    deadline = time.monotonic() + 20
    while journal.unsent and time.monotonic() < deadline:
        time.sleep(0.01)
    assert again.close() and not journal.unsent


@pytest.mark.parametrize(
    ("uri", "fails", "arrives", "limit_s"),
    [
        ("sqlite:///x", False, True, 5),
        ("http://x", False, False, 0.9),
        ("sqlite:///x", True, False, 0.9),
    ],
)
def test_closing_waits_longer_for_a_local_store_unless_it_fails(
    uri: str, fails: bool, arrives: bool, limit_s: float, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first use of a local store creates its schema, which takes long on a busy machine."""
    monkeypatch.setattr(sender_module, "CLOSE_SECONDS", 0.1)

    def deliver(journal: Journal, *_: object, **__: object) -> None:
        if fails:
            raise OSError("disk full")
        time.sleep(1)
        _, offset = journal.read(0)
        journal.save(journal.state.model_copy(update={"offset": offset}))

    monkeypatch.setattr(sender_module, "deliver", deliver)
    journal = Journal(tmp_path, SPEC)
    journal.end("FINISHED")
    sender = Sender([journal], uri, "wait.")
    sender.start()
    start = time.monotonic()
    assert sender.close() is arrives
    assert time.monotonic() - start < limit_s


WRITER = """
import sys
import mlflow
from rfdetr.tracking.journal import RunSpec
from rfdetr.tracking.mlflow_logger import JournaledMLFlowLogger
logger = JournaledMLFlowLogger(sys.argv[1], RunSpec(experiment="e", name="fit"), sys.argv[2])
for step in range(int(sys.argv[3])):
    logger.log_metrics({"step": step}, step)
    if step == 200:
        print("ready", flush=True)
"""


def test_kill_9_at_any_moment_leaves_one_run_that_can_be_closed(
    tracking_uri: str, tmp_path: Path
) -> None:
    for pause in (0.0, 0.7):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "fit"), tracking_uri, "1000000"],
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(pause)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    file = tmp_path / "fit" / "journal.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:3000]))
    assert close_run(tmp_path / "fit", "KILLED", tracking_uri, advice="")
    (run,) = runs(tracking_uri)
    assert run.info.status == "KILLED"
    assert run.info.end_time is not None


def test_a_script_that_exits_without_finalize_still_sends(
    tracking_uri: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "fit"), tracking_uri, "3"]
    subprocess.run(command, check=True)
    (run,) = runs(tracking_uri)
    assert len(history(tracking_uri, run.info.run_id, "step")) == 3
    assert not Journal(tmp_path / "fit").unsent


def test_without_a_uri_everything_stays_in_the_journal(tmp_path: Path) -> None:
    logger = JournaledMLFlowLogger(tmp_path, SPEC, None)
    train(logger)
    assert kinds(tmp_path) == ["begin", "end"]
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        logger.experiment.search_experiments()


def test_a_run_that_has_ended_is_not_closed_again(tracking_uri: str, tmp_path: Path) -> None:
    train(JournaledMLFlowLogger(tmp_path, SPEC, tracking_uri))
    assert close_run(tmp_path, "FAILED", tracking_uri, advice="")
    assert [run.info.status for run in runs(tracking_uri)] == ["FINISHED"]


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = JournaledMLFlowLogger(tmp_path / "fit", SPEC, NOWHERE, run_per_fit=True)
    logger.begin_fit(resumed=False, step=None)
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_hyperparams({"lr": 1})
    logger.log_image("val/x", ["x.png"])
    logger.experiment.log_artifact("x", "y.txt")
    logger.finalize("success")
    assert not (tmp_path / "fit").exists()


def test_a_logger_can_be_pickled_for_spawned_ranks(tracking_uri: str, tmp_path: Path) -> None:
    logger = JournaledMLFlowLogger(tmp_path, SPEC, tracking_uri)
    logger.log_metrics({"a": 1.0}, 1)
    copy = pickle.loads(pickle.dumps(logger))
    copy.log_metrics({"a": 2.0}, 2)
    logger.finalize("success")
    copy.finalize("success")
    (run,) = runs(tracking_uri)
    assert history(tracking_uri, run.info.run_id, "a") == [(1, 1.0), (2, 2.0)]
