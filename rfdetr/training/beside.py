"""Work beside the training thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Beside:
    """One thread that works through calls in order, at most one behind its caller.

    An error of a call is raised by the next `run` or `finish`. The thread starts with the first
    call and ends in `finish` or `cancel`. Pickles and copies as an idle one.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[Any] | None = None

    def run(self, work: Callable[..., Any], *args: Any) -> None:
        """Start `work(*args)` once the call before it has ended."""
        self.wait()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._running = self._pool.submit(work, *args)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the running call, and raise its error, or TimeoutError after `timeout` s."""
        if self._running is not None:
            self._running.result(timeout)

    def finish(self, timeout: float | None = None) -> None:
        """Wait for the running call and end the thread."""
        try:
            self.wait(timeout)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the thread, after its running call if there is one; the call's error is dropped."""
        pool, self._pool = self._pool, None
        running, self._running = self._running, None
        if pool is not None:
            pool.shutdown(wait=running is None or running.done(), cancel_futures=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name,)
