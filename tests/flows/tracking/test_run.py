from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from flows.tracking.journal import Journal, RunSpec
from flows.tracking.lightning_logger import JournalLogger
from flows.tracking.run import TrackedRun, close_run, main, unsent_journals
from tests.flows.mlflow_fixtures import MlflowServer, artifacts, history, runs

SPEC = RunSpec(experiment="rfdetr/demo", name="fit", tags={"fit.fingerprint": "abc"})
NOWHERE = "http://127.0.0.1:9"  # nothing listens on the discard port
SECRET = "Zq8vX2mN4pL7rT1w"


class TinyModule(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.save_hyperparameters({"lr": 0.1, "nested": {"a": [1, 2]}, "password": SECRET})

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = self.layer(batch).pow(2).mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(logger: JournalLogger, steps: int = 5) -> None:
    Trainer(
        logger=logger,
        max_steps=steps,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(TinyModule(), DataLoader(torch.ones(steps, 1)))


def test_lightning_training_arrives_in_sqlite(tracking_uri: str, tmp_path: Path) -> None:
    logger = JournalLogger(tmp_path / "fit", SPEC, uri=tracking_uri, system_metrics_every=0.01)
    (tmp_path / "pr.png").write_bytes(b"\x89PNG")
    logger.log_image(key="val/pr", images=[str(tmp_path / "pr.png")], step=1)
    train(logger)
    (run,) = runs(tracking_uri)
    assert artifacts(tracking_uri, run.info.run_id, "plots/val") == {"plots/val/pr.png"}
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "fit"
    assert run.data.params["lr"] == "0.1"
    assert run.data.params["nested.a"] == "[1, 2]"
    assert run.data.params["password"] == "***"
    assert run.data.tags["fit.fingerprint"] == "abc"
    assert [step for step, _ in history(tracking_uri, run.info.run_id, "train/loss")] == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip
    assert run.info.run_id == Journal(tmp_path / "fit").run_id
    assert SECRET not in (tmp_path / "fit" / "journal.jsonl").read_text()
    assert any(key.startswith("system/cpu") for key in run.data.metrics)


def test_resume_continues_the_same_run_and_logs_changed_params_as_tags(
    tracking_uri: str, tmp_path: Path
) -> None:
    for attempt, rate in enumerate(("0.1", "0.2")):
        run = TrackedRun(tmp_path / "fit", SPEC, uri=tracking_uri)
        with run:
            run.journal.log_params({"lr": rate, "seed": 1})
            run.journal.log_metrics({"val/mAP_50": 0.5 + attempt}, attempt)
    (found,) = runs(tracking_uri)
    assert found.data.params == {"lr": "0.1", "seed": "1"}
    assert found.data.tags["changed.lr"] == "0.2"
    assert history(tracking_uri, found.info.run_id, "val/mAP_50") == [(0, 0.5), (1, 1.5)]


def test_without_a_server_training_ends_well_and_sync_sends_everything_later(
    tracking_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    logger = JournalLogger(tmp_path / "state" / "fit", SPEC, uri=NOWHERE)
    train(logger)
    assert time.monotonic() - start < 15
    assert "have not reached MLflow" in caplog.text
    assert logger.version is None
    (tmp_path / "picture.png").write_bytes(b"png")
    Journal(tmp_path / "state" / "fit").log_artifact(tmp_path / "picture.png", "pictures")
    (tmp_path / "picture.png").unlink()
    options = ["sync", "--uri", tracking_uri, "--state-dir", str(tmp_path / "state")]
    assert main(options) == 0
    (run,) = runs(tracking_uri)
    assert len(history(tracking_uri, run.info.run_id, "train/loss")) == 5
    assert artifacts(tracking_uri, run.info.run_id, "pictures") == {"pictures/picture.png"}
    assert not unsent_journals(tmp_path / "state")
    assert main(options) == 0
    assert len(runs(tracking_uri)) == 1


def test_server_killed_and_restarted_during_a_run(
    mlflow_server: MlflowServer, tracking_uri: str, tmp_path: Path
) -> None:
    mlflow_server.start()
    run = TrackedRun(tmp_path / "fit", SPEC, uri=mlflow_server.uri)
    run.begin()
    run.journal.log_metrics({"loss": 1.0}, 1)
    wait_until(lambda: run.run_id is not None and not run.journal.unsent)
    mlflow_server.kill()
    slowest = 0.0
    for step in range(2, 500):
        before = time.monotonic()
        run.journal.log_metrics({"loss": float(step)}, step)
        slowest = max(slowest, time.monotonic() - before)
    assert slowest < 0.5
    run.journal.log_text("report", "reports/report.md")
    run.journal.log_dataset("demo", "d" * 32 + ".dir", "s3://bucket/data")
    mlflow_server.start()
    assert run.close()
    (found,) = runs(tracking_uri)
    assert found.info.status == "FINISHED"
    assert [s for s, _ in history(tracking_uri, found.info.run_id, "loss")] == list(range(1, 500))
    assert artifacts(mlflow_server.uri, found.info.run_id, "reports") == {"reports/report.md"}
    (entry,) = found.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("demo", "d" * 32 + ".dir")
    assert json.loads(entry.dataset.source) == {"uri": "s3://bucket/data"}


def wait_until(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


WRITER = """
import sys
from flows.tracking.journal import RunSpec
from flows.tracking.run import TrackedRun
run = TrackedRun(sys.argv[1], RunSpec(experiment="e", name="fit"), uri=sys.argv[2])
run.begin()
for step in range(10**6):
    run.journal.log_metrics({"step": step}, step)
    if step == 200:
        print("ready", flush=True)
"""


def test_kill_9_at_any_moment_leaves_one_run_that_can_be_closed(
    tracking_uri: str, tmp_path: Path
) -> None:
    for pause in (0.0, 0.7):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "fit"), tracking_uri],
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(pause)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    file = tmp_path / "fit" / "journal.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:3000]))
    assert close_run(tmp_path / "fit", "KILLED", tracking_uri)
    (run,) = runs(tracking_uri)
    assert run.info.status == "KILLED"
    assert run.info.end_time is not None


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_run_is_closed_with_the_right_status(
    tracking_uri: str, tmp_path: Path, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), TrackedRun(tmp_path / "run", SPEC, uri=tracking_uri):
        raise error(f"cannot open postgresql://me:{SECRET}@db")
    (run,) = runs(tracking_uri)
    assert run.info.status == status
    assert run.data.tags["pipeline.error"].startswith(error.__name__)
    assert SECRET not in run.data.tags["pipeline.error"]


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_provenance_and_cost_are_logged_without_secrets(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", SECRET)
    project = tmp_path / "project"
    project.mkdir()
    (project / "code.py").write_text("a = 1\n")
    (project / "dvc.lock").write_text("schema: '2.0'\n")
    git(project, "init", "-q")
    git(project, "remote", "add", "origin", f"https://user:{SECRET}@host/repo.git")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "one")
    (project / "code.py").write_text(f"a = 2\npassword = '{SECRET}'\n")
    with TrackedRun(tmp_path / "run", SPEC, uri=tracking_uri) as run:
        run.log_provenance(project)
        run.log_cost(7200, price_per_hour=2.5, devices=2)
        run.journal.log_artifact(project, "code")
    (found,) = runs(tracking_uri)
    tags, run_id = found.data.tags, found.info.run_id
    assert len(tags["git.commit"]) == 40
    assert tags["git.dirty"] == "true"
    assert tags["git.remote"] == "https://***@host/repo.git"
    assert len(tags["dvc.lock.sha256"]) == 64
    assert tags["hardware.cpu"] and tags["env.torch"]
    assert found.data.metrics["cost"] == 10.0
    assert {"environment.json", "git.diff", "code"} <= artifacts(tracking_uri, run_id)
    client = MlflowClient(tracking_uri=tracking_uri)
    (tmp_path / "fetched").mkdir()
    folder = Path(client.download_artifacts(run_id, "", str(tmp_path / "fetched")))
    assert "+a = 2" in (folder / "git.diff").read_text()
    everything = [p for root in (folder, tmp_path / "run") for p in root.rglob("*") if p.is_file()]
    assert len(everything) > 4
    for path in everything:
        assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in str(tags)


def test_provenance_works_without_git(tmp_path: Path) -> None:
    run = TrackedRun(tmp_path / "run", SPEC)
    found = run.log_provenance(tmp_path)
    assert found.git_commit is None and found.git_dirty is None
    assert found.packages["torch"]


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = JournalLogger(tmp_path / "fit", SPEC, uri=NOWHERE)
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_hyperparams({"lr": 1})
    logger.experiment.log_text("x", "y.txt")
    logger.finalize("success")
    assert not (tmp_path / "fit").exists()
