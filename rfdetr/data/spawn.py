"""Loader workers under the start method "spawn", which runs the main script in each worker."""

from __future__ import annotations

import ast
import multiprocessing
import sys
import warnings
from pathlib import Path


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
