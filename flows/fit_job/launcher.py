"""The torchrun agent of this machine, which ends with one line instead of its own traceback."""

from __future__ import annotations

import sys

from flows.core.errors import FAILED, OK


def main(arguments: list[str]) -> int:
    """Run torchrun with its `arguments`. Status 128 + N if signal N asked it to stop."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

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
