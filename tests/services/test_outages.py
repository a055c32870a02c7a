"""Servers that go away during a deployment run, and what follows."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest

from tests.services.deployed import git
from tests.services.fitting import Fitting
from tests.services.live import LiveStack, wait_for

pytestmark = [pytest.mark.services, pytest.mark.timeout(2400), pytest.mark.xdist_group("faults")]


def test_servers_killed_one_after_the_other_do_not_stop_a_training(
    live: LiveStack, begin: Callable[..., Fitting]
) -> None:
    fitting = begin(epochs=100)
    trainers = {p.pid for p in live.trainers()}
    for server in ("prefect", "mlflow", "s3", "postgres"):
        live.kill(server)
        assert {p.pid for p in live.trainers()} <= trainers, f"{server}: the training goes on"
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
    supervisor = psutil.Process(int((live.folder / "ready").read_text()))
    fitting = begin(epochs=4, publish=True)
    supervisor.suspend()  # or it would start S3 again at once
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
