"""What the pipeline adds to the journal: masking, provenance, system metrics."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from flows.cli import doctor
from flows.config.environment import Environment
from flows.project.project import Project
from flows.release.run_record import _add_report
from flows.tracking.provenance import collect_provenance
from flows.tracking.run import close_run, fit_logger, sync, unsent_journals
from flows.tracking.system_metrics import SystemMetrics
from rfdetr.checks.check import check_dataset
from tests.datasets import make_roboflow
from tests.flows.mlflow_fixtures import artifacts, runs

SECRET = "Zq8vX2mN4pL7rT1w"
NAMES = ("cookie", "token", "bearer", "secretarybird")


class TinyModule(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = self.layer(batch).pow(2).mean()
        self.log_dict({f"val/AP/{name}": 0.5 for name in NAMES})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_training_of_the_pipeline(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", SECRET)
    folder = tmp_path / "state" / "abc"
    logger = fit_logger(folder, "demo", "fit demo", tracking_uri)
    logger.journal.log_params({"fit": {"note": f"token {SECRET}", "names": list(NAMES)}})
    logger.journal.log_dataset("demo", "d" * 32, f"https://me:{SECRET}@host/data")
    Trainer(
        logger=logger,
        callbacks=[SystemMetrics(logger, 0.01)],
        max_steps=40,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(TinyModule(), DataLoader(torch.ones(40, 1)))
    (run,) = runs(tracking_uri)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "fit demo")
    assert run.data.tags["fit.fingerprint"] == "abc"
    assert run.data.params["fit.note"] == "token ***"
    assert run.data.params["fit.names"] == str(list(NAMES))
    assert {f"val/AP/{name}" for name in NAMES} <= set(run.data.metrics)
    assert any(key.startswith("system/cpu") for key in run.data.metrics)
    assert SECRET not in (folder / "journal.jsonl").read_text()


def test_what_could_not_be_sent_is_sent_later(tracking_uri: str, tmp_path: Path) -> None:
    logger = fit_logger(tmp_path / "abc", "demo", "fit demo", None)
    logger.log_metrics({"loss": 1.0}, 1)
    assert [journal.folder.name for journal in unsent_journals(tmp_path)] == ["abc"]
    assert not close_run(tmp_path / "abc", "KILLED", None)
    assert sync(tmp_path, tracking_uri) == {tmp_path / "abc": None}
    assert [run.info.status for run in runs(tracking_uri)] == ["KILLED"]


def test_classes_with_names_of_secrets_survive_in_reports_and_artifacts(
    tracking_uri: str, tmp_path: Path
) -> None:
    data = make_roboflow(tmp_path / "set", names=NAMES)
    report = tmp_path / "reports" / "validation.json"
    report.parent.mkdir()
    report.write_text(check_dataset(data, progress=False).model_dump_json(indent=2))
    assert all(f'"{name}"' in report.read_text() for name in NAMES)
    client = MlflowClient(tracking_uri=tracking_uri)
    run_id = client.create_run("0").info.run_id
    _add_report(client, run_id, Project(tmp_path), report.parent)
    assert artifacts(tracking_uri, run_id, "reports") == {"reports/validation.json"}
    fetched = Path(client.download_artifacts(run_id, "reports", str(tmp_path)))
    assert (fetched / "validation.json").read_bytes() == report.read_bytes()
    assert json.loads((fetched / "validation.json").read_text())


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_provenance_has_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", SECRET)
    (tmp_path / "code.py").write_text("a = 1\n")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "remote", "add", "origin", f"https://user:{SECRET}@host/repo.git")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    (tmp_path / "code.py").write_text(f"a = 2\npassword = '{SECRET}'\n")
    found = collect_provenance(tmp_path)
    tags = found.tags()
    assert len(tags["git.commit"]) == 40
    assert tags["git.dirty"] == "true"
    assert tags["git.remote"] == "https://***@host/repo.git"
    assert len(tags["dvc.lock.sha256"]) == 64
    assert tags["hardware.cpu"] and tags["env.torch"]
    assert "+a = 2" in found.git_diff
    assert SECRET not in found.model_dump_json()


def test_provenance_works_without_git(tmp_path: Path) -> None:
    found = collect_provenance(tmp_path)
    assert found.git_commit is None and found.git_dirty is None
    assert found.packages["torch"]


def test_projects_of_one_user_do_not_mix_their_runs(
    tracking_uri: str, migrated_database: Path, tmp_path: Path
) -> None:
    """Both trained offline, with one state folder; one project syncs, repairs, then the other."""
    other = tmp_path / "other.db"
    other.write_bytes(migrated_database.read_bytes())
    stores = {"mine": tracking_uri, "theirs": f"sqlite:///{other}"}
    env = Environment.read({"RFDETR_STATE_DIR": str(tmp_path / "state")})
    for name, store in stores.items():
        for ending in ("FINISHED", "FAILED", "KILLED", None, "done"):
            folder = env.state_dir / "fit" / f"{name}-{ending}"
            logger = fit_logger(folder, "demo", f"{name} {ending}", None, store)
            logger.log_metrics({"loss": 1.0}, 1)
            if ending in ("FINISHED", "FAILED", "KILLED"):
                logger.journal.end(ending)
            if ending == "done":  # killed between its last epoch and the end of the run
                (folder / "done").write_text("{}")
    assert len(unsent_journals(env.state_dir)) == 10
    assert len(sync(env.state_dir, tracking_uri)) == 5
    list(doctor._interrupted(env, tracking_uri, repair=True))
    assert statuses(tracking_uri) == {
        "mine FINISHED": "FINISHED",
        "mine FAILED": "FAILED",
        "mine KILLED": "KILLED",
        "mine None": "KILLED",
        "mine done": "FINISHED",
    }
    assert statuses(stores["theirs"]) == {}
    sync(env.state_dir, stores["theirs"])
    found = statuses(stores["theirs"])
    assert found["theirs FINISHED"] == "FINISHED"
    assert found["theirs None"] == found["theirs done"] == "RUNNING"
    assert sync(env.state_dir, tracking_uri) == {}
    list(doctor._interrupted(env, tracking_uri, repair=True))
    assert statuses(stores["theirs"]) == found


def statuses(uri: str) -> dict[str, str]:
    return {run.info.run_name: run.info.status for run in runs(uri)}


def test_a_resumed_run_belongs_to_the_store_that_it_was_resumed_with(tmp_path: Path) -> None:
    fit_logger(tmp_path / "abc", "demo", "fit", None, "sqlite:///old.db").log_metrics({"a": 1.0}, 1)
    fit_logger(tmp_path / "abc", "demo", "fit", None, "sqlite:///new.db").log_metrics({"a": 1.0}, 2)
    assert unsent_journals(tmp_path, "sqlite:///old.db") == []
    assert len(unsent_journals(tmp_path, "sqlite:///new.db")) == 1
