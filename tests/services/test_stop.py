"""Stopping the stack while a run trains: nothing is left, and a start goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from infra.services import listens
from tests.services.deployed import start, stop
from tests.services.fitting import Fitting, next_run
from tests.services.live import LiveStack, command_of, processes_of, wait_for

pytestmark = [pytest.mark.services, pytest.mark.timeout(2400), pytest.mark.xdist_group("use")]


def test_nothing_is_left_after_a_stop_and_a_start_goes_on(
    live: LiveStack, begin: Callable[..., Fitting]
) -> None:
    fitting = begin(epochs=8)
    known = {r["id"] for r in live.runs()}
    stop(live)
    assert [command_of(p) for p in processes_of(live.folder)] == []
    assert not any(listens(port) for port in live.settings.ports.values())
    stop(live)  # a stopped stack is no error

    start(live)
    assert wait_for("health", lambda: all(live.health().values()))
    state = live.wait_final(fitting.run)
    if state["type"] == "CRASHED":
        live.wait_final(next_run(live, known), "COMPLETED")
    else:  # the worker had the time to tell that it ended the run
        overrides = live.parameters(fitting.run)["overrides"]
        live.wait_final(live.start(overrides=overrides), "COMPLETED")
    fitting.assert_trained_once()
