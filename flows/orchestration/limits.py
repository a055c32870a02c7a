"""Slots: how many may do a thing at a time, on all machines of a Prefect server or on this one."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from flows.core.locks import locked
from flows.project.project import Project
from rfdetr.errors import RFDETRError

LOGGER = logging.getLogger(__name__)
LEASE_SECONDS = 60


class SlotError(RFDETRError):
    """A slot cannot be asked for."""


@contextlib.contextmanager
def registry_slot(project: Project, name: str | None = None) -> Iterator[None]:
    """One writer of the registered model `name` (default: params.yaml's) at a time."""
    model = name or project.params.registry.name
    with slot(f"registry-{model}", 1, project.env.state_dir):
        yield


@contextlib.contextmanager
def slot(name: str, occupy: int, state_dir: Path) -> Iterator[None]:
    """A Prefect limit; a lock file in `state_dir` while only a temporary server is there.

    A temporary server never frees the slots of a run that was killed, a lock file does. A
    deployment needs its limit to exist, a local run makes it. A run that wants more slots than
    there are takes all of them and is alone. A renewal that fails does not end the run: a server
    that restarts must not kill a training. Raises SlotError when no server answers.
    """
    from prefect.concurrency.sync import concurrency  # seconds; commands that look must not pay
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value() is None:
        with locked(state_dir / "slots" / name, wait=True):
            yield
        return
    limit = concurrency(
        name,
        occupy=max(1, min(occupy, _ensure_limit(name, occupy))),
        lease_duration=LEASE_SECONDS,
        strict=True,
        raise_on_lease_renewal_failure=False,
    )
    with contextlib.ExitStack() as held:
        with _warn_when_slow(name):
            held.enter_context(limit)
        yield


@contextlib.contextmanager
def _warn_when_slow(name: str) -> Iterator[None]:
    """After a lease's time a slot is either in use or was leaked: a person should look."""
    text = f"still waiting for slot {name}: if no other run is live, `rfdetr-pipeline doctor`"
    timer = threading.Timer(LEASE_SECONDS, _logger().warning, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The log of the run; outside of one, as on the command line, this module's."""
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger

    try:
        return get_run_logger()
    except MissingContextError:
        return LOGGER


def _ensure_limit(name: str, slots: int) -> int:
    """How many slots the limit has; a local run makes one that is missing."""
    import httpx
    from prefect import runtime
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        with get_client(sync_client=True) as client:
            try:
                return int(client.read_global_concurrency_limit_by_name(name).limit)
            except ObjectNotFound:
                if runtime.deployment.id is None:
                    client.upsert_global_concurrency_limit_by_name(name, slots)
    except httpx.TransportError as error:
        raise SlotError(
            f"slot {name}: the Prefect server cannot be reached ({error}). Start it, or unset "
            "PREFECT_API_URL when no run of that server is live: a lock file is used then."
        ) from error
    return slots
