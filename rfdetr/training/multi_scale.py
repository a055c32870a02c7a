"""One random square size per optimizer step (training specification, section 5.4)."""

from __future__ import annotations

import random
from collections.abc import Sequence


def draw_size(sizes: Sequence[int], global_step: int) -> int:
    """The size of optimizer step `global_step`: equal on all ranks, in a window and on resume."""
    return random.Random(global_step).choice(sizes)  # noqa: S311
