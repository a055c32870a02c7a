"""The torchrun agent of this machine, which ends with one line instead of its own traceback."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from flows.core.errors import FAILED, OK

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def main(arguments: list[str]) -> int:
    """Run torchrun with its `arguments`. Status 128 + N if signal N asked it to stop.

    A second signal, as when a system that shuts down signals every process, would end the wait for
    the trainers, which save their state. _terminate_process_handler, torch 2.14.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def stop_once(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for known in SIGNALS:
            signal.signal(known, signal.SIG_IGN)
        raise SignalException(f"signal {signum}", sigval=signal.Signals(signum))

    api._terminate_process_handler = stop_once
    try:
        run.main(arguments)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        code = failure.exitcode
        how = f"was killed by {failure.signal_name()}" if code < 0 else f"ended with status {code}"
        print(f"rank {rank} {how}", file=sys.stderr)
        return FAILED
    return OK


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
