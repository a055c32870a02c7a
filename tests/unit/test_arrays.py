from __future__ import annotations

import numpy as np
import pytest

from rfdetr.arrays import find_rows


@pytest.mark.parametrize(
    ("keys", "wanted", "rows"),
    [
        ([5, 1, 9], [9, 5, 2, 1, 10], [2, 0, -1, 1, -1]),
        ([4, 7, 4, 7], [7, 4], [1, 0]),  # the first of equal keys
        ([3], [], []),
        ([], [1, 2], [-1, -1]),
        ([-(2**63), 2**63 - 1], [2**63 - 1, -(2**63)], [1, 0]),
    ],
)
def test_find_rows(keys: list[int], wanted: list[int], rows: list[int]) -> None:
    found = find_rows(np.array(keys, np.int64), np.array(wanted, np.int64))
    assert found.dtype == np.int64
    assert found.tolist() == rows
