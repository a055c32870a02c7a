"""Runs that are killed or cancelled, and what follows: the failure table of the design."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import psutil
import pytest

from flows.stage import read_json, write_json
from flows.state import MAX_ATTEMPTS, locked
from tests.services.fitting import Fitting, kill_all, next_run
from tests.services.live import LiveStack, alive, wait_for

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
    assert read_json(fitting.folder / "run.json")["attempts"] == 0, "a cancel is no failed attempt"


@pytest.mark.parametrize("victim", ["flow", "worker", "both"])
def test_a_killed_run_is_crashed_and_goes_on_by_itself(
    live: LiveStack, begin: Callable[..., Fitting], victim: str
) -> None:
    """kill -9 of the flow's process, of the worker, of both as a lost host would."""
    fitting = begin(epochs=8)
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


def test_sigterm_is_never_success_and_the_next_run_goes_on(
    live: LiveStack, begin: Callable[..., Fitting]
) -> None:
    fitting = begin(epochs=8)
    seed = live.parameters(fitting.run)["overrides"]["fit"]["seed"]
    for process in live.trainers():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    state = live.wait_final(fitting.run, "FAILED")
    assert "stage fit failed" in state["message"]
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
        live.free_slots()  # the lease of a killed run would hold the next one up for a minute
        with locked(fitting.folder, wait=True):  # the stage has ended
            record = read_json(fitting.folder / "run.json")
            record["epochs_at_start"] = record["finished_epochs"]  # as if none had been finished
            write_json(fitting.folder / "run.json", record)
        run = next_run(live, known)
    state = live.wait_final(run, "FAILED")
    assert f"{MAX_ATTEMPTS} attempts ended without finishing a new epoch" in state["message"]


def test_a_leaked_slot_is_found_and_freed_by_doctor(live: LiveStack) -> None:
    body = {"names": ["gpu"], "slots": 1, "mode": "concurrency"}
    live.api("POST", "/v2/concurrency_limits/increment", body)
    assert live.slots() == 1
    found = live.module("flows.doctor", check=False)
    assert found.returncode == 1
    assert "limit gpu: 1 slots held without a live run" in found.stdout
    mended = live.module("flows.doctor", "--repair", check=False)
    assert "limit gpu" in mended.stdout
    assert live.slots() == 0
    assert "limit gpu" not in live.module("flows.doctor", check=False).stdout
