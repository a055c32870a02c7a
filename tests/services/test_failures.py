"""Servers that become unreachable during a flow run, failed flow runs, and what they leave."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import psutil
import pytest

from flows.core.files import read_json, write_json
from flows.core.locks import locked
from flows.fit_job.resume_state import MAX_ATTEMPTS
from tests.services.deployed import git
from tests.services.fitting import Fitting, kill_all, next_run
from tests.services.live import LiveStack, wait_for

pytestmark = [pytest.mark.services, pytest.mark.timeout(2400)]


def test_a_leaked_slot_is_found_and_freed_by_doctor(live: LiveStack) -> None:
    body = {"names": ["gpu"], "slots": 1, "mode": "concurrency"}
    live.api("POST", "/v2/concurrency_limits/increment", body)
    assert live.slots() == 1
    found = live.module("flows.cli.main", "doctor", check=False)
    assert found.returncode == 1
    assert "limit gpu: 1 slots held without an active flow run" in found.stdout
    repaired = live.module("flows.cli.main", "doctor", "--repair", check=False)
    assert "limit gpu" in repaired.stdout
    assert live.slots() == 0
    assert "limit gpu" not in live.module("flows.cli.main", "doctor", check=False).stdout


def test_servers_killed_one_after_the_other_do_not_stop_a_training(
    live: LiveStack, begin: Callable[..., Fitting]
) -> None:
    fitting = begin(epochs=100)
    trainers = {p.pid for p in live.trainers()}
    for server in ("prefect", "mlflow", "s3", "postgres"):
        live.kill(server)
        assert {p.pid for p in live.trainers()} <= trainers, f"{server}: the training continues"
        if not (fitting.folder / "done").exists():
            assert wait_for("an answer", lambda: live.slots() == 1), f"{server}: slot kept"
    live.wait_final(fitting.run, "COMPLETED")
    fitting.assert_trained_once()


def test_s3_away_at_push_and_a_refused_branch_end_well(
    live: LiveStack, begin: Callable[..., Fitting]
) -> None:
    """The push is tried again until S3 is back; a branch that git refuses gets another name."""
    hook = live.project / ".git/hooks/update"
    hook.write_text('#!/bin/sh\ncase "$1" in *-2) exit 0 ;; *) echo protected; exit 1 ;; esac\n')
    hook.chmod(0o755)
    supervisor = live.supervisor()
    fitting = begin(epochs=4, publish=True)
    supervisor.suspend()  # or it would restart S3 at once
    try:
        live.process("s3").kill()
        wait_for(
            "the push to be tried again",
            lambda: live.task_states(fitting.run).get("push_data") == "AwaitingRetry",
        )
    finally:
        supervisor.resume()
        live.wait_final(fitting.run, "COMPLETED")
        hook.unlink()
    branches = git(live.project, "branch", "--list", "retrain/*-2").split()
    assert len(branches) == 1
    changed = git(live.project, "diff", "--name-only", "main", branches[0]).split()
    assert changed == ["dvc.lock", "params.yaml"]
    fitting.assert_trained_once()


def test_sigterm_is_never_success_and_the_next_run_resumes(
    live: LiveStack, begin: Callable[..., Fitting]
) -> None:
    fitting = begin(epochs=8)
    seed = live.parameters(fitting.run)["overrides"]["fit"]["seed"]
    for process in live.trainers():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    state = live.wait_final(fitting.run, "FAILED")
    assert "stage fit failed" in state["message"]
    assert "Traceback" not in live.log(fitting.run)
    assert not (fitting.folder / "done").exists()
    reached = fitting.done
    again = live.start(overrides={"fit": {"epochs": 8, "seed": seed}})
    live.wait_final(again, "COMPLETED")
    assert reached >= 1
    fitting.assert_trained_once()


def test_a_training_that_never_gets_on_fails_and_is_not_started_again(
    live: LiveStack, begin: Callable[..., Fitting]
) -> None:
    """The flow is killed before a new epoch, again and again; the guard ends the loop."""
    fitting = begin(epochs=400)
    known: set[str] = set()
    run = fitting.run
    for _ in range(MAX_ATTEMPTS):
        known |= {r["id"] for r in live.runs()}
        wait_for("the trainers to start", live.trainers)
        kill_all(live.flow_processes())
        live.wait_final(run, "CRASHED")
        # The lease of a killed run would hold the next one up for a minute; when it ends it gives
        # a slot back once more, so that no test may follow this one.
        live.free_slots()
        with locked(fitting.folder, wait=True):  # the stage has ended
            record = read_json(fitting.folder / "run.json")
            record["epochs_at_start"] = record["finished_epochs"]  # as if none had been finished
            write_json(fitting.folder / "run.json", record)
        run = next_run(live, known)
    state = live.wait_final(run, "FAILED")
    assert f"{MAX_ATTEMPTS} attempts ended without finishing a new epoch" in state["message"]
