"""What doctor finds in the state folder, what it removes, and what it keeps."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from flows.cli.doctor import OLD_DAYS, Finding, _interrupted, _old_copies, _old_state
from flows.config.environment import Environment
from flows.core.locks import locked
from flows.storage.packs import open_dataset, pack
from flows.tracking.run import close_run, fit_logger, sync
from rfdetr.tracking.journal import Journal, RunSpec
from tests.flows.mlflow_fixtures import runs


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    return Environment.read({"RFDETR_STATE_DIR": str(tmp_path / "state")})


def aged(path: Path) -> Path:
    """`path` as if it had not been used for longer than the limit."""
    past = time.time() - (OLD_DAYS + 1) * 86400
    os.utime(path, (past, past))
    return path


def training(env: Environment, name: str, *, unsent: bool = False, done: bool = True) -> Path:
    folder = env.state_dir / "fit" / name
    folder.mkdir(parents=True)
    if done:
        (folder / "done").write_text("{}")
    if unsent:
        Journal(folder, RunSpec(experiment="e", name="n")).log_metrics({"loss": 1.0}, 1)
    return aged(folder)


def test_a_finished_training_with_unsent_records_stays(env: Environment) -> None:
    sent, unsent = training(env, "sent"), training(env, "unsent", unsent=True)
    started = training(env, "started", done=False)
    (found,) = _old_state(env, repair=False)
    assert found.level == "note"
    assert found.repair == "rfdetr-pipeline doctor --repair"
    assert sent.exists()
    (found,) = _old_state(env, repair=True)
    assert "3 trainings" in found.text
    assert "1 finished ones removed" in found.text
    assert (sent.exists(), unsent.exists(), started.exists()) == (False, True, True)


def test_a_training_that_was_interrupted_is_closed_unless_it_is_at_work(
    env: Environment, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    folders = {name: env.state_dir / "fit" / name for name in ("interrupted", "running", "ended")}
    for name, folder in folders.items():
        fit_logger(folder, "demo", name, None).begin_fit(resumed=False, step=None)
        assert sync(env.state_dir, uri)[folder] is None
    close_run(folders["ended"], "FINISHED", uri)

    def states() -> dict[str, str]:
        return {run.info.run_name: run.info.status for run in runs(uri)}

    with locked(folders["running"]):
        (found,) = _interrupted(env, uri, repair=False)
        assert (found.level, found.text) == ("note", "1 interrupted and not resumed")
        assert states()["interrupted"] == "RUNNING"
        (found,) = _interrupted(env, uri, repair=True)
    assert found.text.endswith("1 closed as KILLED in MLflow")
    assert states() == {"interrupted": "KILLED", "running": "RUNNING", "ended": "FINISHED"}
    again = fit_logger(folders["interrupted"], "demo", "interrupted", uri)  # the next attempt
    again.begin_fit(resumed=True, step=None)
    again.finalize("success")
    assert states()["interrupted"] == "FINISHED"
    (found,) = _interrupted(env, uri, repair=False)
    assert "1 interrupted" in found.text, "the lock of the running one is free now"


def copies(env: Environment, *, repair: bool) -> dict[str, Finding]:
    return {found.subject: found for found in _old_copies(env, repair=repair)}


def test_unused_copies_are_reported_and_removed(env: Environment) -> None:
    assert {found.level for found in copies(env, repair=False).values()} == {"ok"}
    for name in ("unpacked", "exports", "downloads"):
        for age in ("old", "new"):
            (env.state_dir / name / age).mkdir(parents=True)
            (env.state_dir / name / age / "file").write_bytes(bytes(2 << 20))
        aged(env.state_dir / name / "old")
    held = env.state_dir / "unpacked" / ".old.lock"
    held.mkdir()
    aged(held)
    found = copies(env, repair=False)
    assert found["exports"].text == f"1 not used for {OLD_DAYS} days, 2 MiB"
    copies(env, repair=True)
    left = {path.name for name in found for path in (env.state_dir / name).iterdir()}
    assert left == {"new", ".old.lock"}


def test_a_dataset_in_use_is_not_old(env: Environment, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_text("a")
    packed = pack(tmp_path / "set", tmp_path / "packed", progress=False)
    copy = aged(open_dataset(packed, env.state_dir))
    assert open_dataset(packed, env.state_dir) == copy
    copies(env, repair=True)
    assert copy.exists()
