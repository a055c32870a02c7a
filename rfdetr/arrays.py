"""Array types and the one lookup by key that readers, checks and metrics share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]


def find_rows(keys: Integers, wanted: Integers) -> Integers:
    """For each value of `wanted` (n,), the first position in `keys` that equals it, else -1.

    `keys` may be in any order and may repeat.
    """
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(keys, kind="stable")
    place = np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)
    rows = order[place]
    return np.where(keys[rows] == wanted, rows, -1)
