"""How many loader workers: those that the machine and the start method of processes allow."""

from __future__ import annotations

import ast
import multiprocessing
import os
import sys
import warnings
from pathlib import Path

MOST_WORKERS = 12  # a GPU that needs more is rare, and each takes memory


def usable_cores() -> int:
    """Number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not available on macOS and Windows
        return os.cpu_count() or 1


def workers_of_share(processes: int, batches: int) -> int:
    """Workers of a loader of `batches` batches in one of `processes` trainings on this machine.

    One per core of the training's share, at most MOST_WORKERS and at most one per batch.
    """
    return max(1, min(usable_cores() // processes, MOST_WORKERS, batches))


def safe_workers(workers: int) -> int:
    """`workers`, or 0 with a warning where spawned workers would start training again.

    A spawned worker imports the main script; without the guard `if __name__ == "__main__":` that
    starts another training. A script that cannot be read counts as guarded.
    """
    method = multiprocessing.get_start_method(allow_none=True)
    if not workers or (method or multiprocessing.get_all_start_methods()[0]) == "fork":
        return workers
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or _is_guarded(Path(script)):
        return workers
    warnings.warn(
        f"{script} starts training outside `if __name__ == '__main__':`, and worker processes "
        "would run it again. Data is loaded without workers; add the guard to use them.",
        stacklevel=3,
    )
    return 0


def _is_guarded(script: Path) -> bool:
    try:
        tree = ast.parse(script.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return True
    return any(isinstance(node, ast.If) and "__name__" in ast.dump(node.test) for node in tree.body)
