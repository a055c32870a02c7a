"""Starts, supervises and stops the local stack, without containers.

    python -m infra.stack up            in the foreground, Ctrl-C stops everything
    python -m infra.stack up --detach   in the background, returns when all services are healthy
    python -m infra.stack status | env | down

PostgreSQL, an S3 server, MLflow, Prefect and a process worker listen on loopback, on ports chosen
once per folder. A service that dies is restarted. Logs: FOLDER/logs/<service>.log.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from flows.core.process import signal_group, terminate_with
from flows.core.redact import redact
from infra.services import Service, all_services
from infra.settings import StackError, StackSettings, quiet_environment
from rfdetr.files import write_text_atomic

START_SECONDS = 300.0  # Python starts slowly on a loaded machine
STOP_SECONDS = 15.0
RESTART_PAUSE_SECONDS = 2.0
LOCK = ".lock"  # held by the supervisor, and contains its process id


class Running:
    """A started service and its process."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service = service
        self.log = folder / "logs" / f"{service.name}.log"
        self.pid_file = folder / "pids" / service.name
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process in its own group; it gets SIGTERM when the supervisor dies."""
        if self.service.prepare:
            self.service.prepare()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        supervisor = os.getpid()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.service.command,
                env={**_inherited(), **quiet_environment(), **self.service.env},
                user=self.service.user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: terminate_with(supervisor),  # noqa: PLW1509  (no threads here)
                cwd="/" if self.service.user else None,
            )
        write_text_atomic(self.pid_file, str(self.process.pid))

    def wait_healthy(self, seconds: float = START_SECONDS) -> None:
        """Wait until the service answers. Raises StackError with the tail of its log."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process is None or self.process.poll() is not None:
                break
            if self.service.healthy():
                return
            time.sleep(0.2)
        tail = self.log.read_text(errors="replace")[-1500:] if self.log.exists() else ""
        raise StackError(f"{self.service.name} did not become healthy; {self.log}:\n{tail}")

    def stop(self) -> None:
        """Stop the group with SIGINT (a clean stop for all five services), then SIGKILL.

        Descendants in other sessions, such as the flow runs of a worker, are stopped as well.
        """
        if self.process is None:
            return
        family = _descendants(self.process.pid)
        signal_group(self.process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        signal_group(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.pid_file.unlink(missing_ok=True)


class Stack:
    """All services of one folder. Use as a context manager, or through the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = StackSettings.load(self.folder)
        services = all_services(self.folder, self.settings)
        self.running = {s.name: Running(s, self.folder) for s in services}

    def environment(self) -> dict[str, str]:
        """The environment of the stack's clients."""
        return self.settings.client_environment(self.folder)

    def start(self) -> None:
        """Start the services in order, each after the previous one is healthy."""
        try:
            for item in self.running.values():
                item.start()
                item.wait_healthy()
        except BaseException:
            self.stop()
            raise

    def revive(self) -> None:
        """Restart the services that have died."""
        for item in self.running.values():
            if item.process is not None and item.process.poll() is not None:
                print(f"{item.service.name} exited ({item.process.returncode}); restarting it")
                signal_group(item.process.pid, signal.SIGKILL)
                try:
                    item.start()
                except Exception as error:  # noqa: BLE001 - its database may be down; retried
                    print(f"{item.service.name} cannot start yet: {redact(str(error))}")

    def stop(self) -> None:
        """Stop the services in reverse order."""
        for item in reversed(self.running.values()):
            item.stop()

    def health(self) -> dict[str, bool]:
        """Service name -> whether it answers."""
        return {name: item.service.healthy() for name, item in self.running.items()}

    def __enter__(self) -> Stack:
        """Start everything."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop everything."""
        self.stop()


def up(folder: Path) -> int:
    """Run the stack in the foreground until SIGINT or SIGTERM."""
    with _only_supervisor(folder):
        signal.signal(signal.SIGTERM, _interrupt)
        stack = Stack(folder)
        ready = stack.folder / "ready"
        try:
            stack.start()
            print(describe(stack), flush=True)
            ready.touch()
            while True:
                time.sleep(RESTART_PAUSE_SECONDS)
                stack.revive()
        except KeyboardInterrupt:
            print("stopping")
        finally:
            stack.stop()
            ready.unlink(missing_ok=True)
    return 0


def up_detached(folder: Path) -> int:
    """Start the supervisor in the background and wait until it reports readiness."""
    if (pid := supervisor_of(folder)) is not None:
        print(f"already running (process {pid})")
        print(describe(Stack(folder)))
        return 0
    ready, log = folder / "ready", folder / "logs" / "stack.log"
    ready.unlink(missing_ok=True)  # left by a supervisor that was killed
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "infra.stack", "--folder", str(folder), "up"],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while not ready.exists():
        if child.poll() is not None:
            print(log.read_text(errors="replace")[-2000:], file=sys.stderr)
            return 1
        time.sleep(0.2)
    print(describe(Stack(folder)))
    return 0


def down(folder: Path) -> int:
    """Stop a stack that runs in the background; succeeds when none is running."""
    pid = supervisor_of(folder)
    if pid is None:
        print(f"no stack is running in {folder}")
        return 0
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return 0
    except PermissionError as error:
        raise StackError(f"the stack (process {pid}) belongs to another user") from error
    until = time.monotonic() + 10 * STOP_SECONDS
    while time.monotonic() < until:
        if supervisor_of(folder) is None and not _is_running(pid):
            return 0
        time.sleep(0.1)
    print(f"process {pid} is still stopping; see {folder / 'logs'}", file=sys.stderr)
    return 1


def describe(stack: Stack) -> str:
    """The addresses of the services, as printed after the start."""
    settings = stack.settings
    return "\n".join(
        [
            f"stack in {stack.folder} (logs: {stack.folder / 'logs'})",
            f"  Prefect  {settings.url('prefect')}",
            f"  MLflow   {settings.url('mlflow')}",
            f"  S3       {settings.url('s3')}  buckets under {stack.folder / 's3'}",
            '  clients: eval "$(python -m infra.stack env)"',
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m infra.stack", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--folder", type=Path, default=Path("stack"), help="default: ./stack")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up").add_argument("--detach", action="store_true")
    for name in ("down", "status", "env"):
        commands.add_parser(name)
    options = parser.parse_args(arguments)
    folder = options.folder.absolute()
    try:
        if options.command == "up":
            return up_detached(folder) if options.detach else up(folder)
        if options.command == "down":
            return down(folder)
        if options.command == "env":
            for name, value in Stack(folder).environment().items():
                print(f"export {name}={shlex.quote(value)}")
            print(f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')
            return 0
        health = Stack(folder).health()
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, healthy in health.items():
        print(f"{name:10} {'healthy' if healthy else 'down'}")
    return 0 if all(health.values()) else 1


def _inherited() -> dict[str, str]:
    """The caller's environment without settings that would point a server at another one."""
    drop = ("PREFECT_", "MLFLOW_", "AWS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(drop)}


def _descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def supervisor_of(folder: Path) -> int | None:
    """The process that holds the folder's lock, or None.

    Only the lock counts: the number in the file may by now belong to an unrelated process.
    """
    with contextlib.suppress(FileNotFoundError), open(folder / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(lock.read())
    return None


def _is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _only_supervisor(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two supervisors would compete for the same ports and data."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackError(f"a stack is already running in {folder}; stop it first") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


if __name__ == "__main__":
    sys.exit(main())
