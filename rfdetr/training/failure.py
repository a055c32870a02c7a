"""A failed run gives its device back: the process ends in time, whatever hangs."""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_warn

from rfdetr.training.lightning_adapter import end_loader_workers, handles_failure

LIMIT_S = 8.0  # from the failure to its end in the trainer
LOGGERS_S = 3.0
FILES_S = 3.0  # that callbacks wait for files, together; threads continue to write them
AT_EXIT_S = 4.0  # from the end of the script to the end of the process
END_S = 9.0  # from the failure to the end of the process, if the script ends within LIMIT_S


def limit_failure(trainer: pl.Trainer, exception: BaseException) -> None:
    """Bound what follows a failure; call it in `on_exception`.

    Loader workers are killed, and loggers have LOGGERS_S to end, or what their `failure_seconds`
    say. If the trainer has not raised the error LIMIT_S after the failure, or if the process has
    not ended AT_EXIT_S after its main thread (END_S after the failure at the latest), it is ended,
    with the status of a SystemExit (SIGTERM: 143) or else 1. A program that handles the error
    continues undisturbed until it ends; an interactive session is never ended.
    """
    end_loader_workers(trainer)
    _end_loggers(trainer.loggers, exception)
    if not (hasattr(sys, "ps1") or "ipykernel" in sys.modules):
        lift_limit()
        status = exception.code if isinstance(exception, SystemExit) else 1
        _Watch.current = _Watch(trainer, status if isinstance(status, int) else 1)


def patience() -> float:
    """Seconds that a callback may still wait for its files in `on_exception`."""
    if _Watch.current is None:
        return FILES_S
    return max(0.0, FILES_S - (time.monotonic() - _Watch.current.started))


def lift_limit() -> None:
    """Forget an earlier failure; call it when a run starts."""
    if _Watch.current is not None:
        _Watch.current.cancelled = True
        _Watch.current = None


class _Watch:
    """Ends the process if the handling of a failure or the exit of the interpreter hangs."""

    current: _Watch | None = None

    def __init__(self, trainer: pl.Trainer, status: int) -> None:
        self.cancelled = False
        self.started = time.monotonic()
        self._trainer = weakref.ref(trainer)
        self._status = status
        threading.Thread(target=self._run, name="failure limit", daemon=True).start()
        atexit.register(self._arm)  # where the thread does not get to run

    def _run(self) -> None:
        main = threading.main_thread()
        main.join(LIMIT_S - LOGGERS_S)
        if main.is_alive() and handles_failure(main, self._trainer()) and not self.cancelled:
            print("The failed run did not end in time; the process is ended.", file=sys.stderr)  # noqa: T201
            sys.stderr.flush()
            os._exit(self._status)
        main.join()
        self._arm()
        time.sleep(self._at_exit())
        if not self.cancelled:
            os._exit(self._status)

    def _at_exit(self) -> float:
        """Seconds for the exit: fewer if the handling of the failure took most of the time."""
        since = time.monotonic() - self.started  # the loggers had their time before
        if since > LIMIT_S - LOGGERS_S:  # the program handled the error and continued
            return AT_EXIT_S
        return min(AT_EXIT_S, END_S - LOGGERS_S - since)

    def _arm(self) -> None:
        if not self.cancelled:
            # a thread of C, which also runs while Python ends its own threads and destructors
            nowhere = os.open(os.devnull, os.O_WRONLY)
            faulthandler.dump_traceback_later(self._at_exit() + 1, exit=True, file=nowhere)


def _end_loggers(loggers: Sequence[Logger], exception: BaseException) -> None:
    """Finalize loggers as Lightning does next, which then finds nothing to do, with a limit."""
    threads = []
    limits = [float(getattr(logger, "failure_seconds", LOGGERS_S)) for logger in loggers]
    for logger in loggers:
        thread = threading.Thread(target=_finalize, args=(logger, exception), daemon=True)
        thread.start()
        threads.append(thread)
    start = time.monotonic()
    for logger, thread, limit in zip(loggers, threads, limits, strict=True):
        thread.join(max(0.0, start + limit - time.monotonic()))
        if thread.is_alive():
            rank_zero_warn(
                f"{type(logger).__name__} did not end within {limit:g} s of the failure; the "
                "run does not wait for it."
            )
            logger.finalize = _nothing  # type: ignore[assignment, method-assign]


def _finalize(logger: Logger, exception: BaseException) -> None:
    traceback = exception.__traceback__
    try:
        raise exception  # noqa: TRY301 - loggers ask for the exception that is being handled
    except BaseException:  # noqa: BLE001
        try:
            logger.finalize("failed")
        except Exception as error:  # noqa: BLE001 - the run's own error comes first
            rank_zero_warn(f"{type(logger).__name__} failed to end: {error}")
    finally:
        exception.__traceback__ = traceback


def _nothing(_status: str) -> None:
    """In place of `finalize` of a logger that hangs."""
