"""`EvaluationData` as bytes, which ranks exchange as tensors; nothing is pickled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rfdetr.arrays import Integers
from rfdetr.evaluation.box_table import BoxTable, EvaluationData

Bytes = NDArray[np.uint8]
_NUMBERS = 8  # bytes of an int64 or float64, which every column is


def to_bytes(data: EvaluationData) -> Bytes:
    """The data as one array of bytes."""
    tables = (data.detections, data.truth)
    masks = [table.rle for table in tables]
    header = [len(data.image_ids), *(len(table) for table in tables)]
    header += [rle is not None for rle in masks]
    parts: list[NDArray[np.generic]] = [np.array(header, np.int64), data.image_ids]
    for table in tables:
        parts += [table.image, table.label, table.crowd.astype(np.int64)]
        parts += [table.box.ravel(), table.area, table.score]
    for rle in masks:
        if rle is not None:
            parts += [
                _sizes(rle).ravel(),
                np.frombuffer(b"".join(c["counts"] for c in rle), np.uint8),
            ]
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts])


def from_bytes(content: Bytes) -> EvaluationData:
    """What `to_bytes` was given."""
    reader = _Reader(content)
    images, detections, truth, *masked = reader.integers(5).tolist()
    image_ids = reader.integers(images)
    tables = [reader.table(rows) for rows in (detections, truth)]
    for i, has_masks in enumerate(masked):
        if has_masks:
            tables[i] = reader.with_masks(tables[i])
    return EvaluationData(image_ids, *tables)


def _sizes(rle: NDArray[np.object_]) -> Integers:
    """Height, width and bytes of every mask (n, 3)."""
    rows = [(*code["size"], len(code["counts"])) for code in rle]
    return np.array(rows, np.int64).reshape(-1, 3)


class _Reader:
    def __init__(self, content: Bytes) -> None:
        self._content = content
        self._place = 0

    def _take(self, count: int) -> Bytes:
        start, self._place = self._place, self._place + count
        return self._content[start : self._place].copy()

    def integers(self, count: int) -> Integers:
        return self._take(count * _NUMBERS).view(np.int64)

    def floats(self, count: int) -> NDArray[np.float64]:
        return self._take(count * _NUMBERS).view(np.float64)

    def table(self, rows: int) -> BoxTable:
        image, label, crowd = (self.integers(rows) for _ in range(3))
        box = self.floats(4 * rows).reshape(-1, 4)
        area, score = self.floats(rows), self.floats(rows)
        return BoxTable(image, label, box, area, score, crowd.astype(bool), None)

    def with_masks(self, table: BoxTable) -> BoxTable:
        rle = np.empty(len(table), dtype=object)
        for i, (height, width, count) in enumerate(self.integers(3 * len(table)).reshape(-1, 3)):
            text = self._take(int(count)).tobytes()
            rle[i] = {"size": [int(height), int(width)], "counts": text}
        columns = (table.image, table.label, table.box, table.area, table.score, table.crowd)
        return BoxTable(*columns, rle)
