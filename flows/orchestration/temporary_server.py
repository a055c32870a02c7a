"""A Prefect server for one command. It ends with the command, however that ends.

Prefect's own temporary server belongs to the process group of the terminal, so that Ctrl-C ends it
before the flow has reported its state, and `kill -9` of the command leaves it behind.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from flows.config.environment import may_name_prefect_server
from flows.core.garbage import collect_rarely
from flows.core.process import die_with_parent, terminate_with
from rfdetr.errors import RFDETRError

START_SECONDS = 120.0
STOP_SECONDS = 2.0

_address: str | None = None


class ServerError(RFDETRError):
    """The temporary Prefect server did not start."""


def server_address() -> str | None:
    """The server that Prefect's settings name, or None."""
    if "prefect" not in sys.modules and not may_name_prefect_server():
        return None
    from prefect.settings import PREFECT_API_URL

    address: str | None = PREFECT_API_URL.value()
    return address


def is_temporary(address: str | None) -> bool:
    """Whether `address`, a value of PREFECT_API_URL, means a server that lives for one command."""
    return address is None or address == _address


@contextlib.contextmanager
def prefect_server(log: Path) -> Iterator[None]:
    """Use the server of PREFECT_API_URL or, if there is none, start one that logs to `log`."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    global _address  # noqa: PLW0603 - the address of the only server of this process
    if PREFECT_API_URL.value() is not None:
        yield
        return
    _address = _start(log)
    with temporary_settings({PREFECT_API_URL: _address}):
        yield


def _start(log: Path) -> str:
    """Start the server and wait for its first answer; returns the address of its API.

    The socket is bound here, so no other process can take the port, and a request waits until the
    server accepts it. The server is stopped at exit: Prefect sends its last records before that.
    """
    import httpx
    from prefect.settings import get_current_settings

    parent = os.getpid()
    log.parent.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listener, open(log, "wb") as output:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(listener.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={
                **os.environ,
                **get_current_settings().to_environment_variables(exclude_unset=True),
            },
            pass_fds=[listener.fileno()],
            start_new_session=True,
            preexec_fn=lambda: terminate_with(parent),  # noqa: PLW1509 - two system calls
        )
    atexit.register(_stop, server)
    try:
        answer = httpx.get(f"{address}/health", timeout=START_SECONDS, trust_env=False)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise ServerError(
            f"the temporary Prefect server did not start ({error or type(error).__name__}); see "
            f"{log}. `dvc repro` runs the stages without Prefect."
        ) from None
    return address


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(STOP_SECONDS)
    server.kill()
    server.wait()


def main(arguments: list[str]) -> None:
    """Serve on the listening socket with the given file descriptor."""
    die_with_parent(grace=STOP_SECONDS)
    collect_rarely()
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    server.run(sockets=[socket.socket(fileno=int(arguments[0]))])


if __name__ == "__main__":
    main(sys.argv[1:])
