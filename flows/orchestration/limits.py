"""Concurrency limits: across all machines of a Prefect server, or on this machine without one."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from flows.core.locks import locked
from flows.core.names import local_names
from flows.orchestration.temporary_server import is_temporary, server_address
from flows.project.project import Project
from rfdetr.errors import RFDETRError

LOGGER = logging.getLogger(__name__)
LEASE_SECONDS = 60


class SlotError(RFDETRError):
    """A slot cannot be acquired."""


@contextlib.contextmanager
def registry_slot(project: Project, name: str | None = None) -> Iterator[None]:
    """Allow one writer of the registered model `name` (default: params.yaml's) at a time."""
    model = name or project.params.registry.name
    with slot(f"registry-{model}", 1, project.env.state_dir):
        yield


@contextlib.contextmanager
def slot(name: str, occupy: int, state_dir: Path) -> Iterator[None]:
    """Hold `occupy` slots of a Prefect limit or, without a server, a lock file in `state_dir`.

    Prefect's temporary server would never free the slots of a killed process; a lock file does. A
    missing limit is created by a local flow run, but not by a deployment. A caller that wants more
    slots than the limit has takes all of them. A failed renewal of the lease is ignored: a
    restarting server must not end a training. Raises SlotError if the server does not answer.
    """
    if is_temporary(server_address()):
        with locked(state_dir / "slots" / local_names({name: name})[name], wait=True):
            yield
        return
    from prefect.concurrency.sync import concurrency

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
    """Warn when the wait exceeds a lease: the slot is in use, or was leaked."""
    text = f"still waiting for slot {name}; if nothing else runs, see `rfdetr-pipeline doctor`"
    timer = threading.Timer(LEASE_SECONDS, _logger().warning, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The logger of the flow run, or this module's on the command line."""
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger

    try:
        return get_run_logger()
    except MissingContextError:
        return LOGGER


def _ensure_limit(name: str, slots: int) -> int:
    """The number of slots of the limit, which is created if missing in a local flow run."""
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
            f"slot {name}: the Prefect server is unreachable ({error}). Start it, or, if "
            "none of its flow runs is active, unset PREFECT_API_URL to use a lock file instead."
        ) from error
    return slots
