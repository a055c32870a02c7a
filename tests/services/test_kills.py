"""Runs that are killed or cancelled, and what follows: the failure table of the design."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flows.core.files import read_json
from tests.services.deployed import git
from tests.services.fitting import Fitting, kill_all, next_run
from tests.services.live import LiveStack, alive, wait_for

TRAINING = "rfdetr/training/datamodule.py"

pytestmark = [pytest.mark.services, pytest.mark.timeout(2400)]


def test_cancel_ends_children_and_frees_the_slot(
    live: LiveStack, begin: Callable[..., Fitting]
) -> None:
    fitting = begin(epochs=400)
    children = live.trainers()
    assert children
    assert live.slots() == 1
    live.module("prefect", "flow-run", "cancel", fitting.run)
    live.wait_final(fitting.run, "CANCELLED")
    wait_for("the trainers to end", lambda: not any(map(alive, children)), 60)
    wait_for("the slot to be free", lambda: live.slots() == 0, 90)
    assert not (fitting.folder / "done").exists()
    attempts = read_json(fitting.folder / "run.json")["attempts"]
    assert attempts == 0, "a cancellation is not a failed attempt"


def change_training_code(live: LiveStack) -> None:
    """Commit a change that would start a training from scratch."""
    with open(live.project / TRAINING, "a", encoding="utf-8") as file:
        file.write("# changed\n")
    git(live.project, "commit", "--quiet", "--all", "--message", "Another training code")


@pytest.mark.parametrize("victim", ["flow", "worker", "both"])
def test_a_killed_run_is_crashed_and_resumes_by_itself(
    live: LiveStack, begin: Callable[..., Fitting], victim: str
) -> None:
    """kill -9 of the flow's process, of the worker, of both as a lost host would.

    The branch gets other training code meanwhile; the training continues with its own.
    """
    fitting = begin(epochs=8)
    change_training_code(live)
    children, known = live.trainers(), {r["id"] for r in live.runs()}
    engines = live.flow_processes()
    assert children
    assert engines
    if victim == "worker":
        live.process("worker").kill()
    else:
        kill_all([live.process("worker"), *engines] if victim == "both" else engines)
    live.wait_final(fitting.run, "CRASHED")
    wait_for("the trainers to end", lambda: not any(map(alive, children)), 90)
    live.wait_final(next_run(live, known), "COMPLETED")
    fitting.assert_trained_once()
    resumed = [r["parameters"].get("resumes") for r in live.runs() if r["state_name"] != "Skipped"]
    assert resumed.count(fitting.run) == 1
    assert len(set(resumed) - {None}) == len([r for r in resumed if r]), "each crash: one restart"
